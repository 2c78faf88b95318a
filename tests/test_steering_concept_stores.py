"""Concepts of stores of pictures: the difference of like activations alone."""

from pathlib import Path

import pytest
import torch

from revelio.activations.store import write_store
from revelio.pipelines.make_concept import make_concept
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.config import ConceptConfig

SETTINGS = {"model": "m", "layer": "up_ft0", "timestep": 25, "prompt_policy": "empty"}


def rows_of(folder: Path, shift: float, **settings) -> Path:
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) + shift
    write_store(folder, rows, [f"i{i}" for i in range(20)], settings=SETTINGS | settings)
    return folder


def test_two_stores_give_the_difference_of_their_means(tmp_path: Path) -> None:
    ours, others = rows_of(tmp_path / "a", 2.0), rows_of(tmp_path / "b", -1.0)
    made = make_concept(ConceptConfig(out=tmp_path / "c", store=ours, against_store=others))
    assert (made.model, made.layer) == ("m", "up_ft0")
    direction = made.vector / made.vector.norm()
    torch.testing.assert_close(direction, torch.full((1, 8), 8**-0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", "other"), ("layer", "up_ft1"), ("timestep", 900), ("prompt_policy", "from_clip")],
)
def test_activations_that_are_not_alike_are_no_concept(tmp_path: Path, key: str, value) -> None:
    ours, others = rows_of(tmp_path / "a", 2.0), rows_of(tmp_path / "b", -1.0, **{key: value})
    with pytest.raises(ValueError, match=rf"differ in `{key}` \({SETTINGS[key]} and {value}\)"):
        make_concept(ConceptConfig(out=tmp_path / "c", store=ours, against_store=others))
    assert not (tmp_path / "c").exists()


def test_a_ksae_of_another_layer_is_refused(tmp_path: Path) -> None:
    ours, others = rows_of(tmp_path / "a", 2.0), rows_of(tmp_path / "b", -1.0)
    ksae = KSparseAutoencoder(8, 32, 4, trained_on={"model": "m", "layer": "bottleneck"})
    ksae.save_pretrained(tmp_path / "ksae")
    given = {"store": ours, "against_store": others, "ksae": str(tmp_path / "ksae")}
    for more in ({}, {"find": 3}):
        with pytest.raises(ValueError, match="trained on layer bottleneck, not up_ft0"):
            make_concept(ConceptConfig(out=tmp_path / "c", **given, **more))
