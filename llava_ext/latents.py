"""What a k-SAE finds inside a vision-language model, which of it carried an answer, and answers without it.

    tower0      the tokens that the projector of tower 0 gets                (i t c)
    projected0  what it makes of them                                        (i t d)
    block5      the output of the language model's block 5                   (b L d)

Layers are read and edited by the hooks of the house (:mod:`revelio.backbones.hooks`). To first order, taking
latent l away at token c changes the log-probability of an answer by minus

    effect = z_cl (W_dec[l] . d log p(answer) / d x_c)           gradient x activation

with z the k-SAE's codes of the tokens x, and W_dec in their scale where the k-SAE normalizes them.
:func:`ablation_check` says whether that holds: it takes the latents with the largest effects away, and as
many random ones that fire on the same picture.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from llava_ext.config import IGNORE_INDEX
from llava_ext.model import LlavaModel
from llava_ext.projector import token_raster
from revelio.backbones.hooks import edit, hooked
from revelio.sae.model import KSparseAutoencoder
from revelio.seeds import generator
from revelio.stats import mean95, rounded
from revelio.steering.edits import LatentChange, check_number, in_activations
from revelio.wording import plural

OFF = "off"
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model as :func:`revelio.backbones.hooks.hooked` takes them."""

    model: LlavaModel

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All layers by name."""
        projectors = [cast(Any, each) for each in self.model.projectors]
        language_model = cast(nn.Module, self.model.language_model)
        lists = [each for each in language_model.modules() if isinstance(each, nn.ModuleList)]
        blocks = max(lists, key=len, default=[])
        return (
            {f"tower{i}": each.tokens for i, each in enumerate(projectors)}
            | {f"projected{i}": each for i, each in enumerate(projectors)}
            | {f"block{i}": each for i, each in enumerate(blocks)}
        )

    def module(self, layer: str) -> nn.Module:
        """Where a layer's output appears.

        Raises:
            KeyError: an unknown layer; the message lists the known ones.
        """
        found = self.modules
        if layer not in found:
            raise KeyError(f"no layer {layer!r}: choose from {', '.join(found)}")
        return found[layer]


def raster(model: LlavaModel, layer: str) -> tuple[int, int]:
    """Rows and columns of the cells that a layer's tokens of a picture stand for; of a block tower 0's."""
    return tower_raster(model, tower_of(layer) or 0)


def tower_raster(model: LlavaModel, tower: int) -> tuple[int, int]:
    """Rows and columns of a tower's tokens."""
    return token_raster(model.settings.towers[tower], model.shapes[tower].grid)


def has_cells(model: LlavaModel, tower: int) -> bool:
    """Whether a tower's tokens stand for cells of its picture; a resampler's each see all of it."""
    return model.settings.towers[tower].tokens != "resample"


def tower_of(layer: str) -> int | None:
    """Which tower a layer belongs to; None of the language model's blocks, which hold all towers' tokens."""
    found = re.fullmatch(r"(?:tower|projected)(\d+)", layer)
    return int(found[1]) if found else None


def log_probabilities(model: LlavaModel, batch: Batch) -> Float[Tensor, " b"]:
    """Log-probability of each sample's learned tokens, given all that stands before each.

    Args:
        model: whose answers they are.
        batch: of :class:`llava_ext.dataset.Collator`, with grids.
    """
    found = model.embed(
        batch["input_ids"], batch["attention_mask"], batch["labels"], batch["grids"]
    )
    inputs = {"inputs_embeds": found.embeddings, "attention_mask": found.attention_mask}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    assert found.labels is not None
    targets = found.labels[:, 1:]
    picked = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return (picked * (targets != IGNORE_INDEX)).sum(1)


@dataclass(frozen=True)
class Effects:
    """The latents that fire on one sample, each at each token, largest effect first.

    Attributes:
        latents: which latent.
        tokens: at which token of the layer: of a tower, its cell in reading order.
        activations: how strongly it fires there.
        effects: gradient x activation, in units of log-probability.
    """

    latents: Int64[Tensor, " e"]
    tokens: Int64[Tensor, " e"]
    activations: Float[Tensor, " e"]
    effects: Float[Tensor, " e"]

    def chosen(self, which: Tensor) -> "Effects":
        """Some of them."""
        parts = (self.latents, self.tokens, self.activations, self.effects)
        return Effects(*(part[which] for part in parts))

    def __len__(self) -> int:
        return len(self.latents)

    def by_latent(self, count: int) -> list[tuple[int, float]]:
        """The latents with the largest effect summed over tokens."""
        latents, place = self.latents.unique(return_inverse=True)
        sums = torch.zeros(len(latents)).index_add_(0, place, self.effects)
        order = sums.argsort(descending=True)[:count]
        return [(int(latents[i]), float(sums[i])) for i in order]


