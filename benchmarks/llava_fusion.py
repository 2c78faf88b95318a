"""What the model half's two shortcuts are worth: fusion by one gather, generation with a KV cache.

    python benchmarks/llava_fusion.py --json llava_fusion.json
    python benchmarks/llava_fusion.py --batch 16 --width 4096 --rounds 7

Fusion: interleave two towers' tokens and splice them into padded text, forward and backward, against a
loop over samples that cuts and joins (the results are compared first). Generation: the same greedy tokens
with the cache, and by running the whole text at every step, on a Llama of SmolLM2-135M's sizes with random
weights. Rounds are interleaved; medians of wall time and of each round's ratio are printed.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX
from llava_ext.fusion import fuse
from llava_ext.splice import splice


def by_gather(ids: Tensor, mask: Tensor, labels: Tensor, text: Tensor, towers: list[Tensor]) -> Any:
    """The product's path."""
    found = splice(ids, mask, labels, text, fuse("interleave", towers))
    return found.embeddings, found.labels


def by_loop(ids: Tensor, mask: Tensor, labels: Tensor, text: Tensor, towers: list[Tensor]) -> Any:
    """One sample after the other: fill every second row of a buffer, cut the text, join the pieces."""
    rows, targets, image = [], [], 0
    for sample in range(len(ids)):
        length = int(mask[sample].sum())
        pieces, marks, start = [], [], 0
        for place in (ids[sample, :length] == IMAGE_INDEX).nonzero().flatten().tolist():
            merged = torch.zeros(2 * towers[0].shape[1], text.shape[-1])
            for number, tokens in enumerate(towers):
                merged[number::2] = tokens[image]
            pieces += [text[sample, start:place], merged]
            marks += [labels[sample, start:place], torch.full((len(merged),), IGNORE_INDEX)]
            start, image = place + 1, image + 1
        pieces.append(text[sample, start:length])
        marks.append(labels[sample, start:length])
        rows.append(torch.cat(pieces))
        targets.append(torch.cat(marks))
    joined = pad_sequence(rows, batch_first=True)
    return joined, pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)


def fusion_inputs(flags: argparse.Namespace) -> tuple[Tensor, ...]:
    """Texts of unequal length, each with an image near its beginning."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(flags.text // 2, flags.text + 1, (flags.batch,), generator=draw)
    mask = (torch.arange(flags.text) < lengths[:, None]).long()
    ids = torch.randint(0, 1000, (flags.batch, flags.text), generator=draw)
    ids[:, 3] = IMAGE_INDEX
    return ids, mask, ids.clone()


def compare_fusion(flags: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of both paths in turns."""
    ids, mask, labels = fusion_inputs(flags)
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(*ids.shape, flags.width, generator=draw, requires_grad=True)
    shape = (flags.batch, flags.tokens, flags.width)
    towers = [torch.randn(*shape, generator=draw, requires_grad=True) for _ in range(2)]
    inputs = (ids, mask, labels, text, towers)
    for own, other in zip(by_gather(*inputs), by_loop(*inputs), strict=True):
        assert torch.equal(own, other)

    def step(path: Callable) -> Callable[[], None]:
        return lambda: path(*inputs)[0].sum().backward()

    return in_turns({"loop": step(by_loop), "gather": step(by_gather)}, flags.rounds)


def compare_generation(flags: argparse.Namespace) -> dict[str, Any]:
    """Greedy generation from embeddings with and without the cache, in turns."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config).eval()
    prompt = torch.randn(1, flags.prompt, 576, generator=torch.Generator().manual_seed(2))
    new = flags.new_tokens

    settings = GenerationConfig(min_new_tokens=new, max_new_tokens=new, do_sample=False)
    mask = torch.ones(1, flags.prompt, dtype=torch.long)

    def cached() -> Tensor:
        return model.generate(inputs_embeds=prompt, attention_mask=mask, generation_config=settings)

    def afresh() -> Tensor:
        text = prompt
        found: list[Tensor] = []
        for _ in range(new):
            logits = model(inputs_embeds=text, use_cache=False, logits_to_keep=1).logits
            found.append(logits[:, -1].argmax(-1))
            text = torch.cat([text, model.get_input_embeddings()(found[-1])[:, None]], dim=1)
        return torch.stack(found, dim=1)

    with torch.no_grad():
        assert torch.equal(afresh(), cached())
        return in_turns({"no cache": afresh, "cache": cached}, flags.generations)


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Medians of interleaved rounds; the first of ``steps`` is the baseline."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index or rounds == 1:
                times[name].append(time.perf_counter() - start)
    baseline, other = times
    ratios = [a / b for a, b in zip(times[baseline], times[other], strict=True)]
    seconds = {name: round(median(each), 4) for name, each in times.items()}
    return {"seconds": seconds, f"{baseline} / {other}": round(median(ratios), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--text", type=int, default=128, help="text tokens of the longest sample")
    parser.add_argument("--tokens", type=int, default=256, help="of each tower, an image")
    parser.add_argument("--width", type=int, default=1024, help="of the language model")
    parser.add_argument("--prompt", type=int, default=96, help="tokens before the answer")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--generations", type=int, default=3)
    flags = parser.parse_args()
    report: dict[str, Any] = {
        "sizes": {k: v for k, v in vars(flags).items() if k != "json"},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "fusion": compare_fusion(flags),
        "generation": compare_generation(flags),
    }
    print(json.dumps(report, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
