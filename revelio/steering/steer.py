"""Edits at work: a diffusers pipeline draws with more or less of a concept.

    with steered(pipeline, concept, -0.5):
        pictures = pipeline("a street", num_inference_steps=50).images

A text encoder is called for the prompt, then, where guidance is on, for the negative prompt: the change is
added to the first and, as published, subtracted from the second, so that guidance amplifies it (SPEC 7).
Which call it is follows from the pipeline's own order: a generation begins with `check_inputs`. Nothing of
the pipeline is changed; at the end, also after an error, all is as it was. Strength 0 does nothing at all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import signature
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers, is_compiled
from revelio.backbones.hooks import edit, hooked
from revelio.steering.concept import Concept
from revelio.steering.edits import Branch, Direction, Edit, check_number, check_word
from revelio.wording import plural

SIGNS: Mapping[str, tuple[float, float]] = {
    "opposed": (1.0, -1.0),
    "conditional": (1.0, 0.0),
    "both": (1.0, 1.0),
}


@contextmanager
def steered(
    pipeline: Any,
    concept: Concept,
    strength: float,
    *,
    branch: Branch | None = None,
    timesteps: tuple[int, int] | None = None,
    mask: Float[Tensor, "h w"] | None = None,
) -> Iterator[None]:
    """Draw with more of a concept (strength above 0) or with less (below).

    Args:
        pipeline: a diffusers pipeline, or its :class:`PipelineLayers`.
        concept: what to steer by; it names the layer.
        strength: what its vector is multiplied by.
        branch: see :class:`Edit`, also of the next two.
        timesteps: at which steps of the denoiser.
        mask: at which cells of the denoiser's layer.

    Raises:
        KeyError: the pipeline has no such layer.
        ValueError: a pipeline of an unknown kind; the concept is of another width; or see :func:`edited`.
    """
    one = concept.edit(strength, branch=branch, timesteps=timesteps, mask=mask)
    with edited(pipeline, [one]):
        yield


@contextmanager
def edited(pipeline: Any, edits: Sequence[Edit]) -> Iterator[None]:
    """Make several edits, of one layer or of several, while the block runs; they are made in order.

    Raises:
        KeyError: the pipeline has no such layer.
        ValueError: a pipeline of an unknown kind, a strength that is no number, an edit of another width, one
            that the layer can't have, or a part that torch.compile was applied to.
    """
    layers = pipeline if isinstance(pipeline, PipelineLayers) else PipelineLayers(pipeline)
    for one in edits:
        _check(layers, one)
    active = [one for one in edits if one.strength != 0]
    with ExitStack() as stack:
        if active:
            texts = {layers.is_text(one.layer) for one in active}
            calls = stack.enter_context(_following(layers, texts))
        for one in active:
            functions = {
                part: edit(_function(layers, calls, one, part, first, width))
                for part, (first, width) in _spans(layers, one.layer).items()
            }
            stack.enter_context(hooked(layers.owner(one.layer), functions, exact=False))
        yield


class _Calls:
    """Which call of a generation runs.

    Attributes:
        texts: how often each text encoder has been called since the generation began.
        timestep: the denoiser's, in training steps.
        guided: the conditional rows of the denoiser's batch, or for each whether it is; None: all are.
    """

    def __init__(self) -> None:
        self.texts: dict[nn.Module, int] = {}
        self.timestep: float | Tensor = -1.0
        self.guided: slice | Tensor | None = None


@contextmanager
def _following(layers: PipelineLayers, texts: set[bool]) -> Iterator[_Calls]:
    """Follow a pipeline's calls of its text encoders (True in ``texts``) and of its denoiser (False)."""
    calls = _Calls()
    takes = signature(layers.denoiser.forward)

    def begin(*_arguments: Any) -> None:
        calls.texts.clear()

    def count(encoder: nn.Module, *_arguments: Any) -> None:
        calls.texts[encoder] = calls.texts.get(encoder, 0) + 1

    def look(_denoiser: nn.Module, args: Any, kwargs: Any) -> None:
        given = takes.bind(*args, **kwargs).arguments
        calls.timestep = given["timestep"]
        calls.guided = _guided(layers, given)

    with ExitStack() as stack:
        if False in texts:
            handle = layers.denoiser.register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        if True in texts:
            for encoder in layers.encoders.values():
                stack.callback(encoder.register_forward_pre_hook(count).remove)
            stack.enter_context(_before(layers.pipeline, "check_inputs", begin))
            stack.enter_context(_before(layers.pipeline, "encode_prompt", _encoding(begin)))
        yield calls


