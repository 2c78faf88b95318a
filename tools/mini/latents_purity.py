"""How pure a k-SAE's latents are on one table of activations, with Revelio's own k-SAE and measures."""

from __future__ import annotations

from typing import Any

import torch

from revelio.analysis.config import PurityConfig, TopImagesConfig
from revelio.analysis.purity import purity
from revelio.analysis.top_images import top_images
from revelio.sae.config import TrainConfig
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train
from tools.mini.features import PooledRows

EXPANSION, ACTIVE, STEPS, TOP = 8, 8, 600, 10


def ksae_purity(
    pooled: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...], seed: int = 0
) -> dict[str, Any]:
    """Train a k-SAE on standardised rows `(n, d)` and measure its latents' labels.

    Rows are centred and divided by one common scale, so that models of any scale train alike.
    """
    rows = pooled - pooled.mean(0)
    rows = rows / rows.std()
    store = PooledRows(rows, labels, classes)
    model = KSparseAutoencoder(d=rows.shape[1], n=EXPANSION * rows.shape[1], k=ACTIVE)
    settings = TrainConfig(
        steps=STEPS, batch_size=512, learning_rate=1e-3, warmup_steps=50, seed=seed, auxk=0
    )
    for _ in train(model, store.table, settings):
        pass
    top = top_images(model, store, TopImagesConfig(m=TOP))  # pyright: ignore
    return purity(
        top, PurityConfig(m=TOP, random_sets=5000, permutations=100, bootstrap=500, seed=seed)
    )
