"""Several processes train one k-SAE: they share the work of every batch, or the latents.

Both are kernels around a kernel, so the training step knows nothing of them, and every process calls the
same things in the same order. All processes hold every batch whole (read in shares by
:class:`SharedRows`); what they exchange is codes, reconstructions and inputs, never the dense gradient.

- :class:`DataParallelKernel`: each process encodes and decodes its share of the batch's rows; with all
  codes and the same inputs, all do the same update.
- :class:`ShardedKernel`: each process holds some latents with their moments. It gives its own k largest;
  the k largest of all of them are the batch's codes, reconstructions are sums over the processes, and
  each updates its own rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from revelio.sae.activations import narrowed
from revelio.sae.dataloader import RowSource, group_of
from revelio.sae.kernels.base import Codes, Gradient, Kernel, Weights
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder, draw_weights
from revelio.sae.optim import AdamRows, AdamStep
from revelio.seeds import generator
from revelio.wording import plural


@dataclass(frozen=True)
class Group:
    """The processes, and the three things they do together.

    Attributes:
        rank: this one, from 0.
        world: how many.
        handle: torch's name for the group; None: all processes.
    """

    rank: int
    world: int
    handle: dist.ProcessGroup | None = None

    @classmethod
    def all(cls) -> "Group":
        """All processes that a launcher started."""
        return cls(dist.get_rank(), dist.get_world_size())

    def apart(self) -> "Group":
        """The same processes with a channel of their own, for another thread's exchanges."""
        return replace(self, handle=dist.new_group())

    def share(self, count: int) -> range:
        """This process's part of ``count`` things; the first processes have as many or more."""
        return self.share_of(self.rank, count)

    def share_of(self, rank: int, count: int) -> range:
        """The part of ``count`` things that falls to process ``rank``."""
        whole, more = divmod(count, self.world)
        start = rank * whole + min(rank, more)
        return range(start, start + whole + (rank < more))

    def gather(self, part: Shaped[Tensor, "b ..."], count: int) -> Shaped[Tensor, "c ..."]:
        """The ``count`` rows of which ``part`` is this process's share, on every process."""
        most = len(self.share_of(0, count))
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded, group=self.handle)
        parts = [found[rank][: len(self.share_of(rank, count))] for rank in range(self.world)]
        return torch.cat(parts)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        dist.all_reduce(tensor, group=self.handle)
        return tensor

    def agree_(self, tensor: Tensor) -> None:
        """Process 0's values on every process, in place."""
        dist.broadcast(tensor, 0, group=self.handle)


