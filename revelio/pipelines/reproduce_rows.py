"""How a row of each kind is measured: by the pipeline that its own command runs, with the sizes of the scale.

A measure comes with ``values``, one a training, and ``shifts``, what leaving out each subset of the test
images changes of it: what :class:`revelio.reproduce.orderings.Replicates` needs.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float

from revelio.analysis.config import (
    MakeGalleryConfig,
    MakePCAMapsConfig,
    MakeTopImagesConfig,
    MeasurePurityConfig,
)
from revelio.analysis.controls import SPARE, judge
from revelio.analysis.paired import LEFT_OUT, image_subsets
from revelio.analysis.purity import eligible
from revelio.backbones.prompts import class_texts
from revelio.backbones.registry import load_backbone
from revelio.config import structure, to_plain
from revelio.data.dataset import ImageDataset
from revelio.data.loading import batches
from revelio.diffc.config import EvalDiffCConfig, TrainDiffCConfig
from revelio.diffc.config import TestConfig as HeldOut
from revelio.diffc.fit import right_of
from revelio.pipelines import Progress
from revelio.pipelines.eval_diffc import eval_diffc
from revelio.pipelines.gallery import make_gallery
from revelio.pipelines.pca_maps import make_pca_maps
from revelio.pipelines.probe import probe
from revelio.pipelines.purity import measure_purity
from revelio.pipelines.reproduce_parts import Shared
from revelio.pipelines.top_images import make_top_images
from revelio.pipelines.train_diffc import train_diffc
from revelio.pipelines.train_sae import train_sae
from revelio.probes.clip_zero_shot import clip_zero_shot
from revelio.probes.config import ProbeConfig, ProbeName
from revelio.probes.diffusion_classifier import diffusion_classifier
from revelio.reproduce.row import SECONDS
from revelio.reproduce.rows import OurRow
from revelio.sae.config import SweepConfig, TrainSAEConfig
from revelio.stats import mean95, wilson95
from revelio.trust import printable
from revelio.wording import plural

Found = dict[str, Any]
OVER_TRAININGS = "Student's t over trainings"


def measure(shared: Shared, ours: OurRow) -> Found:
    """What a row of the paper is here.

    Raises:
        ValueError, KeyError, OSError: its model or pictures are not at hand, or it does not fit.
    """
    return _KINDS[ours.row.kind](shared, ours)


def _ksae(shared: Shared, ours: OurRow) -> Found:
    """sigma_label of a k-SAE a seed on its training images, as in Sec. 4.2; the first beside controls."""
    config, store = shared.config, shared.store(ours, "train")
    own: dict[str, Any] = vars(shared.sizes.sae) | {"mode": config.mode}
    train = TrainSAEConfig(
        **own,
        store=(store,),
        out=shared.place(ours) / "ksae",
        device=config.device,
        grid=SweepConfig(seed=tuple(range(config.seed, config.seed + config.seeds))),
        resume=True,
    )
    entries, shifts = [], []
    for made in train_sae(train, shared.progress):
        entry, shift = _purity(shared, store, made.path, controls=not entries)
        entries.append(entry)
        shifts.append(shift)
    first, values = entries[0], [entry["sigma_label"] for entry in entries]
    shown = ours.row.kind == "gallery"
    pages = {"gallery": _gallery(shared, ours, store, first)} if shown else {}
    return over_trainings(values, shifts) | {
        **pages,
        "chance": first["chance"],
        "majority_share": float(np.mean([entry["majority_share"] for entry in entries])),
        "majority_chance": first["chance_levels"]["majority_share"],
        "latents": first["latents"],
        "images": {"train": first["images"]},
        "controls": first.get("verdict", {}).get("sigma"),
    }


def _purity(
    shared: Shared, store: Path, ksae: Path, *, controls: bool
) -> tuple[dict[str, Any], list[float]]:
    """The purity entry of a k-SAE, and the shifts of its sigma_label."""
    config, how = shared.config, shared.sizes.purity
    asked = MakeTopImagesConfig(
        store=store, ksae=str(ksae), device=config.device, m=SPARE * how.m, mode=config.mode
    )
    made = make_top_images(asked, shared.progress)
    strong = eligible(made.top, how.m)[: how.latents]
    if not len(strong):
        raise ValueError(f"no latent is active on enough of the {plural(made.top.images, 'image')}")
    beside: dict[str, Any] = {"store": (store,), "ksae": (str(ksae),)} if controls else {}
    given = MeasurePurityConfig(**vars(how), **beside, top=(made.path,), device=config.device)
    entry = measure_purity(given, shared.progress).entries[0]
    subsets = image_subsets(made.top.images, config.seed)
    found = judge(made.top, strong, how.m, subsets).measures["sigma"]
    return entry, _scaled(found.subsets.numpy() - found.whole)


def _gallery(shared: Shared, ours: OurRow, store: Path, entry: dict[str, Any]) -> str:
    """Write the gallery of the first k-SAE; its page, seen from the item's."""
    ksae = shared.place(ours) / "ksae" / f"seed{shared.config.seed}"
    asked = MakeGalleryConfig(
        store=store,
        ksae=str(ksae),
        top=ksae / "top-images",
        out=shared.place(ours) / "gallery",
        device=shared.config.device,
    )
    made = make_gallery(asked, shared.progress, dataset=shared.images(ours)[0], entry=entry)
    return (made.path / "index.html").relative_to(shared.root).as_posix()


