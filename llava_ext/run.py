"""A stage from config to `final/`: open, say what will train and what it costs, train, write."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from llava_ext.adapter import add_lora, quantised
from llava_ext.checkpoint import CONFIG, load_projectors, save_model
from llava_ext.config import FinetuneConfig, ModelConfig, TrainConfig
from llava_ext.dataset import TOKENS, Collator, ConversationDataset, ImageProvider, Pictures
from llava_ext.deepspeed import (
    checkpoint_bytes,
    counted,
    counts,
    deepspeed_settings,
    environment_kept,
    freed_memory_returned,
    in_bfloat16,
    is_partitioned,
    memory,
    zero_stage,
)
from llava_ext.fitting import recut, refuse_shortage, too_large
from llava_ext.fusion import check_alignment
from llava_ext.images import damaged
from llava_ext.import_llava import check_pretrained, import_projectors, projectors_folder
from llava_ext.language import build_model
from llava_ext.llava_json import Record, image_names, read_records
from llava_ext.model import LlavaModel
from llava_ext.stage_checkpoints import (
    check_processes,
    check_state,
    checkpoint_step,
    last_checkpoint,
)
from llava_ext.stage_checks import check_settings
from llava_ext.stage_inputs import record_inputs, stage_inputs
from llava_ext.stages import LoraOptions, Stage, StageOptions
from llava_ext.tower_cache import CachedGrids
from llava_ext.towers import Tower, load_towers, tower_bytes
from llava_ext.training import (
    LlavaTrainer,
    LoggingCallback,
    accumulation,
    build_trainer,
    training_arguments,
    whole_state,
)
from revelio.backbones.loading import dtype_of
from revelio.config import structure, to_plain, to_yaml
from revelio.distributed import is_main, own_device, world_size
from revelio.files import check_folder
from revelio.machine import duration, size
from revelio.run_dir import Run, read_json, write_json
from revelio.text_tables import columns
from revelio.trust import read_json_lines
from revelio.wording import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """Everything one stage needs, loaded and checked."""

    model: LlavaModel
    tokenizer: "PreTrainedTokenizerBase"
    towers: tuple[Tower, ...]
    records: list[Record]
    dataset: ConversationDataset
    collator: Collator
    validation: ConversationDataset | None = None


@environment_kept()
def run(config: TrainConfig) -> None:
    """Train a stage; see the scripts.

    Raises:
        ValueError: config, data, cache or a checkpoint don't fit together, or the stage does not fit the
            GPU's memory: the message names a batch that does.
        KeyError: an unknown backbone, layer or packaged model.
    """
    started = time.monotonic()
    stage: Stage = "finetune" if isinstance(config, FinetuneConfig) else "pretrain"
    if config.resume and (config.out / "report.json").is_file():
        _finish_again(config, stage)
        return
    check_settings(config)
    check_folder(config.out)
    if is_main() and not config.resume and (config.out / "manifest.json").exists():
        raise ValueError(
            f"{config.out} already holds a run: continue it with resume, or choose another folder"
        )
    accumulation(config.stage.effective_batch, config.stage.batch_size, world_size())
    job = open_job(config, stage)
    refuse_shortage(job.model, config.stage)
    loaded = _peak_memory()
    watch = LoggingCallback(None)
    trainer = build_trainer(
        job.model, job.dataset, job.collator, config.stage,
        training_arguments(config.stage, config.out, validation=job.validation is not None),
        towers=job.towers, validation=job.validation, watch=watch,
    )  # fmt: skip
    # Only now: a run that can't begin leaves none behind, which would have to be resumed as it is.
    run_dir = watch.run = _open_run(config, stage, resume=config.resume) if is_main() else None
    if run_dir is not None:
        _record(run_dir, config, job)
        job.dataset.encoded.save(run_dir.path / TOKENS)
    checkpoint = last_checkpoint(config.out) if config.resume else None
    done = checkpoint_step(checkpoint) if checkpoint else 0
    if run_dir is not None:
        run_dir.truncate_metrics(done)
    _say(_plan(job, trainer, config.stage, stage, done))
    if checkpoint is not None:
        check_processes(checkpoint)
        check_state(checkpoint)
        _say(f"going on from step {done}: {checkpoint}")
    with freed_memory_returned() if is_partitioned(job.model) else nullcontext():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            raise too_large(trainer, job.dataset, job.collator, config.stage, error) from error
        state = whole_state(trainer, job.model)
    if run_dir is not None:
        _write(run_dir, job, trainer, state, started, loaded)
    trainer.end()


def _open_run(config: TrainConfig, stage: Stage, *, resume: bool) -> Run:
    return Run.open(
        config.out,
        stage,
        to_yaml(config),
        resume=resume,
        results=("report.json",),
        complete=recut(config),
    )


def _finish_again(config: TrainConfig, stage: Stage) -> None:
    """Finish a run whose report is there: it was stopped at the very end, or not at all."""
    if is_main():
        run_dir = _open_run(config, stage, resume=True)
        if not run_dir.finished:
            run_dir.finish()
        run_dir.close()
    _say(f"this run is finished: see {config.out / 'final'}")


def _record(run_dir: Run, config: TrainConfig, job: Job) -> None:
    """Note what the run reads; say what has changed where that is accepted."""
    held_out = job.validation.records if job.validation is not None else ()
    read = (job.dataset, job.records, job.towers, job.tokenizer, run_dir.path, held_out)
    inputs = stage_inputs(config, *read)
    if said := record_inputs(run_dir, inputs, accept=config.changed_inputs == "accept"):
        _say(f"changed since the run began, which is accepted: {said}")


def open_job(config: TrainConfig, stage: Stage) -> Job:
    """Load data, towers and model, and check that they fit.

    Raises:
        ValueError: they don't; the message names the record, file or setting.
        KeyError: an unknown name.
    """
    if isinstance(config, FinetuneConfig) and config.pretrained is not None:
        check_pretrained(config.pretrained)  # before pictures are decoded for hours
    data = config.data
    read = partial(
        read_records,
        images=data.images,
        bad=config.bad_records,
        decode=partial(damaged, cache=config.out) if _decodes(config) else None,
        files=config.cache is None,
    )
    records = read(data.json, limit=config.limit)
    held_out = read(config.validation_data) if config.validation_data else []
    towers = load_towers(config.model, own_device())
    images = open_images(config.cache, towers, data.images, [*records, *held_out])
    zero = deepspeed_settings(config.stage) if config.stage.zero else None
    bfloat16 = in_bfloat16(config.stage)
    fewer = quantised(config.load_in, bfloat16=bfloat16, device=own_device())
    model, tokenizer = build_model(config.model, towers, seed=config.stage.seed, zero=zero, **fewer)
    encoded = partial(
        ConversationDataset,
        tokenizer=tokenizer,
        config=config.model,
        image_tokens=model.image_tokens,
        images=images,
        too_long=config.too_long,
        bad=config.bad_records,
    )
    dataset = encoded(records, kept=config.out / TOKENS, source=data.json)
    validation = encoded(held_out, source=config.validation_data) if held_out else None
    if isinstance(config, FinetuneConfig):
        _begin_finetune(model, config.pretrained, config.lora, config.stage.seed)
    model.trainable(stage)
    pad: Any = tokenizer.pad_token_id
    collator = Collator(model.image_tokens, pad, images.stack)
    return Job(model, tokenizer, tuple(images.towers), records, dataset, collator, validation)


def _decodes(config: TrainConfig) -> bool:
    """Whether this process looks into the pictures: one does, unless all must know what is left out."""
    here = is_main() or config.bad_records == "skip"
    return config.check_pictures and config.cache is None and here


def open_images(
    cache: Path | None, towers: Sequence[Tower], folder: Path | None, records: Sequence[Record]
) -> ImageProvider:
    """Where images come from: the cache where there is one, else the pictures.

    Raises:
        ValueError: the cache is of other towers or lacks an image.
    """
    if cache is not None:
        return CachedGrids.open(cache, towers, folder, image_names(records))
    return Pictures(folder or Path(), towers)


def _begin_finetune(
    model: LlavaModel, pretrained: Path | None, lora: LoraOptions, seed: int
) -> None:
    """Take stage 1's projectors, put the adapter in.

    Raises:
        ValueError: they are of other towers; or the adapter finds no layer.
    """
    if pretrained is not None:
        if (folder := projectors_folder(pretrained)) is not None:
            _check_towers(folder, model.settings)
            load_projectors(model, folder)
        else:
            import_projectors(model, pretrained)
    if lora.rank:
        add_lora(model, lora, seed=seed)


def _check_towers(folder: Path, wanted: ModelConfig) -> None:
    """Refuse projectors of other towers: those of another timestep would fit without a word."""
    found = structure(ModelConfig, read_json(folder / CONFIG)["model"], where="model.")
    if len(found.towers) != len(wanted.towers) or found.fusion != wanted.fusion:
        raise ValueError(
            f"{folder} has {plural(len(found.towers), 'tower')} and fusion {found.fusion}, the config "
            f"{len(wanted.towers)} and {wanted.fusion}: choose other projectors (`pretrained`)"
        )
    for number, pair in enumerate(zip(found.towers, wanted.towers, strict=True)):
        was, now = (to_plain(tower) for tower in pair)
        for key in was:
            if was[key] != now[key]:
                raise ValueError(
                    f"{folder} was trained with tower {number}'s `{key}` {was[key]!r}, not "
                    f"{now[key]!r}: choose other projectors (`pretrained`) or the same towers"
                )


def _plan(
    job: Job, trainer: LlavaTrainer, options: StageOptions, stage: Stage, done: int = 0
) -> str:
    """What trains, on what, and what the steps that are left cost."""
    names = [f"{tower.backbone} {tower.layer}" for tower in job.model.settings.towers]
    world, data = world_size(), job.dataset
    times = accumulation(options.effective_batch, options.batch_size, world)
    steps = math.ceil(trainer.sampler.steps * options.epochs)
    zero = zero_stage(options)  # the user's own JSON's, where there is one
    bfloat16 = in_bfloat16(options)
    state = memory(job.model, zero=zero, processes=world, bfloat16=bfloat16)
    towers = sum(tower_bytes(tower) for tower in job.towers)
    beside = f", {size(towers)} of towers" if towers else ""
    each = checkpoint_bytes(counts(job.model)[1], zero=zero, bfloat16=bfloat16)
    # An older one goes when the new one is whole.
    most = min(options.keep + 1, math.ceil(steps / options.save_steps))
    left = f" ({done:,} of them done)" if done else ""
    lines = [
        frozen_and_trained(job.model, names),
        f"data: {plural(len(data), 'sample')} of {min(data.lengths)} to "
        f"{plural(max(data.lengths), 'token')}, median {median(data.lengths):.0f}, {job.model.image_tokens} "
        "an image" + (f"; {len(data.dropped)} dropped as too long" if data.dropped else ""),
        f"effective batch: {options.effective_batch} = {plural(world, 'process', 'processes')} "
        f"x {plural(options.batch_size, 'sample')} x {times} accumulated; ZeRO {zero or 'off'}",
        f"plan: {stage}, {plural(steps, 'step')}{left}, peak learning rate {options.learning_rate:g}; "
        f"{_time(job, trainer, options, max(0, steps - done))}",
        f"disk: checkpoints of {size(each)}, at most {most} at once; "
        f"the model {size(_model_bytes(job.model))}",
        f"memory of a process: {size(state)} of weights, gradients and optimiser{beside}, and activations",
        *(f"warning: {text}" for text in check_alignment(job.model.settings.fusion, job.towers)),
    ]
    return "\n".join(lines)


def _model_bytes(model: LlavaModel) -> int:
    """Bytes of the weights in `final/`: adapters in float32, the rest as the config says."""
    each, whole = dtype_of(model.settings.dtype).itemsize, model.language_changed
    return sum(
        counted(parameter) * (4 if "lora_" in name else each)
        for name, parameter in model.named_parameters()
        if whole or "lora_" in name or not name.startswith("language_model.")
    )


def _time(job: Job, trainer: LlavaTrainer, options: StageOptions, steps: int) -> str:
    """How long so many steps will take, measured on one batch of median length where that is cheap."""
    if torch.cuda.is_available() or is_partitioned(job.model):
        return "the bar will tell the time"
    order = sorted(range(len(job.dataset)), key=lambda i: job.dataset.lengths[i])
    middle = max(0, len(order) // 2 - options.batch_size // 2)
    some = order[middle : middle + options.batch_size]
    job.model.train()
    started = time.perf_counter()
    inputs = trainer._prepare_inputs(job.collator([job.dataset[index] for index in some]))
    with trainer.compute_loss_context_manager():
        job.model(**inputs).loss.backward()
    seconds = (time.perf_counter() - started) / len(some)
    job.model.zero_grad(set_to_none=True)
    samples = steps * trainer.sampler.effective_batch
    return f"about {duration(samples * seconds / world_size())} at {seconds:.3g} s a sample"


def _write(
    run_dir: Run,
    job: Job,
    trainer: LlavaTrainer,
    state: dict[str, torch.Tensor] | None,
    started: float,
    loaded: int,
) -> None:
    """The finished model and the report; then say where they are."""
    final = run_dir.path / "final"
    save_model(job.model, job.tokenizer, final, state=state)
    _, trained = counts(job.model)
    lines = list(read_json_lines(run_dir.metrics_path))
    losses, validation = (
        [line[name] for line in lines if name in line] for name in ("loss", "validation_loss")
    )
    report = {
        "steps": trainer.state.global_step,
        "samples": trainer.state.global_step * trainer.sampler.effective_batch,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        **({"validation_loss": validation[-1]} if validation else {}),
        "trained_parameters": trained,
        "processes": world_size(),
        "seconds": round(time.monotonic() - started, 1),
        "loading_memory_bytes": loaded,
        "peak_memory_bytes": _peak_memory(),
    }
    write_json(run_dir.path / "report.json", report)
    run_dir.finish()
    files = [path for path in final.rglob("*") if path.is_file()]
    _say(
        f"{plural(report['steps'], 'step')}, last loss {report['last_loss'] or 0:.4f}, in "
        f"{duration(report['seconds'])}\n"
        f"{final}  {size(sum(path.stat().st_size for path in files))}: the model\n"
        f"{run_dir.metrics_path}: a line a step\n{run_dir.path / 'report.json'}"
    )


def _peak_memory() -> int:
    """The most bytes that this process alone has held so far; ru_maxrss counts kilobytes."""
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def _say(text: str) -> None:
    """Tell the user once, whatever the number of processes."""
    if is_main():
        print(text, flush=True)  # noqa: T201


def frozen_and_trained(model: LlavaModel, towers: Sequence[str] = ()) -> str:
    """A table of what is frozen and what trains, with parameter counts, to be printed before training.

    Args:
        model: after :meth:`LlavaModel.trainable`.
        towers: names of the frozen towers, which are no part of the model.
    """
    rows = [(f"tower {name}", "frozen, outside the model", "") for name in towers]
    names = [f"projector {tower.backbone} {tower.layer}" for tower in model.settings.towers]
    parts = [*zip(names, model.projectors, strict=True), ("language model", model.language_model)]
    everything = trained = 0
    for name, module in parts:
        total, learnt = counts(module)
        everything, trained = everything + total, trained + learnt
        state = "trains" if learnt == total else "frozen" if not learnt else f"{learnt:,} train"
        rows.append((name, state, f"{total:,}"))
    rows.append(("in all", f"{trained:,} train", f"{everything:,}"))
    return columns(rows, "llr")
