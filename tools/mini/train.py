"""From a model's YAML to its training: which data to load, which trainer to call."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from revelio.config import read_yaml, structure
from tools.mini.configs import ClipConfig, DiffusionConfig, Sources, VaeConfig
from tools.mini.data import (
    PictureSet,
    held_out_part,
    load_caltech101,
    load_cifar10,
    load_fashion_mnist,
)

KINDS = {"vae": VaeConfig, "clip": ClipConfig, "diffusion": DiffusionConfig}
MiniConfig = VaeConfig | ClipConfig | DiffusionConfig


@dataclass(frozen=True)
class Folders:
    """Where the data sets lie; None for those not at hand."""

    fashion_mnist: Path | None = None
    caltech101: Path | None = None
    cifar10: Path | None = None


def read_config(path: Path, minutes: float | None = None) -> MiniConfig:
    """Read a model's YAML strictly; its `kind` says which.

    Raises:
        ValueError: An unknown kind or key.
    """
    values = read_yaml(path)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"{path}: kind is {kind!r}; known: {', '.join(KINDS)}")
    if minutes is not None:
        values["schedule"] = {**values.get("schedule", {}), "minutes": minutes}
    try:
        return structure(KINDS[kind], values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _folder(path: Path | None, flag: str) -> Path:
    if path is None:
        raise ValueError(f"this model trains on a data set whose place is not given: use {flag}")
    return path


def load_sets(
    sources: Sources, folders: Folders, side: int, split: str = "train"
) -> list[PictureSet]:
    """The training pictures a config asks for; or held-out ones, for the log (CIFAR-10 has none here)."""
    sets = []
    if sources.fashion_mnist:
        sets.append(load_fashion_mnist(_folder(folders.fashion_mnist, "--fashion-mnist"), split))
    if sources.caltech101:
        folder = _folder(folders.caltech101, "--caltech101")
        sets.append(load_caltech101(folder, split, side))
    if sources.cifar10 and split == "train":
        cifar = load_cifar10(_folder(folders.cifar10, "--cifar10"))
        limit = sources.cifar10_limit or len(cifar)
        sets.append(cifar.subset(torch.arange(min(limit, len(cifar)))))
    return sets


def device_for(config: MiniConfig, name: str) -> torch.device:
    """Where a model trains: `auto` is the GPU if there is one and the model's trainer knows how.

    A VAE and a mini-clip whose text encoder is trained along draw their batches on the CPU.

    Raises:
        ValueError: A GPU is asked for that is not there, or that the trainer cannot use.
    """
    able = isinstance(config, DiffusionConfig) or (
        isinstance(config, ClipConfig) and bool(config.text_from)
    )
    if name == "auto":
        name = "cuda" if able and torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} is asked for, but this PyTorch sees no GPU: use cpu")
    if device.type != "cpu" and not able:
        raise ValueError(f"{config.name} is trained on the CPU only, not on {name}: use cpu")
    return device


def train_mini(
    config: MiniConfig, folders: Folders, out: Path, *, resume: bool, device: str = "cpu"
) -> None:
    """Train one mini model to the end of its schedule under `out/<name>`.

    On the CPU in as many processes as its schedule says, on a GPU in this one with the whole batch.
    """
    place = device_for(config, device)
    if place.type == "cuda":
        torch.backends.cudnn.benchmark = True
        config = replace(config, schedule=replace(config.schedule, processes=1))
    processes = config.schedule.processes
    if processes == 1:
        train_here(config, folders, out, resume=resume, device=place)
        return
    if isinstance(config, DiffusionConfig):
        prepare_latents(config, folders, out)
    with tempfile.TemporaryDirectory() as meeting:
        spawn(_join, (processes, meeting, config, folders, out, resume), nprocs=processes)


def prepare_latents(config: DiffusionConfig, folders: Folders, out: Path) -> None:
    """Encode the pictures once before the processes part, with all of their threads."""
    from tools.mini.diffusion import load_latents

    torch.set_num_threads(config.schedule.threads * config.schedule.processes)
    side = config.views.side or config.side
    load_latents(config, load_sets(config.sources, folders, side), out, "train")
    held_out = load_sets(config.sources, folders, side, "test")
    load_latents(config, held_out_part(held_out), out, "test")


def _join(
    rank: int,
    processes: int,
    meeting: str,
    config: MiniConfig,
    folders: Folders,
    out: Path,
    resume: bool,
) -> None:
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}/meeting",
        rank=rank,
        world_size=processes,
        timeout=timedelta(hours=2),
    )
    train_here(config, folders, out, resume=resume)
    dist.destroy_process_group()


def train_here(
    config: MiniConfig,
    folders: Folders,
    out: Path,
    *,
    resume: bool,
    device: torch.device | str = "cpu",
) -> None:
    """Train in this process, alone or as one of a group."""
    torch.set_num_threads(config.schedule.threads)
    side = config.side if isinstance(config, VaeConfig) else config.views.side or config.side
    sets = load_sets(config.sources, folders, side)
    held_out = load_sets(config.sources, folders, side, "test")
    folder = out / config.name
    if isinstance(config, VaeConfig):
        from tools.mini.vae import train_vae

        train_vae(config, sets, held_out[0].images, folder, resume=resume)
    elif isinstance(config, ClipConfig) and config.text_from:
        from tools.mini.clip_images import train_images

        train_images(config, sets, held_out, folder, resume=resume, device=device)
    elif isinstance(config, ClipConfig):
        from tools.mini.clip import train_clip

        train_clip(config, sets, held_out, folder, resume=resume)
    else:
        from tools.mini.diffusion import train_diffusion

        train_diffusion(config, sets, held_out, folder, resume=resume, device=device)
