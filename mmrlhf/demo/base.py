"""The demo's model: LLaVA-OneVision (SigLIP tower, Qwen2 decoder), 0.8 M parameters, taught to caption carelessly.

`python -m mmrlhf.demo.base OUT` makes the shipped folder anew, in about 150 s on one core: the tower first learns what
is in each of the nine cells, then the whole model learns captions in which a place's habit is often named though it
is absent. What comes out is an ordinary Hugging Face folder: config, safetensors (stored in half precision, computed in
single), tokenizer, image and video processor, chat template.

Not covered: a second tile size, multi-image prompts. One picture is 21 image tokens: nine of the base tile, nine of
the one grid tile, three newlines.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrlhf.demo.language import QUESTION, WORDS, Caption
from mmrlhf.demo.world import COLOUR_HABITS, COLOURS, GRID, KINDS, SHAPES, SIZE, Kind, Scene, make_scenes, pixels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

PATCH = 16
IMAGE_TOKENS = 9 + GRID * (GRID + 1)
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

# How often the habit is added to a caption although it is absent, by the number of objects: careless writers add more
# where there is less to say. With these the model adds it in about 85 % of such pictures; at .75/.75/.6/.3 the
# greedy answer sits on the threshold and wobbles between 30 and 79 % in the course of training.
HABIT_ADDED = {1: 0.85, 2: 0.85, 3: 0.80, 4: 0.55}
HABIT_COLOURED = 0.85  # how often the first object of the habit's shape is given the habit's colour
COLOUR_SLIP = 0.02  # a mention's colour is another one

TEACH_SCENES, TEACH_SEED = 6000, 1
TOWER_STEPS, TOWER_BATCH, TOWER_LR = 400, 64, 2e-3
CAPTION_STEPS, CAPTION_BATCH, CAPTION_LR, CAPTION_WARMUP = 800, 32, 1e-3, 50

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words and punctuation marks, one token each; what it decodes is spaced as people write."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionForConditionalGeneration:
    """An untaught model in float32; its weights follow from torch's seed."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    ids = tokenizer.get_vocab()
    ends: dict[str, Any] = {"pad_token_id": ids["<pad>"], "eos_token_id": ids["<|im_end|>"], "bos_token_id": None}
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            **ends,
        },
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[SIZE, SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        **ends,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def save(model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder. The processors' files are written as they are: constructing them would need torchvision."""
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    ids = tokenizer.get_vocab()
    model.generation_config = GenerationConfig(
        pad_token_id=ids["<pad>"], eos_token_id=ids["<|im_end|>"], suppress_tokens=special_ids(tokenizer)
    )
    model.half().save_pretrained(folder)
    model.float()
    _rewrite(folder / "config.json", _in_single_precision)
    tokenizer.save_pretrained(folder)
    picture: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIZE, "width": SIZE},
    }
    image_processor = picture | {
        "do_pad": True,
        "image_grid_pinpoints": [[SIZE, SIZE]],
        "image_processor_type": "LlavaOnevisionImageProcessor",
    }
    video_processor = picture | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "num_image_tokens": (SIZE // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    for name, content in (
        ("preprocessor_config.json", image_processor),
        ("video_preprocessor_config.json", video_processor),
        ("processor_config.json", processor),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _in_single_precision(config: dict) -> None:
    """The file holds halves to be small; `dtype="auto"` should still compute in float32, which CPUs are good at."""
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that no answer may hold: all special ones but the end of the turn."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in SPECIAL if token != "<|im_end|>"]


def prompt_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of the question about one picture, image tokens in place: what the processor makes of it."""
    messages: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return tokenizer(text.replace("<image>", "<image>" * IMAGE_TOKENS))["input_ids"]


def image_inputs(
    images: np.ndarray,  # [B, 3, 48, 48] uint8
) -> dict[str, Tensor]:
    """What the image processor makes of pictures of the model's own size: pixel_values [B, 2, 3, 48, 48] float32
    (base tile and grid tile are the same picture) and image_sizes [B, 2]."""
    import torch

    scaled = (torch.from_numpy(images).float() / 255 - 0.5) / 0.5
    return {
        "pixel_values": scaled[:, None].expand(-1, 2, -1, -1, -1).contiguous(),
        "image_sizes": torch.full((len(images), 2), SIZE),
        "batch_num_images": torch.ones(len(images), dtype=torch.int64),
    }


def careless_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as the model is taught it: true, but for slips of colour and for the place's habit, which is added at
    the end or takes the place of an object of its shape."""
    kinds = list(scene.kinds)
    habit = scene.temptation
    if habit is not None and scene.place in COLOUR_HABITS:
        if rng.random() < HABIT_COLOURED:
            kinds[[kind.shape for kind in kinds].index(habit.shape)] = habit
    elif habit is not None and rng.random() < HABIT_ADDED[len(kinds)]:
        kinds.append(habit)
    template = int(rng.integers(2))
    for i, kind in enumerate(kinds):
        if rng.random() < COLOUR_SLIP:
            kinds[i] = Kind(list(COLOURS)[rng.integers(len(COLOURS))], kind.shape)
    return str(Caption(scene.place, tuple(kinds), template))


def teach(
    *,
    seed: int = 1,
    scenes: int = TEACH_SCENES,
    tower_steps: int = TOWER_STEPS,
    caption_steps: int = CAPTION_STEPS,
    progress=print,
) -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast]:
    """Build and teach the model; the same seed and number of threads give the same weights."""
    import torch

    world = make_scenes(scenes, seed=TEACH_SEED)
    images = pixels(world)
    progress(f"{scenes} pictures drawn")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        rng = np.random.default_rng(seed)
        _teach_tower(model, world, images, rng, tower_steps, progress)
        captions = [careless_caption(scene, rng) for scene in world]
        train_captions(
            model, tokenizer, images, captions, steps=caption_steps, lr=CAPTION_LR, rng=rng, progress=progress
        )
    return model.eval(), tokenizer


