"""What training must remember (state), and what it reports (a step)."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from revelio.sae.config import TrainConfig
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.optim import AdamRows, Moments


@dataclass
class TrainState:
    """Where training stands: with the model, all that a resumed run needs.

    Attributes:
        moments: Adam's.
        fired_at: the number of rows seen when a latent was last active.
        variance: of the whole set, which `fixed` mode's loss is divided by.
        step: updates done.
        epoch: the epoch that the next batch is from.
        batch: the next batch's place in it.
        samples: rows seen.
        stopped: whether early stopping has ended the training.
        window_sum: sum of the losses since the last early-stop window ended.
        window_best: the lowest mean loss of a window so far.
        threshold: Adam's moments of JumpReLU's thresholds; None for the other activations.
        broken: on CUDA, the first step whose loss was not finite, 0 for none; no update is made from then on.
    """

    moments: AdamRows
    fired_at: Int64[Tensor, " n"]
    variance: float = 1.0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    stopped: bool = False
    window_sum: float | Tensor = 0.0
    window_best: float | None = None
    threshold: Moments | None = None
    broken: Int64[Tensor, ""] | None = None

    def check(self, config: TrainConfig) -> None:
        """Wait for the device and see whether training still makes sense.

        Raises:
            ValueError: a loss was not finite; the weights are those before that step.
        """
        if self.broken is not None and (step := int(self.broken)):
            raise ValueError(not_finite(step, config, "no weight was updated from then on"))

    @classmethod
    def start(cls, model: KSparseAutoencoder) -> "TrainState":
        """The state before the first step."""
        w = model.weights
        moments = AdamRows.start(w.W_enc, w.W_dec, w.b_enc, w.b_dec)
        # Of all latents, also where a process holds only some of them.
        fired_at = torch.zeros(model.n, dtype=torch.int64, device=w.b_enc.device)
        state = cls(moments, fired_at)
        if model.activation == "jumprelu" and model.threshold is not None:
            state.threshold = Moments.like(model.threshold)
        return state


@dataclass(frozen=True)
class StepState:
    """A step as seen from outside.

    On a CUDA device a step's numbers stay there until one of them is read, which waits for the device.

    Attributes:
        step: its number, from 1.
        epoch: the epoch its rows are from.
        samples: rows seen so far.
        learning_rate: of this update.
        state: the training state, to be saved with the model.
        numbers: the properties below, in order, in float64.
        config: of the training.
    """

    step: int
    epoch: int
    samples: int
    learning_rate: float
    state: TrainState = field(repr=False)
    numbers: Float64[Tensor, "6"] = field(repr=False)
    config: TrainConfig = field(repr=False)

    @cached_property
    def _read(self) -> list[float]:
        self.state.check(self.config)
        return self.numbers.tolist()

    @property
    def loss(self) -> float:
        """As the mode defines it, without AuxK."""
        return self._read[0]

    @property
    def auxk_loss(self) -> float:
        """AuxK's part, weighted; 0 without."""
        return self._read[1]

    @property
    def fvu(self) -> float:
        """Fraction of the batch's variance unexplained (about its mean; NaN without variance)."""
        return self._read[2]

    @property
    def l0(self) -> float:
        """Active latents a row."""
        return self._read[3]

    @property
    def active(self) -> int:
        """Latents active in this batch."""
        return int(self._read[4])

    @property
    def dead_share(self) -> float:
        """Share of latents not active in the last ``dead_after`` rows."""
        return self._read[5]


def not_finite(step: int, config: TrainConfig, why: str) -> str:
    """What is said of a loss that is not finite."""
    return (
        f"the loss of step {step} is not finite ({why}): look for NaN or equal rows in the activations, or "
        f"lower learning_rate (it is {config.learning_rate:g})"
    )
