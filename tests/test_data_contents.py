"""What pictures hold is part of what caches and resumed runs are compared by, names alone are not."""

import hashlib
import json
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from activations_helpers import SETTINGS, FakeBackbone, memory_dataset
from backbones_helpers import tiny_dinov2
from command_helpers import fails
from data_helpers import noise_picture, png
from diffc_helpers import FormulaBackbone
from files_helpers import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from revelio import cli
from revelio.activations.extract import extract
from revelio.activations.store import ActivationStore, write_store
from revelio.cli.bar import Bar
from revelio.data.contents import UNREADABLE, digest_of
from revelio.data.dataset import ImageError
from revelio.data.open import open_dataset
from revelio.diffc.cache import CacheSettings, fill_cache
from revelio.diffc.sources import LiveGrids
from revelio.pipelines import silent
from revelio.pipelines.inputs import hashed
from revelio.pipelines.train_sae import describe
from revelio.run_dir import Run

RUN = SETTINGS | {"timesteps": (25,), "draws": 1}
KIB = 1024


def folder_of(root: Path, count: int = 9) -> Path:
    """``root/set/<class>/<number>.png``: noise, by number."""
    for number in range(count):
        place = root / "set" / "abc"[number % 3] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise_picture(20, 20, number).save(place)
    return root / "set"


