"""What a latent does in the model: its share of the activation is taken away, and the output looked at.

The latent's code times its decoder row is taken from the cells of an image: of a k-SAE of pooled activations
the code of their mean from all of them alike, of one of cells each cell's own. Two measures, on what the
model makes of it (:mod:`revelio.evaluation.downstream`: a one-step prediction, or a ViT's embedding):

ablation    For each class the latent that detects it best (of highest F1, on one half of the images). On
            the other half: how much its ablation lowers the log-probability of the class on the class's
            own images, less how much it lowers that of the right class on all other images. High: what it
            stands for goes, and little else. A linear probe of the unchanged outputs reads the class.
effect      The change of the output on the images where a latent is strongest, over that by a random
            direction of the same length on the same images: mean logarithm over the strongest latents. 0:
            the model reads the latent's direction no more than any other.

Beside the controls' latents, ablation has two controls of its own: a random direction of the same length at
the same images, and another latent with as much total code. Where a latent is not active its ablation
changes nothing, by construction, so the change there is no measure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from revelio.analysis.paired import Measured, against, defined, measured
from revelio.evaluation.downstream import Change, Downstream, Reader
from revelio.evaluation.encoded import Encoded
from revelio.evaluation.measures import HeldOut, detector
from revelio.sae.inputs import Source
from revelio.sae.kernels.base import Codes
from revelio.sae.model import KSparseAutoencoder
from revelio.seeds import generator

LATENTS = 20
TOP = 5
RANDOM, OTHER = "a random direction", "another latent of equal mass"


@dataclass(frozen=True)
class _Pairs:
    """Latents and images, from which their share is taken.

    Attributes:
        model: whose latents they are.
        latents: which ones.
        places: of each pair its latent, as a place in ``latents``.
        images: of each pair its image.
        cells: whether each cell has a code of its own.
        source: which input of the k-SAE the activations are of.
    """

    model: KSparseAutoencoder
    latents: Int64[Tensor, " l"]
    places: Int64[Tensor, " p"]
    images: Int64[Tensor, " p"]
    cells: bool
    source: Source

    @classmethod
    def of(
        cls,
        codes: Encoded,
        latents: Int64[Tensor, " l"],
        chosen: Sequence[Int64[Tensor, " i"]],
        images: HeldOut,
        source: Source,
    ) -> "_Pairs":
        """Each latent with the images that were chosen for it."""
        places = torch.cat([torch.full_like(one, place) for place, one in enumerate(chosen)])
        cells = images.rows.ndim == 3
        return cls(codes.model, latents, places, torch.cat(list(chosen)), cells, source)

    @torch.no_grad()
    def share(self, rows: Float[Tensor, "b s d"], part: slice) -> Float[Tensor, "b s d"]:
        """What the latents of some pairs add to the activations of their images; s is 1 for pooled ones."""
        seen = rows if self.cells else rows.mean(1, keepdim=True)
        mine = self.latents[self.places[part]].repeat_interleave(seen.shape[1])[:, None]
        codes = self.model.encode(seen.flatten(0, 1).cpu(), self.source)
        values = (codes.values.clamp(min=0) * (codes.indices == mine)).sum(1, keepdim=True)
        with_it, without = (
            self.model.decode(Codes(one, mine), self.source)
            for one in (values, torch.zeros_like(values))
        )
        return (with_it - without).view_as(seen)

    def without(self, seed: int | None = None) -> Change:
        """Take the share away; or, with a seed, a random direction a latent, as long."""
        directions = None
        if seed is not None:
            draw = generator(seed, "directions to ablate")
            drawn = torch.randn(len(self.latents), self.model.d, generator=draw)
            directions = normalize(drawn, dim=1)[self.places, None]

        def change(rows: Float[Tensor, "b s d"], part: slice) -> Float[Tensor, "b s d"]:
            share = self.share(rows, part)
            if directions is not None:
                share = directions[part] * share.norm(dim=2, keepdim=True)
            return rows - share.to(rows)

        return change


def ablations(
    downstream: Downstream,
    codes: Mapping[str, Encoded],
    images: HeldOut,
    reader: Reader | None,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    source: Source = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both measures of a k-SAE beside its controls.

    Args:
        downstream: the model and the images.
        codes: of the same images, by the k-SAE first, then by the controls.
        images: labels, halves and subsets of the same images.
        reader: the probe; None: no ablation of classes.
        seed: of the random directions.
        confidence: of all intervals of a measure together.
        source: which input of the k-SAE the activations are of.

    Returns:
        ``effect`` and ``ablation``, as :func:`revelio.analysis.paired.against` gives them; and the two parts
        of ``ablation``, in nats: ``own``, ``others``. What has no latent that is active on enough images, or
        none of whose images is in some half, is left out.
    """
    first, *_ = codes
    effects = {name: _effect(downstream, one, images, seed, source) for name, one in codes.items()}
    none = Measured(0.0, torch.zeros(len(images.subsets), dtype=torch.float64))
    found = {"effect": {**effects, RANDOM: none}}
    told = {}
    if reader is not None:
        drops = {
            name: _drop(downstream, one, images, reader, _detectors(one, images), source)
            for name, one in codes.items()
        }
        ours = _detectors(codes[first], images)
        drops[RANDOM] = _drop(downstream, codes[first], images, reader, ours, source, seed)
        others = _of_equal_mass(codes[first], ours)
        drops[OTHER] = _drop(downstream, codes[first], images, reader, others, source)
        found["ablation"] = {name: _selective(one, images) for name, one in drops.items()}
        known = [name for name, one in found["ablation"].items() if one is not None]
        told = {name: _parts(drops[name], images) for name in known}
    entries = {}
    for measure, each in found.items():
        value = each.pop(first)
        if value is not None:
            controls = {name: one for name, one in each.items() if one is not None}
            entries[measure] = against(value, controls, 1, confidence)
    return entries, told


