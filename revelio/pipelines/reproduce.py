"""A table or figure of the paper, its rows run by the pipelines that users run, beside the paper's values.

from revelio.pipelines.reproduce import ReproduceConfig, reproduce

made = reproduce("table2a", ReproduceConfig(scale="mini"), print)

<out>/<scale>-<mode>/<item>.json, .md, .svg     every row, every ordering, a picture
    rows/<row>/           a row's runs (k-SAEs and top images, or Diff-C) and what it measured
    sets/<model>-<data>/  what rows of the same model and pictures share: VAE latents, activations

A row that is done is not run again; one that can't be run is listed with what it lacks. Processes that
``torchrun`` started share every pass of the model over the images, and then each takes its own rows, so that
the numbers are those of one process.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from revelio.bounds import check_fields
from revelio.config import to_plain
from revelio.distributed import apart, launched
from revelio.files import write_whole
from revelio.outputs import check_file, claimed, has_keys
from revelio.pipelines import Made, Progress, Report, silent
from revelio.pipelines.reproduce_parts import CANNOT, Shared, reason_of
from revelio.pipelines.reproduce_rows import Found, checked, gain, measure
from revelio.pipelines.reproduce_scores import scored
from revelio.reproduce.config import ReproduceConfig
from revelio.reproduce.items import Item, item
from revelio.reproduce.orderings import Replicates, judge
from revelio.reproduce.page import page, picture
from revelio.reproduce.row import DELTA, TOP1, Row
from revelio.reproduce.rows import SIZES, OurRow, Sizes, our_rows
from revelio.run_dir import versions, write_json
from revelio.trust import printable, read_object

__all__ = ["ReproduceConfig", "reproduce"]


def reproduce(
    name: str, config: ReproduceConfig, progress: Report = silent, *, sizes: Sizes | None = None
) -> Made:
    """Run the rows of a table or figure that are not done yet; write every value beside the paper's.

    Args:
        name: of the item.
        config: on which models and pictures, how.
        progress: told which row is at work, and what it is at.
        sizes: how large everything is; none: those of the config's scale.

    Returns:
        The page, `<item>.md`; `<item>.json` is beside it, and `<item>.svg` where a row was measured.

    Raises:
        KeyError: there is no such item.
        ValueError: a setting is outside its bounds, the folder to write to is taken, or no row can run where
            an earlier run measured some, as with a mistyped path: its page stays.
    """
    check_fields(config)
    wanted, processes = item(name), launched(config.device)
    if processes.world > 1 and config.device in ("auto", "cuda"):
        config = replace(config, device=processes.device)
    rows = our_rows(wanted.rows, config)
    root = config.out / f"{config.scale}-{config.mode}"
    path = root / f"{name}.json"
    check_file(path, has_keys("item", "orderings"), "a reproduced item")
    for made in (".md", ".svg"):
        check_file(path.with_suffix(made), lambda _: path.is_file(), "a page of a reproduced item")
    told = progress if processes.main else silent
    shared = Shared(config, sizes or SIZES[config.scale], root, rows, told, processes)
    with claimed(root) if processes.main else nullcontext():
        judged = scored(wanted.rows, config.scores, config.seed) if wanted.commands else None
        result = _result(name, wanted, config, rows, judged or _measured(shared))
        if processes.main:
            if not wanted.commands:
                _check_not_lost(path, result["rows"])
            _write(path, result)
    processes.close()
    return Made(path.with_suffix(".md"), result)


def _check_not_lost(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    earlier = read_object(path).get("rows", []) if path.is_file() else []
    if all("missing" in row for row in rows) and any("missing" not in row for row in earlier):
        raise ValueError(
            f"no row can run, and {printable(path)} of an earlier run stays as it is: {rows[0]['missing']}"
        )


def _write(path: Path, result: dict[str, Any]) -> None:
    write_json(path, result)
    if drawn := picture(result):
        write_whole(path.with_suffix(".svg"), drawn)
    write_whole(path.with_suffix(".md"), page(result, f"{path.stem}.svg" if drawn else ""))


def _measured(shared: Shared) -> dict[Row, Found]:
    """What every row measured, or ``missing``; rows of one model and data set after one another."""
    rows = sorted(shared.rows, key=lambda one: one.set_name)
    left = [ours for ours in rows if not ours.missing and _written(shared, ours) is None]
    shared.prepare(left)
    # Rows that write to one folder are one process's.
    places = list(dict.fromkeys(ours.name for ours in rows))
    processes, told = shared.processes, shared.progress
    mine = [o for o in rows if places.index(o.name) % processes.world == processes.rank]
    measured: list[tuple[Row, Found]] = []
    with apart():
        for number, ours in enumerate(mine, 1):
            told(Progress(f"row {number} of {len(mine)}: {ours.row.name}"))
            one = {"missing": ours.missing} if ours.missing else _row(shared, ours)
            measured.append((ours.row, one))
            if reason := one.get("missing"):
                told(Progress(f"  can't run: {printable(reason)}"))
    found = dict(processes.gather(measured))
    bases = {row: found.get(replace(row, prompt="empty", metric=TOP1), {}) for row in found}
    gains = {row: gain(found[row], base) for row, base in bases.items() if row.metric == DELTA}
    return found | gains


def _row(shared: Shared, ours: OurRow) -> Found:
    """A row's measures: as they were written, or made now."""
    if (done := _written(shared, ours)) is not None:
        return done
    try:
        found = measure(shared, ours)
    except CANNOT as error:  # the other rows go on
        return {"missing": reason_of(error)}
    about = {"settings": _settings(shared, ours), "pictures": shared.contents(ours)}
    write_json(_file(shared, ours), about | {"found": found})
    return found


