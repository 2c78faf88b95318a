"""The proof as a job: data, cache, two stages a training, scores; each step is skipped where it is done.

Every step is a command that a user could type; this module only types them, several trainings at a time with
one thread each, which on few cores is faster than one training with all threads.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from revelio.bounds import LearningRate
from revelio.config import read_yaml
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

# Twenty of the classes with most photographs, as many of each.
CLASSES = (
    *("airplanes", "Motorbikes", "watch", "Leopards", "bonsai", "car_side", "ketch"),
    *("chandelier", "hawksbill", "grand_piano", "brain", "butterfly", "helicopter"),
    *("menorah", "trilobite", "sunflower", "starfish", "kangaroo", "ewer", "buddha"),
)
ROWS = ("clip", "clip-dinov2", "clip-sd-t25", "clip-sd-t200")
BENCH_TOKENS = 64


@dataclass(frozen=True)
class Settings:
    """How large the proof is."""

    caltech101: Path
    """The folder with `images/`, `train.txt` and `test.txt`."""

    out: Path = Path("runs/llava-mini")
    """Where data, cache and runs are kept; a second call goes on there."""

    docs: Path = Path("docs")
    """Where llava_mini.json and llava_mini.md go."""

    bench: Path | None = None
    """A folder of LLaVA-Bench (in the wild); the best row then answers its questions, too."""

    rows: tuple[str, ...] = ROWS
    """Which of the rows."""

    seeds: int = 3
    """Trainings a row; all rows are trained once before any is trained again."""

    train_images: int = 57
    """Photographs a class to train on: all that the train split has of the rarest class."""

    test_images: int = 28
    """Held-out photographs a class."""

    captions: int = 2
    """Captions a photograph, for stage 1."""

    questions: int = 3
    """Questions a photograph in stage 2's conversations, of 3 kinds; the open one is always asked."""

    search: bool = False
    """Instead of the proof: try pairs of learning rates on three quarters of the training photographs, ask
    about the others, and write what each pair answers (`llava_rates.json` in `docs`)."""

    pretrain_rates: tuple[LearningRate, ...] = (1e-3, 3e-3, 1e-2)
    """Stage 1's learning rates that `search` tries."""

    finetune_rates: tuple[LearningRate, ...] = (3e-4, 1e-3, 3e-3)
    """Stage 2's, each after each of stage 1's."""

    at_once: int = 2
    """Trainings at the same time, one thread each."""

    quick: bool = False
    """Half the photographs, a caption and two questions of each, one training a row: a quarter of it all."""

    def sized(self) -> "Settings":
        """These settings, or with ``quick`` the smaller ones."""
        if not self.quick:
            return self
        fewer = {"train_images": 28, "test_images": 10, "captions": 1, "questions": 2}
        return replace(self, seeds=1, out=self.out / "quick", **fewer)


@dataclass(frozen=True)
class Training:
    """One of a row's trainings.

    Attributes:
        row: which towers.
        seed: of projectors, adapter and order.
        rates: stage 1's and stage 2's learning rates; none: the row's own.
    """

    row: str
    seed: int
    rates: tuple[float, float] | None = None

    def folder(self, stage: str) -> str:
        """A stage's run: pairs with one rate of stage 1 share that stage."""
        if self.rates is None:
            return stage
        return "-".join([stage, *(f"{rate:g}" for rate in self.rates[: 1 + (stage != "pretrain")])])


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

    def run(self, training: Training, stage: str) -> Path:
        """A run directory."""
        return self.settings.out / training.row / f"seed-{training.seed}" / training.folder(stage)

    def rates(self, row: str) -> tuple[float, float]:
        """Stage 1's and stage 2's learning rates in a row's YAML."""
        values = read_yaml(self.config(row))
        first, second = (
            values[stage]["stage"]["learning_rate"] for stage in ("pretrain", "finetune")
        )
        return first, second

    @property
    def trainings(self) -> list[Training]:
        """All trainings, in the order in which they are begun."""
        rows, seeds = self.settings.rows, range(self.settings.seeds)
        return [Training(row, seed) for seed in seeds for row in rows]

    def bench_answers(self, row: str) -> Path:
        """A row's answers to LLaVA-Bench, which `eval/llava_bench.py judge` takes."""
        return self.settings.out / row / "bench-answers.jsonl"


