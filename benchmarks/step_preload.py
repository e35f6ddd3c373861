"""What every side of the whole-step benchmark imports, for the server that their processes are forked from.

Imported before the fork, so that it is neither in a side's seconds nor in its memory. Nothing is computed here: a
thread pool that was used does not survive a fork.
"""

import importlib
import importlib.util

for name in (
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "transformers.trainer",
    "datasets",
    "peft",
    "trl.trainer.dpo_trainer",
    "mmrlhf.integrations.trl",
):
    if importlib.util.find_spec(name.partition(".")[0]) and (name[:6] != "mmrlhf" or importlib.util.find_spec("trl")):
        importlib.import_module(name)
