"""Projectors that others trained: LLaVA's and MMVP's ``mm_projector.bin``, the paper's two files.

    <model or transformer>.mm_projector.{0,2}.{weight,bias}                      linear, linear
    <...>.diffusion_mm_projector.0.conv{1,2}.{weight,bias}                       conv block
    <...>.diffusion_mm_projector.1.{0,2}.{weight,bias}                           linear, linear
    <...>.mm_projector.{tower}.{mlp.0,tokens.conv1,...}.{weight,bias}            of llava_ext.llava_plugin
    <...>.multi_modal_projector.linear_{1,2}.{weight,bias}                       as in transformers

The prefix is ``model`` for Llama and ``transformer`` for MPT; the released code finds only the first, so
that it can't load its own stage 1 (SPEC 3.6, L2). Names are matched whole: ``mm_projector`` doesn't catch
``diffusion_mm_projector``. ``.bin`` files are pickles: read by :mod:`revelio.unpickle`, which makes tensors
and containers and runs nothing; ``.safetensors`` are read, too.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llava_ext.checkpoint import CONFIG, instead_of, load_state
from llava_ext.model import LlavaModel
from revelio.backbones.weights import check_finite
from revelio.tensor_files import read_tensors as read_safetensors
from revelio.tensor_files import tensor_headers
from revelio.trust import printable
from revelio.unpickle import read_tensors

KEY = re.compile(
    r"(?:.*\.)?(?P<name>\w*mm_projector)\.(?P<rest>(?:\d+\.)*(?:conv[12]\.)?(?:weight|bias))"
)
OWN = re.compile(
    r"(?:.*\.)?(?P<name>mm_projector\.\d+)\.(?P<rest>(?:mlp\.[02]|tokens\.conv[12])\.(?:weight|bias))"
)
HUGGING_FACE = re.compile(r"(?:.*\.)?multi_modal_projector\.linear_([12])\.(weight|bias)")
CAMBRIAN = re.compile(r"(?:.*\.)?mm_projector_aux_\d+\..*")
PLAIN, DIFFUSION = "mm_projector", "diffusion_mm_projector"
SUFFIXES = (".bin", ".safetensors")


def read_projectors(path: Path) -> dict[str, dict[str, Tensor]]:
    """The projectors in a file, by name, with the weights' names that a ``Projector`` has.

    Args:
        path: the file. A full model's state dict will do: other keys are passed over.

    Returns:
        ``{"mm_projector": {"mlp.0.weight": ...}, "diffusion_mm_projector": {"tokens.conv1.weight": ...}}``

    Raises:
        ValueError: there is no such file, it wants code run, is damaged, or holds no projector.
    """
    state = _read(path)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        place = _place(str(key))
        if place is None and CAMBRIAN.fullmatch(str(key)):
            raise ValueError(
                f"{path} holds {key}: projectors of Cambrian's several towers, which no tower here has"
            )
        if place is not None and isinstance(tensor, Tensor):
            if not tensor.numel():
                raise ValueError(
                    f"{path} holds an empty {key}: it was saved under ZeRO-3 without being gathered: "
                    "save it again with `stage3_gather_16bit_weights_on_model_save`, or by zero_to_fp32.py"
                )
            check_finite(str(path), str(key), tensor)
            weights = found.setdefault(place[0], {})
            if place[1] in weights:
                raise ValueError(f"{path} holds {printable(key)} twice, under several names")
            weights[place[1]] = tensor
    if not found:
        some = ", ".join(map(str, list(state)[:3])) or "nothing"
        raise ValueError(
            f"{path} holds no projector (its keys: {some}): give a file whose keys are like "
            "model.mm_projector.0.weight"
        )
    return found


def import_projectors(model: LlavaModel, paths: Mapping[int, Path] | Path) -> list[str]:
    """Take others' projectors into a model, one a tower.

    Args:
        model: changed in place.
        paths: a folder or a file, whose names decide: ``diffusion_mm_projector`` is for the tower whose
            tokens are made by ``conv``, ``mm_projector`` for the first other. Or a file a tower's place.

    Returns:
        A line a tower that got weights: which, and from where.

    Raises:
        ValueError: a file holds none or several for a tower, or they are of another width.
    """
    if isinstance(paths, Mapping):
        chosen = {place: (path, None) for place, path in paths.items()}
    else:
        chosen = _by_name(model, paths)
    lines = []
    for place, (path, name) in sorted(chosen.items()):
        if not 0 <= place < len(model.projectors):
            raise ValueError(f"there is no tower {place}: the model has {len(model.projectors)}")
        tower = model.settings.towers[place]
        name, state = _one(read_projectors(path), name, path, conv=tower.tokens == "conv")
        load_state(model.projectors[place], state, f"{path.name} ({name})")
        lines.append(f"projector of {tower.backbone} {tower.layer}: {name} of {path.name}")
    return lines


def _read(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise ValueError(f"no projector file at {path}")
    if path.suffix == ".safetensors":
        headers, _ = tensor_headers(path)
        return read_safetensors(path, {key: None for key in headers if "projector" in key})
    state = read_tensors(path)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not weights by name")
    return state


def projectors_folder(pretrained: Path) -> Path | None:
    """The saved model that stage 1 left in a run directory or a folder; None where there is none."""
    places = (pretrained / "final", pretrained)
    return next((place for place in places if (place / CONFIG).is_file()), None)


def check_pretrained(pretrained: Path) -> None:
    """See whether stage 2 finds projectors there; nothing is loaded.

    Raises:
        ValueError: the folder holds none.
    """
    if not pretrained.is_dir() or projectors_folder(pretrained) is not None:
        return
    if not any(file.suffix in SUFFIXES for file in pretrained.iterdir()):
        wanted = "`final/` of a stage 1 run, or LLaVA's mm_projector.bin"
        raise ValueError(f"{pretrained} holds no projectors ({wanted}): {instead_of(pretrained)}")


def _place(key: str) -> tuple[str, str] | None:
    """The projector that a weight belongs to, and its name in a ``Projector``."""
    if match := OWN.fullmatch(key):
        return match["name"], match["rest"]
    if match := KEY.fullmatch(key):
        return match["name"], _our_key(match["rest"])
    if match := HUGGING_FACE.fullmatch(key):
        return PLAIN, f"mlp.{2 * (int(match[1]) - 1)}.{match[2]}"
    return None


def _our_key(rest: str) -> str:
    """``0.conv1.weight`` -> ``tokens.conv1.weight``, ``1.2.bias`` and ``2.bias`` -> ``mlp.2.bias``."""
    if "conv" in rest:
        return f"tokens.{rest[rest.index('conv') :]}"
    return f"mlp.{'.'.join(rest.split('.')[-2:])}"


def _by_name(model: LlavaModel, path: Path) -> dict[int, tuple[Path, str | None]]:
    """Which file and name each tower's projector comes from: the plug-in's names say it themselves."""
    if path.is_dir():
        files = sorted(file for end in SUFFIXES for file in path.glob(f"*{PLAIN}{end}"))
        if not files:
            raise ValueError(f"{path} holds no {PLAIN}.bin: give its folder or the file itself")
    else:
        files = [path]
    # A file's own projector comes first: mm_projector.bin may hold the diffusion tower's, too.
    where: dict[str, Path] = {}
    for file in files:
        for name in read_projectors(file):
            if name not in where or name == file.stem:
                where[name] = file
    chosen: dict[int, tuple[Path, str | None]] = {
        int(name.rpartition(".")[2]): (where.pop(name), name) for name in list(where) if "." in name
    }
    free = [place for place in range(len(model.projectors)) if place not in chosen]
    for name in sorted(where, key=lambda name: (name == PLAIN, name), reverse=True):
        conv = name == DIFFUSION
        fits = [p for p in free if (model.settings.towers[p].tokens == "conv") == conv]
        if not fits:
            raise ValueError(
                f"{where[name]} holds {name}, but the model has no tower left for it whose tokens are "
                f"{'' if conv else 'not '}made by `conv`: say which tower each file is for"
            )
        free.remove(fits[0])
        chosen[fits[0]] = (where[name], name)
    return chosen


def _one(
    found: Mapping[str, dict[str, Tensor]], name: str | None, path: Path, *, conv: bool
) -> tuple[str, dict[str, Tensor]]:
    if name is None:
        names = [each for each in found if (each == DIFFUSION) == conv] or list(found)
        if len(names) > 1:
            raise ValueError(f"{path} holds {', '.join(names)}: give a file with one of them")
        name = names[0]
    return name, found[name]
