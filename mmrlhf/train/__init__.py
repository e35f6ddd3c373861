"""Training: one loop, the cached reference, checkpoints that are whole or absent, and the record of a run."""
