"""The whole of Revelio on a model and your pictures: what a diffusion model knows about them.

Trains a k-sparse autoencoder on the pooled activations of every layer and timestep and measures the purity of
its latents; takes the layer and timestep that are surely purest and trains one on the cells of its grids,
shows in a gallery where its latents fire, and judges it on held-out pictures beside six control dictionaries;
trains Diff-C on every layer beside raw pixels and random weights. Writes report.html, report.json and
gallery/. About ten minutes on two CPU cores.

  revelio demo                              the shipped model on the shipped pictures
  revelio demo --data.source FOLDER --backbone.name mini-sd-photo --out runs/own
  revelio demo --data.source oxford-iiit-pet --backbone.name sd-1.5 --backbone.image-size 512
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from revelio.pipelines.demo.config import DemoConfig as Config

if TYPE_CHECKING:
    from revelio.pipelines import Reported


def run(config: Config) -> None:
    """Run the demo and say what it wrote."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.demo.run import run_demo

    with Bar("demo") as bar:
        made = run_demo(config, bar)
    for row in made.report["findings"]:
        print(f"  {row['value']:>16}  {row['text']}")
    print(f"\nReport   {made.path / 'report.html'}  (numbers: report.json)")
    print(f"Gallery  {made.path / 'gallery' / 'index.html'}")
    print(_next(config, made))
    for line in _draw(config, made):
        print(line)


def _next(config: Config, made: "Reported") -> str:
    """After the shipped pictures, the user's own; after those, a larger k-SAE of the layer shown."""
    from revelio.following import beside, flags, following

    if config.data.source == "samples":
        photos = ["--data.source", "FOLDER", "--backbone.name", "mini-sd-photo"]
        return following("demo", *photos, "--out", config.out.with_name("own"))
    shown = made.report["shown"]
    layer = ["--layers", shown["layer"], "--timesteps"]
    layer += [] if shown["timestep"] is None else [shown["timestep"]]
    chosen = [*flags(config.data, "data"), *flags(config.backbone, "backbone"), *layer]
    return following("extract", *chosen, "--out", beside(config.out, "activations"))


def _draw(config: Config, made: "Reported") -> Iterator[str]:
    """How to draw with more of what the gallery shows: only with a U-Net, which takes any text."""
    from revelio.backbones.registry import describe_one
    from revelio.following import beside, flags, following

    shown, examples = made.report["shown"], made.report["examples"]
    # A demo of before showed latents of pooled activations; a model of the user's own may not be described.
    if not examples or shown["timestep"] is None or "cells" not in made.report:
        return
    if describe_one(config.backbone.name, config.backbone.revision).kind != "U-Net":
        return
    cells, name = config.out / "cells", f"{shown['layer']}-t{shown['timestep']}-empty-d0"
    model, first = list(flags(config.backbone, "backbone")), examples[0]
    words = ["--guidance", 3, "--texts", "a photo", "--images-per-prompt", 4]
    if not made.report["labelled"]:
        # The strongest code of a cell, added to every cell, is far more than a picture has.
        latent = [
            "--latent-values",
            f"{first['latent']}:{first['strongest']}",
            "--operation",
            "add",
        ]
        latent += ["--strength", 0, 0.25, 0.5, 1]
        out = beside(config.out, "drawn")
        line = following("steer", *model, "--ksae", cells / "ksae", *latent, *words, "--out", out)
        yield line.replace("next:", f"draw with more of latent {first['latent']}:")
        return
    wanted, concept = first["images"][0]["label"], beside(config.out, "concept")
    what = ["--ksae", cells / "ksae", "--store", cells / "train" / name, "--class-name", wanted]
    line = following("concept", *what, "--find", 8, "--codes", "sparse", "--out", concept)
    yield line.replace("next:", f"draw more of {wanted}, by the eight latents that know it best:")
    # On the shipped models pictures change by these and still show something.
    words += ["--strength", 0, 2, 4, 8]
    out = beside(config.out, "drawn")
    line = following("steer", *model, "--concept", concept, *words, "--out", out)
    yield line.replace("next:", "... and then:")
