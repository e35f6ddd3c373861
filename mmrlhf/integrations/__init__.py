"""mmrlhf inside other people's trainers: one file a host, each thin; a host is imported with its file alone.

    trl         PreferenceTrainer, PreferenceConfig, patch_dpo_trainer: TRL's DPOTrainer on shared prefixes
    hf_trainer  a collator, a loss and a cached reference for transformers.Trainer
    llamafactory, swift   the DPO stages of LLaMA-Factory and ms-swift, and the command or plugin that runs them so
    liger       FusedLinearDPOLoss and linear_cross_entropy with the signatures of Liger and Cut Cross-Entropy

What the trainers share: `rows` (their rows to a batch), `forward` (a model that scores it), `objective` (their losses),
`hosted` (pairs that a host has tokenised already).
"""
