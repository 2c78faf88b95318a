"""Cached tower grids: equal to the towers' own, tied to them, resumed to the same bytes, shared out."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones_helpers import picture, tiny_clip
from llava_train_helpers import data_options, tiny_project
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from llava_ext.config import CacheConfig, ConversationData, ModelConfig, TowerConfig
from llava_ext.images import image_id, open_picture
from llava_ext.llava_json import read_records
from llava_ext.tower_cache import CHECKED, CachedGrids, open_store
from llava_ext.tower_cache_job import CacheJob, fill, open_cache_job, plan
from llava_ext.tower_rows import store_name
from llava_ext.towers import load_tower, load_towers, look
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
    """Of all files but the one that holds times of change."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != CHECKED]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


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


def test_damaged_pictures_are_bad_records_of_a_cache(project, tmp_path, monkeypatch) -> None:
    """They are found before anything is written, by the main process for all, and once."""
    images = tmp_path / "images"
    shutil.copytree(project[0] / "images", images)
    for name in ("2.png", "7.png"):
        (images / name).write_bytes((images / name).read_bytes()[:200])
    data = ConversationData(project[0] / "data.json", images)
    config = CacheConfig(cache=tmp_path / "c", data=data, model=project[1], batch_size=2)
    with pytest.raises(ValueError, match=r"2 of 10 records are wrong: .*2\.png.*7\.png"):
        open_cache_job(config, Processes())
    assert not (tmp_path / "c").exists()
    config = replace(config, bad_records="skip")
    rest = [name for name in NAMES if name not in ("2.png", "7.png")]
    monkeypatch.setattr("llava_ext.tower_cache_job.SHARD_IMAGES", 4)
    with pytest.warns(UserWarning, match="left out: 2 of 10"):
        steps = fill(open_cache_job(config, Processes()))
    for _ in range(3):
        next(steps)
    steps.close()
    looked: list[str] = []

    def watched(path: Path) -> Image.Image:
        looked.append(path.name)
        return open_picture(path)

    monkeypatch.setattr("llava_ext.images.open_picture", watched)
    told: list[list[Any]] = []
    with pytest.warns(UserWarning, match="left out: 2 of 10"):
        again = open_cache_job(config, Processes(gather=lambda items: told.append(items) or items))
    assert sorted(looked) == ["2.png", "7.png"]
    finish(again)
    looked.clear()
    with pytest.warns(UserWarning, match="left out: 2 of 10"):
        other = open_cache_job(config, Processes(1, 2, gather=lambda items: items + told[0]))
    assert not looked and other.names == again.names == rest
    towers = load_towers(project[1], "cpu")
    wanted = own_grids(project[1], rest)
    cached = CachedGrids.open(tmp_path / "c", towers, images, rest)
    for found, own in zip(
        cached.stack([cached.get(n) for n in rest])["grids"], wanted, strict=True
    ):
        torch.testing.assert_close(found.float(), own, rtol=2e-3, atol=2e-3)


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


def own_grids(model: ModelConfig, names: list[str]) -> list[torch.Tensor]:
    """What the towers themselves give of the pictures, averaged for ``pool``."""
    found = []
    for tower in load_towers(model, "cpu"):
        images = [picture(int(name.split(".")[0])) for name in names]
        pixels = torch.stack([tower.pixels(image) for image in images])
        found.append(look(tower, pixels, [image_id(one) for one in images], ["a dog"] * len(names)))
        if tower.config.tokens == "pool":
            found[-1] = adaptive_avg_pool2d(found[-1], 2)
    return found


def test_eight_bits_are_within_half_a_step_of_the_towers_own(project, tmp_path) -> None:
    _, model = project
    finish(job(project, tmp_path / "c", keep="int8"))
    names = ["7.png", "0.png", "7.png"]
    cached = CachedGrids.open(tmp_path / "c", load_towers(model, "cpu"), None, NAMES)
    assert not cached.towers
    found = cached.stack([cached.get(name) for name in names])["grids"]
    for grids, own in zip(found, own_grids(model, names), strict=True):
        step = own.abs().amax(dim=(2, 3), keepdim=True) / 127
        assert grids.shape == own.shape
        assert bool(((grids - own).abs() <= 0.5001 * step + 1e-9).all())
    empty = cached.stack([])["grids"]
    assert [tuple(grids.shape) for grids in empty] == [(0, 16, 2, 2), (0, 16, 8, 8)]
    sizes = [store.row_shape for store in cached.stores]
    assert sizes == [(16, 4 + 4), (16, 64 + 4)]


