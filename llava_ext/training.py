"""One stage of training: transformers' Trainer around a :class:`LlavaModel`, with DeepSpeed or without.

The loss of a step is the mean over all labels of its effective batch, so it does not depend on how many
processes share the batch or how it is cut. Towers stand outside: the input step runs them where grids are
not cached. A checkpoint holds what trains and the optimiser; ``final/`` is what a user loads.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llava_ext import deepspeed
from llava_ext.callbacks import EpochCallback, LoggingCallback
from llava_ext.dataset import Collator, ConversationDataset
from llava_ext.deepspeed import deepspeed_settings, in_bfloat16, on_cpu
from llava_ext.model import LlavaModel, innermost
from llava_ext.reading import Careful, CarefulCollator, raised
from llava_ext.sampler import StepSampler
from llava_ext.stage_checkpoints import (
    TRAINED,
    begin,
    commit,
    drop_checkpoints,
    pass_over_frozen,
    readable,
    trained_parameters,
    without_frozen,
)
from llava_ext.stages import StageOptions
from llava_ext.towers import Tower, look
from revelio.disk import full_disk_named
from revelio.distributed import world_size
from revelio.files import write_whole_by
from revelio.tensor_files import read_tensors
from revelio.wording import plural


def accumulation(effective_batch: int, batch_size: int, processes: int) -> int:
    """Batches a process adds up before a step.

    Raises:
        ValueError: the effective batch can't be had with these.
    """
    if min(effective_batch, batch_size) < 1:
        raise ValueError(
            f"effective_batch {effective_batch} and batch_size {batch_size} must be at least 1"
        )
    at_once = batch_size * processes
    if effective_batch % at_once:
        raise ValueError(
            f"effective_batch {effective_batch} is not a multiple of "
            f"{plural(processes, 'process', 'processes')} times batch_size {batch_size} = {at_once}: choose "
            "another batch_size"
        )
    return effective_batch // at_once


class LlavaTrainer(Trainer):
    """The Trainer with towers in its input step, our order of samples, and small checkpoints."""

    towers: Sequence[Tower] = ()
    sampler: StepSampler
    keep: int = 1
    projector_rate: float | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return self.sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, with groups of their own for the projectors where they have their own rate."""
        if self.optimizer is not None or self.projector_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        projectors = set(cast(LlavaModel, self.model).projectors.parameters())
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if parameter in projectors]
            group["params"] = [each for each in group["params"] if each not in projectors]
            if own:
                optimizer.add_param_group(group | {"params": own, "lr": self.projector_rate})
        optimizer.param_groups[:] = [each for each in optimizer.param_groups if each["params"]]
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, *given: Any) -> Any:
        """The batches of a step; what a worker could not read is raised here."""
        return super().get_batch_samples(map(raised, epoch_iterator), *given)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the towers on what has no grids yet; the model never sees a tower.

        Pixels and grids don't pass through the Trainer, which would round them to DeepSpeed's number format:
        towers give the same grids here as when a cache is filled and when questions are answered.
        """
        inputs = dict(raised(inputs))
        pixels, ids = inputs.pop("pixels", None), inputs.pop("image_ids", ())
        questions, grids = inputs.pop("questions", None), inputs.pop("grids", ())
        inputs = super()._prepare_inputs(inputs)
        if pixels:
            pairs = zip(self.towers, pixels, strict=True)
            with torch.no_grad():
                grids = tuple(
                    look(tower, each.to(self.args.device), ids, questions) for tower, each in pairs
                )
        return inputs | {"grids": tuple(each.to(self.args.device) for each in grids)}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        hook = None
        if self.is_deepspeed_enabled:
            # What is frozen is read from where it came from: of a 7B model it is 13 GB a checkpoint.
            engine: Any = self.model_wrapped
            save = type(engine).save_checkpoint
            engine.save_checkpoint = partial(save, engine, exclude_frozen_parameters=True)
            # DeepSpeed leaves a tied weight in by its second name.
            hook = engine.module.register_state_dict_post_hook(without_frozen)
        super()._save_optimizer_and_scheduler(output_dir)
        if hook is not None:
            hook.remove()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains, into a checkpoint; DeepSpeed writes its own share of everything."""
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        if self.is_deepspeed_enabled or not self.args.should_save:
            return
        trained = {name: p.detach().cpu() for name, p in trained_parameters(self.model).items()}
        write_whole_by(Path(output_dir) / TRAINED, lambda path: save_file(trained, path))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, then say that it is whole, then remove older ones."""
        place = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with full_disk_named(place):
            if self.args.should_save:
                begin(place)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                commit(place)
                drop_checkpoints(place.parent.parent, self.keep)

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """Take no step beyond the last: of a part of an epoch, the Trainer would on a resume."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **named)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Load a checkpoint's states, DeepSpeed's too."""
        with readable(Path(resume_from_checkpoint)) if resume_from_checkpoint else nullcontext():
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(Path(checkpoint)) if checkpoint else nullcontext():
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        trained = trained_parameters(self.model)
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        state = read_tensors(Path(resume_from_checkpoint) / TRAINED, shapes)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state[name])

    def end(self) -> None:
        """Free what shares the gradients, then leave the group of processes.

        It is freed under the interpreter's lock: as the last to hold gloo's group, it would wait for a thread
        of the group that may wait for the lock.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()
        super().end()


def build_trainer(
    model: LlavaModel,
    dataset: ConversationDataset,
    collator: Collator,
    options: StageOptions,
    arguments: TrainingArguments,
    *,
    towers: Sequence[Tower] = (),
    validation: ConversationDataset | None = None,
    watch: LoggingCallback | None = None,
) -> LlavaTrainer:
    """The Trainer of one stage; ``model.trainable`` was called.

    Args:
        model: on the CPU.
        dataset: the samples.
        collator: makes batches of them.
        options: of the stage.
        arguments: of :func:`training_arguments`.
        towers: run on images whose grids are not cached.
        validation: samples whose loss is measured, if ``arguments`` say when.
        watch: what follows the training.

    Raises:
        ValueError: the effective batch or the attention can't be had, or a tracker is not installed.
    """
    _set_attention(model, options.attention)
    set_number_formats(model, arguments, options)
    model.register_load_state_dict_post_hook(pass_over_frozen)
    # The Trainer makes its folder at once: in `out`, where no run is opened yet, that one is a run's.
    checkpoints = str(arguments.output_dir)
    arguments.output_dir = str(Path(checkpoints).parent)
    try:
        trainer = LlavaTrainer(
            model=model,
            args=arguments,
            data_collator=CarefulCollator(collator),
            train_dataset=Careful(dataset),
            eval_dataset=Careful(validation) if validation else None,
            callbacks=[watch or LoggingCallback(None)],
        )
    except RuntimeError as error:
        if not options.track:
            raise
        raise ValueError(f"a tracker of `track` can't be used: {error}") from error
    finally:
        arguments.output_dir = checkpoints
    trainer.remove_callback(PrinterCallback)
    trainer.towers = towers
    trainer.keep = options.keep
    trainer.projector_rate = options.projector_rate
    trainer.sampler = StepSampler(
        dataset.lengths,
        options.effective_batch,
        options.seed,
        by_length=options.group_by_length,
    )
    trainer.add_callback(EpochCallback(trainer.sampler))
    # The model's loss has no label at a sample's first position, whatever stands there.
    trainer._loss_shifts_labels = True
    return trainer


def _set_attention(model: LlavaModel, name: str) -> None:
    """Choose how the language model computes attention.

    Raises:
        ValueError: it can't be computed so, by this model or on this machine.
    """
    if name == "auto":
        return
    before = model.language_model.config._attn_implementation
    try:
        model.language_model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`stage.attention: {name}` can't be had here ({reason}): choose sdpa, eager or auto"
        ) from error
    if model.language_model.config._attn_implementation == before != name:
        kind = type(innermost(model.language_model)).__name__
        raise ValueError(
            f"{kind} can't compute attention by `stage.attention: {name}`: choose auto"
        )


def set_number_formats(
    model: LlavaModel, arguments: TrainingArguments, options: StageOptions
) -> None:
    """Keep what trains in float32, and compute in the format asked for.

    AdamW's steps at 2e-5 are smaller than bfloat16's spacing, so that most would be lost. DeepSpeed keeps
    float32 copies itself where it runs in bfloat16; without it, weights stay float32 under autocast.
    """
    if options.attention == "auto" and arguments.bf16 and arguments.use_cpu:
        # The backward pass of SDPA's CPU kernel in bfloat16 took 42 % of a step of SmolLM2-135M.
        model.language_model.set_attn_implementation("eager")
    if arguments.deepspeed and deepspeed.is_partitioned(model):
        # The language model's shares have DeepSpeed's format already, what came after them gets it.
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        for parameter in model.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(dtype)
    elif not arguments.bf16 and any(p.dtype != torch.float32 for p in model.parameters()):
        model.float()
    elif not arguments.deepspeed:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def training_arguments(
    options: StageOptions, out: Path, *, validation: bool = False
) -> TrainingArguments:
    """The stage in the Trainer's words.

    Args:
        options: of the stage.
        out: the run's folder.
        validation: whether there is a validation set.

    Raises:
        ValueError: the effective batch can't be had.
    """
    steps = accumulation(options.effective_batch, options.batch_size, world_size())
    cpu = on_cpu()
    if not options.zero and torch.cuda.device_count() > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs but one process, which would make each batch as many times "
            "as large: start one process a GPU with `torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} -m revelio llava ...`, or choose one by CUDA_VISIBLE_DEVICES"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        eval_strategy="steps" if validation else "no",
        eval_steps=options.save_steps,
        prediction_loss_only=True,
        gradient_accumulation_steps=steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        num_train_epochs=options.epochs,
        optim="adamw_torch",
        bf16=in_bfloat16(options),
        activation_checkpointing=options.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.checkpointing else None,
        save_steps=options.save_steps,
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and "RANK" in os.environ else None,
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed_settings(options) if options.zero else None,
        disable_tqdm=True,
        report_to=list(options.track),
    )


def whole_state(trainer: LlavaTrainer, model: LlavaModel) -> dict[str, torch.Tensor] | None:
    """The weights that ``final/`` needs, gathered from all processes; None where the model has them."""
    engine: Any = trainer.deepspeed if trainer.is_deepspeed_enabled else None
    if engine is None or not engine.zero_optimization_partition_weights():
        return None
    # "16 bit" is DeepSpeed's name: the weights come in the model's own number format.
    return engine._zero3_consolidated_16bit_state_dict(
        exclude_frozen_parameters=not model.language_changed
    )