def attribute(
    model: LlavaModel, batch: Batch, layer: str, ksae: KSparseAutoencoder
) -> list[Effects]:
    """Which latents at which tokens carried each sample's answer.

    Args:
        model: in evaluation mode.
        batch: with labels on the answers; one picture a sample where the layer is a tower's or projected.
        layer: of :class:`ModelLayers`.
        ksae: trained on the layer's tokens.

    Raises:
        KeyError: an unknown layer.
        ValueError: the k-SAE is of another width, or scales several stores each in its own way; or samples
            don't have one picture each.
    """
    seen: list[Tensor] = []

    def watch(output: Tensor) -> Tensor:
        _check_width(layer, ksae, output)
        seen.append(output.detach().requires_grad_())
        return seen[0]

    with torch.enable_grad(), hooked(ModelLayers(model), {layer: watch}):
        total = log_probabilities(model, batch).sum()
        (gradient,) = torch.autograd.grad(total, seen)
    tokens = seen[0].detach()
    samples, length, _ = tokens.shape
    if samples != len(batch["input_ids"]):
        raise ValueError(
            f"{plural(samples, 'picture')} for {plural(len(batch['input_ids']), 'question')}: attribution "
            "wants one picture each"
        )
    with torch.no_grad():
        codes = ksae.encode(tokens.flatten(0, 1))
    # Where the k-SAE is, which need not be the model's device.
    slopes = gradient.flatten(0, 1).to(codes.values)
    rows = in_activations(ksae, ksae.W_dec.detach()[codes.indices])
    along = torch.einsum("nkd,nd->nk", rows, slopes)
    values = codes.values.view(samples, length, -1)
    effects = codes.values.mul(along).view(samples, length, -1)
    place = torch.arange(length)[:, None].expand_as(values[0])
    indices = codes.indices.view(samples, length, -1)
    return [
        _sorted(indices[s], place, values[s].float().cpu(), effects[s].cpu())
        for s in range(samples)
    ]


def _sorted(indices: Tensor, place: Tensor, values: Tensor, effects: Tensor) -> Effects:
    """What fires of one sample, largest effect first."""
    fires = values != 0
    found = Effects(indices.cpu()[fires], place[fires], values[fires], effects[fires])
    return found.chosen(found.effects.argsort(descending=True, stable=True))


def removal(
    ksae: KSparseAutoencoder, removed: Sequence[Effects], shape: torch.Size
) -> Float[Tensor, "s t d"]:
    """What each sample's latents contribute to its tokens: to be taken away from them."""
    delta = torch.zeros(shape)
    directions = ksae.W_dec.detach().cpu()
    for sample, some in enumerate(removed):
        parts = some.activations[:, None] * directions[some.latents]
        delta[sample].index_add_(0, some.tokens, in_activations(ksae, parts))
    return delta


@torch.no_grad()
def without(
    model: LlavaModel,
    batch: Batch,
    layer: str,
    ksae: KSparseAutoencoder,
    removed: Sequence[Effects],
) -> Float[Tensor, " b"]:
    """:func:`log_probabilities` with some latents taken away at their tokens; the rest stays as it is."""

    def take(x: Tensor) -> Tensor:
        return x - removal(ksae, removed, x.shape).to(x)

    with hooked(ModelLayers(model), {layer: edit(take)}):
        return log_probabilities(model, batch)


