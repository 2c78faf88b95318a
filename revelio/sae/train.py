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
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import Batches, RowSource, batches_of
from revelio.sae.feeding import fed
from revelio.sae.kernels.base import Kernel
from revelio.sae.kernels.select import fastest_kernel, replayed
from revelio.sae.metrics import spread
from revelio.sae.model import KSparseAutoencoder, initialise
from revelio.sae.state import StepState, TrainState
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
class SAERun:
    """One k-SAE among those that train together.

    Attributes:
        model: fresh, or loaded with ``state`` from a checkpoint.
        config: its own, but that the batches are the same for all.
        state: where its training stands; None: it is yet to begin.
        kernel: how its heavy parts are computed; None: as the model does, natively where that can be.
        replay: takes its steps by a recorded CUDA graph, where that can be.
    """

    model: KSparseAutoencoder
    config: TrainConfig
    state: TrainState | None = None
    kernel: Kernel | None = None
    replay: Replay | None = None

    @property
    def done(self) -> bool:
        """Whether it has taken all its steps, or stopped early."""
        state = self.state
        return state is not None and (state.step >= self.config.steps or state.stopped)

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
            self.replay = replayed(self.model, self.kernel, self.config)
        done = train_step(self.model, batch, self.config, self.state, self.kernel, self.replay)
        self.state.stopped = _plateau(self.config, self.state)
        if self.done or self.state.step % CHECK_EVERY == 0:
            self.state.check(self.config)
        if self.done and not all(_sane(w) for w in self.model.state_dict().values()):
            raise ValueError(
                f"weights are not finite, or above {LARGEST:g}, after step {done.step}, the last: lower "
                f"learning_rate (it is {self.config.learning_rate:g})"
            )
        return done


def train(
    model: KSparseAutoencoder,
    rows: Tensor | RowSource | Batches | Iterable[Tensor],
    config: TrainConfig,
    state: TrainState | None = None,
    kernel: Kernel | None = None,
) -> Iterator[StepState]:
    """Train in place, a step each time the caller asks for one.

    Args:
        model: fresh, or loaded with ``state`` from a checkpoint.
        rows: all rows (N d), a source of them, batches, or an iterable of (b d) that can be read again.
        config: see there; `epochs` and `samples` need rows of a known number.
        state: from a checkpoint; without it the weights are initialised and training begins.
        kernel: how the heavy parts are computed; None: as the model does, natively where that can be.

    Raises:
        ValueError: no rows, rows of another width, AuxK in ``as_code``, or a loss that is not finite.
    """
    if isinstance(rows, Tensor | RowSource):
        config = config.for_rows(len(rows))
    for _, step in train_many([SAERun(model, config, state, kernel)], batches_of(rows, config)):
        yield step


def begin(model: KSparseAutoencoder, batches: Batches, config: TrainConfig) -> TrainState:
    """Initialise the weights from the first rows (`as_code`: from the first batch)."""
    run = SAERun(model, config)
    begin_many([run], batches)
    assert run.state is not None
    return run.state


def train_many(runs: Sequence[SAERun], batches: Batches) -> Iterator[tuple[int, StepState]]:
    """Train them all in place, and leave them in eval mode; gives which of them took a step, and the step.

    Raises:
        ValueError: no rows, rows of another width, AuxK in ``as_code``, or a loss that is not finite.
    """
    for run in runs:
        if run.config.epochs is not None or run.config.samples is not None:
            raise ValueError("epochs and samples need rows of a known number: give steps")
        if run.config.auxk and run.model.mode == "as_code":
            raise ValueError("mode as_code has no AuxK: set auxk to 0 or choose mode fixed")
        run.model.eval()  # a step does not ask for train mode, and who encodes afterwards wants inference
    begin_many([run for run in runs if run.state is None], batches)
    # Now that the weights and moments have their memory.
    batches = fed(batches, runs[0].model.b_dec.device) if runs else batches
    while left := [run for run in runs if not run.done]:
        places = [(run.state.epoch, run.state.batch) for run in left if run.state]
        epoch, first = min(places)
        read = first
        for batch in islice(batches.epoch(epoch), first, None):
            for place, run in enumerate(runs):
                if run.at(epoch, read):
                    yield place, run.step(batch)
            read += 1
            if all(run.done for run in left):
                return
        if read == 0:
            raise ValueError("the rows ran out: give a list or a store, not an iterator")
        for run in left:
            if run.state is not None and run.state.epoch == epoch and not run.done:
                run.state.epoch, run.state.batch = epoch + 1, 0


@torch.no_grad()
def begin_many(runs: Sequence[SAERun], batches: Batches) -> None:
    """Initialise fresh k-SAEs from the first rows (`as_code`: from the first batch)."""
    if not runs:
        return
    first = _first_rows(batches, whole=any(m.model.mode != "as_code" for m in runs))
    start = torch.cat(first)[:FIRST_ROWS]
    for run in runs:
        run.model.centre(start[:1])
    variance = 1.0
    if any(run.model.mode == "fixed" for run in runs):
        variance = spread(batches.epoch(0)).variance
        if variance == 0:
            raise ValueError("all rows are the same: there is nothing to learn, give more images")
    for run in runs:
        model, config = run.model, run.config
        rows = first[0][:FIRST_ROWS] if model.mode == "as_code" else start
        initialise(model, rows, generator(config.seed, "k-sae weights"), config.pre_bias)
        if model.activation == "jumprelu" and model.threshold is not None:
            request = EncodeRequest(
                model.kernel, model.centre(rows[:THRESHOLD_ROWS]), model.weights
            )
            model.threshold.fill_(first_threshold(request, model.k, model.n))
        run.state = TrainState.start(model)
        if model.mode == "fixed":
            run.state.variance = variance


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


def _plateau(config: TrainConfig, state: TrainState) -> bool:
    """Whether a window of steps has ended without the loss falling enough."""
    if not config.early_stop or state.step % config.early_stop_window:
        return False
    mean, best = float(state.window_sum) / config.early_stop_window, state.window_best
    state.window_sum, state.window_best = 0.0, mean if best is None else min(best, mean)
    return best is not None and mean > best * (1 - config.early_stop)