def _written(shared: Shared, ours: OurRow) -> Found | None:
    """A row's measures of an earlier run with the same settings, on the same pictures."""
    path = _file(shared, ours)
    check_file(path, has_keys("settings", "found"), "what a row measured")
    done = read_object(path) if path.is_file() else {"settings": None}
    if done["settings"] != _settings(shared, ours):
        return None
    # Rows of older versions do not say which pictures; and those that are gone can't be compared.
    if "pictures" in done and shared.contents(ours) not in (done["pictures"], None):
        return None
    return checked(done["found"], path)


def _file(shared: Shared, ours: OurRow) -> Path:
    row = ours.row
    measured = TOP1 if row.metric == DELTA else row.metric.partition("@")[0]
    name = "-".join(part for part in (row.kind, measured, f"s{shared.config.seeds}") if part)
    return shared.place(ours) / f"{name}.json"


def _settings(shared: Shared, ours: OurRow) -> dict[str, Any]:
    """What a row's values depend on."""
    config = shared.config
    own = {name: getattr(config, name) for name in ("mode", "seed", "seeds", "clip")}
    backbone = replace(ours.backbone, device="auto")
    parts = {"sizes": shared.sizes, "data": ours.data, "backbone": backbone}
    return own | {name: to_plain(part) for name, part in parts.items()}


def _result(
    name: str,
    wanted: Item,
    config: ReproduceConfig,
    rows: Sequence[OurRow],
    found: Mapping[Row, Found],
) -> dict[str, Any]:
    """What is written: plain values."""
    replicates = {
        row: Replicates(np.array(one["values"]), np.array(one["shifts"]))
        for row, one in found.items()
        if "values" in one
    }
    return {
        "item": name,
        "title": wanted.title,
        "commands": list(wanted.commands),
        **{key: getattr(config, key) for key in ("scale", "mode", "seeds", "seed")},
        "rows": [
            asdict(ours.row)
            | {"our_model": Path(ours.backbone.name).name, "our_layers": list(ours.layers)}
            | {"our_data": Path(ours.data.source).name, "our_split": ours.data.split}
            | {key: value for key, value in found[ours.row].items() if key != "shifts"}
            for ours in rows
        ],
        "orderings": [judge(one, wanted.rows, replicates, config.seed) for one in wanted.orderings],
        "versions": versions(),
    }
