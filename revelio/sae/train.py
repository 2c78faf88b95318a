"""The training loop of a k-SAE (Sec. 4.1), a generator that yields after every step.

The caller logs, saves and stops. The step itself is in :mod:`revelio.sae.step`; several k-SAEs at once
are trained by :mod:`revelio.sae.many`, of which this is the case of one.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from revelio.sae.kernel import Kernel
from revelio.sae.many import Member, begin_many, train_many
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.rows import Batches, InOrder, RowSource, Shuffled
from revelio.sae.state import StepState, TrainSettings, TrainState


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
