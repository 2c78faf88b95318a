"""Latents that repeat one another: in one k-SAE, and in a k-SAE trained again."""

import pytest
import torch
from sae_helpers import random_model

from revelio.analysis.redundancy import partners, redundancy
from revelio.analysis.top_images import TopImages
from revelio.sae.inputs import measure
from revelio.sae.model import KSparseAutoencoder

DRAW = torch.Generator().manual_seed(5)


def top_of(images: torch.Tensor) -> TopImages:
    n = len(images)
    strengths = torch.arange(n, 0, -1).float()
    values = strengths[:, None].expand(images.shape).clone()
    counts = torch.full((n,), 20)
    return TopImages(values, images, counts, strengths, 50, None, (), {})


def test_repeated_latents_are_counted():
    model = random_model(d=32, n=10, k=3)
    with torch.no_grad():
        model.W_dec[7] = 1.5 * model.W_dec[2]  # the same direction
    images = torch.stack([torch.randperm(50, generator=DRAW)[:6] for _ in range(10)])
    images[9] = torch.cat([images[1][:5], torch.tensor([-1])])  # five of six images
    found = redundancy(model, top_of(images))
    assert found["latents"] == 10 and found["distinct"] == 8
    assert found["by_direction"]["value"] == found["by_images"]["value"] == 0.1
    assert found["redundant"]["low"] < 0.2 < found["redundant"]["high"]
    assert found["by_direction"]["chance"]["value"] == found["by_images"]["chance"]["value"] == 0


def test_partners_in_another_run():
    ours, theirs = random_model(d=32, n=12, seed=0), random_model(d=32, n=12, seed=1)
    with torch.no_grad():
        theirs.W_dec[3] = ours.W_dec[8] + 0.02
    found = partners(ours, theirs, torch.arange(12))
    assert found["value"] == pytest.approx(1 / 12, abs=1e-4) and found["chance"]["value"] == 0
    assert partners(ours, ours, torch.arange(12))["value"] == 1
    with pytest.raises(ValueError, match="widths 32 and 6"):
        partners(ours, random_model(), torch.arange(3))


def test_partners_of_k_saes_that_normalize_otherwise_are_compared_in_one_scale():
    rows = torch.randn(400, 32, generator=DRAW) * torch.logspace(-1, 1, 32)
    inputs = {
        kind: [measure({"store": kind}, kind, [rows])] for kind in ("mean-norm", "per-dimension")
    }
    plain = random_model(d=32, n=12, seed=0)
    ksaes = {"none": plain} | {
        kind: KSparseAutoencoder(32, 12, 3, inputs=one) for kind, one in inputs.items()
    }
    with torch.no_grad():
        for ksae in ksaes.values():
            ksae.W_dec.copy_(plain.W_dec)
            if ksae is ksaes["per-dimension"]:
                ksae.W_dec.div_(
                    rows.std(0, correction=0)
                )  # so that restored ones point the same way
    for ours in ksaes.values():
        for theirs in ksaes.values():
            found = partners(ours, theirs, torch.arange(12))
            assert found["of_latents"] == pytest.approx([1] * 12, abs=1e-3)
    both = inputs["per-dimension"] + [
        measure({"store": "b"}, "per-dimension", [rows * 2 + rows**2])
    ]
    two = KSparseAutoencoder(32, 12, 3, seed=1, inputs=both)
    assert partners(two, two, torch.arange(12))["value"] == 1
    with pytest.raises(ValueError, match="normalize 0 and 2 stores"):
        partners(plain, two, torch.arange(12))
