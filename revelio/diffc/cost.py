"""How long training Diff-C takes, from one step and one pass that are measured before the first epoch.

    seconds = seeds * (epochs * (train * step + validation * pass) + tests * pass) / processes

with ``step`` and ``pass`` those of one image, its backbone's where views are made on-line.
"""

import time
from collections.abc import Callable

from torch import Tensor

from revelio.diffc.config import FitConfig
from revelio.diffc.fit import Task
from revelio.diffc.fitting import LEAST, training_step
from revelio.diffc.model import DiffC
from revelio.diffc.shared import Share
from revelio.diffc.sources import PLAIN, GridSource
from revelio.diffc.train import predict
from revelio.distributed import device_of

# What is measured may take so long; of larger batches it is a step of fewer images.
SECONDS = 2.0


def training_seconds(task: Task, config: FitConfig, share: Share) -> float:
    """Seconds of all trainings with their tests, by what this process measures of its share.

    Raises:
        OutOfMemoryError: a batch goes beyond the device's memory.
    """
    sizes = config.sizes(task.source.shape[0], len(task.classes))
    model = DiffC(**sizes, seed=config.seed).to(device_of(config.device))
    kept, held = (len(part) for part in task.split(config, config.seed))
    count, tests = max(LEAST, config.batch_size // share.world), len(task.test.labels)
    step = an_image(lambda size: training_step(model, task.source, size), count)
    seen = max(1, min(count, tests))  # fewer test images than a batch make a smaller one
    look = an_image(
        lambda size: predict(model, task.test, range(min(size, tests)), size),
        seen,
        min(LEAST, seen),
    )
    looks = config.epochs * held + tests * (2 if held else 1)
    return config.seeds * (config.epochs * kept * step + looks * look) / share.world


def view_seconds(source: GridSource, count: int) -> float:
    """Seconds an image of the backbone's passes over ``count`` images, at most all."""
    images = len(source.ids)
    return an_image(
        lambda size: source.grids([place % images for place in range(size)], PLAIN), count, least=1
    )


def an_image(run: Callable[[int], Tensor], count: int, least: int = LEAST) -> float:
    """Seconds an image of ``count`` at once; of ``least``, where those would take too long."""

    def seconds(size: int) -> float:
        began = time.perf_counter()
        run(size).sum().item()  # waits for the device
        return (time.perf_counter() - began) / size

    first = seconds(least)
    if first * least > SECONDS:
        return first
    size = count if first * count < SECONDS else least
    seconds(size)  # pays for what is done once a size
    return seconds(size)
