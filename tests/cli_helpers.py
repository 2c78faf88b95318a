"""Inputs for every command that writes, a short call of each, and how it is given again after a stop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from analysis_helpers import gallery_parts, write_pictures
from backbones_helpers import tiny_sd
from data_helpers import write_class_folders
from diffc_helpers import separable, write_folders
from eval_helpers import make_bench, review_row, write_jsonl
from llava_train_helpers import tiny_project, write_config
from PIL import Image
from sae_helpers import planted

from eval import llava_bench, mmvp
from llava_ext import cli as llava
from revelio.activations.store import write_store
from revelio.cli import COMMANDS, find_module, main
from revelio.diffc.model import DiffC
from revelio.endpoint import Outcome
from revelio.reply_cache import Reply
from revelio.sae.model import KSparseAutoencoder

Words = Callable[[Path], list[object]]

# An endpoint where nobody listens.
NOBODY = ("--base-url", "http://127.0.0.1:9/v1", "--tries", 1)


def write_inputs(root: Path) -> Path:
    """A store, a k-SAE, pictures, grids, a classifier and reviews."""
    model, *_ = gallery_parts(root / "store")
    model.save_pretrained(root / "ksae")
    write_pictures(root / "images")
    rows, _ = planted(20, 4, 6, 2)
    write_store(root / "rows", rows, [str(i) for i in range(20)])
    grids, labels = separable(3)
    settings = {"pool": "none", "layer": "mix", "classes": ["a", "b", "c"]}
    write_store(root / "grids", grids, [str(i) for i in range(9)], labels, settings=settings)
    write_store(root / "others", grids, [f"o{i}" for i in range(9)], labels, settings=settings)
    DiffC(6, 3, width=2, class_names=["a", "b", "c"], seed=0).save_pretrained(root / "diffc")
    write_folders(root / "folders", 2)
    write_class_folders(root / "pets", {"ant": 6, "bee": 6})
    many, _ = planted(120, 4, 6, 2)
    write_store(root / "many", many, [str(i) for i in range(120)], [i % 2 for i in range(120)])
    KSparseAutoencoder(4, 8, 2).save_pretrained(root / "small")
    cells = torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    write_store(root / "whole", cells, [str(i) for i in range(6)], settings={"pool": "none"})
    (root / "prompts.csv").write_text("prompt,class\na dog,dog\na cat,cat\n")
    tiny_sd(root / "sd")
    write_jsonl(root / "reviews.jsonl", [review_row(i, "conv", (8.0, 6.0)) for i in range(3)])
    main(["top-images", "--store", str(root / "store"), "--ksae", str(root / "ksae"),
          "--out", str(root / "top")])  # fmt: skip
    run_words(commands(root)["concept"](root / "concept"))
    write_chat(root / "chat")
    write_replies(root)
    return root


def write_chat(root: Path) -> None:
    """Towers, a language model, pictures and conversations, both stages' results, and two benches."""
    root.mkdir()
    write_config(root, tiny_project(root, records=4))
    made = root.parent
    for stage in ("pretrain", "finetune"):
        run_words(commands(made)[f"llava {stage}"](root / stage))
    KSparseAutoencoder(32, 64, 2).save_pretrained(root / "ksae")
    make_bench(made / "bench", 2)
    pictures = made / "mmvp" / "MMVP Images"
    pictures.mkdir(parents=True)
    rows = ["Index,Question,Options,Correct Answer"]
    for number in (1, 2):
        Image.new("RGB", (20, 20), (99 * number, 9, 9)).save(pictures / f"{number}.jpg")
        rows.append(f"{number},Is it open?,(a) Open (b) Closed,({'ab'[number - 1]})")
    (made / "mmvp" / "Questions.csv").write_text("\n".join(rows) + "\n")


def write_replies(root: Path) -> None:
    """What judges said once, so that no other call asks one."""

    def ask(bodies: Sequence[dict], settings: object, keep: Callable, *_: object) -> Outcome:
        for number, body in enumerate(bodies):
            name = '{"choice": "A", "name": "red", "confidence": 9, "images": [1, 2]}'
            keep(number, Reply(name if body["model"] == "sees" else "8 6\nBecause."))
        return Outcome(sent=len(bodies))

    asks = ("revelio.pipelines.vision_judge.ask_all", "eval.bench.judge.ask_all")
    with patch(asks[0], ask), patch(asks[1], ask):
        for name in ("name-latents", "llava-bench judge"):
            run_words(commands(root)[name](root / "once" / name.split()[-1]))


def commands(made: Path) -> dict[str, Words]:
    """A short call of every command that writes, for a place to write to."""
    groups = (_of_stores, _of_models, _of_prompts, _of_llava, _of_benches)
    return {name: words for group in groups for name, words in group(made).items()}


def _answering(made: Path) -> list[object]:
    return ["--model", made / "chat" / "finetune" / "final", "--device", "cpu"]


