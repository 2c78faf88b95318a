"""Draw with more or less of a concept: pictures, a sheet with strengths as columns, report.json.

A concept is added to the prompt's call of the text encoder and subtracted from the unconditional one, so that
guidance amplifies it. Latents of a denoiser's layer are edited while it samples.

    revelio steer --concept runs/nudity --strength -0.5 0 0.5 --prompts-file prompts.txt --out runs/drawn
    revelio steer --layer up_ft0 --ksae K --latent-values 13:2.0 487:0 --strength 0 1 --prompts-file P --out D
    revelio steer --concept C --prompts-file i2p.csv --backbone.name sd-1.4 --limit 20 --out runs/i2p

A table's seed and guidance columns (of the I2P prompts) are taken as they are. A stopped command goes on with
the pictures that it has drawn when it is run again.
"""

from revelio.steering.config import SteerConfig as Config


def run(config: Config) -> None:
    """Draw, and name what was written."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.steer import SHEET, steer

    with Bar("steer") as bar:
        made = steer(config, bar)
    took = ", ".join(f"{s}: {t:.2f} s" for s, t in made.report["seconds_a_picture"].items())
    print(f"time a picture, by strength: {took}")
    print(f"wrote {made.path}: see {made.path / SHEET}")
    print(_next(config))


def _next(config: Config) -> str:
    """Measure it: the same edit on a table of prompts with classes; the one drawn, if it has some."""
    from dataclasses import fields

    from revelio.following import beside, flags, following
    from revelio.steering.config import DrawConfig, EditConfig, PromptsConfig

    # All of the edit and of how it is drawn: with less, another edit would be measured.
    alike = [field.name for of in (EditConfig, DrawConfig) for field in fields(of)]
    drawn = flags(config, "", *(field.name for field in fields(PromptsConfig)))
    words = [
        *flags(config, "", *alike),
        *flags(config.backbone, "backbone"),
        *(drawn if _has_classes(config) else ("--prompts-file", "TABLE")),
        "--target",
        "CLASS",
    ]
    return following("steer-eval", *words, "--out", beside(config.out, "eval"))


def _has_classes(config: Config) -> bool:
    """Whether the prompts are a table that says which of two classes or more each names."""
    from pathlib import Path

    from revelio.pipelines.steer_parts import the_prompts
    from revelio.steering.config import SteerEvalConfig

    # A data set would be opened, or downloaded, once more.
    if config.prompts_file is None or not Path(config.prompts_file).is_file():
        return False
    try:
        prompts = the_prompts(config, SteerEvalConfig.target_column)
    except ValueError:
        return False
    return len({one.wanted for one in prompts}) > 1
