"""Stores of training and test images -> the accuracy of probes, every layer in one table.

from revelio.pipelines.probe import ProbeConfig, probe

found = probe(ProbeConfig(store=(Path("runs/train/up_ft1-t25-empty-d0"),),
                          test_store=(Path("runs/test/up_ft1-t25-empty-d0"),)))
found.entries[0]["value"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from revelio.activations.store import ActivationStore
from revelio.analysis.top_images import pooled
from revelio.bounds import check_fields
from revelio.config import to_plain
from revelio.distributed import device_of
from revelio.outputs import check_file, check_same_settings, has_keys
from revelio.pipelines import Made, Report, counted, silent
from revelio.pipelines.eval_stores import shared_images
from revelio.pipelines.inputs import check_alike
from revelio.probes.chosen import Probed
from revelio.probes.config import ProbeConfig, ProbeName
from revelio.probes.knn import knn_probe
from revelio.probes.linear import linear_probe
from revelio.probes.networks import NETWORKS, network_probe
from revelio.run_dir import versions, write_json
from revelio.stats import Difference, paired, rounded, told_apart, trainings95
from revelio.trust import printable
from revelio.wording import plural

__all__ = ["ProbeConfig", "ProbedStores", "probe"]

WITHOUT = "extract the images without `cells`"


@dataclass(frozen=True)
class ProbedStores(Made):
    """A table of probes; ``entries`` of its result: a probe on a store each.

    Attributes:
        right: for each entry, which test images each training was right on, (seeds images).
    """

    right: list[np.ndarray]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """A probe on a store each."""
        return self.result["entries"]


@dataclass(frozen=True)
class Pair:
    """Stores of training and test images, opened, with the test labels by the training classes' ids."""

    train: ActivationStore
    test: ActivationStore
    labels: np.ndarray
    test_labels: np.ndarray


def probe(config: ProbeConfig, progress: Report = silent) -> ProbedStores:
    """Train the probes on each store, test them on its test store, compare them, and write the table.

    Args:
        config: which stores and probes.
        progress: told after each training.

    Returns:
        The table. An entry has ``value``, ``low`` and ``high`` (with one seed Wilson's interval, else
        :func:`revelio.stats.trainings95`), ``seconds`` an image of what the probe does itself, the chosen
        ``settings``, ``to_best``: the paired difference to the best entry with its interval, and the
        ``verdict`` on it, of all differences together (Holm).

    Raises:
        ValueError: stores without labels, of other images or classes, a class with one image, a value outside
            its bounds, or another file, or a table of other settings, stands at
            ``config.out``.
    """
    check_fields(config)
    check_file(config.out, has_keys("entries", "chance", "test_images"), "a table of probes")
    check_same_settings(config.out, config)
    pairs = _open_pairs(config)
    total = len(pairs) * len(config.probes) * config.seeds
    count = counted(progress, "probes", total, "training")
    entries, right = [], []
    for pair in pairs:
        for name in config.probes:
            found = []
            for seed in range(config.seed, config.seed + config.seeds):
                found.append(_trained(name, pair, config, seed))
                count(1)
            entries.append(_entry(name, pair, found))
            right.append(np.array([one.predicted for one in found]) == pair.test_labels)
    _compare(entries, right)
    labels = pairs[0].test_labels
    result = {
        "entries": entries,
        "test_images": len(labels),
        # What the commonest class of the test images alone would reach.
        "chance": float(np.bincount(labels).max() / len(labels)),
        "seeds": config.seeds,
        "config": to_plain(config),
        "versions": versions(),
    }
    # Another run may have ended meanwhile.
    check_same_settings(config.out, config)
    write_json(config.out, result)
    return ProbedStores(config.out, result, right)


def _open_pairs(config: ProbeConfig) -> list[Pair]:
    if len(config.store) != len(config.test_store):
        raise ValueError(
            f"{plural(len(config.store), 'training store')} and "
            f"{plural(len(config.test_store), 'test store')}: give one test store for each"
        )
    pairs = [_pair(*paths) for paths in zip(config.store, config.test_store, strict=True)]
    for pair in pairs:
        if pair.test.ids != pairs[0].test.ids:
            raise ValueError(
                f"{pair.test.path} and {pairs[0].test.path} are of different test images, which no paired "
                "comparison can do with: extract all layers of the same images"
            )
        networks = [name for name in config.probes if name in NETWORKS]
        if networks and len(pair.train.row_shape) != 3:
            raise ValueError(
                f"{pair.train.path} holds one vector an image, and the {networks[0]} probe needs grids: "
                f"extract with pool `none`, or leave {networks[0]} out"
            )
    return pairs


def _pair(train_path: Path, test_path: Path) -> Pair:
    train, test = (ActivationStore.open(path, instead=WITHOUT) for path in (train_path, test_path))
    for store in (train, test):
        if store.labels is None:
            raise ValueError(f"{store.path} has no labels: a probe needs images with classes")
    check_alike(train, test)
    _check_apart(train, test)
    known = {name: number for number, name in enumerate(train.classes)}
    missing = [name for name in test.classes if name not in known]
    if missing:
        raise ValueError(
            f"{train.path} has no class {printable(missing[0])}, which {test.path} has: give stores of the "
            "same classes"
        )
    assert train.labels is not None and test.labels is not None
    ids = np.array([known[name] for name in test.classes])
    test_labels = test.labels.numpy()
    return Pair(train, test, train.labels.numpy(), ids[test_labels] if len(ids) else test_labels)


def _check_apart(train: ActivationStore, test: ActivationStore) -> None:
    """Refuse test images that a probe is trained on."""
    shared = shared_images(train, train.tensor(), test, test.tensor())
    if shared:
        raise ValueError(
            f"{shared} of the {plural(len(test), 'test image')} of {test.path} are training images, such as "
            f"{printable(min(set(train.ids) & set(test.ids)))}: give a store of other images"
        )


def _trained(name: ProbeName, pair: Pair, config: ProbeConfig, seed: int) -> Probed:
    rows = [store.tensor() for store in (pair.train, pair.test)]
    if name in NETWORKS:
        train, test = rows
        return network_probe(
            name,
            train,
            pair.labels,
            test,
            pair.test_labels,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=seed,
            device=str(device_of(config.device)),
        )
    train, test = (pooled(each).numpy() for each in rows)
    fit = linear_probe if name == "linear" else knn_probe
    return fit(train, pair.labels, test, pair.test_labels, seed=seed)


def _entry(name: str, pair: Pair, found: Sequence[Probed]) -> dict[str, Any]:
    values = [one.score.value for one in found]
    made = {
        key: pair.train.manifest.get(key) for key in ("model", "layer", "timestep", "prompt_policy")
    }
    return {
        **made,
        "store": pair.train.path.name,
        "probe": name,
        **rounded(mean(values), trainings95(values, len(pair.test_labels))),
        "values": values,
        "settings": [one.setting for one in found],
        "seconds": mean(one.score.seconds for one in found),
        "train_images": len(pair.labels),
    }


def _compare(entries: list[dict[str, Any]], right: Sequence[np.ndarray]) -> None:
    """Give every entry its difference to the best, and what all differences support together."""
    best = max(range(len(entries)), key=lambda one: right[one].mean())
    others = [number for number in range(len(entries)) if number != best]
    differences: list[Difference] = [paired(right[one], right[best]) for one in others]
    entries[best] |= {"to_best": None, "verdict": "best"}
    for one, each, verdict in zip(others, differences, told_apart(differences), strict=True):
        entries[one]["to_best"] = rounded(each.value, each.interval)
        entries[one]["verdict"] = f"{verdict} the best"
