"""An extraction that was killed, interrupted or lacked room goes on to the same bytes."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from activations_helpers import SETTINGS, FakeBackbone, memory_dataset
from files_helpers import contents

from revelio.activations.extract import extract
from revelio.activations.format import write_shard
from revelio.activations.store import ActivationStore
from revelio.data.transforms import Crop, SquareTransform


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("moment", range(0, 26, 2))
def test_resume_after_a_kill_at_any_write_gives_the_same_bytes(tmp_path, monkeypatch, moment):
    dataset = memory_dataset(11, broken=(5,))
    settings = SETTINGS | {"timesteps": (25,), "on_error": "skip"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extract(dataset, FakeBackbone(), whole, vae_cache=whole / "z0", **settings)
    replaced, calls = os.replace, 0

    def dying(source, target):
        # A kill -9 between writing and renaming leaves the temporary file behind.
        nonlocal calls
        calls += 1
        if calls == moment + 1:
            torn = Path(target).with_name(f".{Path(target).name}.1.partial")
            torn.write_bytes(Path(source).read_bytes()[:9])
            raise Killed
        return replaced(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        extract(dataset, FakeBackbone(), cut, vae_cache=cut / "z0", **settings)
    monkeypatch.undo()
    extract(dataset, FakeBackbone(), cut, vae_cache=cut / "z0", resume=True, **settings)
    assert contents(cut) == contents(whole)


def test_a_process_killed_outright_resumes_to_the_same_bytes(tmp_path):
    """The real thing: SIGKILL from inside, without any clean-up."""
    program = (
        "import os, sys; from pathlib import Path; from activations_helpers import *\n"
        "from revelio.activations.extract import extract\n"
        "class Dying(FakeBackbone):\n"
        "    def encode(self, pixels):\n"
        "        if self.encoded >= 6: os.kill(os.getpid(), 9)\n"
        "        return super().encode(pixels)\n"
        "extract(memory_dataset(11), Dying(), Path(sys.argv[1]), layers=('deep', 'wide'),\n"
        "        timesteps=(25, 200), draws=2, seed=3, batch_size=2, shard_rows=4)\n"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "cut")], env=environment, check=False
    )
    assert done.returncode == -9
    assert (tmp_path / "cut/deep-t25-empty-d0/shard-00000.safetensors").exists()
    resumed = FakeBackbone()
    extract(memory_dataset(11), resumed, tmp_path / "cut", resume=True, **SETTINGS)
    extract(memory_dataset(11), FakeBackbone(), tmp_path / "whole", **SETTINGS)
    assert resumed.encoded == 7
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 4}, "seed"),
        ({"pool": 2}, "pool"),
        ({"store_dtype": "float16"}, "dtype"),
        ({"batch_size": 4}, "batch_size"),
        ({"provenance": {"mode": "as_code"}}, "mode"),
    ],
)
def test_resume_with_other_settings_names_the_setting(tmp_path, change, name):
    settings = SETTINGS | {"provenance": {"mode": "fixed"}}
    extract(memory_dataset(5), FakeBackbone(), tmp_path, **settings)
    with pytest.raises(ValueError, match=f"was made with `{name}`"):
        extract(memory_dataset(5), FakeBackbone(), tmp_path, resume=True, **settings | change)


def test_the_crop_is_recorded_and_a_store_from_before_it_was_goes_on(tmp_path):
    def cropping(resize: int) -> FakeBackbone:
        backbone = FakeBackbone()
        backbone.transform = SquareTransform(16, resize=resize)
        return backbone

    settings = SETTINGS | {"layers": ("deep",), "timesteps": (25,), "draws": 1}
    (folder,) = extract(memory_dataset(5), cropping(20), tmp_path, **settings)
    manifest = json.loads((folder / "manifest.json").read_text())
    wanted = {"size": 16, "resize": 20, "stretch": False, "offset": "even"}
    assert manifest["crop"] == wanted and Crop.of(manifest) == Crop(16, 20)
    extract(memory_dataset(5), cropping(20), tmp_path, resume=True, **settings)
    with pytest.raises(ValueError, match="was made with `crop`"):
        extract(memory_dataset(5), cropping(24), tmp_path, resume=True, **settings)
    del manifest["crop"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    extract(memory_dataset(5), cropping(20), tmp_path, resume=True, **settings)
    manifest["crop"] = wanted | {"size": 10**9}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="no usable `crop`"):
        ActivationStore.open(folder)


def test_resume_with_other_images_or_model_is_refused(tmp_path):
    extract(memory_dataset(5), FakeBackbone(), tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="`images` 5, not 6"):
        extract(memory_dataset(6), FakeBackbone(), tmp_path, resume=True, **SETTINGS)
    with pytest.raises(ValueError, match="`model` 'fake', not 'other'"):
        extract(memory_dataset(5), FakeBackbone("other"), tmp_path, resume=True, **SETTINGS)
    moved = memory_dataset(5)
    moved = replace(moved, ids=[*moved.ids[1:], moved.ids[0]])
    with pytest.raises(ValueError, match="`dataset_sha256`"):
        extract(moved, FakeBackbone(), tmp_path, resume=True, **SETTINGS)


def test_a_store_is_not_overwritten(tmp_path):
    extract(memory_dataset(5), FakeBackbone(), tmp_path, **SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match="already holds a store: go on with resume, or choose another folder"
    ):
        extract(memory_dataset(5), FakeBackbone(), tmp_path, **SETTINGS)
    idle = FakeBackbone()
    extract(memory_dataset(5), idle, tmp_path, resume=True, **SETTINGS)
    assert idle.encoded == 0 and not idle.passes
    assert contents(tmp_path) == before


def test_resume_adds_timesteps_and_mends_a_cut_shard(tmp_path):
    extract(memory_dataset(11), FakeBackbone(), tmp_path / "a", **SETTINGS | {"timesteps": (25,)})
    cut = tmp_path / "a/deep-t25-empty-d0/shard-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    extract(memory_dataset(11), FakeBackbone(), tmp_path / "a", resume=True, **SETTINGS)
    extract(memory_dataset(11), FakeBackbone(), tmp_path / "b", **SETTINGS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_full_disk_is_one_line_and_resume_continues(tmp_path, monkeypatch):
    calls = 0

    def full(folder, *rest):
        nonlocal calls
        calls += 1
        if calls == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_shard(folder, *rest)

    monkeypatch.setattr("revelio.activations.extract.write_shard", full)
    with pytest.raises(OSError, match=r"shard-00001.*No space left on device.*go on with resume"):
        extract(memory_dataset(11), FakeBackbone(), tmp_path / "a", **SETTINGS)
    monkeypatch.undo()
    extract(memory_dataset(11), FakeBackbone(), tmp_path / "a", resume=True, **SETTINGS)
    extract(memory_dataset(11), FakeBackbone(), tmp_path / "b", **SETTINGS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_finished_extraction_is_taken_as_it_is_and_tells_where_it_stands(tmp_path):
    steps = []
    first = FakeBackbone()
    paths = extract(memory_dataset(11), first, tmp_path, progress=steps.append, **SETTINGS)
    assert [step.images for step in steps] == [2, 4, 6, 8, 10, 11]
    assert {(step.total, step.skipped) for step in steps} == {(11, 0)}
    before, again = contents(tmp_path), FakeBackbone()
    settings = SETTINGS | {"resume": True}
    assert extract(memory_dataset(11), again, tmp_path, progress=steps.append, **settings) == paths
    assert contents(tmp_path) == before
    assert (first.encoded, again.encoded, len(steps)) == (11, 0, 6)
