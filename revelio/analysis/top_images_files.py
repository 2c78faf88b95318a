"""Top images on disk: a folder with `top_images.safetensors` and `top_images.json`.

The JSON names what they were made from (the k-SAE and the store, by hash) and the hash of the tensors, so
that results of another store or k-SAE are never mixed up.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from revelio.analysis.top_images import TopImages
from revelio.outputs import Older, replace_files
from revelio.run_dir import read_json, sha256, write_json

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

FORMAT = 1
MANIFEST_KEYS = ("model", "revision", "dataset", "split", "layer", "timestep", "prompt_policy")
MANIFEST_KEYS += ("pool", "image_size", "seed", "draw")
TENSORS, DESCRIPTION = "top_images.safetensors", "top_images.json"
MAKER = "top-images"
OLDER = Older(
    DESCRIPTION,
    lambda found: {"latents", "labelled", "source", "sha256"} <= set(found),
    lambda found: (TENSORS, DESCRIPTION),
)


def save_top_images(top: TopImages, folder: str | Path) -> None:
    """Write ``top`` to ``folder``; other files there stay as they are.

    Raises:
        ValueError: another file is in the way.
        OSError: it can't be written.
    """
    tensors = {"values": top.values, "indices": top.indices, "counts": top.counts}
    tensors["means"] = top.means
    if top.labels is not None:
        tensors["labels"] = top.labels
    if top.places is not None:
        tensors["places"] = top.places
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    description = {
        "format": FORMAT,
        "images": top.images,
        "latents": len(top.counts),
        "m": top.m,
        "classes": list(top.classes),
        "labelled": top.labels is not None,
        "statistics": top.statistics,
        "source": top.source,
    }

    def fill(made: Path) -> None:
        save_file(contiguous, made / TENSORS)
        digest = {"sha256": sha256(made / TENSORS)}
        write_json(made / DESCRIPTION, description | digest)

    needed = sum(tensor.nbytes for tensor in contiguous.values())
    replace_files(Path(folder), MAKER, fill, needed, OLDER)


def load_top_images(folder: str | Path) -> TopImages:
    """Read what :func:`save_top_images` wrote.

    Raises:
        ValueError: files are missing, of another format, or do not belong together.
    """
    folder = Path(folder)
    if folder.is_dir() and not (folder / DESCRIPTION).exists():
        raise ValueError(
            f"{folder} holds no top images (no file at {folder / DESCRIPTION}): give a folder that `revelio "
            "top-images` wrote"
        )
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(
            f"{folder / DESCRIPTION} is not of format {FORMAT}: make it again with `revelio top-images`"
        )
    path = folder / TENSORS
    if not path.is_file():
        raise ValueError(f"no file at {path}: make it again with `revelio top-images`")
    if sha256(path) != description["sha256"]:
        raise ValueError(
            f"{path} was cut or changed (its sha256 is not the one in {DESCRIPTION}): "
            "make it again with `revelio top-images`"
        )
    tensors = load_file(path)
    return TopImages(
        values=tensors["values"],
        indices=tensors["indices"],
        counts=tensors["counts"],
        means=tensors["means"],
        images=description["images"],
        labels=tensors.get("labels"),
        classes=tuple(description["classes"]),
        source=description["source"],
        places=tensors.get("places"),
    )


def ksae_identity(model: "KSparseAutoencoder") -> dict[str, Any]:
    """Size, mode and a sha256 over the names and bytes of all the k-SAE's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return {
        "d": model.d,
        "n": model.n,
        "k": model.k,
        "mode": model.mode,
        "sha256": digest.hexdigest(),
    }


def store_identity(store: "ActivationStore") -> dict[str, Any]:
    """The store's name and the sha256 of its manifest, which holds the hash of every shard."""
    return {"name": store.path.name, "sha256": sha256(store.path / "manifest.json")}


def sources(model: "KSparseAutoencoder", store: "ActivationStore") -> dict[str, Any]:
    """What tells the k-SAE and the store apart from others."""
    return {"ksae": ksae_identity(model), "store": store_identity(store)}


def with_source(top: TopImages, model: "KSparseAutoencoder", store: "ActivationStore") -> TopImages:
    """``top`` with what it was made from: the store's model, layer, ..., and both hashes."""
    made_from = {key: store.manifest[key] for key in MANIFEST_KEYS if key in store.manifest}
    return replace(top, source=made_from | sources(model, store) | top.source)


def check_store(top: TopImages, store: "ActivationStore") -> None:
    """Raise ValueError where ``top`` was made from another store."""
    recorded = top.source.get("store", {})
    if recorded.get("sha256") != store_identity(store)["sha256"]:
        raise ValueError(
            f"the top images are of store {recorded.get('name')}, not of {store.path}: "
            "give that store, or make the top images again"
        )


def check_ksae(top: TopImages, model: "KSparseAutoencoder") -> None:
    """Raise ValueError where ``top`` was made with another k-SAE."""
    recorded = top.source.get("ksae", {})
    if recorded.get("sha256") != ksae_identity(model)["sha256"]:
        raise ValueError(
            "the top images are of another k-SAE than the one given: give the one they were made with, "
            "or make them again"
        )
