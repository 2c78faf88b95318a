"""Forward hooks on a model's layers: one context manager to read them and to edit them.

    found: dict[str, Tensor] = {}
    with hooked(model, {"up_ft1": capture(found, "up_ft1")}):        # reads
        model.predict(x_t, 25, model.conditioning([""]))
    with hooked(model, {"up_ft1": edit(lambda h: h + direction)}):   # edits: steering, ablation
        model.predict(x_t, 25, model.conditioning([""]))

A function is given the layer's own output, in the model's number format and layout: a grid (b c h w) from a
U-Net, tokens (b t c) from a transformer. What it returns takes the output's place; None leaves it as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

Hook = Callable[[Tensor], Tensor | None]


class HasLayers(Protocol):
    """Any model that says where a layer's output appears."""

    def module(self, layer: str) -> nn.Module:
        """The module whose output is the layer.

        Where it gives several tensors, the layer is the one at the model's ``output_position``, or the first.
        """
        ...


class _Done(Exception):
    """The deepest layer that is wanted has been computed."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in float32 are computed in float32: cuDNN's default on CUDA is TF32."""
    cudnn: Any = torch.backends.cudnn
    place, name, exact = cudnn, "allow_tf32", False
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # set by PyTorch's newer names, which the older one can't be mixed with
        place, name, exact = cudnn.conv, "fp32_precision", "ieee"
        before = cudnn.conv.fp32_precision
    setattr(place, name, exact)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def hooked(
    model: HasLayers, functions: Mapping[str, Hook], *, exact: bool = True
) -> Iterator[None]:
    """Call a function on the output of each layer that the model computes while the block runs.

    Args:
        model: a backbone, or anything else with ``module(layer)``.
        functions: by layer; see :func:`capture` and :func:`edit`. The hooks are removed at the end, also
            after an error. Blocks may be nested: the outer block's function is called first.
        exact: compute float32 convolutions in float32 meanwhile (:func:`full_precision`); False leaves the
            number formats as they are, as generation wants.

    Raises:
        KeyError: a layer that the model does not have.
    """
    with ExitStack() as stack:
        for layer, function in functions.items():
            module = model.module(layer)
            hook = _forward_hook(function, getattr(model, "output_position", 0))
            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
            _before_others(module)
        if exact:
            stack.enter_context(full_precision())
        yield


def capture(found: dict[str, Tensor], layer: str) -> Hook:
    """A function for :func:`hooked` that stores the layer's output as ``found[layer]``."""

    def store(output: Tensor) -> None:
        found[layer] = output

    return store


def edit(function: Callable[[Tensor], Tensor]) -> Hook:
    """A function for :func:`hooked` that puts ``function(output)`` in the output's place.

    The result is brought to the output's device and number format.

    Raises:
        ValueError: during the pass, if the result has another shape.
    """

    def replace(output: Tensor) -> Tensor:
        edited = function(output)
        if edited.shape != output.shape:
            raise ValueError(
                f"an edit turned a layer's output of shape {tuple(output.shape)} into "
                f"{tuple(edited.shape)}: it must keep the shape"
            )
        return edited.to(output)

    return replace


def read_layers(
    model: HasLayers, layers: Sequence[str], run: Callable[[], Any], *, until: str | None = None
) -> dict[str, Tensor]:
    """The outputs of ``layers`` while ``run`` is called, in the order of ``layers``.

    Args:
        model: what has the layers.
        layers: their names.
        run: a call of the model.
        until: the layer after which the pass is given up, so that no time is spent beyond it; None runs to
            the end.
    """
    found: dict[str, Tensor] = {}
    functions = {layer: _until(capture(found, layer), layer == until) for layer in layers}
    with hooked(model, functions), suppress(_Done):
        run()
    return {layer: found[layer] for layer in layers}


def _until(function: Hook, last: bool) -> Hook:
    def stop(output: Tensor) -> None:
        function(output)
        raise _Done

    return stop if last else function


def _before_others(module: nn.Module) -> None:
    """Call our hooks before anybody else's: transformers collects `hidden_states` by hooks of its own."""
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__module__", None) != __name__:
            module._forward_hooks[key] = module._forward_hooks.pop(key)


def _forward_hook(function: Hook, position: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Any, ...]) -> Any:
        if not isinstance(output, tuple):
            return function(output)
        # Some versions of transformers' blocks give a tuple with the hidden states first; blocks that join
        # text and image give both.
        changed = function(output[position])
        before, after = output[:position], output[position + 1 :]
        return None if changed is None else (*before, changed, *after)

    return hook


def tokens_to_grid(
    tokens: Float[Tensor, "b t c"], height: int, width: int
) -> Float[Tensor, "b c {height} {width}"]:
    """Patch tokens in row-major order -> a grid: token i stands at (i // width, i % width).

    The released DiT classifier views the tokens as (b c h w) without the transpose, which mixes
    channels and positions (SPEC 2.7, D4).
    """
    batch, _, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, channels, height, width)


def as_activation(output: Tensor) -> Tensor:
    """What a backbone hands out: float32, contiguous, no matter how the model computed it."""
    return output.detach().float().contiguous()


def block_list(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer of transformers'; they have stood at different depths in its versions."""
    return next(
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and path.split(".")[-1] in ("block", "layer", "layers")
    )