def ablation_check(
    model: LlavaModel,
    batches: Sequence[Batch],
    layer: str,
    ksae: KSparseAutoencoder,
    *,
    count: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """How much the answers' log-probability falls without the top latents, and without random ones.

    Args:
        model: in evaluation mode.
        batches: at least two samples in all; see :func:`attribute`.
        layer: of :class:`ModelLayers`.
        ksae: trained on the layer's tokens.
        count: (latent, token) pairs that are taken away of each sample; half of those that fire, where there
            are fewer than twice as many.
        seed: of the random ones, drawn from those that fire on the same sample and are not among the top.

    Returns:
        Means over samples with 95 % intervals: ``top``, ``random``, their paired ``difference``, and
        ``predicted``, the fall that the top ones' effects add up to.
    """
    falls: dict[str, list[float]] = {name: [] for name in ("top", "random", "predicted")}
    for number, batch in enumerate(batches):
        found = attribute(model, batch, layer, ksae)
        pairs = [top_and_random(each, count, seed, number, i) for i, each in enumerate(found)]
        top, random = zip(*pairs, strict=True)
        with torch.no_grad():
            before = log_probabilities(model, batch)
        for name, removed in (("top", top), ("random", random)):
            falls[name] += (before - without(model, batch, layer, ksae, removed)).tolist()
        falls["predicted"] += [float(each.effects.sum()) for each in top]
    gaps = [a - b for a, b in zip(falls["top"], falls["random"], strict=True)]
    return {
        "layer": layer,
        "pairs": count,
        "answers": len(gaps),
        **{name: _mean(values) for name, values in (*falls.items(), ("difference", gaps))},
    }


def top_and_random(found: Effects, count: int, *key: int) -> tuple[Effects, Effects]:
    """The ``count`` pairs of latent and token with the largest effects, and as many random ones of the rest.

    Both are fewer where fewer than twice as many fire: otherwise the control would be of fewer pairs.
    """
    count = min(count, len(found) // 2)
    order = torch.randperm(len(found) - count, generator=generator("ablation", *key))
    return found.chosen(torch.arange(count)), found.chosen(count + order[:count])


def _mean(values: Sequence[float]) -> dict[str, float]:
    return rounded(sum(values) / len(values), mean95(values))


def read_edits(
    edits: Sequence[str], ksaes: Mapping[str, KSparseAutoencoder]
) -> list[tuple[str, LatentChange]]:
    """``LAYER:LATENT:STRENGTH`` or ``LAYER:LATENT:off`` as changes of layers.

    Raises:
        ValueError: one is of another form, or there is no k-SAE of its layer.
    """
    found = []
    for text in edits:
        layer, latent, strength = [*text.split(":"), "", ""][:3]
        if text.count(":") != 2 or not latent.isdecimal():
            raise ValueError(
                f"edit {text!r}: give LAYER:LATENT:STRENGTH, or LAYER:LATENT:{OFF} to ablate it"
            )
        if layer not in ksaes:
            known = f", only of {', '.join(ksaes)}" if ksaes else ""
            raise ValueError(
                f"edit {text!r}: no k-SAE of layer {layer!r} was given{known}: give {layer}=FOLDER as `ksae`"
            )
        value = 0.0 if strength == OFF else check_number(strength, f"the strength of {text!r}")
        operation = "ablate" if strength == OFF else "add"
        found.append((layer, LatentChange(ksaes[layer], {int(latent): value}, operation)))
    return found


def edited(
    model: LlavaModel, changes: Sequence[tuple[str, LatentChange]]
) -> AbstractContextManager[None]:
    """The model with its layers changed at all tokens, for as long as the block runs.

    Raises:
        KeyError: an unknown layer.
        ValueError: during a pass, if a k-SAE is of another width than its layer.
    """
    functions: dict[str, list[LatentChange]] = {}
    for layer, change in changes:
        functions.setdefault(layer, []).append(change)
    hooks = {layer: edit(partial(_changed, layer, some)) for layer, some in functions.items()}
    return hooked(ModelLayers(model), hooks, exact=False)


def _changed(layer: str, changes: Sequence[LatentChange], x: Tensor) -> Tensor:
    """All changes of a layer, each read off the unchanged tokens."""
    for change in changes:
        _check_width(layer, change.ksae, x)
    return x + sum(change(x) for change in changes)


def _check_width(layer: str, ksae: KSparseAutoencoder, x: Tensor) -> None:
    if ksae.d != x.shape[-1]:
        raise ValueError(
            f"the k-SAE of {layer} takes {plural(ksae.d, 'channel')} and the layer has {x.shape[-1]}: give a "
            "k-SAE of this layer"
        )


def read_ksaes(given: Sequence[str]) -> dict[str, KSparseAutoencoder]:
    """``LAYER=FOLDER`` each, as k-SAEs by layer.

    Raises:
        ValueError: one is of another form, or holds no k-SAE.
    """
    found = {}
    for text in given:
        layer, _, folder = text.partition("=")
        if not layer or not folder:
            raise ValueError(f"k-SAE {text!r}: give LAYER=FOLDER, such as tower0=runs/ksae")
        found[layer] = KSparseAutoencoder.from_pretrained(folder)
    return found
