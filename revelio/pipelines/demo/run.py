"""The demo as one resumable run: its stages in order, the seconds each took, and the report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from revelio.activations.config import ExtractConfig
from revelio.activations.store import ActivationStore
from revelio.analysis.controls import in_words
from revelio.backbones.base import Backbone
from revelio.backbones.random_init import load_random_backbone
from revelio.backbones.registry import describe_one, load_backbone
from revelio.bounds import check_fields
from revelio.config import to_plain
from revelio.data.dataset import ImageDataset
from revelio.diffc.pixels import PixelsBackbone
from revelio.files import check_folder
from revelio.pipelines import Progress, Report, Reported, silent
from revelio.pipelines.demo.check import (
    check_model,
    check_pictures,
    grid_extraction,
    pooled_extraction,
)
from revelio.pipelines.demo.config import DemoConfig
from revelio.pipelines.demo.diffc import diffc_stage, headline
from revelio.pipelines.demo.report import write_report
from revelio.pipelines.demo.stages import (
    demo_images,
    extract,
    measure,
    show,
    shown_cell,
    train_saes,
)
from revelio.pipelines.inputs import begins, hashed, open_run
from revelio.run_dir import Run, read_json, versions, write_json

__all__ = ["DemoConfig", "findings", "run_demo"]

FORMAT = 1
FILES = ("report.html", "report.json", "gallery/index.html")


def run_demo(config: DemoConfig, progress: Report = silent) -> Reported:
    """Extract, train k-SAEs, measure purity, write a gallery, train Diff-C, and report.

    Args:
        config: on which pictures and model, how.
        progress: told what each stage is at.

    Raises:
        KeyError: an unknown model or layer.
        ValueError: a setting is outside its bounds or can't be with these pictures or this model, pictures or
            model can't be opened, or the folder is taken.
    """
    check_fields(config)
    check_folder(config.out)
    known = describe_one(config.backbone.name, config.backbone.revision)
    config = replace(config, layers=config.layers or tuple(known.layers))
    noisy = known.kind != "ViT"
    train, test = demo_images(config)
    train = hashed(train, progress)
    test = None if test is None else hashed(test, progress)
    held = f", {len(test):,} held out" if test is not None else ""
    without = "" if train.labels else "\nLabels   none: measures that need labels are left out"
    said = f"Model    {known.name}\nImages   {len(train):,} of {train.name}{held}{without}"
    progress(Progress(said))
    backbone = cache(lambda: load_backbone(config.backbone, layers=config.layers))
    if begins(config):
        check_pictures(config, train, test)
        check_model(config, train, test, backbone(), noisy=noisy)
    run = open_run(config, "demo")
    report = _Stages(config, run, train, test, known.name, noisy, backbone, progress).execute()
    run.finish(files=list(FILES))
    return Reported(config.out, report)


@dataclass
class _Stages:
    """What the stages share.

    Attributes:
        config: all of its settings.
        run: the run directory.
        train: pictures that k-SAEs and Diff-C learn from, and that purity is measured on.
        test: held-out pictures for Diff-C, or None where there are no labels.
        model: the model's name.
        noisy: whether the model takes timesteps.
        backbone: loads the model, once.
        progress: told what each stage is at.
        seconds: what each stage took.
    """

    config: DemoConfig
    run: Run
    train: ImageDataset
    test: ImageDataset | None
    model: str
    noisy: bool
    backbone: Callable[[], Backbone]
    progress: Report
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, make: Callable[[], Any]) -> Any:
        """The stage's result: from ``stages/<name>.json`` if it is done, else made and written."""
        path = self.run.path / "stages" / f"{name}.json"
        if path.exists():
            done = read_json(path)
        else:
            started = time.monotonic()
            result = make()
            done = {"result": result, "seconds": round(time.monotonic() - started, 2)}
            write_json(path, done)
        self.seconds[name] = done["seconds"]
        return done["result"]

    def execute(self) -> dict[str, Any]:
        """Run what is not done yet and write ``report.json`` and ``report.html``."""
        config, told, saes = self.config, self.progress, self.run.path / "ksae"
        pooled = pooled_extraction(config, noisy=self.noisy)
        stores = [
            self.run.path / "activations" / one.store_name(layer)
            for one in pooled.passes()
            for layer in pooled.layers
        ]
        self.stage("extraction", lambda: self._extract(pooled, len(stores)))
        trained = self.stage("k-SAEs", lambda: train_saes(config, stores, saes, told))
        entries = self.stage("purity", lambda: measure(config, stores, saes, told))
        shown = shown_cell(entries)
        store = stores[entries.index(shown)]
        place = (store, saes / store.name, self.train, shown, self.run.path / "gallery")
        examples = self.stage("gallery", lambda: show(config, *place, told))
        diffc = self.stage("Diff-C", self._diffc) if self.test is not None else []
        return self._report(entries, trained, shown, examples, diffc)

    def _extract(self, pooled: ExtractConfig, stores: int) -> int:
        self._take("activations", self.train, self.backbone(), pooled, "activations")
        return stores

    def _take(
        self, title: str, dataset: ImageDataset, backbone: Backbone, how: ExtractConfig, folder: str
    ) -> None:
        extract(title, dataset, backbone, self.run.path / folder, how, self.progress)

    def _diffc(self) -> list[dict[str, Any]]:
        assert self.test is not None
        config = self.config
        grids = grid_extraction(config, noisy=self.noisy)
        random = load_random_backbone(config.backbone, config.seed, layers=config.layers)
        pixels = replace(grids, layers=("pixels",), timesteps=())
        for source, backbone, how in (
            ("trained", self.backbone(), grids),
            ("random", random, grids),
            ("pixels", PixelsBackbone(), pixels),
        ):
            for part, dataset in (("train", self.train), ("test", self.test)):
                title, folder = f"grids ({source}, {part})", f"grids/{source}/{part}"
                self._take(title, dataset, backbone, how, folder)

        def pair(source: str, name: str) -> tuple[ActivationStore, ActivationStore]:
            root = self.run.path / "grids" / source
            train, test = (ActivationStore.open(root / part / name) for part in ("train", "test"))
            return train, test

        name_of = grids.passes()[0].store_name
        return diffc_stage(
            lambda layer: pair("trained", name_of(layer)),
            lambda layer: pair("random", name_of(layer)),
            pair("pixels", "pixels"),
            self.config,
            self.progress,
        )

    def _report(
        self,
        entries: list[dict[str, Any]],
        trained: list[dict[str, Any]],
        shown: dict[str, Any],
        examples: list[dict[str, Any]],
        diffc: list[dict[str, Any]],
    ) -> dict[str, Any]:
        labelled = self.train.labels is not None
        cell = {"layer": shown["layer"], "timestep": shown["timestep"]}
        report = {
            "format": FORMAT,
            "mode": self.config.sae.mode,
            "model": self.model,
            "dataset": self.train.name,
            "images": len(self.train),
            "test_images": len(self.test) if self.test is not None else 0,
            "classes": list(self.train.classes),
            "labelled": labelled,
            # The shipped pictures are of the set that the shipped models were trained on.
            "shipped": self.train.name == "samples" and self.model.startswith("mini-"),
            "findings": findings(
                shown, diffc, sum(self.seconds.values()), entries, labelled=labelled
            ),
            "shown": cell,
            # Without labels no measure compares layers of different widths.
            "best": None if shown["majority_share"] is None else cell,
            "examples": examples,
            "purity": entries,
            "diffc": diffc,
            "ksae": trained,
            "seconds": self.seconds,
            "settings": to_plain(self.config),
            "versions": versions(),
        }
        write_json(self.run.path / "report.json", report)
        write_report(report, self.run.path / "report.html")
        return report