def _of_stores(made: Path) -> dict[str, Words]:
    """What reads stores and k-SAEs, and Diff-C."""
    ksae = ["--store", made / "store", "--ksae", made / "ksae"]
    return {
        "train-ksae": lambda out: [
            *("train-ksae", "--store", made / "rows", "--steps", 2, "--expansion", 2, "--k", 2),
            *("--kernel", "torch", "--checkpoint-every", 1, "--out", out),
        ],
        "train-diffc": lambda out: [
            *("train-diffc", "--store", made / "grids", "--test-store", made / "grids"),
            *("--epochs", 1, "--width", 2, "--out", out),
        ],
        "eval-diffc": lambda out: [
            *("eval-diffc", "--diffc", made / "diffc", "--store", made / "grids", "--out", out)
        ],
        "top-images": lambda out: ["top-images", *ksae, "--out", out],
        "gallery": lambda out: [
            *("gallery", *ksae, "--top", made / "top", "--data.source", made / "images"),
            *("--latents", 5, "--map-method", "pca", "--out", out),
        ],
        "eval-ksae": lambda out: [
            *("eval-ksae", "--store", made / "many", "--ksae", made / "small", "--out", out)
        ],
        "locality": lambda out: [
            *("locality", "--store", made / "whole", "--ksae", made / "small", "--out", out)
        ],
        "probe": lambda out: [
            *("probe", "--store", made / "grids", "--test-store", made / "others"),
            *("--probes", "knn", "--out", out),
        ],
        "purity": lambda out: ["purity", "--top", made / "top", "--random-sets", 9, "--out", out],
        "name-latents": lambda out: [
            *("name-latents", *ksae, "--top", made / "top", "--data.source", made / "images"),
            *("--judge", "sees", "--latents", 2, "--shown", 4, "--checked", 4, "--repeats", 1),
            *NOBODY,
            *("--side", 24, "--reply-cache", made / "replies" / "names.sqlite", "--out", out),
        ],
        "convert-ksae": lambda out: [
            *("convert-ksae", "--source", made / "ksae", "--to", "sparsify", "--out", out)
        ],
        "configs copy": lambda out: ["configs", "copy", "ksae/quick", "--out", out],
    }


def _of_models(made: Path) -> dict[str, Words]:
    """What loads a model and pictures."""
    backbone = ["--backbone.name", made / "sd", "--backbone.image-size", 32]
    return {
        "extract": lambda out: [
            *("extract", *backbone, "--data.limit", 3, "--data.source", made / "images"),
            *("--layers", "bottleneck", "--out", out),
        ],
        "pca-maps": lambda out: [
            *("pca-maps", *backbone, "--data.limit", 3, "--data.source", made / "images"),
            *("--layers", "bottleneck", "--out", out),
        ],
        "zero-shot": lambda out: [
            *("zero-shot", *backbone, "--data.source", made / "folders", "--data.limit", 2),
            *("--classifier.samples", 1, 2, "--classifier.keep", 1, "--out", out),
        ],
        "advise": lambda out: [
            *("advise", *backbone, "--data.source", made / "pets", "--layers", "bottleneck"),
            *("--timesteps", 25, 99, "--most-images", 20, "--out", out),
        ],
        "reproduce": lambda out: [
            *("reproduce", "figure10", "--scale", "mini", "--backbones", made / "sd", "--seeds", 1),
            *("--data.source", made / "pets", "--out", out),
        ],
        "demo": lambda out: [
            *("demo", "--data.source", made / "folders", *backbone, "--layers", "bottleneck"),
            *("--timesteps", "25", "--m", 2, "--sae.steps", 1, "--out", out),
        ],
    }


def _of_prompts(made: Path) -> dict[str, Words]:
    """Concepts and pictures of prompts."""
    draw = ["--prompts-file", made / "prompts.csv", "--concept", made / "concept", "--steps", 1]
    draw += ["--size", 32, "--backbone.name", made / "sd"]
    return {
        "extract-text": lambda out: [
            *(
                "extract-text",
                "--prompts-file",
                made / "prompts.csv",
                "--backbone.name",
                made / "sd",
            ),
            *("--layers", "text_encoder.block1", "--out", out),
        ],
        "concept": lambda out: [
            *("concept", "--texts", "a dog", "--against", "a cat"),
            *("--layer", "text_encoder.block1"),
            *("--backbone.name", made / "sd", "--out", out),
        ],
        "steer": lambda out: ["steer", *draw, "--strength", 0, "--out", out],
        "steer-eval": lambda out: [
            *("steer-eval", *draw, "--strength", -1, "--target", "dog"),
            *("--judge", "cli_helpers:see"),
            *("--baselines", "random-direction", "--bootstrap", 9, "--out", out),
        ],
    }


