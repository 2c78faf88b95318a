"""Every setting of top images, purity, galleries and PCA maps, declared once. Imports no torch.

`TopImagesConfig`, `PurityConfig`, `GalleryConfig` and `PCAMapsConfig` are what the library's functions take;
the classes that inherit them add what a pipeline reads and where it writes.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from revelio.backbones.config import BackboneConfig
from revelio.bounds import (
    Count,
    Device,
    File,
    Folder,
    Index,
    NotEmpty,
    OutFile,
    OutFolder,
    PathFields,
    Pixels,
    Range,
    Seed,
)
from revelio.data.config import DataConfig
from revelio.sae.config import Mode

CodeKind = Literal["sparse", "dense"]
OverCells = Literal["pooled", "max", "mean"]
MapKind = Literal["decoder", "labels"]
MapMethod = Literal["tsne", "pca"]
Two = Annotated[int, Range(2)]

RELEASED_M = 20
FROM_STORE = "from-store"
FROM_GALLERY = "from-gallery"


@dataclass(frozen=True, kw_only=True)
class TopImagesConfig:
    """How many images are kept for each latent, and by which codes (Sec. 4.2)."""

    m: Count | None = None
    """Top images kept for each latent; none: 10, and 20 in mode as_code, as released."""

    mode: Mode = "fixed"
    """fixed, as_paper: the k codes that TopK keeps; as_code: ReLU of all pre-activations, as released."""

    codes: CodeKind | None = None
    """sparse (TopK codes) or dense (ReLU of pre-activations), whatever the mode; none: the mode's own."""

    over: OverCells | None = None
    """What an image's code is: of its pooled activation (`pooled`); or the maximum (`max`) or the mean
    (`mean`) of its cells' codes, with the place; none: `max` for a k-SAE trained on cells, else `pooled`."""

    batch_size: Count = 1024
    """Images (or cells) at a time; the result does not depend on it."""

    latent_chunk: Count = 1024
    """Latents at a time for dense codes, few enough that their codes stay in the processor's caches."""

    @property
    def kept(self) -> int:
        """How many images a latent: ``m``, or the mode's own."""
        return self.m or (RELEASED_M if self.mode == "as_code" else 10)

    @property
    def kind(self) -> CodeKind:
        """Which codes: ``codes``, or the mode's own."""
        return self.codes or ("dense" if self.mode == "as_code" else "sparse")


@dataclass(frozen=True, kw_only=True)
class MakeTopImagesConfig(TopImagesConfig, PathFields):
    """A store and a k-SAE whose top images are made, and where they go."""

    store: Folder
    """The activation store (a folder that `revelio extract` wrote)."""

    ksae: str
    """The k-SAE: a run folder of `revelio train-ksae`, its `final` folder, or a hub id."""

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `mps`."""

    out: OutFolder | None = None
    """The folder to write; none: `top-images` in the k-SAE's run folder."""


@dataclass(frozen=True, kw_only=True)
class PurityConfig:
    """How latents are judged by their top images (Sec. 4.2)."""

    m: Two = 10
    """Top images that a latent is judged by (paper: 10)."""

    latents: Two = 1000
    """The strongest so many latents are averaged (paper: 1000)."""

    random_sets: Two = 20_000
    """Random sets of images for the chance level."""

    permutations: Two = 500
    """Shuffles of the labels for the z-score."""

    bootstrap: Two = 1000
    """Resamples of the latents for the intervals."""

    seed: Seed = 0
    """Seed of the three above, and of the controls."""


@dataclass(frozen=True, kw_only=True)
class MeasurePurityConfig(PurityConfig, PathFields):
    """Which top images are judged, beside which controls, and where the result goes."""

    renamed: ClassVar[dict[str, str]] = {"images": "m", "draws": "random-sets"}

    top: Annotated[tuple[Folder, ...], NotEmpty()]
    """Folders that `revelio top-images` wrote; each gives one entry."""

    store: tuple[Folder, ...] = ()
    """The activation stores of the top images, one each; for controls and similarity."""

    ksae: tuple[str, ...] = ()
    """The k-SAEs of the top images, one each: with the stores, purity stands beside its controls, what
    control dictionaries reach on the same images."""

    similarity: bool = False
    """Also measure how similar the top images' activations are, which needs no labels but the stores."""

    embeddings: Folder | None = None
    """A store of other embeddings of the same images (say, a ViT's), for the similarity."""

    centre: bool = True
    """Take the mean activation away before comparing: a large common mean makes all images alike."""

    device: Device = "auto"
    """Where the controls run: `auto` (CUDA where there is one), `cpu`, `cuda`, `mps`."""

    out: OutFile | None = None
    """The JSON file to write; none: `purity.json` in the folder of the top images."""


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """How much a gallery shows, and how."""

    latents: Count = 1000
    """The strongest so many latents."""

    image_latents: Count = 32
    """Active latents listed for an image."""

    neighbours: Count = 6
    """Similar latents listed for a latent: by direction, and as many by images."""

    range_images: Count = 6
    """Images shown of each further part of a latent's range: around the median of its activations, drawn
    from all that it fires on, and near misses."""

    map_by: MapKind = "decoder"
    """What the map is laid out by: decoder directions, or the classes of the top images."""

    map_method: MapMethod = "tsne"
    """How the map is laid out."""

    title: str | None = None
    """The heading; none: the data set, layer and timestep."""

    thumbnail: Pixels = 192
    """Side of the thumbnails, in pixels; smaller pictures are not enlarged."""

    seed: Seed = 0
    """Seed of the map, of the chance levels and of the controls."""


