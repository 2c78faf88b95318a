"""k-SAEs whose latents are known, and activations whose classes are."""

import torch

from revelio.analysis.paired import halves
from revelio.evaluation.encoded import encoded
from revelio.evaluation.judge import measures_of
from revelio.evaluation.measures import held_out
from revelio.sae.model import KSparseAutoencoder


def reading(d: int, n: int, k: int) -> KSparseAutoencoder:
    """Latent j reads channel j and writes it back."""
    model = KSparseAutoencoder(d, n, k, seed=None)
    with torch.no_grad():
        model.W_enc.copy_(torch.eye(n, d))
        model.W_dec.copy_(torch.eye(n, d))
    return model


def classes_in_channels(images: int = 400, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel c is large on images of class c, for the first four channels; the rest is noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 4
    rows = 0.1 * torch.rand(images, d, generator=draw)
    rows[torch.arange(images), labels] += 1 + torch.rand(images, generator=draw)
    return rows, labels


def judged(model: KSparseAutoencoder, rows: torch.Tensor, labels: torch.Tensor | None):
    codes = encoded(model, rows)
    return codes, measures_of(codes, held_out(rows, labels, halves(len(rows), 0), 0))