class SharedRows:
    """A source of rows of which each process reads a part of every slice; all get all of it.

    Args:
        source: what to read from.
        group: the processes; give ``group.apart()`` where another thread reads ahead.
        device: where the exchange takes place.
    """

    def __init__(self, source: RowSource, group: Group, device: torch.device) -> None:
        self.source, self.processes, self.device = source, group, device

    def __len__(self) -> int:
        return len(self.source)

    @property
    def group(self) -> int:
        """Rows of one image, which lie together."""
        return group_of(self.source)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (b d)."""
        share = self.processes.share(stop - start)
        part = self.source.rows(start + share.start, start + share.stop)
        return self.processes.gather(part.to(self.device), stop - start).cpu()


class DataParallelKernel:
    """Each process computes its share of the batch's rows with ``inner``; all get all results."""

    def __init__(self, inner: Kernel, group: Group) -> None:
        self.inner, self.group = inner, group

    @torch.no_grad()
    def encode(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        among: Bool[Tensor, " n"] | None = None,
        k_among: int = 0,
    ) -> tuple[Codes, Codes | None]:
        """See :class:`Kernel`."""
        own = centred[self._rows(centred)]
        codes, others = self.inner.encode(own, weights, k, among, k_among)
        whole = self._gather_codes(codes, len(centred))
        return whole, None if others is None else self._gather_codes(others, len(centred))

    @torch.no_grad()
    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """See :class:`Kernel`."""
        own = self._rows(codes.values)
        part = self.inner.decode(Codes(codes.values[own], codes.indices[own]), rows)
        return self.group.gather(part, len(codes.values))

    def code_gradients(
        self, codes: Codes, outputs: Float[Tensor, "b d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b k"]:
        """See :class:`Kernel`."""
        own = self._rows(codes.values)
        part = Codes(codes.values[own], codes.indices[own])
        found = self.inner.code_gradients(part, outputs[own], rows)
        return self.group.gather(found, len(codes.values))

    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """See :class:`Kernel`. The same on every process."""
        self.inner.unit_norm(weights, moments)

    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        """See :class:`Kernel`. The same on every process."""
        self.inner.update(weights, moments, gradient, step)
        # The one sum whose order a GPU does not fix: were the biases to part, the codes would too.
        for tensor in (weights.b_enc, moments.b_enc.mean, moments.b_enc.square):
            self.group.agree_(tensor)

    def _rows(self, batch: Tensor) -> slice:
        share = self.group.share(len(batch))
        return slice(share.start, share.stop)

    def _gather_codes(self, codes: Codes, count: int) -> Codes:
        return Codes(
            self.group.gather(codes.values, count), self.group.gather(codes.indices, count)
        )


class ShardedKernel:
    """Weights and moments are of the latents ``held``; codes and masks are of all n latents.

    Args:
        inner: computes with the latents held, numbered from 0.
        group: the processes.
        held: this process's latents.
    """

    def __init__(self, inner: Kernel, group: Group, held: range) -> None:
        self.inner, self.group, self.held = inner, group, held

    @torch.no_grad()
    def encode(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        among: Bool[Tensor, " n"] | None = None,
        k_among: int = 0,
    ) -> tuple[Codes, Codes | None]:
        """See :class:`Kernel`. The k largest of every process's k largest."""
        own_k = min(k, len(self.held))
        if among is None:
            codes, _ = self.inner.encode(centred, weights, own_k)
            return self._best(codes, centred, k), None
        mask = among[self.held.start : self.held.stop]
        own_among = min(k_among, int(mask.sum()))
        wanted = (mask, own_among) if own_among else (None, 0)
        codes, others = self.inner.encode(centred, weights, own_k, *wanted)
        return (self._best(codes, centred, k), self._best(others, centred, k_among))

    @torch.no_grad()
    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """See :class:`Kernel`. The sum of what each process's latents give."""
        own, _ = self._own(codes)
        return self.group.sum_(self.inner.decode(own, rows))

    def code_gradients(
        self, codes: Codes, outputs: Float[Tensor, "b d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b k"]:
        """See :class:`Kernel`. Each process knows the gradients of its own latents' values."""
        own, places = self._own(codes)
        found = self.inner.code_gradients(own, outputs, rows)
        whole = torch.zeros_like(codes.values)
        # Places that only fill up a row come last and repeat no place that counts.
        mine = self._holds(codes.indices.gather(1, places))
        whole.scatter_(1, places, found * mine)
        return self.group.sum_(whole)

    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """See :class:`Kernel`. Of the latents held."""
        self.inner.unit_norm(weights, moments)

    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        """See :class:`Kernel`. Only of the latents held; b_dec's update is the same on all."""
        mine = self._holds(gradient.latents)
        own = replace(
            gradient,
            latents=gradient.latents[mine] - self.held.start,
            images=gradient.images[mine],
            output_rows=gradient.output_rows[mine],
            values=gradient.values[mine],
            gradients=gradient.gradients[mine],
        )
        self.inner.update(weights, moments, own, step)

    def _holds(self, latents: Tensor) -> Tensor:
        return (latents >= self.held.start) & (latents < self.held.stop)

    def _own(self, codes: Codes) -> tuple[Codes, Tensor]:
        """The codes of the latents held, as wide as the fullest row, and where they stood."""
        found, places, counts = narrowed(codes, self._holds(codes.indices))
        local = torch.where(counts, found.indices - self.held.start, 0)
        return Codes(found.values, local), places

    def _best(self, own: Codes | None, like: Tensor, k: int) -> Codes:
        """The k largest of all processes' codes; a process that has fewer fills up with -inf."""
        b = len(like)
        values = like.new_full((1, b, k), float("-inf"))
        indices = torch.zeros(1, b, k, dtype=torch.int64, device=like.device)
        if own is not None:
            width = own.values.shape[1]
            values[0, :, :width] = own.values
            indices[0, :, :width] = own.indices + self.held.start
        world = self.group.world
        values = self.group.gather(values, world).movedim(0, 1).flatten(1)
        indices = self.group.gather(indices, world).movedim(0, 1).flatten(1)
        kept, places = values.topk(k, dim=1)
        return Codes(kept, indices.gather(1, places))


def sharded_model(
    group: Group, settings: Mapping[str, Any], inner: Kernel | None = None
) -> KSparseAutoencoder:
    """A fresh k-SAE of which this process holds its share of the latents.

    Its ``encode``, ``decode`` and training are to be called by all processes together; use
    :func:`revelio.sae.sharded_files.save_sharded` to save it.

    Args:
        group: the processes.
        settings: the arguments of :class:`KSparseAutoencoder`.
        inner: computes on each process.

    Raises:
        ValueError: there are more processes than latents.
    """
    with torch.device("meta"):
        model = KSparseAutoencoder(**settings)
    if group.world > model.n:
        raise ValueError(
            f"{plural(model.n, 'latent')} for {plural(group.world, 'process', 'processes')}: start at most "
            f"{model.n} of them"
        )
    model.held = group.share(model.n)
    for name, shape in {"W_enc": (model.d,), "b_enc": (), "W_dec": (model.d,)}.items():
        setattr(model, name, nn.Parameter(torch.zeros(len(model.held), *shape)))
    model.b_dec = nn.Parameter(torch.zeros(model.d))
    if model.threshold is not None:
        model.threshold = torch.zeros(model.threshold.shape)
    model.kernel = ShardedKernel(inner or SparseKernel(), group, model.held)
    if (seed := settings.get("seed", 0)) is not None:
        draw_weights(model, generator(seed, "k-sae weights"))
    return model
