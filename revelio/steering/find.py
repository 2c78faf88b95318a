"""Which latents of a k-SAE stand for a concept: a contrast, chosen on one half, judged on the other.

    m_a, m_b      the mean code of a latent inside the set and outside
    more          m_a - m_b
    specificity   m_a / (m_a + m_b): 1 for a latent that never fires outside

Latents of enough specificity are taken in the order of `more`. How well their summed code separates the two
sets is measured on the half that did not choose them (AUC), beside the same with shuffled membership.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.sae.model import KSparseAutoencoder
from revelio.seeds import generator
from revelio.steering.concept import all_codes


@dataclass(frozen=True)
class Found:
    """The latents of a concept.

    Attributes:
        latents: by number, the one that fires most for the concept first.
        weights: the mean code of each, where the concept is, in the half that chose.
        chosen: rates, means and specificity of each latent, in the half that chose.
        held_out: the same in the other half.
        auc: of the summed codes, in the other half: 0.5 is chance.
        shuffled: that AUC for each of several shuffles of who belongs to the concept.
    """

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    chosen: tuple[dict[str, float], ...]
    held_out: tuple[dict[str, float], ...]
    auc: float
    shuffled: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a report or a concept's card."""
        return {
            "latents": list(self.latents),
            "chosen": list(self.chosen),
            "held_out": list(self.held_out),
            "auc": self.auc,
            "auc_shuffled": list(self.shuffled),
        }


def find_latents(
    inside: Float[Tensor, "a n"],
    outside: Float[Tensor, "b n"],
    *,
    count: int = 8,
    specificity: float = 0.8,
    shuffles: int = 20,
    seed: int = 0,
) -> Found:
    """The latents that fire for one set and not for another.

    Args:
        inside: codes of the concept's pictures or prompts, a row each.
        outside: those of others.
        count: at most so many latents.
        specificity: the least that a latent must have.
        shuffles: of the control.
        seed: of the halves and the shuffles.

    Raises:
        ValueError: a set has fewer than two rows, the sets differ in latents, or no latent is specific
            enough; the message says how specific the best one is.
    """
    if min(len(inside), len(outside)) < 2 or inside.shape[1] != outside.shape[1]:
        raise ValueError(
            f"sets of {len(inside)} and {len(outside)}: a contrast needs two of each at least, one to choose "
            "by and one to judge by, with codes of one k-SAE"
        )
    halves = [_halves(part, seed, name) for part, name in ((inside, "in"), (outside, "out"))]
    (a, held_a), (b, held_b) = halves
    latents = _choose(a, b, count, specificity)
    if not len(latents):
        best = float(_statistics(a, b)[4].max())
        raise ValueError(
            f"no latent fires inside with a specificity of {specificity} or more (the best has {best:.2f}): "
            "lower it, give other sets, or take another layer or k-SAE"
        )
    return Found(
        tuple(latents.tolist()),
        tuple(a[:, latents].mean(dim=0).tolist()),
        _table(a, b, latents),
        _table(held_a, held_b, latents),
        _auc(held_a, held_b, latents),
        tuple(_shuffled(halves, count, specificity, seed, index) for index in range(shuffles)),
    )


@torch.no_grad()
def prompt_codes(
    source: PipelineLayers, layer: str, ksae: KSparseAutoencoder, texts: Sequence[str]
) -> Float[Tensor, "p n"]:
    """The mean code of each latent over the positions of each text, padding included.

    Padding is attended to by the denoisers, and after a causal encoder it says what the text said.
    """
    rows = []
    for text in texts:
        codes = all_codes(ksae, source.tokens([text], layer).states[0], "sparse")
        rows.append(codes.mean(dim=0))
    return torch.stack(rows).cpu()


def _choose(
    a: Float[Tensor, "a n"], b: Float[Tensor, "b n"], count: int, specificity: float
) -> Int64[Tensor, " l"]:
    """The specific latents that fire most, at most ``count``."""
    _, _, mean_a, mean_b, specific = _statistics(a, b)
    more = (mean_a - mean_b).where(specific >= specificity, torch.tensor(0.0))
    order = more.argsort(descending=True, stable=True)[:count]
    return order[more[order] > 0]


def _statistics(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The shares of rows on which each latent fires, its mean codes, and its specificity."""
    rate_a, rate_b = ((part != 0).float().mean(dim=0) for part in (a, b))
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    return rate_a, rate_b, mean_a, mean_b, mean_a / (mean_a + mean_b).clamp(min=1e-12)


def _table(a: Tensor, b: Tensor, latents: Tensor) -> tuple[dict[str, float], ...]:
    names = ("rate", "rate_outside", "mean", "mean_outside", "specificity")
    columns = torch.stack([values[latents] for values in _statistics(a, b)], dim=1)
    return tuple(dict(zip(names, row, strict=True)) for row in columns.tolist())


def _auc(a: Tensor, b: Tensor, latents: Tensor) -> float:
    """How often a row of ``a`` has the larger summed code; ties count half (Mann-Whitney)."""
    one, other = (part[:, latents].sum(dim=1) for part in (a, b))
    larger = (one[:, None] > other).double() + 0.5 * (one[:, None] == other).double()
    return float(larger.mean())


def _halves(rows: Tensor, seed: int, name: str) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(rows), generator=generator(seed, "find latents", name))
    middle = (len(rows) + 1) // 2
    return rows[order[:middle]], rows[order[middle:]]


def _shuffled(
    halves: list[tuple[Tensor, Tensor]], count: int, specificity: float, seed: int, index: int
) -> float:
    """The held-out AUC when membership is drawn by lot: what choosing the best of n latents gives."""
    (a, held_a), (b, held_b) = halves
    draw = generator(seed, "find latents", "shuffle", index)
    both = torch.cat([a, b])
    order = torch.randperm(len(both), generator=draw)
    latents = _choose(both[order[: len(a)]], both[order[len(a) :]], count, specificity)
    if not len(latents):
        return 0.5
    held = torch.cat([held_a, held_b])
    order = torch.randperm(len(held), generator=draw)
    return _auc(held[order[: len(held_a)]], held[order[len(held_a) :]], latents)
