"""Answers beside transformers' own LLaVA class: time to first token, and tokens a second after it.

    python benchmarks/llava_generate.py --json llava_generate.json

Both have SmolLM2-135M, the shipped CLIP's tokens of block 2 and the same projector; the greedy tokens are
compared first. Time to first token: from a message with a picture and a question, through each one's own
processor (theirs is transformers' `LlavaProcessor`), the tower included (ours is cut after its layer). Also
where their processor finds the message as text, rendered before the clock began, as this benchmark had it
first; and without the processors: ours then still turns the stored uint8 pixels into numbers, which their
processor has already done. The rate is of the tokens
after the first. Rounds are interleaved; medians of wall time, and of each round's ratio by wall time and by
processor time, with the 95 % interval of the median (of order statistics, so of any distribution).
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
from scipy.stats import quantile_test
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
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
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
UNUSED = 5  # a token that the question does not have
# The language model's own template, for messages whose content is a list: an image is a token and a line end.
TEMPLATE = """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' }}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE
' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def question() -> list[dict[str, Any]]:
    """One picture and one question."""
    picture = {"type": "image", "image": smooth_picture(160, 120)}
    return [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]


def our_model() -> tuple[LlavaModel, RevelioLlavaProcessor]:
    """Our model and its processor."""
    tower = TowerConfig(str(CLIP), f"block{BLOCK}", budget=TOKENS)
    config = ModelConfig(LANGUAGE, (tower,), template="tokenizer", max_length=512)
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    model.eval().load_towers()
    return model, RevelioLlavaProcessor.of(model, tokenizer)


def their_model(ours: LlavaModel) -> Any:
    """The LLaVA of transformers, of the same parts."""
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
    return model


def our_inputs(processor: RevelioLlavaProcessor) -> Callable[[], dict[str, Any]]:
    """From the question to what our model takes."""
    asked = question()
    return lambda: dict(processor.apply_chat_template(asked, tokenize=True))


def their_inputs(processor: RevelioLlavaProcessor) -> Callable[[], dict[str, Any]]:
    """The same for transformers' model, by its own processor."""
    look: Any = CLIPImageProcessor.from_pretrained(CLIP)
    asked, tokenizer = question(), processor.tokenizer
    mark = tokenizer.convert_ids_to_tokens(UNUSED)
    theirs: Any = LlavaProcessor(
        look,
        tokenizer,
        patch_size=CLIPVisionConfig.from_pretrained(CLIP).patch_size,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE.replace("IMAGE", mark),
        image_token=mark,
        num_additional_image_tokens=1,
    )
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return lambda: dict(theirs.apply_chat_template(asked, add_generation_prompt=True, **how))


def their_inputs_of_text(processor: RevelioLlavaProcessor) -> Callable[[], dict[str, Any]]:
    """As their processor works from there on, of a text that was rendered before."""
    look: Any = CLIPImageProcessor.from_pretrained(CLIP)
    asked, tokenizer = question(), processor.tokenizer
    text = str(processor.apply_chat_template(asked))
    mark = tokenizer.convert_ids_to_tokens(UNUSED) * TOKENS
    assert tokenizer(text)["input_ids"].count(UNUSED) == 0

    def made() -> dict[str, Any]:
        pixels = look(asked[0]["content"][0]["image"], return_tensors="pt")["pixel_values"]
        words = text.replace("<image>", mark)
        found = tokenizer(words, return_tensors="pt", add_special_tokens=False)
        return {**found, "pixel_values": pixels}

    return made


def answer(model: Any, inputs: dict[str, Any], tokens: int) -> torch.Tensor:
    """So many new tokens."""
    settings = GenerationConfig(
        min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :]


def compare(tokens: int, rounds: int) -> dict[str, Any]:
    """Rounds in turn."""
    ours, processor = our_model()
    pairs: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
        "transformers": (their_model(ours), their_inputs(processor)),
        "ours": (ours, our_inputs(processor)),
    }
    rendered = their_inputs_of_text(processor)
    kept = {name: inputs() for name, (_, inputs) in pairs.items()}
    same = (one["input_ids"] for one in (kept["transformers"], rendered()))
    assert torch.equal(*same), "their processor makes another text"
    calls: dict[tuple[str, str], Callable[[], torch.Tensor]] = {}
    for name, (model, inputs) in pairs.items():
        calls[name, "first"] = lambda model=model, inputs=inputs: answer(model, inputs(), 1)
        starts = rendered if name == "transformers" else inputs
        calls[name, "text"] = lambda model=model, inputs=starts: answer(model, inputs(), 1)
        calls[name, "generate"] = lambda model=model, name=name: answer(model, kept[name], 1)
        calls[name, "all"] = lambda model=model, name=name: answer(model, kept[name], tokens)
    found = [calls[name, "all"]() for name in pairs]
    assert torch.equal(*found), "the two models answer differently"
    times: dict[tuple[str, str], list[tuple[float, ...]]] = {key: [] for key in calls}
    for number in range(rounds + 1):
        # The same question to both, one after the other, each first in every other round.
        for what in ("first", "text", "generate", "all"):
            for name in sorted(pairs, reverse=bool(number % 2)):
                began = [clock() for clock in CLOCKS.values()]
                calls[name, what]()
                if number:
                    took = zip(CLOCKS.values(), began, strict=True)
                    times[name, what].append(tuple(clock() - before for clock, before in took))
    first, text, alone = (
        {name: times[name, what] for name in pairs} for what in ("first", "text", "generate")
    )
    rest = {
        name: [
            tuple(b - a for a, b in zip(*both, strict=True))
            for both in zip(times[name, "generate"], times[name, "all"], strict=True)
        ]
        for name in pairs
    }
    return {
        "prompt": int(kept["ours"]["input_ids"].shape[1]),
        "new_tokens": tokens,
        "first token, seconds": {name: round(_wall(some), 4) for name, some in first.items()},
        "first token without processors, seconds": {
            name: round(_wall(some), 4) for name, some in alone.items()
        },
        "tokens a second": {
            name: round((tokens - 1) / _wall(some), 2) for name, some in rest.items()
        },
        "first token, transformers / ours": _ratio(first),
        "first token of their text rendered before, transformers / ours": _ratio(text),
        "first token without processors, transformers / ours": _ratio(alone),
        "tokens a second, ours / transformers": _ratio(rest),
    }


def _wall(times: list[tuple[float, ...]]) -> float:
    """The median of the wall time."""
    return median(wall for wall, _ in times)


def _ratio(times: dict[str, list[tuple[float, ...]]]) -> dict[str, list[float]]:
    """By each clock the median of the rounds' ratios, and its 95 % interval."""
    found = {}
    for clock, theirs, ours in zip(
        CLOCKS, *(zip(*times[name], strict=True) for name in ("transformers", "ours")), strict=True
    ):
        ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
        spread = quantile_test(ratios, p=0.5).confidence_interval(0.95)
        found[clock] = [round(float(value), 3) for value in (median(ratios), *spread)]
    return found


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
