"""Where a k-SAE's rows come from, and how those of each store are normalized; recorded in the model.

Stores of several layers, timesteps, prompts or draws lie on different scales, so that one would take most of
the loss. ``mean-norm`` divides a store's rows by their mean norm over sqrt(d) (as Gao et al., 2024, App. A,
and SAELens do); ``per-dimension`` takes the mean of each dimension off and divides by its deviation.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.config import Normalize
from revelio.trust import printable

# Rows that means and deviations are taken from, spread over a store.
MEASURED_ROWS = 65_536
# Deviations below this share of the largest are not divided by: such a dimension says nothing.
LEAST_DEVIATION = 1e-6
# Manifest fields that tell inputs apart, in the order in which they do.
TOLD_BY = ("layer", "timestep", "prompt_policy", "draw")

# Which input rows are of: its place, a store's manifest, or `normalized` where that was done already.
Source = int | Mapping[str, Any] | Literal["normalized"] | None


@dataclass(frozen=True)
class Input:
    """One store that a k-SAE was trained on.

    Attributes:
        about: the manifest fields of :data:`TOLD_BY`, and the folder's name as `store`.
        kind: how its rows are normalized.
        shift: what is taken off each dimension; empty: nothing.
        scale: what a row is then divided by: one number, or one a dimension.
    """

    about: Mapping[str, Any]
    kind: Normalize = "none"
    shift: tuple[float, ...] = ()
    scale: tuple[float, ...] = (1.0,)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"shift": list(self.shift), "scale": list(self.scale)}

    def normalized(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Rows as the k-SAE takes them."""
        if self.kind == "none":
            return x
        centred = x.float() - like(x.float(), self.shift) if self.shift else x
        return centred / like(x.float(), self.scale)

    def restored(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """What :meth:`normalized` took."""
        if self.kind == "none":
            return x
        x = x * like(x, self.scale)
        return x + like(x, self.shift) if self.shift else x


def like(x: Tensor, values: Sequence[float]) -> Float[Tensor, " v"]:
    """Plain numbers in the number format of ``x`` and where it is; the host does not wait for the copy."""
    return torch.tensor(values, dtype=x.dtype).to(x.device, non_blocking=True)


def read_inputs(entries: Sequence[Any], d: int) -> tuple[Input, ...]:
    """The inputs that a k-SAE's ``config.json`` lists.

    Raises:
        ValueError: one is not what :meth:`Input.plain` gives for a width of ``d``.
    """
    return tuple(_read(entry, d) for entry in entries)


def _read(entry: Any, d: int) -> Input:
    if isinstance(entry, Input):
        return entry
    names = {"about", "kind", "shift", "scale"}
    good = isinstance(entry, Mapping) and set(entry) == names and isinstance(entry["about"], dict)
    if good:
        shift, scale = entry["shift"], entry["scale"]
        good = entry["kind"] in ("none", "mean-norm", "per-dimension")
        good = good and _numbers(shift, (0, d)) and _numbers(scale, (1, d)) and min(scale) > 0
    if not good:
        raise ValueError(f"an input of the k-SAE can't be {printable(repr(entry)[:80])}")
    return Input(entry["about"], entry["kind"], tuple(shift), tuple(scale))


def _numbers(values: Any, lengths: Sequence[int]) -> bool:
    return (
        isinstance(values, list)
        and len(values) in lengths
        and all(type(x) in (int, float) and math.isfinite(x) for x in values)
    )


def measure(
    about: Mapping[str, Any], kind: Normalize, batches: Iterable[Float[Tensor, "b d"]]
) -> Input:
    """How a store's rows are to be normalized, from some of them.

    Raises:
        ValueError: there are no rows, or they are all zero or all the same.
    """
    kept = {name: about.get(name) for name in ("store", *TOLD_BY)}
    if kind == "none":
        return Input(kept)
    rows = torch.cat([batch.double() for batch in batches])
    if kind == "mean-norm":
        shift, scale = [], rows.norm(dim=1).mean()[None] / math.sqrt(rows.shape[1])
    else:
        shift, scale = rows.mean(0).tolist(), rows.std(0, correction=0)
        scale = scale.where(scale > LEAST_DEVIATION * scale.max(), scale.max())
    if not (scale > 0).all() or not scale.isfinite().all():
        raise ValueError(
            f"the rows of {printable(about.get('store'))} can't be normalized: no spread"
        )
    return Input(kept, kind, tuple(shift), tuple(scale.tolist()))


def find(inputs: Sequence[Input], source: Source) -> Input | None:
    """The input that rows are of; None where nothing is to be done to them.

    Raises:
        ValueError: it is none of the inputs, or it is not told which.
    """
    if source == "normalized" or all(one.kind == "none" for one in inputs):
        return None
    if isinstance(source, int):
        return inputs[source]
    left = list(inputs)
    if isinstance(source, Mapping):
        left = [one for one in left if _same(one, source, TOLD_BY[:3])]
        # Other draws than it was trained on are of the same scale.
        left = [one for one in left if _same(one, source, TOLD_BY)] or left
    if len(left) == 1:
        return left[0]
    known = "; ".join(_name(one.about) for one in inputs)
    asked = _name(source) if isinstance(source, Mapping) else "rows of no named store"
    raise ValueError(f"the k-SAE normalizes by store, and was given {asked}: it knows {known}")


def trained_stores(trained_on: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a k-SAE says of each store that it was trained on; of one that says nothing, an empty entry."""
    # Of several stores, what they do not share stands with each of them alone.
    stores = trained_on.get("stores")
    entries = [one for one in stores if isinstance(one, dict)] if isinstance(stores, list) else []
    return [{**trained_on, **one} for one in entries] or [dict(trained_on)]


def _same(one: Input, source: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(one.about.get(name) == source.get(name) for name in names)


def _name(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {printable(about.get(name))}" for name in TOLD_BY)
