"""Store -> k-sparse autoencoder (Sec. 3.2): k of n = expansion * d latents stay active an image.

Prints what trains and what it costs, then trains; `final/` holds the model, `report.json` its fraction of
variance unexplained, L0, dead share and activation densities, all on the sparse codes.

    revelio train-ksae --store runs/samples/up_ft1-t25-empty-d0 --out runs/ksae --batch-size 256 --epochs 50
    revelio train-ksae --config configs/ksae/paper.yaml --store runs/pets/up_ft1-t25-empty-d0
    revelio train-ksae --config configs/ksae/paper.yaml --resume
    revelio train-ksae --config configs/ksae/quick.yaml --grid.k 16 32 --grid.seed 0 1 2
    torchrun --nproc-per-node 2 -m revelio train-ksae --config configs/ksae/paper.yaml

With a grid, every combination of the values listed is a k-SAE with a run folder of its own in `out`; each
store is read and shuffled once for all that share it. Several processes share every batch, or the latents.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from revelio.bounds import (
    Count,
    Device,
    Folder,
    Index,
    LearningRate,
    NotNegative,
    OutFolder,
    Positive,
    Seed,
    Share,
    Workers,
)
from revelio.commands.ksae_grid import Grid, expand

if TYPE_CHECKING:
    from revelio.commands.ksae_team import Team
    from revelio.sae.kernel import Kernel


@dataclass(frozen=True)
class Config:
    """Which activations to train on, and how."""

    store: Folder
    """The activation store, a folder that `revelio extract` wrote."""

    out: OutFolder
    """The run directory; with a grid, the folder of the run directories."""

    mode: Literal["fixed", "as_paper", "as_code"] = "fixed"
    """`as_code` follows the released training step, `as_paper` the text, `fixed` what it meant."""

    k: Count = 32
    """Latents that stay active, an image."""

    expansion: Count = 64
    """Latents a dimension of the activations: n = expansion * d."""

    activation: Literal["topk", "batch-topk", "jumprelu"] = "topk"
    """Which latents are active: the k largest of a row; the b k largest of a batch, later all above a
    threshold; all above a threshold that each latent learns, k on average."""

    prefixes: tuple[Count, ...] = ()
    """Matryoshka: the first so many latents alone are to reconstruct too."""

    steps: Count = 10_240
    """Updates. 10,240 full batches are the paper's budget."""

    epochs: Positive | None = None
    """Passes over the store, instead of `steps`."""

    samples: Count | None = None
    """Rows to train on, instead of `steps`."""

    batch_size: Count = 8192
    """Rows a step; a smaller store is one full batch."""

    learning_rate: LearningRate = 4e-4
    """Adam's, after warm-up."""

    warmup_steps: Index = 500
    """Steps of linear warm-up."""

    seed: Seed = 0
    """Of the first weights and of the rows' order."""

    order_seed: Seed | None = None
    """Of the rows' order alone; none: `seed`."""

    pre_bias: Literal["mean", "geometric_median"] = "mean"
    """What b_pre starts as: of the first 32,768 rows. `as_code` always takes the first batch's mean."""

    auxk: Index = 0
    """Dead latents that learn the residual, an image; 0: none."""

    auxk_coefficient: NotNegative = 1 / 32
    """The weight of their loss."""

    dead_after: Count = 100_000
    """Rows without a latent after which it counts as dead."""

    bandwidth: Positive = 0.1
    """JumpReLU's kernel width, in standard deviations of the activations."""

    sparsity: NotNegative = 1.0
    """The weight of JumpReLU's penalty (L0 / k - 1)^2."""

    early_stop: Share = 0.0
    """Stop when the mean loss of 500 steps is not lower by this share than the best before; 0: never."""

    early_stop_window: Count = 500
    """Steps over which the loss is averaged for that."""

    memory_gib: NotNegative = 4.0
    """A store up to this size is held in memory and shuffled as a whole; a larger one is streamed, and
    shuffled in windows of 65,536 rows."""

    workers: Workers = 0
    """Threads that read a streamed store ahead; the result is the same."""

    log_every: Count = 10
    """Steps between lines of `metrics.jsonl`."""

    checkpoint_every: Index = 1000
    """Steps between checkpoints; 0: none."""

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`."""

    kernel: Literal["auto", "native", "torch"] = "auto"
    """`native` is compiled once, needs a C++ compiler and AVX2, and is several times faster on a CPU; `auto`
    takes it where it can be had."""

    sharing: Literal["data", "latents"] = "data"
    """What several processes share: every batch, or the latents (for a k-SAE that fits none of them)."""

    grid: Grid = field(default_factory=Grid)
    """Values to combine, each combination a k-SAE."""

    plan: bool = False
    """Only print what it would cost."""

    resume: bool = False
    """Go on from the last checkpoint; on a CPU the result is bit-equal to an uninterrupted run."""


def run(config: Config) -> None:
    """Train, save, measure, and name what was written."""
    from revelio.commands.ksae_runs import train_together
    from revelio.commands.ksae_team import gather_team
    from revelio.files import check_folder

    if config.epochs is not None and config.samples is not None:
        raise ValueError("give epochs or samples, not both")
    if not config.plan:
        check_folder(config.out)
    team = gather_team(config.device, config.sharing)
    try:
        for together in expand(config):
            _check_room(together, team)
            if config.plan:
                _announce(together, team)
            else:
                train_together(together, team, lambda left: _announce(left, team))
        if team.main and not config.plan:
            print(_next(expand(config)[0][0]))
    finally:
        team.close()


def _next(config: Config) -> str:
    from revelio.following import beside, following

    top = beside(config.out, "top-images")
    final = config.out / "final"
    return following("top-images", "--store", config.store, "--ksae", final, "--out", top)


def _check_room(configs: list[Config], team: "Team") -> None:
    """Say before anything is allocated that it does not fit.

    Raises:
        ValueError: it does not, and more than the plan was asked for.
    """
    from revelio.activations.store import ActivationStore
    from revelio.commands.ksae_inputs import build_job, build_settings
    from revelio.commands.plan_ksae import line, shortage

    store = ActivationStore.open(configs[0].store)
    rows = len(store)
    jobs = [build_job(one, store, build_settings(one, rows), team) for one in configs]
    reason = shortage(jobs, configs[0].out, in_memory=team.device.type == "cpu")
    if reason is None or not team.main:
        return
    if not configs[0].plan:
        print("\n".join(line(job, None) for job in jobs), flush=True)
        raise ValueError(f"{reason}: lower --expansion, --batch-size or --memory-gib")
    print(f"warning: {reason}", flush=True)


def _announce_kernel(config: Config, team: "Team") -> "Kernel":
    """Print which kernel trains, before the seconds that compiling it may take."""
    from revelio.sae.kernel_choice import COMPILING, choose_kernel, must_compile

    if must_compile(config.kernel, team.device):
        print(COMPILING, flush=True)
    chosen = choose_kernel(config.kernel, team.device)
    print(chosen.reason, flush=True)
    return chosen.kernel


def _announce(configs: list[Config], team: "Team") -> None:
    """Print what trains, and what it costs by the second that is measured for it."""
    from revelio.activations.store import ActivationStore
    from revelio.commands.ksae_inputs import build_job, build_settings
    from revelio.commands.plan_ksae import can_measure, line
    from revelio.sae.plan import measured_speed

    if not team.main:
        return
    kernel = _announce_kernel(configs[0], team)
    store = ActivationStore.open(configs[0].store)
    for config in configs:
        job = build_job(config, store, build_settings(config, len(store)), team)
        learnt = config.activation == "jumprelu"
        thresholds = ", threshold" if learnt else ""
        size = 2 * job.n * job.d + job.n * (1 + learnt) + job.d
        # Elsewhere than on a CPU the second would be another device's: the first steps tell.
        cpu = team.device.type == "cpu"
        speed = measured_speed(job, kernel) if cpu and can_measure(job) else None
        print(
            f"k-SAE ({config.mode}, {config.activation}): d {job.d}, n {job.n:,}, k {job.k}, "
            f"{job.rows:,} rows\n"
            f"trains: W_enc, b_enc, W_dec, b_dec{thresholds}, {size:,} parameters; frozen: none\n"
            f"{line(job, speed)}",
            flush=True,
        )
