"""The demo as one resumable job: its stages in order, the seconds each took, and the report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from revelio.activations.config import ExtractConfig
from revelio.activations.store import ActivationStore
from revelio.analysis.controls import strongest
from revelio.backbones.base import Backbone
from revelio.data.config import DataConfig
from revelio.data.dataset import ImageDataset
from revelio.demo.report import write_report
from revelio.demo.stages import (
    DemoSettings,
    best_cell,
    extract_with_bar,
    ksae_stage,
    purity_stage,
)
from revelio.demo.stages_diffc import diffc_stage
from revelio.demo.stages_gallery import gallery_stage
from revelio.diffc.pixels import PixelsBackbone
from revelio.run_dir import Run, read_json, versions, write_json

FORMAT = 1


@dataclass
class DemoJob:
    """The demo on given pictures and models.

    Attributes:
        run: the run directory.
        train: pictures that k-SAEs and Diff-C learn from, and that purity is measured on.
        test: held-out pictures for Diff-C, or None where there are no labels.
        backbone: gives the model; asked for only when a stage needs it.
        random_backbone: gives the same architecture with random weights, or None.
        model: the model's name.
        settings: what is done.
        on_error: what an unreadable picture does.
    """

    run: Run
    train: ImageDataset
    test: ImageDataset | None
    backbone: Callable[[], Backbone]
    random_backbone: Callable[[], Backbone] | None
    model: str
    settings: DemoSettings
    on_error: Literal["stop", "skip"] = "stop"
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether the measures that need labels can be taken."""
        return self.train.labels is not None

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
        self.stage("extraction", self._extract)
        stores = [ActivationStore.open(path) for path in self._pooled()]
        ksaes = self.run.path / "ksae"
        ksae_rows = self.stage("k-SAEs", lambda: ksae_stage(stores, ksaes, self.settings))
        entries = self.stage("purity", lambda: purity_stage(stores, ksaes, self.settings))
        best = best_cell(entries)
        store = stores[entries.index(best)]
        shown = self.stage(
            "gallery",
            lambda: gallery_stage(store, self.train, self.run.path, ksaes, best, self.settings),
        )
        diffc = self.stage("Diff-C", self._diffc) if self.test is not None else []
        return self._report(entries, ksae_rows, best, shown, diffc)

    def _pooled(self) -> list[Path]:
        config = self._config("mean", self.settings.timesteps)
        return [
            self.run.path / "activations" / one.store_name(layer)
            for one in config.passes()
            for layer in config.layers
        ]

    def _config(self, pool: Literal["mean", "none"], timesteps: Sequence[int]) -> ExtractConfig:
        return ExtractConfig(
            layers=self.settings.layers,
            timesteps=tuple(timesteps),
            seed=self.settings.seed,
            pool=pool,
            batch_size=self.settings.batch_size,
            mode=self.settings.mode,
            data=DataConfig(on_error=self.on_error),
        )

    def _extract(self) -> int:
        config = self._config("mean", self.settings.timesteps)
        extract_with_bar(
            "activations", self.train, self.backbone(), self.run.path / "activations", config
        )
        return len(config.passes()) * len(config.layers)

    def _diffc(self) -> list[dict[str, Any]]:
        assert self.test is not None
        at = self.settings.diffc_timestep
        config = self._config("none", () if at is None else (at,))
        sources = {"trained": self.backbone, "random": self.random_backbone}
        for source, load in sources.items():
            if load is not None:
                backbone = load()
                for part, dataset in (("train", self.train), ("test", self.test)):
                    folder = self.run.path / "grids" / source / part
                    extract_with_bar(f"grids ({source}, {part})", dataset, backbone, folder, config)
        pixels = replace(self._config("none", ()), layers=("pixels",))
        for part, dataset in (("train", self.train), ("test", self.test)):
            folder = self.run.path / "grids" / "pixels" / part
            extract_with_bar(f"pixels ({part})", dataset, PixelsBackbone(), folder, pixels)

        def pair(source: str, name: str) -> tuple[ActivationStore, ActivationStore]:
            root = self.run.path / "grids" / source
            return ActivationStore.open(root / "train" / name), ActivationStore.open(
                root / "test" / name
            )

        one = config.passes()[0]
        return diffc_stage(
            lambda layer: pair("trained", one.store_name(layer)),
            None
            if self.random_backbone is None
            else lambda layer: pair("random", one.store_name(layer)),
            pair("pixels", "pixels"),
            self.settings,
        )

    def _report(
        self,
        entries: list[dict[str, Any]],
        ksaes: list[dict[str, Any]],
        best: dict[str, Any],
        shown: list[dict[str, Any]],
        diffc: list[dict[str, Any]],
    ) -> dict[str, Any]:
        report = {
            "format": FORMAT,
            "mode": self.settings.mode,
            "model": self.model,
            "dataset": self.train.name,
            "images": len(self.train),
            "test_images": len(self.test) if self.test is not None else 0,
            "classes": list(self.train.classes),
            "labelled": self.labelled,
            # The shipped pictures are of the set that the shipped models were trained on.
            "shipped": self.train.name == "samples" and self.model.startswith("mini-"),
            "findings": findings(best, diffc, sum(self.seconds.values()), entries),
            "best": {"layer": best["layer"], "timestep": best["timestep"]},
            "examples": shown,
            "purity": entries,
            "diffc": diffc,
            "ksae": ksaes,
            "seconds": self.seconds,
            "settings": asdict(self.settings),
            "versions": versions(),
        }
        write_json(self.run.path / "report.json", report)
        write_report(report, self.run.path / "report.html")
        return report


def findings(
    best: dict[str, Any],
    diffc: Sequence[dict[str, Any]],
    seconds: float,
    entries: Sequence[dict[str, Any]] = (),
) -> list[dict[str, str]]:
    """The few numbers that the report opens with; a winner is named only where intervals support one."""
    at = f"{best['layer']}" + ("" if best["timestep"] is None else f", t = {best['timestep']}")
    cards = []
    if best["majority_share"] is None:
        cards.append(
            {"value": at, "text": "is shown in the gallery: without labels nothing ranks layers"}
        )
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
            name, value = strongest(best)
            text += f", {name}, which learned nothing, reach {value:.0%}: the k-SAE "
            said = best["verdict"]["majority"]
            text += said if said.startswith("beats") else f"is {said}"
        cards.append({"value": f"{best['majority_share']:.0%}", "text": text})
    if diffc:
        top = max(diffc, key=lambda row: row["top1"])
        low, high = top["interval"]
        pixels = top["pixels_interval"]
        told = (
            "above" if low > pixels[1] else "below" if high < pixels[0] else "not told apart from"
        )
        cards.append(
            {
                "value": f"{top['top1']:.1f} %",
                "text": f"Diff-C top-1 on {top['layer']}, one training; {told} raw pixels "
                f"({top['pixels_top1']:.1f} %)",
            }
        )
    return [*cards, {"value": f"{seconds / 60:.1f} min", "text": "from images to this page"}]


def _below(one: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a cell's interval lies below the best cell's."""
    if one["majority_share"] is None:
        return True
    return one["interval"]["majority_share"][1] < best["interval"]["majority_share"][0]
