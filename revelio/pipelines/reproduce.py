"""A table or figure of the paper, its rows run by the pipelines that users run, beside the paper's values.

from revelio.pipelines.reproduce import ReproduceConfig, reproduce

made = reproduce("table2a", ReproduceConfig(scale="mini"), print)

<out>/<scale>-<mode>/<item>.json, <item>.md     every row, every ordering
    rows/<row>/         a row's runs (k-SAEs and top images, or Diff-C) and what it measured
    sets/<model>-<data>/  what rows of the same model and pictures share: VAE latents, activations

A pass of the model (a timestep and a prompt) serves the layers of all rows that need it, and an image is
encoded once. A row that is done is not run again; one that can't be run is listed with what it lacks.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from revelio.activations.extract import extract
from revelio.analysis.config import (
    MakeGalleryConfig,
    MakePCAMapsConfig,
    MakeTopImagesConfig,
    MeasurePurityConfig,
)
from revelio.analysis.controls import SPARE, judge
from revelio.analysis.paired import LEFT_OUT, image_subsets
from revelio.analysis.purity import eligible
from revelio.backbones.base import Backbone
from revelio.backbones.prompts import CLIP, class_texts, prompt_texts
from revelio.backbones.registry import load_backbone
from revelio.bounds import check_fields
from revelio.config import to_plain
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.data.registry import is_registered
from revelio.data.splits import NoSplits, stratified_split
from revelio.diffc.config import EvalDiffCConfig, TrainDiffCConfig
from revelio.diffc.config import TestConfig as HeldOut
from revelio.diffc.fit import right_of
from revelio.files import write_whole
from revelio.outputs import check_file, claimed, has_keys
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.eval_diffc import eval_diffc
from revelio.pipelines.extract import AS_CODE_SIZE
from revelio.pipelines.gallery import make_gallery
from revelio.pipelines.pca_maps import make_pca_maps
from revelio.pipelines.purity import measure_purity
from revelio.pipelines.top_images import make_top_images
from revelio.pipelines.train_diffc import train_diffc
from revelio.pipelines.train_sae import train_sae
from revelio.probes.clip_zero_shot import clip_zero_shot
from revelio.probes.diffusion_classifier import diffusion_classifier
from revelio.probes.score import score
from revelio.reproduce.config import ReproduceConfig
from revelio.reproduce.items import DELTA, Item, Row, item
from revelio.reproduce.orderings import Replicates
from revelio.reproduce.orderings import judge as judge_ordering
from revelio.reproduce.page import page
from revelio.reproduce.rows import SIZES, OurRow, Sizes, our_rows
from revelio.run_dir import read_json, versions, write_json
from revelio.sae.config import SweepConfig, TrainSAEConfig
from revelio.stats import mean95, wilson95
from revelio.trust import printable

__all__ = ["ReproduceConfig", "Reproduced", "reproduce"]

HELD_OUT = 0.2
TOP1, SECONDS, SIGMA = "top1", "s_per_image", "sigma_label"
Found = dict[str, Any]


@dataclass(frozen=True)
class Reproduced:
    """A finished item.

    Attributes:
        path: its page, `<item>.md`; `<item>.json` is beside it.
        result: what the JSON file holds.
    """

    path: Path
    result: dict[str, Any]


def reproduce(
    name: str, config: ReproduceConfig, progress: Report = silent, *, sizes: Sizes | None = None
) -> Reproduced:
    """Run the rows of a table or figure that are not done yet; write every value beside the paper's.

    Args:
        name: of the item.
        config: on which models and pictures, how.
        progress: told which row is at work, and what it is at.
        sizes: how large everything is; none: those of the config's scale.

    Raises:
        KeyError: there is no such item.
        ValueError: a setting is outside its bounds, or the folder to write to is taken.
    """
    check_fields(config)
    wanted, sizes = item(name), sizes or SIZES[config.scale]
    root = config.out / f"{config.scale}-{config.mode}"
    path = root / f"{name}.json"
    check_file(path, has_keys("item", "orderings"), "a reproduced item")
    with claimed(root):
        rows = our_rows(wanted.rows, config)
        if wanted.commands:
            rows = [replace(ours, missing="made by its own commands") for ours in rows]
        found = _Rows(config, sizes, root, rows, progress).all()
        result = _result(name, wanted, config, found, rows)
        write_json(path, result)
        write_whole(path.with_suffix(".md"), page(result))
    return Reproduced(path.with_suffix(".md"), result)


def _result(
    name: str,
    wanted: Item,
    config: ReproduceConfig,
    found: Mapping[Row, Found],
    rows: list[OurRow],
) -> dict[str, Any]:
    replicates = {row: _replicates(one) for row, one in found.items() if one.get("values")}
    return {
        "item": name,
        "title": wanted.title,
        "scale": config.scale,
        "mode": config.mode,
        "seeds": config.seeds,
        "commands": list(wanted.commands),
        "rows": [
            asdict(ours.row)
            | {"our_model": ours.backbone.name, "our_data": Path(ours.data.source).name}
            | {"our_layers": list(ours.layers)}
            | {key: value for key, value in found[ours.row].items() if key != "shifts"}
            for ours in rows
        ],
        "orderings": [
            judge_ordering(one, wanted.rows, replicates, config.seed) for one in wanted.orderings
        ],
        "versions": versions(),
    }


def _replicates(found: Found) -> Replicates:
    return Replicates(np.array(found["values"]), np.array(found["shifts"]))


@dataclass
class _Rows:
    """The rows of an item and what they share while they run.

    Attributes:
        config: all settings.
        sizes: how large everything is.
        root: the folder of this scale and mode.
        rows: all rows of the item.
        progress: told what is at work.
        backbones: the model that is loaded, by what it was loaded for; one at a time.
        pictures: the training and the test images, by set.
        failed: why a pass can't be made, by the pass.
    """

    config: ReproduceConfig
    sizes: Sizes
    root: Path
    rows: list[OurRow]
    progress: Report
    backbones: dict[str, Backbone] = field(default_factory=dict)
    pictures: dict[str, tuple[ImageDataset, ImageDataset]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def all(self) -> dict[Row, Found]:
        """What every row measured, or ``missing``; rows of one model and data set after one another."""
        found: dict[Row, Found] = {}
        for number, ours in enumerate(sorted(self.rows, key=lambda one: one.set_name), 1):
            self.progress(Progress(f"row {number} of {len(self.rows)}: {ours.row.name}"))
            found[ours.row] = self._row(ours)
            if reason := found[ours.row].get("missing"):
                self.progress(Progress(f"  can't run: {printable(reason)}"))
        for row in [row for row in found if row.metric == DELTA]:
            base = found.get(replace(row, prompt="empty", metric=TOP1), {})
            found[row] = _minus(found[row], base)
        return found

    def _row(self, ours: OurRow) -> Found:
        """A row's measures: as they were written, or made now."""
        if ours.missing:
            return {"missing": ours.missing}
        row, settings = ours.row, self._settings(ours)
        kind = TOP1 if row.metric == DELTA else (row.metric or "maps")
        path = self._place(ours) / f"{kind.partition('@')[0]}-s{self.config.seeds}.json"
        if row.kind == "gallery":
            path = path.with_stem(f"gallery-{path.stem}")
        if path.is_file() and (done := read_json(path)).get("settings") == settings:
            return done["found"]
        try:
            made = _KINDS[row.kind](self, ours)
        # Of a model or data set that is not at hand, or of sizes that don't fit: the other rows go on.
        except (ValueError, KeyError, OSError) as error:
            return {"missing": str(error.args[0] if error.args else error)}
        write_json(path, {"settings": settings, "found": made})
        return made

    def _settings(self, ours: OurRow) -> Any:
        """What a row's values depend on."""
        parts = {"sae": self.sizes.sae, "diffc": self.sizes.diffc, "purity": self.sizes.purity}
        parts |= {"classifier": self.sizes.classifier, "data": ours.data}
        parts["backbone"] = replace(ours.backbone, device="auto")
        plain = {name: to_plain(part) for name, part in parts.items()}
        own = {name: getattr(self.config, name) for name in ("mode", "seed", "seeds", "clip")}
        limits = ("train_images", "test_images", "zero_shot_images")
        return plain | own | {name: getattr(self.sizes, name) for name in limits}

    def _place(self, ours: OurRow) -> Path:
        return self.root / "rows" / ours.name

    def _images(self, ours: OurRow) -> tuple[ImageDataset, ImageDataset]:
        """Training and test images: the set's own splits; of a folder or a split that was given a part each.

        Raises:
            ValueError: they can't be opened, or have no labels.
        """
        if ours.set_name not in self.pictures:
            self.pictures[ours.set_name] = self._opened(ours)
        return self.pictures[ours.set_name]

    def _opened(self, ours: OurRow) -> tuple[ImageDataset, ImageDataset]:
        data = ours.data
        try:
            if data.split is not None or not is_registered(data.source):
                raise NoSplits
            train, test = (open_dataset(replace(data, split=one)) for one in ("train", "test"))
        except NoSplits:
            whole = open_dataset(data)
            if whole.labels is None:
                raise ValueError(
                    f"{whole.name} has no labels: an item of the paper needs class folders or a "
                    "labeled data set"
                ) from None
            kept, held = stratified_split(whole.labels, HELD_OUT, self.config.seed, "reproduce")
            train, test = whole.subset(kept), whole.subset(held)
        sizes = self.sizes
        return (
            train.spread(sizes.train_images or len(train)),
            test.spread(sizes.test_images or len(test)),
        )

    def _backbone(self, ours: OurRow) -> Backbone:
        """The model with all layers that rows of its set take; the one before is let go."""
        if ours.set_name not in self.backbones:
            self.backbones.clear()
            layers = {layer for one in self.rows if self._shares(one, ours) for layer in one.layers}
            options = ours.backbone
            if self.config.mode == "as_code" and options.image_size is None:
                options = replace(options, image_size=AS_CODE_SIZE)
            self.backbones[ours.set_name] = load_backbone(options, layers=sorted(layers))
        return self.backbones[ours.set_name]

    def _shares(self, one: OurRow, ours: OurRow) -> bool:
        return one.set_name == ours.set_name and not one.missing and one.row.kind in _STORED

    def _store(self, ours: OurRow, part: str, pool: str) -> Path:
        """The activations of a row; the pass that makes them serves all rows that need it.

        Raises:
            ValueError: model or pictures are not there, or the pass can't be made.
        """
        row = ours.row
        key = f"{ours.set_name} {part} {pool} {row.timestep} {row.prompt}"
        if key in self.failed:
            raise ValueError(self.failed[key])
        same = [
            one
            for one in self.rows
            if self._shares(one, ours)
            and _STORED[one.row.kind] == pool
            and (one.row.timestep, one.row.prompt) == (row.timestep, row.prompt)
        ]
        layers = list(dict.fromkeys(layer for one in same for layer in one.layers))
        try:
            stores = self._extracted(ours, part, pool, layers)
        except (ValueError, KeyError, OSError) as error:
            self.failed[key] = str(error.args[0] if error.args else error)
            raise
        return stores[layers.index(ours.layers[0])]

    def _extracted(self, ours: OurRow, part: str, pool: str, layers: list[str]) -> list[Path]:
        row, clip = ours.row, self._clip
        dataset = self._images(ours)[part == "test"]
        backbone = self._backbone(ours)
        shared = self.root / "sets" / ours.set_name / part
        texts: dict[str, Callable[[Any], list[str]]] = {}
        if row.prompt != "empty":
            all_texts = prompt_texts(row.prompt, dataset, clip=clip, device=self.config.device)
            texts[row.prompt] = lambda indices: [all_texts[index] for index in indices]
        what = f"{row.model} t={row.timestep} {row.prompt} {part}"

        def told(step: Any) -> None:
            self.progress(Progress("", step.images, step.total, "image", title=what))

        return extract(
            dataset,
            backbone,
            shared / pool,
            layers=layers,
            timesteps=() if row.timestep is None else (row.timestep,),
            prompts=(row.prompt,),
            texts=texts,
            on_error=ours.data.on_error,
            provenance={"mode": self.config.mode} | ({"clip": clip} if texts else {}),
            resume=True,
            progress=told,
            pool=pool,
            dtype="float16" if pool == "none" else "float32",
            seed=self.config.seed,
            vae_cache=shared / "vae",
        )

    @property
    def _clip(self) -> str:
        return self.config.clip or ("mini-clip" if self.config.scale == "mini" else CLIP)

    def _subsets(self, images: int) -> np.ndarray:
        return image_subsets(images, self.config.seed).numpy()

    def ksae(self, ours: OurRow) -> Found:
        """sigma_label of a k-SAE a seed on the training images, as in Sec. 4.2; the first beside controls."""
        config, store = self.config, self._store(ours, "train", "mean")
        first = config.seed
        train = TrainSAEConfig(
            **(vars(self.sizes.sae) | {"mode": config.mode}),
            store=(store,),
            out=self._place(ours) / "ksae",
            device=config.device,
            grid=SweepConfig(seed=tuple(range(first, first + config.seeds))),
            resume=True,
        )
        entries, values, shifts = [], [], []
        for made in train_sae(train, self.progress):
            entry, value, shift = self._purity(store, made.path, controls=not entries)
            entries.append(entry)
            values.append(value)
            shifts.append(shift)
        if ours.row.kind == "gallery":
            self._gallery(ours, store, entries[0])
        return {
            "values": values,
            "shifts": shifts,
            "value": float(np.mean(values)),
            "interval": mean95(values) if len(values) > 1 else None,
            "interval_kind": "Student's t over trainings",
            "chance": entries[0]["chance"],
            "majority_share": float(np.mean([one["majority_share"] for one in entries])),
            "majority_chance": entries[0]["chance_levels"]["majority_share"],
            "latents": entries[0]["latents"],
            "images": entries[0]["images"],
            "controls": (entries[0].get("verdict") or {}).get("sigma"),
        }

    def _purity(
        self, store: Path, ksae: Path, *, controls: bool
    ) -> tuple[dict[str, Any], float, list[float]]:
        config, how = self.config, self.sizes.purity
        options = {"store": store, "ksae": str(ksae), "device": config.device}
        top = make_top_images(
            MakeTopImagesConfig(**options, m=SPARE * how.m, mode=config.mode), self.progress
        )
        strong = eligible(top.top, how.m)[: how.latents]
        if not len(strong):
            raise ValueError(f"no latent is active on {how.m} of {top.top.images} images")
        beside = {"store": (store,), "ksae": (str(ksae),)} if controls else {}
        given = MeasurePurityConfig(**vars(how), **beside, top=(top.path,), device=config.device)
        entry = measure_purity(given, self.progress).entries[0]
        subsets = image_subsets(top.top.images, config.seed)
        found = judge(top.top, strong, how.m, subsets).measures["sigma"]
        return entry, entry[SIGMA], _scaled(found.subsets.numpy() - found.whole)

    def _gallery(self, ours: OurRow, store: Path, entry: dict[str, Any]) -> None:
        ksae = self._place(ours) / "ksae" / f"seed{self.config.seed}"
        made = MakeGalleryConfig(
            store=store,
            ksae=str(ksae),
            top=ksae / "top-images",
            out=self._place(ours) / "gallery",
            device=self.config.device,
        )
        make_gallery(made, self.progress, dataset=self._images(ours)[0], entry=entry)

    def diffc(self, ours: OurRow) -> Found:
        """Top-1 of Diff-C on the test images, in percent, or its seconds an image."""
        made = train_diffc(self._diffc_config(ours), self.progress)
        if ours.row.metric == SECONDS:
            return self._diffc_seconds(ours, made.path)
        report = made.report
        right = right_of(report)
        return _accuracy(right, report["interval"], self._subsets(right.shape[1])) | {
            "interval_kind": report["interval_kind"],
            "chance": 100 * report["majority_share"],
            "images": report["images"],
        }

    def _diffc_config(self, ours: OurRow) -> TrainDiffCConfig:
        """On stored grids in mode `fixed`; otherwise on fresh augmented views, as paper and code have it."""
        config, row = self.config, ours.row
        own = vars(self.sizes.diffc) | {"mode": config.mode, "device": config.device}
        own |= {"seed": config.seed, "seeds": config.seeds, "resume": True}
        out = self._place(ours) / f"diffc-s{config.seeds}"
        if config.mode == "fixed":
            train, test = (self._store(ours, part, "none") for part in ("train", "test"))
            return TrainDiffCConfig(**own, out=out, stores=(train,), test_store=test)
        images = replace(ours.data, limit=self.sizes.train_images)
        return TrainDiffCConfig(
            **own,
            out=out,
            backbone=ours.backbone,
            layer=ours.layers[0],
            timestep=row.timestep,
            prompts=row.prompt,
            clip=self._clip,
            data=images,
            test=HeldOut(split=None if ours.data.split else "test", limit=self.sizes.test_images),
        )

    def _diffc_seconds(self, ours: OurRow, run: Path) -> Found:
        """What an image takes from picture to class, without loading."""
        times: list[float] = []

        def clock(step: Progress) -> None:
            if step.title == "testing":
                times.append(time.monotonic())

        limit = self.sizes.zero_shot_images
        given = EvalDiffCConfig(
            model=str(run / "final"),
            backbone=ours.backbone.name,
            data=replace(ours.data, split="test", limit=limit),
            out=self._place(ours) / "seconds",
            device=self.config.device,
        )
        report = eval_diffc(given, clock)
        return _once((times[-1] - times[0]) / report["images"], report["images"])

    def clip(self, ours: OurRow) -> Found:
        """CLIP's zero-shot top-1 in percent."""
        test = self._images(ours)[1]
        found = clip_zero_shot(test, clip=ours.backbone.name, device=self.config.device)
        return self._zero_shot(test, found.predicted)

    def diffusion_classifier(self, ours: OurRow) -> Found:
        """The Diffusion Classifier's zero-shot top-1 in percent, or its seconds an image."""
        test = self._images(ours)[1]
        test = test.spread(self.sizes.zero_shot_images or len(test))
        model: Any = load_backbone(ours.backbone)
        rows = list(
            diffusion_classifier(model, test, class_texts(test, None), self.sizes.classifier)
        )
        if ours.row.metric == SECONDS:
            return _once(sum(row.seconds for row in rows) / len(rows), len(rows))
        return self._zero_shot(test, [row.predicted for row in rows])

    def _zero_shot(self, test: ImageDataset, predicted: list[int]) -> Found:
        assert test.labels is not None
        right = np.array([predicted]) == np.array([test.labels])
        found = score(predicted, test.labels, 0.0)
        interval = wilson95(int(right.sum()), len(predicted))
        assert interval[0] <= found.value <= interval[1]
        return _accuracy(right, interval, self._subsets(len(predicted))) | {
            "interval_kind": "Wilson's, over test images",
            "chance": 100 / len(test.classes),
            "images": {"test": len(predicted)},
        }

    def pca(self, ours: OurRow) -> Found:
        """The sheet of PCA maps, and how much of the variance it shows."""
        made = make_pca_maps(
            MakePCAMapsConfig(
                layers=ours.layers,
                timesteps=(ours.row.timestep,) if ours.row.timestep is not None else (),
                data=replace(ours.data, limit=ours.data.limit or 8),
                backbone=ours.backbone,
                out=self._place(ours) / "pca",
            ),
            self.progress,
        )
        return {"shows": {name: float(one.explained.sum()) for name, one in made.maps.items()}}


