"""Backbones by name: the known ones, any folder or hub id of a supported family, and a user's own.

    backbone = load_backbone("sd-1.5", layers=["up_ft1"], dtype="bfloat16")
    register("my-model", "my_package.my_module:load")       # or a function

A factory takes ``layers`` and the fields of :class:`BackboneConfig` but the name, and gives a
:class:`~revelio.backbones.base.Backbone`. Nothing heavy is imported before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revelio.backbones.catalogue import MINIS, find_shipped, hub_models, shipped_models
from revelio.backbones.config import BackboneConfig
from revelio.backbones.families import (
    VIT_LOADERS,
    Family,
    describe_source,
    diffusion_families,
    family_of,
)
from revelio.backbones.packaged import VIT, packaged_backbones, packaged_path
from revelio.backbones.source import CONFIG_LIMIT, DENOISERS, Description, Source, kinds_of
from revelio.hub import is_hub_id
from revelio.trust import printable, read_object
from revelio.wording import did_you_mean

if TYPE_CHECKING:
    from revelio.backbones.base import Backbone

Factory = Callable[..., "Backbone"]

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".bin")

_registered: dict[str, tuple[str | Factory, Description]] = {}


def load_backbone(
    model: str | BackboneConfig,
    *,
    layers: Sequence[str] | None = None,
    imports: bool = True,
    **settings: Any,
) -> Backbone:
    """Load a backbone, whole or cut after the deepest of ``layers``.

    Args:
        model: a name that :func:`describe` lists, a folder, a hub id, or ``module:function`` of a factory. A
            denoiser's folder or file stands for the pipeline it lies in; ``sd-1.5+path/to/unet`` puts it in
            the place of another pipeline's. Or a whole config.
        layers: the layers that will be asked for: what comes after the deepest is not kept. None keeps the
            whole model, which a diffusion model's ``predict``, ``decode`` and ``pipeline`` need.
        imports: whether ``module:function`` may be imported. Must be False for a name out of a file that came
            with weights: whoever made the file would choose which code runs here.
        settings: fields of :class:`BackboneConfig`: revision, image_size, dtype, attention, device.

    Raises:
        KeyError: an unknown name or layer; the message lists the known ones.
        ValueError: a setting the model can't take, a model of no supported family or beyond the device's
            memory, or a name that would import code where that is not allowed.
    """
    import torch

    config = BackboneConfig(name=model) if isinstance(model, str) else model
    asked: dict[str, Any] = vars(replace(config, **settings)) | {"layers": layers}
    try:
        return _load(asked, imports)
    except torch.OutOfMemoryError as error:
        from revelio.device_memory import release

        release(error)
        raise _too_large(asked, imports) from error


def _load(asked: Mapping[str, Any], imports: bool) -> Backbone:
    """The backbone of a whole config's fields and ``layers``."""
    asked = dict(asked)
    name, revision = asked.pop("name"), asked.pop("revision")
    if name in _registered:
        factory = _registered[name][0]
        found = _imported(factory) if isinstance(factory, str) else factory
        return found(revision=revision, **asked)
    if ":" in name and not Path(name).exists():
        if not imports:
            raise ValueError(
                f"a config that came with weights names the backbone {printable(name)!r}, which would import "
                f"and run the module {printable(name.partition(':')[0])!r}: if you trust that code, name it "
                "yourself: as `allow` for the tower of a LLaVA model, as `backbone` for a classifier"
            )
        return _imported(name)(revision=revision, **asked)
    from revelio.backbones.diffusion.base import load_family
    from revelio.backbones.loading import LoadSettings

    source = find_source(name, revision)
    family, loading = _family_of(source), LoadSettings(**asked)
    if isinstance(family, str):
        return _imported(VIT_LOADERS[family])(source, loading)
    return load_family(family, source, loading)


def _too_large(asked: Mapping[str, Any], imports: bool) -> ValueError:
    """What to say of a backbone that goes beyond its device's memory: what it takes, and what helps."""
    from revelio.backbones.weights_hash import weight_bytes
    from revelio.device_memory import room, too_large
    from revelio.distributed import device_of

    try:
        # Loaded once more, without a place for the weights: how many there are is in several files.
        needed = weight_bytes(_load({**asked, "device": "meta"}, imports)) or None
    except Exception:  # a user's own model may not know of such a device
        needed = None
    dtype = asked["dtype"]
    halved = "bfloat16 as the backbone's dtype (half of it), " if dtype == "float32" else ""
    earlier = " or an earlier layer" if asked["layers"] else ""
    what = f"{printable(asked['name'])} in {dtype}"
    return too_large(
        what, needed, room(device_of(asked["device"])), f"take {halved}a smaller model{earlier}"
    )


def register(name: str, factory: str | Factory, description: Description | None = None) -> None:
    """Make a backbone of your own known by ``name``.

    Args:
        name: what it is called from now on.
        factory: a function that takes ``layers`` and the fields of :class:`BackboneConfig` but the name, or
            where to import one from, as ``package.module:function``.
        description: what :func:`describe` says about it.

    Raises:
        ValueError: the name is taken.
    """
    taken = [known.name for known in describe()]
    if name in taken:
        raise ValueError(f"the name {name!r} is taken: choose none of {', '.join(taken)}")
    about = description or Description(name, "own", 0, {}, "registered")
    _registered[name] = (factory, replace(about, name=name))


