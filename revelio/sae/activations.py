"""Which latents are active, behind one interface: TopK, BatchTopK, JumpReLU; all on sparse codes.

- ``topk`` (Eq. 3): the k largest pre-activations of each row.
- ``batch-topk`` (Bussmann et al., 2024): while training, the b k largest of the whole batch; afterwards
  all above a threshold, the running mean of the smallest value that a batch kept.
- ``jumprelu`` (Rajamanoharan et al., 2024): all above a threshold of the latent's own, which is learnt
  by straight-through gradients with a rectangular kernel, and a penalty holds L0 near k. Thresholds start
  where k latents a row are active, so that codes are sparse from the first step on.

The last two take from the kernel more than k a row, and again more until none is missed: exact, and
cheap as long as rows are not far fuller than k. Whether one is missed, and how full the fullest row is, the
host asks the device, both at once.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.sae.kernels.base import Codes, Kernel, Selective, Weights
from revelio.sae.optim import AdamStep, Moments, update_vector

# The share of a new batch in BatchTopK's running threshold.
THRESHOLD_RATE = 0.01
# JumpReLU's thresholds are never below this.
SMALLEST = 1e-6


class EncodeRequest(NamedTuple):
    """What an activation chooses from: a batch, the weights, and the dead latents that AuxK wants.

    Where codes of the latents ``only`` are wanted, those of others may be missing.
    """

    kernel: Kernel
    centred: Float[Tensor, "b d"]
    weights: Weights
    among: Bool[Tensor, " n"] | None = None
    k_among: int = 0
    only: Bool[Tensor, " n"] | None = None


class ActivationOutput(NamedTuple):
    """What training goes on with.

    Attributes:
        codes: kept latents; those that only fill up a row have the value 0.
        dead: AuxK's, from the dead latents.
        margins: JumpReLU's pre-activations above their thresholds, of ``codes`` and of near misses.
    """

    codes: Codes
    dead: Codes | None
    margins: Float[Tensor, "b k"] | None = None


class Activation(Protocol):
    """How a k-SAE chooses its active latents."""

    def encode(self, request: EncodeRequest) -> Codes:
        """The codes of a trained k-SAE."""
        ...

    def keep(self, request: EncodeRequest) -> ActivationOutput:
        """The codes of a training step."""
        ...

    def learn(
        self, output: ActivationOutput, gradients: Float[Tensor, "b k"], step: AdamStep
    ) -> None:
        """Adjust the thresholds, from the gradients of the codes' values (near misses included)."""
        ...


@dataclass(frozen=True)
class TopK:
    """See the module's text."""

    k: int
    rectifies: bool

    def encode(self, request: EncodeRequest) -> Codes:
        """See :class:`Activation`."""
        kernel, centred, weights, _, _, only = request
        if only is None or not isinstance(kernel, Selective):
            return self.keep(request).codes
        least = 0.0 if self.rectifies else -math.inf
        codes = kernel.encode_some(centred, weights, self.k, only, least)
        if self.rectifies:
            codes.values.clamp_(min=0)
        return codes

    def keep(self, request: EncodeRequest) -> ActivationOutput:
        """See :class:`Activation`."""
        kernel, centred, weights, among, k_among, _ = request
        codes, dead = kernel.encode(centred, weights, self.k, among if k_among else None, k_among)
        if self.rectifies:
            codes.values.clamp_(min=0)
        if dead is not None:  # AuxK rectifies in every mode, as Gao et al.'s code does
            dead.values.clamp_(min=0)
        return ActivationOutput(codes, dead)

    def learn(
        self, output: ActivationOutput, gradients: Float[Tensor, "b k"], step: AdamStep
    ) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class BatchTopK:
    """See the module's text; ``threshold`` (1) is updated in place."""

    k: int
    n: int
    threshold: Float[Tensor, "1"]

    def encode(self, request: EncodeRequest) -> Codes:
        """See :class:`Activation`."""
        return _above(request, self.k, self.n, self.threshold.clamp(min=0)).codes

    def keep(self, request: EncodeRequest) -> ActivationOutput:
        """See :class:`Activation`."""
        total = len(request.centred) * self.k
        width, dead = min(2 * self.k, self.n), None
        while True:
            codes, more = _first(request, width, dead)
            dead = dead or more
            best = codes.values.flatten().topk(total)
            kept = torch.zeros_like(codes.values, dtype=torch.bool)
            kept.view(-1)[best.indices] = True
            kept &= codes.values > 0
            # Holds of no rows, too, which have no maximum.
            all_found, most = _asked((codes.values[:, -1:] <= best.values[-1:]).all(), kept)
            if width == self.n or all_found:
                break
            width = min(4 * width, self.n)
        if dead is not None:
            dead.values.clamp_(min=0)
        return ActivationOutput(narrowed(codes, kept, most)[0], dead)

    def learn(
        self, output: ActivationOutput, gradients: Float[Tensor, "b k"], step: AdamStep
    ) -> None:
        """See :class:`Activation`."""
        self.follow(output.codes, first=step.t == 1, go=step.go)

    def follow(self, codes: Codes, first: bool, go: Tensor | None = None) -> None:
        """Move the threshold towards the smallest value that a batch kept; from the first batch take it.

        Where nothing was kept, or ``go`` is 0, it stays; nothing waits for a device.
        """
        if not codes.values.numel():
            return
        least = torch.where(codes.values > 0, codes.values, math.inf).min()
        learns = least.isfinite() if go is None else least.isfinite() & (go != 0)
        moved = self.threshold.lerp(least, 1.0 if first else THRESHOLD_RATE)
        self.threshold.copy_(torch.where(learns, moved, self.threshold))


