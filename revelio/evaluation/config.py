"""The settings of an evaluation, declared once; the command line inherits them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from revelio.analysis.config import FROM_STORE, OverCells
from revelio.backbones.config import BackboneConfig
from revelio.bounds import Count, Folder, Index, NotEmpty, OpenShare, OutFolder, PathFields, Seed
from revelio.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class EvalSAEConfig(PathFields):
    """Which k-SAEs are judged, on which held-out images, beside which controls."""

    store: Folder
    """The activation store of held-out images: the layer and timestep of the training store, other images."""

    ksae: Annotated[tuple[str, ...], NotEmpty()]
    """The k-SAEs: runs of `revelio train-ksae`, or hub ids; several seeds of one recipe give an interval over
    trainings, and stability; so do trainings on halves of the images, or on other noise draws."""

    train_store: Folder | None = None
    """The store that they were trained on, which gives the controls their directions; none: the held-out
    one does, which is in the controls' favor."""

    over: OverCells | None = None
    """What an image's code is: of its pooled activation (`pooled`); or the maximum (`max`) or the mean
    (`mean`) of its cells' codes; none: `max` for k-SAEs trained on cells, else `pooled`."""

    out: OutFolder | None = None
    """The folder to write `evaluation.json` and `evaluation.md` to, and the controls that were trained; none:
    `evaluation` in the first k-SAE's run."""

    card: bool = True
    """Show the result in the model card (`README.md`) of each k-SAE on disk: a section of its own, replaced
    by the next evaluation; the rest of the card stays as it is."""

    trained_controls: bool = False
    """Also train frozen-decoder, frozen-encoder, soft-frozen and shuffled controls, each with the budget of
    the k-SAE that it stands beside; they are kept in `out` and not trained twice."""

    random_store: Folder | None = None
    """The images of `store` through the same backbone with random weights (`revelio extract
    --random-weights 0`): another control is the k-SAE's recipe trained on `random_train_store`."""

    random_train_store: Folder | None = None
    """The training images through the same random weights, for `random_store`."""

    overlap: Literal["stop", "allow"] = "stop"
    """What to do where held-out images are in the training store too."""

    loss_images: Index = 0
    """Images that go through `backbone` with the layer replaced (output and loss recovered) and with latents
    ablated; 0: none."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name=FROM_STORE))
    """The model of `store`, for `loss_images`; from-store: the known model that it names."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source=FROM_STORE))
    """The images of `store`, for `loss_images`; from-store: the known data set that it names."""

    planted: Index = 0
    """Trainings of the first k-SAE's recipe on synthetic activations with known directions; 0: none."""

    confidence: OpenShare = 0.95
    """The confidence level of all intervals of a measure together."""

    batch_size: Count = 16
    """Images per pass of the backbone."""

    seed: Seed = 0
    """Seed of drawn directions, halves and subsets of the images."""
