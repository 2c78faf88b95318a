"""The heavy parts of a k-SAE, behind one small interface, with codes kept sparse.

Of a batch's n latents only k an image are active, so everything after the encoder's product touches
few rows: decoding sums k rows of ``W_dec`` (an embedding bag), a code's gradient is k dot products, and
the gradient of an active latent's row is a weighted sum of the images that it fired on. No (b n) code and
no (n d) gradient is ever made; tests compare with a kernel that makes both. Weights are stored a latent a
row: ``W_enc`` (n d) and ``W_dec`` (n d), Eq. 3 and 4.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.sae.optim import AdamRows, AdamStep


class Codes(NamedTuple):
    """Sparse codes: the kept latents of every image, largest first."""

    values: Float[Tensor, "b k"]
    indices: Int64[Tensor, "b k"]


@dataclass(frozen=True)
class Weights:
    """The four parameters of a k-SAE, updated in place."""

    W_enc: Float[Tensor, "n d"]
    b_enc: Float[Tensor, " n"]
    W_dec: Float[Tensor, "n d"]
    b_dec: Float[Tensor, " d"]


@dataclass(frozen=True)
class Gradient:
    """A batch's gradient, factored: e terms (latent, image), never multiplied out.

    ``dW_dec[j] = sum of values[i] * outputs[i's output]`` and ``dW_enc[j] = sum of gradients[i] *
    inputs[i's image]`` over the terms i with latent j.
    """

    latents: Int64[Tensor, " e"]
    images: Int64[Tensor, " e"]
    output_rows: Int64[Tensor, " e"]
    values: Float[Tensor, " e"]
    gradients: Float[Tensor, " e"]
    inputs: Float[Tensor, "b d"]
    outputs: Float[Tensor, "o d"]
    b_dec: Float[Tensor, " d"]

    def by_latent(self) -> "Gradient":
        """The terms that are not zero, ascending by latent and, within one, by image."""
        kept = ((self.values != 0) | (self.gradients != 0)).nonzero()[:, 0]
        order = kept[self.latents[kept].argsort(stable=True)]
        return replace(
            self,
            latents=self.latents[order],
            images=self.images[order],
            output_rows=self.output_rows[order],
            values=self.values[order],
            gradients=self.gradients[order],
        )


class Kernel(Protocol):
    """What a training step needs that is worth making fast."""

    def encode(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        among: Bool[Tensor, " n"] | None = None,
        k_among: int = 0,
    ) -> tuple[Codes, Codes | None]:
        """The k largest pre-activations, and the ``k_among`` largest of the latents in ``among``."""
        ...

    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """The code times ``rows`` (``W_dec`` for a reconstruction), without a bias."""
        ...

    def code_gradients(
        self, codes: Codes, outputs: Float[Tensor, "b d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b k"]:
        """The gradient of the kept values, from the gradient of what :meth:`decode` gave."""
        ...

    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """Scale the decoder's moving rows to unit length, in place."""
        ...

    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        """One Adam step of all parameters, in place.

        The component of ``dW_dec`` along the decoder's rows is taken off first; with
        ``step.unit_norm`` the updated decoder rows are scaled to unit length.
        """
        ...


def writes(tensor: Tensor) -> int | None:
    """How often PyTorch has written to a tensor; None of one of inference mode, where nobody counts.

    Kernels write by its address, which does not count: a copy is theirs until somebody else writes.
    """
    return None if tensor.is_inference() else tensor._version


@runtime_checkable
class Selective(Protocol):
    """A kernel that is faster where the codes of some latents alone are wanted."""

    def encode_some(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        only: Bool[Tensor, " n"],
        least: float,
    ) -> Codes:
        """Of the k largest pre-activations those of the latents in ``only``; zeros fill up a row.

        What is not above ``least`` may be missing.
        """
        ...
