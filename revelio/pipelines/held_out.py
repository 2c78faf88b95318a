"""Which rows of a store a k-SAE trains on, and which it never sees: those that it is measured on too.

The images with the smallest hashes of their ids are kept out, so that it is the same ones in every store of
the same images, whatever its layer or timestep, and for every seed.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import torch

from revelio.activations.store import ActivationStore
from revelio.config import read_yaml
from revelio.pipelines.sae_rows import JoinedRows, StoreRows
from revelio.sae.config import Rows, RunConfig, TrainSAEConfig
from revelio.wording import plural

DEFAULT = 0.1
# A fraction of variance unexplained of fewer rows says little.
LEAST = 50


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


def count(share: float | None, images: int, each: int = 1) -> int:
    """How many of ``images``, of ``each`` rows, are kept out."""
    wanted = int((share or 0.0) * images)
    return wanted if wanted * each >= LEAST else 0


def divide(
    stores: Sequence[ActivationStore], share: float | None, rows: Rows = "images"
) -> tuple[JoinedRows, JoinedRows]:
    """The rows to train on, and those kept out: of the same images in all stores."""
    cells = rows == "cells"
    each = min(store.cells_an_image for store in stores) if cells else 1
    ids = {name for store in stores for name in store.ids} if share else set()
    out = set(sorted(ids, key=_key)[: count(share, len(ids), each)])
    kept, held = list[StoreRows](), list[StoreRows]()
    for store in stores:
        apart = torch.tensor([name in out for name in store.ids] if out else [False] * store.images)
        for parts, chosen in ((kept, ~apart), (held, apart)):
            parts.append(StoreRows(store, chosen.nonzero()[:, 0], cells=cells, each=each))
    return JoinedRows(kept), JoinedRows(held)


def _key(name: str) -> bytes:
    return blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()


def said(share: float | None, held: int, rows: int) -> str | None:
    """What a person should know of ``held`` rows kept out of ``rows``; None where nothing was asked for."""
    if held:
        return f"held out: {held:,} of {plural(rows, 'row')}, on which the k-SAE is measured too"
    if share:
        return f"held out: no rows, as {share:g} of {rows:,} are fewer than {LEAST}"
    return None
