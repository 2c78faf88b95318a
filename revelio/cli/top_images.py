"""The top images of every latent of a k-SAE: which images each responds to most, and how often.

One pass over a store, in memory that does not grow with the number of images.

    revelio top-images --store runs/pets/up_ft1-t25-empty-d0 --ksae runs/ksae/final --out runs/top
    revelio top-images --config configs/analysis/top-images-as-code.yaml --store S --ksae K --out O

Writes top_images.safetensors and top_images.json, which `revelio purity` and `revelio gallery` read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from revelio.bounds import Count, Device, Folder, OutFolder

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.analysis.top_images import TopImages
    from revelio.sae.model import KSparseAutoencoder

RELEASED_M = 20


@dataclass(frozen=True)
class Config:
    """Which store and k-SAE, and how many images to keep."""

    store: Folder
    """The activation store (a folder that `revelio extract` wrote)."""

    ksae: str
    """The k-SAE: a folder that `revelio train-ksae` wrote, or a hub id."""

    out: OutFolder = Path("runs/top-images")
    """The folder to write."""

    m: Count | None = None
    """Top images kept for each latent; none: 10, and 20 in mode as_code, as released."""

    mode: Literal["fixed", "as_paper", "as_code"] = "fixed"
    """fixed, as_paper: the k codes that TopK keeps; as_code: ReLU of all pre-activations, as released."""

    codes: Literal["sparse", "dense"] | None = None
    """sparse (TopK codes) or dense (ReLU of pre-activations), whatever the mode; none: the mode's own."""

    batch_size: Count = 1024
    """Images at a time; the result does not depend on it."""

    latent_chunk: Count = 8192
    """Latents at a time, for dense codes."""

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `mps`."""


def run(config: Config) -> None:
    """Make the top images and write them."""
    from revelio.activations.store import ActivationStore
    from revelio.analysis.top_images_files import (
        DESCRIPTION,
        MAKER,
        OLDER,
        TENSORS,
        save_top_images,
    )
    from revelio.following import beside, following
    from revelio.outputs import check_replaceable, claimed

    check_replaceable(config.out, MAKER, (TENSORS, DESCRIPTION), OLDER)
    with claimed(config.out):
        store = ActivationStore.open(config.store)
        model = load_ksae(config.ksae, config.device)
        top = compute(config, store, model)
        save_top_images(top, config.out)
    active = int((top.counts > 0).sum())
    strong = int((top.strength > 0).sum())
    print(
        f"{active:,} of {len(top.counts):,} latents respond to some of {top.images:,} images, "
        f"{strong:,} to more than 10 ({top.source['codes']} codes, mode {config.mode})"
    )
    print(_fired(top))
    print(f"wrote {config.out}/top_images.safetensors, top_images.json ({top.m} images a latent)")
    if store.labels is not None:
        print(following("purity", "--top", config.out, "--out", beside(config.out, "purity.json")))
    made = ("--store", config.store, "--ksae", config.ksae, "--top", config.out)
    print(following("gallery", *made, "--out", beside(config.out, "gallery")))


def _fired(top: "TopImages") -> str:
    """L0, the dead, and the density histogram in one line."""
    found = top.statistics
    edges, latents = found["density"]["edges"], found["density"]["latents"]
    bins = [f"{edge:g}: {n:,}" for edge, n in zip(edges, latents, strict=False) if n]
    return (
        f"L0 {found['l0']:.1f}, dead {found['dead_share']:.1%}; "
        f"latents by log10 of their density, from: {', '.join(bins)}"
    )


def compute(config: Config, store: "ActivationStore", model: "KSparseAutoencoder") -> "TopImages":
    """The top images as the config asks, with what they were made from."""
    from tqdm import tqdm

    from revelio.analysis.top_images import top_images
    from revelio.analysis.top_images_files import with_source

    as_code = config.mode == "as_code"
    with tqdm(total=len(store), unit="image", desc="top images") as bar:
        top = top_images(
            model,
            store,
            config.m or (RELEASED_M if as_code else 10),
            config.codes or ("dense" if as_code else "sparse"),
            mode=config.mode,
            batch_size=config.batch_size,
            latent_chunk=config.latent_chunk,
            device=next(model.parameters()).device,
            progress=bar.update,
        )
    return with_source(top, model, store)


def load_ksae(path: str, device: str) -> "KSparseAutoencoder":
    """The k-SAE at a folder or hub id, on the device.

    Raises:
        ValueError: there is none.
    """
    from revelio.distributed import device_of
    from revelio.sae.kernels.select import COMPILING, fastest_kernel, must_compile
    from revelio.sae.model import KSparseAutoencoder

    if Path(path).is_dir() and not (Path(path) / "model.safetensors").is_file():
        raise ValueError(f"{path} holds no k-SAE (model.safetensors): give a run's `final` folder")
    if not Path(path).is_dir() and (path.count("/") != 1 or path.startswith((".", "/"))):
        raise ValueError(f"no k-SAE at {path}: give a folder that `revelio train-ksae` wrote")
    chosen = device_of(device)
    model = KSparseAutoencoder.from_pretrained(path).to(chosen)
    # Encoding is most of the work of what follows: the native kernel finds the same codes sooner.
    if must_compile("auto", chosen):
        print(COMPILING, flush=True)
    model.kernel = fastest_kernel(model)
    return model
