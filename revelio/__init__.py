"""Revelio: see inside diffusion models, and put what you find to use.

The main names are importable from here and loaded on first use, so that ``import revelio`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from revelio.activations.extract import extract
    from revelio.activations.store import ActivationStore
    from revelio.analysis.purity import purity
    from revelio.analysis.top_images import TopImages, top_images
    from revelio.backbones.registry import load_backbone
    from revelio.data.open import open_dataset
    from revelio.diffc.model import DiffC
    from revelio.sae.config import TrainConfig
    from revelio.sae.model import KSparseAutoencoder
    from revelio.sae.train import train

_HOMES = {
    "ActivationStore": "revelio.activations.store",
    "DiffC": "revelio.diffc.model",
    "KSparseAutoencoder": "revelio.sae.model",
    "TopImages": "revelio.analysis.top_images",
    "TrainConfig": "revelio.sae.config",
    "extract": "revelio.activations.extract",
    "load_backbone": "revelio.backbones.registry",
    "open_dataset": "revelio.data.open",
    "purity": "revelio.analysis.purity",
    "top_images": "revelio.analysis.top_images",
    "train": "revelio.sae.train",
}

__all__ = [
    "ActivationStore",
    "DiffC",
    "KSparseAutoencoder",
    "TopImages",
    "TrainConfig",
    "extract",
    "load_backbone",
    "open_dataset",
    "purity",
    "top_images",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'revelio' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