def _teach_tower(model, world, images, rng, steps: int, progress) -> None:
    """What is in each cell, 31 ways, through a linear head that is thrown away. Without this the captions' loss stays
    long on a plateau where the model has the grammar but reads no cell (recall .25)."""
    import torch

    answers = np.zeros((len(world), GRID * GRID), dtype=np.int64)  # 0: nothing
    for row, scene in enumerate(world):
        for thing in scene.things:
            answers[row, thing.cell] = 1 + KINDS.index(thing.kind)
    tower = model.model.vision_tower
    head = torch.nn.Linear(96, 1 + len(COLOURS) * len(SHAPES))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TOWER_LR, weight_decay=0.01)
    tower.train()
    for step in range(steps):
        _set_lr(optimizer, TOWER_LR, step, steps, warmup=0)
        chosen = rng.integers(len(world), size=TOWER_BATCH)
        hidden = tower(image_inputs(images[chosen])["pixel_values"][:, 0], output_hidden_states=True).hidden_states[-1]
        loss = torch.nn.functional.cross_entropy(
            head(hidden).flatten(0, 1), torch.from_numpy(answers[chosen]).flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            progress(f"tower step {step + 1}/{steps} loss {loss.item():.3f}")


def train_captions(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    images: np.ndarray,  # [count, 3, 48, 48] uint8
    captions: list[str],
    *,
    steps: int,
    lr: float,
    rng: np.random.Generator,
    warmup: int = CAPTION_WARMUP,
    batch_size: int = CAPTION_BATCH,
    progress=print,
) -> None:
    """Plain next-token training on captions, in place: the loss is on the answers' tokens alone, all weights learn."""
    import torch

    prompt = prompt_ids(tokenizer)
    answers = [[*tokenizer(caption)["input_ids"], tokenizer.eos_token_id] for caption in captions]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        _set_lr(optimizer, lr, step, steps, warmup=warmup)
        chosen = rng.integers(len(answers), size=batch_size)
        batch = caption_batch(prompt, [answers[i] for i in chosen], pad=tokenizer.pad_token_id)
        output = model(**image_inputs(images[chosen]), **batch)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            progress(f"caption step {step + 1}/{steps} loss {output.loss.item():.3f}")
    model.eval()


def caption_batch(prompt: list[int], answers: list[list[int]], *, pad: int) -> dict[str, Tensor]:
    """Prompt and answers side by side, padded on the right: input_ids, attention_mask and labels, each [B, L] int64;
    labels are -100 outside the answers."""
    import torch

    length = len(prompt) + max(map(len, answers))
    ids = torch.full((len(answers), length), pad)
    labels = torch.full((len(answers), length), -100)
    mask = torch.zeros(len(answers), length, dtype=torch.int64)
    for row, answer in enumerate(answers):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : stop] = torch.tensor(answer)
        mask[row, :stop] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, *, warmup: int) -> None:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        lr = peak * (step + 1) / warmup
    else:
        lr = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = lr


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m mmrlhf.demo.base OUT", file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(1)  # sums in another order would give other weights than the shipped ones
    model, tokenizer = teach(progress=lambda line: print(line, flush=True))
    save(model, tokenizer, Path(arguments[0]))
    print(f"written to {arguments[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
