"""What a k-SAE's reconstruction and its latents do in the model: the part of an evaluation that runs it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from revelio.activations.encode import draws_of
from revelio.activations.store import ActivationStore
from revelio.analysis.paired import halves
from revelio.backbones.base import Backbone, DiffusionModel, EmbeddingModel
from revelio.backbones.prompts import prompt_texts
from revelio.backbones.registry import load_backbone
from revelio.data.dataset import ImageDataset
from revelio.data.loading import batches
from revelio.evaluation.ablation import ablations
from revelio.evaluation.config import EvalSAEConfig
from revelio.evaluation.downstream import Denoised, Downstream, Embedded, Reader
from revelio.evaluation.encoded import encoded
from revelio.evaluation.loss_recovered import Known, recovered
from revelio.evaluation.measures import held_out
from revelio.pipelines.inputs import backbone_of, pictures_of
from revelio.sae.model import KSparseAutoencoder
from revelio.wording import plural

TOO_FEW = 10


class InModel:
    """The images of an evaluation that go through the model, which is loaded once for all k-SAEs.

    Args:
        config: which model, how many of which images.
        store: of the held-out images.
        rows: its activations.

    Raises:
        ValueError: too few images; rows that are means over draws; the backbone is not the store's or gives
            nothing to measure by; or the images are others.
    """

    def __init__(self, config: EvalSAEConfig, store: ActivationStore, rows: Tensor) -> None:
        if config.loss_images < TOO_FEW:
            raise ValueError(
                f"loss_images is {config.loss_images}: intervals need {TOO_FEW} images up"
            )
        if len(draws := draws_of(store.manifest)) > 1:
            raise ValueError(
                f"{config.store} holds means over {plural(len(draws), 'noise draw')}, which no pass of the "
                "model has: give a store of one draw, or leave loss_images out"
            )
        self.confidence, self.seed, self.about = config.confidence, config.seed, store.manifest
        self.over: Literal["max", "mean"] = "mean" if config.over == "mean" else "max"
        dataset, places = _pictures(config, store)
        self.downstream = _downstream(config, store, dataset, places)
        where = {name: row for row, name in enumerate(store.ids)}
        chosen = torch.tensor([where[dataset.ids[place]] for place in places])
        labels = None if store.labels is None else store.labels[chosen]
        subsets = halves(len(chosen), config.seed)
        self.images = held_out(rows[chosen], labels, subsets, config.seed)
        self.reader = Reader.of(self.downstream, self.images)

    def measure(
        self, models: Mapping[str, KSparseAutoencoder], mean: Tensor, known: Known
    ) -> dict[str, Any]:
        """``measures`` and ``in_model``: the loss and accuracy with each replacement, and what ablations do.

        Args:
            models: the k-SAE first, then the controls, by name.
            mean: the mean activation.
            known: what other k-SAEs beside the same controls have measured of these; it is filled.
        """
        how = {"confidence": self.confidence, "source": self.about}
        rows, inside = self.images.rows, (self.downstream, models, mean, self.images, self.reader)
        entries, told = recovered(*inside, **how, cells=rows.ndim == 3, known=known)
        codes = {n: encoded(one, rows, self.about, self.over) for n, one in models.items()}
        more, parts = ablations(
            self.downstream, codes, self.images, self.reader, seed=self.seed, **how
        )
        told |= {"images": len(self.downstream), "ablation": parts}
        return {"measures": entries | more, "in_model": told}


def _pictures(config: EvalSAEConfig, store: ActivationStore) -> tuple[ImageDataset, list[int]]:
    """The data set, and the places in it of the first images that are in the store."""
    dataset = pictures_of(config.data, store)
    known = set(store.ids)
    places = [i for i, name in enumerate(dataset.ids) if name in known][: config.loss_images]
    if len(places) < min(config.loss_images, len(store)):
        raise ValueError(
            f"{len(places)} of the images of {config.store} are in {dataset.name}: give the data set "
            "that it was extracted from"
        )
    return dataset, places


def _downstream(
    config: EvalSAEConfig, store: ActivationStore, dataset: ImageDataset, places: list[int]
) -> Downstream:
    about = store.manifest
    backbone = load_backbone(backbone_of(config.backbone, about, f"{config.store}"))
    if backbone.name != about["model"]:
        raise ValueError(
            f"{config.store} is of {about['model']}, the backbone is {backbone.name}: loss recovered needs "
            "the store's own model"
        )
    read = batches(dataset, backbone.transform, config.batch_size, indices=places, can_skip=False)
    pixels = torch.cat([backbone.encode(batch.pixels).cpu() for batch in read])
    if isinstance(backbone, DiffusionModel):
        return _denoised(config, about, backbone, pixels, dataset.subset(places))
    if isinstance(backbone, EmbeddingModel):
        return Embedded(backbone, about["layer"], pixels, batch_size=config.batch_size)
    raise ValueError(_no_measure(backbone))


def _no_measure(backbone: Backbone) -> str:
    return (
        f"{backbone.name} neither denoises nor embeds images: it has nothing to measure a changed layer by, "
        "leave loss_images out"
    )


def _denoised(
    config: EvalSAEConfig,
    about: Mapping[str, Any],
    backbone: DiffusionModel,
    encoded: Tensor,
    images: ImageDataset,
) -> Denoised:
    """The predictions with the store's own timestep, prompts and noise."""
    policy, (draw,) = about.get("prompt_policy") or "empty", draws_of(about)
    texts = None
    if policy != "empty":
        texts = prompt_texts(policy, images, device=config.backbone.device)
    return Denoised(
        backbone,
        about["layer"],
        encoded,
        images.ids,
        about["timestep"],
        prompts=texts,
        seed=about["seed"],
        draw=draw,
        batch_size=config.batch_size,
    )