def _encoding(begin: Callable[[], None]) -> Callable[[Mapping[str, Any]], None]:
    def look(given: Mapping[str, Any]) -> None:
        # All but Flux's encode both branches in one call, which may also come from the user.
        if "do_classifier_free_guidance" in given:
            begin()
        if given.get("prompt_embeds") is not None:
            raise ValueError("prompt_embeds are encoded already: to steer, give the prompt as text")

    return look


@contextmanager
def _before(owner: Any, name: str, look: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Call ``look`` with the arguments of a method, before each call of it."""
    method = getattr(owner, name)
    takes = signature(method)

    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = takes.bind(*args, **kwargs)
        given.apply_defaults()
        look(given.arguments)
        return method(*args, **kwargs)

    outer = vars(owner).get(name)
    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        if outer is None:
            delattr(owner, name)
        else:
            setattr(owner, name, outer)


def _guided(layers: PipelineLayers, given: Mapping[str, Any]) -> slice | Tensor | None:
    """Which rows of the denoiser's batch are conditional; None: all."""
    kind, denoiser = layers.kind, layers.denoiser
    if kind.batch == "null class":
        return given["class_labels"] != denoiser.config.num_embeds_ada_norm
    if kind.batch == "first half" and layers.pipeline.do_classifier_free_guidance:
        rows = len(next(iter(given.values())))
        return slice(rows // 2, None)
    return None


def _spans(layers: PipelineLayers, layer: str) -> dict[str, tuple[int, int]]:
    """The parts of a layer, with the first channel and the number of channels of each."""
    spans: dict[str, tuple[int, int]] = {}
    first = 0
    for part, width in layers.parts(layer).items():
        spans[part] = (first, width)
        first += width
    return spans


def _branch(layers: PipelineLayers, one: Edit) -> Branch:
    """The branch of an edit that names none."""
    if one.branch is not None:
        return one.branch
    if not layers.is_text(one.layer) and layers.kind.batch == "separate calls":
        return "both"
    return "opposed" if isinstance(one.change, Direction) else "conditional"


def _check(layers: PipelineLayers, one: Edit) -> None:
    check_number(one.strength, "the strength")
    branch = _branch(layers, one)
    check_word("branch", branch, get_args(Branch))
    parts = layers.parts(one.layer)
    width = sum(parts.values())
    if len(parts) > 1 and not isinstance(one.change, Direction):
        raise ValueError(
            f"{one.layer} joins encoders that run one after the other: only a direction can be added there"
        )
    if width != one.width:
        raise ValueError(
            f"an edit of width {one.width} for layer {one.layer} of {layers.name}, which is {width} wide: "
            "it was made for another model or layer"
        )
    text = layers.is_text(one.layer)
    if text and (one.timesteps is not None or one.mask is not None):
        raise ValueError(
            f"layer {one.layer} is a text encoder's: it runs once, before the denoiser, so it has "
            "no timesteps and no mask"
        )
    if not text and layers.kind.batch == "separate calls" and branch != "both":
        raise ValueError(
            f"the denoiser of {layers.kind.title} is called for each branch by itself: branch "
            f"{branch} can't be told apart there, take both"
        )
    part = layers.encoder_of(one.layer) if text else layers.denoiser
    if is_compiled(part):
        raise ValueError(
            f"torch.compile was applied to the {'text encoder' if text else 'denoiser'} of {one.layer}: "
            "compiled code does not call hooks; steer the pipeline as it was before"
        )


def _function(
    layers: PipelineLayers, calls: _Calls, one: Edit, part: str, first: int, width: int
) -> Callable[[Tensor], Tensor]:
    """What replaces the output of ``part``, whose channels begin at ``first`` of the edit's."""
    plus, minus = SIGNS[_branch(layers, one)]
    text = layers.is_text(one.layer)

    def on_text(output: Float[Tensor, "b t d"]) -> Tensor:
        sign = plus if calls.texts[layers.encoder_of(part)] == 1 else minus
        if sign == 0:
            return output
        return output + sign * one.strength * _change(one, output, first, width)

    def changed(output: Tensor) -> Tensor:
        guided = calls.guided
        if guided is None or plus == minus:
            return output + one.strength * _on_cells(one, output)
        if minus == 0 and isinstance(guided, slice):
            found = output.clone()
            found[guided] += one.strength * _on_cells(one, output[guided])
            return found
        rows = _rows(guided, output)
        change = one.strength * torch.where(rows, plus, minus).to(output) * _on_cells(one, output)
        # Which rows of a class-conditional batch are whose is known on the device alone.
        return output + change if minus else torch.where(rows, output + change, output)

    def on_denoiser(output: Tensor) -> Tensor:
        within = _in_range(layers, calls, one)
        if within is False:
            return output
        return changed(output) if within is True else torch.where(within, changed(output), output)

    return on_text if text else on_denoiser


def _rows(guided: slice | Tensor, output: Tensor) -> Tensor:
    """Whether each row is conditional, to be multiplied with the output."""
    if isinstance(guided, slice):
        rows = torch.zeros(len(output), dtype=torch.bool, device=output.device)
        rows[guided] = True
    else:
        rows = guided.to(output.device)
    return rows.view(-1, *[1] * (output.ndim - 1))


def _change(one: Edit, output: Tensor, first: int, width: int) -> Tensor:
    if width == one.width:
        return one.change(output)
    # Of a joined layer each part adds its own channels; such an edit reads none of them.
    shape = (*output.shape[:-1], one.width)
    return one.change(output.new_empty(()).expand(shape))[..., first : first + width]


def _on_cells(one: Edit, output: Tensor) -> Tensor:
    """The change of a grid (b c h w) or of tokens (b t c), masked."""
    grid = output.ndim == 4
    cells = output.flatten(2).transpose(1, 2) if grid else output
    change = one.change(cells)
    if one.mask is not None:
        mask = _mask(one, output)
        change = change * mask.to(cells, non_blocking=not mask.is_cuda)[None, :, None]
    if not grid:
        return change
    height, width = output.shape[-2:] if change.shape[1] > 1 else (1, 1)
    return change.transpose(1, 2).unflatten(2, (height, width))


def _mask(one: Edit, output: Tensor) -> Float[Tensor, " s"]:
    mask = one.mask
    assert mask is not None
    cells = output.shape[2] * output.shape[3] if output.ndim == 4 else output.shape[1]
    fits = (
        tuple(mask.shape) == tuple(output.shape[2:]) if output.ndim == 4 else mask.numel() == cells
    )
    if not fits:
        size = "x".join(map(str, output.shape[2:])) if output.ndim == 4 else plural(cells, "token")
        raise ValueError(
            f"a mask of {'x'.join(map(str, mask.shape))} for layer {one.layer}, whose grid is {size} here"
        )
    return mask.flatten()


def _in_range(layers: PipelineLayers, calls: _Calls, one: Edit) -> bool | Bool[Tensor, "1"]:
    """Whether the edit is made at this timestep; told on the device where that is, so that no host waits."""
    if one.timesteps is None:
        return True
    now = torch.as_tensor(calls.timestep).flatten()[:1].double() * layers.kind.time_scale
    within = (now >= one.timesteps[0]) & (now <= one.timesteps[1])
    return within if within.is_cuda else bool(within)
