"""Training commands stopped before each of their file operations: --resume gives the same files."""

import os
from pathlib import Path

import pytest
from diffc_helpers import separable
from files_helpers import bury, killed_at, results
from sae_helpers import planted

from revelio.activations.store import write_store
from revelio.cli import main


def every_kill(whole: Path, out: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Kill the command before file operation 1, 2, ... and resume it; gives how many there were."""
    main([*words, "--out", str(whole)])
    expected = results(whole)
    for number in range(1, 1000):
        here = out / str(number)

        def command(here: Path = here) -> None:
            main([*words, "--out", str(here), "--resume"])

        killed = killed_at(number, command, monkeypatch)
        if not killed:
            return number - 1
        bury(here / ".lock")
        # Half a line, as a power cut leaves it before the report is flushed.
        running = (here / "metrics.jsonl").exists() and not (here / "report.json").exists()
        if running and number % 2:
            with (here / "metrics.jsonl").open("ab") as file:
                file.write(b'{"step": 7, "lo' if number % 4 == 1 else b"\0" * 20)
        command()
        assert results(here) == expected, number
    raise AssertionError("it does not end")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second is measured for the plan; nothing is flushed, which no kill can see."""
    monkeypatch.setattr("revelio.sae.plan.measured_speed", lambda job, kernel: None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_train_ksae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    rows, _ = planted(20, 4, 6, 2, noise=0.1)
    write_store(tmp_path / "store", rows, [str(i) for i in range(20)])
    words = ["train-ksae", "--store", str(tmp_path / "store"), "--kernel", "torch", "--steps", "3"]
    words += ["--k", "2", "--expansion", "2", "--batch-size", "10"]
    words += ["--checkpoint-every", "1", "--log-every", "1"]
    points = every_kill(tmp_path / "whole", tmp_path / "cut", words, monkeypatch)
    assert points > 40


def test_train_diffc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    grids, labels = separable(3)
    settings = {"pool": "none", "layer": "mix", "classes": ["a", "b", "c"]}
    for name in ("train", "test"):
        write_store(tmp_path / name, grids, [str(i) for i in range(9)], labels, settings=settings)
    words = ["train-diffc", "--stores", str(tmp_path / "train")]
    words += ["--test-store", str(tmp_path / "test"), "--epochs", "1", "--width", "2"]
    points = every_kill(
        tmp_path / "whole", tmp_path / "cut", [*words, "--batch-size", "9"], monkeypatch
    )
    assert points > 40
