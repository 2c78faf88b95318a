"""What is known of a data set: where it is, which column labels it, how prompts name its classes.

Prompts are those of the paper's classifier (SPEC: Diff-C, prompt modes).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from revelio.data.sources.listing import Listing

PLAIN_TEMPLATE = "A photo of a {}."
PLAIN_GENERIC = "A photo"


@dataclass(frozen=True)
class DatasetSpec:
    """A data set that is known by name.

    Attributes:
        name: what the source and results call it.
        title: what people call it.
        hub: its id on the Hugging Face hub, or None where it is not there.
        template: the prompt of the policy ``from_clip``, with ``{}`` for the class.
        generic: the prompt of the policy ``generic``.
        split_sizes: the hub's splits with their official numbers of images.
        image_columns: the column of pictures, by its names in the copies there are.
        label_columns: the column of class ids, likewise.
        classes: class names by class id, for copies that hold only numbers.
        spoken: class names as a prompt says them, where `_` -> ` ` isn't enough.
        layouts: readers of the folder layouts of the set's own archive; each gives None for a folder
            that isn't its own. Class folders and lists of files need none.
        expects: what ``root`` may be, for messages.
    """

    name: str
    title: str
    hub: str | None
    template: str = PLAIN_TEMPLATE
    generic: str = PLAIN_GENERIC
    split_sizes: Mapping[str, int] = field(default_factory=dict)
    image_columns: tuple[str, ...] = ("image",)
    label_columns: tuple[str, ...] = ("label",)
    classes: tuple[str, ...] = ()
    spoken: Mapping[str, str] = field(default_factory=dict)
    layouts: tuple[Callable[[Path, "DatasetSpec"], Listing | None], ...] = ()
    expects: str = "class folders, a saved data set or parquet files"
