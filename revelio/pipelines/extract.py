"""Images and a model, by their configs -> activation stores.

from revelio.pipelines.extract import ExtractRunConfig, extract_to

[store] = extract_to(ExtractRunConfig(out=Path("runs/x"), layers=("up_ft1",), timesteps=(25,)), print)

With a data set and a backbone that are open already: :func:`revelio.activations.extract.extract`.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

from revelio.activations.config import ExtractConfig, ExtractRunConfig
from revelio.activations.cost import Cost, Measured, estimate
from revelio.activations.extract import run
from revelio.activations.extraction_plan import ExtractionPlan, Texts
from revelio.activations.fitting import fitted
from revelio.activations.store import ActivationStore
from revelio.backbones.base import Backbone, schedule_of
from revelio.backbones.compiled import compile_backbone
from revelio.backbones.diffusion.schedule import reference_schedule
from revelio.backbones.prompts import captions_sha256, check_policy, prompt_texts
from revelio.backbones.random_init import untrained
from revelio.backbones.registry import load_backbone
from revelio.config import to_yaml
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.distributed import Processes, device_of, launched, local_world_size
from revelio.files import write_whole
from revelio.machine import duration, size
from revelio.outputs import check_file
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.inputs import hashed
from revelio.trust import parse_yaml, printable, read_text
from revelio.wording import plural

__all__ = ["ExtractRunConfig", "extract_to", "open_plan", "plan_extraction"]

# SPEC 1.1: the released extraction brings images to 256 px whatever its config says.
AS_CODE_SIZE = 256
# More readers than this a GPU cannot keep up with.
MOST_WORKERS = 16


def extract_to(config: ExtractRunConfig, progress: Report = silent) -> list[ActivationStore]:
    """Extract into ``config.out``, which also gets the config.

    Under ``torchrun`` every process calls this; they share the shards, and only the first one reports.

    Args:
        config: what to extract from what, and where to.
        progress: told what it will cost, every batch, and what was written.

    Returns:
        The stores: for each timestep, prompt and draw those of all layers.

    Raises:
        KeyError: an unknown backbone or layer.
        ValueError: a setting can't be, a store is there already or was made with other settings, or something
            does not fit the disk or the device's memory.
        ImageError: an image can't be read and ``config.data.on_error`` is ``stop``.
        OSError: a shard can't be written.
    """
    processes = launched(config.backbone.device)
    report = progress if processes.main else silent
    if processes.main:
        check_file(config.out / "config.yaml", _is_extraction, "the config of an extraction")
    plan = open_plan(config, processes, report)
    cost = _estimate(plan, report)
    if processes.main:
        report(Progress(cost.line()))
        if (reason := cost.shortage(config.out)) is not None:
            raise ValueError(reason)
        write_whole(config.out / "config.yaml", to_yaml(replace(config, resume=False)))
    started = time.monotonic()
    for step in run(plan):
        skipped = (("skipped", str(step.skipped)),) if step.skipped else ()
        report(Progress("", step.images, step.total, "image", skipped))
    processes.wait()
    stores = [ActivationStore.open(path, cells=True) for path in plan.stores]
    report(Progress(_summary(plan, stores, time.monotonic() - started)))
    processes.close()
    return stores


def plan_extraction(config: ExtractRunConfig, progress: Report = silent) -> Cost:
    """What :func:`extract_to` has left to do and what it costs, measured on the first images; writes nothing.

    Raises:
        KeyError, ValueError, ImageError: as :func:`extract_to`.
    """
    processes = launched(config.backbone.device)
    report = progress if processes.main else silent
    cost = _estimate(open_plan(config, processes, report), report)
    report(Progress(cost.line()))
    if (reason := cost.shortage(config.out)) is not None:
        report(Progress(f"warning: {reason}"))
    processes.close()
    return cost


def _estimate(plan: ExtractionPlan, report: Report) -> Cost:
    """The cost, measured in all processes at once: alone, one would have the cores of the others."""
    plan.processes.wait()
    cost = estimate(plan, _measuring(report))
    # Stores are begun only when nobody looks any more whether they may be.
    plan.processes.wait()
    return cost


def open_plan(
    config: ExtractRunConfig, processes: Processes, progress: Report = silent
) -> ExtractionPlan:
    """The extraction that the config describes, with data set and model loaded.

    Raises:
        KeyError: an unknown backbone or layer.
        ValueError: a setting can't be.
    """
    config.check()
    dataset = open_dataset(config.data)
    options = config.backbone
    if config.mode == "as_code" and options.image_size is None:
        options = replace(options, image_size=AS_CODE_SIZE)
    if options.device == "auto":
        options = replace(options, device=processes.device)
    backbone = load_backbone(options, layers=config.layers)
    if config.random_weights is not None:
        untrained(backbone, config.random_weights)
    if processes.main:
        dataset = hashed(dataset, progress)
    accelerated = device_of(options.device).type == "cuda"
    plan = ExtractionPlan(
        dataset,
        backbone,
        config.out,
        replace(
            config,
            timesteps=_matched(config, backbone),
            workers=_workers(accelerated) if config.workers == "auto" else config.workers,
        ),
        _texts(config, dataset, options.device),
        config.provenance | {"captions_sha256": captions_sha256(config.prompts)},
        config.resume,
        processes,
    )
    if config.batch_size == "auto" and accelerated:
        plan = fitted(plan)
        progress(Progress(f"batch size: {plan.batch_size}, which fits the device"))
    if config.compile:
        compile_backbone(backbone)
    return plan


def _measuring(report: Report) -> Measured:
    """Shows the measurements of a plan as they are made."""
    title = "measuring the first images"
    return lambda done, total: report(Progress(done=done, total=total, unit="step", title=title))


def _is_extraction(path: Path) -> bool:
    """Whether a `config.yaml` is of an earlier extraction, and not of a run in the same folder."""
    entries = parse_yaml(read_text(path), str(path))
    known = isinstance(entries, dict) and {"layers", "pool", "shard_rows"} <= set(entries)
    return known and not (path.parent / "manifest.json").exists()


def _workers(accelerated: bool) -> int:
    """Processes that read ahead, a share of the machine's cores for each of its processes."""
    if not accelerated:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // local_world_size()))


