"""What the demo can't do, found before its folder is made: a run goes on with the same settings only."""

from dataclasses import replace

import torch

from revelio.activations.config import ExtractConfig
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.backbones.base import Backbone, check_request
from revelio.bounds import derived
from revelio.data.dataset import ImageDataset
from revelio.pipelines.demo.config import DemoConfig
from revelio.sae.model import KSparseAutoencoder
from revelio.wording import plural


def pooled_extraction(config: DemoConfig, *, noisy: bool) -> ExtractConfig:
    """How the activations of the k-SAEs are taken; a model without noise takes no timesteps."""
    return derived(
        config,
        ExtractConfig,
        timesteps=config.timesteps if noisy else (),
        mode=config.sae.mode,
    )


def grid_extraction(config: DemoConfig, *, noisy: bool) -> ExtractConfig:
    """How Diff-C's grids are taken."""
    pooled = pooled_extraction(config, noisy=noisy)
    return replace(pooled, pool="none", timesteps=(config.diffc_timestep,) if noisy else ())


def check_pictures(config: DemoConfig, train: ImageDataset, test: ImageDataset | None) -> None:
    """Refuse settings that so few pictures can't have.

    Raises:
        ValueError: ``m`` is above the number of pictures, or one picture alone is held out.
    """
    if config.m > len(train):
        raise ValueError(
            f"m={plural(config.m, 'top image')}, but latents are judged on {plural(len(train), 'image')}: "
            "give at most so many"
        )
    if test is not None and len(test) < 2:
        raise ValueError(
            "one picture is held out, and Diff-C is compared on two or more: raise test_images, or give more "
            "pictures"
        )


def check_model(
    config: DemoConfig,
    train: ImageDataset,
    test: ImageDataset | None,
    backbone: Backbone,
    *,
    noisy: bool,
) -> None:
    """Refuse settings that the model can't have.

    Raises:
        KeyError: an unknown layer.
        ValueError: a timestep outside the schedule, something given twice, or sizes of a k-SAE that can't be.
    """
    plans = [pooled_extraction(config, noisy=noisy)]
    if test is not None:
        plans.append(grid_extraction(config, noisy=noisy))
    for how in plans:
        ExtractionPlan(train, backbone, config.out, how)
        for one in how.passes():
            check_request(backbone, one.timestep, (one.prompt,))
    for name, sae in (("sae", config.sae), ("cell_sae", config.cell_sae)):
        sae.check_budget()
        for layer in config.layers:
            sizes = sae.sizes(backbone.layers[layer].channels)
            if sae.k > sizes["n"]:
                raise ValueError(
                    f"{name}.k={sae.k}, but a k-SAE of {layer} has {plural(sizes['n'], 'latent')} "
                    f"({name}.expansion * {plural(sizes['d'], 'channel')}): give a {name}.k of at most so "
                    f"many, or raise {name}.expansion"
                )
            with torch.device("meta"):
                KSparseAutoencoder(**sizes)
