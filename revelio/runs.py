"""Run directories: what was asked, what came out, and how to go on after a stop.

    config.yaml   manifest.json   metrics.jsonl   checkpoints/step_00000100/   final/   report.json

Every file is written whole under a temporary name and then renamed, or not at all.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from revelio import __version__

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees all of it or none of it."""
    data = content.encode() if isinstance(content, str) else content
    write_whole_by(path, lambda temporary: temporary.write_bytes(data))


def write_whole_by(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file or folder under a temporary name, then move it to ``path``.

    A folder already at ``path`` is replaced. Nothing is left behind when ``write`` fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity, which JSON lacks, are an error."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not there or is no JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no file at {path}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


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


class Run:
    """A run directory. Make one with :meth:`open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._started = time.monotonic()
        self._before = float(manifest.get("seconds", 0.0))

    @classmethod
    def open(cls, path: Path, command: str, config_yaml: str, *, resume: bool = False) -> "Run":
        """Create the run directory, or go on with the one that is there.

        Raises:
            ValueError: there is a run already and ``resume`` is off, or its config differs.
        """
        manifest_path = path / "manifest.json"
        if manifest_path.exists() and not resume:
            raise ValueError(
                f"{path} already holds a run: continue it with --resume, or choose another --out"
            )
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: choose a folder with --out")
        if not manifest_path.exists():
            if resume and path.exists() and any(path.iterdir()):
                raise ValueError(f"{path} holds files but no run to resume: choose another --out")
            write_whole(path / "config.yaml", config_yaml)
            manifest = {"command": command, "status": "running", "started": _now()}
            run = cls(path, manifest | {"versions": versions(), "inputs": {}})
            run._write_manifest()
            return run
        manifest = read_json(manifest_path)
        _check_same_config((path / "config.yaml").read_text(encoding="utf-8"), config_yaml, path)
        return cls(path, manifest)

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line, in the order logged."""
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return self.manifest.get("status") == "finished"

    def log(self, **metrics: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drop logged lines after ``step``: a resumed run logs them again."""
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line and json.loads(line).get("step", 0) <= step]
        write_whole(self.metrics_path, "".join(line + "\n" for line in kept))

    def add_input(self, name: str, value: Any) -> None:
        """Record an input (a path with its hash, a model with its revision) in the manifest."""
        self.manifest.setdefault("inputs", {})[name] = value
        self._write_manifest()

    def save_checkpoint(self, step: int, write: Callable[[Path], Any], *, keep: int = 2) -> Path:
        """Let ``write`` fill a folder, which becomes ``checkpoints/step_…``; keep the last few."""
        path = self.path / "checkpoints" / f"step_{step:08d}"

        def fill(temporary: Path) -> None:
            temporary.mkdir()
            write(temporary)

        write_whole_by(path, fill)
        for old in self._checkpoints()[:-keep]:
            shutil.rmtree(old)
        return path

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """The last whole checkpoint, with its step."""
        found = self._checkpoints()
        return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else None

    def finish(self, **entries: Any) -> None:
        """Mark the run as finished, with its wall time and any further manifest entries."""
        self.manifest.update(entries)
        self.manifest.update(status="finished", ended=_now())
        self._write_manifest()

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step_*"))

    def _write_manifest(self) -> None:
        self.manifest["seconds"] = round(self._before + time.monotonic() - self._started, 3)
        write_json(self.path / "manifest.json", self.manifest)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_same_config(old: str, new: str, path: Path) -> None:
    # What only says how to run, not what to make, may change between a run and its continuation.
    free = ("resume:", "plan:", "device:", "workers:", "sharing:")
    before = [line for line in old.splitlines() if not line.strip().startswith(free)]
    after = [line for line in new.splitlines() if not line.strip().startswith(free)]
    for was, now in zip(before, after, strict=False):
        if was != now:
            raise ValueError(
                f"{path} was started with `{was.strip()}`, not `{now.strip()}`: "
                "resume with the same settings or choose another --out"
            )
    if len(before) != len(after):
        raise ValueError(f"{path} was started with other settings: choose another --out")
