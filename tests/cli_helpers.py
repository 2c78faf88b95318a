"""Inputs for every command that writes, and a short call of each."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from analysis_helpers import gallery_parts, write_pictures
from backbones_helpers import tiny_sd
from data_helpers import write_class_folders
from diffc_helpers import separable, write_folders
from eval_helpers import review_row, write_jsonl
from PIL import Image
from sae_helpers import planted

from revelio.activations.store import write_store
from revelio.cli import main
from revelio.diffc.model import DiffC
from revelio.sae.model import KSparseAutoencoder

Words = Callable[[Path], list[object]]


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
    main([str(word) for word in commands(root)["concept"](root / "concept")])
    return root


def commands(made: Path) -> dict[str, Words]:
    """A short call of every command that writes, for a place to write to."""
    backbone = ["--backbone.name", made / "sd", "--backbone.image-size", 32]
    ksae = ["--store", made / "store", "--ksae", made / "ksae"]
    draw = ["--prompts", made / "prompts.csv", "--concept", made / "concept", "--steps", 1]
    draw += ["--size", 32, "--backbone.name", made / "sd"]
    return {
        "extract": lambda out: [
            *("extract", *backbone, "--data.limit", 3, "--data.source", made / "images"),
            *("--layers", "bottleneck", "--out", out),
        ],
        "train-ksae": lambda out: [
            *("train-ksae", "--store", made / "rows", "--steps", 2, "--expansion", 2, "--k", 2),
            *("--kernel", "torch", "--checkpoint-every", 1, "--out", out),
        ],
        "train-diffc": lambda out: [
            *("train-diffc", "--stores", made / "grids", "--test-store", made / "grids"),
            *("--epochs", 1, "--width", 2, "--out", out),
        ],
        "eval-diffc": lambda out: [
            *("eval-diffc", "--model", made / "diffc", "--store", made / "grids", "--out", out),
        ],
        "top-images": lambda out: ["top-images", *ksae, "--out", out],
        "gallery": lambda out: [
            *("gallery", *ksae, "--top", made / "top", "--data.source", made / "images"),
            *("--latents", 5, "--map-method", "pca", "--out", out),
        ],
        "pca-maps": lambda out: [
            *("pca-maps", *backbone, "--data.limit", 3, "--data.source", made / "images"),
            *("--layers", "bottleneck", "--out", out),
        ],
        "eval-ksae": lambda out: [
            *("eval-ksae", "--store", made / "many", "--ksae", made / "small", "--out", out),
        ],
        "locality": lambda out: [
            *("locality", "--store", made / "whole", "--ksae", made / "small", "--out", out),
        ],
        "probe": lambda out: [
            *("probe", "--store", made / "grids", "--test-store", made / "others"),
            *("--probes", "knn", "--out", out),
        ],
        "zero-shot": lambda out: [
            *("zero-shot", *backbone, "--data.source", made / "folders", "--data.limit", 2),
            *("--classifier.samples", 1, 2, "--classifier.keep", 1, "--out", out),
        ],
        "extract-text": lambda out: [
            *("extract-text", "--prompts", made / "prompts.csv", "--backbone.name", made / "sd"),
            *("--layers", "text_encoder.block1", "--out", out),
        ],
        "concept": lambda out: [
            *(
                "concept",
                "--texts",
                "a dog",
                "--against",
                "a cat",
                "--layer",
                "text_encoder.block1",
            ),
            *("--backbone.name", made / "sd", "--out", out),
        ],
        "steer": lambda out: ["steer", *draw, "--strength", 0, "--out", out],
        "steer-eval": lambda out: [
            *(
                "steer-eval",
                *draw,
                "--strength",
                -1,
                "--target",
                "dog",
                "--judge",
                "cli_helpers:see",
            ),
            *("--baselines", "random-direction", "--bootstrap", 9, "--out", out),
        ],
        "advise": lambda out: [
            *("advise", *backbone, "--data.source", made / "pets", "--layers", "bottleneck"),
            *("--timesteps", 25, 99, "--most-images", 20, "--out", out),
        ],
        "reproduce": lambda out: [
            *("reproduce", "figure10", "--scale", "mini", "--model", made / "sd", "--seeds", 1),
            *("--data.source", made / "pets", "--out", out),
        ],
        "purity": lambda out: ["purity", "--top", made / "top", "--random-sets", 9, "--out", out],
        "demo": lambda out: [
            *("demo", "--data.source", made / "folders", *backbone, "--layers", "bottleneck"),
            *("--timesteps", "25", "--sae.steps", 1, "--out", out),
        ],
        "score": lambda out: [
            *("score", "--reviews", made / "reviews.jsonl", "--resamples", 9, "--out", out),
        ],
    }


def see(pictures: Sequence[Image.Image]) -> list[str]:
    """A judge that sees dogs."""
    return ["dog"] * len(pictures)


FILES = ("purity", "locality", "probe", "score")  # what writes one file
WRITERS = (*FILES, "extract", "train-ksae", "train-diffc", "eval-diffc", "top-images", "gallery")
WRITERS += ("pca-maps", "demo", "eval-ksae", "extract-text", "concept", "steer", "steer-eval")
WRITERS += ("zero-shot", "advise", "reproduce")
