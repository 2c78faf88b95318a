"""What each of several processes does in tests/test_sae_distributed.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sae_helpers import planted

from revelio.sae.checkpoint import save_checkpoint
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import Shuffled
from revelio.sae.distributed import DataParallelKernel, Group, SharedRows, sharded_model
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.sharded_files import ShardedFiles, save_sharded
from revelio.sae.train import train

# Odd everywhere, so that no share is like another.
D, N, K = 12, 97, 3
CASES = {
    "fixed": {"auxk": 5, "dead_after": 66},
    "as_paper": {},
    "as_code": {},
    "batch-topk": {},
    "jumprelu": {"bandwidth": 0.5},
}
OPTIONS = {"batch-topk": {"activation": "batch-topk", "prefixes": (9, 60)}}
OPTIONS["jumprelu"] = {"activation": "jumprelu"}


class Source:
    """Rows that can be read in slices."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.held = rows

    def __len__(self) -> int:
        return len(self.held)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.held[start:stop]


def source() -> Source:
    return Source(planted(151, D, 20, 3, noise=0.1)[0] + 1)


def model_settings(case: str) -> dict:
    options = OPTIONS.get(case, {"mode": case})
    return {"d": D, "n": N, "k": K, **options}


def batches(rows) -> Shuffled:
    return Shuffled(rows, 33, 0, block=10, window=4)


def settings_of(mode: str) -> TrainConfig:
    return TrainConfig(steps=40, batch_size=33, warmup_steps=10, learning_rate=1e-3, **CASES[mode])


def in_parts(group: Group, mode: str, out: Path) -> list[float]:
    """Latents shared; a checkpoint after 17 steps, the model at the end."""
    model = sharded_model(group, model_settings(mode))
    files, losses = ShardedFiles(group, N), []
    main = group.rank == 0
    for step in train(
        model, batches(SharedRows(source(), group, torch.device("cpu"))), settings_of(mode)
    ):
        losses.append(step.loss)
        if step.step == 17:
            folder = out / f"{mode}-checkpoint"
            if main:
                folder.mkdir()
            save_checkpoint(folder if main else None, model, step.state, files)
    model.trained_on["fvu"] = evaluate(model, source().held.split(50)).fvu
    save_sharded(out / f"{mode}-latents" if main else None, model, group)
    return losses


def by_rows(group: Group, mode: str, out: Path) -> list[float]:
    """Batches shared; the weights must be the same on every process."""
    model = KSparseAutoencoder(**model_settings(mode))
    kernel = DataParallelKernel(SparseKernel(), group)
    losses = [
        step.loss for step in train(model, batches(source()), settings_of(mode), kernel=kernel)
    ]
    for parameter in model.parameters():
        first = parameter.detach().clone()
        group.agree_(first)
        assert torch.equal(first, parameter)
    if group.rank == 0:
        model.save_pretrained(out / f"{mode}-data")
    return losses


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    together, place = Group.all(), Path(sys.argv[1])
    found = {}
    for case in CASES:
        found[f"{case}-latents"] = in_parts(together, case, place)
        found[f"{case}-data"] = by_rows(together, case, place)
    if together.rank == 0:
        (place / "losses.json").write_text(json.dumps(found))
    dist.destroy_process_group()
