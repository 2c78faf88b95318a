"""Answers beside transformers' own LLaVA class: time to first token, and tokens a second after it.

    python benchmarks/llava_generate.py --json llava_generate.json

Both have SmolLM2-135M, the shipped CLIP's tokens of block 2 and the same projector; the greedy tokens are
compared first. Time to first token: `generate` of one token from a processor's output, the tower included
(ours is cut after its layer). The rate is of the tokens after the first. Rounds are interleaved; medians of
wall time and of each round's ratio.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_ext.config import ModelConfig, TowerConfig
from llava_ext.images import smooth_picture
from llava_ext.language import build_model
from llava_ext.model import LlavaModel
from llava_ext.processor import RevelioLlavaProcessor
from llava_ext.towers import load_towers

CLIP = Path(__file__).resolve().parents[1] / "models" / "mini-clip"
BLOCK, TOKENS = 2, 64
LANGUAGE = "smollm2-135m-instruct"
QUESTION = "What is in this picture? Describe it in a few words."
UNUSED = 5  # a token that the question does not have


def our_model() -> tuple[LlavaModel, dict[str, Any]]:
    """Our model, and a processor's output for one picture."""
    tower = TowerConfig(str(CLIP), f"block{BLOCK}", budget=TOKENS)
    config = ModelConfig(LANGUAGE, (tower,), template="tokenizer", max_length=512)
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    model.eval().load_towers()
    processor = RevelioLlavaProcessor.of(model, tokenizer)
    content = [
        {"type": "image", "image": smooth_picture(160, 120)},
        {"type": "text", "text": QUESTION},
    ]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    return model, dict(inputs)


def their_model(ours: LlavaModel, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The LLaVA of transformers, of the same parts, and the same input."""
    vision: Any = CLIPVisionModel.from_pretrained(CLIP, dtype=torch.float32)
    text: Any = deepcopy(ours.language_model)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=UNUSED,
        vision_feature_layer=BLOCK + 1,
        image_seq_length=TOKENS,
    )
    model: Any = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower, model.model.language_model = vision, text.model
    model.lm_head, model.generation_config = text.lm_head, text.generation_config
    names = {"0": "linear_1", "2": "linear_2"}
    mlp: Any = ours.projectors[0].mlp
    state = {f"{names[key[0]]}{key[1:]}": value for key, value in mlp.state_dict().items()}
    model.model.multi_modal_projector.load_state_dict(state)
    ids = inputs["input_ids"]
    assert UNUSED not in ids
    image = smooth_picture(160, 120)
    pixels = ours.towers[0].pixels(image)[None]
    return model, {
        "input_ids": ids.masked_fill(ids == ours.config.image_token_id, UNUSED),
        "attention_mask": inputs["attention_mask"],
        "pixel_values": pixels,
    }


def answers(model: Any, inputs: dict[str, Any], tokens: int) -> Callable[[], torch.Tensor]:
    """A call that gives so many new tokens."""
    settings = GenerationConfig(
        min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    start = inputs["input_ids"].shape[1]
    return lambda: model.generate(**inputs, generation_config=settings)[:, start:]


def compare(tokens: int, rounds: int) -> dict[str, Any]:
    """Rounds in turn."""
    ours, inputs = our_model()
    pairs: dict[str, tuple[Any, Any]] = {
        "transformers": their_model(ours, inputs),
        "ours": (ours, inputs),
    }
    calls = {
        (name, count): answers(*pair, count)
        for count in (1, tokens)
        for name, pair in pairs.items()
    }
    found = [calls[name, tokens]() for name in pairs]
    assert torch.equal(*found), "the two models answer differently"
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                times[key].append(time.perf_counter() - began)
    first = {name: times[name, 1] for name in pairs}
    rest = {
        name: [b - a for a, b in zip(times[name, 1], times[name, tokens], strict=True)]
        for name in pairs
    }
    return {
        "prompt": int(inputs["input_ids"].shape[1]),
        "new_tokens": tokens,
        "first token, seconds": {name: round(median(some), 4) for name, some in first.items()},
        "tokens a second": {
            name: round((tokens - 1) / median(some), 2) for name, some in rest.items()
        },
        "first token, transformers / ours": _ratio(first),
        "tokens a second, ours / transformers": _ratio(rest),
    }


def _ratio(times: dict[str, list[float]]) -> float:
    return round(
        median(a / b for a, b in zip(times["transformers"], times["ours"], strict=True)), 3
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    report = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "rounds": given.rounds,
    } | compare(given.tokens, given.rounds)
    print(json.dumps(report, indent=2))
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
