"""Judge k-SAEs on held-out images, each beside its controls."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.activations.store import ActivationStore
from revelio.analysis.config import OverCells
from revelio.analysis.paired import against, image_subsets, method
from revelio.analysis.top_images import check_width, own_over, pooled
from revelio.bounds import check_fields
from revelio.config import read_yaml, structure
from revelio.evaluation.config import EvalSAEConfig
from revelio.evaluation.controls import TRAINED, trained_control, untrained_controls
from revelio.evaluation.identity import (
    live_directions,
    planted_recovery,
    stability,
    stability_of_controls,
)
from revelio.evaluation.judge import judge, over_trainings
from revelio.evaluation.page import page
from revelio.files import write_folder
from revelio.outputs import check_replaceable, claimed, replace_files
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.inputs import open_sae, sae_folder
from revelio.run_dir import sha256, versions, write_json
from revelio.sae.config import TrainSAEConfig
from revelio.sae.io.saved import WEIGHTS
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import printable

if TYPE_CHECKING:
    from revelio.evaluation.loss_recovered import Replace

MAKER = "eval-ksae"
RESULT, PAGE = "evaluation.json", "evaluation.md"
STABLE_SEEDS = 3
TOO_FEW = 100


def eval_sae(config: EvalSAEConfig, progress: Report = silent) -> dict[str, Any]:
    """Measure every k-SAE of the config and write `evaluation.json` and `evaluation.md`.

    Args:
        config: which k-SAEs, images and controls.
        progress: told each model before it is measured or trained.

    Returns:
        What `evaluation.json` holds: ``ksaes``, by folder: the measures beside the controls;
        ``over_trainings`` and ``stability`` of several k-SAEs; ``planted``; ``notes``.

    Raises:
        ValueError: a value is outside its bounds; stores and k-SAEs do not fit together; held-out images are
            training images; too few images; or something else's files are in the way.
    """
    check_fields(config)
    check_replaceable(config.out, MAKER, (RESULT, PAGE))
    with claimed(config.out):
        models = {path: open_sae(path, "cpu", progress) for path in config.ksae}
        config = replace(config, over=_over(config, models))
        store = _opened(config.store, config)
        for path, model in models.items():
            check_width(model, store)
            if config.trained_controls or (config.planted and path == config.ksae[0]):
                _recipe(path)  # refused now, not after the work
        rows, source, notes = _activations(config, store)
        entries = {}
        for path, model in models.items():
            entries[path] = _judged(config, path, model, store, rows, source, progress)
        result = {
            "store": config.store.resolve().name,
            "store_sha256": store.sha256,
            "images": store.images,
            "over": config.over,
            "interval_method": method(config.confidence),
            "ksaes": entries,
            **_together(config, models, entries, rows, source),
            **_planted(config, models[config.ksae[0]].d, len(source), progress),
            "notes": notes + ([] if store.labels is not None else [UNLABELLED]),
            "made_from": {path: _sha256(path) for path in models},
            "versions": versions(),
        }
        replace_files(config.out, MAKER, lambda folder: _write(folder, result))
    progress(Progress(f"wrote {config.out / RESULT}, {config.out / PAGE}"))
    return result


UNLABELLED = "the images have no labels: only label-free measures were taken"


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    write_json(folder / RESULT, result)
    (folder / PAGE).write_text(page(result), encoding="utf-8")


def _sha256(path: str) -> str | None:
    """Of a k-SAE's weights; None for one on a hub."""
    folder = sae_folder(path)
    return None if folder is None else sha256(folder / WEIGHTS)


def _over(config: EvalSAEConfig, models: Mapping[str, KSparseAutoencoder]) -> OverCells:
    """What an image's code is of, the same for all k-SAEs.

    Raises:
        ValueError: some were trained on cells and some were not, and the config does not say.
    """
    own = {path: own_over(model) for path, model in models.items()}
    if config.over is None and len(set(own.values())) > 1:
        cells = next(path for path, over in own.items() if over != "pooled")
        raise ValueError(
            f"{printable(cells)} was trained on cells, others on pooled activations: judge them apart, or "
            "choose what an image's code is of (over)"
        )
    return config.over or next(iter(own.values()))


