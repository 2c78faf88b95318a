"""Run folders of `revelio train-ksae`: open or resume them, follow the training, write what came out."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.commands.ksae_team import Team
    from revelio.commands.train_ksae import Config
    from revelio.runs import Run
    from revelio.sae.dataloader import Shuffled
    from revelio.sae.state import StepState
    from revelio.sae.train import Member

# What a finished run has.
RESULTS = ("report.json", "final/config.json", "final/model.safetensors")


@dataclass(frozen=True)
class _Training:
    """A k-SAE that trains, with its run folder; only the main process writes there."""

    config: "Config"
    record: "Run"
    member: "Member"
    team: "Team"
    rows: int


def train_together(
    configs: "list[Config]", team: "Team", announce: "Callable[[list[Config]], None]"
) -> None:
    """Train the k-SAEs of configs with the same store and order of rows, in one pass over them.

    Raises:
        ValueError: a run folder is taken, or something does not fit together.
    """
    from revelio.activations.store import ActivationStore
    from revelio.commands.ksae_inputs import build_rows

    store = ActivationStore.open(configs[0].store)
    rows = build_rows(store, configs[0], team)
    opened = [_open(config, store, team) for config in configs]
    trainings = [training for training in opened if training is not None]
    if not trainings:
        return
    announce([training.config for training in trainings])
    for training in trainings:
        _resume(training)
    _follow(trainings, rows)
    for training in trainings:
        _finish(training, rows, len(store))


def _open(config: "Config", store: "ActivationStore", team: "Team") -> _Training | None:
    """The k-SAE and its run folder; None if that is finished."""
    from revelio.commands.ksae_inputs import build_model, build_settings, describe
    from revelio.config import to_yaml
    from revelio.runs import Run
    from revelio.sae.train import Member

    settings = build_settings(config, len(store))
    model = build_model(config, store, team)
    if team.main:
        record = Run.open(
            config.out, "train-ksae", to_yaml(config), resume=config.resume, results=RESULTS
        )
        if not record.finished:
            record.add_input("store", describe(store))
    team.wait()
    if not team.main:
        record = Run.open(config.out, "train-ksae", to_yaml(config), resume=True, writes=False)
    if not record.finished:
        kernel = team.kernel(model, config.kernel)
        member = Member(model, settings, kernel=kernel)
        return _Training(config, record, member, team, len(store))
    if team.main:
        print(f"{config.out} is finished already: see {config.out / 'report.json'}")
    return None


def _resume(training: _Training) -> None:
    from revelio.runs import KEEP
    from revelio.sae.checkpoint import load_checkpoint

    record, member, team = training.record, training.member, training.team
    step, folder = record.latest_checkpoint() or (0, None)
    if team.main:
        record.truncate_metrics(step)
        record.drop_checkpoints(keep=KEEP)
    if folder is None:
        return
    if team.main:
        print(f"{record.path}: resuming after step {step:,}")
    member.state = load_checkpoint(folder, member.model, team.files(member.model.n))
    if member.state.step != step:
        raise ValueError(
            f"{folder} is of step {member.state.step}: it was renamed or edited, remove it"
        )


def _follow(trainings: list[_Training], rows: "Shuffled") -> None:
    """Train to the end: log, save, show progress; the first steps give the time it will take."""
    import time

    from tqdm import tqdm

    from revelio.sae.train import train_many

    members = [training.member for training in trainings]
    total = sum(member.settings.steps for member in members)
    done = sum(member.state.step for member in members if member.state)
    main, taken, began = trainings[0].team.main, 0, 0.0
    bar = tqdm(
        total=total, initial=done, unit="step", desc="k-SAE", smoothing=0.05, disable=not main
    )
    with bar:
        for place, step in train_many(members, rows):
            taken += 1
            # The first steps pay for one-time work, so the clock starts after them.
            if taken == len(members):
                began = time.monotonic()
            elif taken == 6 * len(members) and main:
                each = (time.monotonic() - began) / (5 * len(members))
                minutes = each * (total - done - taken) / 60
                rate = members[place].settings.batch_size / each
                bar.write(f"{rate:,.0f} rows/s: about {minutes:.1f} minutes")
            bar.update()
            _record(trainings[place], step, bar)


def _record(training: _Training, step: "StepState", bar: Any) -> None:
    """Log a step and save a checkpoint, each at its time."""
    from revelio.sae.checkpoint import checkpoint_bytes, save_checkpoint

    config, record, team = training.config, training.record, training.team
    if not isfinite(step.loss):
        raise ValueError(
            f"{config.out}: the loss of step {step.step:,} is {step.loss}: lower --learning-rate or "
            "lengthen --warmup-steps; checkpoints up to the step before are whole"
        )
    model, steps = training.member.model, training.member.settings.steps
    if team.main and (step.step % config.log_every == 0 or step.step in (1, steps)):
        record.log(**_line(step))
        bar.set_postfix(loss=f"{step.loss:.4f}", **_dead(step, training.rows))
    if config.checkpoint_every and step.step % config.checkpoint_every == 0:
        files = team.files(model.n)
        if team.main:
            record.save_checkpoint(
                step.step,
                lambda folder: save_checkpoint(folder, model, step.state, files),
                needed=checkpoint_bytes(model, step.state),
            )
        else:
            save_checkpoint(None, model, step.state, files)


def _dead(step: "StepState", rows: int) -> dict[str, str]:
    """The share of latents active on no row of one pass over the store, as the report has it.

    Nothing before the first pass is over: latents that are yet to see their rows are not dead.
    """
    if step.samples < rows:
        return {}
    unseen = step.samples - step.state.fired_at >= rows
    return {"dead": f"{float(unseen.double().mean()):.1%}"}


def _line(step: "StepState") -> dict[str, Any]:
    names = ("step", "epoch", "samples", "loss", "auxk_loss", "fvu", "l0", "active", "dead_share")
    line = {name: getattr(step, name) for name in (*names, "learning_rate")}
    # A batch of one row has no variance to explain.
    return {name: value if abs(value) < float("inf") else None for name, value in line.items()}


def _finish(training: _Training, rows: "Shuffled", count: int) -> None:
    """Measure the k-SAE, write it with its report, and say so."""
    from dataclasses import asdict

    from revelio.runs import write_json
    from revelio.sae.metrics import evaluate

    config, record, model = training.config, training.record, training.member.model
    state = training.member.state
    assert state is not None
    # Encoding is most of what measuring takes: by the kernel that trained.
    model.kernel = training.member.kernel or model.kernel
    found = evaluate(model, rows.epoch(0))
    model.trained_on.update(steps=state.step, samples=state.samples, fvu=found.fvu)
    _save(training)
    if not training.team.main:
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
        "epochs": round(state.samples / count, 3),
        "stopped_early": state.stopped,
        "variance": state.variance if model.mode == "fixed" else None,
        **asdict(found),
        "seconds": record.seconds,
    }
    write_json(config.out / "report.json", report)
    record.finish(steps=state.step, samples=state.samples)
    print(
        f"fraction of variance unexplained {found.fvu:.4f}, L0 {found.l0:.1f}, "
        f"dead (active on no row) {found.dead_share:.1%} of {model.n:,} latents on {found.rows:,} rows\n"
        f"wrote {config.out / 'final'}, {config.out / 'report.json'}, {record.metrics_path}"
    )


def _save(training: _Training) -> None:
    from revelio.runs import write_folder
    from revelio.sae.distributed import save_sharded

    model, team, final = training.member.model, training.team, training.config.out / "final"
    if team.group is None or team.sharing == "data":
        if team.main:
            write_folder(final, model.save_pretrained)
        return
    group = team.group
    if team.main:
        write_folder(final, lambda folder: save_sharded(folder, model, group))
    else:
        save_sharded(None, model, group)
