"""Locks of run folders: one process at a time, and a dead one is not waited for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from files_helpers import contents

from revelio import lock
from revelio.process import start_of
from revelio.run_dir import Run


def owner(**changes: object) -> dict:
    return {**lock._self(), **changes}


def other_process() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_a_live_holder_is_named_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "run"
    Run.open(path, "t", "a: 1\n").close()
    other = other_process()
    try:
        held = owner(pid=other.pid, started=start_of(other.pid))
        (path / ".lock").write_text(json.dumps(held))
        before = contents(path)
        with pytest.raises(ValueError, match=rf"in use by process {other.pid} on ") as caught:
            Run.open(path, "t", "a: 1\n", resume=True)
        assert "\n" not in str(caught.value)
        assert contents(path) == before
    finally:
        other.communicate(b"\n")
    run = Run.open(path, "t", "a: 1\n", resume=True)
    assert json.loads((path / ".lock").read_text())["pid"] == os.getpid()
    run.finish()
    assert not (path / ".lock").exists()


@pytest.mark.parametrize("pid", [1, 2**22 + 5, -1, "x", None, True, 1.5])
def test_a_reused_or_impossible_id_is_taken_over(tmp_path: Path, pid: object) -> None:
    (tmp_path / ".lock").write_text(json.dumps(owner(pid=pid, started=12345678901)))
    taken = lock.take_lock(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["token"] == taken.owner["token"]
    taken.release()


def test_of_another_machine_signs_of_life_count(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps(owner(machine="node7 boot", host="node7", pid=31)))
    with pytest.raises(ValueError, match="in use by process 31 on node7, last sign of life"):
        lock.take_lock(tmp_path)
    old = path.stat().st_mtime - lock.STALE - 5
    os.utime(path, (old, old))
    taken = lock.take_lock(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    taken.release()
    assert not list(tmp_path.iterdir())


def test_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[Path] = []

    class Twice:
        def wait(self, seconds: float) -> bool:
            assert seconds < lock.STALE / 5
            return len(beats) == 2

    def touch(path: Path) -> None:
        beats.append(path)

    monkeypatch.setattr(os, "utime", touch)
    taken = lock.take_lock(tmp_path)
    lock._beat(taken.path, taken.owner, Twice())  # pyright: ignore[reportArgumentType]
    assert beats == [tmp_path / ".lock"] * 2
    taken.release()


def test_no_signs_of_life_for_another_ones_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = iter([False, True])

    class Once:
        def wait(self, seconds: float) -> bool:
            return next(waits)

    path = tmp_path / ".lock"
    path.write_text(json.dumps(owner(machine="node7 boot")))
    monkeypatch.setattr(os, "utime", lambda path: pytest.fail("touched"))
    lock._beat(path, owner(), Once())  # pyright: ignore[reportArgumentType]


def test_a_lock_that_was_taken_over_meanwhile_is_never_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process and a second saw the same dead lock, the second was faster; a third waits for a gap."""
    path, refused = tmp_path / ".lock", []
    path.write_text(json.dumps(owner(pid=2**22 + 9)))
    own, check, rename = lock._self, lock._check_dead, os.rename

    def take_as(pid: int) -> dict:
        monkeypatch.setattr(lock, "_self", lambda: own() | {"pid": pid, "started": start_of(pid)})
        try:
            return lock.take_lock(tmp_path).owner
        finally:
            monkeypatch.setattr(lock, "_self", own)

    def look(at: Path, found: dict) -> None:
        check(at, found)
        monkeypatch.setattr(lock, "_check_dead", check)
        second.update(take_as(os.getppid()))

    def move(source: Path, target: Path) -> None:
        rename(source, target)
        if source == path:
            monkeypatch.setattr(os, "rename", rename)
            refused.append(take_as(1))

    second: dict = {}
    monkeypatch.setattr(lock, "_check_dead", look)
    monkeypatch.setattr(os, "rename", move)
    with pytest.raises(ValueError, match=f"in use by process {os.getppid()} on "):
        lock.take_lock(tmp_path)
    assert json.loads(path.read_text()) == second and not refused


def test_a_users_file_called_lock_stays(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("the key is under the mat")
    with pytest.raises(ValueError, match=r"\.lock is not Revelio's"):
        lock.take_lock(tmp_path)
    assert (tmp_path / ".lock").read_text() == "the key is under the mat"


def test_only_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    """Eight processes that start together beside a dead process's lock."""
    (tmp_path / ".lock").write_text(json.dumps(owner(pid=2**22 + 9)))
    script = (
        "import sys; from pathlib import Path; from revelio.lock import take_lock\n"
        "input()\n"
        "try: held = take_lock(Path(sys.argv[1])); print('held', flush=True); input()\n"
        "except ValueError as error: print(error, flush=True)\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(words, **pipes) for _ in range(8)]  # type: ignore[call-overload]
    for process in started:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
    lines = [process.stdout.readline().strip() for process in started if process.stdout]
    for process in started:
        process.communicate("\n")
    assert lines.count("held") == 1, lines
    assert all(line == "held" or "in use by process" in line for line in lines), lines


# --- what a kill, a power cut or another program leaves
