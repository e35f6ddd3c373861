"""CPU time of a training step inside a host, its own and with mmrlhf, one thread, run by run in turns.

    .venv-hosts/llamafactory/bin/python tests/hosts/step_ratio.py llamafactory [lora]
    .venv-hosts/swift/bin/python tests/hosts/step_ratio.py swift [lora]

The 38 M model of the whole-step benchmark, a picture of 324 tokens a prompt, two answers of 40 words (79 tokens). A
step is the forward of policy and reference and the backward; loading and the optimiser are left out. The first of a
run is too, for the self-check is in it. Prints a line a round, and the ratio of the medians.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hosts.cpu_torchvision import declare  # noqa: E402

declare()

import torch  # noqa: E402

from benchmarks.step_models import build_model, build_processor  # noqa: E402
from tiny import tiny_image  # noqa: E402

STEPS, ROUNDS, PAIRS, SIDE = 4, 2, 2, 18


def rows(folder: Path, count: int) -> list[dict]:
    rng = random.Random(0)
    made = []
    for index in range(count):
        path = folder / f"{index}.png"
        tiny_image(28 * SIDE, 28 * SIDE, seed=index).save(path)
        chosen, rejected = (" ".join(rng.choice("abcdefgh") for _ in range(40)) for _ in range(2))
        made.append({"prompt": "what is it ?", "chosen": chosen, "rejected": rejected, "images": [str(path)]})
    return made


def main(host: str, lora: bool) -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    processor = build_processor()
    build_model("small", processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    made = rows(folder, PAIRS * STEPS)
    pixels = (28 * SIDE) ** 2
    common = {"max_steps": STEPS, "per_device_train_batch_size": PAIRS}
    if host == "llamafactory":
        from hosts.run_llamafactory import ORIGINAL as trainer
        from hosts.run_llamafactory import run, write_set

        write_set(folder, "pairs", made)
        kind = {"finetuning_type": "lora", "lora_target": "all"} if lora else {}
        options = {**common, **kind, "image_max_pixels": pixels, "cutoff_len": 2048}
    else:
        from hosts.run_swift import DPOTrainer as trainer
        from hosts.run_swift import encoded, run, use_ids_of, write_set

        write_set(folder, "pairs", [encoded(row) for row in made])
        use_ids_of(folder / "model", pixels)
        options = {**common, "tuner_type": "lora" if lora else "full", "max_length": 2048}
    times: dict[bool, list[float]] = {False: [], True: []}
    step = trainer.training_step

    for number in range(ROUNDS):
        for mine in (False, True):
            taken: list[float] = []

            def timed(self, *args, taken=taken, **kwargs):
                begin = time.process_time()
                loss = step(self, *args, **kwargs)
                taken.append(time.process_time() - begin)
                return loss

            trainer.training_step = timed
            record = run(folder, folder / f"{number}-{mine}", {"token_metrics": False} if mine else None, **options)
            times[mine] += taken[1:]
            print(f"ROUND {host} mmrlhf={mine} pictures={record.pictures} {[round(t, 2) for t in taken[1:]]}")
    host_time, ours = (statistics.median(times[mine]) for mine in (False, True))
    print(f"RATIO {host} {'lora' if lora else 'full'}: {host_time:.2f} s / {ours:.2f} s = {host_time / ours:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], "lora" in sys.argv[2:])
