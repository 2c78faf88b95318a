"""Concepts of stores of pictures: the difference of like activations alone."""

from pathlib import Path

import pytest
import torch
from sae_helpers import random_model

from revelio.activations.store import ActivationStore, write_store
from revelio.pipelines.make_concept import make_concept
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.config import ConceptConfig
from revelio.steering.find import find_latents

SETTINGS = {"model": "m", "layer": "up_ft0", "timestep": 25, "prompt_policy": "empty"}


def rows_of(folder: Path, shift: float, **settings) -> Path:
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) + shift
    write_store(folder, rows, [f"i{i}" for i in range(20)], settings=SETTINGS | settings)
    return folder


def grids_of(folder: Path, **settings) -> Path:
    """Two classes of ten grids (8 3 3), told apart by a few cells."""
    grids = torch.randn(20, 8, 3, 3, generator=torch.Generator().manual_seed(1)).abs()
    grids[:10, 2, 1, 1] += 30
    labels = [0] * 10 + [1] * 10
    settings = SETTINGS | {"pool": "none", "classes": ["a", "b"]} | settings
    write_store(folder, grids, [f"i{i}" for i in range(20)], labels, settings=settings)
    return folder


@pytest.mark.parametrize("rows_are", ["cells", "images"])
def test_a_k_sae_reads_pictures_as_it_was_trained(tmp_path: Path, rows_are: str) -> None:
    store = grids_of(tmp_path / "s")
    ksae = random_model(d=8, n=32, k=2, seed=0)
    ksae.trained_on = {"model": "m", "layer": "up_ft0", "pool": "none", "rows_are": rows_are}
    ksae.save_pretrained(tmp_path / "ksae")
    given = {"store": store, "class_name": "a", "ksae": str(tmp_path / "ksae")}
    found = make_concept(ConceptConfig(out=tmp_path / "f", find=3, specificity=0.5, **given))
    whole = make_concept(ConceptConfig(out=tmp_path / "w", codes="sparse", **given))
    before = (tmp_path / "w" / "concept.safetensors").read_bytes()
    make_concept(ConceptConfig(out=tmp_path / "w", codes="sparse", **given))
    with pytest.raises(ValueError, match="is the result of another store, model or k-SAE"):
        make_concept(ConceptConfig(out=tmp_path / "w", find=3, specificity=0.5, **given))
    assert (tmp_path / "w" / "concept.safetensors").read_bytes() == before
    # By hand: the codes of each cell by itself, or of their mean, image by image.
    codes = torch.zeros(20, 32)
    for image, grid in enumerate(ActivationStore.open(store).tensor()):
        cells = [grid[:, y, x] for y in range(3) for x in range(3)]
        seen = cells if rows_are == "cells" else [sum(cells) / 9]
        for one in seen:
            kept = ksae.encode(one[None])
            for value, latent in zip(kept.values[0], kept.indices[0], strict=True):
                codes[image, latent] += float(value.detach()) / len(seen)
    expected = find_latents(codes[:10], codes[10:], count=3, specificity=0.5)
    assert found.latents is not None
    assert tuple(found.latents) == expected.latents
    assert tuple(found.latents.values()) == pytest.approx(expected.weights, rel=1e-4)
    contrast = (codes[:10].mean(0) - codes[10:].mean(0)) @ ksae.W_dec.detach()
    torch.testing.assert_close(whole.vector[0], contrast, atol=1e-4, rtol=1e-4)


def test_a_k_sae_of_cells_refuses_means_of_cells(tmp_path: Path) -> None:
    ours, others = rows_of(tmp_path / "a", 2.0), rows_of(tmp_path / "b", -1.0)
    ksae = KSparseAutoencoder(8, 32, 4, trained_on={"rows_are": "cells", "pool": "none"})
    ksae.save_pretrained(tmp_path / "ksae")
    config = ConceptConfig(
        out=tmp_path / "c", store=ours, against_store=others, ksae=str(tmp_path / "ksae"), find=2
    )
    with pytest.raises(
        ValueError, match=r"one vector an image, and the k-SAE is of cells: extract"
    ):
        make_concept(config)
    assert not (tmp_path / "c").exists()
