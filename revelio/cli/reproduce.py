"""A table or figure of the paper by one command: its numbers, ours, chance, intervals, and what holds of it.

    revelio reproduce --list
    revelio reproduce table2a --plan
    revelio reproduce table3 --roots oxford-iiit-pet=/data/pets --backbones sd-2.1=/models/sd-2.1
    revelio reproduce table2a --scale mini --roots caltech101=/data/caltech101
    torchrun --nproc-per-node 8 -m revelio reproduce table7

Rows share extractions, and a stopped table goes on with the next row when the command is run again. Several
processes share the extractions, then each takes its own rows. Writes <out>/<scale>-<mode>/<item>.json,
<item>.md and <item>.svg. A row that can't run is listed with what it lacks.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from revelio.reproduce.config import ReproduceConfig
from revelio.wording import plural


@dataclass(frozen=True, kw_only=True)
class Config(ReproduceConfig):
    """Which item, on which models and pictures."""

    item: Annotated[str | None, tyro.conf.Positional] = None
    """table2a to table2d, table3 to table11, figure1 to figure10."""

    list: bool = False
    """Only list the items."""

    plan: bool = False
    """Only say which rows would run and what they cost: runs, hours, disk."""


def run(config: Config) -> None:
    """List, plan, or run and print the page."""
    from revelio.reproduce.items import item, items

    if config.list or config.item is None:
        for name, one in items().items():
            made = "by the LLaVA extension" if one.commands else plural(len(one.rows), "row")
            print(f"{name:<9} {one.title} ({made})")
        return
    item(config.item)
    if config.plan:
        from revelio.pipelines.reproduce_plan import plan_item

        print(plan_item(config.item, config).text())
        return
    from revelio.cli.bar import Bar
    from revelio.distributed import is_main
    from revelio.following import following
    from revelio.pipelines.reproduce import reproduce

    with Bar("reproduce") as bar:
        made = reproduce(config.item, config, bar)
    if not is_main():
        return
    print(made.path.read_text(encoding="utf-8"))
    print(f"wrote {made.path} and {made.path.with_suffix('.json').name}")
    print(following("reproduce", "--list"))
