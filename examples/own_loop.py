"""RLHF-V's DDPO in a training loop of your own: `python examples/own_loop.py` (seconds on one core)."""

import copy

import torch
from small import small_model, small_rows

from mmrlhf import fused_preference_loss, linear_logp, sequence_score
from mmrlhf.data.collate import Encoder, collate
from mmrlhf.data.readers import read_groups
from mmrlhf.models.load import lm_head
from mmrlhf.models.shared_prefix import response_hidden

model, processor = small_model()
reference = copy.deepcopy(model).requires_grad_(False).eval()
groups = read_groups(small_rows(32)).groups  # or a path: every published format
encoder = Encoder(processor, root=".", segments="paper", gamma=5.0)  # corrected tokens weigh 5
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)

for step in range(12):
    batch = collate([encoder.encode(group) for group in groups[step % 4 :: 4]])
    weighted = {"token_weight": batch.token_weight, "reduction": "mean"}
    with torch.no_grad():
        kept = linear_logp(response_hidden(reference, batch), lm_head(reference).weight, batch.targets)
    out = fused_preference_loss(
        response_hidden(model, batch),  # [N, H]: one pass over each prompt, only the rows that are scored
        lm_head(model).weight,
        batch.targets,
        batch.cu_seqlens,
        batch.pairs,
        reference_scores=sequence_score(kept, batch.cu_seqlens, **weighted),
        beta=0.5,
        **weighted,
    )
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step:2}  loss {out.loss.item():.4f}  margin {out.margins.mean().item():+.4f}")
