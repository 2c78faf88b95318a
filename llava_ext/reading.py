"""What goes wrong where a ``DataLoader`` reads ahead is a value until its batch is used, and raised there.

torch hands on a worker's exception with the whole traceback as its message, which would be the one line that
a user gets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

ERROR = "error"


class Careful(Dataset):
    """A data set that gives an item's error in the item's place."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except ValueError as error:
            return ValueError(str(error))  # whatever its class: it must pass between processes
        except OSError as error:
            return error


@dataclass(frozen=True)
class CarefulCollator:
    """Makes batches of a :class:`Careful` data set's items; an error among them is all that a batch holds."""

    collate: Callable[[Sequence[Any]], Mapping[str, Any]]

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """The batch, or its first error."""
        error = next((sample for sample in samples if isinstance(sample, Exception)), None)
        return dict(self.collate(samples)) if error is None else {ERROR: error}


def raised(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch.

    Raises:
        ValueError: an item of it could not be made.
        OSError: the same.
    """
    if ERROR in batch:
        raise batch[ERROR]
    return batch
