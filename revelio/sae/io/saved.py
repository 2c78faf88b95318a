"""A saved k-SAE read back: ``config.json`` and ``model.safetensors``, checked against each other.

Nothing is allocated before the file's own header says that it holds exactly the tensors, shapes and number
types which the settings ask for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revelio.hub import WEIGHTS, is_hub_id, trained
from revelio.tensor_files import read_tensors, tensor_headers
from revelio.trust import kind_of, printable, read_object

CONFIG = "config.json"
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "d": int,
    "n": int,
    "k": int,
    "mode": str,
    "trained_on": (dict, type(None)),
    "format": int,
    "activation": str,
    "prefixes": list,
    "inputs": list,
}
_DTYPES = ("F32", "F16", "BF16")


def saved_files(where: str | Path, **hub: Any) -> tuple[Path, Path]:
    """The two files of a k-SAE, in a folder, in a run's folder or, fetched, on the hub.

    Raises:
        ValueError: there is no such k-SAE.
    """
    folder = Path(trained(where))
    if folder.is_dir():
        return folder / CONFIG, folder / WEIGHTS
    if not is_hub_id(where):
        raise ValueError(f"no k-SAE at {printable(where)}: give a run's folder, or a hub id")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        config, weights = (hf_hub_download(str(where), name, **hub) for name in (CONFIG, WEIGHTS))
    except (EntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"no k-SAE at {printable(where)}: {printable(reason)}") from error
    return Path(config), Path(weights)


def saved_settings(path: Path, newest: int) -> dict[str, Any]:
    """The arguments of a k-SAE in its ``config.json``.

    Args:
        path: the file.
        newest: the newest format that is read; what a newer one adds is left out, for the format to be
            refused.

    Raises:
        ValueError: it is no such file, or settings are missing, unknown, or of a wrong type.
    """
    config = read_object(path)
    found = {name: value for name, value in config.items() if name in _KINDS}
    for name in ("d", "n"):
        if name not in found:
            raise ValueError(f"{printable(path)} has no `{name}`: it is no k-SAE's config")
    for name, value in found.items():
        good = isinstance(value, _KINDS[name]) and not isinstance(value, bool)
        if good and isinstance(value, int):
            good = value < 1 << 31
        if good and name == "prefixes" and isinstance(value, list):
            good = all(type(item) is int for item in value)
        if not good:
            shown = printable(repr(value)[:60])
            raise ValueError(f"{printable(path)}: {name} can't be {shown} ({kind_of(value)})")
    unknown = sorted(set(config) - set(found))
    if unknown and found.get("format", 1) <= newest:
        shown = ", ".join(printable(name) for name in unknown[:5])
        raise ValueError(f"{printable(path)} has unknown settings ({shown}): is it a k-SAE?")
    return found


def fill(model: nn.Module, path: Path, device: str | torch.device) -> None:
    """Move a model without memory (on ``meta``) to a device, with the weights of a file.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or type, or not finite.
    """
    shapes = {name: tuple(held.shape) for name, held in model.state_dict().items()}
    headers, _ = tensor_headers(path)
    for name in set(headers) & set(shapes):
        if headers[name].dtype not in _DTYPES:
            raise ValueError(f"{printable(path)}: `{name}` is {headers[name].dtype}, not float32")
    tensors = read_tensors(path, shapes)
    model.to_empty(device=device)
    model.load_state_dict(tensors)
