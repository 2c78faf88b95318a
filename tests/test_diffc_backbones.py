"""Diff-C with the project's own backbones: tiny random models of the real classes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones_helpers import tiny_dit, tiny_sd
from diffc_helpers import FormulaBackbone, toy_dataset

from revelio.activations.extract import extract
from revelio.backbones.config import BackboneConfig
from revelio.backbones.random_init import untrained
from revelio.backbones.registry import load_backbone
from revelio.diffc.config import GridsConfig
from revelio.diffc.inputs import can_be_made_again, live_grids, open_backbone, open_stores


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("sd") / "tiny-sd")


def made_for(folder: Path, layer: str) -> GridsConfig:
    backbone = BackboneConfig(name=str(folder), device="cpu")
    return GridsConfig(backbone=backbone, layer=layer, timestep=25, seed=5)


def test_stored_grids_are_the_live_plain_view(sd: Path, tmp_path: Path) -> None:
    data, backbone = toy_dataset(2), load_backbone(str(sd), layers=["up_ft1"], device="cpu")
    stores = extract(
        data, backbone, tmp_path, layers=["up_ft1"], timesteps=[25], seed=5, pool="none"
    )
    stored, found = open_stores(stores, memory_gb=1.0)
    again = GridsConfig.of(found | {"backbone": str(sd)}, "cpu")
    assert can_be_made_again(found)
    live = live_grids(data, open_backbone(again), again)
    assert stored.shape == live.shape == (16, 8, 8)
    torch.testing.assert_close(stored.grids([4, 1], 0), live.grids([4, 1], 0), atol=1e-4, rtol=1e-4)
    assert stored.labels == live.labels


@pytest.mark.parametrize(("kind", "layer"), [("sd", "up_ft1"), ("dit", "block2")])
def test_random_weights_are_keyed_and_leave_the_vae(
    kind: str, layer: str, sd: Path, tmp_path: Path
) -> None:
    folder = sd if kind == "sd" else tiny_dit(tmp_path / "tiny-dit")
    made, data = made_for(folder, layer), toy_dataset(1)
    before = torch.random.get_rng_state()
    sources = [
        live_grids(data, open_backbone(replace(made, random_weights=seed)), made)
        for seed in (None, 1, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    trained, one, same, two = (source.grids([0, 1, 2], 0) for source in sources)
    assert torch.equal(one, same)
    assert not torch.allclose(one, trained)
    assert not torch.allclose(one, two)
    pixels = torch.rand(1, 3, 32, 32)
    encoded = [source._backbone.encode(pixels) for source in sources[:2]]
    assert torch.equal(encoded[0], encoded[1])


def test_random_weights_of_a_backbone_of_ones_own() -> None:
    with pytest.raises(ValueError, match="formula can't be given random weights"):
        untrained(FormulaBackbone(), 0)  # type: ignore[arg-type]
