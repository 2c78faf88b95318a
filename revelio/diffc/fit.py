"""From grids to a result: train over several seeds, test the last and the best epoch, sum up.

The best epoch is the one with the highest top-1 (among equals, the least loss) on a validation set cut
from train (10 % of every class, keyed by the seed); test images choose nothing. The released code has no
validation set and reports the last epoch (mode `as_code`); the paper doesn't say which it reports (mode
`as_paper` takes the last as well).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.diffc.measures import confusion, measure, over_seeds
from revelio.diffc.model import WIDTH, DiffC
from revelio.diffc.sources import GridSource, TensorGrids
from revelio.diffc.split import stratified_split
from revelio.diffc.train import (
    END_RATES,
    PERIODS,
    EpochEnd,
    Mode,
    StepState,
    Training,
    TrainSettings,
    predict,
    train,
)

VALIDATION = 0.1


@dataclass(frozen=True)
class FitSettings:
    """One experiment: what is trained how, and how often.

    Attributes:
        train: settings of a training; its seed is the first of the seeds.
        classes: class names by class id.
        width: of the classifier.
        dropout: of the classifier.
        validation: share of train held out; None is the mode's (0.1 in `fixed`, none in the others).
        seeds: how many trainings; seed, seed + 1, ... draw weights, order and validation set.
        device: where the classifier is.
        grids: how the grids were made, kept with the weights.
    """

    train: TrainSettings
    classes: tuple[str, ...]
    width: int = WIDTH
    dropout: float = 0.0
    validation: float | None = None
    seeds: int = 1
    device: str = "cpu"
    grids: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> float:
        """The share of train that validation gets."""
        if self.validation is not None:
            return self.validation
        return VALIDATION if self.train.mode == "fixed" else 0.0

    def __post_init__(self) -> None:
        """Refuse what can't be done.

        Raises:
            ValueError: no training at all, or a share that is none.
        """
        if self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds}: give at least 1")
        if self.validation is not None and not 0 <= self.validation < 1:
            raise ValueError(f"--validation is {self.validation}: give a share from 0 up to 1")

    def seed_list(self) -> list[int]:
        """The seed of each training."""
        return [self.train.seed + number for number in range(self.seeds)]

    def split(self, source: GridSource, seed: int) -> tuple[list[int], list[int]]:
        """A seed's training and validation images."""
        return stratified_split(source.labels, self.held_out, seed, "diffc validation")

    def trained_on(self, source: GridSource) -> int:
        """How many images are left to train on, which is the same for all seeds."""
        return len(self.split(source, self.train.seed)[0])

    def plain(self) -> dict[str, Any]:
        """The settings as they took effect, for reports."""
        train = asdict(self.train) | {
            "end_rate": END_RATES[self.train.mode]
            if self.train.end_rate is None
            else self.train.end_rate,
            "period": self.train.period or PERIODS[self.train.mode] or self.train.epochs,
        }
        own = {"width": self.width, "dropout": self.dropout, "validation": self.held_out}
        return train | own | {"seeds": self.seeds}


@dataclass
class SeedRun:
    """One seed's training, its images, and its steps."""

    seed: int
    training: Training
    train: list[int]
    validation: list[int]
    settings: TrainSettings

    def steps(self, source: GridSource) -> Iterator[StepState]:
        """The training loop, from where the training stands."""
        return train(self.training, source, self.train, self.settings, validation=self.validation)


def start_seed(source: GridSource, settings: FitSettings, seed: int) -> SeedRun:
    """Split off validation and make a new model for one seed."""
    kept, held = settings.split(source, seed)
    model = DiffC(
        source.shape[0],
        len(settings.classes),
        width=settings.width,
        dropout=settings.dropout,
        class_names=list(settings.classes),
        grids=settings.grids,
        seed=seed,
    )
    own = replace(settings.train, seed=seed)
    return SeedRun(seed, Training.start(model.to(settings.device), own), kept, held, own)


def finish_seed(run: SeedRun, test: GridSource, settings: FitSettings) -> dict[str, Any]:
    """Test the last and the best epoch of a training that is done.

    Returns:
        ``seed``, ``parameters``, ``history``, ``last`` and ``best`` (None without validation), each
        with ``epoch``, ``validation_top1`` and the measures of ``test``, and ``confusion`` of the one
        selected. The model is left with the weights of the one selected.
    """
    history = run.training.history
    everyone = range(len(test.ids))
    labels = torch.tensor(test.labels)
    names = settings.classes
    parameters = run.training.model.parameter_count()
    result: dict[str, Any] = {"seed": run.seed, "parameters": parameters, "best": None}
    epochs = {"last": len(history)} | ({"best": run.training.best_epoch} if run.validation else {})
    for which, epoch in epochs.items():
        if which == "best":
            run.training.model.load_state_dict(run.training.best)
        logits = predict(run.training.model, test, everyone, 2 * run.settings.batch_size)
        predicted = logits.argmax(dim=1)
        result[which] = {
            "epoch": epoch,
            "validation_top1": history[epoch - 1].validation_top1,
            "test": measure(labels, predicted, names),
        }
        result["confusion"] = confusion(labels, predicted, len(names)).tolist()
    return result | {"history": [asdict(end) for end in history]}


