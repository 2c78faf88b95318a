"""A stage's checkpoints, `checkpoints/checkpoint-N/`: whole or not used, however a run was stopped.

The Trainer writes a checkpoint's files one by one. `files.json`, with the hash of each, comes last: only with
it a checkpoint counts. The first versions wrote none; of their checkpoints the Trainer's state came last.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from revelio.distributed import left_alone, world_size
from revelio.files import names_in, remove_files, settle, sweep
from revelio.run_dir import sha256, write_json
from revelio.trust import WRONG, file_in, path_in, printable, read_object
from revelio.wording import plural

TRAINED = "trained.safetensors"
STATE = "trainer_state.json"
FILES = "files.json"
# What the Trainer, DeepSpeed and this module write into a checkpoint.
_OURS = re.compile(
    r"files\.json|trained\.safetensors|trainer_state\.json|training_args\.bin|(optimizer|scheduler|scaler)\.pt|"
    r"rng_state(_\d+)?\.pth|latest|zero_to_(fp32|torch)\.py|(bf16_)?zero_pp_rank_.*\.pt|mp_rank_.*\.pt"
)
_FOLDER = re.compile(r"checkpoint-(\d{1,12})")


def begin(folder: Path) -> None:
    """Say that a checkpoint is not whole yet: without the file it would pass for one of a first version."""
    write_json(folder / FILES, {})


def commit(folder: Path) -> None:
    """Flush a checkpoint's files, and note them down: from now on it is whole."""
    sweep(folder)  # of a run that was stopped at this step before
    settle(folder)
    names = {name for name in names_in(folder) if _OURS.fullmatch(Path(name).name)} - {FILES}
    write_json(folder / FILES, {name: sha256(folder / name) for name in sorted(names)})


def last_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint of a run.

    Raises:
        ValueError: a file of it is not what was written; the message names it.
    """
    found = max(filter(_is_whole, _checkpoints(out)), key=checkpoint_step, default=None)
    if found is not None and (found / FILES).exists():
        for name, digest in _files(found).items():
            if sha256(path_in(found, name)) != digest:
                raise ValueError(
                    f"{printable(found / name)} is not what the run wrote: remove {found.name} to go on from "
                    "the checkpoint before it"
                )
    return found


def check_state(checkpoint: Path) -> None:
    """Refuse a checkpoint whose state of the Trainer is of another form.

    Raises:
        ValueError: it is; the message names the file.
    """
    from transformers import TrainerState

    state = read_object(checkpoint / STATE)
    for name in ("global_step", "max_steps", "num_train_epochs"):
        if type(state.get(name)) is not int:
            raise ValueError(f"{printable(checkpoint / STATE)} has no number as `{name}`")
    with readable(checkpoint):
        TrainerState.load_from_json(str(checkpoint / STATE))


@contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """Turn what another's or a damaged file ends in, while a checkpoint is read, into one line.

    Raises:
        ValueError: it can't be read.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*WRONG, UnpicklingError, RuntimeError, EOFError) as error:
        if left_alone(error):  # the checkpoint is not to blame
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{printable(checkpoint)} can't be read, or holds more than plain values "
            f"({printable(reason)[:200]}): remove it to go on from the checkpoint before it"
        ) from error


def drop_checkpoints(out: Path, keep: int) -> None:
    """Remove the files of all checkpoints but the last ``keep`` whole ones; what else is there stays."""
    whole = sorted(filter(_is_whole, _checkpoints(out)), key=checkpoint_step)
    for folder in set(_checkpoints(out)) - set(whole[-keep:]):
        sweep(folder)
        # What says that it is whole goes first.
        for name in (FILES, STATE):
            (folder / name).unlink(missing_ok=True)
        for inner in folder.glob("global_step*"):
            remove_files(inner, _OURS.fullmatch)
        remove_files(folder, _OURS.fullmatch)


def checkpoint_step(path: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(path.name.rpartition("-")[2])


def check_processes(checkpoint: Path) -> None:
    """Refuse DeepSpeed's checkpoint of another number of processes: each wrote its own share.

    Raises:
        ValueError: it is of another number.
    """
    shares = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    if shares not in (0, world_size()):
        raise ValueError(
            f"{checkpoint} was written by {plural(shares, 'process', 'processes')} under ZeRO, and there are "
            f"{world_size()} now: resume with as many as before, or remove {checkpoint.name} if the run was "
            "stopped while it was written"
        )


def _checkpoints(out: Path) -> list[Path]:
    folder = out / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return [
        one
        for one in found
        if _FOLDER.fullmatch(one.name) and one.is_dir() and not one.is_symlink()
    ]


def _is_whole(folder: Path) -> bool:
    """Whether all files are there that it was committed with; of the first versions', whether the last is."""
    try:
        if (folder / FILES).exists():
            return all(path_in(folder, name).is_file() for name in _files(folder))
        return "global_step" in read_object(folder / STATE)
    except ValueError:
        return False


def _files(folder: Path) -> dict[str, str]:
    found = read_object(file_in(folder, FILES))
    if not {TRAINED, STATE} & set(found):
        raise ValueError(f"{printable(folder / FILES)} lists no checkpoint")
    return found


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """What a checkpoint holds of a model: the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _frozen(model: torch.nn.Module) -> set[str]:
    """The names of frozen weights, all of them where a weight is tied."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def without_frozen(model: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Take what is frozen out of a state dict."""
    for name in _frozen(model):
        state.pop(prefix + name, None)


def pass_over_frozen(model: torch.nn.Module, keys: Any) -> None:
    """Let a checkpoint lack what is frozen."""
    frozen = _frozen(model)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]
