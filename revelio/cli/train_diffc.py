"""Train Diff-C, the light classifier, on one layer's grids, and test it.

Images go through a frozen backbone (or their stored grids are read), four convolutions are trained on
what comes out, and the test set is seen once at the end. Needs labels: class folders or a label column.

    revelio train-diffc --data.source caltech101 --backbone.name sd-1.5 --layer up_ft1 --timestep 25
    revelio train-diffc --config configs/diffc/mini-sd-samples.yaml --out runs/diffc --seeds 3
    revelio train-diffc --store runs/train/up_ft1-t25-empty-d0 --test-store runs/test/up_ft1-t25-empty-d0
    torchrun --nproc-per-node 2 -m revelio train-diffc --config configs/diffc/sd15-pets.yaml

Two baselines take the same path: `--backbone.name pixels --layer pixels --timestep None` is the picture
itself, `--random-weights 0` the same backbone untrained.
"""

from pathlib import Path

from revelio.diffc.config import TrainDiffCConfig as Config


def run(config: Config) -> None:
    """Train and test, and name what was written."""
    from revelio.cli.bar import Bar
    from revelio.distributed import is_main
    from revelio.pipelines.train_diffc import train_diffc

    with Bar("Diff-C") as bar:
        train_diffc(config, bar)
    if is_main():
        print(_next(config))


def _next(config: Config) -> str:
    from revelio.cli.pictures import WHERE
    from revelio.following import beside, flags, following

    if config.store:
        images = ["--store", config.test_store or "STORE"]
    else:
        images = [*flags(config.data, "data", *WHERE)]
        images += ["--data.source", config.data.source, "--data.split", config.test.split]
    name = config.backbone.name
    # Of a saved classifier, code is imported and a place of this machine looked at only where they are named.
    named = ["--backbone", name] if ":" in name or Path(name).is_absolute() else []
    final, out = config.out / "final", beside(config.out, "eval")
    return following("eval-diffc", "--diffc", final, *images, *named, "--out", out)