def photos(settings: Settings, split: str, per_class: int) -> Photos:
    """Photographs of one split."""
    dataset = open_dataset("caltech101", split=split, root=settings.caltech101)
    return choose_photos(dataset, CLASSES, per_class)


def write_data(places: Places, train: Photos, test: Photos) -> None:
    """Records for both stages, for the held-out questions, and for the open ones asked blind."""
    settings = places.settings
    asked, shown = held_out_questions(test), blind_images(test)
    files: dict[str, Any] = {
        "pretrain": captions(train, settings.captions),
        "finetune": instructions(train, settings.questions),
        "held-out": [record(question) for question in asked],
        "blind": [record(one, shown[one.image]) for one in asked if one.category == "open"],
        "images": captions(train, 1) + captions(test, 1),
    }
    for name, records in files.items():
        if places.data(name).is_file() and read_json(places.data(name)) != records:
            raise ValueError(
                f"{places.data(name)} was made with other settings: give another --out"
            )
        write_json(places.data(name), records)


def command(places: Places, name: str, row: str, *more: str | Path) -> list[str]:
    """The words of `revelio llava NAME` for a row."""
    words = ["-m", "revelio", "llava", name, "--config", places.config(row)]
    words += ["--data.images", places.images, "--cache", places.cache, *more]
    return [sys.executable, *map(str, words)]


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
        raise ValueError(f"{' '.join(words[1:5])} failed: {last}; see {log}")


def train_stage(places: Places, training: Training, stage: str, *more: str | Path) -> None:
    """One run of one stage, unless it is finished."""
    run = places.run(training, stage)
    if (run / "final" / "config.json").is_file():
        return
    given: list[str | Path] = ["--data.json", places.data(stage), "--out", run]
    given += ["--stage.seed", str(training.seed), *more, *(["--resume"] if run.is_dir() else [])]
    if training.rates is not None:
        given += ["--stage.learning-rate", str(training.rates[stage != "pretrain"])]
    call(command(places, stage, training.row, *given), run.with_name(f"{run.name}.log"))


def pretrain(places: Places, training: Training) -> None:
    """Stage 1 in LLaVA's way, where picture and caption alone are the text."""
    train_stage(places, training, "pretrain", "--model.template", "plain")


def finetune(places: Places, training: Training) -> None:
    """Stage 2, on stage 1's projectors."""
    train_stage(places, training, "finetune", "--pretrained", places.run(training, "pretrain"))


def train(places: Places, training: Training) -> None:
    """Both stages."""
    pretrain(places, training)
    finetune(places, training)


def see(places: Places, row: str) -> None:
    """The row's towers look at all photographs, once."""
    words = command(places, "cache", row, "--data.json", places.data("images"))
    call(words, places.settings.out / row / "cache.log")


def check_rows(settings: Settings) -> None:
    """Refuse a row that there isn't.

    Raises:
        ValueError: one is unknown.
    """
    unknown = [row for row in settings.rows if row not in ROWS]
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r}: choose from {', '.join(ROWS)}")


def answer_bench(places: Places, row: str, bench: Path) -> None:
    """A trained row's answers to all questions of LLaVA-Bench; an unfinished file is gone on with."""
    words: list[str | Path] = [sys.executable, "-m", "eval.llava_bench", "answer", "--bench", bench]
    words += ["--model", places.run(Training(row, 0), "finetune") / "final"]
    words += ["--model-id", f"mini-{row}", "--out", places.bench_answers(row)]
    words += ["--max-new-tokens", str(BENCH_TOKENS)]
    call([str(word) for word in words], places.settings.out / row / "bench.log")


def prove(places: Places) -> None:
    """Everything up to the trained models; scores and report come after.

    Raises:
        ValueError: an unknown row, data of other settings, or a command that failed.
    """
    settings = places.settings
    check_rows(settings)
    train_photos = photos(settings, "train", settings.train_images)
    write_data(places, train_photos, photos(settings, "test", settings.test_images))
    for row in settings.rows:
        see(places, row)
    with ThreadPoolExecutor(settings.at_once) as pool:
        list(pool.map(lambda training: train(places, training), places.trainings))
