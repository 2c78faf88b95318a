"""A k-SAE at the end of its training: measured on the rows it saw and on those kept out, saved, reported."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from revelio.bounds import shared
from revelio.pipelines import Progress, Report
from revelio.pipelines.sae_processes import DistContext
from revelio.pipelines.sae_rows import JoinedRows
from revelio.run_dir import Run, write_folder, write_json
from revelio.sae.config import TrainConfig, TrainSAEConfig
from revelio.sae.dataloader import Batches
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.sharded_files import save_sharded
from revelio.sae.train import SAERun
from revelio.wording import plural


@dataclass(frozen=True)
class Training:
    """A k-SAE that trains on ``rows`` rows, with its run folder; only the main process writes there."""

    config: TrainSAEConfig
    record: Run
    run: SAERun
    context: DistContext
    rows: int


def finish(
    training: Training, batches: Batches, kept: JoinedRows, held_out: JoinedRows, progress: Report
) -> None:
    """Measure the k-SAE on the rows it was trained on and on those kept out; write it with its report."""
    config, record, run = training.config, training.record, training.run
    model, state = run.model, run.state
    assert state is not None
    # Encoding is most of what measuring takes: by the kernel that trained.
    model.kernel = run.kernel or model.kernel
    found = evaluate(model, batches.epoch(0), "normalized")
    model.trained_on.update(steps=state.step, samples=state.samples, fvu=found.fvu)
    unseen = _unseen(model, held_out)
    if unseen is not None:
        model.trained_on.update(held_out_rows=unseen["rows"], held_out_fvu=unseen["fvu"])
    stores = _by_store(model, kept, held_out)
    said = {
        "training": shared(run.config, TrainConfig),
        "on the training rows": _without_density(asdict(found)),
    }
    if unseen is not None:
        said["on held-out rows"] = _without_density(unseen)
    _save(training, said)
    if not training.context.main:
        return
    report = {
        "mode": model.mode,
        "activation": model.activation,
        "prefixes": list(model.prefixes),
        "trained_on": model.trained_on,
        "d": model.d,
        "n": model.n,
        "k": model.k,
        "seed": config.seed,
        "steps": state.step,
        "samples": state.samples,
        "epochs": round(state.samples / training.rows, 3),
        "stopped_early": state.stopped,
        "variance": state.variance if model.mode == "fixed" else None,
        **asdict(found),
        "held_out": unseen,
        **({"stores": stores} if stores else {}),
        "seconds": record.seconds,
    }
    write_json(config.out / "report.json", report)
    record.finish(steps=state.step, samples=state.samples)
    progress(
        Progress(
            f"fraction of variance unexplained {found.fvu:.4f}{_beside(unseen)}, L0 {found.l0:.1f}, "
            f"dead (active on no row) {found.dead_share:.1%} of {plural(model.n, 'latent')} on "
            f"{plural(found.rows, 'row')}\nwrote {config.out / 'final'}, {config.out / 'report.json'}, "
            f"{record.metrics_path}"
        )
    )


def _by_store(
    model: KSparseAutoencoder, kept: JoinedRows, held_out: JoinedRows
) -> list[dict[str, Any]]:
    """The k-SAE measured on each store by itself, in the units of its rows; none where it has no inputs."""
    found = []
    for place, input in enumerate(model.inputs):
        about = dict(input.about) | {"normalize": input.kind}
        for name, rows in (("trained", kept.parts[place]), ("held_out", held_out.parts[place])):
            if len(rows):
                measured = evaluate(model, rows.batches(raw=True), place)
                about[name] = _without_density(asdict(measured))
        found.append(about)
    return found


def _without_density(measured: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in measured.items() if key != "density"}


def _unseen(model: KSparseAutoencoder, rows: JoinedRows) -> dict[str, Any] | None:
    """The k-SAE measured on rows it has not seen; None where there are none."""
    if not len(rows):
        return None
    try:
        return asdict(evaluate(model, rows.batches(), "normalized"))
    except ValueError as error:  # all the same, say: no reason to lose what was trained
        return {"rows": len(rows), "fvu": None, "reason": str(error)}


def _beside(unseen: dict[str, Any] | None) -> str:
    if unseen is None or unseen["fvu"] is None:
        return ""
    return f" (on {plural(unseen['rows'], 'held-out row')} {unseen['fvu']:.4f})"


def _save(training: Training, card: dict[str, Any]) -> None:
    """Write ``final/``; ``card`` is what its model card says beside the sizes."""
    model, context, final = training.run.model, training.context, training.config.out / "final"
    if context.group is None or context.sharing == "data":
        if context.main:
            save = partial(model.save_pretrained, model_card_kwargs=card)
            write_folder(final, save)
        return
    group = context.group
    if context.main:
        write_folder(final, lambda folder: save_sharded(folder, model, group, card))
    else:
        save_sharded(None, model, group)