# What a row of a kind stores of a layer.
_STORED = {"ksae": "mean", "gallery": "mean", "diffc": "none"}
_KINDS: dict[str, Callable[[_Rows, OurRow], Found]] = {
    "ksae": _Rows.ksae,
    "gallery": _Rows.ksae,
    "diffc": _Rows.diffc,
    "clip": _Rows.clip,
    "diffusion-classifier": _Rows.diffusion_classifier,
    "pca": _Rows.pca,
}


def _accuracy(right: np.ndarray, interval: list[float], subsets: np.ndarray) -> Found:
    """Shares of right answers in percent, a value a training, and their shifts by subsets of the images."""
    values = right.mean(1)
    shifts = [
        _scaled(100 * (right @ subsets.T / subsets.sum(1) - values[:, None])[one])
        for one in range(len(right))
    ]
    return {
        "values": (100 * values).tolist(),
        "shifts": shifts,
        "value": 100 * float(values.mean()),
        "interval": [100 * end for end in interval],
    }


def _scaled(gaps: np.ndarray) -> list[float]:
    """What a subset changes, as large as what another sample of all images would change."""
    return (math.sqrt((1 - LEFT_OUT) / LEFT_OUT) * gaps).tolist()


def _once(value: float, images: int) -> Found:
    return {"value": value, "interval": None, "chance": None, "images": {"test": images}}


def _minus(found: Found, base: Found) -> Found:
    """The gain over a base that the same number of trainings was measured of."""
    if not found.get("values") or not base.get("values"):
        return {"missing": found.get("missing") or "the row of the empty prompt"}
    values = np.array(found["values"]) - np.array(base["values"])
    gap = Replicates(values, np.array(found["shifts"]) - np.array(base["shifts"]))
    return found | {
        "values": values.tolist(),
        "shifts": gap.shifts.tolist(),
        "value": float(values.mean()),
        "interval": mean95(values.tolist()) if len(values) > 1 else None,
        "interval_kind": "Student's t over trainings",
        "chance": 0.0,
    }
