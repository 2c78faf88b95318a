"""Every setting of naming, declared once; the command inherits it. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from revelio.analysis.config import FROM_STORE
from revelio.bounds import Count, Device, Folder, OutFile, Pixels, Range, Seed
from revelio.data.config import DataConfig
from revelio.endpoint import AskingConfig


@dataclass(frozen=True, kw_only=True)
class NameLatentsConfig(AskingConfig):
    """Which latents are named by which judge, from which pictures."""

    top: Folder
    """The folder that `revelio top-images` wrote."""

    store: Folder
    """The activation store of the top images."""

    ksae: str
    """The k-SAE of the top images."""

    judge: str
    """The judge's name at the endpoint; it must see pictures."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source=FROM_STORE))
    """The pictures; from-store: the known data set that the store's manifest names. Matched by id."""

    renamed: ClassVar[dict[str, str]] = {"strongest": "latents", "cache": "reply-cache"}

    latents: Count = 50
    """How many latents are named, the strongest first; those that fire on too few images are passed over."""

    shown: Annotated[int, Range(2, 36)] = 9
    """Top images on the sheet that a name is given from."""

    checked: Annotated[int, Range(4, 18)] = 8
    """Images that a name is checked on: so many on which the latent fires and that were not shown, and as
    many on which it does not."""

    repeats: Annotated[int, Range(1, 26)] = 3
    """How often each latent is asked about, the choices in another order each time."""

    side: Pixels = 192
    """Side of a picture on the sheets, in pixels."""

    seed: Seed = 0
    """Seed of the order of the choices, and of the images that names are checked on."""

    device: Device = "auto"
    """Where the k-SAE runs: `auto` (CUDA where there is one), `cpu`, `cuda`, `mps`."""

    max_tokens: Count = 300
    """Longest reply."""

    reply_cache: OutFile | None = None
    """The file of replies; none: beside the result (names.json -> names.cache.sqlite)."""

    out: OutFile | None = None
    """The JSON file to write; none: `names.json` in the folder of the top images."""
