"""The critique-based reward model of MM-RLHF (arXiv 2502.10391, section 3): criticise an answer, then score it."""
