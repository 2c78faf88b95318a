"""The demo's Diff-C, beside the same on random weights and on raw pixels, with what can be told apart."""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

from revelio.activations.store import ActivationStore
from revelio.bounds import derived
from revelio.diffc.config import FitConfig
from revelio.diffc.fit import fit, right_of
from revelio.pipelines import Report, counted
from revelio.pipelines.demo.config import DemoConfig
from revelio.stats import NOT_COMPARED, paired, told_apart
from revelio.wording import plural

PIXELS, RANDOM = "raw pixels", "random weights"
# Towards which side of a comparison a word points, seen from the other side.
REVERSED = {"above": "below", "below": "above"}

Found = Mapping[str, Any]


def diffc_stage(
    trained: Callable[[str], tuple[ActivationStore, ActivationStore]],
    random: Callable[[str], tuple[ActivationStore, ActivationStore]],
    pixels: tuple[ActivationStore, ActivationStore],
    config: DemoConfig,
    progress: Report,
) -> list[dict[str, Any]]:
    """Diff-C on every layer's grids, on those of random weights, and on raw pixels.

    Args:
        trained: the (train, test) grid stores of a layer.
        random: the same of the architecture with random weights.
        pixels: the (train, test) stores of the pictures themselves.
        config: of the demo.
        progress: told how many layers are done.
    """
    told = counted(progress, "Diff-C", len(config.layers) + 1, "layer")
    baseline = _accuracy(*pixels, config)
    told(1)
    found, chance = {}, {}
    for layer in config.layers:
        found[layer] = _accuracy(*trained(layer), config)
        chance[layer] = _accuracy(*random(layer), config)
        told(1)
    words = verdicts(found, chance, baseline)
    return [
        {"layer": layer, "timestep": trained(layer)[0].manifest.get("timestep")}
        | _percent("", one)
        | _percent("pixels_", baseline)
        | _percent("random_weights_", chance[layer])
        | {"parameters": one["parameters"], "interval_kind": one["interval_kind"]}
        | {"verdict": words[layer], "settings": one["settings"]}
        for layer, one in found.items()
    ]


def verdicts(
    found: Mapping[str, Found], chance: Mapping[str, Found], pixels: Found
) -> dict[str, dict[str, str]]:
    """By layer, how its accuracy stands to that of every other one: above, below, not told apart from.

    On the same test images, over trainings; after one training of each, not compared. Holm's correction is
    for all pairs of layers together, since the best is picked among them, and for all layers against each
    baseline.
    """
    right = {layer: right_of(one) for layer, one in found.items()}
    words: dict[str, dict[str, str]] = {layer: {} for layer in right}
    pairs = list(combinations(right, 2))
    said = told_apart([paired(right[one], right[other]) for one, other in pairs])
    for (one, other), word in zip(pairs, said, strict=True):
        words[one][other], words[other][one] = word, REVERSED.get(word, word)
    baselines = {PIXELS: dict.fromkeys(right, pixels), RANDOM: chance}
    for name, others in baselines.items():
        gaps = [paired(right[layer], right_of(others[layer])) for layer in right]
        for layer, word in zip(right, told_apart(gaps), strict=True):
            words[layer][name] = word
    return words


def headline(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The best accuracy in words; a layer is named the best, or better than pixels, only if that is shown."""
    top = max(rows, key=lambda row: row["top1"])
    words = dict(top["verdict"])
    told, _ = words.pop(PIXELS), words.pop(RANDOM)
    level = [layer for layer, word in words.items() if word != "above"]
    text = f"Diff-C top-1 on {top['layer']}"
    if told == NOT_COMPARED:
        others = "the other layers or " if words else ""
        pixels = f"raw pixels ({top['pixels_top1']:.1f} %)"
        return {"value": f"{top['top1']:.1f} %", "text": f"{text}; {told} {others}{pixels}"}
    if words:
        text += (
            f", not told apart from {_listed(level)}" if level else ", more than on any other layer"
        )
    text += f"; {told} raw pixels ({top['pixels_top1']:.1f} %)"
    return {"value": f"{top['top1']:.1f} %", "text": text}


def _listed(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else plural(len(layers), "other layer")


def _percent(prefix: str, found: Found) -> dict[str, Any]:
    """Top-1 and its interval in percent, as the paper's tables have them."""
    return {
        f"{prefix}top1": 100 * found["top1"],
        f"{prefix}interval": [100 * bound for bound in found["interval"]],
    }


def _accuracy(
    train_store: ActivationStore, test_store: ActivationStore, config: DemoConfig
) -> dict[str, Any]:
    assert train_store.labels is not None and test_store.labels is not None
    return fit(
        train_store.tensor(),
        train_store.labels,
        test_store.tensor(),
        test_store.labels,
        classes=train_store.classes,
        config=derived(
            config,
            FitConfig,
            batch_size=32,
            learning_rate=1e-3,
            validation=0.0,
            seeds=config.diffc_seeds,
            device="cpu",
        ),
    )
