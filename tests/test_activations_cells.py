"""Stores of cells: against a plain loop over (image, y, x); which cells are drawn; what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from activations_helpers import FakeBackbone, memory_dataset
from files_helpers import contents
from scipy.stats import chisquare

from revelio.activations.config import ExtractConfig
from revelio.activations.cost import estimate
from revelio.activations.encode import random_cells
from revelio.activations.extract import extract, run
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.format import Cells
from revelio.activations.store import ActivationStore, write_store
from revelio.distributed import Processes

RUN = {"layers": ("deep", "wide"), "timesteps": (25,), "seed": 3, "batch_size": 2, "shard_rows": 4}


def test_rows_are_the_cells_of_the_whole_grids(tmp_path):
    dataset = memory_dataset(7, broken=(2,))
    extract(
        dataset, FakeBackbone(), tmp_path / "a", cells=5, average_draws=True, draws=2,
        on_error="skip", **RUN,
    )  # fmt: skip
    extract(
        dataset, FakeBackbone(), tmp_path / "b", pool="none", average_draws=True, draws=2,
        on_error="skip", **RUN,
    )  # fmt: skip
    for layer, side in (("deep", 4), ("wide", 8)):
        store = ActivationStore.open(tmp_path / "a" / f"{layer}-t25-empty-d0-1-c5", cells=True)
        grids = ActivationStore.open(tmp_path / "b" / f"{layer}-t25-empty-d0-1")
        assert (store.cells, store.grid, store.images, len(store)) == (5, (side, side), 6, 30)
        assert store.ids == grids.ids and torch.equal(store.labels, grids.labels)
        places, rows, whole = store.places(0, 30), store.tensor(), grids.tensor()
        for image in range(6):
            seen = set()
            for at in range(5):
                y, x = places[5 * image + at].tolist()
                assert torch.equal(rows[5 * image + at], whole[image, :, y, x])
                seen.add((y, x))
            assert len(seen) == 5
        assert torch.equal(store.places(7, 19), places[7:19])
        assert store.manifest["format"] == 2 and grids.manifest["format"] == 1


@pytest.mark.parametrize("cells", [16, 64, 1000])
def test_a_small_grid_gives_all_its_cells_in_the_order_of_reading(tmp_path, cells):
    [path] = extract(
        memory_dataset(2), FakeBackbone(), tmp_path, cells=cells, layers=("deep",), timesteps=(25,)
    )
    store = ActivationStore.open(path, cells=True)
    assert store.cells == 16 and store.manifest["cells_asked"] == cells
    wanted = [[y, x] for _ in range(2) for y in range(4) for x in range(4)]
    assert store.places(0, 32).tolist() == wanted


def test_cells_depend_on_seed_and_id_alone(tmp_path):
    dataset = memory_dataset(11)
    for name, size in (("one", 2), ("other", 4)):
        extract(dataset, FakeBackbone(), tmp_path / name, cells=5, **RUN | {"batch_size": size})
    config = ExtractConfig(cells=5, layers=RUN["layers"], seed=3, batch_size=2, shard_rows=2)
    main = ExtractionPlan(dataset, FakeBackbone(), tmp_path / "many", config)
    main = replace(main, processes=Processes(0, 3))
    main.begin()
    for rank in (1, 2):
        for _ in run(replace(main, processes=Processes(rank, 3))):
            pass
    for _ in run(replace(main, resume=True)):
        pass
    for layer in ("deep", "wide"):
        name = f"{layer}-t25-empty-d0-c5"
        one, other, many = (
            ActivationStore.open(tmp_path / run / name, cells=True)
            for run in ("one", "other", "many")
        )
        for store in (other, many):
            assert store.ids == one.ids and torch.equal(store.places(0, 55), one.places(0, 55))
            assert torch.allclose(store.tensor(), one.tensor(), atol=1e-6)
    places = random_cells(dataset.ids, (8, 8), 5, 3)
    assert not torch.equal(places, random_cells(dataset.ids, (8, 8), 5, 4))
    assert torch.equal(places[4:6], random_cells(dataset.ids[4:6], (8, 8), 5, 3))


def test_sampled_cells_are_uniform():
    places = random_cells([f"{i}.png" for i in range(4000)], (6, 5), 3, 0)
    counts = torch.bincount((places[..., 0] * 5 + places[..., 1]).flatten(), minlength=30)
    assert counts.sum() == 12_000 and chisquare(counts.numpy()).pvalue > 0.01
    # Pairs of cells too: without repetition, none more often than others.
    first, second = places[:, 0], places[:, 1]
    pairs = (first[:, 0] * 5 + first[:, 1]) * 30 + second[:, 0] * 5 + second[:, 1]
    assert (first != second).any(1).all() and len(pairs.unique()) > 350


def test_what_takes_one_row_an_image_refuses_cells(tmp_path):
    [path] = extract(
        memory_dataset(3), FakeBackbone(), tmp_path, cells=4, layers=("deep",), timesteps=(25,)
    )
    with pytest.raises(ValueError, match="holds 4 cells of each image's grid, and this takes one"):
        ActivationStore.open(path)


def test_a_million_images_of_a_paper_sized_layer_are_planned(tmp_path):
    """The bytes alone: SD-1.5's up_ft1 at 512 px has 1280 channels on a 32 x 32 grid."""
    config = ExtractConfig(cells=64, store_dtype="float16")
    assert config.row_shape(1280, 32) == (64, 1280)
    plan = ExtractionPlan(
        memory_dataset(3), FakeBackbone(), tmp_path, replace(config, layers=("deep",))
    )
    assert plan.row_bytes("deep") == 16 * (6 * 2 + 4)
    cost = estimate(plan)
    assert cost.bytes_left == 3 * plan.row_bytes("deep")
    stored = sum(len(data) for data in contents(tmp_path).values())
    assert stored == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": 3}, "are not as many|`cells`"),
        ({"cells": 0}, "`cells`"),
        ({"grid": [2, 99, 1]}, "`grid`"),
        ({"grid": None}, "`grid`"),
        ({"format": 1}, "disagrees|ids"),
        ({"format": 3}, "formats 1 and 2"),
    ],
)
def test_a_manifest_of_cells_that_does_not_fit_is_refused(tmp_path, change, message):
    cells = Cells(torch.zeros(8, 2, dtype=torch.int16), (2, 2))
    store = write_store(tmp_path / "s", torch.randn(8, 3), ["a", "b"], cells=cells)
    assert store.cells == 4
    path = tmp_path / "s" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{message}|disagrees"):
        ActivationStore.open(tmp_path / "s", cells=True)


def test_cells_outside_their_grid_are_refused(tmp_path):
    for place in (2, -1):
        cells = Cells(torch.full((2, 2), place, dtype=torch.int16), (2, 2))
        with pytest.raises(ValueError, match="cells outside its grid"):
            write_store(tmp_path / str(place), torch.randn(2, 3), ["a"], cells=cells)
