"""What configs name, opened once and passed on; and where results of a k-SAE go by default."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from revelio.activations.store import ActivationStore
from revelio.analysis.config import FROM_GALLERY, FROM_STORE
from revelio.analysis.top_images import PLACE, SETTING
from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import describe
from revelio.config import completed, to_yaml
from revelio.data.config import DataConfig
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.data.registry import is_registered
from revelio.device_memory import placed
from revelio.distributed import Processes, device_of
from revelio.following import beside
from revelio.hub import FINAL, WEIGHTS, is_hub_id, trained
from revelio.pipelines import Progress, Report, counted, silent
from revelio.run_dir import Run, sha256
from revelio.sae.kernels.select import COMPILING, fastest_kernel, must_compile
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import printable, read_object
from revelio.wording import plural

# What two stores have in common whose rows can be compared: places in manifests.
ALIKE = (*PLACE, *SETTING)


def open_run(
    config: Any, command: str, results: Sequence[str] = (), processes: Processes | None = None
) -> Run:
    """The run folder of a config that has ``out`` and ``resume``; see :meth:`Run.open`.

    Of several processes the main one opens it first, and the others only read it.
    """
    text, complete, processes = to_yaml(config), completed(config), processes or Processes()
    about = {"results": results, "complete": complete}
    run = None
    if processes.main:
        run = Run.open(config.out, command, text, resume=config.resume, **about)
    processes.wait()
    return run or Run.open(config.out, command, text, resume=True, writes=False, **about)


def begins(config: Any) -> bool:
    """Whether a run folder holds no run yet.

    Settings that can't be are refused before one is written there: it goes on with the same settings only.
    """
    return not (config.out / "manifest.json").exists()


def pictures_of(config: DataConfig, store: ActivationStore) -> ImageDataset:
    """The data set that a config names, or the one that the store was made from.

    Raises:
        ValueError: the store does not say where its images are, or they are not there; or labels are
            given that are not those of the store, which are the ones that count.
    """
    if config.source != FROM_STORE:
        dataset = open_dataset(config)
        _check_labels(config, dataset, store)
        return dataset
    recorded = store.manifest.get("dataset")
    # A folder's bare name says nothing of where it is; a path or a hub id is nothing that Revelio writes,
    # and would have a store that somebody else made pick the pictures that are read here.
    if not recorded or not is_registered(recorded):
        raise ValueError(
            f"{store.path} does not say where its images ({recorded}) are: give their source (data.source)"
        )
    split = config.split or store.manifest.get("split")
    try:
        return open_dataset(replace(config, source=str(recorded), split=split))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the store's images ({recorded}) can't be opened: give their source (data.source) ({error})"
        ) from error


def _check_labels(config: DataConfig, dataset: ImageDataset, store: ActivationStore) -> None:
    """Refuse labels that were asked for and would not be used: a store's activations bring their own."""
    asked = [name for name in ("labels", "label_column") if getattr(config, name) is not None]
    named = bool(store.classes) == bool(dataset.classes)  # else numbers would stand against names
    if not asked or dataset.labels is None or not (named or store.labels is None):
        return
    kept: list[Any] = [None] * len(store.ids) if store.labels is None else store.labels.tolist()
    stored = {
        id: _class_of(store.classes, label) for id, label in zip(store.ids, kept, strict=True)
    }
    for id, label in zip(dataset.ids, dataset.labels, strict=True):
        given = _class_of(dataset.classes, label)
        if id in stored and stored[id] != given:
            was = "has no label" if stored[id] is None else f"is {printable(stored[id])}"
            raise ValueError(
                f"data.{asked[0]} says that {printable(id)} is {printable(given)}, and in {store.path}, "
                f"whose labels are used here, it {was}: extract the images with these labels, or leave "
                f"data.{asked[0]} out"
            )


def _class_of(classes: Sequence[str], label: int | None) -> str | None:
    """A label's class name; of classes without names the number."""
    return None if label is None else classes[label] if label < len(classes) else str(label)


def backbone_of(config: BackboneConfig, about: Mapping[str, Any], what: str) -> BackboneConfig:
    """The model that a config names, or the one that a store or a gallery was made by.

    Args:
        config: which model.
        about: what the store or gallery says of it: `model`, `image_size`.
        what: the store or gallery, for messages.

    Raises:
        ValueError: that is no known model's name: a file's path would pick what is loaded here.
    """
    if config.name not in (FROM_STORE, FROM_GALLERY):
        return config
    name, size = about.get("model"), about.get("image_size")
    if name not in {known.name for known in describe()}:
        raise ValueError(
            f"{what} is of a model ({printable(name)}) that is no known one: give it (backbone)"
        )
    side = size[0] if isinstance(size, list | tuple) and size else size
    return replace(config, name=name, image_size=config.image_size or side)