def _diffc(shared: Shared, ours: OurRow) -> Found:
    """Top-1 of Diff-C on the test images, in percent, or its seconds an image."""
    made = train_diffc(_diffc_config(shared, ours), shared.progress)
    if ours.row.metric == SECONDS:
        return _diffc_seconds(shared, ours, made.path)
    report = made.report
    return _accuracy(shared, right_of(report), report["interval"]) | {
        "interval_kind": report["interval_kind"],
        "chance": 100 * report["majority_share"],
        "images": report["images"],
    }


def _diffc_config(shared: Shared, ours: OurRow) -> TrainDiffCConfig:
    """On stored grids in mode `fixed`; otherwise on fresh augmented views, as paper and code have it."""
    config, sizes = shared.config, shared.sizes
    own: dict[str, Any] = vars(sizes.diffc) | {
        "mode": config.mode,
        "device": config.device,
        "resume": True,
    }
    own |= {"seed": config.seed, "seeds": config.seeds}
    out = shared.place(ours) / f"diffc-s{config.seeds}"
    if config.mode == "fixed":
        train, test = (shared.store(ours, part) for part in ("train", "test"))
        return TrainDiffCConfig(**own, out=out, store=(train,), test_store=test)
    split = None if ours.data.split else HeldOut.split
    return TrainDiffCConfig(
        **own,
        out=out,
        backbone=ours.backbone,
        layer=ours.layers[0],
        timestep=ours.row.timestep,
        prompts=ours.row.prompt,
        clip=shared.clip,
        data=replace(ours.data, limit=ours.data.limit or sizes.train_images),
        test=HeldOut(split=split, limit=sizes.test_images),
    )


def _diffc_seconds(shared: Shared, ours: OurRow, run: Path) -> Found:
    """What an image takes from picture to class, without loading."""
    times: list[float] = []

    def clock(step: Progress) -> None:
        if step.title == "testing":
            times.append(time.monotonic())

    asked = EvalDiffCConfig(
        diffc=str(run / "final"),
        backbone=ours.backbone.name,
        data=replace(
            ours.data, split=ours.data.split or "test", limit=shared.sizes.zero_shot_images
        ),
        out=shared.place(ours) / "seconds",
        device=shared.config.device,
    )
    report = eval_diffc(asked, clock)
    return _once((times[-1] - times[0]) / report["images"], report["images"])


def _probe(shared: Shared, ours: OurRow) -> Found:
    """Top-1 of a probe on the grids that Diff-C sees, in percent, or its seconds an image."""
    config, timed = shared.config, ours.row.metric == SECONDS
    train, test = (shared.store(ours, part) for part in ("train", "test"))
    asked = ProbeConfig(
        store=(train,),
        test_store=(test,),
        probes=(cast(ProbeName, ours.row.kind),),
        seeds=1 if timed else config.seeds,
        seed=config.seed,
        epochs=shared.sizes.probe_epochs,
        device=config.device,
        out=shared.place(ours) / "probe.json",
    )
    made = probe(asked, shared.progress)
    (entry,), (right,) = made.entries, made.right
    if timed:
        seconds, images = _pass_seconds(shared, ours)
        return _once(entry["seconds"] + seconds, images)
    return _accuracy(shared, right, [entry["low"], entry["high"]]) | {
        "chance": 100 * made.result["chance"],
        "images": {"train": entry["train_images"], "test": made.result["test_images"]},
    }


@torch.no_grad()
def _pass_seconds(shared: Shared, ours: OurRow) -> tuple[float, int]:
    """What an image takes from picture to grid, in batches as Diff-C's, and how many were timed."""
    test, model = shared.tested(ours), shared.backbone(ours)
    test = test.spread(shared.sizes.zero_shot_images or len(test))
    begun = time.monotonic()
    for batch in batches(test, model.transform, EvalDiffCConfig.batch_size):
        grids = model.activations(
            model.encode(batch.pixels), batch.ids, ours.layers, timestep=ours.row.timestep
        )
        grids[ours.layers[0]].cpu()
    return (time.monotonic() - begun) / len(test), len(test)


def _clip(shared: Shared, ours: OurRow) -> Found:
    """CLIP's zero-shot top-1 in percent."""
    test = shared.tested(ours)
    found = clip_zero_shot(test, clip=ours.backbone.name, device=shared.config.device)
    if ours.row.metric == SECONDS:
        return _once(found.score.seconds, len(test))
    return _zero_shot(shared, test, found.predicted)


