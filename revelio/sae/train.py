"""The training loop of a k-SAE (Sec. 4.1), a generator that yields after every step: for one, or for several.

The caller logs, saves and stops; the step itself is in :mod:`revelio.sae.step`. Of several k-SAEs each takes
its step on every batch, which is read once. Each ends up as it would alone with the same rows in the same
order, bit for bit on a CPU: nothing is shared but the batches. They may stand at different places (after an
interruption, or stopped early); one that is ahead waits until the others have caught up.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from revelio.sae.activations import EncodeRequest, first_threshold
from revelio.sae.dataloader import Batches, InOrder, RowSource, Shuffled
from revelio.sae.kernels.base import Kernel
from revelio.sae.kernels.select import fastest_kernel, replayed
from revelio.sae.metrics import spread
from revelio.sae.model import KSparseAutoencoder, initialise
from revelio.sae.state import StepState, TrainSettings, TrainState
from revelio.sae.step import Replay, train_step
from revelio.seeds import generator

# Rows that b_pre's start is taken from: as many as the steerers' code uses (SPEC 7).
FIRST_ROWS = 32_768
# Rows that JumpReLU's first threshold is taken from.
THRESHOLD_ROWS = 1024
# Steps between looks at a CUDA device's losses where nobody else reads them.
CHECK_EVERY = 256
# Weights beyond this are no longer those of a k-SAE: products of some of them leave float32.
LARGEST = 1e15


@dataclass
class Member:
    """One k-SAE among those that train together.

    Attributes:
        model: fresh, or loaded with ``state`` from a checkpoint.
        settings: its own, but that the batches are the same for all.
        state: where its training stands; None: it is yet to begin.
        kernel: how its heavy parts are computed; None: as the model does, natively where that can be.
        replay: takes its steps by a recorded CUDA graph, where that can be.
    """

    model: KSparseAutoencoder
    settings: TrainSettings
    state: TrainState | None = None
    kernel: Kernel | None = None
    replay: Replay | None = None

    @property
    def done(self) -> bool:
        """Whether it has taken all its steps, or stopped early."""
        state = self.state
        return state is not None and (state.step >= self.settings.steps or state.stopped)

    def at(self, epoch: int, batch: int) -> bool:
        """Whether this batch is the one it takes next."""
        state = self.state
        return state is not None and not self.done and (state.epoch, state.batch) == (epoch, batch)

    def step(self, batch: Tensor) -> StepState:
        """Take a step on the batch; the last one is checked, as no other step's loss will be.

        Raises:
            ValueError: a loss is not finite, or a weight in the end is not or nearly so.
        """
        assert self.state is not None
        self.state.batch += 1
        if self.kernel is None:
            self.kernel = fastest_kernel(self.model)
        if self.replay is None:
            self.replay = replayed(self.model, self.kernel, self.settings)
        done = train_step(self.model, batch, self.settings, self.state, self.kernel, self.replay)
        self.state.stopped = _plateau(self.settings, self.state)
        if self.done or self.state.step % CHECK_EVERY == 0:
            self.state.check(self.settings)
        if self.done and not all(_sane(w) for w in self.model.state_dict().values()):
            raise ValueError(
                f"weights are not finite, or above {LARGEST:g}, after step {done.step}, the last: lower "
                f"learning_rate (it is {self.settings.learning_rate:g})"
            )
        return done


def train(
    model: KSparseAutoencoder,
    rows: Tensor | RowSource | Batches | Iterable[Tensor],
    settings: TrainSettings,
    state: TrainState | None = None,
    kernel: Kernel | None = None,
) -> Iterator[StepState]:
    """Train in place, a step each time the caller asks for one.

    Args:
        model: fresh, or loaded with ``state`` from a checkpoint.
        rows: all rows (N d), a source of them, batches, or an iterable of (b d) that can be read again.
        settings: see there.
        state: from a checkpoint; without it the weights are initialised and training begins.
        kernel: how the heavy parts are computed; None: as the model does, natively where that can be.

    Raises:
        ValueError: no rows, rows of another width, AuxK in ``as_code``, or a loss that is not finite.
    """
    member = Member(model, settings, state, kernel)
    for _, step in train_many([member], as_batches(rows, settings)):
        yield step


def as_batches(
    rows: Tensor | RowSource | Batches | Iterable[Tensor], settings: TrainSettings
) -> Batches:
    """Whatever rows were given, as epochs of batches."""
    if isinstance(rows, Shuffled | InOrder):
        return rows
    if isinstance(rows, Tensor | RowSource):
        return Shuffled(rows, settings.batch_size, settings.seed)
    if isinstance(rows, Batches):
        return rows
    return InOrder(rows)


def begin(model: KSparseAutoencoder, batches: Batches, settings: TrainSettings) -> TrainState:
    """Initialise the weights from the first rows (`as_code`: from the first batch)."""
    member = Member(model, settings)
    begin_many([member], batches)
    assert member.state is not None
    return member.state


def train_many(members: Sequence[Member], batches: Batches) -> Iterator[tuple[int, StepState]]:
    """Train them all in place; gives which of them took a step, and the step.

    Raises:
        ValueError: no rows, rows of another width, AuxK in ``as_code``, or a loss that is not finite.
    """
    for member in members:
        if member.settings.auxk and member.model.mode == "as_code":
            raise ValueError("mode as_code has no AuxK: set auxk to 0 or choose mode fixed")
    begin_many([member for member in members if member.state is None], batches)
    while left := [member for member in members if not member.done]:
        places = [(member.state.epoch, member.state.batch) for member in left if member.state]
        epoch, first = min(places)
        read = first
        for batch in islice(batches.epoch(epoch), first, None):
            for place, member in enumerate(members):
                if member.at(epoch, read):
                    yield place, member.step(batch)
            read += 1
            if all(member.done for member in left):
                return
        if read == 0:
            raise ValueError("the rows ran out: give a list or a store, not an iterator")
        for member in left:
            if member.state is not None and member.state.epoch == epoch and not member.done:
                member.state.epoch, member.state.batch = epoch + 1, 0


def begin_many(members: Sequence[Member], batches: Batches) -> None:
    """Initialise fresh k-SAEs from the first rows (`as_code`: from the first batch)."""
    if not members:
        return
    first = _first_rows(batches, whole=any(m.model.mode != "as_code" for m in members))
    start = torch.cat(first)[:FIRST_ROWS]
    for member in members:
        member.model.centre(start[:1])
    variance = 1.0
    if any(member.model.mode == "fixed" for member in members):
        variance = spread(batches.epoch(0)).variance
        if variance == 0:
            raise ValueError("all rows are the same: there is nothing to learn, give more images")
    for member in members:
        model, settings = member.model, member.settings
        rows = first[0][:FIRST_ROWS] if model.mode == "as_code" else start
        initialise(model, rows, generator(settings.seed, "k-sae weights"), settings.pre_bias)
        if model.activation == "jumprelu" and model.threshold is not None:
            request = EncodeRequest(
                model.kernel, model.centre(rows[:THRESHOLD_ROWS]), model.weights
            )
            model.threshold.fill_(first_threshold(request, model.k, model.n))
        member.state = TrainState.start(model)
        if model.mode == "fixed":
            member.state.variance = variance


def _first_rows(batches: Batches, whole: bool) -> list[Tensor]:
    first: list[Tensor] = []
    for batch in batches.epoch(0):
        first.append(batch)
        if not whole or sum(map(len, first)) >= FIRST_ROWS:
            break
    if not first:
        raise ValueError("there are no rows to train on: extract activations first")
    return first


def _sane(weight: Tensor) -> bool:
    low, high = weight.aminmax()
    return bool((low > -LARGEST) & (high < LARGEST))  # false for NaN, which aminmax passes on


def _plateau(settings: TrainSettings, state: TrainState) -> bool:
    """Whether a window of steps has ended without the loss falling enough."""
    if not settings.early_stop or state.step % settings.early_stop_window:
        return False
    mean, best = float(state.window_sum) / settings.early_stop_window, state.window_best
    state.window_sum, state.window_best = 0.0, mean if best is None else min(best, mean)
    return best is not None and mean > best * (1 - settings.early_stop)
