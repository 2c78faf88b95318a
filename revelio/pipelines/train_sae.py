"""Store -> k-SAEs in run folders: trained, saved, measured, with a report each.

from revelio.pipelines.train_sae import TrainSAEConfig, train_sae

[made] = train_sae(TrainSAEConfig(store=(Path("runs/x/up_ft1-t25"),), out=Path("runs/ksae"), epochs=50))
made.report["fvu"], made.model()
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from revelio.activations.store import ActivationStore
from revelio.bounds import check_fields
from revelio.config import completed, to_yaml
from revelio.device_memory import release, room
from revelio.files import check_folder
from revelio.machine import duration
from revelio.pipelines import Progress, Report, Reported, silent
from revelio.pipelines.held_out import divide, with_share
from revelio.pipelines.plan_sae import announce, job_of, ran_out, refuse_shortage, remarks, shortage
from revelio.pipelines.sae_processes import DistContext
from revelio.pipelines.sae_result import Training, finish
from revelio.pipelines.sae_rows import JoinedRows, open_stores
from revelio.run_dir import KEEP, Run
from revelio.sae.checkpoint import checkpoint_bytes, load_checkpoint, save_checkpoint
from revelio.sae.config import SweepConfig, TrainSAEConfig
from revelio.sae.cost import Job, mean_batch
from revelio.sae.dataloader import Batches, RowSource, batches_of
from revelio.sae.inputs import measure
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.state import StepState
from revelio.sae.train import SAERun, train_many
from revelio.trust import read_object

__all__ = ["TrainSAEConfig", "TrainedSAE", "plan_sae", "train_sae"]

# What a finished run has.
RESULTS = ("report.json", "final/config.json", "final/model.safetensors")


@dataclass(frozen=True)
class TrainedSAE(Reported):
    """A finished run; its report: sizes, fraction of variance unexplained, L0, dead latents, ..."""

    def model(self) -> KSparseAutoencoder:
        """The k-SAE, read from the folder."""
        return KSparseAutoencoder.from_pretrained(self.path)


def train_sae(config: TrainSAEConfig, progress: Report = silent) -> list[TrainedSAE]:
    """Train the k-SAE of a config, or all of its grid; each store is read and shuffled once for all.

    Under ``torchrun`` every process calls this; they share the work as ``config.sharing`` says, and only the
    first one writes and reports.

    Args:
        config: what to train, on what, and where to.
        progress: told what trains and what it costs, then every step.

    Returns:
        The run of each k-SAE, those included that were finished before (with ``config.resume``).

    Raises:
        ValueError: a value is outside its bounds, a run folder is taken, something does not fit together or
            into memory, or a loss is not finite.
    """
    check_fields(config)
    config.check_budget()
    check_folder(config.out)
    with DistContext.gather(config.device, config.sharing) as context:
        report = progress if context.main else silent
        heard = progress is not silent
        return [
            made for group in expand(config) for made in _trained(group, context, report, heard)
        ]


def plan_sae(config: TrainSAEConfig, progress: Report = silent) -> list[Job]:
    """Report what :func:`train_sae` would train and what it would cost; writes nothing.

    Raises:
        ValueError: a value is outside its bounds, or something does not fit together.
    """
    check_fields(config)
    config.check_budget()
    found: list[Job] = []
    with DistContext.gather(config.device, config.sharing) as context:
        report = progress if context.main else silent
        for group in expand(config):
            kept, held = _rows_of(group[0])
            jobs = _jobs(group, kept, context)
            reason = shortage(jobs, config.out, in_memory=context.device.type == "cpu")
            if reason is not None:
                report(Progress(f"warning: {reason}"))
            context.wait()
            announce(jobs, context.device, report)
            _remark(jobs, kept, held, report)
            found += jobs
    return found


def _rows_of(config: TrainSAEConfig) -> tuple[JoinedRows, JoinedRows]:
    """The rows to train on and those kept out, with how those of each store are normalized."""
    stores = open_stores(config.store, config.rows)
    kept, held = divide(stores, config.held_out, config.rows)
    if config.normalize != "none" or len(stores) > 1:
        for part, apart in zip(kept.parts, held.parts, strict=True):
            part.input = measure(describe(part.store), config.normalize, part.sample())
            apart.input = part.input
    return kept, held


def _jobs(configs: list[TrainSAEConfig], kept: JoinedRows, context: DistContext) -> list[Job]:
    stores = [part.store for part in kept.parts]
    return [job_of(config, stores, context.world, rows=len(kept)) for config in configs]


def _remark(jobs: list[Job], kept: JoinedRows, held: JoinedRows, progress: Report) -> None:
    for text in dict.fromkeys(text for job in jobs for text in remarks(job, kept, held)):
        progress(Progress(f"note: {text}"))


def expand(config: TrainSAEConfig) -> list[list[TrainSAEConfig]]:
    """One config for each k-SAE of a grid, in groups that share the rows and their order.

    Raises:
        ValueError: a value stands twice, or two stores have the same name.
    """
    varied = {name: values for name, values in vars(config.grid).items() if values}
    if not varied:
        return [[with_share(config)]]
    groups: dict[tuple[tuple[Path, ...], float | None], list[TrainSAEConfig]] = {}
    taken: set[str] = set()
    for values in product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        name = "-".join(_label(key, value) for key, value in chosen.items())
        if name in taken:
            raise ValueError(f"the grid gives {name} twice: list each value once")
        taken.add(name)
        if "store" in chosen:
            chosen["store"] = (chosen["store"],)
        chosen |= {"out": config.out / name, "order_seed": config.rows_seed, "grid": SweepConfig()}
        one = with_share(replace(config, **chosen))
        groups.setdefault((one.store, one.held_out), []).append(one)
    return list(groups.values())


def _label(name: str, value: Any) -> str:
    if isinstance(value, Path):
        return value.resolve().name
    short = {"expansion": "x", "learning_rate": "lr", "activation": ""}
    return f"{short.get(name, name)}{value}"


def describe(store: ActivationStore) -> dict[str, Any]:
    """The store's manifest without its lists, under the folder's name (no absolute path), and its hash."""
    long = (list, tuple)
    kept = {key: value for key, value in store.manifest.items() if not isinstance(value, long)}
    return {"store": store.path.resolve().name, **kept, "sha256": store.sha256}


def _describe_all(rows: JoinedRows) -> dict[str, Any]:
    """What a k-SAE is trained on: one store's description; of several, what they share, and each."""
    stores = [describe(part.store) for part in rows.parts]
    shared = {k: v for k, v in stores[0].items() if all(one.get(k) == v for one in stores)}
    found = shared | ({"stores": stores} if len(stores) > 1 else {})
    return found | ({"rows_are": "cells"} if rows.cells else {})


