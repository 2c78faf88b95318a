"""How well a k-SAE reconstructs and how it uses its latents: all on the sparse code, in one pass.

Fraction of variance unexplained: sum of squared errors / sum of squared deviations from the mean row.
A latent is active on a row if its kept value is not zero (in `fixed` mode: is positive); L0 is the number
of active latents a row, a latent's density the share of rows it is active on, and a latent is dead if it
is active on none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.sae.inputs import Source
from revelio.sae.kernels.base import Codes
from revelio.sae.model import KSparseAutoencoder

# Edges of the density histogram, in log10: from one row in a hundred million to every row.
DENSITY_EDGES = tuple(-8 + 0.5 * i for i in range(17))


class Spread(NamedTuple):
    """What rows are like as a whole.

    Attributes:
        rows: how many there are.
        mean: of each dimension.
        variance: mean squared deviation from ``mean``, over all elements.
        power: mean square, over all elements.
    """

    rows: int
    mean: Float[Tensor, " d"]
    variance: float
    power: float


class SpreadSums:
    """Running sums for :class:`Spread`, in double precision.

    They are taken about the first batch's mean, so that a large common offset costs no digits.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, batch: Float[Tensor, "b d"]) -> None:
        """Take a batch in."""
        x = batch.double()
        if self._sums is None:
            origin = x.mean(0)
            self._sums = origin, torch.zeros_like(origin), torch.zeros_like(origin)
        origin, total, square = self._sums
        x = x - origin
        self._sums = origin, total + x.sum(0), square + (x * x).sum(0)
        self.rows += len(x)

    def result(self) -> Spread:
        """The spread of all rows taken in.

        Raises:
            ValueError: there were none, or they hold NaN or infinity.
        """
        if self._sums is None or self.rows == 0:
            raise ValueError("there are no rows: extract activations first")
        origin, total, square = self._sums
        shift = total / self.rows
        mean, deviation = origin + shift, square / self.rows - shift * shift
        variance = float(deviation.mean().clamp(min=0))
        power = variance + float((mean * mean).mean())
        if not power < float("inf"):
            raise ValueError("the rows hold NaN or infinity: extract the activations again")
        return Spread(self.rows, mean.float(), variance, power)


def spread(batches: Iterable[Float[Tensor, "b d"]]) -> Spread:
    """The mean and variance of all rows, in one pass.

    Raises:
        ValueError: there are no rows, or they hold NaN or infinity.
    """
    sums = SpreadSums()
    for batch in batches:
        sums.add(batch)
    return sums.result()


class ActivityCounts:
    """On how many rows each latent is active, counted as codes stream by."""

    def __init__(self, n: int) -> None:
        self.rows = 0
        self.counts: Int64[Tensor, " n"] = torch.zeros(n, dtype=torch.int64)

    def add(self, codes: Codes) -> None:
        """Take the codes of a batch in."""
        active = codes.indices[codes.values != 0].cpu()
        self.counts += torch.bincount(active, minlength=len(self.counts))
        self.rows += len(codes.values)

    @property
    def l0(self) -> float:
        """Active latents a row, on average."""
        return float(self.counts.sum()) / max(self.rows, 1)

    @property
    def dead_share(self) -> float:
        """The share of latents that are active on no row."""
        return float((self.counts == 0).double().mean())

    def density_histogram(self) -> dict[str, Any]:
        """See :func:`density_histogram`."""
        return density_histogram(self.counts, self.rows)


def density_histogram(counts: Int64[Tensor, " n"], rows: int) -> dict[str, Any]:
    """Latents by log10 of their density: ``edges`` (one more than ``latents``), ``latents``.

    Dead latents, which have no logarithm, are in no bin.

    Args:
        counts: on how many rows each latent is active.
        rows: of how many.
    """
    density = (counts[counts > 0].double() / max(rows, 1)).log10()
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    # A density of exactly 1 belongs to the last bin, anything sparser than the first edge to the first.
    bins = (torch.bucketize(density, edges, right=True) - 1).clamp_(0, len(edges) - 2)
    return {
        "edges": list(DENSITY_EDGES),
        "latents": torch.bincount(bins, minlength=len(edges) - 1).tolist(),
    }


@dataclass(frozen=True)
class Metrics:
    """A k-SAE measured on rows; see the module's text.

    Attributes:
        rows: how many.
        fvu: fraction of variance unexplained, 0 is perfect.
        mse: mean squared error over all elements.
        l0: active latents a row.
        dead_share: share of latents active on no row.
        density: the histogram of :meth:`ActivityCounts.density_histogram`.
    """

    rows: int
    fvu: float
    mse: float
    l0: float
    dead_share: float
    density: dict[str, Any]


@torch.no_grad()
def evaluate(
    model: KSparseAutoencoder, batches: Iterable[Float[Tensor, "b d"]], source: Source = None
) -> Metrics:
    """Measure a k-SAE in one pass over the rows, in memory that does not grow with them.

    Args:
        model: the k-SAE.
        batches: the rows.
        source: which input of the k-SAE they are of; see :meth:`KSparseAutoencoder.encode`.

    Raises:
        ValueError: there are no rows, they do not vary, or NaN or infinity is in them or in what they are
            reconstructed as.
    """
    sums, activity, error = SpreadSums(), ActivityCounts(model.n), 0.0
    for batch in batches:
        codes = model.encode(batch, source)
        difference = model.decode(codes, source) - batch.to(model.b_dec.device)
        error += float(difference.double().square().sum())
        activity.add(codes)
        sums.add(batch)
    found = sums.result()
    if found.variance == 0:
        raise ValueError("all rows are the same, so no variance can be explained: give more images")
    mse = error / (found.rows * model.d)
    if not isfinite(mse / found.variance):
        raise ValueError("reconstructions are not finite: train again with a lower learning_rate")
    return Metrics(
        found.rows,
        mse / found.variance,
        mse,
        activity.l0,
        activity.dead_share,
        activity.density_histogram(),
    )
