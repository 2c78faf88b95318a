"""The `grid` of `revelio train-ksae`: several k-SAEs from one config, in groups that share their rows."""

from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from revelio.bounds import Count, Folder, LearningRate, Seed

if TYPE_CHECKING:
    from revelio.commands.train_ksae import Config


@dataclass(frozen=True)
class Grid:
    """Values to combine; a setting without values keeps the config's own."""

    store: tuple[Folder, ...] = ()
    """Activation stores: layers, timesteps."""

    k: tuple[Count, ...] = ()
    """Latents that stay active."""

    expansion: tuple[Count, ...] = ()
    """Latents a dimension of the activations."""

    activation: tuple[Literal["topk", "batch-topk", "jumprelu"], ...] = ()
    """Which latents are active."""

    learning_rate: tuple[LearningRate, ...] = ()
    """Adam's."""

    seed: tuple[Seed, ...] = ()
    """Of the first weights; the rows keep the order of the config's own `order_seed` or `seed`."""


def expand(config: "Config") -> "list[list[Config]]":
    """One config for each k-SAE, in groups that share store and order of rows.

    Raises:
        ValueError: a value stands twice, or two stores have the same name.
    """
    varied = {f.name: getattr(config.grid, f.name) for f in fields(Grid)}
    varied = {name: values for name, values in varied.items() if values}
    if not varied:
        return [[config]]
    order_seed = config.seed if config.order_seed is None else config.order_seed
    groups: dict[Path, list[Config]] = {}
    taken: set[str] = set()
    for values in product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        name = "-".join(_label(key, value) for key, value in chosen.items())
        if name in taken:
            raise ValueError(f"the grid gives {name} twice: list each value once")
        taken.add(name)
        one = replace(config, **chosen, out=config.out / name, order_seed=order_seed, grid=Grid())
        groups.setdefault(one.store, []).append(one)
    return list(groups.values())


def _label(name: str, value: Any) -> str:
    if isinstance(value, Path):
        return value.resolve().name
    short = {"expansion": "x", "learning_rate": "lr", "activation": ""}
    return f"{short.get(name, name)}{value}"
