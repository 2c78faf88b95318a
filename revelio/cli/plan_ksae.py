"""What training a k-SAE would cost: memory of each process, time, disk. Writes nothing.

    revelio plan-ksae --store runs/pets/up_ft1-t25-empty-d0 --batch-size 256
    revelio plan-ksae --store-rows 1281167 --d 1280 --expansion 256 --devices 8 --flops 60e12
    revelio plan-ksae --store-rows 7349 --d 1280 --json

Time comes from about a second of real steps on this machine, or from a device's FLOP/s (a lower bound:
products only). It is a range: at first few latents' rows move, at worst every row does at each step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from revelio.bounds import Count, Folder, Positive
from revelio.sae.config import RunConfig

if TYPE_CHECKING:
    from revelio.sae.cost import Job


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A k-SAE and its training, the rows, and the devices to train on."""

    store: Folder | None = None
    """An activation store, which gives the rows and their width."""

    renamed: ClassVar[dict[str, str]] = {"rows": "store-rows"}

    store_rows: Count | None = None
    """Rows to train on, where there is no store yet."""

    d: Count | None = None
    """The rows' width, where there is no store yet."""

    n: Count | None = None
    """Latents; none: `expansion` times d."""

    devices: Count = 1
    """Processes, each with a device of its own."""

    flops: Positive | None = None
    """A device's floating-point operations a second; none: measured here."""

    json: bool = False
    """Print JSON instead of a table."""


def run(config: Config) -> None:
    """Print the plan."""
    import json
    import sys

    from revelio.pipelines.plan_sae import figures, shortage, speed_of, table

    job = build(config)
    speed = speed_of(job, config.flops)
    print(json.dumps(figures(job, speed), indent=2) if config.json else table(job, speed))
    reason = shortage([job], Path(), in_memory=config.flops is None)
    if reason is not None:
        print(f"warning: {reason}", file=sys.stderr)
    if not config.json:
        print(_next(config))


def _next(config: Config) -> str:
    from revelio.following import following

    asked = {"expansion": config.n // config.d if config.n and config.d else config.expansion}
    asked |= {"k": config.k, "batch-size": config.batch_size}
    budget = "epochs" if config.epochs else "samples" if config.samples else "steps"
    asked[budget] = getattr(config, budget)
    words = [word for name, value in asked.items() for word in (f"--{name}", value)]
    return following("train-ksae", "--store", config.store or "STORE", *words, "--out", "runs/ksae")


def build(config: Config) -> "Job":
    """The job that the config describes.

    Raises:
        ValueError: sizes that are missing or make no sense.
    """
    from revelio.activations.store import ActivationStore
    from revelio.pipelines.plan_sae import job_of
    from revelio.sae.cost import Job

    config.check_budget()
    if config.store is not None:
        if config.store_rows is not None or config.d is not None:
            raise ValueError("give a store, or rows and d, not both")
        store = ActivationStore.open(config.store, cells=True)
        return job_of(config, [store], config.devices, latents=config.n)
    if config.store_rows is None or config.d is None:
        raise ValueError("give --store, or --store-rows and --d")
    return Job(
        config=config, rows=config.store_rows, d=config.d, latents=config.n, devices=config.devices
    )
