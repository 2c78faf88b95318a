"""PCA maps: the top three principal components of a set's grids as red, green and blue (Fig. 10-12).

Every cell of every grid (b c h w) is one observation of c channels. With mean mu and the covariance's
leading eigenvectors v_1..v_3, cell x shows ((x - mu) . v_j), scaled for the whole set at once, so that one
colour means one thing across the images of a layer. The sign of an eigenvector is arbitrary: the one
is taken whose largest loading is positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from revelio.data.transforms import Crop
from revelio.wording import plural

COMPONENTS = 3
CLIP = 0.01
"""The share of cells at either end of a component that is clipped, so that outliers don't grey the rest."""


@dataclass(frozen=True)
class PcaMaps:
    """The maps of one layer at one timestep.

    Attributes:
        rgb: from 0 to 1.
        components: unit vectors, by falling variance; zeros where the grids have fewer dimensions.
        mean: the mean cell.
        explained: each component's share of the variance.
        low: what is drawn as 0, per component.
        high: what is drawn as 1, per component.
    """

    rgb: Float[Tensor, "b 3 h w"]
    components: Float[Tensor, "3 c"]
    mean: Float[Tensor, "c"]
    explained: Float[Tensor, "3"]
    low: Float[Tensor, "3"]
    high: Float[Tensor, "3"]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for a safetensors file."""
        names = ("rgb", "components", "mean", "explained", "low", "high")
        return {name: getattr(self, name).contiguous() for name in names}


class PcaFit:
    """Running mean and covariance of the cells of grids; its size is c x c."""

    def __init__(self, channels: int) -> None:
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels, dtype=torch.float64)
        self._cells = 0

    def add(self, grids: Float[Tensor, "b c h w"]) -> None:
        """Count in every cell of the grids."""
        cells = grids.detach().cpu().double().movedim(1, -1).flatten(0, 2)
        self._sum += cells.sum(0)
        self._products += cells.T @ cells
        self._cells += len(cells)

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """The leading components (3 c), the mean (c) and the explained shares (3).

        Raises:
            ValueError: fewer than two cells.
        """
        if self._cells < 2:
            raise ValueError(f"PCA over {plural(self._cells, 'cell')}: give at least two")
        mean = self._sum / self._cells
        covariance = self._products / self._cells - mean.outer(mean)
        variances, vectors = torch.linalg.eigh(covariance)
        leading = vectors.flip(1)[:, :COMPONENTS].T
        largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
        leading = leading * torch.where(largest < 0, -1.0, 1.0)
        shares = variances.clamp(min=0).flip(0)[:COMPONENTS] / variances.sum().clamp(min=1e-300)
        missing = COMPONENTS - len(leading)
        pad = torch.nn.functional.pad
        return pad(leading, (0, 0, 0, missing)), mean, pad(shares, (0, missing))


def pca_maps(grids: Float[Tensor, "b c h w"]) -> PcaMaps:
    """The PCA maps of a set of grids of one layer.

    Raises:
        ValueError: the set is no (b c h w), or has fewer than two cells.
    """
    if grids.ndim != 4:
        raise ValueError(f"PCA maps take grids (b c h w), not {tuple(grids.shape)}")
    fit = PcaFit(grids.shape[1])
    fit.add(grids)
    components, mean, explained = fit.components()
    centred = grids.detach().cpu().double() - mean[:, None, None]
    projected = torch.einsum("bchw,kc->bkhw", centred, components)
    by_component = projected.movedim(1, 0).flatten(1)
    low = _quantile(by_component, CLIP)
    high = _quantile(by_component, 1 - CLIP)
    span = (high - low).clamp(min=1e-12)
    rgb = ((projected - low[:, None, None]) / span[:, None, None]).clamp(0, 1)
    # A component without variance is mid grey, not black.
    rgb = torch.where((high - low > 1e-12)[:, None, None], rgb, 0.5)
    found = [rgb, components, mean, explained, low, high]
    return PcaMaps(*(tensor.float() for tensor in found))


def _quantile(values: Tensor, share: float) -> Tensor:
    # torch.quantile refuses more than 16 million values.
    position = round(share * (values.shape[1] - 1))
    return values.sort(dim=1).values[:, position]


def sheet(
    images: Sequence[Image.Image],
    columns: Sequence[tuple[str, Float[Tensor, "b 3 h w"]]],
    *,
    side: int = 160,
    crop: Crop | None = None,
) -> Image.Image:
    """One picture: a row an image, the image first, then its map in each column, under headings.

    Args:
        images: of any size.
        columns: a heading and the maps of each.
        side: of an image and a map, in pixels.
        crop: which square of an image the maps are of; None: not known, the middle square.
    """
    gap, head = max(4, side // 32), max(20, side // 7)
    width = (len(columns) + 1) * (side + gap) + gap
    page = Image.new("RGB", (width, head + len(images) * (side + gap) + gap), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=max(10, side // 12))
    for column, title in enumerate(["image", *(name for name, _ in columns)]):
        centre = gap + column * (side + gap) + side // 2
        draw.text((centre, head // 2 + gap // 2), title, fill="#222", font=font, anchor="mm")
    for row, image in enumerate(images):
        top = head + row * (side + gap)
        short = min(image.size)
        seen = crop or Crop(short, short)
        page.paste(seen.view(image.convert("RGB"), (side, side), "bicubic"), (gap, top))
        for column, (_, maps) in enumerate(columns, start=1):
            picture = Image.fromarray(_bytes(maps[row]))
            resized = picture.resize((side, side), Image.Resampling.NEAREST)
            page.paste(resized, (gap + column * (side + gap), top))
    return page


def side_by_side(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets of the same images as one picture."""
    page = Image.new("RGB", (sum(one.width for one in sheets), sheets[0].height), "white")
    for number, one in enumerate(sheets):
        page.paste(one, (sum(before.width for before in sheets[:number]), 0))
    return page


def _bytes(rgb: Float[Tensor, "3 h w"]):
    return (rgb * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
