"""What `revelio train-ksae` trains with: the store's rows, the settings, a fresh model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from revelio.activations.store import ActivationStore
    from revelio.commands.train_ksae import Config
    from revelio.sae.model import KSparseAutoencoder
    from revelio.sae.plan import Job
    from revelio.sae.rows import RowSource, Shuffled
    from revelio.sae.state import TrainSettings


class _Pooled:
    """A store's rows as vectors in float32; whole grids are averaged over height and width."""

    def __init__(self, store: "ActivationStore") -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def rows(self, start: int, stop: int) -> "Tensor":
        """Rows ``start`` to ``stop`` (b d)."""
        part = self.store.rows(start, stop).float()
        return part.flatten(2).mean(2) if part.ndim == 4 else part


def build_rows(store: "ActivationStore", config: "Config") -> "Shuffled":
    """The store's rows in shuffled batches, from memory or streamed."""
    import torch

    from revelio.sae.rows import Shuffled

    source: Tensor | RowSource = _Pooled(store)
    if 4 * len(store) * store.row_shape[0] <= config.memory_gib * 2**30:
        starts = range(0, len(store), 1024)
        parts = [source.rows(start, min(start + 1024, len(store))) for start in starts]
        source = torch.cat(parts) if parts else torch.empty(0, store.row_shape[0])
    size = min(config.batch_size, max(len(store), 1))
    return Shuffled(source, size, config.seed, workers=config.workers)


def build_settings(config: "Config", rows: int) -> "TrainSettings":
    """The settings, with `epochs` or `samples` turned into steps."""
    from math import ceil

    from revelio.sae.state import TrainSettings

    size = min(config.batch_size, rows)
    steps = config.steps
    if config.epochs is not None:
        steps = ceil(config.epochs * ceil(rows / size))
    elif config.samples is not None:
        steps = ceil(config.samples / rows * ceil(rows / size))
    return TrainSettings(
        steps=steps,
        batch_size=size,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        seed=config.seed,
        pre_bias=config.pre_bias,
        auxk=config.auxk,
        auxk_coefficient=config.auxk_coefficient,
        dead_after=config.dead_after,
        early_stop=config.early_stop,
        early_stop_window=config.early_stop_window,
    )


def build_job(config: "Config", store: "ActivationStore", settings: "TrainSettings") -> "Job":
    """What the run costs is worked out from this."""
    from revelio.sae.plan import Job

    d = store.row_shape[0]
    return Job(
        rows=len(store),
        d=d,
        n=d * config.expansion,
        k=config.k,
        batch_size=settings.batch_size,
        steps=settings.steps,
        held=4 * len(store) * d <= config.memory_gib * 2**30,
        row_bytes=4 if store.manifest["dtype"] == "float32" else 2,
        checkpoints=config.checkpoint_every > 0,
    )


def build_model(config: "Config", store: "ActivationStore") -> "KSparseAutoencoder":
    """A fresh k-SAE of the store's width on the wanted device.

    Raises:
        ValueError: the device is not to be had, or the sizes make no sense.
    """
    import torch

    from revelio.sae.model import KSparseAutoencoder

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not to be had: use auto or cpu") from error
    d = store.row_shape[0]
    described = describe(store)
    model = KSparseAutoencoder(d, d * config.expansion, config.k, config.mode, described)
    return model.to(place)


def describe(store: "ActivationStore") -> dict[str, Any]:
    """The store's manifest without its lists, under the folder's name (no absolute path)."""
    long = (list, tuple)
    kept = {key: value for key, value in store.manifest.items() if not isinstance(value, long)}
    return {"store": store.path.resolve().name, **kept}
