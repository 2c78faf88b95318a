"""Which rows of a store a k-SAE trains on, and which it never sees: those that it is measured on too.

The images with the smallest hashes of their ids are kept out, so that it is the same ones in every store of
the same images, whatever its layer or timestep, and for every seed.
"""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.activations.store import ActivationStore
from revelio.analysis.top_images import pooled
from revelio.config import read_yaml
from revelio.sae.config import RunConfig, TrainSAEConfig

DEFAULT = 0.1
# A fraction of variance unexplained of fewer rows says little.
LEAST = 50
BLOCK = 1024


class StoreRows:
    """Some rows of a store as vectors in float32; whole grids are averaged over height and width.

    Args:
        store: what to read from.
        places: which of its rows, in ascending order.
    """

    def __init__(self, store: ActivationStore, places: Int64[Tensor, " n"]) -> None:
        self.store, self.places = store, places

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        """Rows ``start`` to ``stop`` of those that were chosen."""
        wanted = self.places[start:stop]
        if not len(wanted):
            return pooled(self.store.rows(0, 0))
        first, last, found = int(wanted[0]), int(wanted[-1]) + 1, []
        # In blocks: what lies between is read too, and whole grids are large.
        for at in range(first, last, BLOCK):
            end = min(at + BLOCK, last)
            inside = wanted[(wanted >= at) & (wanted < end)]
            found.append(pooled(self.store.rows(at, end))[inside - at])
        return torch.cat(found)

    def batches(self) -> Iterator[Float[Tensor, "b d"]]:
        """All of them in order, some at a time."""
        for start in range(0, len(self), BLOCK):
            yield self.rows(start, min(start + BLOCK, len(self)))


def with_share(config: TrainSAEConfig) -> TrainSAEConfig:
    """The config with its share of held-out rows settled: an earlier run's own where it goes on.

    A run that was begun before there was this setting has none in its ``config.yaml``, and keeps none out.
    """
    if config.held_out is not None:
        return config
    begun = config.out / "config.yaml"
    share = share_of(config)
    if config.resume and begun.is_file():
        recorded = read_yaml(begun).get("held_out")
        share = recorded if type(recorded) is float and 0 <= recorded < 1 else None
    return replace(config, held_out=share)


def share_of(config: RunConfig) -> float:
    """The share that a config asks for; by default the modes that follow the paper train on all rows."""
    if config.held_out is not None:
        return config.held_out
    return DEFAULT if config.mode == "fixed" else 0.0


def count(share: float | None, rows: int) -> int:
    """How many of ``rows`` are kept out."""
    wanted = int((share or 0.0) * rows)
    return wanted if wanted >= LEAST else 0


def divide(store: ActivationStore, share: float | None) -> tuple[StoreRows, StoreRows]:
    """The rows to train on, and those kept out."""
    held = count(share, len(store))
    kept_out = torch.zeros(len(store), dtype=torch.bool)
    if held:
        keys = [
            blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
            for name in store.ids
        ]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        kept_out[torch.tensor(order[:held])] = True
    return StoreRows(store, (~kept_out).nonzero()[:, 0]), StoreRows(store, kept_out.nonzero()[:, 0])


def said(share: float | None, rows: int) -> str | None:
    """What a person should know of it; None where nothing was asked for."""
    held = count(share, rows)
    if held:
        return f"held out: {held:,} of {rows:,} rows, on which the k-SAE is measured too"
    if share:
        return f"held out: no rows, as {share:g} of {rows:,} are fewer than {LEAST}"
    return None