@pytest.mark.parametrize("prompt", ["", "a cat", "question"])
def test_latents_give_the_towers_own_grids_at_every_timestep(project, tmp_path, prompt) -> None:
    """One cache of latents serves all timesteps, draws and prompts, the question too, without a picture."""
    _, model = project
    finish(job(project, tmp_path / "c", keep="latents"))
    other = replace(model.towers[1], timestep=200, draw=3, prompt=prompt)
    model = replace(model, towers=(model.towers[0], other))
    names = ["7.png", "0.png", "7.png"]
    cached = CachedGrids.open(tmp_path / "c", load_towers(model, "cpu"), None, NAMES)
    batch = cached.stack([cached.get(name) for name in names])
    assert batch["image_ids"] == [image_id(picture(int(name[0]))) for name in names]
    pairs = zip(cached.towers, batch["pixels"], own_grids(model, names), strict=True)
    for tower, rows, own in pairs:
        grids = look(tower, rows, batch["image_ids"], ["a dog"] * 3)
        if tower.config.tokens == "pool":
            grids = adaptive_avg_pool2d(grids, 2)
        assert torch.equal(grids, own)
    empty = cached.stack([])
    pairs = zip(cached.towers, empty["pixels"], strict=True)
    shapes = [tuple(look(*pair, [], []).shape) for pair in pairs]
    assert shapes == [(0, 16, 4, 4), (0, 16, 8, 8)]
    # 8-bit pictures of 32 px, latents of 4 x 16 x 16 in float16, and names.
    latents = load_tower(other, "cpu").backbone.encode(torch.zeros(1, 3, 32, 32))  # type: ignore[attr-defined]
    assert [s.row_shape for s in cached.stores] == [
        (3 * 32 * 32 + 16,),
        (2 * latents.numel() + 16,),
    ]


def test_the_choices_and_their_sizes_are_printed_beforehand(project, tmp_path, monkeypatch) -> None:
    lines = plan(job(project, tmp_path / "c", keep="int8")).splitlines()
    assert [line.split(",")[0].split()[:2] for line in lines[1:]] == [
        ["grids", "21.8"], ["->", "int8"], ["latents", "51.5"],
    ]  # fmt: skip
    # 16 channels at 4 and 64 cells; 10 pictures.
    sizes = [10 * 16 * 68 * 2, 10 * 16 * (68 + 2 * 4)]
    jobs = [job(project, tmp_path / "c", keep=keep) for keep in ("grids", "int8")]
    assert [10 * one.row_bytes for one in jobs] == sizes
    assert all("images/s" in line for line in lines[1:])
    monkeypatch.setattr("llava_ext.tower_cache_job.free_disk", lambda path: 20_000)
    with pytest.raises(
        ValueError, match=r"takes 21\.8 kB, but 20\.0 kB .*`keep: int8` takes 12\.2 kB"
    ):
        plan(job(project, tmp_path / "c"))
    assert (
        "no tower runs" in lines[1]
        and "the towers run on" in lines[3]
        and not (tmp_path / "c").exists()
    )


def test_hashes_are_compared_once(project, tmp_path, monkeypatch) -> None:
    """Not after the cache was filled, nor after they were compared; again when a file has changed."""
    from revelio.activations import store as module

    _, model = project
    finish(job(project, tmp_path / "c"))
    towers, hashed = load_towers(model, "cpu"), []
    original = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: hashed.append(path) or original(path))

    def files_hashed() -> int:
        del hashed[:]
        CachedGrids.open(tmp_path / "c", towers, None, NAMES)
        return len(hashed)

    assert files_hashed() == 0
    (tmp_path / "c" / CHECKED).unlink()
    assert (files_hashed(), files_hashed()) == (2, 0)
    (tmp_path / "c" / CHECKED).write_text("mine")
    assert (files_hashed(), files_hashed()) == (2, 2)
    assert (tmp_path / "c" / CHECKED).read_text() == "mine"
    shard = next((tmp_path / "c").glob("sd-*/shard-*"))
    edited(shard.parent, shard.name)
    with pytest.raises(ValueError, match="was edited after it was written"):
        files_hashed()


def test_packed_bytes_are_no_activations(project, tmp_path) -> None:
    from revelio.activations.store import ActivationStore

    finish(job(project, tmp_path / "c", keep="latents"))
    for folder in (tmp_path / "c").glob("*-latents"):
        with pytest.raises(ValueError, match="holds packed bytes, no activations"):
            ActivationStore.open(folder)
