"""Test a trained Diff-C on images or stored grids: accuracy, accuracy by class, confusion.

The classifier knows its class names and how its grids were made, so that it needs only images. Without labels
it writes its predictions, and no accuracy.

    revelio eval-diffc --diffc runs/diffc/final --data.source caltech101 --data.split test
    revelio eval-diffc --diffc runs/diffc/final --data.source my/photos --out runs/mine
    revelio eval-diffc --diffc runs/diffc/final --store runs/test/up_ft1-t25-empty-d0
"""

from typing import Any

from revelio.diffc.config import EvalDiffCConfig as Config


def run(config: Config) -> None:
    """Test, and name what was written."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.eval_diffc import eval_diffc

    with Bar("testing") as bar:
        report = eval_diffc(config, bar)
    print(_next(config, report["grids"]))


def _next(config: Config, made: dict[str, Any]) -> str:
    """The classified layer as pictures; of raw pixels, a model to compare with them."""
    from revelio.cli.pictures import WHERE
    from revelio.diffc.pixels import PixelsBackbone
    from revelio.following import beside, flags, following

    data = [*flags(config.data, "data", *WHERE), "--data.source"]
    data += ["FOLDER" if config.store is not None else config.data.source]
    if made.get("backbone") == PixelsBackbone.name:
        return following("train-diffc", *data, "--out", beside(config.out, "diffc"))
    backbone = ["--backbone.name", made.get("backbone") or "BACKBONE"]
    timestep = made.get("timestep")
    layer = ["--layers", made.get("layer") or "LAYER", "--timesteps"]
    layer += [] if timestep is None else [timestep]
    return following("pca-maps", *data, *backbone, *layer, "--out", beside(config.out, "pca-maps"))