def summarise(
    results: Sequence[dict[str, Any]], settings: FitSettings, source: GridSource, test: GridSource
) -> dict[str, Any]:
    """All seeds' results as one, with the headline ``top1`` and its ``interval``.

    ``interval`` is ``t95`` over seeds where there are several, and ``wilson95`` of the one seed's test
    top-1 otherwise; ``interval_kind`` says which.
    """
    selected = "best" if results[0]["best"] else "last"
    found = {
        which: over_seeds([result[which]["test"]["top1"] for result in results])
        if results[0][which]
        else None
        for which in ("last", "best")
    }
    headline = found[selected] or {}
    single = results[0][selected]["test"]["wilson95"]
    counts = torch.bincount(torch.tensor(test.labels))
    kept, held = settings.split(source, settings.train.seed)
    return {
        "mode": settings.train.mode,
        "top1": headline["mean"],
        "interval": headline["t95"] or single,
        "interval_kind": "t95 over seeds" if headline["t95"] else "wilson95 over test images",
        "selected": selected,
        "last": found["last"],
        "best": found["best"],
        "majority_share": int(counts.max()) / int(counts.sum()),
        "images": {"train": len(kept), "validation": len(held), "test": len(test.ids)},
        "grid": list(source.shape),
        "views": source.views,
        "parameters": results[0]["parameters"],
        "classes": list(settings.classes),
        "settings": settings.plain(),
        "seeds": list(results),
    }


def check_pair(source: GridSource, test: GridSource, classes: int) -> None:
    """Refuse train and test grids that one classifier can't take.

    Raises:
        ValueError: their channels differ, or a label is beyond the classes.
    """
    if source.shape[0] != test.shape[0]:
        raise ValueError(
            f"train grids have {source.shape[0]} channels, test grids {test.shape[0]}: "
            "take both from the same layer"
        )
    for name, labels in (("train", source.labels), ("test", test.labels)):
        if max(labels) >= classes:
            raise ValueError(f"{name} has label {max(labels)}, but there are {classes} classes")


def fit(
    train_grids: Float[Tensor, "n c h w"] | Sequence[Float[Tensor, "n c h w"]],
    train_labels: Sequence[int] | Tensor,
    test_grids: Float[Tensor, "n_test c h w"],
    test_labels: Sequence[int] | Tensor,
    *,
    classes: Sequence[str] | int,
    width: int = WIDTH,
    epochs: int = 30,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    mode: Mode = "fixed",
    validation: float | None = None,
    seed: int = 0,
    seeds: int = 1,
    device: str = "cpu",
    on_epoch: Callable[[int, EpochEnd], None] | None = None,
) -> dict[str, Any]:
    """Train and test Diff-C on grids at hand; the whole of the paper's Sec. 3.3 in one call.

    Args:
        train_grids: one tensor, or several: the plain view, then augmented views of the same images.
        train_labels: a class id an image.
        test_grids: plain views of the test images.
        test_labels: a class id a test image.
        classes: class names by class id, or how many there are.
        width: of the four convolutions; 64 to 128 is quick and enough for small backbones.
        epochs: how often each training image is seen.
        batch_size: images a step.
        learning_rate: at the start; it ends at 5e-5 or, if smaller, half of it.
        mode: see :mod:`revelio.diffc.train` and the module's head.
        validation: share of train held out to choose the epoch; None: the mode's.
        seed: of weights, order and validation set.
        seeds: how many trainings, with seed, seed + 1, ...
        device: where the classifier is.
        on_epoch: is told (seed, measures) after every epoch.

    Returns:
        See :func:`summarise`; ``seconds`` is the wall time.

    Raises:
        ValueError: shapes, labels and classes don't fit together.
    """
    started = time.monotonic()
    views = [train_grids] if isinstance(train_grids, Tensor) else list(train_grids)
    source = TensorGrids(views, torch.as_tensor(train_labels).tolist())
    test = TensorGrids([test_grids], torch.as_tensor(test_labels).tolist())
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    check_pair(source, test, len(names))
    rates = TrainSettings(
        mode, epochs, batch_size, learning_rate, min(END_RATES[mode], learning_rate / 2), seed=seed
    )
    settings = FitSettings(rates, names, width, 0.0, validation, seeds, device)
    results = []
    for one in settings.seed_list():
        run = start_seed(source, settings, one)
        for state in run.steps(source):
            _tell(state, one, on_epoch)
        results.append(finish_seed(run, test, settings))
    return summarise(results, settings, source, test) | {"seconds": time.monotonic() - started}


def _tell(state: StepState, seed: int, on_epoch: Callable[[int, EpochEnd], None] | None) -> None:
    if state.end is not None and on_epoch is not None:
        on_epoch(seed, state.end)