def check_alike(store: ActivationStore, other: ActivationStore) -> None:
    """See that the rows of two extractions can be compared: of one model, layer, timestep and prompt policy.

    Raises:
        ValueError: they can't; the first difference is named.
    """
    # Of rows that somebody else wrote, a folder's name stands for the layer.
    extracted = all(each.manifest.get("model") for each in (store, other))
    for name in ALIKE if extracted else ():
        one, two = (each.manifest.get(name) for each in (store, other))
        if one != two:
            raise ValueError(
                f"{store.path} and {other.path} differ in `{name}` ({printable(one)} and {printable(two)}): "
                "give stores that were extracted alike"
            )
    if store.row_shape != other.row_shape:
        raise ValueError(
            f"rows of {store.path} are {store.row_shape}, of {other.path} {other.row_shape}: give stores of "
            "the same layer"
        )


def hashed(dataset: ImageDataset, progress: Report) -> ImageDataset:
    """The data set with the hashes of its pictures, which are read now."""
    if dataset.digest is None:
        return dataset
    count = len(dataset)
    return dataset.hashed(counted(progress, f"reading {plural(count, 'picture')}", count, "image"))


def sae_folder(path: str | Path) -> Path | None:
    """The folder of a k-SAE on disk: the one named, or the `final` folder of a run; None for a hub id."""
    folder = Path(trained(path))
    return folder if (folder / WEIGHTS).is_file() else None


def weights_sha256(path: str | Path) -> str | None:
    """Of a trained model's weights, of a run or of its `final` folder; None for one on a hub."""
    weights = Path(trained(path)) / WEIGHTS
    return sha256(weights) if weights.is_file() else None


def open_sae(
    path: str | Path, device: str = "auto", progress: Report = silent
) -> KSparseAutoencoder:
    """The k-SAE of a run folder, of its `final` folder, or of a hub id, on the device.

    Raises:
        ValueError: there is none.
    """
    path = str(path)
    inside, shown = sae_folder(path), printable(path)
    if Path(path).is_dir() and not inside:
        raise ValueError(f"{shown} holds no k-SAE ({WEIGHTS}): give a run that has finished")
    if not inside and not is_hub_id(path):
        raise ValueError(f"no k-SAE at {shown}: give a folder that `revelio train-ksae` wrote")
    chosen = device_of(device)
    model = placed(
        KSparseAutoencoder.from_pretrained(inside or path), chosen, f"the k-SAE at {shown}"
    )
    # Encoding is most of the work of what follows: the native kernel finds the same codes sooner.
    if must_compile("auto", chosen):
        progress(Progress(COMPILING))
    model.kernel = fastest_kernel(model)
    return model


def place_of(ksae: str, what: str) -> Path:
    """Where a result of a k-SAE goes by default: in its run folder, or beside a k-SAE that is in no run."""
    path = Path(ksae)
    if path.name in ("", ".."):
        # The folder that a command runs in, or one above it, has its name all the same.
        path = path.resolve()
    if path.name == FINAL:
        return path.parent / what
    if (path / FINAL).is_dir():
        return path / what
    return beside(path if path.is_dir() else Path("runs") / path.name, what)


def check_same_source(path: Path, sources: Callable[[dict[str, Any]], Any], ours: Any) -> None:
    """See that an earlier result, which is about to be replaced, was made from the same in the same way.

    Args:
        path: the JSON file of the earlier result, where there is one.
        sources: what it was made from, given that file's object; None: it does not say.
        ours: what the new result is made from.

    Raises:
        ValueError: it was made from something else.
    """
    if path.is_file() and sources(read_object(path)) not in (None, ours):
        raise ValueError(
            f"{printable(path)} is the result of another store, model or k-SAE, or of other settings: give "
            "another place to write to, or remove it first"
        )


def made_from(source: dict[str, Any]) -> Any:
    """The k-SAE and the store that top images say they were made from, to be compared; None: not said."""
    pair = [source.get(key, {}).get("sha256") for key in ("ksae", "store")]
    return pair if all(pair) else None