def _of_llava(made: Path) -> dict[str, Words]:
    """The LLaVA extension's."""
    config = made / "chat" / "config.yaml"
    stage = ["--config", config, "--stage.save-steps", 1, "--stage.epochs", 0.5]
    at = ["--data.json", made / "chat" / "data.json", "--data.images", made / "chat" / "images"]
    model = _answering(made)
    return {
        "llava cache": lambda out: ["llava", "cache", *stage[:2], "--cache", out],
        "llava pretrain": lambda out: ["llava", "pretrain", *stage, "--out", out],
        "llava finetune": lambda out: [
            *("llava", "finetune", *stage, "--pretrained", made / "chat" / "pretrain" / "final"),
            *("--lora.rank", 2, "--out", out),
        ],
        "llava export": lambda out: [
            *("llava", "export", *model[:2], "--form", "merged", "--out", out)
        ],
        "llava tokens": lambda out: [
            *("llava", "tokens", *model[:2], *at, "--layer", "block1", "--out", out)
        ],
        "llava explain": lambda out: [
            *("llava", "explain", *model, "--image", made / "chat" / "images" / "0.png"),
            *("--question", "what is it?", "--answer", "a dog", "--latents", 1, "--pairs", 1),
            *("--ksae", f"block1={made / 'chat' / 'ksae'}", "--out", out),
        ],
    }


def _of_benches(made: Path) -> dict[str, Words]:
    """LLaVA-Bench and MMVP."""
    bench, model = ["--bench", made / "bench"], _answering(made)
    return {
        "llava-bench answer": lambda out: [
            *("llava-bench", "answer", *bench, *model, "--max-new-tokens", 2, "--out", out)
        ],
        "llava-bench judge": lambda out: [
            *("llava-bench", "judge", *bench, "--answers", made / "bench" / "tiny.jsonl"),
            *NOBODY,
            *("--judge", "reads", "--reply-cache", made / "replies" / "judge.sqlite", "--out", out),
        ],
        "llava-bench score": lambda out: [
            *("llava-bench", "score", "--reviews", made / "reviews.jsonl", "--bootstrap", 9),
            *("--out", out),
        ],
        "mmvp": lambda out: [
            *("mmvp", "--bench", made / "mmvp", *model, "--max-new-tokens", 2, "--out", out)
        ],
    }


def see(pictures: Sequence[Image.Image]) -> list[str]:
    """A judge that sees dogs."""
    return ["dog"] * len(pictures)


@dataclass(frozen=True)
class Writer:
    """What a command writes, and how it is given again after a stop.

    Attributes:
        place: what it writes: a folder, or one file.
        resumes: it goes on with ``--resume``; others are given again as they were.
        once: a finished output is refused, and stays as it is.
    """

    place: str = "out"
    resumes: bool = False
    once: bool = False


WRITERS = {
    **dict.fromkeys(("purity", "locality", "probe", "name-latents"), Writer("out.json")),
    **dict.fromkeys(("llava-bench answer", "llava-bench judge"), Writer("out.jsonl")),
    "llava-bench score": Writer("out.json"),
    **dict.fromkeys(("extract", "train-ksae", "train-diffc", "demo"), Writer(resumes=True)),
    **dict.fromkeys(("zero-shot", "advise", "extract-text"), Writer(resumes=True)),
    **dict.fromkeys(("llava pretrain", "llava finetune"), Writer(resumes=True)),
    **dict.fromkeys(("convert-ksae", "configs copy", "llava export"), Writer(once=True)),
    **dict.fromkeys(("eval-diffc", "top-images", "gallery", "pca-maps", "eval-ksae"), Writer()),
    **dict.fromkeys(("concept", "steer", "steer-eval", "reproduce"), Writer()),
    **dict.fromkeys(("llava cache", "llava tokens", "llava explain", "mmvp"), Writer()),
}
FILES = tuple(name for name, writer in WRITERS.items() if writer.place != "out")
# Every other command only reads: what it may write is another's (`models prepare` fills a cache).
READERS = {"backbones", "models", "plan-ksae", "serve", "llava chat", "llava show"}


def all_commands() -> set[str]:
    """Every command of the wheel, by the words that choose it."""
    single = {"configs copy" if name == "configs" else name for name in COMMANDS}
    groups = (("llava", llava), ("llava-bench", llava_bench))
    return single | {"mmvp"} | {f"{name} {one}" for name, group in groups for one in group.COMMANDS}


def module_of(name: str) -> ModuleType:
    """The module of a command, whose ``Config`` has its flags."""
    if name == "mmvp":
        return mmvp
    group, _, inner = name.rpartition(" ")
    groups = {"llava": llava, "llava-bench": llava_bench}
    return groups[group].find_module(inner) if group in groups else find_module(name.split()[0])


def run_words(words: Sequence[object]) -> None:
    """Run a command line."""
    first, *others = map(str, words)
    mmvp.main(others) if first == "mmvp" else main([first, *others])
