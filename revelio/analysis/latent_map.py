"""Where latents lie: their decoder directions, nearest neighbours, and a two-dimensional map."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.analysis.config import MapMethod
from revelio.analysis.top_images import TopImages
from revelio.seeds import key_seed

if TYPE_CHECKING:
    from revelio.sae.model import KSparseAutoencoder

TSNE_FROM = 30
"""Fewer points than this are laid out by PCA: t-SNE needs neighbours."""


def directions(model: "KSparseAutoencoder", latents: Int64[Tensor, "l"]) -> Float[Tensor, "l d"]:
    """The decoder direction of each latent, at length 1."""
    found = model.W_dec.detach()[latents.to(model.W_dec.device)]
    return torch.nn.functional.normalize(found.float().cpu(), dim=1)


def neighbours(
    units: Float[Tensor, "l d"], count: int
) -> tuple[Int64[Tensor, "l near"], Float[Tensor, "l near"]]:
    """The positions and cosines of each direction's nearest others, nearest first."""
    count = min(count, len(units) - 1)
    if count < 1:
        return torch.empty(len(units), 0, dtype=torch.int64), torch.empty(len(units), 0)
    positions, cosines = [], []
    for start in range(0, len(units), 512):
        block = units[start : start + 512] @ units.T
        rows = torch.arange(len(block))
        block[rows, rows + start] = -2
        found = block.topk(count, dim=1)
        positions.append(found.indices)
        cosines.append(found.values)
    return torch.cat(positions), torch.cat(cosines)


def label_profiles(top: TopImages, latents: Int64[Tensor, "l"]) -> Float[Tensor, "l classes"]:
    """The activation-weighted class shares of each latent's top images.

    Raises:
        ValueError: the images have no labels.
    """
    if top.labels is None:
        raise ValueError("the images have no labels: lay the map out by `decoder`, not `labels`")
    rows, values = top.indices[latents], top.values[latents]
    classes = max(len(top.classes), int(top.labels.max()) + 1)
    profiles = torch.zeros(len(latents), classes)
    profiles.scatter_add_(1, top.labels[rows.clamp(min=0)], values * (rows >= 0))
    return profiles / profiles.sum(1, keepdim=True).clamp(min=1e-12)


def layout(
    vectors: Float[Tensor, "l d"], *, method: MapMethod = "tsne", seed: int = 0
) -> Float[Tensor, "l 2"]:
    """Place vectors on the unit square so that alike ones lie together.

    Args:
        vectors: one a latent.
        method: `tsne` (of up to 50 principal components) or `pca`.
        seed: of t-SNE; equal seeds give equal maps.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = vectors.double().numpy()
    if len(points) < 3:
        return torch.tensor([[0.5, 0.5], [0.6, 0.5]])[: len(points)]
    random_state = key_seed(seed, "latent map") % 2**32
    width = 50 if method == "tsne" and len(points) >= TSNE_FROM else 2
    kept = min(width, *points.shape)
    placed = PCA(kept, svd_solver="full", random_state=random_state).fit_transform(points)
    if width > 2:
        perplexity = min(30.0, (len(points) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=random_state, n_jobs=1)
        placed = tsne.fit_transform(placed)
    if placed.shape[1] < 2:
        placed = np.column_stack([placed[:, 0], np.zeros(len(placed))])
    low, high = placed.min(0), placed.max(0)
    return torch.from_numpy((placed - low) / np.maximum(high - low, 1e-12)).float()
