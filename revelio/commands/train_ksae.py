"""Store -> k-sparse autoencoder (Sec. 3.2): k of n = expansion * d latents stay active an image.

Prints what trains and what it costs, then trains; `final/` holds the model, `report.json` its fraction of
variance unexplained, L0, dead share and activation densities, all on the sparse codes.

    revelio train-ksae --store runs/samples/up_ft1-t25-empty-d0 --out runs/ksae --batch-size 256 --epochs 50
    revelio train-ksae --config configs/ksae/paper.yaml --store runs/pets/up_ft1-t25-empty-d0
    revelio train-ksae --config configs/ksae/paper.yaml --resume
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from revelio.runs import Run
    from revelio.sae.model import KSparseAutoencoder
    from revelio.sae.plan import Job
    from revelio.sae.rows import Shuffled
    from revelio.sae.state import StepState, TrainSettings, TrainState


@dataclass(frozen=True)
class Config:
    """Which activations to train on, and how."""

    store: Path
    """The activation store, a folder that `revelio extract` wrote."""

    out: Path
    """The run directory."""

    mode: Literal["fixed", "as_paper", "as_code"] = "fixed"
    """`as_code` follows the released training step, `as_paper` the text, `fixed` what it meant."""

    k: int = 32
    """Latents that stay active, an image."""

    expansion: int = 64
    """Latents a dimension of the activations: n = expansion * d."""

    steps: int = 10_240
    """Updates. 10,240 full batches are the paper's budget."""

    epochs: float | None = None
    """Passes over the store, instead of `steps`."""

    samples: int | None = None
    """Rows to train on, instead of `steps`."""

    batch_size: int = 8192
    """Rows a step; a smaller store is one full batch."""

    learning_rate: float = 4e-4
    """Adam's, after warm-up."""

    warmup_steps: int = 500
    """Steps of linear warm-up."""

    seed: int = 0
    """Of the first weights and of the rows' order."""

    pre_bias: Literal["mean", "geometric_median"] = "mean"
    """What b_pre starts as: of the first 32,768 rows. `as_code` always takes the first batch's mean."""

    auxk: int = 0
    """Dead latents that learn the residual, an image; 0: none."""

    auxk_coefficient: float = 1 / 32
    """The weight of their loss."""

    dead_after: int = 100_000
    """Rows without a latent after which it counts as dead."""

    early_stop: float = 0.0
    """Stop when the mean loss of 500 steps is not lower by this share than the best before; 0: never."""

    early_stop_window: int = 500
    """Steps over which the loss is averaged for that."""

    memory_gib: float = 4.0
    """A store up to this size is held in memory and shuffled as a whole; a larger one is streamed, and
    shuffled in windows of 65,536 rows."""

    workers: int = 0
    """Threads that read a streamed store ahead; the result is the same."""

    log_every: int = 10
    """Steps between lines of `metrics.jsonl`."""

    checkpoint_every: int = 1000
    """Steps between checkpoints; 0: none."""

    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`."""

    resume: bool = False
    """Go on from the last checkpoint; on a CPU the result is bit-equal to an uninterrupted run."""


def run(config: Config) -> None:
    """Train, save, measure, and name what was written."""
    from revelio.activations.store import ActivationStore
    from revelio.commands.ksae_inputs import (
        build_job,
        build_model,
        build_rows,
        build_settings,
        describe,
    )
    from revelio.config import to_yaml
    from revelio.runs import Run

    _check(config)
    store = ActivationStore.open(config.store)
    rows = build_rows(store, config)
    settings = build_settings(config, len(store))
    model = build_model(config, store)
    record = Run.open(config.out, "train-ksae", to_yaml(config), resume=config.resume)
    if record.finished:
        print(f"{config.out} is finished already: see {config.out / 'report.json'}")
        return
    record.add_input("store", describe(store))
    print(_announce(config, model, build_job(config, store, settings)), flush=True)
    state = _resumed(record, model)
    last = _follow(config, record, model, rows, settings, state)
    _finish(config, record, model, rows, last, len(store))


def _check(config: Config) -> None:
    small = {"k": config.k, "expansion": config.expansion, "log_every": config.log_every}
    for name, value in small.items():
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if config.epochs is not None and config.samples is not None:
        raise ValueError("give epochs or samples, not both")
    for name, value in {"epochs": config.epochs, "samples": config.samples}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: give more than 0")
    if config.checkpoint_every < 0:
        raise ValueError(f"checkpoint_every={config.checkpoint_every}: give 0 (none) or more")


def _announce(config: Config, model: "KSparseAutoencoder", job: "Job") -> str:
    """What trains, and what it costs by the second that is measured for it."""
    from revelio.commands.plan_ksae import line
    from revelio.sae.plan import measured_speed

    size = sum(parameter.numel() for parameter in model.parameters())
    # Elsewhere than on a CPU the second would be another device's: the first steps tell.
    speed = measured_speed(job) if model.b_dec.device.type == "cpu" else None
    return (
        f"k-SAE ({model.mode}): d {model.d}, n {model.n:,}, k {model.k}, {job.rows:,} rows\n"
        f"trains: W_enc, b_enc, W_dec, b_dec, {size:,} parameters; frozen: none\n"
        f"{line(job, speed)}"
    )


def _resumed(record: "Run", model: "KSparseAutoencoder") -> "TrainState | None":
    from revelio.sae.checkpoint import load_checkpoint

    found = record.latest_checkpoint()
    if found is None:
        record.truncate_metrics(0)
        return None
    step, folder = found
    record.truncate_metrics(step)
    print(f"resuming after step {step:,}")
    return load_checkpoint(folder, model)


def _follow(
    config: Config,
    record: "Run",
    model: "KSparseAutoencoder",
    rows: "Shuffled",
    settings: "TrainSettings",
    state: "TrainState | None",
) -> "TrainState":
    """Train to the end: log, save, show progress; the first steps give the time it will take."""
    import time

    from tqdm import tqdm

    from revelio.sae.checkpoint import save_checkpoint
    from revelio.sae.train import train

    done = state.step if state else 0
    bar = tqdm(total=settings.steps, initial=done, unit="step", desc="k-SAE", smoothing=0.05)
    began = None
    with bar:
        for step in train(model, rows, settings, state):
            state = step.state
            # The first step pays for one-time work, so the clock starts after it.
            if began is None:
                began = time.monotonic()
            elif step.step == done + 6:
                each = (time.monotonic() - began) / 5
                left = each * (settings.steps - step.step)
                bar.write(
                    f"{settings.batch_size / each:,.0f} rows/s: about {left / 60:.1f} minutes"
                )
            bar.update()
            if step.step % config.log_every == 0 or step.step in (1, settings.steps):
                record.log(**_line(step))
                bar.set_postfix(loss=f"{step.loss:.4f}", dead=f"{step.dead_share:.1%}")
            if config.checkpoint_every and step.step % config.checkpoint_every == 0:
                record.save_checkpoint(
                    step.step, lambda folder, at=step.state: save_checkpoint(folder, model, at)
                )
    assert state is not None
    return state


def _line(step: "StepState") -> dict[str, Any]:
    names = ("step", "epoch", "samples", "loss", "auxk_loss", "fvu", "l0", "active", "dead_share")
    line = {name: getattr(step, name) for name in (*names, "learning_rate")}
    # A batch of one row has no variance to explain.
    return {name: value if abs(value) < float("inf") else None for name, value in line.items()}


def _finish(
    config: Config,
    record: "Run",
    model: "KSparseAutoencoder",
    rows: "Shuffled",
    state: "TrainState",
    count: int,
) -> None:
    from dataclasses import asdict

    from revelio.runs import write_json, write_whole_by
    from revelio.sae.metrics import evaluate

    found = evaluate(model, rows.epoch(0))
    model.trained_on.update(steps=state.step, samples=state.samples, fvu=found.fvu)
    write_whole_by(config.out / "final", model.save_pretrained)
    record.finish(steps=state.step, samples=state.samples)
    report = {
        "mode": model.mode,
        "trained_on": model.trained_on,
        "d": model.d,
        "n": model.n,
        "k": model.k,
        "seed": config.seed,
        "steps": state.step,
        "samples": state.samples,
        "epochs": round(state.samples / count, 3),
        "stopped_early": state.stopped,
        "variance": state.variance if model.mode == "fixed" else None,
        **asdict(found),
        "seconds": record.manifest["seconds"],
    }
    write_json(config.out / "report.json", report)
    print(
        f"fraction of variance unexplained {found.fvu:.4f}, L0 {found.l0:.1f}, "
        f"dead {found.dead_share:.1%} of {model.n:,} latents on {found.rows:,} rows\n"
        f"wrote {config.out / 'final'}, {config.out / 'report.json'}, {record.metrics_path}"
    )
