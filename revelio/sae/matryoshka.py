"""Matryoshka k-SAEs (Bussmann et al., 2025): the first latents alone reconstruct too.

    loss = mean over the prefixes p (the last is n) of the loss of the reconstruction by latents below p

Bussmann et al. sum the prefixes' losses; the mean is that sum divided by their number, so that the learning
rate, AuxK's and JumpReLU's weights mean the same with any number of prefixes (to have the paper's balance,
multiply ``auxk_coefficient`` and ``sparsity`` by one over the number of prefixes, n included).

Codes are chosen once, of all latents, and split by the smallest prefix that holds them. Part g decodes
into the errors of the prefixes g, g + 1, ...; so errors are running sums over the parts, and the gradient
that reaches a part is the sum over the prefixes from its own on. Nothing is computed twice.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.sae.activations import fullest, narrowed
from revelio.sae.kernels.base import Codes, Kernel


@dataclass(frozen=True)
class Nested:
    """A batch's codes in parts, one for each prefix.

    Attributes:
        codes: all of them.
        parts: the codes of each part.
        places: where a part's codes stand in ``codes``, and which of them only fill up; None: the one part.
    """

    codes: Codes
    parts: list[Codes]
    places: list[tuple[Int64[Tensor, "b w"], Bool[Tensor, "b w"]]] | None

    @classmethod
    def of(cls, codes: Codes, prefixes: tuple[int, ...]) -> "Nested":
        """Split codes by ascending prefixes, to which n is added."""
        if not prefixes:
            return cls(codes, [codes], None)
        # Compared with plain numbers: a copy of them to the device would be waited for.
        beyond = [(codes.indices >= prefix).int() for prefix in prefixes]
        part_of = torch.stack(beyond).sum(0)
        wanted = [part_of == part for part in range(len(prefixes) + 1)]
        # All parts' widths at once: a device is waited for once a step, not once a part.
        widths = torch.stack([fullest(part) for part in wanted]).tolist()
        found = [narrowed(codes, *each) for each in zip(wanted, widths, strict=True)]
        return cls(codes, [f[0] for f in found], [f[1:] for f in found])

    def decoded(self, kernel: Kernel, rows: Float[Tensor, "n d"]) -> list[Float[Tensor, "b d"]]:
        """What each prefix decodes to, without a bias."""
        return list(accumulate(kernel.decode(part, rows) for part in self.parts))

    def outputs(self, grads: list[Float[Tensor, "b d"]]) -> list[Float[Tensor, "b d"]]:
        """What reaches each part, from what reaches each prefix."""
        return list(accumulate(reversed(grads)))[::-1]

    def joined(self, gradients: list[Float[Tensor, "b w"]]) -> Float[Tensor, "b k"]:
        """The parts' gradients in the places of the codes."""
        if self.places is None:
            return gradients[0]
        whole = torch.zeros_like(self.codes.values)
        for (places, counts), gradient in zip(self.places, gradients, strict=True):
            whole.scatter_add_(1, places, gradient * counts)
        return whole
