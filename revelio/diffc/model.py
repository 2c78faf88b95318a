"""Diff-C: four 3x3 convolutions, a global mean and a linear layer on one layer's grids.

    z = BN(grid);  four times z = ReLU(BN(conv(z))), strides 1, 2, 2, 2;  logits = W mean_hw(z) + b

Source: Sec. 3.3 and Table 1 for the shapes. The batch norms (the first without weights, so that a grid's
channels arrive at unit scale whatever the backbone) and the dropout are in the released code only. At
1280 channels and 37 classes it has 40,158,245 parameters.
"""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from revelio.diffc.config import DiffCConfig
from revelio.diffc.conv import Conv2d
from revelio.diffc.shared import BatchNorm2d, Dropout, Dropout2d
from revelio.hub import CARD_TEMPLATE, card_facts, is_hub_id, save_whole, trained
from revelio.seeds import generator
from revelio.tensor_files import read_tensors, tensor_headers
from revelio.trust import printable, read_object
from revelio.wording import plural

WIDTH = DiffCConfig.width
STRIDES = (1, 2, 2, 2)  # Table 1
FORMAT = 1
# What the config of a saved classifier may hold of how its grids were made.
GRID_VALUES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("backbone", "layer", "prompts", "clip", "revision", "dtype"), (str,)),
    **dict.fromkeys(("timestep", "image_size", "seed", "random_weights"), (int,)),
}

_ABOUT = """The light classifier of Revelio: four convolutions on what one layer of a frozen model makes of
a picture. Its accuracy says more beside that on raw pixels and on random weights."""
_USAGE = """from revelio.diffc.model import load_diffc

logits = load_diffc("path or hub id")(grids)  # (b channels h w) -> (b classes)"""


