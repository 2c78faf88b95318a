"""Cached tower grids: equal to the towers' own, tied to them, resumed to the same bytes, shared out."""

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones_helpers import picture, tiny_clip
from llava_train_helpers import data_options, tiny_project
from torch.nn.functional import adaptive_avg_pool2d

from llava_ext.config import CacheConfig, ModelConfig, TowerConfig
from llava_ext.images import STAMPS, image_id, picture_ids, plain_ids
from llava_ext.llava_json import read_records
from llava_ext.tower_cache import CachedGrids, open_store, store_name
from llava_ext.tower_cache_job import CacheJob, fill, open_cache_job, plan
from llava_ext.towers import load_tower, load_towers
from revelio.distributed import Processes

NAMES = [f"{number}.png" for number in range(10)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("cache")
    model = tiny_project(folder, records=10)
    # A whole grid beside a pooled one.
    conv = replace(model.towers[1], tokens="conv", budget=64)
    return folder, replace(model, towers=(model.towers[0], conv))


def job(project: tuple[Path, ModelConfig], out: Path, **changes: object) -> CacheJob:
    folder, model = project
    config = CacheConfig(cache=out, data=data_options(folder), model=model, batch_size=2)
    return replace(open_cache_job(config, Processes()), **changes)  # type: ignore[arg-type]


def finish(one: CacheJob) -> None:
    for _ in fill(one):
        pass


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_grids_equal_the_towers_own(project, tmp_path) -> None:
    folder, model = project
    finish(job(project, tmp_path / "c"))
    towers = load_towers(model, "cpu")
    cached = CachedGrids.open(tmp_path / "c", towers, folder / "images", NAMES)
    names = ["7.png", "0.png", "7.png"]
    found = cached.stack([cached.get(name) for name in names])["grids"]
    for tower, grids in zip(towers, found, strict=True):
        images = [picture(int(name.split(".")[0])) for name in names]
        pixels = torch.stack([tower.pixels(image) for image in images])
        own = tower.grids(pixels, [image_id(image) for image in images])
        if tower.config.tokens == "pool":
            own = adaptive_avg_pool2d(own, 2)
        assert grids.dtype == torch.float16 and grids.shape == own.shape
        torch.testing.assert_close(grids.float(), own, rtol=2e-3, atol=2e-3)
    empty = cached.stack([])["grids"]
    assert [tuple(grids.shape) for grids in empty] == [(0, 16, 2, 2), (0, 16, 8, 8)]


def test_rows_are_read_from_disk_where_memory_is_short(project, tmp_path, monkeypatch) -> None:
    folder, model = project
    finish(job(project, tmp_path / "c"))
    towers = load_towers(model, "cpu")
    held = CachedGrids.open(tmp_path / "c", towers, folder / "images", NAMES)
    monkeypatch.setattr("llava_ext.tower_cache.IN_MEMORY", 0)
    read = CachedGrids.open(tmp_path / "c", towers, folder / "images", NAMES)
    pairs = zip(held.get("3.png"), read.get("3.png"), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_stopped_run_goes_on_to_the_same_bytes(project, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("llava_ext.tower_cache_job.SHARD_IMAGES", 4)
    finish(job(project, tmp_path / "whole"))
    steps = fill(job(project, tmp_path / "cut"))
    for _ in range(3):
        next(steps)
    steps.close()
    assert len(list((tmp_path / "cut").rglob("shard-*"))) == 2
    with pytest.raises(ValueError, match="no finished cache"):
        open_store(tmp_path / "cut", load_tower(project[1].towers[0], "cpu"))
    again = job(project, tmp_path / "cut")
    assert again.share == 6 and "6 of 10 images" in plan(again)
    finish(again)
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")
    assert "nothing left to do" in plan(job(project, tmp_path / "cut"))


def test_two_processes_share_the_shards(project, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("llava_ext.tower_cache_job.SHARD_IMAGES", 4)
    finish(job(project, tmp_path / "one"))
    # Rank 1 first: nothing waits here, so the main process must come last to close the stores.
    main = job(project, tmp_path / "two", processes=Processes(0, 2))
    for _, target in main.targets:
        target.begin()
    other = job(project, tmp_path / "two", processes=Processes(1, 2))
    assert (main.share, other.share) == (6, 4)
    finish(other)
    finish(main)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


def test_two_towers_of_one_config_are_computed_once(project, tmp_path) -> None:
    one = job(project, tmp_path / "c")
    assert len(replace(one, towers=[*one.towers, one.towers[0]]).targets) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "`seed` 0, not 1"), ({"prompt": "a dog"}, "`prompt` '', not 'a dog'")],
)
def test_a_cache_of_other_settings_is_refused(project, tmp_path, change, message) -> None:
    folder, model = project
    finish(job(project, tmp_path / "c"))
    other = replace(model, towers=(model.towers[0], replace(model.towers[1], **change)))
    towers = load_towers(other, "cpu")
    with pytest.raises(ValueError, match=message):
        CachedGrids.open(tmp_path / "c", towers, folder / "images", NAMES)
    with pytest.raises(ValueError, match=message):
        job((folder, other), tmp_path / "c").check()


def test_a_cache_of_other_weights_aspect_or_pooling_is_refused(project, tmp_path) -> None:
    _, model = project
    finish(job(project, tmp_path / "c"))
    other = tiny_clip(tmp_path / "clip", seed=1)
    tower = load_tower(replace(model.towers[0], backbone=str(other)), "cpu")
    with pytest.raises(ValueError, match="`weights`"):
        open_store(tmp_path / "c", tower)
    with pytest.raises(ValueError, match="`aspect` 'crop', not 'pad'"):
        open_store(tmp_path / "c", load_tower(model.towers[0], "cpu", "pad"))
    finer = load_tower(replace(model.towers[0], budget=16), "cpu")
    with pytest.raises(ValueError, match="no finished cache"):
        open_store(tmp_path / "c", finer)


def test_images_that_changed_or_are_lacking_are_refused(project, tmp_path) -> None:
    _, model = project
    finish(job(project, tmp_path / "c"))
    towers = load_towers(model, "cpu")
    images = tmp_path / "images"
    images.mkdir()
    picture(3).save(images / "3.png")
    CachedGrids.open(tmp_path / "c", towers, images, ["3.png"])
    picture(3, (50, 40)).save(images / "3.png")
    with pytest.raises(ValueError, match=r"lacks image 3\.png"):
        CachedGrids.open(tmp_path / "c", towers, images, ["3.png"])
    picture(0).save(images / "new.png")
    with pytest.raises(ValueError, match=r"lacks image new\.png"):
        CachedGrids.open(tmp_path / "c", towers, images, ["new.png"])


def test_names_tell_towers_apart() -> None:
    towers = [
        TowerConfig("sd-1.5", "up_ft1", timestep=25, tokens="conv"),
        TowerConfig("sd-1.5", "up_ft1", timestep=200, tokens="conv"),
        TowerConfig("sd-1.5", "up_ft1", timestep=25, tokens="pool", budget=16),
        TowerConfig("a/b", "block2"),
    ]
    names = [store_name(tower) for tower in towers]
    assert names[0] == "sd-1.5-up_ft1-t25-d0" and names[2] == "sd-1.5-up_ft1-t25-d0-pool4"
    assert names[3] == "b-block2" and len(set(names)) == 4


def test_values_beyond_float16_are_refused(project, tmp_path, monkeypatch) -> None:
    from llava_ext.towers import BackboneTower

    grids = BackboneTower.grids
    monkeypatch.setattr(BackboneTower, "grids", lambda *given: grids(*given) * 1e9)
    with pytest.raises(ValueError, match="float16 can't hold"):
        finish(job(project, tmp_path / "c"))


def edited(folder: Path, name: str) -> None:
    """The picture with other contents, of equal size."""
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 255
    (folder / name).write_bytes(content)


def test_an_edited_picture_of_equal_size_is_noticed(project, tmp_path, monkeypatch) -> None:
    folder, model = project
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "images", "images")
    here = replace(job(project, tmp_path / "c"), folder=Path("images"))
    finish(here)
    towers = load_towers(model, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CachedGrids.open(tmp_path / "c", towers, Path("images"), NAMES)
    edited(Path("images"), "3.png")
    with pytest.raises(ValueError, match=r"lacks image 3\.png, or holds it as it was"):
        CachedGrids.open(tmp_path / "c", towers, Path("images"), NAMES)
    CachedGrids.open(tmp_path / "c", towers, Path("images"), NAMES[:3])
    again = replace(job(project, tmp_path / "c"), folder=Path("images"))
    with pytest.raises(ValueError, match="made of other pictures than those that now have"):
        finish(again)
    # Further processes of a run leave the comparison to the first.
    replace(again, processes=Processes(1, 2)).check()


def test_pictures_are_read_once(tmp_path, monkeypatch) -> None:
    names = [f"{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        picture(number).save(tmp_path / name)
    read: list[str] = []

    def digest(path: Path) -> str:
        read.append(path.name)
        return "0" * 32

    monkeypatch.setattr("llava_ext.images.digest_of", digest)
    first = picture_ids(tmp_path, names, tmp_path, keep=True)
    assert sorted(read) == names and picture_ids(tmp_path, names, tmp_path) == first
    assert [identity.rpartition("|")[0] for identity in first] == plain_ids(tmp_path, names)
    assert len(read) == 3
    os.utime(tmp_path / "1.png", (1, 1))
    assert picture_ids(tmp_path, names, tmp_path, keep=True) == first and read[3:] == ["1.png"]
    assert picture_ids(tmp_path, names, tmp_path) == first and len(read) == 4
    for broken in ("", "[]", '{"pictures": {"0.png": [1, 2]}}', '{"pictures": 3}'):
        (tmp_path / STAMPS).write_text(broken)
        del read[:]
        assert picture_ids(tmp_path, names, tmp_path) == first and sorted(read) == names


def test_workers_read_ahead_and_change_nothing(project, tmp_path) -> None:
    finish(job(project, tmp_path / "none"))
    finish(job(project, tmp_path / "two", workers=2))
    shards = [
        {
            name: data
            for name, data in bytes_of(tmp_path / one).items()
            if name.endswith("safetensors")
        }
        for one in ("none", "two")
    ]
    assert shards[0] == shards[1] and shards[0]


def test_a_cache_needs_no_pictures(project, tmp_path) -> None:
    folder, model = project
    finish(job(project, tmp_path / "c"))
    towers = load_towers(model, "cpu")
    wanted = CachedGrids.open(tmp_path / "c", towers, folder / "images", NAMES)
    found = CachedGrids.open(tmp_path / "c", towers, None, NAMES)
    for name in NAMES:
        pairs = zip(found.get(name), wanted.get(name), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match=r"lacks image other\.png"):
        CachedGrids.open(tmp_path / "c", towers, None, ["other.png"])
    assert read_records(folder / "data.json", None, files=False)
