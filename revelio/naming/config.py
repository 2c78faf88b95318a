"""Every setting of naming, declared once; the command inherits it. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated

from revelio.analysis.config import FROM_STORE
from revelio.bounds import (
    Count,
    Device,
    Folder,
    NotNegative,
    OutFile,
    Pixels,
    Positive,
    Range,
    Seed,
)
from revelio.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class NameLatentsConfig:
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

    base_url: str | None = None
    """The endpoint's address, as http://localhost:8000/v1; without it OpenAI's, or OPENAI_BASE_URL."""

    strongest: Count = 50
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
    """Of the order of the choices, and of the images that names are checked on."""

    device: Device = "auto"
    """Where the k-SAE runs: `auto` (CUDA where there is one), `cpu`, `cuda`, `mps`."""

    max_tokens: Count = 300
    """Longest reply."""

    cache: OutFile | None = None
    """The file of replies; none: beside the result (names.json -> names.cache.sqlite)."""

    concurrency: Annotated[int, Range(1, 1024)] = 8
    """Requests on their way at once."""

    timeout: Positive = 120.0
    """Seconds to wait for a reply, each try."""

    tries: Count = 6
    """Tries a request gets at rate limits, timeouts and server errors, with growing pauses between."""

    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; a server of your own may need none."""

    estimate: bool = False
    """Only say how many calls and tokens it would take, and what it would cost; send nothing."""

    price_in: NotNegative = 0.0
    """Price of a million tokens sent."""

    price_out: NotNegative = 0.0
    """Price of a million tokens received."""

    out: OutFile | None = None
    """The JSON file to write; none: `names.json` in the folder of the top images."""