def _effect(
    downstream: Downstream, codes: Encoded, images: HeldOut, seed: int, source: Source
) -> Measured | None:
    latents = codes.strongest(LATENTS, TOP)
    if not len(latents):
        return None
    strongest = [codes.top(one)[0][:TOP] for one in latents.tolist()]
    pairs = _Pairs.of(codes, latents, strongest, images, source)

    def changed(change: Change) -> Float[Tensor, "l top"]:
        gap = downstream.outputs(change, pairs.images) - downstream.unchanged[pairs.images]
        return gap.double().square().flatten(1).sum(1).view(len(latents), TOP)

    own, random = changed(pairs.without()), changed(pairs.without(seed))
    shown = pairs.images.view(len(latents), TOP)

    def mean_log_ratio(kept: Tensor) -> float:
        weights = kept[shown]
        ratios = (own * weights).sum(1) / (random * weights).sum(1)
        # A latent all of whose images are left out says nothing.
        return float(ratios.clamp(min=1e-12).log().nanmean())

    return defined(measured(mean_log_ratio, images.subsets))


def _detectors(codes: Encoded, images: HeldOut) -> Int64[Tensor, " classes"]:
    return torch.tensor([detector(codes, images, one)[0] for one in range(images.classes)])


def _of_equal_mass(codes: Encoded, latents: Int64[Tensor, " classes"]) -> Int64[Tensor, " classes"]:
    """For each latent the one whose codes' sum is nearest, out of all that are none of them."""
    mass = torch.from_numpy(codes.matrix.sum(0)).double().flatten()
    free = torch.ones(len(mass), dtype=torch.bool)
    free[latents] = False
    gaps = (mass[latents][:, None] - mass).abs().masked_fill(~free, torch.inf)
    return gaps.argmin(1)


def _drop(
    downstream: Downstream,
    codes: Encoded,
    images: HeldOut,
    reader: Reader,
    latents: Int64[Tensor, " classes"],
    source: Source,
    random: int | None = None,
) -> Float[Tensor, "classes images"]:
    """How much the ablation of each latent lowers the log-probability of each judged image's own class.

    NaN: the reader never saw the class, whether a latent fires on the image or not.

    ``random``: take a random direction from this seed instead, as long.
    """
    assert images.labels is not None
    fires = (
        torch.from_numpy(codes.matrix[:, latents.numpy()].toarray() > 0) & images.judged[:, None]
    )
    drop = torch.zeros(len(latents), len(images.labels), dtype=torch.float64)
    firing = [column.nonzero()[:, 0] for column in fires.T]
    pairs = _Pairs.of(codes, latents, firing, images, source)
    outputs = downstream.outputs(pairs.without(random), pairs.images)
    truth = images.labels[pairs.images, None]

    def read(found: Tensor) -> Float[Tensor, " p"]:
        features = downstream.features(found, pairs.images)
        return reader.log_probabilities(features).gather(1, truth)[:, 0]

    drop[pairs.places, pairs.images] = read(downstream.unchanged[pairs.images]) - read(outputs)
    return drop.masked_fill(~reader.knows(images.labels), torch.nan)


def _means(
    drop: Float[Tensor, "classes images"], images: HeldOut, kept: Tensor
) -> tuple[Float[Tensor, " classes"], Float[Tensor, " classes"]]:
    """The mean drop on each class's own images and on all others; NaN without an image."""
    assert images.labels is not None
    kept = kept & images.judged & ~drop.isnan().any(0)
    own = (images.labels == torch.arange(len(drop))[:, None]) & kept
    others = ~own & kept
    known = drop.nan_to_num(0.0)
    return tuple((known * part).sum(1) / part.sum(1) for part in (own, others))  # type: ignore[return-value]


def _selective(drop: Float[Tensor, "classes images"], images: HeldOut) -> Measured | None:
    def selectivity(kept: Tensor) -> float:
        own, others = _means(drop, images, kept)
        return float((own - others).nanmean())

    return defined(measured(selectivity, images.subsets))


def _parts(drop: Float[Tensor, "classes images"], images: HeldOut) -> dict[str, float]:
    own, others = _means(drop, images, torch.ones(drop.shape[1], dtype=torch.bool))
    # Of the classes that `_selective` takes, so that it is their difference.
    taken = ~(own - others).isnan()
    return {"own": float(own[taken].mean()), "others": float(others[taken].mean())}
