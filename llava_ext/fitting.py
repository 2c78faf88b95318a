"""A stage and its GPU's memory: one line where it can't fit; the batch that does, where memory ran out.

The loss of a step does not depend on how its effective batch is cut, so a run may go on with another
`batch_size`, and with activations recomputed: what :func:`recut` lets pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llava_ext.config import TrainConfig
from llava_ext.deepspeed import in_bfloat16, is_partitioned, memory, zero_stage
from llava_ext.stages import StageOptions
from revelio.config import completed, structure, to_yaml
from revelio.device_memory import largest, release
from revelio.distributed import own_device, world_size
from revelio.machine import size as shown
from revelio.trust import parse_yaml
from revelio.wording import plural

if TYPE_CHECKING:
    from llava_ext.dataset import Collator, ConversationDataset
    from llava_ext.training import LlavaTrainer

# Settings of a stage that may change between a run and its continuation.
CUTS = ("batch_size", "checkpointing")


def recut(config: TrainConfig) -> Callable[[str], str]:
    """:func:`revelio.config.completed`, with the settings :data:`CUTS` as they are now."""
    fill_up = completed(config)

    def adopt(text: str) -> str:
        was: Any = structure(type(config), parse_yaml(fill_up(text), "config.yaml"))
        now = {name: getattr(config.stage, name) for name in CUTS}
        return to_yaml(replace(was, stage=replace(was.stage, **now)))

    return adopt


def refuse_shortage(model: torch.nn.Module, options: StageOptions) -> None:
    """Say before a stage begins that its GPU can't hold it, whatever the batch.

    Raises:
        ValueError: weights, gradients and optimiser alone take more than is free.
    """
    if not torch.cuda.is_available() or options.offload or options.deepspeed is not None:
        return
    world = world_size()
    zero, bfloat16 = zero_stage(options), in_bfloat16(options)
    needed = memory(model, zero=zero, processes=world, bfloat16=bfloat16)
    room = torch.cuda.mem_get_info(own_device())[0] + sum(_held(model))
    if needed > room:
        raise ValueError(
            f"the GPU has {shown(room)} free, and weights, gradients and optimiser take {shown(needed)} in "
            f"each of {plural(world, 'process', 'processes')} (activations come on top): set stage.zero to 3 "
            "and start more processes, or set stage.offload, lora.rank (an adapter) or load_in (4bit)"
        )


def _held(model: torch.nn.Module) -> Iterator[int]:
    """Bytes of the model that are on the GPU already."""
    for parameter in model.parameters():
        own = getattr(parameter, "ds_tensor", parameter)
        yield own.nbytes if own.is_cuda else 0


def too_large(
    trainer: "LlavaTrainer",
    dataset: "ConversationDataset",
    collator: "Collator",
    options: StageOptions,
    error: torch.OutOfMemoryError,
) -> ValueError:
    """What to say when a step went beyond a GPU's memory: which batch fits instead, and how to go on."""
    release(error)
    model: Any = trainer.model
    model.zero_grad(set_to_none=True)
    batch, found, verb = options.batch_size, options.batch_size // 2, "may fit"
    # Several processes would wait for each other, and DeepSpeed's gradients are its own.
    if world_size() == 1 and not options.zero and not is_partitioned(model):
        verb = "fits"
        longest = sorted(range(len(dataset)), key=lambda index: -dataset.lengths[index])
        halves = [batch >> times for times in range(1, batch.bit_length())]
        found = largest(
            halves, lambda size: _passes(trainer, collator([dataset[n] for n in longest[:size]]))
        )
    # Halves alone keep the effective batch.
    while found and options.effective_batch % (found * world_size()):
        found //= 2
    if not found:
        return ValueError(
            f"batch_size {batch} goes beyond the GPU's memory, and so does a single sample: resume with "
            "stage.checkpointing, or start anew with stage.zero 3 on more processes, stage.offload or "
            "lora.rank"
        )
    return ValueError(
        f"batch_size {batch} goes beyond the GPU's memory: {found} {verb}; resume with stage.batch_size "
        f"{found} (the effective batch stays {options.effective_batch}, and so do the losses)"
    )


def _passes(trainer: "LlavaTrainer", batch: dict[str, Any]) -> None:
    """A step's passes, of which nothing stays."""
    model: Any = trainer.model
    try:
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            model(**inputs).loss.backward()
    finally:
        model.zero_grad(set_to_none=True)
