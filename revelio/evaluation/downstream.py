"""What comes out of a model when one of its layers is changed: for loss recovered and for ablations.

| model              | output                                           | loss                            |
|--------------------|--------------------------------------------------|---------------------------------|
| diffusion          | the prediction at timestep t                     | its squared error               |
| ViT (CLIP, DINOv2) | class token after the final norm, and the mean   | 1 - cosine to the unchanged     |
|                    | of the final patches (DINOv2's probe reads both) | output, the mean of the two     |

A diffusion model's loss is its own; a ViT has none, so it is how far the final embedding moves, 0 where
nothing is changed. Class token and registers are not changed: activations are of the patches.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from revelio.backbones.base import Backbone, DiffusionModel, EmbeddingModel
from revelio.backbones.diffusion.schedule import keyed_noise
from revelio.backbones.hooks import edit, hooked
from revelio.evaluation.measures import HeldOut

# The layer's cells of some images, and where these stand among those that were asked for -> other cells.
Change = Callable[[Float[Tensor, "b s d"], slice], Float[Tensor, "b s d"]]
Replace = Callable[[Float[Tensor, "r d"]], Float[Tensor, "r d"]]


class Downstream(ABC):
    """Images at the input of a whole model, and what it makes of them with a layer changed.

    Args:
        backbone: loaded whole.
        layer: which one is changed.
        encoded: what ``backbone.encode`` gave.
        batch_size: images a pass.
    """

    # Tokens of the layer that are no cells of the image; they come first.
    skip = 0

    def __init__(
        self, backbone: Backbone, layer: str, encoded: Tensor, batch_size: int = 16
    ) -> None:
        self.backbone, self.layer = backbone, layer
        self.encoded, self.batch_size = encoded, batch_size

    def __len__(self) -> int:
        return len(self.encoded)

    @abstractmethod
    def run(self, images: Int64[Tensor, " b"]) -> Tensor:
        """The output for a batch of images."""

    @abstractmethod
    def losses(self, outputs: Float[Tensor, "images ..."]) -> Float[Tensor, " images"]:
        """Of the outputs of all images."""

    @abstractmethod
    def features(
        self, outputs: Float[Tensor, "p ..."], images: Int64[Tensor, " p"]
    ) -> Float[Tensor, "p f"]:
        """What the outputs say of the pictures: the ground of a probe."""

    @torch.no_grad()
    def outputs(
        self, change: Change | None = None, images: Int64[Tensor, " p"] | None = None
    ) -> Float[Tensor, "p ..."]:
        """The outputs of some images, or of all; an image may be given more than once.

        Args:
            change: of the layer's cells; None leaves them as they are.
            images: their places.
        """
        images = torch.arange(len(self)) if images is None else images
        parts = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            hooks = {} if change is None else {self.layer: edit(self._changed(change, part))}
            with hooked(self.backbone, hooks):
                parts.append(self.run(images[part]).float().cpu())
        return torch.cat(parts) if parts else self.unchanged[:0]

    @cached_property
    def unchanged(self) -> Float[Tensor, "images ..."]:
        """The outputs of all images as they are."""
        return self.outputs()

    def _changed(self, change: Change, part: slice) -> Callable[[Tensor], Tensor]:
        def function(output: Tensor) -> Tensor:
            # A grid (b d h w) of a U-Net, tokens (b t d) of a transformer.
            tokens = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
            cells = change(tokens[:, self.skip :].float(), part).to(output)
            made = torch.cat([tokens[:, : self.skip], cells], dim=1)
            return made.transpose(1, 2).reshape(output.shape) if output.ndim == 4 else made

        return function


class Denoised(Downstream):
    """The one-step predictions of a diffusion model; noise is keyed by image, the same for all changes.

    Args:
        backbone: loaded whole.
        layer: which one is changed.
        encoded: what ``backbone.encode`` gave.
        ids: the images' ids, which key the noise.
        timestep: the model's training index.
        prompts: a text an image; None: the empty prompt.
        seed: of the noise.
        draw: which of several noise draws.
        batch_size: images a pass.
    """

    def __init__(
        self,
        backbone: DiffusionModel,
        layer: str,
        encoded: Float[Tensor, "images c h w"],
        ids: Sequence[str],
        timestep: int,
        *,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
        batch_size: int = 16,
    ) -> None:
        super().__init__(backbone, layer, encoded, batch_size)
        self.model, self.timestep = backbone, timestep
        self.prompts = [""] * len(ids) if prompts is None else list(prompts)
        noise = keyed_noise(encoded.shape[1:], ids, seed=seed, timestep=timestep, draw=draw)
        clean = encoded.float().cpu()
        self.x_t = backbone.schedule.add_noise(clean, noise, timestep)
        self.target = backbone.schedule.target(clean, noise, timestep)

    def run(self, images: Int64[Tensor, " b"]) -> Tensor:
        """The prediction; what models of learned variance append is left out."""
        conditioning = self.model.conditioning([self.prompts[i] for i in images.tolist()])
        device = next(self.model.module(self.layer).parameters()).device
        output = self.model.predict(self.x_t[images].to(device), self.timestep, conditioning)
        return output[:, : self.target.shape[1]]

    def losses(self, outputs: Float[Tensor, "images ..."]) -> Float[Tensor, " images"]:
        """|prediction - target|^2, the mean over pixels and channels."""
        return (outputs - self.target).double().square().flatten(1).mean(1)

    def features(self, outputs: Tensor, images: Int64[Tensor, " p"]) -> Float[Tensor, "p f"]:
        """The clean picture that the prediction stands for."""
        return self.model.schedule.x0(outputs, self.x_t[images], self.timestep).flatten(1)


class Embedded(Downstream):
    """The final embeddings of a backbone without noise."""

    def __init__(
        self,
        backbone: EmbeddingModel,
        layer: str,
        encoded: Float[Tensor, "images c h w"],
        *,
        batch_size: int = 16,
    ) -> None:
        super().__init__(backbone, layer, encoded, batch_size)
        self.model, self.skip = backbone, backbone.other_tokens

    def run(self, images: Int64[Tensor, " b"]) -> Tensor:
        """The parts of the embedding (b parts d)."""
        return self.model.embed(self.encoded[images])

    def losses(self, outputs: Float[Tensor, "images ..."]) -> Float[Tensor, " images"]:
        """1 - cosine to the unchanged embedding, the mean of its parts."""
        return 1 - cosine_similarity(outputs.double(), self.unchanged.double(), dim=-1).mean(1)

    def features(self, outputs: Tensor, images: Int64[Tensor, " p"]) -> Float[Tensor, "p f"]:
        """The parts at unit length."""
        return normalize(outputs, dim=-1).flatten(1)


def replaced(replace: Replace | None, cells: bool = False) -> Change | None:
    """Put the replacement in the place of the cells' mean (each keeps its deviation), or of every cell.

    Args:
        replace: a function of activations (r d); None changes nothing.
        cells: replace every cell.
    """
    if replace is None:
        return None

    def change(rows: Float[Tensor, "b s d"], _: slice) -> Float[Tensor, "b s d"]:
        if cells:
            return replace(rows.flatten(0, 1)).view_as(rows)
        mean = rows.mean(1)
        return rows + (replace(mean) - mean)[:, None]

    return change


@dataclass(frozen=True)
class Reader:
    """Which class an output shows: a logistic regression on unchanged outputs of one half of the images.

    Attributes:
        fitted: scikit-learn's model.
        classes: how many there are; those without an image in that half have no probability (NaN).
    """

    fitted: Any
    classes: int

    @classmethod
    def of(cls, downstream: Downstream, images: HeldOut) -> "Reader | None":
        """Fitted on the half that is not judged; None without labels, or of fewer than two classes there."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        chosen = (~images.judged).nonzero()[:, 0]
        if images.labels is None or len(images.labels[chosen].unique()) < 2:
            return None
        features = downstream.features(downstream.unchanged[chosen], chosen)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
        with warnings.catch_warnings():
            # A regression short of convergence reads all outputs alike.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features.double().numpy(), images.labels[chosen].numpy())
        return cls(model, images.classes)

    def knows(self, labels: Int64[Tensor, " i"]) -> Bool[Tensor, " i"]:
        """Which labels had an image in the half that it was fitted on."""
        return torch.isin(labels, torch.from_numpy(self.fitted.classes_))

    def log_probabilities(self, features: Float[Tensor, "p f"]) -> Float[Tensor, "p classes"]:
        """Of each class."""
        found = torch.full((len(features), self.classes), torch.nan, dtype=torch.float64)
        if len(features):
            known = torch.from_numpy(self.fitted.classes_)
            made = self.fitted.predict_log_proba(features.double().numpy())
            found[:, known] = torch.from_numpy(made)
        return found
