"""Run directories: what was asked, what came out, and how to go on after a stop.

    config.yaml   manifest.json   metrics.jsonl   checkpoints/step_00000100/   final/   report.json

Every file is written whole or not at all (:mod:`revelio.files`), by one process at a time
(:mod:`revelio.lock`). A run is finished when its manifest says so, which is written after everything else;
`resume` goes on from whatever a kill, a power cut or a full disk has left.
"""

import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from revelio.files import (
    check_folder,
    full_disk_named,
    is_partial,
    make_folder,
    remove_files,
    sweep,
    write_folder,
    write_whole,
    write_whole_by,
)
from revelio.lock import NAME as LOCK
from revelio.lock import Lock, take_lock
from revelio.run_settings import difference
from revelio.trust import printable, read_json, read_json_lines, read_object, read_text
from revelio.version import __version__

__all__ = [
    "Run", "read_json", "sha256", "versions", "write_folder", "write_json", "write_whole", "write_whole_by",
]  # fmt: skip

# Turns the text of an older config into this version's.
Complete = Callable[[str], str]

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity, which JSON lacks, are an error."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    # Not by the name of a distribution: an installed `revelio` may be another project.
    found = {"python": platform.python_version(), "revelio": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# What a run writes: in a folder that holds no run, none of these may be there already.
NAMES = ("config.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "final", "report.json")
NAMES += (
    "report.html",
    "confusion.png",
    "seeds",
    "cache",
    "stages",
    "activations",
    "ksae",
    "grids",
)
NAMES += ("gallery", "tokens.safetensors", "pictures.json", "weights.json")
KEEP = 2  # checkpoints
_STEP = re.compile(r"step_(\d{8,})")
# The files of a checkpoint.
_SAVED = re.compile(r"[\w.-]+\.safetensors|state\.json|training\.json")


class Run:
    """A run directory. Make one with :meth:`open`."""

    def __init__(self, path: Path, manifest: dict[str, Any], lock: Lock | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock
        self._started = time.monotonic()
        self._before = float(manifest.get("seconds", 0.0))

    @classmethod
    def open(
        cls,
        path: Path,
        command: str,
        config_yaml: str,
        *,
        resume: bool = False,
        results: Sequence[str] = (),
        writes: bool = True,
        complete: Complete = str,
    ) -> "Run":
        """Create the run directory, or go on with the one that is there.

        Args:
            path: the directory.
            command: whose run it is.
            config_yaml: its settings.
            resume: whether to go on with a run that is there.
            results: what a finished run has, and is not locked for; it is unfinished again where one of
                these is missing, and none may be there before it begins.
            writes: False for further processes of a run that another has opened: they only read.
            complete: gives the settings of an older version's run as this version writes them
                (:func:`revelio.config.completed`); by default they are taken as they stand.

        Raises:
            ValueError: there is a run already and ``resume`` is off, it is another command's or its config
                differs, another process is at work in it, or something else takes a name of a run's.
        """
        manifest_path = path / "manifest.json"
        if manifest_path.exists() and not resume:
            raise ValueError(
                f"{path} already holds a run: continue it with resume, or choose another folder"
            )
        if manifest_path.exists():
            manifest = _read_manifest(manifest_path, command)
            whole = all((path / name).exists() for name in results)
            done = bool(results) and whole and manifest["status"] == "finished"
            if done or not writes:
                _check_config(path, config_yaml, complete)
                if writes and (path / LOCK).exists():
                    take_lock(path).release()  # a killed process's
                return cls(path, manifest)
        else:
            _check_beginning(path, config_yaml, resume, complete, {*NAMES, *results})
        make_folder(path)
        lock = take_lock(path)
        for name in ("", "checkpoints", "final", "gallery", "ksae", "seeds", "stages"):
            sweep(path / name)
        # Looked at again: until now another process may have written it.
        manifest = _settle(path, command, config_yaml, complete, results)
        run = cls(path, manifest, lock)
        run.truncate_metrics(math.inf)
        run._write_manifest()
        return run

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line, in the order logged."""
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return self.manifest.get("status") == "finished"

    @property
    def seconds(self) -> float:
        """Wall time so far, of all processes that worked on it."""
        return round(self._before + time.monotonic() - self._started, 3)

    def log(self, **metrics: Any) -> None:
        """Append one line to ``metrics.jsonl``.

        Raises:
            DiskFull: there is no room.
        """
        # JSON has no word for NaN and infinity.
        plain = {name: None if _not_finite(value) else value for name, value in metrics.items()}
        line = json.dumps(plain) + "\n"
        with (
            full_disk_named(self.metrics_path, len(line)),
            self.metrics_path.open("a", encoding="utf-8") as file,
        ):
            file.write(line)

    def truncate_metrics(self, step: float) -> None:
        """Drop logged lines after ``step``, which a resumed run logs again, and a last line that was cut.

        Raises:
            ValueError: another line can't be read; the message names file and line.
        """
        if not self.metrics_path.exists():
            return
        lines = read_json_lines(self.metrics_path, torn=True)
        kept = [line for line in lines if line.get("step", 0) <= step]
        write_whole(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))

    def add_input(self, name: str, value: Any) -> None:
        """Record an input (a path with its hash, a model with its revision) in the manifest.

        Of a finished run it is only compared.

        Raises:
            ValueError: a resumed run started with another one.
        """
        was = self.manifest.setdefault("inputs", {}).get(name)
        if isinstance(was, dict) and isinstance(value, dict):
            for key in (was.keys() & value.keys()) - {"made_with"}:
                if was[key] != value[key]:
                    raise ValueError(
                        f"{self.path} was started with another {name} (`{key}` was {was[key]!r}, now it is "
                        f"{value[key]!r}): put back what was there, or start another run"
                    )
        if not self.finished:
            self.manifest["inputs"][name] = value
            self._write_manifest()

    def save_checkpoint(
        self,
        step: int,
        write: Callable[[Path], Any],
        *,
        keep: int = KEEP,
        needed: int | None = None,
    ) -> Path:
        """Let ``write`` fill a folder, which becomes ``checkpoints/step_…``; keep the last few.

        Args:
            step: after which.
            write: gets an empty folder.
            keep: how many checkpoints stay.
            needed: bytes that it takes, where that is known.

        Raises:
            DiskFull: there is no room.
        """
        # A checkpoint must not outlive the lines logged before it.
        self._sync_metrics()
        path = self.path / "checkpoints" / f"step_{step:08d}"
        write_folder(path, write, needed=needed)
        self.drop_checkpoints(keep=keep)
        return path

    def drop_checkpoints(self, *, keep: int) -> None:
        """Remove the files of all checkpoints but the last ``keep``; what else is there stays."""
        found = self._checkpoints()
        for folder in found[: len(found) - keep]:
            remove_files(folder, _SAVED.fullmatch)
        if not keep:
            remove_files(self.path / "checkpoints", lambda name: False)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The last whole checkpoint, with its step."""
        found = self._checkpoints()
        return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else None

    def finish(self, **entries: Any) -> None:
        """Mark the run as finished, with its wall time and any further entries; the last thing it writes."""
        self._sync_metrics()
        self.manifest.update(entries)
        self.manifest.update(status="finished", ended=_now())
        self._write_manifest()
        self.close()

    def close(self) -> None:
        """Let other processes work in the folder."""
        if self._lock is not None:
            self._lock.release()

    def _sync_metrics(self) -> None:
        if self.metrics_path.exists():
            with full_disk_named(self.metrics_path), self.metrics_path.open("rb") as file:
                os.fsync(file.fileno())

    def _checkpoints(self) -> list[Path]:
        """The checkpoints that hold files, by step."""
        found = (path for path in (self.path / "checkpoints").glob("step_*") if path.is_dir())
        whole = [p for p in found if _STEP.fullmatch(p.name) and any(_saved(p))]
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))

    def _write_manifest(self) -> None:
        self.manifest["seconds"] = self.seconds
        write_json(self.path / "manifest.json", self.manifest)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _saved(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _SAVED.fullmatch(path.name)]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _new_manifest(command: str) -> dict[str, Any]:
    began = {"command": command, "status": "running", "started": _now()}
    return began | {"versions": versions(), "inputs": {}}


def _read_manifest(path: Path, command: str) -> dict[str, Any]:
    manifest = read_object(path)
    if "command" not in manifest or not isinstance(manifest.get("status"), str):
        raise ValueError(f"{printable(path)} is no run's manifest: choose another folder")
    if manifest["command"] != command:
        raise ValueError(
            f"{path.parent} holds a run of {printable(manifest['command'])}, not of {command}: "
            "choose another folder"
        )
    for name, kinds in (("seconds", (int, float)), ("inputs", (dict,))):
        if name in manifest and type(manifest[name]) not in kinds:
            raise ValueError(f"{printable(path)} has {name} {printable(manifest[name])}")
    return manifest


def _settle(
    path: Path, command: str, config_yaml: str, complete: Complete, results: Sequence[str]
) -> dict[str, Any]:
    """The manifest of the run that is there, unfinished where a result is missing; or of one begun now."""
    if not (path / "manifest.json").exists():
        write_whole(path / "config.yaml", config_yaml)
        return _new_manifest(command)
    _check_config(path, config_yaml, complete)
    manifest = _read_manifest(path / "manifest.json", command)
    if not all((path / name).exists() for name in results):
        manifest["status"] = "running"
    return manifest


def _check_beginning(
    path: Path, config_yaml: str, resume: bool, complete: Complete, names: set[str]
) -> None:
    """See whether a run may begin in ``path``: where it is empty, began here, or is full of other names.

    Raises:
        ValueError: it may not.
    """
    check_folder(path)
    entries = path.iterdir() if path.is_dir() else ()
    inside = {entry.name for entry in entries if not is_partial(entry.name)}
    taken = sorted(inside & names)
    began = taken == ["config.yaml"] and _is_begun(path / "config.yaml", config_yaml, complete)
    if taken and not began:
        raise ValueError(
            f"{path} holds {taken[0]}, which is of no run of this command: choose another folder"
        )
    if resume and inside and not began and LOCK not in inside:
        raise ValueError(f"{path} holds files but no run to resume: choose another folder")


def _is_begun(path: Path, config_yaml: str, complete: Complete) -> bool:
    """Whether a run with these settings was stopped right after writing them down."""
    try:
        old = read_text(path)
        if old.strip("\0 \n"):
            _check_same_config(old, config_yaml, path.parent, complete)
    except ValueError:
        return False
    return True


def _check_config(path: Path, config_yaml: str, complete: Complete) -> None:
    _check_same_config(read_text(path / "config.yaml"), config_yaml, path, complete)


def _check_same_config(old: str, new: str, path: Path, complete: Complete) -> None:
    # A setting that the run's version did not know had the value that is the default now.
    with suppress(ValueError):
        old = complete(old)
    if (said := difference(old, new)) is not None:
        raise ValueError(
            f"{path} was started with {said}: resume with the same settings or choose another folder"
        )
