"""Settings of the probes that have many. No torch here: commands inherit these classes."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DiffusionClassifierConfig:
    """How the Diffusion Classifier spends its passes.

    Raises:
        ValueError: settings that fit no plan.
    """

    samples: tuple[int, ...] = (16, 64)
    """Noise samples of an image by the end of each stage, each at a timestep of its own, evenly spread."""

    keep: tuple[int, ...] = (5,)
    """Classes that go on after each stage but the last."""

    loss: Literal["l1", "l2", "huber"] = "l2"
    """How the prediction is compared with what was asked for."""

    timesteps: tuple[int, int] | None = None
    """First timestep and the one behind the last; None is the whole schedule."""

    confidence: float | None = None
    """Stop an image after a stage when its best class is better than every other by a paired t-test of this
    confidence together, such as 0.99; None goes through all stages."""

    batch_size: int = 32
    """Passes of the network at once, of whatever images, samples and classes."""

    images_at_once: int = 16
    """Images whose passes share batches; they are reported together."""

    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        """Check the plan."""
        if not self.samples or any(
            b <= a for a, b in zip((0, *self.samples), self.samples, strict=False)
        ):
            raise ValueError(f"samples must grow from stage to stage, not {self.samples}")
        if len(self.keep) != len(self.samples) - 1:
            raise ValueError(
                f"{len(self.samples)} stages but {len(self.keep)} numbers of classes to keep: give one for "
                "each stage but the last"
            )
        if (
            any(b > a for a, b in zip(self.keep, self.keep[1:], strict=False))
            or min(self.keep, default=1) < 1
        ):
            raise ValueError(f"keep must be at least 1 and never grow, not {self.keep}")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}: it must be between 0 and 1")
        if min(self.batch_size, self.images_at_once) < 1:
            raise ValueError("batch_size and images_at_once must be at least 1")
