"""The training loop of a k-SAE (Sec. 4.1), a generator that yields after every step.

The caller logs, saves and stops. The step itself is in :mod:`revelio.sae.step`.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from revelio.sae.initialise import initialise
from revelio.sae.kernel import Kernel
from revelio.sae.metrics import spread
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.rows import Batches, InOrder, RowSource, Shuffled
from revelio.sae.state import StepState, TrainSettings, TrainState
from revelio.sae.step import train_step
from revelio.seeds import generator

# Rows that b_pre's start is taken from: as many as the steerers' code uses (SPEC 7).
FIRST_ROWS = 32_768


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
        kernel: how the heavy parts are computed; None: as the model does.

    Raises:
        ValueError: no rows, rows of another width, AuxK in ``as_code``, or a loss that is not finite.
    """
    if settings.auxk and model.mode == "as_code":
        raise ValueError("mode as_code has no AuxK: set auxk to 0 or choose mode fixed")
    batches = as_batches(rows, settings)
    if state is None:
        state = begin(model, batches, settings)
    kernel = kernel or model.kernel
    while state.step < settings.steps and not state.stopped:
        taken = 0
        for batch in islice(batches.epoch(state.epoch), state.batch, None):
            state.batch += 1
            taken += 1
            done = train_step(model, batch, settings, state, kernel)
            state.stopped = _plateau(settings, state)
            yield done
            if state.step >= settings.steps or state.stopped:
                return
        if taken == 0 and state.batch == 0:
            raise ValueError("the rows ran out: give a list or a store, not an iterator")
        state.epoch, state.batch = state.epoch + 1, 0


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
    state = TrainState.start(model)
    first: list[Tensor] = []
    for batch in batches.epoch(0):
        first.append(batch)
        if model.mode == "as_code" or sum(map(len, first)) >= FIRST_ROWS:
            break
    if not first:
        raise ValueError("there are no rows to train on: extract activations first")
    start = torch.cat(first)[:FIRST_ROWS]
    model.centre(start)
    initialise(model, start, generator(settings.seed, "k-sae weights"), settings.pre_bias)
    if model.mode == "fixed":
        state.variance = spread(batches.epoch(0)).variance
        if state.variance == 0:
            raise ValueError("all rows are the same: there is nothing to learn, give more images")
    return state


def _plateau(settings: TrainSettings, state: TrainState) -> bool:
    """Whether a window of steps has ended without the loss falling enough."""
    if not settings.early_stop or state.step % settings.early_stop_window:
        return False
    mean, best = state.window_sum / settings.early_stop_window, state.window_best
    state.window_sum, state.window_best = 0.0, mean if best is None else min(best, mean)
    return best is not None and mean > best * (1 - settings.early_stop)
