"""Probes on frozen activations: how much of the classes each layer holds, beside Diff-C.

A linear probe, nearest neighbors, an attention-pooled probe and a ResNet are trained on stores of training
images and tested on stores of other images; all in one table, with the paired difference of each to the best.

    revelio probe --store runs/train/up_ft1-t25-empty-d0 --test-store runs/test/up_ft1-t25-empty-d0
    revelio probe --store runs/train/*-t25-empty-d0 --test-store runs/test/*-t25-empty-d0 --seeds 3
    revelio probe --store runs/grids --test-store runs/grids-test --probes linear attention resnet
"""

from collections.abc import Mapping, Sequence
from typing import Any

from revelio.probes.config import ProbeConfig as Config
from revelio.wording import plural


def run(config: Config) -> None:
    """Train, test, and print a table."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.probe import probe
    from revelio.stats import percent
    from revelio.trust import printable

    with Bar("probes") as bar:
        made = probe(config, bar)
    width = max(len(printable(entry["store"])) for entry in made.entries)
    for entry in sorted(made.entries, key=lambda entry: -entry["value"]):
        gap = "" if entry["to_best"] is None else f"  difference {percent(entry['to_best'])}"
        print(
            f"{printable(entry['store']):<{width}}  {entry['probe']:<9}  {percent(entry)} %"
            f"  {1000 * entry['seconds']:.2f} ms an image{gap}  {entry['verdict']}"
        )
    images, chance = made.result["test_images"], made.result["chance"]
    print(f"{plural(images, 'test image')}; the commonest class alone reaches {100 * chance:.1f} %")
    print(f"wrote {made.path}")
    print(_next(config, made.entries))


def _next(config: Config, entries: Sequence[Mapping[str, Any]]) -> str:
    """See what the best store holds: a k-SAE of it."""
    from revelio.following import beside, following

    best = max(entries, key=lambda entry: entry["value"])["store"]
    store = next(path for path in config.store if path.resolve().name == best)
    return following("train-ksae", "--store", store, "--out", beside(store, "ksae"))
