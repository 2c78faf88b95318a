"""The kernel in plain PyTorch, for any device: a chunked product, embedding bags, blocks of rows."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.sae.kernels.base import Codes, Gradient, Weights
from revelio.sae.optim import AdamRows, AdamStep, update_vector

# Numbers the encoder's product may hold at once: 16 MiB in float32, which stays near the caches.
BUFFER = 1 << 22


class SparseKernel:
    """Plain PyTorch on any device: chunked product, embedding bags, row blocks."""

    def __init__(self, buffer: int = BUFFER, block: int = 512) -> None:
        self.buffer = buffer
        self.block = block

    @torch.no_grad()
    def encode(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        among: Bool[Tensor, " n"] | None = None,
        k_among: int = 0,
    ) -> tuple[Codes, Codes | None]:
        """See :class:`Kernel`. The (b n) product exists a chunk of latents at a time."""
        b, n = centred.shape[0], weights.W_enc.shape[0]
        width = min(n, max(k, k_among, 256, self.buffer // max(b, 1)))
        buffer = centred.new_empty(b, width)
        best = others = None
        for start in range(0, n, width):
            stop = min(start + width, n)
            part = buffer[:, : stop - start]
            torch.addmm(weights.b_enc[start:stop], centred, weights.W_enc[start:stop].T, out=part)
            best = _merge(best, part, k, start)
            if among is not None:
                part.masked_fill_(~among[start:stop], float("-inf"))
                others = _merge(others, part, k_among, start)
        assert best is not None
        return best, others

    @torch.no_grad()
    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """See :class:`Kernel`."""
        return _bags(codes.indices, rows, codes.values)

    def code_gradients(
        self, codes: Codes, outputs: Float[Tensor, "b d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b k"]:
        """See :class:`Kernel`. Autograd of an embedding bag in its weights: k dot products an image."""
        with torch.enable_grad():
            values = codes.values.detach().requires_grad_()
            product = _bags(codes.indices, rows.detach(), values)
        return torch.autograd.grad(product, values, outputs)[0]

    @torch.no_grad()
    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """See :class:`Kernel`."""
        for block in moments.blocks(self.block):
            block.unit_norm(weights.W_dec)

    @torch.no_grad()
    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        """See :class:`Kernel`. One pass over blocks of the rows that can change at all."""
        if step.go is not None and not bool(step.go):
            return
        gradient = gradient.by_latent()
        latents = gradient.latents
        by_latent = _Columns(
            latents, gradient.images, gradient.output_rows, gradient.values, gradient.gradients
        )
        active = latents.unique_consecutive()
        moments.wake(active, step)
        for block in moments.blocks(self.block):
            rows = block.rows
            d_enc = by_latent.sums(rows, by_latent.images, by_latent.gradients, gradient.inputs)
            d_dec = by_latent.sums(rows, by_latent.output_rows, by_latent.values, gradient.outputs)
            block.update(weights.W_enc, weights.W_dec, d_enc, d_dec, step)
        d_b_enc = torch.zeros_like(weights.b_enc).index_add_(0, latents, by_latent.gradients)
        update_vector(weights.b_enc, d_b_enc, moments.b_enc, step)
        update_vector(weights.b_dec, gradient.b_dec, moments.b_dec, step)


class _Columns(NamedTuple):
    """The terms of a gradient, sorted by latent: a sparse (b n) matrix by columns."""

    latents: Int64[Tensor, " e"]
    images: Int64[Tensor, " e"]
    output_rows: Int64[Tensor, " e"]
    values: Float[Tensor, " e"]
    gradients: Float[Tensor, " e"]

    def sums(
        self,
        rows: Int64[Tensor, " r"],
        sources: Int64[Tensor, " e"],
        weights: Float[Tensor, " e"],
        table: Float[Tensor, "b d"],
    ) -> Float[Tensor, "r d"]:
        """For each latent of the ascending ``rows``, the weighted sum of its terms' table rows.

        A latent between two of ``rows`` must have no terms.
        """
        starts = torch.searchsorted(self.latents, rows)
        end = int(torch.searchsorted(self.latents, rows[-1:], right=True))
        first = int(starts[0])
        if first == end:
            return table.new_zeros(len(rows), table.shape[1])
        return F.embedding_bag(
            sources[first:end],
            table,
            starts - first,
            mode="sum",
            per_sample_weights=weights[first:end],
        )


def _merge(best: Codes | None, part: Float[Tensor, "b c"], k: int, start: int) -> Codes:
    """The k largest of ``best`` and of the chunk ``part``, whose first latent is ``start``."""
    values, indices = part.topk(min(k, part.shape[1]), dim=1)
    indices += start
    if best is None:
        return Codes(values, indices)
    values, indices = torch.cat([best.values, values], 1), torch.cat([best.indices, indices], 1)
    kept, places = values.topk(min(k, values.shape[1]), dim=1)
    return Codes(kept, indices.gather(1, places))


def _bags(
    indices: Int64[Tensor, "b k"], rows: Float[Tensor, "n d"], values: Float[Tensor, "b k"]
) -> Float[Tensor, "b d"]:
    return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=values)