def findings(
    best: dict[str, Any],
    diffc: list[dict[str, Any]],
    seconds: float,
    entries: Sequence[dict[str, Any]] = (),
    *,
    labelled: bool = False,
) -> list[dict[str, str]]:
    """The few numbers that the report opens with; a winner is named only where intervals support one."""
    at = f"{best['layer']}" + ("" if best["timestep"] is None else f", t = {best['timestep']}")
    cards = []
    if best["majority_share"] is None:
        why = "without labels nothing ranks layers"
        if labelled:
            why = "no latent is active on enough images to rank layers by"
        cards.append({"value": at, "text": f"is shown in the gallery: {why}"})
    else:
        near = [one for one in entries if one is not best and not _below(one, best)]
        text = "has the purest latents"
        if near:
            text += (
                f"; {len(near)} of the other {len(entries) - 1} cells are not told apart from it"
            )
        cards.append({"value": at, "text": text})
        text = "of a latent's top images share a label there; "
        text += f"chance is {best['majority_share_chance']:.0%}"
        if best.get("controls"):
            text += f", {in_words(best)}"
        cards.append({"value": f"{best['majority_share']:.0%}", "text": text})
    if diffc:
        cards.append(headline(diffc))
    return [*cards, {"value": f"{seconds / 60:.1f} min", "text": "from images to this page"}]


def _below(one: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a cell's interval lies below the best cell's."""
    if one["majority_share"] is None:
        return True
    return one["interval"]["majority_share"][1] < best["interval"]["majority_share"][0]
