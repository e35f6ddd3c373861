"""Vision-language models: loading, images once, one pass over a prompt for all its responses, answers.

load           models and processors from folders, whole or not at all; `lm_head`, `base_model`, `save_pretrained`
vision         every image through the tower once: `encode`, `freeze`
shared_prefix  `response_hidden`: hidden rows of response tokens; `self_check`, `can_share`
generate       `answer`, `sample`
"""