def _trained(
    configs: list[TrainSAEConfig], context: DistContext, progress: Report, heard: bool
) -> list[TrainedSAE]:
    """Train them together.

    Raises:
        ValueError: the device's memory ran out; the message names the batch size that fits by an estimate.
    """
    try:
        return list(_train_group(configs, context, progress, heard))
    except torch.OutOfMemoryError as error:
        release(error)
        jobs = _jobs(configs, _rows_of(configs[0])[0], context)
        raise ValueError(ran_out(jobs, context.device, room(context.device))) from error


def _train_group(
    configs: list[TrainSAEConfig], context: DistContext, progress: Report, heard: bool
) -> Iterator[TrainedSAE]:
    """Train the k-SAEs of configs with the same store and order of rows, in one pass over them.

    Args:
        configs: the k-SAEs.
        context: who trains.
        progress: the main process's.
        heard: whether anybody listens to that: the cost is measured then, in all processes at once, as one
            alone would have the cores of the others.
    """
    kept, held_out = _rows_of(configs[0])
    refuse_shortage(_jobs(configs, kept, context), configs[0].out, context.device, progress)
    batches = _batches(kept, configs[0], context)
    opened = [_open(config, kept, context, progress) for config in configs]
    trainings = [training for training in opened if training is not None]
    if trainings and heard:
        context.wait()
        left = _jobs([training.config for training in trainings], kept, context)
        done = [(training.record.latest_checkpoint() or (0, None))[0] for training in trainings]
        announce(left, context.device, progress, done)
        _remark(left, kept, held_out, progress)
    for training in trainings:
        _resume(training, progress)
    _follow(trainings, batches, progress)
    for training in trainings:
        finish(training, batches, kept, held_out, progress)
    for config in configs:
        context.wait()
        yield TrainedSAE(config.out, read_object(config.out / "report.json"))


def _batches(rows: JoinedRows, config: TrainSAEConfig, context: DistContext) -> Batches:
    """The rows in shuffled batches, from memory or streamed."""
    source: RowSource = rows
    if context.group is not None:
        # Processes exchange what they read, in the one order that a single reader keeps.
        source, config = (
            context.share_reading(source),
            replace(config, workers=min(config.workers, 1)),
        )
    return batches_of(source, config.for_rows(len(rows)), rows.width)


