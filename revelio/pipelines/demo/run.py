"""The demo as one resumable run: its stages in order, the seconds each took, and the report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from revelio.activations.config import ExtractConfig
from revelio.activations.store import ActivationStore
from revelio.analysis.controls import in_words
from revelio.analysis.paired import BEATS
from revelio.backbones.base import Backbone
from revelio.backbones.random_init import load_random_backbone
from revelio.backbones.registry import describe_one, load_backbone
from revelio.bounds import check_fields
from revelio.config import to_plain
from revelio.data.dataset import ImageDataset
from revelio.diffc.pixels import PixelsBackbone
from revelio.files import check_folder
from revelio.pipelines import Progress, Report, Reported, silent
from revelio.pipelines.demo.cells import Cells
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
    shown_cell,
    train_saes,
)
from revelio.pipelines.inputs import begins, hashed, open_run
from revelio.run_dir import Run, read_json, versions, write_json
from revelio.wording import plural

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
        pixels = self.stage("raw pixels", lambda: self._pixels(pooled))
        best = shown_cell(entries)
        cells = Cells(config, best["layer"], best["timestep"], self.run.path / "cells")
        found = self.stage("k-SAE of cells", lambda: self._cells(cells))
        gallery = self.run.path / "gallery"
        examples = self.stage(
            "gallery", lambda: cells.show(self.train, found["purity"], gallery, told)
        )
        diffc = self.stage("Diff-C", self._diffc) if self.test is not None else []
        return self._report(entries, pixels, trained, best, found, examples, diffc)

    def _pixels(self, pooled: ExtractConfig) -> dict[str, Any]:
        """The purity of a k-SAE of the same recipe that sees the pictures themselves."""
        how, folder = replace(pooled, layers=("flat",), timesteps=()), self.run.path / "pixels"
        self._take("raw pixels", self.train, PixelsBackbone(), how, "pixels")
        train_saes(self.config, [folder / "flat"], folder / "ksae", silent)
        (entry,) = measure(self.config, [folder / "flat"], folder / "ksae", silent)
        return entry

    def _cells(self, cells: Cells) -> dict[str, Any]:
        how = cells.extraction(self.backbone())
        for part, dataset in (("train", self.train), ("test", self.test)):
            if dataset is not None:
                title, folder = f"grids of {cells.layer} ({part})", f"cells/{part}"
                self._take(title, dataset, self.backbone(), how, folder)
        return {
            "ksae": cells.train(self.progress),
            "purity": cells.measure(),
            "held_out": cells.judge(len(self.test or ()), self.progress),
        }

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
        pixels: dict[str, Any],
        trained: list[dict[str, Any]],
        best: dict[str, Any],
        cells: dict[str, Any],
        examples: list[dict[str, Any]],
        diffc: list[dict[str, Any]],
    ) -> dict[str, Any]:
        labelled = self.train.labels is not None
        place = {"layer": best["layer"], "timestep": best["timestep"]}
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
                best, diffc, sum(self.seconds.values()), entries, cells, labelled=labelled
            ),
            "shown": place,
            # Without labels no measure compares layers of different widths.
            "best": None if best["majority_share"] is None else place,
            "cells": cells,
            "examples": examples,
            "purity": entries,
            "pixels": pixels,
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
    cells: Mapping[str, Any] | None = None,
    *,
    labelled: bool = False,
) -> list[dict[str, str]]:
    """The few numbers that the report opens with; a winner is named only where intervals support one.

    Args:
        best: the purity of the layer and timestep that is shown.
        diffc: the rows of Diff-C; none without labels.
        seconds: what all took.
        entries: the purity of every layer and timestep.
        cells: of the k-SAE that the gallery shows: its purity, and what held-out pictures say.
        labelled: whether the pictures have labels.
    """
    at = f"{best['layer']}" + ("" if best["timestep"] is None else f", t = {best['timestep']}")
    cards = []
    if best["majority_share"] is None:
        why = "without labels nothing ranks layers"
        if labelled:
            why = "no latent is active on enough images to rank layers by"
        cards.append({"value": at, "text": f"is shown in the gallery: {why}"})
    else:
        near = [one for one in entries if one is not best and not _below(one, best)]
        text = "has the purest latents of pooled activations, by the lower end of the interval"
        if near:
            others = plural(len(entries) - 1, "other")
            text += f"; {len(near)} of the {others} are not told apart from it"
        cards.append({"value": at, "text": text})
    if cells is not None:
        cards += _of_cells(cells)
    if diffc:
        cards.append(headline(diffc))
    return [*cards, {"value": f"{seconds / 60:.1f} min", "text": "from images to this page"}]


def _of_cells(cells: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What purity says of the k-SAE of cells, and how often held-out pictures tell it from every control."""
    shown = cells["purity"]
    if shown["majority_share"] is not None:
        text = "of a latent's top images share a label in the k-SAE of its cells; "
        text += f"chance is {shown['majority_share_chance']:.0%}"
        if shown.get("controls"):
            text += f", {in_words(shown)}"
        yield {"value": f"{shown['majority_share']:.0%}", "text": text}
    if cells["held_out"] is not None:
        measures = cells["held_out"]["measures"]
        won = [name for name, one in measures.items() if one["verdict"] == BEATS]
        named = f" ({', '.join(won)})" if won else ""
        yield {
            "value": f"{len(won)} of {len(measures)}",
            "text": f"measures on held-out pictures on which that k-SAE beats every control{named}",
        }


def _below(one: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a cell's interval lies below the best cell's."""
    if one["majority_share"] is None:
        return True
    return one["interval"]["majority_share"][1] < best["interval"]["majority_share"][0]
