from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffc_helpers import FormulaBackbone, noise_of, toy_dataset

from revelio.data.transforms import RandomCropTransform, SquareTransform
from revelio.diffc.cache import CacheSettings, bytes_left, drop_cache, fill_cache
from revelio.diffc.inputs import check_classes, cut_test, readable
from revelio.diffc.pixels import PixelsBackbone
from revelio.diffc.sources import LiveGrids, TensorGrids, stored_grids, training_view
from revelio.seeds import generator


def live(**change: object) -> LiveGrids:
    settings = {"timestep": 25, "seed": 3} | change
    return LiveGrids(toy_dataset(), FormulaBackbone(), "mix", **settings)  # type: ignore[arg-type]


def test_views_by_epoch() -> None:
    assert [training_view(e, None) for e in (1, 2, 31)] == [1, 2, 31]
    assert [training_view(e, 0) for e in (1, 2)] == [0, 0]
    assert [training_view(e, 3) for e in range(1, 8)] == [1, 2, 3, 1, 2, 3, 1]


def test_plain_view_is_centre_crop_with_draw_0() -> None:
    source, data = live(), toy_dataset()
    pixels = SquareTransform(16)(data.read(5))
    means = pixels.view(3, 2, 8, 2, 8).mean(dim=(2, 4))
    expected = means + noise_of(3, data.ids[5], 25, 0)
    torch.testing.assert_close(source.grids([5], 0)[0], expected)
    assert source.shape == (3, 2, 2)


def test_augmented_view_is_keyed_by_image_and_view() -> None:
    source, data = live(), toy_dataset()
    crop = RandomCropTransform(16, scale=(0.8, 1.0))
    pixels = crop(data.read(5), generator(3, "crop", data.ids[5], 7))
    expected = pixels.view(3, 2, 8, 2, 8).mean(dim=(2, 4)) + noise_of(3, data.ids[5], 25, 7)
    torch.testing.assert_close(source.grids([2, 5, 9], 7)[1], expected)
    assert not torch.allclose(source.grids([5], 8)[0], expected)


def test_threads_change_nothing() -> None:
    everyone = range(12)
    assert torch.equal(live().grids(everyone, 2), live(workers=3).grids(everyone, 2))


def test_prompts_go_with_their_images() -> None:
    backbone = FormulaBackbone()
    texts = [f"text {i}" for i in range(12)]
    source = LiveGrids(toy_dataset(), backbone, "mix", timestep=25, prompts=texts)
    source.grids([7, 2], 0)
    assert backbone.prompts == ["text 7", "text 2"]


def test_what_live_grids_refuse() -> None:
    data, backbone = toy_dataset(), FormulaBackbone()
    with pytest.raises(KeyError, match="unknown layer 'up_ft9' of formula: choose from mix"):
        LiveGrids(data, backbone, "up_ft9", timestep=25)
    with pytest.raises(ValueError, match="no labels"):
        LiveGrids(replace(data, labels=None), backbone, "mix", timestep=25)
    with pytest.raises(ValueError, match="1 prompt for 12 images"):
        LiveGrids(data, backbone, "mix", timestep=25, prompts=["a"])


