"""Revelio: see inside diffusion models, and put what you find to use.

The main names are importable from here and loaded on first use, so that ``import revelio`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revelio.version import __version__

if TYPE_CHECKING:
    from revelio.activations.config import ExtractConfig, ExtractRunConfig
    from revelio.activations.extract import extract
    from revelio.activations.store import ActivationStore
    from revelio.advisor.config import AdviseConfig
    from revelio.analysis.config import (
        LocalityConfig,
        MakeGalleryConfig,
        MakePCAMapsConfig,
        MakeTopImagesConfig,
        MeasurePurityConfig,
        PurityConfig,
        ServeConfig,
        TopImagesConfig,
    )
    from revelio.analysis.controls import compare as purity_controls
    from revelio.analysis.pca_maps import pca_maps
    from revelio.analysis.pca_maps import sheet as map_sheet
    from revelio.analysis.purity import purity
    from revelio.analysis.top_images import TopImages, top_images
    from revelio.backbones.config import BackboneConfig
    from revelio.backbones.registry import load_backbone
    from revelio.data.config import DataConfig
    from revelio.data.open import open_dataset
    from revelio.diffc.config import EvalDiffCConfig, TrainDiffCConfig
    from revelio.diffc.model import DiffC, load_diffc
    from revelio.evaluation.config import EvalSAEConfig
    from revelio.naming.config import NameLatentsConfig
    from revelio.pipelines.advise import advise, plan_advice
    from revelio.pipelines.convert_sae import convert_sae
    from revelio.pipelines.eval_diffc import eval_diffc
    from revelio.pipelines.eval_sae import eval_sae
    from revelio.pipelines.extract import extract_to, plan_extraction
    from revelio.pipelines.extract_text import extract_text
    from revelio.pipelines.gallery import make_gallery
    from revelio.pipelines.locality import measure_locality
    from revelio.pipelines.make_concept import make_concept
    from revelio.pipelines.name_latents import name_latents
    from revelio.pipelines.pca_maps import make_pca_maps
    from revelio.pipelines.probe import probe
    from revelio.pipelines.purity import measure_purity
    from revelio.pipelines.reproduce import reproduce as reproduce_item
    from revelio.pipelines.serve import open_server
    from revelio.pipelines.steer import steer
    from revelio.pipelines.steer_eval import steer_eval
    from revelio.pipelines.top_images import make_top_images
    from revelio.pipelines.train_diffc import train_diffc
    from revelio.pipelines.train_sae import plan_sae, train_sae
    from revelio.pipelines.zero_shot import zero_shot
    from revelio.probes.config import ProbeConfig, ZeroShotConfig
    from revelio.reproduce.config import ReproduceConfig
    from revelio.sae.config import SAEConfig, TrainConfig, TrainSAEConfig
    from revelio.sae.model import KSparseAutoencoder
    from revelio.sae.train import train
    from revelio.steering.concept import Concept
    from revelio.steering.config import (
        ConceptConfig,
        ExtractTextConfig,
        SteerConfig,
        SteerEvalConfig,
    )

# Where each name lives, and what it is called there where that is too short to stand alone.
_HOMES = {
    "ActivationStore": "revelio.activations.store",
    "AdviseConfig": "revelio.advisor.config",
    "BackboneConfig": "revelio.backbones.config",
    "Concept": "revelio.steering.concept",
    "ConceptConfig": "revelio.steering.config",
    "DataConfig": "revelio.data.config",
    "DiffC": "revelio.diffc.model",
    "EvalDiffCConfig": "revelio.diffc.config",
    "EvalSAEConfig": "revelio.evaluation.config",
    "ExtractConfig": "revelio.activations.config",
    "ExtractRunConfig": "revelio.activations.config",
    "ExtractTextConfig": "revelio.steering.config",
    "KSparseAutoencoder": "revelio.sae.model",
    "LocalityConfig": "revelio.analysis.config",
    "MakeGalleryConfig": "revelio.analysis.config",
    "MakePCAMapsConfig": "revelio.analysis.config",
    "MakeTopImagesConfig": "revelio.analysis.config",
    "MeasurePurityConfig": "revelio.analysis.config",
    "NameLatentsConfig": "revelio.naming.config",
    "ProbeConfig": "revelio.probes.config",
    "PurityConfig": "revelio.analysis.config",
    "ReproduceConfig": "revelio.reproduce.config",
    "SAEConfig": "revelio.sae.config",
    "ServeConfig": "revelio.analysis.config",
    "SteerConfig": "revelio.steering.config",
    "SteerEvalConfig": "revelio.steering.config",
    "TopImages": "revelio.analysis.top_images",
    "TopImagesConfig": "revelio.analysis.config",
    "TrainConfig": "revelio.sae.config",
    "TrainDiffCConfig": "revelio.diffc.config",
    "TrainSAEConfig": "revelio.sae.config",
    "ZeroShotConfig": "revelio.probes.config",
    "advise": "revelio.pipelines.advise",
    "convert_sae": "revelio.pipelines.convert_sae",
    "eval_diffc": "revelio.pipelines.eval_diffc",
    "eval_sae": "revelio.pipelines.eval_sae",
    "extract": "revelio.activations.extract",
    "extract_text": "revelio.pipelines.extract_text",
    "extract_to": "revelio.pipelines.extract",
    "load_backbone": "revelio.backbones.registry",
    "load_diffc": "revelio.diffc.model",
    "make_concept": "revelio.pipelines.make_concept",
    "make_gallery": "revelio.pipelines.gallery",
    "make_pca_maps": "revelio.pipelines.pca_maps",
    "make_top_images": "revelio.pipelines.top_images",
    "map_sheet": "revelio.analysis.pca_maps:sheet",
    "measure_locality": "revelio.pipelines.locality",
    "measure_purity": "revelio.pipelines.purity",
    "name_latents": "revelio.pipelines.name_latents",
    "open_dataset": "revelio.data.open",
    "open_server": "revelio.pipelines.serve",
    "pca_maps": "revelio.analysis.pca_maps",
    "plan_advice": "revelio.pipelines.advise",
    "plan_extraction": "revelio.pipelines.extract",
    "plan_sae": "revelio.pipelines.train_sae",
    "probe": "revelio.pipelines.probe",
    "purity": "revelio.analysis.purity",
    "purity_controls": "revelio.analysis.controls:compare",
    # `revelio.reproduce` is the package that holds the paper's items.
    "reproduce_item": "revelio.pipelines.reproduce:reproduce",
    "steer": "revelio.pipelines.steer",
    "steer_eval": "revelio.pipelines.steer_eval",
    "top_images": "revelio.analysis.top_images",
    "train": "revelio.sae.train",
    "train_diffc": "revelio.pipelines.train_diffc",
    "train_sae": "revelio.pipelines.train_sae",
    "zero_shot": "revelio.pipelines.zero_shot",
}

__all__ = [
    "ActivationStore",
    "AdviseConfig",
    "BackboneConfig",
    "Concept",
    "ConceptConfig",
    "DataConfig",
    "DiffC",
    "EvalDiffCConfig",
    "EvalSAEConfig",
    "ExtractConfig",
    "ExtractRunConfig",
    "ExtractTextConfig",
    "KSparseAutoencoder",
    "LocalityConfig",
    "MakeGalleryConfig",
    "MakePCAMapsConfig",
    "MakeTopImagesConfig",
    "MeasurePurityConfig",
    "NameLatentsConfig",
    "ProbeConfig",
    "PurityConfig",
    "ReproduceConfig",
    "SAEConfig",
    "ServeConfig",
    "SteerConfig",
    "SteerEvalConfig",
    "TopImages",
    "TopImagesConfig",
    "TrainConfig",
    "TrainDiffCConfig",
    "TrainSAEConfig",
    "ZeroShotConfig",
    "__version__",
    "advise",
    "convert_sae",
    "eval_diffc",
    "eval_sae",
    "extract",
    "extract_text",
    "extract_to",
    "load_backbone",
    "load_diffc",
    "make_concept",
    "make_gallery",
    "make_pca_maps",
    "make_top_images",
    "map_sheet",
    "measure_locality",
    "measure_purity",
    "name_latents",
    "open_dataset",
    "open_server",
    "pca_maps",
    "plan_advice",
    "plan_extraction",
    "plan_sae",
    "probe",
    "purity",
    "purity_controls",
    "reproduce_item",
    "steer",
    "steer_eval",
    "top_images",
    "train",
    "train_diffc",
    "train_sae",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'revelio' has no attribute {name!r}")
    module, _, its_name = _HOMES[name].partition(":")
    return getattr(import_module(module), its_name or name)


def __dir__() -> list[str]:
    """The names that are meant, without the modules that loading them has left here."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