class DiffC(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="revelio",
    tags=["image-classification", "diffusion-models", "interpretability"],
    model_card_template=CARD_TEMPLATE,
):
    """The classifier for grids (b c h w) of any backbone and of any size down to 1x1.

    Args:
        channels: c of the grids.
        classes: how many classes there are.
        width: channels of the four convolutions; 1024 in the paper, less for small backbones.
        dropout: share of channels (convolutions) and entries (before the linear layer) dropped.
        class_names: names by class id, kept with the weights.
        grids: how the grids were made (backbone, layer, timestep, prompts, ...), kept with the weights.
        seed: of the initial weights, drawn from PyTorch's default distributions.
        format: the version of the file format that this is.

    Raises:
        ValueError: a size that can't be, names that are not as many as the classes, another format.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        width: int = WIDTH,
        dropout: float = 0.0,
        class_names: Sequence[str] | None = None,
        grids: dict[str, Any] | None = None,
        seed: int = 0,
        format: int = FORMAT,
    ) -> None:
        super().__init__()
        _check(channels, classes, width, dropout, class_names, format)
        self.channels, self.classes, self.width = channels, classes, width
        self.class_names = tuple(class_names or map(str, range(classes)))
        self.grids = dict(grids or {})
        self.norm = BatchNorm2d(channels, affine=False)
        widths = (channels, *[width] * len(STRIDES))
        self.blocks = nn.Sequential(
            *[
                _block(before, after, stride, dropout)
                for before, after, stride in zip(widths[:-1], widths[1:], STRIDES, strict=True)
            ]
        )
        self.dropout = Dropout(dropout)
        self.head = skip_init(nn.Linear, width, classes)
        _draw_weights(self, seed)

    def forward(self, grid: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """The logits of a batch of grids.

        Raises:
            ValueError: the grids don't have this model's number of channels.
        """
        if grid.ndim != 4 or grid.shape[1] != self.channels:
            raise ValueError(
                f"Diff-C for {plural(self.channels, 'channel')} was given {tuple(grid.shape)}: "
                f"it takes grids of shape (b, {self.channels}, h, w)"
            )
        return self.head(self.dropout(self.blocks(self.norm(grid)).mean(dim=(2, 3))))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **keywords: Any) -> "DiffC":
        """Load from a folder, a run's folder, or a hub id; :func:`load_diffc` says more of what is wrong."""
        return super().from_pretrained(trained(pretrained_model_name_or_path), **keywords)

    @classmethod
    def _load_as_safetensor(
        cls, model: "DiffC", model_file: str, map_location: str, strict: bool
    ) -> "DiffC":
        """The hub's own would leave out what is missing or unknown; here both are errors, and so is NaN."""
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.load_state_dict(read_tensors(Path(model_file), shapes))
        return model.to(map_location)

    @classmethod
    def _load_as_pickle(cls, model: "DiffC", *_: Any, **__: Any) -> "DiffC":
        """A Diff-C is never a pickle."""
        raise ValueError("there is no model.safetensors")

    def generate_model_card(self, **found: Any) -> Any:
        """The card: sizes, how the grids were made, and further numbers, ``found``, by name."""
        own = {"channels": self.channels, "width": self.width, "classes": self.classes}
        own |= {"parameters": self.parameter_count(), "class names": ", ".join(self.class_names)}
        named = {"title": "Diff-C", "about": _ABOUT, "usage": _USAGE}
        facts = card_facts(own | {"grids": self.grids} | found)
        return super().generate_model_card(facts=facts, **named)

    def save_pretrained(self, save_directory: Any, **keywords: Any) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a model card; see the hub mixin.

        Raises:
            ValueError: a file stands in the way.
            OSError: it can't be written.
        """
        return save_whole(super().save_pretrained, save_directory, keywords)

    def parameter_count(self) -> int:
        """How many numbers are trained (running means and variances are not)."""
        return sum(parameter.numel() for parameter in self.parameters())


REMEDY = "give the folder that train-diffc names at its end, or a hub id"


def load_diffc(source: str | Path) -> DiffC:
    """Read a Diff-C from a folder that ``save_pretrained`` wrote, a run's folder, or a hub id.

    Raises:
        ValueError: there is none, or it is broken.
    """
    source = trained(source)
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"no Diff-C in {source} (it has no config.json): {REMEDY}")
    if not Path(source).exists() and not is_hub_id(source):
        raise ValueError(f"no Diff-C at {source}: {REMEDY}")
    if Path(source).is_dir():
        _check_files(Path(source))
    try:
        with redirect_stdout(StringIO()):  # the hub's own prints
            model = DiffC.from_pretrained(source, strict=True)
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"no Diff-C at {source} ({reason}): {REMEDY}") from error
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{source} is no Diff-C ({str(error).splitlines()[0]}): {REMEDY}"
        ) from error
    return model.eval()


def head_macs(shape: tuple[int, int, int], width: int) -> int:
    """Multiply-adds of one image's way through Diff-C (without the last, small linear layer)."""
    channels, height, side = shape
    total, before = 0, channels
    for stride in STRIDES:
        height, side = -(-height // stride), -(-side // stride)
        total += 9 * before * width * height * side
        before = width
    return total


def _check_files(folder: Path) -> None:
    """Compare config and weights before anything of their sizes is allocated.

    Raises:
        ValueError: a size is no number or not the weights', or `grids` holds something else than values.
    """
    path = folder / "config.json"
    config = read_object(path)
    if "classes" not in config:
        raise ValueError(f"no Diff-C in {folder} (its config.json has no `classes`): {REMEDY}")
    headers, _ = tensor_headers(folder / "model.safetensors")
    sizes = (config.get("classes"), config.get("width", WIDTH), config.get("channels"))
    shapes = [headers[n].shape for n in ("head.weight", "norm.running_mean") if n in headers]
    if sum(shapes, ()) != sizes:
        raise ValueError(
            f"{path} says classes, width and channels {sizes}, which are not those of model.safetensors"
        )
    grids = config.get("grids")
    for name, value in (grids if isinstance(grids, dict) else {}).items():
        kinds = GRID_VALUES.get(name, (str, int, float, bool))
        if value is not None and type(value) not in kinds:
            raise ValueError(f"{path} has {printable(name)} = {printable(repr(value))} in `grids`")


def _block(before: int, after: int, stride: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        skip_init(Conv2d, before, after, 3, stride=stride, padding=1),
        BatchNorm2d(after),
        nn.ReLU(),
        Dropout2d(dropout),
    )


@torch.no_grad()
def _draw_weights(model: nn.Module, seed: int) -> None:
    """PyTorch's default U(-1/sqrt(fan in), 1/sqrt(fan in)), without its global generator."""
    stream = generator(seed, "diffc weights")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                parameter.uniform_(-bound, bound, generator=stream)


def _check(
    channels: int,
    classes: int,
    width: int,
    dropout: float,
    class_names: Sequence[str] | None,
    format: int,
) -> None:
    if format != FORMAT:
        raise ValueError(f"this Diff-C has format {format}: this version of Revelio reads {FORMAT}")
    for name, value in (("channels", channels), ("classes", classes), ("width", width)):
        if value < 1:
            raise ValueError(f"Diff-C can't have {name} = {value}: give at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: give a share from 0 up to, but not, 1")
    if class_names is None:
        return
    texts = isinstance(class_names, list | tuple)
    if not texts or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class names must be a list of texts, not {printable(class_names)[:200]}")
    if len(class_names) != classes:
        raise ValueError(
            f"{plural(len(class_names), 'class name')} for {plural(classes, 'class', 'classes')}: give one "
            "each"
        )
