"""The whole of Revelio on a model and your pictures: what a diffusion model knows about them.

Takes images through the model at several layers and timesteps, trains a k-sparse autoencoder on each,
measures the purity of the latents, builds a gallery of the best layer, and trains Diff-C on every layer
beside raw pixels and random weights. Writes report.html, report.json and gallery/. About ten minutes on two
CPU cores.

  revelio demo                              the shipped model on the shipped pictures
  revelio demo --images ~/photos --out runs/photos
  revelio demo --dataset oxford-iiit-pet --backbone.name sd-1.5 --backbone.image-size 512
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from revelio.backbones.config import BackboneConfig
from revelio.bounds import Count, Existing, Folder, Index, LearningRate, OutFolder, Seed
from revelio.cli.options import build_backbone
from revelio.trust import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from revelio.data.dataset import ImageDataset
    from revelio.demo.job import DemoJob
    from revelio.demo.stages import DemoSettings
    from revelio.run_dir import Run


@dataclass(frozen=True)
class Config:
    """The demo's flags."""

    out: OutFolder = Path("runs/demo")
    """The folder to write to."""

    images: Folder | None = None
    """A folder of your own pictures; class folders give labels, without them the measures that need
    labels are left out."""

    dataset: str | None = None
    """A known data set (samples, caltech101, oxford-iiit-pet, ...) or a hub id, instead of --images."""

    root: Existing | None = None
    """A local copy of the known data set."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)

    layers: tuple[str, ...] = ()
    """The layers; none: all of the model's."""

    timesteps: tuple[Index, ...] = (25, 100, 200, 400)
    """The timesteps of the purity table; left out for a model without noise."""

    diffc_timestep: Index = 25
    """The timestep that Diff-C takes its grids at."""

    train_images: Count = 2000
    """At most so many pictures for k-SAEs, purity and Diff-C's training."""

    test_images: Count = 500
    """At most so many held-out pictures for Diff-C."""

    k: Count = 16
    """Active latents an image (paper: 32, of far wider activations)."""

    expansion: Count = 16
    """Latents a dimension of the activation (paper: 64)."""

    steps: Count = 300
    """Updates of each k-SAE (paper: 10,240)."""

    ksae_batch: Count = 512
    """Activations an update."""

    learning_rate: LearningRate = 2e-3
    """Of the k-SAEs: higher than the paper's 4e-4, for so few updates."""

    top: Count = 10
    """Top images that a latent is judged by."""

    width: Count = 64
    """Width of Diff-C's convolutions (paper: 1024)."""

    epochs: Count = 8
    """Epochs of Diff-C."""

    batch_size: Count = 50
    """Images a pass of the model."""

    mode: Literal["fixed", "as_paper", "as_code"] = "fixed"
    """Where the paper and its released code differ: what was meant, the text, or the code."""

    on_error: Literal["stop", "skip"] = "stop"
    """What an unreadable image does: stop the run, or be left out and recorded."""

    seed: Seed = 0
    """Of noise, weights, orders and resampling."""

    resume: bool = False
    """Go on with an interrupted demo; one that is done is only shown."""


def run(config: Config) -> None:
    """Run the demo and say what it wrote."""
    from revelio.config import completed, to_yaml
    from revelio.files import check_folder
    from revelio.run_dir import Run

    if config.images is not None and config.dataset is not None:
        raise ValueError("--images and --dataset are both given: choose one")
    check_folder(config.out)
    settings = {"resume": config.resume, "complete": completed(config)}
    job = _job(config, lambda: Run.open(config.out, "demo", to_yaml(config), **settings))
    report = job.execute()
    job.run.finish(files=["report.html", "report.json", "gallery/index.html"])
    for row in report["findings"]:
        print(f"  {row['value']:>16}  {printable(row['text'])}")
    print(f"\nReport   {config.out / 'report.html'}  (numbers: report.json)")
    print(f"Gallery  {config.out / 'gallery' / 'index.html'}")
    print(_next(config, report))


def _next(config: Config, report: dict[str, Any]) -> str:
    """After the shipped pictures, the user's own; after those, a larger k-SAE of the best layer."""
    from revelio.following import beside, flags, following

    if config.images is None and config.dataset is None:
        photos = ["--images", "FOLDER", "--backbone.name", "mini-sd-photo"]
        return following("demo", *photos, "--out", config.out.with_name("own"))
    root = ["--data.root", config.root] if config.root else []
    data = ["--data.source", config.images or config.dataset, *root]
    where = report["purity"][0]
    layer = ["--layers", where["layer"], "--timesteps"]
    layer += [] if where["timestep"] is None else [where["timestep"]]
    out = beside(config.out, "activations")
    return following("extract", *data, *flags(config.backbone, "backbone"), *layer, "--out", out)


def _job(config: Config, open_run: "Callable[[], Run]") -> "DemoJob":
    from revelio.backbones.random_init import load_random_backbone
    from revelio.backbones.registry import describe_one
    from revelio.demo.job import DemoJob
    from revelio.demo.sources import demo_images

    options = config.backbone
    known = describe_one(options.name, options.revision)
    layers = config.layers or tuple(known.layers)
    source = str(config.images or config.dataset or "samples")
    train, test = demo_images(
        source, config.root, config.train_images, config.test_images, config.seed
    )
    _announce(options.name, train, test)
    return DemoJob(
        run=open_run(),
        train=train,
        test=test,
        backbone=lambda: build_backbone(options, layers),
        random_backbone=lambda: load_random_backbone(
            options.name,
            config.seed,
            layers=layers,
            revision=options.revision,
            image_size=options.image_size,
            dtype=options.dtype,
            attention=options.attention,
            device=options.device,
        ),
        model=known.name,
        settings=_settings(config, layers, noisy=known.kind != "ViT"),
        on_error=config.on_error,
    )


def _announce(model: str, train: "ImageDataset", test: "ImageDataset | None") -> None:
    held = f", {len(test):,} held out" if test is not None else ""
    print(
        f"Model    {model}\nImages   {len(train):,} of {printable(train.name)}{held}",
        file=sys.stderr,
    )
    if train.labels is None:
        print("Labels   none: measures that need labels are left out", file=sys.stderr)


def _settings(config: Config, layers: tuple[str, ...], noisy: bool) -> "DemoSettings":
    from revelio.demo.stages import DemoSettings

    return DemoSettings(
        mode=config.mode,
        layers=layers,
        timesteps=config.timesteps if noisy else (),
        diffc_timestep=config.diffc_timestep if noisy else None,
        seed=config.seed,
        batch_size=config.batch_size,
        k=config.k,
        expansion=config.expansion,
        steps=config.steps,
        ksae_batch=config.ksae_batch,
        learning_rate=config.learning_rate,
        top=config.top,
        width=config.width,
        epochs=config.epochs,
    )
