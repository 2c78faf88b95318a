"""Store -> k-sparse autoencoder (Sec. 3.2): k of n = expansion * d latents stay active per row.

Prints what trains and what it costs, then trains; `final/` holds the model, `report.json` its fraction of
variance unexplained, L0, dead share and activation densities, all on the sparse codes.

    revelio train-ksae --config configs/ksae/quick.yaml --store runs/samples/up_ft1-t25-empty-d0
    revelio train-ksae --config configs/ksae/paper.yaml --store runs/pets/up_ft1-t25-empty-d0
    revelio train-ksae --config configs/ksae/paper.yaml --resume
    revelio train-ksae --config configs/ksae/quick.yaml --grid.k 16 32 --grid.seed 0 1 2
    revelio train-ksae --store runs/c/up_ft1-t25-empty-d0-c64 --rows cells --out runs/cells --epochs 2
    revelio train-ksae --store runs/x/up_ft1-t25-empty-d0 runs/x/up_ft1-t200-empty-d0 --normalize mean-norm
    torchrun --nproc-per-node 2 -m revelio train-ksae --config configs/ksae/paper.yaml

A row is an image, or a cell of its grid (`--rows cells`). Several stores of one width train one k-SAE, which
is measured on each.

With a grid, every combination of the values listed is a k-SAE with a run folder of its own in `out`; each
store is read and shuffled once for all that share it. Several processes share every batch, or the latents.
"""

from dataclasses import dataclass

from revelio.sae.config import TrainSAEConfig


@dataclass(frozen=True, kw_only=True)
class Config(TrainSAEConfig):
    """Which activations to train on, and how."""

    plan: bool = False
    """Only print what it would cost."""


def run(config: Config) -> None:
    """Train, save, measure, and name what was written."""
    from revelio.cli.bar import Bar
    from revelio.distributed import is_main
    from revelio.following import following
    from revelio.pipelines.train_sae import plan_sae, train_sae

    with Bar("k-SAE") as bar:
        if config.plan:
            plan_sae(config, bar)
            return
        made = train_sae(config, bar)
    if is_main():
        print(following("top-images", "--store", config.store[0], "--ksae", made[0].path))
