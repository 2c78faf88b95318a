"""The demo's Diff-C, beside the same on random weights and on raw pixels."""

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from revelio.activations.store import ActivationStore
from revelio.demo.stages import DemoSettings
from revelio.diffc.config import FitConfig
from revelio.diffc.fit import fit


def diffc_stage(
    trained: Callable[[str], tuple[ActivationStore, ActivationStore]],
    random: Callable[[str], tuple[ActivationStore, ActivationStore]] | None,
    pixels: tuple[ActivationStore, ActivationStore],
    settings: DemoSettings,
) -> list[dict[str, Any]]:
    """Diff-C on every layer's grids, on those of random weights, and on raw pixels.

    Args:
        trained: the (train, test) grid stores of a layer.
        random: the same of the architecture with random weights, or None where there is none.
        pixels: the (train, test) stores of the pictures themselves.
        settings: of the demo.
    """
    baseline = _accuracy(*pixels, settings)
    rows = []
    for layer in tqdm(settings.layers, desc="Diff-C", unit="layer"):
        found = _accuracy(*trained(layer), settings)
        other = _accuracy(*random(layer), settings) if random is not None else None
        rows.append(
            {"layer": layer, "timestep": settings.diffc_timestep}
            | _percent("", found)
            | _percent("pixels_", baseline)
            | _percent("random_weights_", other)
            | {"parameters": found["parameters"], "interval_kind": found["interval_kind"]}
        )
    return rows


def _percent(prefix: str, found: dict[str, Any] | None) -> dict[str, Any]:
    """Top-1 and its interval in percent, as the paper's tables have them; None where not measured."""
    if found is None:
        return {f"{prefix}top1": None, f"{prefix}interval": None}
    return {
        f"{prefix}top1": 100 * found["top1"],
        f"{prefix}interval": [100 * bound for bound in found["interval"]],
    }


def _accuracy(
    train_store: ActivationStore, test_store: ActivationStore, settings: DemoSettings
) -> dict[str, Any]:
    assert train_store.labels is not None and test_store.labels is not None
    return fit(
        train_store.tensor(),
        train_store.labels,
        test_store.tensor(),
        test_store.labels,
        classes=train_store.classes,
        config=FitConfig(
            width=settings.width,
            epochs=settings.epochs,
            batch_size=32,
            learning_rate=1e-3,
            seed=settings.seed,
            device="cpu",
        ),
    )
