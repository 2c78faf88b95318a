"""Which layer, timestep, prompt and model to take for your own pictures.

A few hundred images with class folders are enough: a cheap pass over everything, then more images for the
contenders only. It recommends one, says how sure that is and what the runner-up costs, draws a heat map, and
writes a Diff-C config and a LLaVA tower config. Without labels it goes by label-free measures, and says so.

    revelio advise --data.source my/photos
    revelio advise --data.source my/photos --backbone.name sd-1.5 --others dinov2-vit-b-14 --out runs/advice
    revelio advise --data.source my/photos --timesteps 25 100 200 --prompts empty generic --resume
"""

from revelio.advisor.config import AdviseConfig as Config


def run(config: Config) -> None:
    """Race the candidates, and say what to take."""
    from revelio.cli.bar import Bar
    from revelio.following import following
    from revelio.pipelines.advise import RESULTS, advise

    with Bar("advice") as bar:
        made = advise(config, bar)
    print("\n".join(made.words))
    print(f"wrote {', '.join(str(made.path / name) for name in RESULTS)}")
    print(following("train-diffc", "--config", made.path / "diffc.yaml"))