def describe() -> list[Description]:
    """Every known model, without loading any and without torch."""
    own = [about for _, about in _registered.values()]
    return [*shipped_models(), *packaged_backbones(), *hub_models(), *own]


def describe_one(name: str, revision: str | None = None) -> Description:
    """The description of a known name, a folder, or a hub id.

    Raises:
        KeyError: none of them.
        ValueError: a model of no supported family.
    """
    known = {about.name: about for about in describe()}
    if name in known:
        return known[name]
    return describe_source(find_source(name, revision))


def shipped_path(name: str) -> Path:
    """The folder of a model that comes with Revelio.

    Raises:
        KeyError: it isn't in this copy.
    """
    path = find_shipped(name)
    if path is None:
        raise KeyError(
            f"{name} isn't in this copy of Revelio: shipped models are {', '.join(MINIS)}"
        )
    return path


def find_source(name: str, revision: str | None = None) -> Source:
    """The folder or hub id behind a name, with a denoiser of its own where the name says so.

    Raises:
        KeyError: the name is unknown; the message lists the known ones.
        ValueError: it looks like a folder that isn't there.
    """
    known = {about.name: about for about in describe()}
    if name in MINIS:
        return Source(name, str(shipped_path(name)))
    if name == VIT:
        return Source(name, str(packaged_path(name)))
    if name in known:
        return Source(name, known[name].source, revision)
    if Path(name).is_dir():
        return _alone(Path(name)) or Source(Path(name).resolve().name, name)
    if Path(name).is_file() and Path(name).suffix in WEIGHTS:
        return _with_denoiser(_pipeline_around(Path(name)), Path(name))
    if "+" in name:
        base, _, denoiser = name.partition("+")
        return _with_denoiser(find_source(base, revision), Path(denoiser))
    if (
        name.startswith((".", "/", "~"))
        or ("/" in name and not is_hub_id(name))
        or Path(name).exists()
    ):
        raise ValueError(f"no model folder at {name}: give a folder, a hub id, or a known name")
    if is_hub_id(name):
        return Source(name, name, revision)
    hint = did_you_mean(name, known, "{!r}")
    raise KeyError(
        f"unknown backbone {name!r}: {hint}known are {', '.join(known)}; or give a folder, a hub id, or "
        "MODULE:FUNCTION of a backbone of your own"
    )


def _alone(folder: Path) -> Source | None:
    """The pipeline around a folder that holds only a denoiser; None where the folder is something else."""
    config = folder / "config.json"
    if (folder / "model_index.json").exists() or not config.is_file():
        return None
    found = read_object(config, limit=CONFIG_LIMIT).get("_class_name")
    if not any(found in kinds_of(kind) for kind in map(_denoiser_of, diffusion_families())):
        return None
    return _with_denoiser(_pipeline_around(folder), folder)


def _only_file(place: Path) -> Path:
    """The weights in a folder that holds one file of them and no config; anything else as it is."""
    if not place.is_dir() or (place / "config.json").is_file():
        return place
    files = [file for file in sorted(place.iterdir()) if file.suffix in WEIGHTS]
    return files[0] if len(files) == 1 else place


def _denoiser_of(family: Family) -> str | tuple[str, ...]:
    """The classes that the denoiser of a family may be of; none for a ViT."""
    parts = () if isinstance(family, str) else family.parts.items()
    return next((kind for part, kind in parts if part in DENOISERS), ())


def _pipeline_around(denoiser: Path) -> Source:
    """The pipeline folder that a denoiser's folder, or a file in it, lies in.

    Raises:
        ValueError: it lies in none.
    """
    for folder in denoiser.resolve().parents[:2]:
        if (folder / "model_index.json").is_file():
            return Source(folder.name, str(folder))
    raise ValueError(
        f"{denoiser} is a denoiser alone, without VAE, text encoder and noise schedule: name the model it "
        f"takes them from, such as sd-1.5+{denoiser}"
    )


def _with_denoiser(base: Source, denoiser: Path) -> Source:
    """A pipeline with another U-Net or transformer.

    Raises:
        ValueError: there is none, or the pipeline has none to replace.
    """
    denoiser = _only_file(denoiser)
    if not denoiser.is_file() and not (denoiser / "config.json").is_file():
        raise ValueError(
            f"no denoiser at {denoiser}: give its folder or a {' or '.join(WEIGHTS)} file"
        )
    if not _denoiser_of(family_of(base)):
        raise ValueError(f"{base.name} has no denoiser that {denoiser} could replace")
    return replace(base, name=f"{base.name}+{denoiser.resolve().name}", denoiser=denoiser)


def _family_of(source: Source) -> Family:
    """:func:`family_of`; where a known model can't be had, the message says what is known of it."""
    try:
        return family_of(source)
    except ValueError as error:
        note = next((about.note for about in describe() if about.name == source.name), "")
        raise ValueError(f"{error}; {note}" if note else str(error)) from error


def _imported(path: str) -> Factory:
    """The function at ``package.module:function``.

    Raises:
        ValueError: there is none.
    """
    module, _, function = path.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"no backbone factory at {path!r}: {error}") from error
