"""Drawn pictures, kept a batch at a time until a command has written its output: a stopped one goes on.

    drawn/<key>/000000-0.png ... batch.json     key: the sha256 of all that decides the pictures

That is the model with its weights, the edits with their vectors and k-SAEs, prompts, seeds, steps, guidance,
size, and the versions of what draws. A batch of anything else has another key, and is drawn.
"""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from revelio.analysis.top_images_files import ksae_identity
from revelio.backbones.config import BackboneConfig
from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.backbones.weights_hash import pipeline_hash
from revelio.files import check_folder, remove_files, sweep, write_folder
from revelio.reply_cache import request_key
from revelio.run_dir import sha256, versions, write_json
from revelio.steering.edits import Direction, Edit, LatentChange
from revelio.trust import file_in, printable, read_object

# The folder in a command's output, and what says that a batch is whole.
DRAWN, BATCH = "drawn", "batch.json"
_KEY = re.compile(r"[0-9a-f]{64}")
_PICTURE = re.compile(r"\d+-\d+\.png")


@dataclass(frozen=True)
class Kept:
    """Batches of pictures that are kept.

    Attributes:
        folder: where.
        key: of what decides all of them; see :meth:`of` and :meth:`steered`.
    """

    folder: Path
    key: str

    @classmethod
    def of(cls, out: Path, layers: PipelineLayers, config: BackboneConfig) -> "Kept":
        """The pictures of a model, kept in an output's folder that this process has to itself."""
        about = {
            "model": layers.name,
            # Where it runs is free to change between a stop and its continuation.
            "backbone": asdict(replace(config, device="auto")),
            "weights": pipeline_hash(layers.pipeline),
            "versions": versions(),
        }
        return cls(out / DRAWN, request_key(about))

    def steered(self, edits: Sequence[Edit]) -> "Kept":
        """Those that are drawn with some edits."""
        about = {"within": self.key, "edits": [_about(one) for one in edits]}
        return replace(self, key=request_key(about))

    def batch(
        self,
        about: dict[str, Any],
        names: Sequence[str],
        draw: Callable[[], Sequence[Image.Image]],
    ) -> tuple[Path, float]:
        """A batch's pictures: those that are there, or drawn now.

        Args:
            about: what decides them beside the model and its edits, as plain values.
            names: of their files.
            draw: draws them.

        Returns:
            The folder that they are in, and the seconds that drawing them took.

        Raises:
            ValueError: what is there was not left by a stopped run, or has changed.
            OSError: they can't be written; what was kept before stays.
        """
        place = self.folder / request_key({"within": self.key, **about})
        if not os.path.lexists(place / BATCH):
            began = time.monotonic()
            pictures = draw()
            seconds = time.monotonic() - began

            def write(folder: Path) -> None:
                for name, picture in zip(names, pictures, strict=True):
                    picture.save(folder / name)
                hashes = {name: sha256(folder / name) for name in names}
                write_json(folder / BATCH, {"seconds": seconds, "pictures": hashes})

            write_folder(place, write)
        return place, _seconds(place, names)

    def drop(self) -> None:
        """Remove all that are kept, once an output is written; what else is in the folder stays."""
        sweep(self.folder)
        for place in sorted(self.folder.glob("*")):
            if _KEY.fullmatch(place.name):
                # First what says that it is whole: a stop leaves nothing that would be taken for it.
                remove_files(place, BATCH.__eq__)
                remove_files(place, _PICTURE.fullmatch)
        remove_files(self.folder, lambda name: False)


def check_drawn(out: Path) -> None:
    """See before the work that pictures can be kept in an output's folder.

    Raises:
        ValueError: a file or a link stands there, or it can't be written.
    """
    place = file_in(out, DRAWN, what="the folder of kept pictures")
    check_folder(place)


def _seconds(place: Path, names: Sequence[str]) -> float:
    """The seconds that a kept batch took.

    Raises:
        ValueError: it is no such batch.
    """
    found = read_object(file_in(place, BATCH))
    seconds, hashes = found.get("seconds"), found.get("pictures")
    paths = {name: file_in(place, name, what="a kept picture") for name in names}
    there = {name: sha256(path) for name, path in paths.items() if path.is_file()}
    if type(seconds) is not float or seconds < 0 or hashes != there or len(there) != len(names):
        raise ValueError(
            f"{printable(place)} does not hold the pictures that a stopped run kept: remove it to have them "
            "drawn again"
        )
    return seconds


def _about(one: Edit) -> dict[str, Any]:
    """All that decides what an edit changes, as plain values."""
    about: dict[str, Any] = {
        "layer": one.layer,
        "strength": one.strength,
        "branch": one.branch,
        "timesteps": one.timesteps,
        "mask": None if one.mask is None else _hash(one.mask),
    }
    if isinstance(one.change, Direction):
        return about | {"vector": _hash(one.change.vector)}
    assert isinstance(one.change, LatentChange)
    change = one.change
    words = {"operation": change.operation, "read": change.read, "where": change.where}
    values = {str(latent): value for latent, value in change.values.items()}
    ksae = ksae_identity(change.ksae) | {"settings": change.ksae.settings()}
    return about | words | {"values": values, "ksae": ksae}


def _hash(tensor: Tensor) -> str:
    rows = tensor.detach().float().cpu().contiguous().numpy()
    return sha256_of(f"{rows.shape}:".encode() + rows.tobytes()).hexdigest()
