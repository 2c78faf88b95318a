"""From grids to a result: train over several seeds, test the last and the best epoch, sum up.

The last epoch is reported, unless validation has :data:`ENOUGH` images: then the one with the highest top-1
(among equals, the least loss) on them. Picking among 30 epochs on 200 images costs up to 1.5 points, since
the luckiest is taken for the best. Validation is cut from train (10 % of every class, keyed by the seed);
test images choose nothing. The released code has no validation set and reports the last epoch (mode
`as_code`); the paper doesn't say which it reports (mode `as_paper` takes the last as well).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from revelio.data.splits import stratified_split
from revelio.diffc.config import FitConfig
from revelio.diffc.measures import confusion, measure, over_seeds
from revelio.diffc.model import DiffC
from revelio.diffc.shared import Share
from revelio.diffc.sources import GridSource, TensorGrids
from revelio.diffc.train import EpochEnd, StepState, Training, predict, train
from revelio.distributed import device_of
from revelio.stats import trainings95
from revelio.wording import plural

# Validation images from which on they pick the epoch: a share of 90 % is known to 2 points then.
ENOUGH = 1000


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
                f"train grids have {plural(self.source.shape[0], 'channel')}, test grids "
                f"{self.test.shape[0]}: take both from the same layer"
            )
        for name, labels in (("train", self.source.labels), ("test", self.test.labels)):
            if max(labels) >= len(self.classes):
                raise ValueError(
                    f"{name} has label {max(labels)}, but there are "
                    f"{plural(len(self.classes), 'class', 'classes')}"
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


def start_seed(task: Task, config: FitConfig, seed: int, share: Share | None = None) -> SeedRun:
    """Split off validation and make a new model for one seed, which processes may share the work of."""
    kept, held = task.split(config, seed)
    sizes = config.sizes(task.source.shape[0], len(task.classes))
    model = DiffC(**sizes, class_names=list(task.classes), grids=task.made, seed=seed)
    own = replace(config, seed=seed)
    training = Training.start(model.to(device_of(config.device)), own, share)
    return SeedRun(seed, training, kept, held, own)


def finish_seed(run: SeedRun, task: Task) -> dict[str, Any]:
    """Test the last and the best epoch of a training that is done.

    Returns:
        ``seed``, ``parameters``, ``history``, ``last`` and ``best`` (None without validation), each
        with ``epoch``, ``validation_top1`` and the measures of ``test``; ``selected``, which of the two is
        reported; and ``confusion`` of that. The model is left with its weights.
    """
    model, history = run.training.model, run.training.history
    labels, names = torch.tensor(task.test.labels), task.classes
    chosen = "best" if len(run.validation) >= ENOUGH else "last"
    result: dict[str, Any] = {"seed": run.seed, "parameters": model.parameter_count(), "best": None}
    result["selected"] = chosen
    found = {"last": (len(history), {n: value.clone() for n, value in model.state_dict().items()})}
    if run.validation:
        found["best"] = (run.training.best_epoch, run.training.best)
    # The selected one comes last, and stays.
    for which in sorted(found, key=lambda one: one == chosen):
        epoch, weights = found[which]
        model.load_state_dict(weights)
        every, size = range(len(labels)), 2 * run.config.batch_size
        logits = predict(model, task.test, every, size, run.training.share)
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

    The interval of several trainings holds what their chance and the test images' matter
    (:func:`revelio.stats.trainings95`); that of one training only the latter. ``interval_kind`` says which.
    """
    first = results[0]
    # Versions before this one did not say which: the best, where there was one.
    selected = first.get("selected", "best" if first["best"] else "last")
    found = {
        which: over_seeds([result[which]["test"]["top1"] for result in results])
        if first[which]
        else None
        for which in ("last", "best")
    }
    values = [result[selected]["test"]["top1"] for result in results]
    kind = "trainings and test images" if len(values) > 1 else "test images of one training"
    counts = torch.bincount(torch.tensor(task.test.labels))
    kept, held = task.split(config, config.seed)
    return {
        "mode": config.mode,
        "top1": mean(values),
        "interval": trainings95(values, len(task.test.ids)),
        "interval_kind": f"95 %, {kind}",
        "selected": selected,
        "last": found["last"],
        "best": found["best"],
        "majority_share": int(counts.max()) / int(counts.sum()),
        "images": {"train": len(kept), "validation": len(held), "test": len(task.test.ids)},
        "grid": list(task.source.shape),
        "views": task.source.views,
        "parameters": first["parameters"],
        "classes": list(task.classes),
        "settings": config.plain(),
        "seeds": list(results),
    }


def right_of(report: Mapping[str, Any]) -> Bool[np.ndarray, "trainings images"]:
    """Which test images each training of a report got right, for :func:`revelio.stats.paired`."""
    right = np.ones((len(report["seeds"]), report["images"]["test"]), dtype=bool)
    for row, one in zip(right, report["seeds"], strict=True):
        row[one[report["selected"]]["test"]["wrong"]] = False
    return right


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