def invert(path: Path) -> None:
    """The negative of a picture, in a file of the same name."""
    with Image.open(path) as image:
        ImageOps.invert(image.convert("RGB")).save(path)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([0, 1, 300, 64 * KIB, 256 * KIB, 256 * KIB + 1, 400_000]),
    place=st.floats(0, 1, exclude_max=True),
)
def test_a_digest_is_as_the_format_says(tmp_path_factory, size, place):
    content = bytearray(np.random.default_rng(size).bytes(size))
    path = tmp_path_factory.getbasetemp() / "digest.bin"
    path.write_bytes(content)
    windows = [bytes(content)]
    if size > 256 * KIB:
        starts = [(size - 64 * KIB) * i // 3 for i in range(4)]
        windows = [bytes(content[start : start + 64 * KIB]) for start in starts]
    text = b"%d:" % size + b"".join(windows)
    wanted = hashlib.blake2b(text, digest_size=16).hexdigest()
    assert digest_of(path) == digest_of(bytes(content)) == wanted
    if 0 < size <= 256 * KIB:
        content[int(place * size)] ^= 1
        path.write_bytes(content)
        assert digest_of(path) != wanted


def test_every_source_has_digests_of_what_it_stores(tmp_path):
    folder = folder_of(tmp_path)
    pictures = [png(noise_picture(4, 4, n)) for n in range(3)]
    table = pyarrow.table({"image": [{"bytes": one, "path": None} for one in pictures]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    from_folder, from_rows = open_dataset(folder), open_dataset(tmp_path / "x.parquet")
    files = [digest_of((folder / name).read_bytes()) for name in from_folder.ids]
    assert from_folder.digests() == files and len(set(files)) == 9
    assert from_rows.digests() == [digest_of(one) for one in pictures]
    kept = pickle.loads(pickle.dumps(from_folder.subset([5, 0])))  # noqa: S301
    assert kept.digests() == [files[5], files[0]]
    (folder / from_folder.ids[0]).unlink()
    found = from_folder.digests()
    assert found is not None and found[0] == UNREADABLE
    assert memory_dataset(3).digests() is None


def test_stores_do_not_depend_on_times_or_places(tmp_path):
    one, two = folder_of(tmp_path / "1"), folder_of(tmp_path / "2")
    for path in two.rglob("*.png"):
        path.touch()
    for name, folder in (("a", one), ("b", two)):
        extract(open_dataset(folder), FakeBackbone(), tmp_path / name, **RUN)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    manifest = json.loads((tmp_path / "a/deep-t25-empty-d0/manifest.json").read_text())
    lines = "\n".join(open_dataset(one).digests() or [])
    assert manifest["contents_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert "shard_contents" not in manifest


def test_a_latent_cache_of_the_same_names_does_not_serve_other_pictures(tmp_path):
    one, two = folder_of(tmp_path / "1"), folder_of(tmp_path / "2")
    for path in two.rglob("*.png"):
        invert(path)
    cache = tmp_path / "z0"
    extract(open_dataset(one), FakeBackbone(), tmp_path / "a", vae_cache=cache, **RUN)
    before = contents(cache)
    with pytest.raises(ValueError, match=r"z0 was made of other pictures .* another folder"):
        extract(open_dataset(two), FakeBackbone(), tmp_path / "b", vae_cache=cache, **RUN)
    assert contents(cache) == before and not (tmp_path / "b").exists()
    # In an unfinished cache as well: its first shard is there.
    manifest = json.loads((cache / "manifest.json").read_text())
    shutil.rmtree(cache)
    broken = open_dataset(one).ids[5]
    whole = (one / broken).read_bytes()
    (one / broken).write_bytes(b"no picture")
    with pytest.raises(ImageError):
        extract(open_dataset(one), FakeBackbone(), tmp_path / "c", vae_cache=cache, **RUN)
    (one / broken).write_bytes(whole)
    with pytest.raises(ValueError, match=r"z0 was made of other pictures"):
        extract(open_dataset(two), FakeBackbone(), tmp_path / "d", vae_cache=cache, **RUN)
    # A mended picture changes no row that is there: the same run goes on, to the same bytes.
    extract(open_dataset(one), FakeBackbone(), tmp_path / "c", vae_cache=cache, resume=True, **RUN)
    assert json.loads((cache / "manifest.json").read_text()) == manifest
    assert contents(cache) == before
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


def test_resume_does_not_mix_pictures(tmp_path):
    folder = folder_of(tmp_path / "1")
    extract(open_dataset(folder), FakeBackbone(), tmp_path / "a", **RUN)
    before = contents(tmp_path / "a")
    invert(folder / open_dataset(folder).ids[7])
    with pytest.raises(ValueError, match=r"was made of other pictures .* another folder"):
        extract(open_dataset(folder), FakeBackbone(), tmp_path / "a", resume=True, **RUN)
    (tmp_path / "a/deep-t25-empty-d0/shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"was made of other pictures .* another folder"):
        extract(open_dataset(folder), FakeBackbone(), tmp_path / "a", resume=True, **RUN)
    invert(folder / open_dataset(folder).ids[7])
    extract(open_dataset(folder), FakeBackbone(), tmp_path / "a", resume=True, **RUN)
    assert contents(tmp_path / "a") == before


def test_stores_from_before_contents_were_recorded_go_on_as_they_were(tmp_path):
    folder = folder_of(tmp_path / "1")
    extract(open_dataset(folder), FakeBackbone(), tmp_path / "a", vae_cache=tmp_path / "z0", **RUN)
    for path in [*(tmp_path / "a").rglob("manifest.json"), tmp_path / "z0/manifest.json"]:
        manifest = json.loads(path.read_text())
        del manifest["contents_sha256"]
        path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    before = contents(tmp_path / "a")
    (tmp_path / "a/deep-t25-empty-d0/shard-00001.safetensors").unlink()
    extract(open_dataset(folder), FakeBackbone(), tmp_path / "a", resume=True, **RUN)
    assert contents(tmp_path / "a") == before
    with pytest.warns(UserWarning, match=r"z0 was made before the contents of pictures"):
        extract(
            open_dataset(folder), FakeBackbone(), tmp_path / "b", vae_cache=tmp_path / "z0", **RUN
        )


def views_of(folder: Path, place: Path) -> torch.Tensor:
    """Plain view of a folder's pictures, out of files in ``place``."""
    source = LiveGrids(open_dataset(folder), FormulaBackbone(), "mix", timestep=25, seed=3)
    kept = CacheSettings(0, torch.float32, 0.0, 4, place, {"layer": "mix"})
    grids = list(fill_cache(source, kept))[-1].grids
    assert grids is not None
    return grids.grids(range(9), 0)


def test_kept_views_are_of_the_pictures_that_are_there(tmp_path):
    one, two = folder_of(tmp_path / "1"), folder_of(tmp_path / "2")
    for path in two.rglob("*.png"):
        invert(path)
    alone = views_of(two, tmp_path / "alone")
    views_of(one, tmp_path / "cache")
    assert torch.equal(views_of(two, tmp_path / "cache"), alone)
    assert not torch.equal(views_of(one, tmp_path / "cache"), alone)


@pytest.mark.parametrize("harm", ["cut", "longer", "flipped", "notes", "link"])
def test_a_harmed_view_is_computed_again(tmp_path, harm):
    folder, place = folder_of(tmp_path / "1"), tmp_path / "cache"
    wanted = views_of(folder, place)
    (view,) = place.glob("*.bin")
    content = view.read_bytes()
    if harm == "notes":
        view.with_suffix(".json").write_text("{")
    elif harm == "link":
        view.rename(tmp_path / "elsewhere")
        view.symlink_to(tmp_path / "elsewhere")
    else:
        changed = {"cut": content[:-8], "longer": content + b"x", "flipped": b"\x7f" + content[1:]}
        view.write_bytes(changed[harm])
    assert torch.equal(views_of(folder, place), wanted)
    assert view.read_bytes() == content and not view.is_symlink()


def test_a_run_does_not_go_on_with_another_store(tmp_path):
    def store(name: str, value: float) -> ActivationStore:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return write_store(tmp_path / name, torch.full((4, 2), value), list("abcd"))

    run = Run.open(tmp_path / "run", "train-ksae", "k: 1\n")
    run.add_input("store", describe(store("s", 1.0)))
    again = Run.open(tmp_path / "run", "train-ksae", "k: 1\n", resume=True)
    again.add_input("store", describe(store("s", 1.0)))
    with pytest.raises(ValueError, match=r"run was started with another store .*sha256"):
        again.add_input("store", describe(store("s", 2.0)))
    # A run from before the hash was kept has none to compare.
    old = {key: value for key, value in describe(store("s", 1.0)).items() if key != "sha256"}
    again.manifest["inputs"] = {"store": old}
    again.add_input("store", describe(store("s", 1.0)))


def test_hashing_is_silent_about_what_cannot_be_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert digest_of(tmp_path / "absent") == UNREADABLE
        assert digest_of(tmp_path) == UNREADABLE
        assert digest_of(tmp_path / "nul\0") == UNREADABLE


def unfinish(run: Path) -> None:
    """Make a finished run one that was killed before its end."""
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    (run / "report.json").unlink()


def test_train_ksae_does_not_resume_on_another_stores_rows(tmp_path, capsys):
    def store(layer: str, seed: int) -> None:
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed))
        write_store(tmp_path / "s", rows, list(map(str, range(40))), settings={"layer": layer})

    store("up_ft1", 0)
    flags = ["--k", "2", "--expansion", "2", "--batch-size", "8", "--steps", "6"]
    words = ["train-ksae", "--store", str(tmp_path / "s"), "--out", str(tmp_path / "run"), *flags]
    words += ["--checkpoint-every", "2", "--kernel", "torch"]
    cli.main(words)
    unfinish(tmp_path / "run")
    for layer, seed in (("up_ft1", 1), ("up_ft0", 0)):
        store(layer, seed)
        assert "was started with another store" in fails(capsys, *words, "--resume")
    store("up_ft1", 0)
    cli.main([*words, "--resume"])
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize("views", ["1", "-1"])
def test_train_diffc_does_not_resume_on_other_pictures(tmp_path, capsys, views):
    (tmp_path / "data").mkdir()
    for split, count in (("train", 12), ("test", 6)):
        folder_of(tmp_path / split, count).rename(tmp_path / "data" / split)
    words = ["train-diffc", "--out", str(tmp_path / "run"), "--data.source", str(tmp_path / "data")]
    words += ["--backbone.name", "pixels", "--backbone.image-size", "16", "--layer", "pixels"]
    words += ["--timestep", "None", "--width", "4", "--epochs", "1", "--views", views]
    cli.main(words)
    unfinish(tmp_path / "run")
    changed = next((tmp_path / "data" / "train").rglob("*.png"))
    invert(changed)
    assert "was started with another set of pictures" in fails(capsys, *words, "--resume")
    invert(changed)
    cli.main([*words, "--resume"])
    assert (tmp_path / "run" / "report.json").exists()


def test_pictures_are_read_once_under_a_bar_that_begins_at_once(tmp_path, capsys, monkeypatch):
    """Hundreds of thousands of pictures take minutes: the line stands before the first is read."""
    folder = folder_of(tmp_path)
    dataset = open_dataset(str(folder))
    read: list[int] = []

    def digest(index: int) -> str:
        if not read:
            assert "reading 9 pictures:   0%" in capsys.readouterr().err
        read.append(index)
        return dataset.digest(index)

    watched = replace(dataset, digest=digest)
    with Bar("extraction") as bar:
        found = hashed(watched, bar)
    assert "9/9" in capsys.readouterr().err
    assert found.digests() == found.digests() == dataset.digests() and sorted(read) == list(
        range(9)
    )
    assert found.subset([7, 1]).digests() == [dataset.digest(7), dataset.digest(1)]
    assert hashed(memory_dataset(3), silent).digests() is None


@pytest.mark.parametrize("command", ["extract", "train-diffc"])
def test_commands_say_that_pictures_are_read(tmp_path, capsys, command):
    source = ["--data.source", str(folder_of(tmp_path)), "--out", str(tmp_path / "out")]
    if command == "extract":
        backbone = [
            "--backbone.name",
            str(tiny_dinov2(tmp_path / "dino")),
            "--backbone.device",
            "cpu",
        ]
        words = [*backbone, "--layers", "block1", "--timesteps", "--plan"]
    else:
        words = ["--backbone.name", "pixels", "--layer", "pixels", "--timestep", "None"]
        words += ["--test.split", "None", "--epochs", "1", "--width", "2"]
    cli.main([command, *source, *words])
    said = "".join(capsys.readouterr())
    assert "reading 9 pictures" in said or "reading 6 pictures" in said
