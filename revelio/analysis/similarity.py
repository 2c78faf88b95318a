"""Label-free monosemanticity: how alike a latent's top images are as vectors.

The mean cosine similarity over the pairs of a latent's top images, of their activations or of another
store's embeddings of the same images; beside it the mean weighted by the product of the two codes (as
monosemanticity scores of SAEs for vision-language models do), and chance: the mean over all pairs of the
store, exactly (|sum of unit vectors|^2 - N) / (N (N - 1)).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.analysis.top_images import pooled

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore


def pair_similarity(
    units: Float[Tensor, "images d"], rows: Int64[Tensor, "l w"], codes: Float[Tensor, "l w"]
) -> tuple[Float[Tensor, "l"], Float[Tensor, "l"]]:
    """Mean and code-weighted mean cosine over the pairs of each row of images.

    Args:
        units: unit vectors of all images.
        rows: the top images of each latent.
        codes: their codes, positive.
    """
    upper = torch.triu(torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool), diagonal=1)
    plain, weighted = [], []
    for some_rows, some_codes in zip(rows.split(256), codes.double().split(256), strict=True):
        vectors = units[some_rows]
        cosines = (vectors @ vectors.mT).double()[:, upper]
        weights = (some_codes[:, :, None] * some_codes[:, None, :])[:, upper]
        plain.append(cosines.mean(1))
        weighted.append((cosines * weights).sum(1) / weights.sum(1))
    return torch.cat(plain), torch.cat(weighted)


def chance_similarity(units: Float[Tensor, "images d"]) -> float:
    """The mean cosine over all pairs of different images."""
    count = len(units)
    total = units.double().sum(0).square().sum() - units.double().square().sum()
    return float(total / (count * (count - 1)))


def unit_vectors(
    store: "ActivationStore", ids: Sequence[str], *, centre: bool
) -> Float[Tensor, "images d"]:
    """The store's pooled activations of the images ``ids``, in that order, at length 1.

    Args:
        store: activations or embeddings.
        ids: images of the top images' store.
        centre: take the store's mean away first; pooled activations share a large one, which
            would make any two images look alike.

    Raises:
        ValueError: the store lacks some of the images; the message names the first.
    """
    row_of = {image_id: row for row, image_id in enumerate(store.ids)}
    missing = [image_id for image_id in ids if image_id not in row_of]
    if missing:
        raise ValueError(
            f"{store.path.name} lacks {len(missing)} of the images, first {missing[0]}: "
            "give a store of the same data set"
        )
    vectors = torch.cat([pooled(rows) for _, rows in store.batches(1024)])
    vectors = vectors[torch.tensor([row_of[image_id] for image_id in ids])]
    if centre:
        vectors = vectors - vectors.mean(0)
    return torch.nn.functional.normalize(vectors, dim=1)
