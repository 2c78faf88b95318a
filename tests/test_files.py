"""Writing files whole, in the mode of the umask, on a full disk; what a stop leaves is gone on from."""

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from diffc_helpers import separable
from files_helpers import contents
from safetensors import SafetensorError
from safetensors.torch import save_file

from revelio import disk, files
from revelio.diffc.cache import CacheSettings, drop_cache, fill_cache
from revelio.diffc.sources import TensorGrids
from revelio.disk import DiskFull
from revelio.files import check_folder, partial_path, write_folder, write_whole, write_whole_by
from revelio.outputs import RECORD, check_file, has_keys, replace_files
from revelio.run_dir import Run


@contextmanager
def umask(mode: int) -> Iterator[None]:
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


def tensors(path: Path) -> None:
    save_file({"a": torch.ones(3)}, path)


@pytest.mark.parametrize(("mask", "file_mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_umask_decides_the_mode(tmp_path: Path, mask: int, file_mode: int) -> None:
    with umask(mask):
        write_whole(tmp_path / "text", "a")
        write_whole_by(tmp_path / "tensors", tensors)
        for _ in range(2):
            write_folder(tmp_path / "folder", lambda folder: tensors(folder / "a.safetensors"))
            replace_files(tmp_path / "out", "test", lambda folder: tensors(folder / "b"))
        run = Run.open(tmp_path / "run", "t", "a: 1\n")
        run.log(step=1)
        run.save_checkpoint(1, lambda folder: tensors(folder / "a.safetensors"))
        run.finish()
    for path in tmp_path.rglob("*"):
        expected = file_mode | (0o111 & ~mask if path.is_dir() else 0)
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_never_replaced_by_one(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "folder":
        place.mkdir()
        (place / "thesis").write_text("precious")
    else:
        os.mkfifo(place)
    for write in (lambda: write_whole(place, "x"), lambda: write_whole_by(place, tensors)):
        with pytest.raises(ValueError, match=r"place is (a folder|no regular file)"):
            write()
    with pytest.raises(ValueError, match="place is"):
        check_file(place, has_keys("a"), "ours")
    assert place.exists() and list(tmp_path.iterdir()) == [place]
    assert kind == "pipe" or (place / "thesis").read_text() == "precious"


def test_each_file_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(handle: int) -> None:
        done.append("sync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("move"), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("move"), rename(a, b)))
    write_whole(tmp_path / "a", "x")
    assert [line.split(".")[0] for line in done] == ["sync ", "move", f"sync {tmp_path.name}"]
    assert ".a." in done[0]
    for write in (
        lambda: write_whole_by(tmp_path / "b", tensors),
        lambda: write_folder(tmp_path / "c", lambda folder: tensors(folder / "b")),
        lambda: write_folder(tmp_path / "c", lambda folder: tensors(folder / "b")),
    ):
        done.clear()
        write()
        assert done.index("sync b") < done.index("move"), done
        assert done[-1].startswith("sync "), done


def test_an_empty_folder_becomes_the_new_one_at_once_and_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o2750)

    def write(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).write_text(name)

    moved = []
    monkeypatch.setattr(os, "replace", lambda *paths: moved.append(paths))
    assert write_folder(out, write) == ["a", "b"] and not moved
    assert contents(out) == {"a": b"a", "b": b"b"} and list(tmp_path.iterdir()) == [out]
    assert stat.S_IMODE(out.stat().st_mode) == 0o2750


@pytest.mark.parametrize("kind", ["link", "mount", "filled meanwhile", "parent closed"])
def test_an_empty_folder_that_can_not_give_way_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out, elsewhere = tmp_path / "in" / "out", tmp_path / "elsewhere"
    (elsewhere if kind == "link" else out).mkdir(parents=True)
    if kind == "link":
        out.parent.mkdir()
        out.symlink_to(elsewhere)
    before = out.stat().st_ino
    rename = os.rename

    def crossing(a: Path, b: Path) -> None:
        if out.resolve() in b.parents or b == out:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(a, b)

    if kind == "mount":
        monkeypatch.setattr(os, "rename", crossing)
    if kind == "parent closed":
        opened = Path.open
        monkeypatch.setattr(
            Path,
            "open",
            lambda path, mode="r", **rest: (
                closed()
                if path.parent == out.parent and "x" in mode
                else opened(path, mode, **rest)
            ),
        )

    def write(folder: Path) -> None:
        (folder / "a").write_text("ours")
        if kind == "filled meanwhile":
            (out / "thesis").write_text("precious")

    assert write_folder(out, write) == ["a"]
    assert out.stat().st_ino == before and out.is_symlink() == (kind == "link")
    expected = {"a": b"ours"} | ({"thesis": b"precious"} if kind == "filled meanwhile" else {})
    assert contents(out) == expected and sorted(os.listdir(out)) == sorted(expected)


def closed() -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_earlier_names_are_replaced_and_removed_and_no_others(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def of(*names: str):
        def write(folder: Path) -> None:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(f"ours {len(names)}")

        return write

    replace_files(out, "one", of("a", "b/c", "b/d", "e/f"))
    (out / "b" / "mine").write_text("mine")
    (out / "g").write_text("mine")
    replace_files(out, "two", of("two"))
    replace_files(out, "one", of("a", "b/c"))
    found = contents(out)
    record = json.loads(found.pop(RECORD))
    assert record["files"] == {"one": ["a", "b/c"], "two": ["two"]}
    assert found == {
        "a": b"ours 2",
        "b/c": b"ours 2",
        "b/mine": b"mine",
        "g": b"mine",
        "two": b"ours 1",
    }
    for names in (["g"], ["a", "two"], ["b"], ["a/x"]):
        with pytest.raises(ValueError, match="in the way"):
            replace_files(out, "one", of(*names))
        assert {k: v for k, v in contents(out).items() if k != RECORD} == found


@pytest.mark.parametrize(
    "name", ["../precious", "/etc/hostname", "link/precious", "", 7, "b/../../precious", None]
)
def test_a_record_leads_nowhere_else(tmp_path: Path, name: object) -> None:
    out = tmp_path / "out"
    (out / "b").mkdir(parents=True)
    (out / "link").symlink_to(tmp_path)
    (tmp_path / "precious").write_text("mine")
    (out / RECORD).write_text(json.dumps({"format": 1, "files": {"one": ["a", name]}}))
    with pytest.raises(ValueError, match=r"outside|as a file of an earlier output"):
        replace_files(out, "one", lambda folder: tensors(folder / "a"))
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "data").symlink_to(tmp_path / "elsewhere")

    def write(folder: Path) -> None:
        (folder / "data").mkdir()
        tensors(folder / "data" / "a")

    for replacing in (lambda: write_folder(out, write), lambda: replace_files(out, "x", write)):
        with pytest.raises(ValueError, match="in the way"):
            replacing()
    assert not list((tmp_path / "elsewhere").iterdir())


FULL = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "quota")]
FULL += [SafetensorError("I/O error: No space left on device (os error 28)")]  # type: ignore[list-item]


@pytest.mark.parametrize("error", FULL, ids=["disk", "quota", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    def fail(path: Path) -> None:
        path.write_text("half") if not path.is_dir() else (path / "x").write_text("half")
        raise error

    run = Run.open(tmp_path / "run", "t", "a: 1\n")
    before = contents(tmp_path)
    for place, write in {
        "file": lambda: write_whole_by(tmp_path / "file", fail, 5_000_000),
        "folder": lambda: write_folder(tmp_path / "folder", fail, needed=5_000_000),
        "step_00000001": lambda: run.save_checkpoint(1, fail, needed=5_000_000),
        "out": lambda: replace_files(tmp_path / "out", "t", fail, 5_000_000),
    }.items():
        with pytest.raises(DiskFull) as caught:
            write()
        line = str(caught.value)
        assert place in line and "needs 5.0 MB" in line and "free" in line and "\n" not in line
        assert contents(tmp_path) == before


def test_an_archive_that_torch_could_not_end_is_a_full_disk_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6976 vs 6868")

    def fail(path: Path) -> None:
        raise torn

    with pytest.raises(RuntimeError, match="inline_container"):
        write_whole_by(tmp_path / "a", fail)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Mock(free=4096))
    with pytest.raises(DiskFull, match=r"no room for .*a"):
        write_whole_by(tmp_path / "a", fail)


def test_room_is_looked_for_before_a_large_file_is_begun(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"needs 1000000\.0 GB"):
        write_whole_by(tmp_path / "a", tensors, 10**15)
    with pytest.raises(DiskFull, match=r"b \(it needs"):
        disk.reserve(tmp_path / "b", 1 << 62)
    disk.reserve(tmp_path / "c", 5000)
    assert (tmp_path / "c").stat().st_size == 5000
    assert (tmp_path / "c").stat().st_blocks * 512 >= 5000  # not sparse


def test_only_dead_writers_leftovers_are_swept_before_a_command(tmp_path: Path) -> None:
    """The next command's check takes away what a kill left, in the folder and beside it."""
    out = tmp_path / "out"
    out.mkdir()
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: child.pid)
        dead = [partial_path(out), partial_path(out / "new")]
    alive = [partial_path(out), partial_path(out / "new")]
    # Of another machine, of an older version, and a user's own.
    names = (f".new.{child.pid}-{'0' * 16}.partial", f".new.{child.pid}-0123abcd.partial")
    others = [out / name for name in (*names, f".new.{child.pid}.partial", ".notes.partial")]
    for path in (*dead, *alive, *others):
        path.mkdir()
        (path / "half").write_text("half")
    check_folder(out)
    left = {path for path in (*tmp_path.glob(".*"), *out.glob(".*"))}
    assert left == {*alive, *others}


def test_a_first_write_sweeps_its_folder(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    for write in (
        write_whole,
        lambda path, text: write_whole_by(path, lambda to: to.write_text(text)),
    ):
        folder = tmp_path / write.__name__
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: child.pid)
            dead = partial_path(folder / "other")
        alive = partial_path(folder / "other")
        for path in (dead, alive):
            path.write_text("half")
        write(folder / "a", "whole")
        assert sorted(folder.iterdir()) == sorted([alive, folder / "a"])


def test_a_record_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text('{"files": {"t": ["a"]}}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("mine")
    (tmp_path / "out" / RECORD).symlink_to(tmp_path / "theirs.json")
    with pytest.raises(ValueError, match="is a link"):
        replace_files(tmp_path / "out", "t", lambda folder: (folder / "a").write_text("new"))
    assert (tmp_path / "out" / "a").read_text() == "mine"


def test_views_in_files_need_room_first_and_only_they_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids, labels = separable(2)
    source = TensorGrids([grids], labels)
    settings = CacheSettings(0, torch.float16, 0.0, 2, tmp_path / "cache", {"layer": "mix"})

    def full(handle: int, start: int, size: int) -> None:
        assert size == grids.numel() * 2
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFull, match=r"no room for .*-v0\.bin\..*\.partial \(it needs"):
            list(fill_cache(source, settings))
    kept = list(fill_cache(source, settings))[-1].grids
    assert kept is not None and torch.equal(kept.grids(range(6), 0), grids.half())
    (tmp_path / "cache" / "mine.bin").write_text("mine")
    drop_cache(tmp_path / "cache")
    assert contents(tmp_path / "cache") == {"mine.bin": b"mine"}
    (tmp_path / "cache" / "mine.bin").unlink()
    drop_cache(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *arguments: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "open", refused)
    for check in (
        lambda: files.check_folder(tmp_path / "a" / "b"),
        lambda: check_file(tmp_path / "a" / "b", has_keys("x"), "ours"),
        lambda: Run.open(tmp_path / "run", "t", "a: 1\n"),
    ):
        with pytest.raises(ValueError, match=r"can't be written: Read-only file system"):
            check()
    assert not list(tmp_path.iterdir())
