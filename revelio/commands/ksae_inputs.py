"""What `revelio train-ksae` trains with: the store's rows, the settings, a fresh model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from revelio.activations.store import ActivationStore
    from revelio.commands.ksae_team import Team
    from revelio.commands.train_ksae import Config
    from revelio.sae.cost import Job
    from revelio.sae.dataloader import RowSource, Shuffled
    from revelio.sae.model import KSparseAutoencoder
    from revelio.sae.state import TrainSettings


class _Pooled:
    """A store's rows as vectors in float32; whole grids are averaged over height and width."""

    def __init__(self, store: "ActivationStore") -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def rows(self, start: int, stop: int) -> "Tensor":
        """Rows ``start`` to ``stop`` (b d)."""
        from revelio.analysis.top_images import pooled

        return pooled(self.store.rows(start, stop))


def build_rows(store: "ActivationStore", config: "Config", team: "Team") -> "Shuffled":
    """The store's rows in shuffled batches, from memory or streamed."""
    import torch

    from revelio.sae.dataloader import Shuffled

    workers = config.workers
    source: Tensor | RowSource = _Pooled(store)
    if team.group is not None:
        # Processes exchange what they read, in the one order that a single reader keeps.
        source, workers = team.share_reading(source), min(workers, 1)
    if 4 * len(store) * store.row_shape[0] <= config.memory_gib * 2**30:
        starts = range(0, len(store), 1024)
        parts = [source.rows(start, min(start + 1024, len(store))) for start in starts]
        source = torch.cat(parts) if parts else torch.empty(0, store.row_shape[0])
    size = min(config.batch_size, max(len(store), 1))
    seed = config.seed if config.order_seed is None else config.order_seed
    return Shuffled(source, size, seed, workers=workers)


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
        bandwidth=config.bandwidth,
        sparsity=config.sparsity,
        early_stop=config.early_stop,
        early_stop_window=config.early_stop_window,
    )


def build_job(
    config: "Config", store: "ActivationStore", settings: "TrainSettings", team: "Team"
) -> "Job":
    """What the run costs is worked out from this."""
    from revelio.sae.cost import Job

    d = store.row_shape[0]
    return Job(
        rows=len(store),
        d=d,
        n=d * config.expansion,
        k=config.k,
        batch_size=settings.batch_size,
        steps=settings.steps,
        devices=team.world,
        sharing=config.sharing,
        held=4 * len(store) * d <= config.memory_gib * 2**30,
        row_bytes=4 if store.manifest["dtype"] == "float32" else 2,
        checkpoints=config.checkpoint_every > 0,
    )


def build_model(config: "Config", store: "ActivationStore", team: "Team") -> "KSparseAutoencoder":
    """A fresh k-SAE of the store's width, on the team's device.

    Raises:
        ValueError: the sizes make no sense.
    """
    d = store.row_shape[0]
    return team.model(
        {
            "d": d,
            "n": d * config.expansion,
            "k": config.k,
            "mode": config.mode,
            "trained_on": describe(store),
            "activation": config.activation,
            "prefixes": config.prefixes,
            "seed": None,  # training draws the weights
        }
    )


def describe(store: "ActivationStore") -> dict[str, Any]:
    """The store's manifest without its lists, under the folder's name (no absolute path), and its hash."""
    long = (list, tuple)
    kept = {key: value for key, value in store.manifest.items() if not isinstance(value, long)}
    return {"store": store.path.resolve().name, **kept, "sha256": store.sha256}
