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

from revelio.data.splits import stratified_split
from revelio.diffc.config import FitConfig
from revelio.diffc.measures import confusion, measure, over_seeds
from revelio.diffc.model import DiffC
from revelio.diffc.sources import GridSource, TensorGrids
from revelio.diffc.train import EpochEnd, StepState, Training, predict, train
from revelio.distributed import device_of


@dataclass(frozen=True)
class Task:
    """What is to be told apart.

    Attributes:
        source: grids of the training images, validation included.
        test: grids of the test images.
        classes: class names by class id.
        made: how the grids were made (:meth:`revelio.diffc.config.GridsConfig.made`), kept with the weights.
        skipped: one line on each image that could not be read.

    Raises:
        ValueError: the channels of train and test differ, or a label is beyond the classes.
    """

    source: GridSource
    test: GridSource
    classes: tuple[str, ...]
    made: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.source.shape[0] != self.test.shape[0]:
            raise ValueError(
                f"train grids have {self.source.shape[0]} channels, test grids {self.test.shape[0]}: "
                "take both from the same layer"
            )
        for name, labels in (("train", self.source.labels), ("test", self.test.labels)):
            if max(labels) >= len(self.classes):
                raise ValueError(
                    f"{name} has label {max(labels)}, but there are {len(self.classes)} classes"
                )

    def split(self, config: FitConfig, seed: int) -> tuple[list[int], list[int]]:
        """A seed's training and validation images; how many they are is the same for all seeds."""
        return stratified_split(self.source.labels, config.held_out, seed, "diffc validation")


@dataclass
class SeedRun:
    """One seed's training, its images, and its steps."""

    seed: int
    training: Training
    train: list[int]
    validation: list[int]
    config: FitConfig

    def steps(self, source: GridSource) -> Iterator[StepState]:
        """The training loop, from where the training stands."""
        return train(self.training, source, self.train, self.config, validation=self.validation)


def start_seed(task: Task, config: FitConfig, seed: int) -> SeedRun:
    """Split off validation and make a new model for one seed."""
    kept, held = task.split(config, seed)
    sizes = config.sizes(task.source.shape[0], len(task.classes))
    model = DiffC(**sizes, class_names=list(task.classes), grids=task.made, seed=seed)
    own = replace(config, seed=seed)
    training = Training.start(model.to(device_of(config.device)), own)
    return SeedRun(seed, training, kept, held, own)


def finish_seed(run: SeedRun, task: Task) -> dict[str, Any]:
    """Test the last and the best epoch of a training that is done.

    Returns:
        ``seed``, ``parameters``, ``history``, ``last`` and ``best`` (None without validation), each
        with ``epoch``, ``validation_top1`` and the measures of ``test``, and ``confusion`` of the one
        selected. The model is left with the weights of the one selected.
    """
    history = run.training.history
    everyone = range(len(task.test.ids))
    labels = torch.tensor(task.test.labels)
    names = task.classes
    parameters = run.training.model.parameter_count()
    result: dict[str, Any] = {"seed": run.seed, "parameters": parameters, "best": None}
    epochs = {"last": len(history)} | ({"best": run.training.best_epoch} if run.validation else {})
    for which, epoch in epochs.items():
        if which == "best":
            run.training.model.load_state_dict(run.training.best)
        logits = predict(run.training.model, task.test, everyone, 2 * run.config.batch_size)
        predicted = logits.argmax(dim=1)
        result[which] = {
            "epoch": epoch,
            "validation_top1": history[epoch - 1].validation_top1,
            "test": measure(labels, predicted, names),
        }
        result["confusion"] = confusion(labels, predicted, len(names)).tolist()
    return result | {"history": [asdict(end) for end in history]}


def summarise(results: Sequence[dict[str, Any]], task: Task, config: FitConfig) -> dict[str, Any]:
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
    counts = torch.bincount(torch.tensor(task.test.labels))
    kept, held = task.split(config, config.seed)
    return {
        "mode": config.mode,
        "top1": headline["mean"],
        "interval": headline["t95"] or single,
        "interval_kind": "t95 over seeds" if headline["t95"] else "wilson95 over test images",
        "selected": selected,
        "last": found["last"],
        "best": found["best"],
        "majority_share": int(counts.max()) / int(counts.sum()),
        "images": {"train": len(kept), "validation": len(held), "test": len(task.test.ids)},
        "grid": list(task.source.shape),
        "views": task.source.views,
        "parameters": results[0]["parameters"],
        "classes": list(task.classes),
        "settings": config.plain(),
        "seeds": list(results),
    }


def fit(
    train_grids: Float[Tensor, "n c h w"] | Sequence[Float[Tensor, "n c h w"]],
    train_labels: Sequence[int] | Tensor,
    test_grids: Float[Tensor, "n_test c h w"],
    test_labels: Sequence[int] | Tensor,
    *,
    classes: Sequence[str] | int,
    config: FitConfig | None = None,
    on_epoch: Callable[[int, EpochEnd], None] | None = None,
) -> dict[str, Any]:
    """Train and test Diff-C on grids at hand; the whole of the paper's Sec. 3.3 in one call.

    Args:
        train_grids: one tensor, or several: the plain view, then augmented views of the same images.
        train_labels: a class id an image.
        test_grids: plain views of the test images.
        test_labels: a class id a test image.
        classes: class names by class id, or how many there are.
        config: the network, how it is trained, how often; none: the paper's.
        on_epoch: is told (seed, measures) after every epoch.

    Returns:
        See :func:`summarise`; ``seconds`` is the wall time.

    Raises:
        ValueError: shapes, labels and classes don't fit together.
    """
    started, config = time.monotonic(), config or FitConfig()
    views = [train_grids] if isinstance(train_grids, Tensor) else list(train_grids)
    source = TensorGrids(views, torch.as_tensor(train_labels).tolist())
    test = TensorGrids([test_grids], torch.as_tensor(test_labels).tolist())
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
    task = Task(source, test, names)
    results = []
    for seed in config.seed_list():
        run = start_seed(task, config, seed)
        for state in run.steps(source):
            if state.end is not None and on_epoch is not None:
                on_epoch(seed, state.end)
        results.append(finish_seed(run, task))
    return summarise(results, task, config) | {"seconds": time.monotonic() - started}
