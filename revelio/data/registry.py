"""Data sets known by name.

:mod:`revelio.data.open` opens one from the hub or from a local copy, and :mod:`revelio.data.builtin` holds
those that come with Revelio. Add one of your own with :func:`register_dataset`.
"""

from collections.abc import Sequence

from revelio.data.builtin import BUILTIN
from revelio.data.spec import PLAIN_GENERIC, PLAIN_TEMPLATE, DatasetSpec

_specs: dict[str, DatasetSpec] = {spec.name: spec for spec in BUILTIN}


def register_dataset(spec: DatasetSpec) -> None:
    """Make a data set known by its name.

    Raises:
        ValueError: the name is taken, or the template has no place for the class.
    """
    if spec.name in _specs:
        raise ValueError(
            f"a data set {spec.name!r} is registered already: choose another name than "
            f"{', '.join(dataset_names())}"
        )
    if spec.template.count("{}") != 1:
        raise ValueError(f"the template {spec.template!r} must hold {{}} once, for the class")
    _specs[spec.name] = spec


def dataset_names() -> tuple[str, ...]:
    """The names of all known data sets."""
    return tuple(_specs)


def is_registered(name: str) -> bool:
    """Whether a data set of this name is known."""
    return name in _specs


def get_spec(name: str) -> DatasetSpec:
    """What is known of the data set of a name.

    Raises:
        KeyError: there is none; lists the known ones.
    """
    if name not in _specs:
        raise KeyError(f"no known data set {name!r}: choose from {', '.join(dataset_names())}")
    return _specs[name]


def generic_prompt(dataset_name: str) -> str:
    """The prompt of the policy ``generic``: one for all images of a data set.

    Args:
        dataset_name: an :class:`revelio.data.dataset.ImageDataset`'s name; one that is not known
            gets a plain prompt.
    """
    spec = _specs.get(dataset_name)
    return PLAIN_GENERIC if spec is None else spec.generic


def class_prompts(dataset_name: str, classes: Sequence[str]) -> list[str]:
    """One prompt a class, for the policy ``from_clip``, in the order of ``classes``."""
    spec = _specs.get(dataset_name)
    template = PLAIN_TEMPLATE if spec is None else spec.template
    return [template.format(spoken_name(dataset_name, name)) for name in classes]


def spoken_name(dataset_name: str, class_name: str) -> str:
    """A class name as a prompt says it: ``american_bulldog`` -> ``american bulldog``."""
    spec = _specs.get(dataset_name)
    own = {} if spec is None else spec.spoken
    return own.get(class_name, class_name.replace("_", " ").strip())