def _opened(path: Path, config: EvalSAEConfig) -> ActivationStore:
    """A store of whole images or, where codes are of cells, of cells."""
    store = ActivationStore.open(path, cells=config.over != "pooled")
    if config.over != "pooled":
        _ = store.cells_an_image  # or it says that there are none
    return store


def _rows(
    store: ActivationStore, over: OverCells | None
) -> Float[Tensor, "images d"] | Float[Tensor, "images c d"]:
    if over == "pooled":
        return torch.cat([pooled(batch) for _, batch in store.batches(1024)])
    starts = range(0, store.images, 64)
    return torch.cat([store.image_cells(at, min(at + 64, store.images)) for at in starts])


def _activations(config: EvalSAEConfig, store: ActivationStore) -> tuple[Tensor, Tensor, list[str]]:
    """The held-out activations, those that controls are made of (a row each), and what is to be said of them.

    Raises:
        ValueError: images in both, or too few.
    """
    if store.images < TOO_FEW:
        raise ValueError(f"{config.store} holds {store.images} images: measures need {TOO_FEW} up")
    rows = _rows(store, config.over)
    if config.train_store is None:
        text = (
            "no training store was given: controls are made of the held-out activations themselves"
        )
        return rows, rows.flatten(0, -2), [text]
    train = _opened(config.train_store, config)
    if train.row_shape[0] != store.row_shape[0]:
        raise ValueError(
            f"{config.train_store} has {train.row_shape[0]} channels, {config.store} {store.row_shape[0]}: "
            "give stores of one layer"
        )
    same = all(train.manifest.get(key) == store.manifest.get(key) for key in ("dataset", "split"))
    shared = len(set(train.ids) & set(store.ids)) if same else 0
    if shared and config.overlap == "stop":
        raise ValueError(
            f"{shared:,} of the {store.images:,} images of {config.store} are in {config.train_store} too: "
            "hold out other images, or set overlap to allow"
        )
    notes = [f"{shared:,} of {store.images:,} images are training images"] if shared else []
    return rows, _rows(train, config.over).flatten(0, -2), notes


def _judged(
    config: EvalSAEConfig,
    path: str,
    model: KSparseAutoencoder,
    store: ActivationStore,
    rows: Tensor,
    source: Tensor,
    progress: Report,
) -> dict[str, Any]:
    models = {"k-SAE": model} | untrained_controls(model, source, config.seed)
    if config.trained_controls:
        models |= _trained(config, path, model, source, progress)
    entry = judge(
        models,
        rows,
        store.labels,
        confidence=config.confidence,
        seed=config.seed,
        source=store.manifest,
        over="mean" if config.over == "mean" else "max",
        progress=lambda name: progress(Progress(f"{path}: measuring {name}")),
    )
    if config.loss_images:
        progress(Progress(f"{path}: denoising loss of {config.loss_images} images"))
        entry |= _loss(config, models, store, source)
    return entry


def _trained(
    config: EvalSAEConfig, path: str, model: KSparseAutoencoder, source: Tensor, progress: Report
) -> dict[str, KSparseAutoencoder]:
    """The controls that are trained; one that lies in the output folder already is read."""
    training, made = _recipe(path), {}
    key = (_sha256(path) or "")[:12]
    for name in TRAINED:
        kept = config.out / "controls" / f"{name.replace(' ', '-')}-{key}"
        if not kept.exists():
            control = trained_control(
                name,
                model,
                source,
                training,
                lambda done, total, name=name: progress(
                    Progress("", done, total, "step", (("control", name),))
                ),
            )
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_folder(kept, control.save_pretrained)
        made[name] = open_sae(str(kept), "cpu")
    return made


def _recipe(path: str) -> TrainSAEConfig:
    """How a k-SAE was trained, from its run folder.

    Raises:
        ValueError: it is no run folder.
    """
    file = (sae_folder(path) or Path(path)).parent / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{path} is not in a run folder (no {file}): its training is not known")
    known = {one.name for one in fields(TrainSAEConfig)}
    # The command's own settings are in the file, too.
    return structure(TrainSAEConfig, {k: v for k, v in read_yaml(file).items() if k in known})


