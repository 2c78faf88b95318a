"""Revelio: see inside diffusion models, and put what you find to use.

The main names are importable from here and loaded on first use, so that ``import revelio`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revelio.version import __version__

if TYPE_CHECKING:
    from revelio.activations.config import ExtractConfig
    from revelio.activations.extract import extract
    from revelio.activations.store import ActivationStore
    from revelio.analysis.config import PurityConfig, TopImagesConfig
    from revelio.analysis.controls import compare as purity_controls
    from revelio.analysis.pca_maps import pca_maps
    from revelio.analysis.pca_maps import sheet as map_sheet
    from revelio.analysis.purity import purity
    from revelio.analysis.top_images import TopImages, top_images
    from revelio.backbones.config import BackboneConfig
    from revelio.backbones.registry import load_backbone
    from revelio.data.config import DataConfig
    from revelio.data.open import open_dataset
    from revelio.diffc.model import DiffC
    from revelio.pipelines.train_sae import train_sae
    from revelio.sae.config import SAEConfig, TrainConfig, TrainSAEConfig
    from revelio.sae.model import KSparseAutoencoder
    from revelio.sae.train import train

# Where each name lives, and what it is called there where that is too short to stand alone.
_HOMES = {
    "ActivationStore": "revelio.activations.store",
    "BackboneConfig": "revelio.backbones.config",
    "DataConfig": "revelio.data.config",
    "DiffC": "revelio.diffc.model",
    "ExtractConfig": "revelio.activations.config",
    "KSparseAutoencoder": "revelio.sae.model",
    "PurityConfig": "revelio.analysis.config",
    "SAEConfig": "revelio.sae.config",
    "TopImages": "revelio.analysis.top_images",
    "TopImagesConfig": "revelio.analysis.config",
    "TrainConfig": "revelio.sae.config",
    "TrainSAEConfig": "revelio.sae.config",
    "extract": "revelio.activations.extract",
    "load_backbone": "revelio.backbones.registry",
    "map_sheet": "revelio.analysis.pca_maps:sheet",
    "open_dataset": "revelio.data.open",
    "pca_maps": "revelio.analysis.pca_maps",
    "purity": "revelio.analysis.purity",
    "purity_controls": "revelio.analysis.controls:compare",
    "top_images": "revelio.analysis.top_images",
    "train": "revelio.sae.train",
    "train_sae": "revelio.pipelines.train_sae",
}

__all__ = [
    "ActivationStore",
    "BackboneConfig",
    "DataConfig",
    "DiffC",
    "ExtractConfig",
    "KSparseAutoencoder",
    "PurityConfig",
    "SAEConfig",
    "TopImages",
    "TopImagesConfig",
    "TrainConfig",
    "TrainSAEConfig",
    "__version__",
    "extract",
    "load_backbone",
    "map_sheet",
    "open_dataset",
    "pca_maps",
    "purity",
    "purity_controls",
    "top_images",
    "train",
    "train_sae",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'revelio' has no attribute {name!r}")
    module, _, its_name = _HOMES[name].partition(":")
    return getattr(import_module(module), its_name or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
