"""Which layer, timestep, prompt and model to take for your own pictures.

A few hundred images with class folders are enough: a cheap pass over everything, then more images for the
contenders only. It recommends one, says how sure that is and what the runner-up costs, draws a heat map, and
writes a Diff-C config and a LLaVA tower config. Without labels it advises nothing, and says where to begin.

    revelio advise --data.source my/photos
    revelio advise --data.source my/photos --backbone.name sd-1.5 --others dinov2-vit-b-14 --out runs/advice
    revelio advise --data.source my/photos --timesteps 25 100 200 --prompts empty generic --resume
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from revelio.advisor.config import AdviseConfig

if TYPE_CHECKING:
    from revelio.pipelines.advise import Advice


@dataclass(frozen=True, kw_only=True)
class Config(AdviseConfig):
    """What is compared, on which images, and how much is spent on it."""

    plan: bool = False
    """Only measure and print what it would cost."""


def run(config: Config) -> None:
    """Race the candidates, and say what to take."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.advise import RESULTS, advise, plan_advice

    with Bar("advice") as bar:
        if config.plan:
            plan_advice(config, bar)
            return
        made = advise(config, bar)
    print("\n".join(made.words))
    print(f"wrote {', '.join(str(made.path / name) for name in RESULTS)}")
    print(_next(config, made))


def _next(config: Config, made: "Advice") -> str:
    """A classifier on the layer; without labels, which it needs, the layer's activations."""
    from revelio.following import beside, flags, following

    if made.result["labelled"]:
        return following("train-diffc", "--config", made.path / "diffc.yaml")
    best = made.result["recommended"]
    backbone = replace(config.backbone, name=best["model"])
    words = [*flags(config.data, "data"), *flags(backbone, "backbone")]
    words += ["--layers", best["layer"], "--timesteps"]
    if best["timestep"] is not None:
        words += [best["timestep"], "--prompts", best["prompt"]]
    return following("extract", *words, "--out", beside(made.path, "activations"))
