"""The whole of Revelio on a model and your pictures: what a diffusion model knows about them.

Takes images through the model at several layers and timesteps, trains a k-sparse autoencoder on each and
measures the purity of its latents; trains one on the cells of the purest layer, shows in a gallery where its
latents fire, and judges it on held-out pictures beside what learned nothing; trains Diff-C on every layer
beside raw pixels and random weights. Writes report.html, report.json and gallery/. About ten minutes on two
CPU cores.

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
    for line in _steer(config, made):
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


def _steer(config: Config, made: "Reported") -> Iterator[str]:
    """The line that draws with more of the report's first latent; only of a U-Net, which takes any text."""
    from revelio.backbones.registry import describe_one
    from revelio.following import beside, flags, following

    shown, examples = made.report["shown"], made.report["examples"]
    # A demo of before has no activations; a model of the user's own may not be described.
    if not examples or "strongest" not in examples[0] or shown["timestep"] is None:
        return
    if describe_one(config.backbone.name, config.backbone.revision).kind != "U-Net":
        return
    name = f"{shown['layer']}-t{shown['timestep']}-empty-d0"
    # A run of before showed a k-SAE of pooled activations.
    ksae = config.out / "cells" / "ksae" if "cells" in made.report else config.out / "ksae" / name
    latent = f"{examples[0]['latent']}:{examples[0]['strongest']}"
    words = ["steer", *flags(config.backbone, "backbone"), "--ksae", ksae]
    # On both shipped U-Nets pictures change by these and still show something; more, or a guidance of 7.5,
    # which multiplies the change, leaves stripes.
    words += ["--latent-values", latent, "--operation", "add", "--strength", 0, 1, 2, 4]
    words += ["--guidance", 3]
    words += ["--texts", "a photo", "--images-per-prompt", 4, "--out", beside(config.out, "drawn")]
    yield following(*words).replace("next:", f"draw with more of latent {examples[0]['latent']}:")
