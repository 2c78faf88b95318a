"""The proof as a job: data, cache, two stages a row, scores, report; each step is skipped where it is done.

Every step is a command that a user could type; this module only types them, two rows at a time with one
thread each, which on two cores is twice as fast as one row with two threads.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.data.open import open_dataset
from revelio.run_dir import read_json, write_json
from tools.llava_proof.questions import (
    Photos,
    blind_images,
    captions,
    choose_photos,
    held_out_questions,
    instructions,
    record,
)

# Twelve of the classes with most photographs: what two cores can teach in an hour.
CLASSES = (
    *("airplanes", "Motorbikes", "watch", "Leopards", "bonsai", "car_side", "ketch"),
    *("chandelier", "grand_piano", "butterfly", "helicopter", "starfish"),
)
ROWS = ("clip", "clip-dinov2", "clip-sd-t25", "clip-sd-t200")
KEPT = 8
BENCH_TOKENS = 64
AT_ONCE = 2


@dataclass(frozen=True)
class Settings:
    """How large the proof is; the defaults take about an hour and a half on two cores."""

    caltech101: Path
    """The folder with `images/`, `train.txt` and `test.txt`."""

    out: Path = Path("runs/llava-mini")
    """Where data, cache and runs are kept; a second call goes on there."""

    docs: Path = Path("docs")
    """Where llava_mini.json and llava_mini.md go."""

    bench: Path | None = None
    """A folder of LLaVA-Bench (in the wild); every row then answers its questions, too."""

    rows: tuple[str, ...] = ROWS
    """Which of the rows."""

    growth: str = "clip-dinov2"
    """The row whose accuracy is followed over the samples of stage 2; empty for none."""

    train_images: int = 36
    """Photographs a class to train on."""

    test_images: int = 10
    """Held-out photographs a class."""

    captions: int = 1
    """Captions a photograph, for stage 1."""

    questions: int = 2
    """Questions a photograph, for stage 2."""


@dataclass(frozen=True)
class Places:
    """The files of a proof."""

    settings: Settings
    repository: Path

    @property
    def images(self) -> Path:
        """The folder that records name files of."""
        return self.settings.caltech101 / "images"

    @property
    def cache(self) -> Path:
        """The towers' grids of all photographs."""
        return self.settings.out / "cache"

    def data(self, name: str) -> Path:
        """A file of records."""
        return self.settings.out / "data" / f"{name}.json"

    def config(self, row: str) -> Path:
        """A row's YAML."""
        return self.repository / "configs" / "llava" / "mini" / f"{row}.yaml"

    def run(self, row: str, stage: str) -> Path:
        """A run directory."""
        return self.settings.out / row / stage

    def bench_answers(self, row: str) -> Path:
        """A row's answers to LLaVA-Bench, which `eval/llava_bench.py judge` takes."""
        return self.settings.out / row / "bench-answers.jsonl"


def photos(settings: Settings, split: str, per_class: int) -> Photos:
    """Photographs of one split."""
    dataset = open_dataset("caltech101", split=split, root=settings.caltech101)
    return choose_photos(dataset, CLASSES, per_class)


def write_data(places: Places) -> None:
    """Records for both stages, for the held-out questions, and for those asked blind."""
    settings = places.settings
    train = photos(settings, "train", settings.train_images)
    test = photos(settings, "test", settings.test_images)
    asked, shown = held_out_questions(test), blind_images(test)
    files: dict[str, Any] = {
        "pretrain": captions(train, settings.captions),
        "finetune": instructions(train, settings.questions),
        "held-out": [record(question) for question in asked],
        "blind": [record(question, shown[question.image]) for question in asked],
        "images": captions(train, 1) + captions(test, 1),
    }
    for name, records in files.items():
        if places.data(name).is_file() and read_json(places.data(name)) != records:
            raise ValueError(
                f"{places.data(name)} was made with other settings: give another --out"
            )
        write_json(places.data(name), records)


def command(places: Places, script: str, row: str, *more: str | Path) -> list[str]:
    """A script's command line for a row."""
    script_path = places.repository / "scripts" / f"{script}.py"
    shared = ["--config", places.config(row), "--data.images", places.images]
    return [sys.executable, *map(str, [script_path, *shared, "--cache", places.cache, *more])]


def call(words: Sequence[str], log: Path) -> None:
    """Run a command with one thread, its output in a file.

    Raises:
        ValueError: it failed; with its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as stream:
        done = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{' '.join(words[1:3])} failed: {last}; see {log}")


def train_stage(
    places: Places, row: str, script: str, name: str, data: str, *more: str | Path
) -> None:
    """One run of one stage, unless it is finished."""
    run = places.run(row, name)
    if (run / "final" / "config.json").is_file():
        return
    resume = ["--resume"] if run.is_dir() else []
    words = command(
        places, script, row, "--data.json", places.data(data), "--out", run, *more, *resume
    )
    call(words, run.with_suffix(".log"))


def train_row(places: Places, row: str) -> None:
    """Both stages of a row; one row keeps the checkpoints that show how its accuracy grows."""
    train_stage(places, row, "pretrain", "pretrain", "pretrain")
    more: list[str | Path] = ["--pretrained", places.run(row, "pretrain")]
    if row == places.settings.growth:
        more += ["--stage.keep", str(KEPT)]
    train_stage(places, row, "finetune", "finetune", "finetune", *more)


def answer_bench(places: Places, row: str, bench: Path) -> None:
    """A trained row's answers to all questions of LLaVA-Bench; an unfinished file is gone on with."""
    script = places.repository / "eval" / "llava_bench.py"
    words: list[str | Path] = [sys.executable, script, "answer", "--bench", bench]
    words += ["--model", places.run(row, "finetune") / "final", "--model-id", f"mini-{row}"]
    words += ["--out", places.bench_answers(row), "--max-new-tokens", str(BENCH_TOKENS)]
    call([str(word) for word in words], places.settings.out / row / "bench.log")


def prove(places: Places) -> None:
    """Everything up to the trained models and their answers; scores and report come after.

    Raises:
        ValueError: an unknown row, data of other settings, or a command that failed.
    """
    unknown = [row for row in places.settings.rows if row not in ROWS]
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    write_data(places)
    for row in places.settings.rows:
        words = command(places, "cache_towers", row, "--data.json", places.data("images"))
        call(words, places.settings.out / row / "cache.log")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda row: train_row(places, row), places.settings.rows))
        if bench := places.settings.bench:
            list(pool.map(lambda row: answer_bench(places, row, bench), places.settings.rows))