def _together(
    config: EvalSAEConfig,
    models: Mapping[str, KSparseAutoencoder],
    entries: Mapping[str, Any],
    rows: Tensor,
    source: Tensor,
) -> dict[str, Any]:
    """What several trainings of one recipe say together; nothing of a single one or of different recipes."""
    sizes = {
        (one.d, one.n, one.k, one.mode, one.activation, one.prefixes) for one in models.values()
    }
    if len(models) < 2 or len(sizes) > 1:
        return {}
    first = next(iter(models.values()))
    directions = [live_directions(model, rows) for model in models.values()]
    seeds = range(config.seed, config.seed + min(len(models), STABLE_SEEDS))
    return {
        "over_trainings": over_trainings(
            [entry["measures"] for entry in entries.values()], config.confidence
        ),
        "stability": {"k-SAE": stability(directions)}
        | stability_of_controls(first, source, list(seeds)),
    }


def _planted(config: EvalSAEConfig, d: int, rows: int, progress: Report) -> dict[str, Any]:
    if not config.planted:
        return {}
    recipe = _recipe(config.ksae[0])
    found = [
        planted_recovery(
            recipe,
            d,
            rows,
            seed=config.seed + number,
            progress=lambda done, total: progress(Progress("", done, total, "step")),
        )
        for number in range(config.planted)
    ]
    names = [name for name, value in found[0].items() if isinstance(value, Mapping)]
    means = {
        name: {
            level: {
                "value": sum(one[name][level] for one in found) / len(found),
                "trainings": [one[name][level] for one in found],
            }
            for level in found[0][name]
        }
        for name in names
    }
    return {"planted": {key: found[0][key] for key in found[0] if key not in names} | means}


def _loss(
    config: EvalSAEConfig,
    models: Mapping[str, KSparseAutoencoder],
    store: ActivationStore,
    source: Tensor,
) -> dict[str, Any]:
    from revelio.evaluation.loss_recovered import loss_recovered, reconstruction, summary

    mean = source.mean(0)
    replacements: dict[str, Replace | None] = {
        "true": None,
        "mean": lambda rows: mean.to(rows).expand_as(rows),
        "zero": torch.zeros_like,
    }
    replacements |= {name: reconstruction(model, store.manifest) for name, model in models.items()}
    losses = _losses(config, store, replacements)
    subsets = image_subsets(len(losses["true"]), config.seed)
    found = {name: loss_recovered(losses, name, subsets) for name in models}
    first, *controls = models
    entry = against(found[first], {name: found[name] for name in controls}, 1, config.confidence)
    return {"loss_recovered": entry, "denoising_loss": summary(losses)}


def _losses(
    config: EvalSAEConfig, store: ActivationStore, replacements: "Mapping[str, Replace | None]"
) -> dict[str, Tensor]:
    """The losses of the first images of the data set that are in the store.

    Raises:
        ValueError: the backbone is not the store's, has no noise, or the images are others.
    """
    from revelio.backbones.base import DiffusionModel
    from revelio.backbones.registry import load_backbone
    from revelio.data.loading import batches
    from revelio.data.open import open_dataset
    from revelio.evaluation.loss_recovered import denoising_losses

    about = store.manifest
    backbone = load_backbone(config.backbone)
    if not isinstance(backbone, DiffusionModel) or backbone.name != about["model"]:
        raise ValueError(
            f"{config.store} is of {about['model']}, the backbone is {backbone.name}: loss recovered needs "
            "the store's own diffusion model"
        )
    dataset = open_dataset(config.data)
    known = set(store.ids)
    places = [i for i, name in enumerate(dataset.ids) if name in known][: config.loss_images]
    if len(places) < min(config.loss_images, store.images):
        raise ValueError(
            f"{len(places)} of the images of {config.store} are in {config.data.source}: give the data set "
            "that it was extracted from"
        )
    parts = [
        denoising_losses(
            backbone,
            about["layer"],
            backbone.encode(batch.pixels),
            batch.ids,
            about["timestep"],
            replacements,
            cells=config.over != "pooled",
            seed=about["seed"],
        )
        for batch in batches(dataset, backbone.transform, config.batch_size, indices=places)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