@dataclass(frozen=True, kw_only=True)
class MakeGalleryConfig(GalleryConfig, MakeTopImagesConfig):
    """What a gallery is made of, and where it goes."""

    m: Count | None = 20
    """Top images shown for each latent, where they are made now."""

    top: Folder | None = None
    """Top images that `revelio top-images` made of this store and k-SAE; none: they are made now."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source=FROM_STORE))
    """The pictures; from-store: the known data set that the store's manifest names. Matched by id."""

    names: File | None = None
    """The latents' names: what `revelio name-latents` wrote for this k-SAE."""

    locality: File | None = None
    """How local and stable the latents are: what `revelio locality` wrote for this k-SAE."""

    beside: tuple[Folder, ...] = ()
    """Galleries of the same images, of other layers, timesteps or k-SAEs, to be compared with this one image
    by image; they are copied into it."""

    beside_controls: bool = True
    """Where there are labels, measure what control dictionaries reach (seconds to minutes)."""

    out: OutFolder | None = None
    """The folder to write; none: `gallery` in the k-SAE's run folder."""


@dataclass(frozen=True, kw_only=True)
class PCAMapsConfig:
    """Which grids PCA maps are of (Fig. 10-12)."""

    layers: Annotated[tuple[str, ...], NotEmpty()] = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
    """Layers, a column each (paper: these four of SD-1.5; blocks of DiT)."""

    timesteps: tuple[Index, ...] = (25,)
    """Timesteps; leave empty for a model without noise (ViT)."""

    seed: Seed = 0
    """Seed of the noise."""

    batch_size: Count = 8
    """Images at a time."""

    side: Pixels = 160
    """Side of a picture on the sheet, in pixels."""


@dataclass(frozen=True, kw_only=True)
class MakePCAMapsConfig(PCAMapsConfig, PathFields):
    """Which images through which model, and where the maps go."""

    data: DataConfig = field(default_factory=lambda: DataConfig(limit=8))
    """The images; all of them are on the sheet."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""

    others: tuple[str, ...] = ()
    """Further models on the same sheet, such as a DiT beside a U-Net: known names, folders or hub ids. Each
    shows those of the layers that it has; one without noise shows them once."""

    out: OutFolder | None = None
    """The folder to write; none: `runs/pca-maps/` and the names of model and data set."""


@dataclass(frozen=True, kw_only=True)
class LocalityConfig(PathFields):
    """Which latents of a k-SAE of cells are measured on which images, and beside what."""

    store: Annotated[tuple[Folder, ...], NotEmpty()]
    """Stores of whole grids of the same images: the first is measured; others at other timesteps give the
    timestep profile, at other draws the stability over noise."""

    ksae: str
    """The k-SAE: a run folder of `revelio train-ksae`, its `final` folder, or a hub id."""

    latents: Two = 100
    """The strongest so many latents, by the maximum over cells."""

    limit: Two = 200
    """The first so many images."""

    redundant_among: Two = 1000
    """The strongest so many latents, among which repeated ones are counted."""

    masks: Folder | None = None
    """A folder with a picture for each image, named by its id with the suffix .png, whose grey values (or
    palette places) are classes; 0 is the background."""

    other: str | None = None
    """A k-SAE of another run, in which partners of the latents are looked for."""

    moved: bool = False
    """Also measure whether a latent's map moves with the image, mirrored and shifted; runs the backbone."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source=FROM_STORE))
    """The images, for `moved`; `from-store`: the data set the store names."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name=FROM_STORE))
    """The model that the stores are of, for `moved`; from-store: the known model that they name."""

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `mps`: where the k-SAE runs."""

    seed: Seed = 0
    """Seed of chance levels and bootstraps."""

    out: OutFile | None = None
    """The JSON file to write; none: `locality.json` in the k-SAE's run folder."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(PathFields):
    """Which gallery is shown, and what encodes a picture that is dropped in."""

    gallery: Folder
    """The folder that `revelio gallery` wrote."""

    ksae: str | None = None
    """The k-SAE of the gallery; none: that of the run folder which the gallery lies in."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name=FROM_GALLERY))
    """The model of the gallery; from-gallery: the known model that the gallery names."""

    host: str = "127.0.0.1"
    """The address to listen at. Anything but this machine's own lets others on the network look, and drop
    pictures in."""

    port: Annotated[int, Range(0, 65_535)] = 8571
    """The port to listen at; 0: a free one."""
