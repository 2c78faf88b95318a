"""The stores and k-SAEs of the proof: three models, each with pooled and cell-wise k-SAEs of three seeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from revelio.activations.config import ExtractRunConfig
from revelio.backbones.config import BackboneConfig
from revelio.data.config import DataConfig
from revelio.data.open import open_dataset
from revelio.pipelines import Report
from revelio.pipelines.extract import extract_to
from revelio.pipelines.train_sae import train_sae
from revelio.sae.config import Rows, SweepConfig, TrainSAEConfig

SEEDS = (0, 1, 2)
ARMS: dict[str, Rows] = {"pooled": "images", "cells": "cells"}
# Rows that every k-SAE sees, and its latents a dimension: the same whether rows are images or cells.
STEPS, BATCH, EXPANSION, K = 150, 1024, 8, 16
# Grey values below it are ground.
GROUND = 16


@dataclass(frozen=True)
class Setting:
    """A model on a data set.

    Attributes:
        name: a folder for it.
        title: in words.
        model: the backbone.
        data: the data set's name.
        layers: those that are compared.
        main: the layer that everything is measured on.
        timesteps: those compared at the main layer, the first for everything else; none for a ViT.
        images: how many are trained on and held out.
        image_size: the model's own where None.
    """

    name: str
    title: str
    model: str
    data: str
    layers: tuple[str, ...]
    main: str
    timesteps: tuple[int, ...] = ()
    images: tuple[int, int] = (2000, 1000)
    image_size: int | None = None

    def store(self, work: Path, part: str, layer: str, t: int | None, draw: int = 0) -> Path:
        """The store of a layer at a timestep."""
        name = layer if t is None else f"{layer}-t{t}-empty-d{draw}"
        return work / self.name / part / name

    @property
    def t(self) -> int | None:
        """The timestep of everything but their comparison."""
        return self.timesteps[0] if self.timesteps else None

    @property
    def cases(self) -> list[tuple[str, int | None]]:
        """Layers at the first timestep, then the main layer at the others."""
        return [(layer, self.t) for layer in self.layers] + [
            (self.main, t) for t in self.timesteps[1:]
        ]


PHOTO_LAYERS = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
SETTINGS = (
    Setting(
        "photo", "mini-sd-photo on Caltech-101", "mini-sd-photo", "caltech101",
        PHOTO_LAYERS, "up_ft1", (25, 200, 500),
    ),
    Setting(
        "fashion", "mini-sd on Fashion-MNIST", "mini-sd", "fashion-mnist",
        PHOTO_LAYERS, "up_ft1", (25, 200),
    ),
    Setting(
        "vit", "vit-s-14-focus on Caltech-101", "vit-s-14-focus", "caltech101",
        ("block11",), "block11", images=(800, 400), image_size=112,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Where the proof works, and where the pictures are.

    Attributes:
        folder: for what can be made again.
        roots: a folder of each data set, by name.
    """

    folder: Path
    roots: dict[str, Path]

    def data(self, setting: Setting, part: str) -> DataConfig:
        """The pictures of a split."""
        limit = setting.images[0 if part == "train" else 1]
        return DataConfig(
            source=setting.data, root=self.roots[setting.data], split=part, limit=limit
        )

    def backbone(self, setting: Setting) -> BackboneConfig:
        """The setting's model."""
        return BackboneConfig(name=setting.model, image_size=setting.image_size, device="cpu")

    def extract(self, setting: Setting, report: Report) -> None:
        """Extract what is not there yet: whole grids, and of held-out images a second draw of the noise."""
        for part in ("train", "test"):
            draws = 2 if part == "test" and setting.timesteps else 1
            passes = [(setting.layers, setting.timesteps[:1], draws)]
            if setting.timesteps[1:]:
                passes.append(((setting.main,), setting.timesteps[1:], 1))
            for layers, timesteps, drawn in passes:
                config = ExtractRunConfig(
                    out=self.folder / setting.name / part,
                    layers=layers,
                    timesteps=timesteps,
                    draws=drawn,
                    pool="none",
                    store_dtype="float16",
                    data=self.data(setting, part),
                    backbone=self.backbone(setting),
                    resume=True,
                )
                extract_to(config, report)

    def ksaes(self, setting: Setting, arm: str, layer: str, t: int | None) -> Iterator[Path]:
        """The run folders of a case's k-SAEs, one a seed."""
        for seed in SEEDS:
            yield self.folder / setting.name / self.case(arm, layer, t) / f"seed{seed}"

    def case(self, arm: str, layer: str, t: int | None) -> str:
        """A folder's name for the k-SAEs of an arm on a layer."""
        return f"{arm}-{layer}" + ("" if t is None else f"-t{t}")

    def train(
        self, setting: Setting, arm: str, layer: str, t: int | None, report: Report
    ) -> list[Path]:
        """Train what is not there yet."""
        config = TrainSAEConfig(
            store=(setting.store(self.folder, "train", layer, t),),
            out=self.folder / setting.name / self.case(arm, layer, t),
            rows=ARMS[arm],
            expansion=EXPANSION,
            k=K,
            steps=STEPS,
            batch_size=BATCH,
            learning_rate=2e-3,
            warmup_steps=30,
            checkpoint_every=0,
            held_out=0.0,
            device="cpu",
            grid=SweepConfig(seed=SEEDS),
            resume=True,
        )
        return [made.path for made in train_sae(config, report)]

    def masks(self, setting: Setting) -> Path | None:
        """A mask an image of Fashion-MNIST, whose ground is black: the garment's class where it is not.

        Photographs have none here: what is ground and what is not would need someone to draw it.
        """
        if setting.data != "fashion-mnist":
            return None
        folder = self.folder / setting.name / "masks"
        pictures = open_dataset(self.data(setting, "test"))
        for place, (name, label) in enumerate(
            zip(pictures.ids, pictures.labels or (), strict=True)
        ):
            path = folder / f"{name}.png"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                grey = pictures.read(place).convert("L")
                grey.point([0] * GROUND + [label + 1] * (256 - GROUND)).save(path)
        return folder
