"""Recipes: where the known data sets are, which column labels them, and how prompts name their classes.

A recipe is data; :mod:`revelio.data.open` opens it from the hub or from a local copy, and
:mod:`revelio.data.builtin` holds those that come with Revelio. Add one of your own with
:func:`register_recipe`. Prompts are those of the paper's classifier (SPEC: Diff-C, prompt modes).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from revelio.data.listing import Listing

PLAIN_TEMPLATE = "A photo of a {}."
PLAIN_GENERIC = "A photo"


@dataclass(frozen=True)
class Recipe:
    """A data set that is known by name.

    Attributes:
        name: what ``--data.source`` and results call it.
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
    layouts: tuple[Callable[[Path, "Recipe"], Listing | None], ...] = ()
    expects: str = "class folders, a saved data set or parquet files"


_recipes: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> None:
    """Make a recipe known by its name.

    Raises:
        ValueError: the name is taken, or the template has no place for the class.
    """
    if recipe.name in _known():
        raise ValueError(
            f"a recipe {recipe.name!r} is registered already: choose another name than "
            f"{', '.join(recipe_names())}"
        )
    if recipe.template.count("{}") != 1:
        raise ValueError(f"the template {recipe.template!r} must hold {{}} once, for the class")
    _recipes[recipe.name] = recipe


def recipe_names() -> tuple[str, ...]:
    """The names of all known recipes."""
    return tuple(_known())


def is_recipe(name: str) -> bool:
    """Whether a recipe of this name is known."""
    return name in _known()


def get_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        KeyError: there is none; lists the known ones.
    """
    if name not in _known():
        raise KeyError(f"no recipe {name!r}: choose from {', '.join(recipe_names())}")
    return _known()[name]


def generic_prompt(dataset_name: str) -> str:
    """The prompt of the policy ``generic``: one for all images of a data set.

    Args:
        dataset_name: an :class:`revelio.data.dataset.ImageDataset`'s name; one that is no recipe's
            gets a plain prompt.
    """
    recipe = _known().get(dataset_name)
    return PLAIN_GENERIC if recipe is None else recipe.generic


def class_prompts(dataset_name: str, classes: Sequence[str]) -> list[str]:
    """One prompt a class, for the policy ``from_clip``, in the order of ``classes``."""
    recipe = _known().get(dataset_name)
    template = PLAIN_TEMPLATE if recipe is None else recipe.template
    return [template.format(spoken_name(dataset_name, name)) for name in classes]


def spoken_name(dataset_name: str, class_name: str) -> str:
    """A class name as a prompt says it: ``american_bulldog`` -> ``american bulldog``."""
    recipe = _known().get(dataset_name)
    own = {} if recipe is None else recipe.spoken
    return own.get(class_name, class_name.replace("_", " ").strip())


def _known() -> dict[str, Recipe]:
    if not _recipes:
        from revelio.data.builtin import RECIPES

        _recipes.update({recipe.name: recipe for recipe in RECIPES})
    return _recipes
