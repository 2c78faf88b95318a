"""The demo's Diff-C, beside the same on random weights and on raw pixels."""

from collections.abc import Callable
from typing import Any

from revelio.activations.store import ActivationStore
from revelio.diffc.config import FitConfig
from revelio.diffc.fit import fit
from revelio.pipelines import Report, counted
from revelio.pipelines.demo.config import DemoConfig


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
    rows = []
    for layer in config.layers:
        found = _accuracy(*trained(layer), config)
        rows.append(
            {"layer": layer, "timestep": trained(layer)[0].manifest.get("timestep")}
            | _percent("", found)
            | _percent("pixels_", baseline)
            | _percent("random_weights_", _accuracy(*random(layer), config))
            | {"parameters": found["parameters"], "interval_kind": found["interval_kind"]}
        )
        told(1)
    return rows


def _percent(prefix: str, found: dict[str, Any]) -> dict[str, Any]:
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
        config=FitConfig(
            width=config.width,
            epochs=config.epochs,
            batch_size=32,
            learning_rate=1e-3,
            seed=config.seed,
            device="cpu",
        ),
    )