def _open(
    config: TrainSAEConfig, rows: JoinedRows, context: DistContext, progress: Report
) -> Training | None:
    """The k-SAE and its run folder; None if that is finished."""
    inputs = [part.input for part in rows.parts if part.input is not None]
    model = context.model(config, rows.width, _describe_all(rows), inputs)
    complete = completed(config)
    text = complete(to_yaml(config))  # numbers as YAML has them: 2 epochs are 2.0
    if context.main:
        record = Run.open(
            config.out, "train-ksae", text, resume=config.resume, results=RESULTS, complete=complete
        )
        if not record.finished:
            for number, part in enumerate(rows.parts):
                record.add_input(f"store{number or ''}", describe(part.store))
    context.wait()
    if not context.main:
        record = Run.open(
            config.out, "train-ksae", text, resume=True, writes=False, complete=complete
        )
    if record.finished:
        progress(Progress(f"{config.out} is finished already: see {config.out / 'report.json'}"))
        return None
    run = SAERun(model, config.for_rows(len(rows)), kernel=context.kernel(model, config.kernel))
    return Training(config, record, run, context, len(rows))


def _resume(training: Training, progress: Report) -> None:
    """Go on from the last checkpoint, where there is one."""
    record, run, context = training.record, training.run, training.context
    step, folder = record.latest_checkpoint() or (0, None)
    if context.main:
        record.truncate_metrics(step)
        record.drop_checkpoints(keep=KEEP)
    if folder is None:
        return
    progress(Progress(f"{record.path}: resuming after step {step:,}"))
    run.state = load_checkpoint(folder, run.model, context.files(run.model.n))
    if run.state.step != step:
        raise ValueError(
            f"{folder} is of step {run.state.step}: it was renamed or edited, remove it"
        )


def _follow(trainings: list[Training], batches: Batches, progress: Report) -> None:
    """Train to the end: log, save, report; the first steps give the time it will take."""
    runs = [training.run for training in trainings]
    total = sum(run.config.steps for run in runs)
    done = sum(run.state.step for run in runs if run.state)
    taken, began, seen = 0, 0.0, 0
    rows = [run.state.samples if run.state else 0 for run in runs]
    for place, step in train_many(runs, batches):
        taken, message = taken + 1, ""
        seen, rows[place] = seen + step.samples - rows[place], step.samples
        # The first steps pay for one-time work, so the clock starts after them.
        if taken == len(runs):
            began, seen = time.monotonic(), 0
        elif taken == 6 * len(runs):
            # An epoch's last batch is a smaller one: rows are counted, not steps.
            rate = seen / max(time.monotonic() - began, 1e-9)
            message = f"{rate:,.0f} rows/s: about {duration(_rows_left(trainings, rows) / rate)}"
        numbers = _record(trainings[place], step)
        progress(Progress(message, done + taken, total, "step", tuple(numbers.items())))


def _rows_left(trainings: list[Training], seen: list[int]) -> float:
    """Rows that are to be seen yet, of all k-SAEs: steps of the mean size of an epoch's batches."""
    settings = [(training.rows, training.run.config) for training in trainings]
    whole = sum(config.steps * mean_batch(rows, config.batch_size) for rows, config in settings)
    return max(0.0, whole - sum(seen))


def _record(training: Training, step: StepState) -> dict[str, str]:
    """Log a step and save a checkpoint, each at its time; what was logged, for people."""
    config, record, context = training.config, training.record, training.context
    model, steps, shown = training.run.model, training.run.config.steps, {}
    if context.main and (step.step % config.log_every == 0 or step.step in (1, steps)):
        record.log(**_line(step))
        shown = {"loss": f"{step.loss:.4f}", **_dead(step, training.rows)}
    if config.checkpoint_every and step.step % config.checkpoint_every == 0:
        step.state.check(training.run.config)
        files = context.files(model.n)
        if context.main:
            record.save_checkpoint(
                step.step,
                lambda folder: save_checkpoint(folder, model, step.state, files),
                needed=checkpoint_bytes(model, step.state),
            )
        else:
            save_checkpoint(None, model, step.state, files)
    return shown


def _dead(step: StepState, rows: int) -> dict[str, str]:
    """The share of latents active on no row of one pass over the training rows, as the report has it.

    Nothing before the first pass is over: latents that are yet to see their rows are not dead.
    """
    if step.samples < rows:
        return {}
    unseen = step.samples - step.state.fired_at >= rows
    return {"dead": f"{float(unseen.double().mean()):.1%}"}


def _line(step: StepState) -> dict[str, Any]:
    names = ("step", "epoch", "samples", "loss", "auxk_loss", "fvu", "l0", "active", "dead_share")
    line = {name: getattr(step, name) for name in (*names, "learning_rate")}
    # A batch of one row has no variance to explain.
    return {name: value if abs(value) < float("inf") else None for name, value in line.items()}