@dataclass(frozen=True)
class JumpReLU:
    """See the module's text; ``threshold`` (n) and ``moments`` are updated in place.

    Args:
        k: what L0 is held near.
        n: latents.
        threshold: of every latent.
        held: the latents that this process's weights are of.
        moments: Adam's, of the thresholds; None: not in training.
        bandwidth: width of the kernel that lets a threshold's gradient through.
        sparsity: weight of ``(L0 / k - 1)^2`` in the loss.
    """

    k: int
    n: int
    threshold: Float[Tensor, " n"]
    held: range
    moments: Moments | None = None
    bandwidth: float = 0.0
    sparsity: float = 0.0

    def encode(self, request: EncodeRequest) -> Codes:
        """See :class:`Activation`."""
        return self.keep(request).codes

    def keep(self, request: EncodeRequest) -> ActivationOutput:
        """See :class:`Activation`."""
        own = self.threshold[self.held.start : self.held.stop]
        weights = replace(request.weights, b_enc=request.weights.b_enc - own)
        floor = own.new_full((1,), -self.bandwidth / 2)
        found = _above(request._replace(weights=weights), self.k, self.n, floor, fill=-math.inf)
        margins, indices = found.codes
        values = torch.where(margins > 0, margins + self.threshold[indices], 0)
        dead = found.dead
        if dead is not None:
            raised = (dead.values + self.threshold[dead.indices]).clamp_(min=0)
            dead = Codes(raised, dead.indices)
        return ActivationOutput(Codes(values, indices), dead, margins)

    def learn(
        self, output: ActivationOutput, gradients: Float[Tensor, "b k"], step: AdamStep
    ) -> None:
        """See :class:`Activation`. The derivatives of the values, and of L0, in the thresholds."""
        assert output.margins is not None and self.moments is not None
        near, latents = output.margins.abs() < self.bandwidth / 2, output.codes.indices
        of_values = -self.threshold[latents] * gradients
        b = len(output.margins)
        excess = (output.margins > 0).sum().double() / b / self.k - 1
        of_count = -self.sparsity * 2 * excess / (self.k * b)
        # Zero where a margin is not near, which adds nothing: picking the others would make the host wait.
        pull = torch.where(near, (of_values + of_count) / self.bandwidth, 0)
        total = torch.zeros_like(self.threshold)
        total.index_put_((latents.flatten(),), pull.flatten(), accumulate=True)
        update_vector(self.threshold, total, self.moments, step)
        self.threshold.clamp_(min=SMALLEST)


def first_threshold(request: EncodeRequest, k: int, n: int) -> float:
    """The pre-activation above which k latents a row are active, on average; positive."""
    least = BatchTopK(k, n, torch.zeros(1)).keep(request).codes.values
    return max(float(least[least > 0].min()) if bool((least > 0).any()) else 0.0, SMALLEST)


def fullest(wanted: Bool[Tensor, "b k"]) -> Int64[Tensor, ""]:
    """How many are wanted of the row that most are wanted of, at least 1; on the device."""
    counts = wanted.sum(1) if len(wanted) else wanted.new_ones(1, dtype=torch.int64)
    return counts.amax().clamp_(min=1)


def narrowed(
    codes: Codes, wanted: Bool[Tensor, "b k"], width: int | None = None
) -> tuple[Codes, Int64[Tensor, "b w"], Bool[Tensor, "b w"]]:
    """The wanted codes; where they stood, and which only fill up.

    Args:
        codes: what to choose from.
        wanted: which of them.
        width: of the result, as :func:`fullest` says; None: it is asked, which the host waits for.
    """
    width = int(fullest(wanted)) if width is None else width
    places = wanted.int().sort(dim=1, descending=True, stable=True).indices[:, :width]
    counts = wanted.gather(1, places)
    values = torch.where(counts, codes.values.gather(1, places), 0)
    indices = torch.where(counts, codes.indices.gather(1, places), 0)
    return Codes(values, indices), places, counts


def _above(
    request: EncodeRequest, k: int, n: int, floor: Float[Tensor, "1"], fill: float = 0.0
) -> ActivationOutput:
    """All codes above ``floor``; what only fills up a row is ``fill``."""
    width, dead = min(2 * k, n), None
    while True:
        codes, more = _first(request, width, dead)
        dead = dead or more
        above = codes.values > floor
        all_found, most = _asked((codes.values[:, -1:] <= floor).all(), above)
        if width == n or all_found:
            break
        width = min(4 * width, n)
    found, _, counts = narrowed(codes, above, most)
    if fill:
        found.values.masked_fill_(~counts, fill)
    return ActivationOutput(found, dead)


def _asked(all_found: Bool[Tensor, ""], wanted: Bool[Tensor, "b k"]) -> tuple[bool, int]:
    """Whether no code is missed, and :func:`fullest`; the device is waited for once, not twice."""
    told = torch.stack([all_found.to(torch.int64), fullest(wanted)]).tolist()
    return bool(told[0]), told[1]


def _first(request: EncodeRequest, width: int, dead: Codes | None) -> tuple[Codes, Codes | None]:
    """The ``width`` largest; AuxK's latents only the first time."""
    if request.k_among == 0 or dead is not None:
        return request.kernel.encode(request.centred, request.weights, width)[0], None
    return request.kernel.encode(
        request.centred, request.weights, width, request.among, request.k_among
    )
