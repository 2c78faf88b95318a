"""How the two stages train: the paper's Table 11 (SPEC 3.5), each setting once. Nothing here needs torch.

                    pretrain                finetune
    trains          projectors, conv block  projectors and language model (or its LoRA adapter)
    effective batch 128                     128
    learning rate   2e-3, cosine, warm-up 0.03, no weight decay        2e-5, the same
    epochs          1                       1           (the released script says 3)
    ZeRO            2                       3

effective batch = processes * batch_size * accumulation; the accumulation is computed.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from revelio.bounds import (
    Count,
    File,
    Index,
    LearningRate,
    NotEmpty,
    NotNegative,
    PathFields,
    Positive,
    Seed,
    Share,
    Workers,
)

Stage = Literal["pretrain", "finetune"]
LoadIn = Literal["4bit", "8bit"]

EFFECTIVE_BATCH = 128
PRETRAIN_RATE = 2e-3
FINETUNE_RATE = 2e-5
WARMUP = 0.03


@dataclass(frozen=True)
class LoraOptions:
    """A low-rank adapter of the language model in place of all its weights (peft)."""

    rank: Index = 0
    """Rank of the adapter; 0 trains the whole language model."""

    alpha: Count | None = None
    """The adapter is scaled by alpha / rank; none: twice the rank, so that its strength does not depend
    on the rank (LLaVA's own rule: rank 128, alpha 256)."""

    dropout: Share = 0.0
    """Dropout of the adapter's input."""

    targets: Annotated[tuple[str, ...], NotEmpty()] = ("all-linear",)
    """Names of the layers that get one; `all-linear` is every linear layer but the head."""


@dataclass(frozen=True)
class StageOptions(PathFields):
    """How a stage is trained."""

    learning_rate: LearningRate
    """The learning rate at its peak."""

    zero: Literal[0, 2, 3]
    """DeepSpeed's ZeRO stage; 0 trains without DeepSpeed."""

    projector_rate: LearningRate | None = None
    """The projectors' learning rate at its peak; none: that of the rest (LLaVA's `mm_projector_lr`)."""

    offload: bool = False
    """Keep the optimiser's state in host memory, and under ZeRO-3 the weights as well: slower, and a 7B
    model's stage 2 fits smaller GPUs."""

    deepspeed: File | None = None
    """A DeepSpeed JSON of your own in place of what `zero` and `offload` stand for; its batch sizes, clipping
    and number formats may be "auto"."""

    effective_batch: Count = EFFECTIVE_BATCH
    """Samples an optimiser step, over all processes."""

    batch_size: Count = 4
    """Samples a process takes at once."""

    epochs: Positive = 1.0
    """Passes over the data."""

    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """The schedule of the learning rate after the warm-up."""

    warmup: Share = WARMUP
    """Share of the steps in which the learning rate rises."""

    weight_decay: NotNegative = 0.0
    """AdamW's weight decay."""

    clip: Positive = 1.0
    """Gradients longer than this are shortened to it."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 on a GPU, float32 on a CPU."""

    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    group_by_length: bool = True
    """Batches of samples of about one length, so that little is padding."""

    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """How the language model computes attention; `auto`: as transformers chooses for it."""

    save_steps: Count = 1000
    """Steps between checkpoints, and between losses on the validation set."""

    keep: Count = 1
    """Checkpoints kept."""

    log_steps: Count = 1
    """Steps between lines of metrics.jsonl."""

    track: tuple[str, ...] = ()
    """Trackers that transformers knows (`tensorboard`, `wandb`, ...), which are told of every line, too."""

    workers: Workers = 0
    """Processes that read images ahead."""

    threads: Count | None = None
    """Threads of each process on a CPU; none: as torch has it."""

    seed: Seed = 0
    """Seed of new projectors and of the samples' order."""


@dataclass(frozen=True)
class Pretrain(StageOptions):
    """Stage 1."""

    learning_rate: LearningRate = PRETRAIN_RATE
    zero: Literal[0, 2, 3] = 2


@dataclass(frozen=True)
class Finetune(StageOptions):
    """Stage 2."""

    learning_rate: LearningRate = FINETUNE_RATE
    zero: Literal[0, 2, 3] = 3