def cache_settings(folder: Path, memory_gb: float, **change: object) -> CacheSettings:
    given = {
        "views": 2, "dtype": torch.float16, "memory_gb": memory_gb, "batch_size": 5,
        "folder": folder, "key": {"layer": "mix"},
    }  # fmt: skip
    return CacheSettings(**(given | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_kept_views_are_the_live_ones(tmp_path: Path, memory_gb: float) -> None:
    states = list(fill_cache(live(), cache_settings(tmp_path, memory_gb)))
    kept = states[-1].grids
    assert kept is not None
    assert kept.views == 2
    assert sum(state.images for state in states) == 3 * 12
    for view in range(3):
        expected = live().grids(range(12), view)
        torch.testing.assert_close(kept.grids(range(12), view), expected, atol=2e-3, rtol=2e-3)
    assert len(list(tmp_path.glob("*.bin"))) == (3 if memory_gb == 0 else 0)


def test_killed_cache_goes_on_at_the_missing_view(tmp_path: Path) -> None:
    settings = cache_settings(tmp_path, 0.0)
    for done, _ in enumerate(fill_cache(live(), settings), 1):
        if done == 4:  # three batches make view 0; one of view 1
            break
    assert len(list(tmp_path.glob("*.bin"))) == 1
    source = live()
    backbone = source._backbone
    before = backbone.images
    kept = list(fill_cache(source, settings))[-1].grids
    assert backbone.images - before == 2 * 12
    assert kept is not None
    torch.testing.assert_close(kept.grids([3], 2), live().grids([3], 2), atol=2e-3, rtol=2e-3)
    # Other settings don't take the files for their own.
    list(fill_cache(live(), replace(settings, key={"layer": "other"})))
    assert len(list(tmp_path.glob("*.bin"))) == 6


def test_two_runs_may_fill_one_folder_at_once(tmp_path: Path) -> None:
    settings = cache_settings(tmp_path, 0.0)
    one, two = (fill_cache(live(), settings) for _ in range(2))
    next(one), next(two)  # both are at view 0
    for kept in (list(one)[-1].grids, list(two)[-1].grids):
        assert kept is not None
        torch.testing.assert_close(kept.grids([3], 0), live().grids([3], 0), atol=2e-3, rtol=2e-3)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin"] * 3 + [".json"] * 3


def test_what_is_left_of_the_views_is_what_no_file_holds(tmp_path: Path) -> None:
    settings, size = cache_settings(tmp_path, 0.0), 2 * 12 * 3 * 2 * 2
    assert bytes_left(live(), settings) == 3 * size
    filling = fill_cache(live(), settings)
    for _ in range(4):  # all of view 0, a batch of view 1
        next(filling)
    assert bytes_left(live(), settings) == 2 * size
    list(filling)
    assert bytes_left(live(), settings) == 0
    drop_cache(tmp_path)
    assert not tmp_path.exists()


def test_numbers_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    source = TensorGrids([torch.full((4, 2, 3, 3), 1e6)], [0, 1, 0, 1])
    with pytest.raises(ValueError, match="float16 can't hold these grids"):
        list(fill_cache(source, cache_settings(tmp_path, 1.0, views=0)))
    fine = cache_settings(tmp_path, 1.0, views=0, dtype=torch.bfloat16)
    assert list(fill_cache(source, fine))[-1].grids is not None


def test_pooled_rows_become_1x1_grids() -> None:
    rows = torch.randn(5, 7)
    source = TensorGrids([rows], [0, 1, 0, 1, 0])
    assert source.shape == (7, 1, 1)
    assert torch.equal(source.grids([3, 1], 0)[:, :, 0, 0], rows[[3, 1]])


@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_stores_are_views(tmp_path: Path, memory_gb: float) -> None:
    from revelio.activations.store import ActivationStore, write_store

    rows = [torch.randn(9, 3, 2, 2) for _ in range(2)]
    ids, labels = [f"i{n}" for n in range(9)], [n % 3 for n in range(9)]
    named = {"classes": ["a", "b", "c"], "layer": "mix"}
    for draw, values in enumerate(rows):
        write_store(tmp_path / f"d{draw}", values, ids, labels, settings=named)
    stores = [ActivationStore.open(tmp_path / f"d{draw}") for draw in range(2)]
    source = stored_grids(stores, memory_gb)
    assert (source.views, source.shape, list(source.ids)) == (2, (3, 2, 2), ids)
    for view, draw in ((0, 0), (1, 0), (2, 1)):
        assert torch.equal(source.grids([8, 0, 4], view), rows[draw][[8, 0, 4]])
    write_store(tmp_path / "other", rows[0], ids[::-1], labels, settings=named)
    with pytest.raises(ValueError, match="different images or layers"):
        stored_grids([stores[0], ActivationStore.open(tmp_path / "other")], memory_gb)
    write_store(tmp_path / "bare", rows[0], ids)
    with pytest.raises(ValueError, match="has no labels"):
        stored_grids([ActivationStore.open(tmp_path / "bare")], memory_gb)


def test_pixels_are_block_means() -> None:
    backbone, image = PixelsBackbone(16, 4), toy_dataset().read(0)
    pixels = backbone.transform(image)[None]
    grid = backbone.activations(backbone.encode(pixels), ["a"], ["pixels"])["pixels"]
    expected = pixels.numpy().reshape(1, 3, 4, 4, 4, 4).mean(axis=(3, 5))
    torch.testing.assert_close(grid, torch.tensor(expected))
    flat = backbone.activations(pixels, ["a"], ["flat"])["flat"]
    assert flat.shape == (1, backbone.layers["flat"].channels, 1, 1)
    torch.testing.assert_close(flat, torch.tensor(expected).reshape(1, 48, 1, 1))
    with pytest.raises(ValueError, match="no timestep"):
        backbone.activations(pixels, ["a"], ["pixels"], timestep=25)
    with pytest.raises(KeyError, match="no layer"):
        backbone.activations(pixels, ["a"], ["up_ft1"])


def test_data_sets_for_train_and_test() -> None:
    data = toy_dataset(10)
    train, test = cut_test(data, 0.2, 0)
    assert (len(train), len(test)) == (24, 6)
    assert not set(train.ids) & set(test.ids)
    assert check_classes(train, test) == data.classes
    with pytest.raises(ValueError, match="different classes"):
        check_classes(train, replace(test, classes=("blue", "green", "pink")))
    with pytest.raises(ValueError, match="no labels"):
        cut_test(replace(data, labels=None), 0.2, 0)
    with pytest.raises(ValueError, match="no test images"):
        cut_test(data, 0.0, 0)


def test_unreadable_images_are_left_out_by_name() -> None:
    from revelio.data.dataset import ImageError

    data = toy_dataset()

    def read(index: int):
        if index == 4:
            raise ImageError(data.ids[4], "truncated")
        return data.read(index)

    kept, skipped = readable(replace(data, read=read))
    assert list(kept.ids) == [name for i, name in enumerate(data.ids) if i != 4]
    assert len(skipped) == 1
    assert data.ids[4] in skipped[0]
