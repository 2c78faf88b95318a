"""Training commands stopped before each of their file operations: --resume gives the same files."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from diffc_helpers import separable
from files_helpers import bury, bury_partials, killed_at, results
from PIL import Image
from sae_helpers import planted, random_model

from revelio.activations.store import write_store
from revelio.cli import main


def every_kill(
    whole: Path,
    out: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    again: str = "",
    step: int = 1,
) -> int:
    """Kill the command before file operation 1, 1 + step, ... and repeat it; gives how many there were."""
    main([*words, "--out", str(whole)])
    expected = results(whole)
    for number in range(1, 1000, step):
        here = out / str(number)

        def command(here: Path = here) -> None:
            main([*words, "--out", str(here), *again.split()])

        killed = killed_at(number, command, monkeypatch)
        if not killed:
            return number - 1
        bury(here / ".lock")
        bury_partials(here)
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
    monkeypatch.setattr("revelio.sae.cost.measured_speed", lambda job, kernel: None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def ksae_words(root: Path) -> list[str]:
    rows, _ = planted(20, 4, 6, 2, noise=0.1)
    write_store(root / "store", rows, [str(i) for i in range(20)])
    words = ["train-ksae", "--store", str(root / "store"), "--kernel", "torch", "--steps", "3"]
    words += ["--k", "2", "--expansion", "2", "--batch-size", "10"]
    return [*words, "--checkpoint-every", "1", "--log-every", "1"]


def diffc_words(root: Path) -> list[str]:
    grids, labels = separable(3)
    settings = {"pool": "none", "layer": "mix", "classes": ["a", "b", "c"]}
    for name in ("train", "test"):
        write_store(root / name, grids, [str(i) for i in range(9)], labels, settings=settings)
    words = ["train-diffc", "--store", str(root / "train")]
    words += ["--test-store", str(root / "test"), "--epochs", "1", "--width", "2"]
    return [*words, "--batch-size", "9"]


def top_words(root: Path) -> list[str]:
    rows, _ = planted(20, 6, 6, 2, noise=0.1)
    write_store(root / "store", rows, [str(i) for i in range(20)])
    random_model(d=6).save_pretrained(root / "ksae")
    return ["top-images", "--store", str(root / "store"), "--ksae", str(root / "ksae")]


def gallery_words(root: Path) -> list[str]:
    top_words(root)
    (root / "pictures").mkdir()
    names = [f"{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4), (9 * number, 0, 0)).save(root / "pictures" / name)
    write_store(root / "shown", planted(3, 6, 6, 2, noise=0.1)[0], names)
    words = ["gallery", "--store", str(root / "shown"), "--ksae", str(root / "ksae"), "--m", "2"]
    return [
        *words,
        "--data.source",
        str(root / "pictures"),
        "--map-method",
        "pca",
        "--latents",
        "3",
    ]


@pytest.mark.parametrize("command", [ksae_words, diffc_words], ids=["train-ksae", "train-diffc"])
def test_every_kill_is_resumed_to_the_same(
    tmp_path: Path,
    command: Callable[[Path], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
) -> None:
    words = command(tmp_path)
    assert every_kill(tmp_path / "whole", tmp_path / "cut", words, monkeypatch, "--resume") > 40


@pytest.mark.parametrize("command", [top_words, gallery_words], ids=["top-images", "gallery"])
def test_every_kill_of_what_is_written_at_once_is_repeated_to_the_same(
    tmp_path: Path,
    command: Callable[[Path], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
) -> None:
    words = command(tmp_path)
    # A gallery has many files of a kind, of which every third operation is enough.
    step = 3 if command is gallery_words else 1
    assert every_kill(tmp_path / "whole", tmp_path / "cut", words, monkeypatch, step=step) > 10


@pytest.mark.parametrize("command", ["train-ksae", "train-diffc", "top-images"])
def test_a_disk_that_fills_up_is_one_line_and_resumed_to_the_same(
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"train-ksae": ksae_words, "train-diffc": diffc_words, "top-images": top_words}
    words = words[command](tmp_path)
    more = [] if command == "top-images" else ["--resume"]
    main([*words, "--out", str(tmp_path / "whole")])
    expected = results(tmp_path / "whole")
    full = 0
    for number in range(1, 400, 7):
        out = tmp_path / str(number)
        done = 0

        def flush(handle: int, number: int = number) -> None:
            nonlocal done
            done += 1
            if done >= number:
                raise OSError(errno.ENOSPC, "No space left on device")

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", flush)
            try:
                main([*words, "--out", str(out), *more])
            except SystemExit as stopped:
                assert stopped.code == 2
        if done < number:
            break
        full += 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"revelio: the disk is full: no room for {tmp_path}"), line
        assert "free); make room" in line
        main([*words, "--out", str(out), *more])
        assert results(out) == expected, number
    assert full >= (1 if command == "top-images" else 5)
