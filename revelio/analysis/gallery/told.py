"""What other commands found of a gallery's latents: their names, and how local, stable and shared they are.

`revelio name-latents` and `revelio locality` write JSON; a gallery shows of it what is of its own k-SAE.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revelio.analysis.redundancy import PARTNER
from revelio.trust import WRONG, printable, read_object

# What a measure of locality is called on a page.
SHOWN = {
    "spatial_entropy": "Spatial entropy",
    "half_area": "Area above half its maximum",
    "masks": "IoU with the class that fits best",
    "partners": f"Partner of cosine above {PARTNER} in another run",
    "mirrored": "Agreement, image mirrored",
    "shifted": "Agreement, image shifted",
}


@dataclass(frozen=True)
class Told:
    """What is known of latents, by number.

    Attributes:
        names: a name, and whether a judge told images apart by it; None: it was not asked.
        measures: of all measured latents together: name, value, interval, and the same of chance.
        values: by latent, its value of each measure, in the same order; None where it has none.
        timesteps: by latent, the share of cells at which it fires: [timestep, share, low, high].
    """

    names: Mapping[int, tuple[str, bool | None]] = field(default_factory=dict)
    measures: list[dict[str, Any]] = field(default_factory=list)
    values: Mapping[int, list[float | None]] = field(default_factory=dict)
    timesteps: Mapping[int, list[list[float]]] = field(default_factory=dict)

    def columns(self, latents: Iterable[int]) -> dict[str, list[Any]]:
        """What every page knows of every latent of the gallery."""
        latents, found = list(latents), {}
        if self.names:
            named = [self.names.get(latent, (None, None)) for latent in latents]
            found = {"name": [name for name, _ in named], "checked": [ok for _, ok in named]}
        if self.values:
            first = [self.values.get(latent, [None])[0] for latent in latents]
            found["spread"] = first
        return found

    def details(self, latent: int) -> dict[str, Any]:
        """What its own page shows."""
        of = {"measured": self.values.get(latent), "timesteps": self.timesteps.get(latent)}
        return {name: value for name, value in of.items() if value}


def told(names: Path | None, locality: Path | None, ksae: Mapping[str, Any]) -> Told:
    """Read what is given.

    Args:
        names: what `name-latents` wrote.
        locality: what `locality` wrote.
        ksae: which k-SAE the gallery is of, with its sha256 and how many latents it has.

    Raises:
        ValueError: a file is of another k-SAE, or holds something else, as by an edit.
    """
    found = Told()
    for path, read in ((names, _names), (locality, locality_measures)):
        if path is None:
            continue
        result = read_object(path)
        try:
            of = result["made_from"]["ksae"]["sha256"]
            parts = read(result) if of == ksae.get("sha256") else None
        except WRONG as error:
            raise ValueError(
                f"{printable(path)} is no result that names or measures latents: give what `revelio "
                "name-latents` or `revelio locality` wrote"
            ) from error
        if parts is None:
            raise ValueError(
                f"{printable(path)} is of another k-SAE: measure the latents of this one"
            )
        if read is _names:
            _check_edited(printable(path), result["latents"], ksae["n"])
        found = Told(**(vars(found) | parts))
    return found


def _names(result: Mapping[str, Any]) -> dict[str, Any]:
    """Names by latent; one that was added by hand says nothing of a check."""
    named = {
        int(one["latent"]): (str(one["name"]), one.get("passed"))
        for one in result["latents"]
        if one["name"] is not None
    }
    return {"names": named}


def _check_edited(path: str, entries: Iterable[Mapping[str, Any]], latents: int) -> None:
    """Refuse what would be shown nowhere, or as its opposite.

    Raises:
        ValueError: there is no such latent, or `passed` is neither true nor false.
    """
    for one in entries:
        latent, passed = one["latent"], one.get("passed")
        if not 0 <= int(latent) < latents:
            raise ValueError(
                f"{path} names latent {latent}, and the k-SAE has {latents:,}: the first is 0"
            )
        if passed is not None and not isinstance(passed, bool):
            raise ValueError(
                f"{path} says `passed` {passed!r} of latent {latent}: give true or false, without quotes"
            )


def locality_measures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Told` that a result of `revelio locality` gives."""
    entries = dict(_entries(result))
    latents = [int(one) for one in result["latents"]]
    columns = [[_number(value) for value in one["of_latents"]] for one in entries.values()]
    profiles = [
        [[float(t), *_interval(one)] for t, one in profile.items() if t != "peak"]
        for profile in result.get("timesteps", [])
    ]
    measures = [
        {"name": name, "of": _interval(one), "chance": _interval(one["chance"])}
        for name, one in entries.items()
    ]
    return {
        "measures": measures,
        "values": dict(zip(latents, map(list, zip(*columns, strict=True)), strict=True)),
        "timesteps": dict(zip(latents, profiles, strict=bool(profiles))),
    }


def _entries(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The measures that a result holds, spatial entropy first."""
    found = dict(result["locality"]) | dict(result.get("moved", {}))
    if "masks" in result:
        found["masks"] = result["masks"]["mean"]
    if "partners" in result:
        shares = [float(cosine > PARTNER) for cosine in result["partners"]["of_latents"]]
        found["partners"] = result["partners"] | {"of_latents": shares}
    for name, shown in SHOWN.items():
        if name in found:
            yield shown, found[name]
    for number, one in enumerate(result.get("draws", []), 1):
        yield f"Agreement with noise draw {number}", one


def _interval(entry: Mapping[str, Any]) -> list[float | None]:
    return [_number(entry[key]) for key in ("value", "low", "high")]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
