"""What every loader does with the settings: device, number format, attention kernel, silence."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from revelio.distributed import device_of
from revelio.trust import printable
from revelio.wording import plural

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("sdpa", "eager")
# Held while a library makes a model.
LOADING = RLock()

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LoadSettings:
    """How a model is to be loaded: what :func:`revelio.backbones.registry.load_backbone` was asked for.

    Raises:
        ValueError: an unknown dtype or attention, or a device that can't be used.
    """

    layers: Sequence[str] | None = None
    image_size: int | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    device: str = "auto"

    def __post_init__(self) -> None:
        dtype_of(self.dtype)
        check_attention(self.attention)
        device_of(self.device)

    @property
    def number_format(self) -> torch.dtype:
        """``dtype`` as torch's."""
        return dtype_of(self.dtype)

    @property
    def place(self) -> torch.device:
        """``device`` as torch's."""
        return device_of(self.device)

    def side(self, own: int, multiple: int, name: str) -> int:
        """The side of the square pictures in pixels: ``own``, the model's, unless one was asked for.

        Raises:
            ValueError: it is no positive multiple of ``multiple``.
        """
        return check_image_size(self.image_size or own, multiple, name)


def dtype_of(name: str) -> torch.dtype:
    """The number format of a name.

    Raises:
        ValueError: it is none of float32, bfloat16, float16.
    """
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose from {', '.join(DTYPES)}")
    return DTYPES[name]


def check_attention(name: str) -> str:
    """Raise a ValueError if it is no attention kernel that Revelio offers."""
    if name not in ATTENTION:
        raise ValueError(f"unknown attention {name!r}: choose from {', '.join(ATTENTION)}")
    return name


def use_eager_attention(model: nn.Module) -> None:
    """Make diffusers' attention modules compute softmax(q k) v step by step."""
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor, AttnProcessor

    for module in model.modules():
        if isinstance(module, Attention):
            # In DeepFloyd-IF the text has keys and values of its own.
            joint = module.added_kv_proj_dim is not None
            processor: Any = AttnAddedKVProcessor() if joint else AttnProcessor()
            module.set_processor(processor)


def attention_kernel(name: str) -> AbstractContextManager[object]:
    """Inside, torch's own attention is computed step by step if ``name`` is ``eager``."""
    return sdpa_kernel(SDPBackend.MATH) if name == "eager" else nullcontext()


def frozen(model: M, device: torch.device, *, convolutional: bool = False) -> M:
    """The model on its device, in evaluation mode, without gradients.

    Convolutions get channels last on a CPU, and on CUDA in half precision, where tensor cores take that
    layout: on a CPU in bfloat16 a cut SD-1.5 U-Net is 1.3 times as fast with it, its VAE twice; in float32
    the VAE and small U-Nets gain 4 to 12 %.
    """
    model.eval().requires_grad_(False)
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if convolutional and (device.type == "cpu" or (device.type == "cuda" and half)):
        return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


def check_image_size(size: int, multiple: int, name: str) -> int:
    """The side of the square, if the model can take it.

    Raises:
        ValueError: it is no positive multiple of ``multiple``.
    """
    if size <= 0 or size % multiple:
        below = max(multiple, size // multiple * multiple)
        raise ValueError(
            f"image_size {size} doesn't fit {name}: it takes multiples of {multiple}, "
            f"such as {below} or {below + multiple}"
        )
    return size


def check_batch(count: int, ids: Sequence[str], prompts: Sequence[str] | None) -> None:
    """Raise a ValueError unless there is one id, and one prompt if any, an image."""
    if len(ids) != count:
        raise ValueError(
            f"{plural(count, 'image')} but {plural(len(ids), 'id')}: give one an image"
        )
    if isinstance(prompts, str) or (prompts is not None and len(prompts) != count):
        given = "one text" if isinstance(prompts, str) else plural(len(prompts), "prompt")
        raise ValueError(
            f"{plural(count, 'image')} but {given}: give a list with one prompt an image"
        )


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library makes of broken files into one line that names them; quiet meanwhile.

    Raises:
        ValueError: anything was raised inside.
        OutOfMemoryError: a device's memory ran out, of which the files know nothing.
    """
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on the libraries' own calls
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Of any kind: a library's type checks, tokenizers' own Exception, a size that memory can't hold.
        lines = printable(error).strip().split("\\n")
        reason = (lines[0] or type(error).__name__).rstrip(".:")
        raise ValueError(f"{what} can't be loaded: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Load models without the libraries' own progress bars and advice; restores both after.

    One thread at a time: while transformers and accelerate make a model they replace methods of classes that
    all threads share (tied weights stay apart meanwhile), and may restore another thread's replacement.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with LOADING:
        before = []
        for log in (diffusers_logging, transformers_logging):
            before.append((log, log.get_verbosity(), log.is_progress_bar_enabled()))
            log.set_verbosity_error()
            log.disable_progress_bar()
        try:
            yield
        finally:
            for log, verbosity, bar in before:
                log.set_verbosity(verbosity)
                if bar:
                    log.enable_progress_bar()
