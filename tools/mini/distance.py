"""How far samples are from real pictures: the kernel distance of an independent model's features.

KID (Binkowski et al., 2018, "Demystifying MMD GANs"): the unbiased squared maximum mean discrepancy with the
kernel (x.y / d + 1)^3, here on the class token of `vit-s-14-focus`, which saw neither the samples' models nor
their data. Beside it what tells how large a distance is: real training pictures against real test pictures
(0 but for chance), and training pictures of half the resolution.
"""

from __future__ import annotations

import torch
from PIL import Image

from revelio.backbones.base import EmbeddingModel
from revelio.backbones.registry import load_backbone
from revelio.stats import mean95
from tools.mini.captions import PROMPT, nouns
from tools.mini.data import PictureSet, load_caltech101, load_fashion_mnist
from tools.mini.features import as_picture
from tools.mini.report import Figures, Inputs
from tools.mini.sections import HOW, MakeSamples, as_tensor
from tools.mini.shipped import sample, sample_classes

# A side of 112 takes a quarter of the model's own 224; the pictures have 32 or 64 pixels.
SIDE = 112
MODEL, SHOWN, BLOCKS, BATCH = "vit-s-14-focus", 200, 10, 50


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The unbiased squared MMD of two sets of features, each a row."""

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    def within(x: torch.Tensor) -> torch.Tensor:
        found = kernel(x, x)
        return (found.sum() - found.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def with_interval(a: torch.Tensor, b: torch.Tensor, blocks: int = BLOCKS) -> dict[str, float]:
    """The mean of the distances of disjoint blocks, with Student's 95 % interval (Zaremba et al., 2013)."""
    each = [kernel_distance(x, y) for x, y in zip(a.chunk(blocks), b.chunk(blocks), strict=True)]
    low, high = mean95(each)
    return {"value": sum(each) / len(each), "low": low, "high": high}


def shuffled(pictures: PictureSet, seed: int) -> PictureSet:
    """`SHOWN` pictures, drawn at random, as are their classes."""
    draw = torch.Generator().manual_seed(seed)
    return pictures.subset(torch.randperm(len(pictures), generator=draw)[:SHOWN])


@torch.no_grad()
def class_tokens(backbone: EmbeddingModel, images: torch.Tensor) -> torch.Tensor:
    """The class token of uint8 pictures `(n, 1 or 3, h, w)`."""
    pixels = torch.stack([backbone.transform(as_picture(image)) for image in images])
    return torch.cat([backbone.embed(backbone.encode(part))[:, 0] for part in pixels.split(BATCH)])


def half_sized(images: torch.Tensor) -> torch.Tensor:
    """Pictures shrunk to half their side and brought back."""
    side = images.shape[-1]

    def worse(image: torch.Tensor) -> Image.Image:
        small = as_picture(image).resize((side // 2, side // 2), Image.Resampling.BILINEAR)
        return small.resize((side, side), Image.Resampling.BILINEAR)

    return as_tensor([worse(image) for image in images])


def distances(inputs: Inputs, train: PictureSet, test: PictureSet, make: MakeSamples) -> Figures:
    """Samples of the classes of some test pictures, and what they stand beside, against those pictures.

    Args:
        inputs: Where things are.
        train: What the model was trained on.
        test: Held-out pictures of the same kind.
        make: Class words and the labels wanted -> a picture a label.
    """
    backbone = load_backbone(MODEL, image_size=SIDE, device="cpu")
    assert isinstance(backbone, EmbeddingModel)
    words = nouns(test)
    train, test = shuffled(train, inputs.seed), shuffled(test, inputs.seed)
    real = class_tokens(backbone, test.images)
    against = {
        "samples": as_tensor(make(words, test.labels.tolist())),
        "training pictures": train.images,
        # Not of the test pictures: a set and its own copy are not independent.
        "training pictures at half their resolution": half_sized(train.images),
    }
    found = {
        name: with_interval(class_tokens(backbone, images), real)
        for name, images in against.items()
    }
    return {
        "features": MODEL,
        "side": SIDE,
        "images": SHOWN,
        "blocks": BLOCKS,
        **HOW,
        "distance": found,
    }


def fashion(inputs: Inputs) -> tuple[PictureSet, PictureSet]:
    """Fashion-MNIST's splits."""
    folder = inputs.fashion()
    return load_fashion_mnist(folder, "train"), load_fashion_mnist(folder, "test")


def by_prompt(inputs: Inputs, model: str) -> MakeSamples:
    """Guided samples by the names of classes."""
    return lambda words, labels: sample(
        inputs.models / model,
        [PROMPT.format(words[one]) for one in labels],
        **HOW,
        seed=inputs.seed,
    )


def mini_sd_distance(inputs: Inputs) -> Figures:
    """mini-sd's samples against Fashion-MNIST's test pictures."""
    return distances(inputs, *fashion(inputs), by_prompt(inputs, "mini-sd"))


def mini_dit_distance(inputs: Inputs) -> Figures:
    """mini-dit's samples against Fashion-MNIST's test pictures."""

    def make(_: list[str], labels: list[int]) -> list[Image.Image]:
        return sample_classes(inputs.models / "mini-dit", labels, **HOW, seed=inputs.seed)

    return distances(inputs, *fashion(inputs), make)


def mini_sd_photo_distance(inputs: Inputs) -> Figures:
    """mini-sd-photo's samples against Caltech-101's test photographs."""
    train, test = (load_caltech101(inputs.caltech(), split, 64) for split in ("train", "test"))
    return distances(inputs, train, test, by_prompt(inputs, "mini-sd-photo"))