def _matched(config: ExtractConfig, backbone: Backbone) -> tuple[int, ...]:
    """The model's own timesteps."""
    if config.match_snr is None:
        return config.timesteps
    own = schedule_of(backbone)
    if own is None:
        raise ValueError(f"{backbone.name} has no noise schedule: leave match_snr out")
    reference = reference_schedule(config.match_snr)
    return tuple(own.match(reference, timestep) for timestep in config.timesteps)


def _texts(config: ExtractConfig, dataset: ImageDataset, device: str) -> dict[str, Texts]:
    """The texts of every prompt policy but ``empty``, by the images' indices."""
    skip = config.data.on_error == "skip"
    texts: dict[str, Texts] = {}
    for policy in config.prompts:
        if check_policy(policy) != "empty":
            all_texts = prompt_texts(policy, dataset, device=device, skip_unreadable=skip)
            texts[policy] = lambda indices, texts=all_texts: [texts[index] for index in indices]
    return texts


def _summary(plan: ExtractionPlan, stores: list[ActivationStore], seconds: float) -> str:
    """What was written, a store a line, and which images were skipped."""
    cache = plan.config.vae_cache
    lines, total = [], 0
    for store in [*stores, *([ActivationStore.open(cache)] if cache else [])]:
        shape = " x ".join(map(str, store.row_shape))
        each = f" ({plural(store.cells, 'cell')} an image)" if store.cells else ""
        stored = f"{plural(len(store), 'row')}{each} of {shape} {store.manifest['dtype']}"
        lines.append(f"{store.path}  {stored}, {size(store.bytes)}")
        total += store.bytes
    skipped = stores[0].manifest["skipped"]
    lines += [f"skipped {printable(name)}: {printable(reason)}" for name, reason in skipped[:5]]
    if len(skipped) > 5:
        where = stores[0].path / "manifest.json"
        lines.append(f"skipped {len(skipped) - 5} more: see `skipped` in {where}")
    many = len(stores) + bool(cache)
    return "\n".join(
        [*lines, f"{plural(many, 'store')} in {plan.out}, {size(total)}, in {duration(seconds)}"]
    )