def _diffusion_classifier(shared: Shared, ours: OurRow) -> Found:
    """The Diffusion Classifier's zero-shot top-1 in percent, or its seconds an image."""
    test = shared.tested(ours)
    test = test.spread(shared.sizes.zero_shot_images or len(test))
    model: Any = load_backbone(ours.backbone)
    how = shared.sizes.classifier
    rows = list(diffusion_classifier(model, test, class_texts(test, None), how))
    if ours.row.metric == SECONDS:
        return _once(sum(row.seconds for row in rows) / len(rows), len(rows))
    return _zero_shot(shared, test, [row.predicted for row in rows])


def _pca(shared: Shared, ours: OurRow) -> Found:
    """The sheet of PCA maps, and how much of the variance it shows."""
    out = shared.place(ours) / "pca"
    asked = MakePCAMapsConfig(
        layers=ours.layers,
        timesteps=() if ours.row.timestep is None else (ours.row.timestep,),
        data=replace(ours.data, limit=ours.data.limit or 8),
        backbone=ours.backbone,
        out=out,
    )
    made = make_pca_maps(asked, shared.progress)
    return {
        "shows": {name: float(one.explained.sum()) for name, one in made.maps.items()},
        "sheet": (out / "sheet.png").relative_to(shared.root).as_posix(),
    }


_KINDS: dict[str, Callable[[Shared, OurRow], Found]] = {
    "ksae": _ksae,
    "gallery": _ksae,
    "diffc": _diffc,
    "clip": _clip,
    "diffusion-classifier": _diffusion_classifier,
    "pca": _pca,
    **dict.fromkeys(get_args(ProbeName), _probe),
}


def _zero_shot(shared: Shared, test: ImageDataset, predicted: list[int]) -> Found:
    right = np.array([predicted]) == np.array([test.labels])
    interval = wilson95(int(right.sum()), len(predicted))
    return _accuracy(shared, right, interval) | {
        "interval_kind": "Wilson's, over test images",
        "chance": 100 / len(test.classes),
        "images": {"test": len(predicted)},
    }


def _accuracy(
    shared: Shared, right: Bool[np.ndarray, "trainings images"], interval: list[float]
) -> Found:
    """Shares of right answers in percent."""
    subsets = image_subsets(right.shape[1], shared.config.seed).numpy()
    values = right.mean(1)
    # A product of booleans would be a boolean.
    gaps = right.astype(float) @ subsets.T / subsets.sum(1) - values[:, None]
    return {
        "values": (100 * values).tolist(),
        "shifts": [_scaled(100 * each) for each in gaps],
        "value": 100 * float(values.mean()),
        "interval": [100 * end for end in interval],
    }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that a row may hold; what a kind has not is left out."""

    value: float | None = None
    interval: tuple[float, float] | None = None
    interval_kind: str = ""
    values: tuple[float, ...] = ()
    shifts: tuple[tuple[float, ...], ...] = ()
    chance: float | None = None
    majority_share: float = 0.0
    majority_chance: float = 0.0
    latents: int = 0
    images: dict[str, int] = field(default_factory=dict)
    controls: str | None = None
    gallery: str = ""
    sheet: str = ""
    shows: dict[str, float] = field(default_factory=dict)


def checked(found: Any, path: Path) -> Found:
    """What a row measured, out of its file.

    Raises:
        ValueError: it is no such thing; the message names the file.
    """
    try:
        whole = structure(Measured, found)
        if len(whole.values) != len(whole.shifts) or len({len(one) for one in whole.shifts}) > 1:
            raise ValueError("`values` and `shifts` do not match")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{printable(path)} is not what a row measured: {error}") from error
    plain = to_plain(whole)
    return {name: plain[name] for name in found}


def gain(found: Found, base: Found) -> Found:
    """A measure minus that of a base with as many trainings, image by image and training by training."""
    for one in (found, base):
        if "values" not in one:
            return {"missing": one.get("missing", "the row that it is compared with")}
    values, shifts = (np.array(found[key]) - np.array(base[key]) for key in ("values", "shifts"))
    return found | over_trainings(values.tolist(), shifts.tolist()) | {"chance": 0.0}


def over_trainings(values: list[float], shifts: list[list[float]]) -> Found:
    """The mean of several trainings, with what an ordering is judged by."""
    return {
        "values": values,
        "shifts": shifts,
        "value": float(np.mean(values)),
        "interval": mean95(values) if len(values) > 1 else None,
        "interval_kind": OVER_TRAININGS,
    }


def _once(value: float, images: int) -> Found:
    return {"value": value, "interval": None, "chance": None, "images": {"test": images}}


def _scaled(gaps: Float[np.ndarray, " subsets"]) -> list[float]:
    """What a subset changes, as large as what another sample of all images would change."""
    return (math.sqrt((1 - LEFT_OUT) / LEFT_OUT) * gaps).tolist()
