"""k-SAEs of cells and of several stores: against plain loops, balanced, normalized, refused by name."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sae_helpers import loop_decode, loop_encode, planted, random_model

from revelio.activations.format import Cells
from revelio.activations.store import ActivationStore, write_store
from revelio.pipelines.held_out import divide
from revelio.pipelines.sae_rows import JoinedRows, StoreRows, open_stores
from revelio.pipelines.train_sae import TrainSAEConfig, plan_sae, train_sae
from revelio.sae.dataloader import Shuffled, group_of
from revelio.sae.distributed import SharedRows
from revelio.sae.inputs import Input, measure
from revelio.sae.model import KSparseAutoencoder

IDS = [f"{number}.png" for number in range(40)]


def grids(folder, name, side=4, scale=1.0, shift=0.0, model="m", seed=0, **settings):
    """A store of 40 grids of 6 channels; gives its tensor."""
    rows = planted(40 * side * side, 6, 9, 2, seed, noise=0.1)[0] * scale + shift
    whole = rows.view(40, side, side, 6).permute(0, 3, 1, 2).contiguous()
    about = {"layer": "up", "timestep": 25, "prompt_policy": "empty", "draw": 0, "model": model}
    write_store(folder / name, whole, IDS, shard_rows=16, settings=about | settings)
    return whole


def whole(path) -> StoreRows:
    store = ActivationStore.open(path, cells=True)
    return StoreRows(store, torch.arange(store.images), cells=True)


def test_rows_are_cells_by_a_plain_loop(tmp_path):
    stored = grids(tmp_path, "a")
    wanted = torch.stack(
        [stored[i, :, y, x] for i in range(40) for y in range(4) for x in range(4)]
    )
    rows = whole(tmp_path / "a")
    assert len(rows) == 640 and rows.group == 16
    assert torch.equal(torch.cat(list(rows.batches())), wanted)
    for start, stop in ((0, 0), (3, 5), (15, 33), (100, 640)):
        assert torch.equal(rows.rows(start, stop), wanted[start:stop])
    some = StoreRows(rows.store, torch.tensor([1, 7, 39]), cells=True)
    assert torch.equal(
        some.rows(10, 48), torch.cat([wanted[16 * i : 16 * i + 16] for i in (1, 7, 39)])[10:]
    )
    pooled = StoreRows(rows.store, torch.arange(40))
    assert torch.allclose(pooled.rows(0, 40), stored.mean((2, 3)), atol=1e-6)


def test_stored_cells_are_read_as_they_are(tmp_path):
    rows = torch.randn(20, 6)
    places = torch.tensor([[0, 1], [1, 0]], dtype=torch.int16).repeat(10, 1)
    write_store(tmp_path / "c", rows, IDS[:10], cells=Cells(places, (2, 2)), shard_rows=3)
    found = whole(tmp_path / "c")
    assert torch.equal(found.rows(3, 17), rows[3:17])
    # Processes that share the reading keep the order of one, so they must know that rows lie together.
    shared: Any = SharedRows(found, None, torch.device("cpu"))  # type: ignore[arg-type]
    assert group_of(shared) == group_of(found) == 2 and group_of(JoinedRows([found])) == 2


def test_every_image_gives_as_many_cells_whatever_the_grid(tmp_path):
    grids(tmp_path, "small", side=2)
    grids(tmp_path, "large", side=5, timestep=200)
    stores = open_stores([tmp_path / "small", tmp_path / "large"], "cells")
    kept, held = divide(stores, 0.5, "cells")
    assert [part.group for part in kept.parts] == [4, 4] and len(kept) == 2 * 20 * 4
    assert torch.equal(held.parts[0].images, held.parts[1].images) and len(held) == 160
    large = ActivationStore.open(tmp_path / "large")
    for place, image in enumerate(kept.parts[1].images.tolist()):
        of_image = {tuple(row) for row in large.rows(image, image + 1)[0].flatten(1).T.tolist()}
        drawn = [tuple(row) for row in kept.parts[1].rows(4 * place, 4 * place + 4).tolist()]
        assert len(set(drawn)) == 4 and set(drawn) <= of_image
    joined = torch.cat([part.rows(0, len(part)) for part in kept.parts])
    for start, stop in ((0, 7), (78, 83), (80, 160)):
        assert torch.equal(kept.rows(start, stop), joined[start:stop])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_epoch_has_each_cell_once_and_batches_of_many_images(workers):
    class Numbered:
        """400 images of 64 cells; a row is its own number."""

        group, read = 64, 0

        def __len__(self):
            return 400 * 64

        def rows(self, start, stop):
            assert (start % 64, stop % 64) == (0, 0)
            self.read = max(self.read, stop - start)
            return torch.arange(start, stop)[:, None].float()

    source = Numbered()
    loader = Shuffled(source, 256, seed=3, block=512, window=8, workers=workers)
    batches = [batch[:, 0].long() for batch in loader.epoch(0)]
    assert sorted(torch.cat(batches).tolist()) == list(range(400 * 64))
    assert all(len(batch) == 256 for batch in batches[:-1]) and source.read == 64
    for batch in batches[1:-1]:
        counted = Counter((batch // 64).tolist())
        assert len(counted) > 40 and max(counted.values()) < 40
    again = [batch[:, 0].long() for batch in loader.epoch(0)]
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0], next(iter(loader.epoch(1)))[:, 0].long())


def small(**more) -> dict:
    return {"k": 3, "expansion": 4, "batch_size": 64, "steps": 30, "kernel": "torch"} | more


@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
def test_training_on_cells_sees_cells(tmp_path, memory_gib):
    grids(tmp_path, "a")
    config = TrainSAEConfig(
        store=(tmp_path / "a",), out=tmp_path / "run", rows="cells", held_out=0.25,
        memory_gib=memory_gib, **small(),
    )  # fmt: skip
    [job] = plan_sae(config)
    [made] = train_sae(config)
    assert job.rows == made.report["rows"] == 480 and made.report["held_out"]["rows"] == 160
    assert made.report["trained_on"]["rows_are"] == "cells" and made.report["l0"] <= 3
    model = made.model()
    assert model.format == 1 and model.inputs == ()
    # Resumed it is the same, and it does not go on with images.
    assert train_sae(replace(config, resume=True))[0].report == made.report
    with pytest.raises(ValueError, match="rows: cells"):
        train_sae(replace(config, resume=True, rows="images"))


@pytest.mark.parametrize("kind", ["none", "mean-norm", "per-dimension"])
def test_stores_of_other_scales_are_normalized_apart(tmp_path, kind):
    low = grids(tmp_path, "low")
    high = grids(tmp_path, "high", scale=50.0, shift=20.0, timestep=500)
    config = TrainSAEConfig(
        store=(tmp_path / "low", tmp_path / "high"), out=tmp_path / "run", rows="cells",
        normalize=kind, **small(steps=120),
    )  # fmt: skip
    [made] = train_sae(config)
    model, of_stores = made.model(), made.report["stores"]
    assert model.format == 3 and [one["timestep"] for one in of_stores] == [25, 500]
    assert [one["trained"]["rows"] for one in of_stores] == [576, 576]
    for place, stored in enumerate((low, high)):
        x = stored.permute(0, 2, 3, 1).reshape(-1, 6)
        manifest = {"layer": "up", "timestep": (25, 500)[place], "prompt_policy": "empty"}
        if kind == "none":
            wanted = x
        elif kind == "mean-norm":
            wanted = x / (x.norm(dim=1).mean() / np.sqrt(6))
        else:
            wanted = (x - x.mean(0)) / x.std(0, correction=0)
        seen = model.normalized(x, place)
        # The constants are of the training rows.
        assert torch.allclose(seen, wanted, rtol=0.08, atol=0.05 * float(wanted.abs().max()))
        with torch.no_grad():
            codes = model.encode(x, manifest)
            ours = model.normalized(model.decode(codes, manifest), place)
        dense = torch.zeros(len(x), model.n).scatter(1, codes.indices, codes.values)
        assert np.allclose(dense.numpy(), loop_encode(model, seen), atol=1e-3)
        restored = loop_decode(model, dense.double().numpy())
        assert np.allclose(ours.numpy(), restored, atol=1e-3)
    if kind != "none":
        assert max(one["trained"]["fvu"] for one in of_stores) < 0.9
        with pytest.raises(ValueError, match=r"timestep 25.*timestep 500"):
            model.encode(low[0].flatten(1).T)
        with pytest.raises(ValueError, match=r"was given layer up, timestep 7"):
            model.encode(
                low[0].flatten(1).T, {"layer": "up", "timestep": 7, "prompt_policy": "empty"}
            )


def test_one_normalized_store_needs_no_name(tmp_path):
    stored = grids(tmp_path, "a", scale=9.0)
    config = TrainSAEConfig(
        store=(tmp_path / "a",), out=tmp_path / "run", normalize="mean-norm", **small()
    )
    model = train_sae(config)[0].model()
    x = stored.mean((2, 3))
    assert torch.equal(model.encode(x).values, model.encode(x, 0).values)
    assert torch.allclose(model(x), model.decode(model.encode(x, 0), 0))


def test_stores_that_do_not_fit_together_are_named(tmp_path):
    grids(tmp_path, "a")
    grids(tmp_path, "b", timestep=200, model="other", seed=1)
    write_store(tmp_path / "wide", torch.randn(5, 7, 4, 4), IDS[:5])
    write_store(tmp_path / "vectors", torch.randn(5, 6), IDS[:5], settings={"model": "m"})
    for names, rows, line in (
        (("a", "wide"), "cells", "wide holds rows of width 7, .*a of 6"),
        (("a", "b"), "cells", "b is of the model other, .*a of m"),
        (("a", "a"), "images", "a is given twice"),
        (("a", "vectors"), "cells", "vectors holds one vector an image, no cells"),
    ):
        with pytest.raises(ValueError, match=line):
            open_stores([tmp_path / name for name in names], rows)
    assert len(open_stores([tmp_path / "a", tmp_path / "vectors"], "images")) == 2


def test_broken_inputs_of_a_saved_model_are_refused(tmp_path):
    good = measure({"layer": "up"}, "per-dimension", [torch.randn(50, 6)])
    model = KSparseAutoencoder(6, 20, 3, inputs=[good])
    assert KSparseAutoencoder(**model.settings()).inputs == (good,)
    for change in (
        {"scale": [0.0] * 6},
        {"scale": [1.0] * 5},
        {"shift": [float("nan")] * 6},
        {"kind": "x"},
    ):
        with pytest.raises(ValueError, match="an input of the k-SAE can't be"):
            KSparseAutoencoder(6, 20, 3, inputs=[good.plain() | change])
    assert Input({}).normalized(torch.ones(1, 2)).tolist() == [[1.0, 1.0]]
    with pytest.raises(ValueError, match="no spread"):
        measure({"store": "s"}, "mean-norm", [torch.zeros(5, 3)])
    assert random_model().inputs == ()
