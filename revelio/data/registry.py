"""Data sets known by name: where they are, which column labels them, how prompts name their classes.

:mod:`revelio.data.open` opens one from the hub or from a local copy, and :mod:`revelio.data.builtin` holds
those that come with Revelio. Add one of your own with
:func:`register_dataset`. Prompts are those of the paper's classifier (SPEC: Diff-C, prompt modes).
"""

from collections.abc import Callable, Mapping, Sequence
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


_specs: dict[str, DatasetSpec] = {}


def register_dataset(spec: DatasetSpec) -> None:
    """Make a data set known by its name.

    Raises:
        ValueError: the name is taken, or the template has no place for the class.
    """
    if spec.name in _known():
        raise ValueError(
            f"a data set {spec.name!r} is registered already: choose another name than "
            f"{', '.join(dataset_names())}"
        )
    if spec.template.count("{}") != 1:
        raise ValueError(f"the template {spec.template!r} must hold {{}} once, for the class")
    _specs[spec.name] = spec


def dataset_names() -> tuple[str, ...]:
    """The names of all known data sets."""
    return tuple(_known())


def is_registered(name: str) -> bool:
    """Whether a data set of this name is known."""
    return name in _known()


def get_spec(name: str) -> DatasetSpec:
    """What is known of the data set of a name.

    Raises:
        KeyError: there is none; lists the known ones.
    """
    if name not in _known():
        raise KeyError(f"no known data set {name!r}: choose from {', '.join(dataset_names())}")
    return _known()[name]


def generic_prompt(dataset_name: str) -> str:
    """The prompt of the policy ``generic``: one for all images of a data set.

    Args:
        dataset_name: an :class:`revelio.data.dataset.ImageDataset`'s name; one that is not known
            gets a plain prompt.
    """
    spec = _known().get(dataset_name)
    return PLAIN_GENERIC if spec is None else spec.generic


def class_prompts(dataset_name: str, classes: Sequence[str]) -> list[str]:
    """One prompt a class, for the policy ``from_clip``, in the order of ``classes``."""
    spec = _known().get(dataset_name)
    template = PLAIN_TEMPLATE if spec is None else spec.template
    return [template.format(spoken_name(dataset_name, name)) for name in classes]


def spoken_name(dataset_name: str, class_name: str) -> str:
    """A class name as a prompt says it: ``american_bulldog`` -> ``american bulldog``."""
    spec = _known().get(dataset_name)
    own = {} if spec is None else spec.spoken
    return own.get(class_name, class_name.replace("_", " ").strip())


def _known() -> dict[str, DatasetSpec]:
    if not _specs:
        from revelio.data.builtin import BUILTIN

        _specs.update({spec.name: spec for spec in BUILTIN})
    return _specs
