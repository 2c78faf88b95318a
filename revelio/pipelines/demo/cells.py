"""The k-SAE that the gallery shows: of the cells of one layer's grids, by the recipe of docs/evidence.md.

whole grids of the layer and timestep whose pooled latents are purest -> a k-SAE, a cell a row
-> top images by the maximum over cells, purity, gallery with the places where a latent fires
-> held-out pictures: every measure of `eval-ksae` beside every control
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from revelio.activations.config import ExtractConfig
from revelio.backbones.base import Backbone
from revelio.data.dataset import ImageDataset
from revelio.evaluation.config import EvalSAEConfig
from revelio.pipelines import Progress, Report
from revelio.pipelines.demo.check import pooled_extraction
from revelio.pipelines.demo.config import DemoConfig
from revelio.pipelines.demo.stages import TRAINED, judged_top, place_of_store, show
from revelio.pipelines.eval_sae import NOT_IN_MODEL, eval_sae
from revelio.pipelines.eval_stores import TOO_FEW
from revelio.pipelines.train_sae import train_sae
from revelio.sae.config import TrainSAEConfig

# The widest grid that is kept whole: 256 cells of a picture, which controls and measures hold in memory.
MOST_SIDE = 16


@dataclass(frozen=True)
class Cells:
    """One layer and timestep, and where its stores and its k-SAE are.

    Attributes:
        config: all settings of the demo.
        layer: its name.
        timestep: None for a model without noise.
        out: the folder of all that is made.
    """

    config: DemoConfig
    layer: str
    timestep: int | None
    out: Path

    def extraction(self, backbone: Backbone) -> ExtractConfig:
        """How its grids are taken: whole, since a heat map shows every cell, but no wider than MOST_SIDE."""
        height = backbone.transform(Image.new("RGB", (64, 64))).shape[-2]
        wide = height // backbone.layers[self.layer].stride > MOST_SIDE
        return replace(self._whole, pool=MOST_SIDE if wide else "none")

    @property
    def _whole(self) -> ExtractConfig:
        noisy = self.timestep is not None
        timesteps = () if self.timestep is None else (self.timestep,)
        pooled = pooled_extraction(self.config, noisy=noisy)
        return replace(pooled, pool="none", layers=(self.layer,), timesteps=timesteps)

    @property
    def ksae(self) -> Path:
        """The k-SAE's run folder."""
        return self.out / "ksae"

    def store(self, part: str) -> Path:
        """The grids of the pictures to learn from (``train``) or held out (``test``)."""
        return self.out / part / self._whole.passes()[0].store_name(self.layer)

    def train(self, progress: Report) -> dict[str, Any]:
        """Train the k-SAE; its reconstruction and sparsity."""

        def stepped(one: Progress) -> None:
            if one.unit == "step":
                progress(replace(one, message="", title="k-SAE of cells"))

        run = TrainSAEConfig(
            **vars(self.config.cell_sae),
            store=(self.store("train"),),
            rows="cells",
            out=self.ksae,
            resume=True,
        )
        (made,) = train_sae(run, stepped)
        return place_of_store(self.store("train")) | {name: made.report[name] for name in TRAINED}

    def measure(self) -> dict[str, Any]:
        """Purity of its latents beside the controls, on the pictures that it learned from."""
        return judged_top(self.config, self.store("train"), self.ksae, self.config.cell_sae.mode)

    def show(
        self, dataset: ImageDataset, entry: dict[str, Any], out: Path, progress: Report
    ) -> list[dict[str, Any]]:
        """Write its gallery; a few of its latents for the report."""
        return show(self.config, self.store("train"), self.ksae, dataset, entry, out, progress)

    def judge(self, held_out: int, progress: Report) -> dict[str, Any] | None:
        """Every measure on held-out pictures beside every control; None of too few of them."""
        if held_out < TOO_FEW:
            return None
        found = eval_sae(
            EvalSAEConfig(
                store=self.store("test"),
                train_store=self.store("train"),
                ksae=(str(self.ksae),),
                out=self.out / "evaluation",
                overlap="allow",  # a folder may hold a picture twice: it is said, and costs no demo
                seed=self.config.seed,
            ),
            progress,
        )
        (entry,) = found["ksaes"].values()
        wanted = ("measures", "not_measured", "latents")
        return {name: entry[name] for name in wanted} | {
            "images": found["images"],
            "notes": [note for note in found["notes"] if note != NOT_IN_MODEL],
            "method": found["interval_method"],
        }
