from pathlib import Path

import pytest
import torch
from data_helpers import write_class_folders

from revelio.data.dataset import ImageDataset, ImageError
from revelio.data.loading import Batch, batches
from revelio.data.sources.folder import open_folder
from revelio.data.transforms import RandomCropTransform, SquareTransform
from revelio.seeds import generator

RAW = SquareTransform(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture
def animals(tmp_path: Path) -> ImageDataset:
    """11 pictures: red is the class, green the number within it."""
    write_class_folders(tmp_path, {"ant": 4, "bee": 3, "cow": 4}, size=6)
    return open_folder(tmp_path)


def painted(batch: Batch) -> list[tuple[int, int]]:
    red, green = (batch.pixels[:, channel, 0, 0] * 255 for channel in (0, 1))
    return list(zip(red.round().int().tolist(), green.round().int().tolist(), strict=True))


def numbers(ids: list[str]) -> list[tuple[int, int]]:
    names = ["ant", "bee", "cow"]
    return [(names.index(i.split("/")[0]), int(i.split("/")[1].removesuffix(".png"))) for i in ids]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_data_set(animals: ImageDataset, workers: int) -> None:
    found = list(batches(animals, RAW, 4, workers=workers))
    assert [batch.indices for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for batch in found:
        assert batch.ids == [animals.ids[i] for i in batch.indices]
        assert painted(batch) == numbers(batch.ids)
        assert batch.labels is not None and batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [red for red, _ in painted(batch)]
        assert batch.pixels.shape == (len(batch), 3, 4, 4) and batch.skipped == []


def test_indices_choose_and_order(animals: ImageDataset) -> None:
    found = list(batches(animals, RAW, 2, indices=[9, 0, 4]))
    assert [batch.indices for batch in found] == [[9, 0], [4]]
    assert painted(found[0]) == [(2, 2), (0, 0)] and painted(found[1]) == [(1, 0)]


def test_no_labels_stay_none(animals: ImageDataset) -> None:
    bare = ImageDataset("x", None, (), animals.ids, None, animals.read)
    assert next(batches(bare, RAW, 2)).labels is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_picture_shifts_nothing(
    animals: ImageDataset, tmp_path: Path, workers: int
) -> None:
    for broken in ("ant/1.png", "bee/0.png", "bee/1.png", "bee/2.png"):
        (tmp_path / broken).write_bytes(b"")
    found = list(batches(animals, RAW, 3, workers=workers, on_error="skip"))
    assert [batch.indices for batch in found] == [[0, 2], [3], [7, 8], [9, 10]]
    reason = "it is empty (0 bytes)"
    assert [batch.skipped for batch in found] == [
        [("ant/1.png", reason)],
        [("bee/0.png", reason), ("bee/1.png", reason)],
        [("bee/2.png", reason)],
        [],
    ]
    for batch in found:
        assert painted(batch) == numbers(batch.ids)
        assert batch.labels is not None
        assert batch.labels.tolist() == [red for red, _ in painted(batch)]


def test_a_batch_without_readable_pictures_is_empty(animals: ImageDataset, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"ant/{number}.png").write_bytes(b"no picture")
    first = next(batches(animals, RAW, 2, on_error="skip"))
    assert len(first) == len(first.pixels) == 0 and len(first.skipped) == 2
    assert first.labels is not None and first.labels.shape == (0,)
    assert first.labels.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_names_the_first_unreadable_picture(
    animals: ImageDataset, tmp_path: Path, workers: int
) -> None:
    for broken in ("bee/1.png", "cow/0.png"):
        (tmp_path / broken).write_bytes(b"")
    loop = batches(animals, RAW, 2, workers=workers)
    assert [next(loop).indices, next(loop).indices] == [[0, 1], [2, 3]]
    with pytest.raises(ImageError, match=r"^image bee/1\.png can't be read: it is empty") as caught:
        next(loop)
    assert caught.value.image_id == "bee/1.png"
    assert str(caught.value).endswith("or set on_error to skip to leave such pictures out")
    with pytest.raises(ImageError) as caught:
        list(batches(animals, RAW, 2, workers=workers, can_skip=False))
    assert str(caught.value).endswith("all pictures are needed here")
    assert "on_error" not in str(caught.value)


def test_random_transforms_are_keyed_by_the_image(animals: ImageDataset) -> None:
    crop = RandomCropTransform(4, scale=(0.2, 0.9))

    def all_pixels(size: int, workers: int, order: list[int], epoch: int) -> torch.Tensor:
        loop = batches(animals, crop, size, indices=order, workers=workers, key=("crop", 3, epoch))
        rows = torch.cat([batch.pixels for batch in loop])
        return rows[torch.tensor(order).argsort()]

    forward = all_pixels(4, 0, list(range(11)), 0)
    assert torch.equal(forward, all_pixels(3, 2, list(range(11))[::-1], 0))
    alone = crop(animals.read(5), generator("crop", 3, 0, animals.ids[5]))
    assert torch.equal(forward[5], alone)


def test_no_global_randomness_is_drawn(animals: ImageDataset) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(batches(animals, RAW, 4, workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_settings_are_named(animals: ImageDataset) -> None:
    with pytest.raises(ValueError, match="batch_size 0"):
        next(batches(animals, RAW, 0))
    with pytest.raises(ValueError, match="stop or skip"):
        next(batches(animals, RAW, 1, on_error="ignore"))  # type: ignore[arg-type]
