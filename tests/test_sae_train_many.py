import json
from pathlib import Path

import pytest
import torch
from sae_helpers import planted
from test_sae_command import FLAGS, train_ksae, weights
from test_sae_distributed import stopped_after

from revelio.activations.store import ActivationStore, write_store
from revelio.cli import main
from revelio.cli.train_ksae import Config
from revelio.pipelines.train_sae import expand
from revelio.sae.config import SweepConfig, TrainConfig
from revelio.sae.dataloader import Shuffled
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import SAERun, train, train_many


def rows() -> torch.Tensor:
    return planted(150, 12, 20, 3, noise=0.1)[0]


class Counting:
    """Batches that count how often each epoch was asked for."""

    def __init__(self, batches: Shuffled) -> None:
        self.batches, self.read = batches, 0

    def epoch(self, index: int):
        for batch in self.batches.epoch(index):
            self.read += 1
            yield batch


def members() -> list[SAERun]:
    """Different sizes, modes, seeds and ends."""
    common = {"batch_size": 32, "warmup_steps": 5, "learning_rate": 1e-3}
    return [
        SAERun(KSparseAutoencoder(12, 40, 2), TrainConfig(steps=23, **common)),
        SAERun(KSparseAutoencoder(12, 70, 5, "as_code"), TrainConfig(steps=12, seed=4, **common)),
        SAERun(KSparseAutoencoder(12, 40, 2, "as_paper"), TrainConfig(steps=23, seed=1, **common)),
        SAERun(
            KSparseAutoencoder(12, 40, 2),
            TrainConfig(steps=23, early_stop=0.9, early_stop_window=4, **common),
        ),
    ]


def same(a: KSparseAutoencoder, b: KSparseAutoencoder) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_each_of_many_is_bit_equal_to_training_it_alone():
    together, apart = members(), members()
    steps: list[list[float]] = [[] for _ in together]
    for place, step in train_many(together, Shuffled(rows(), 32)):
        steps[place].append(step.loss)
    for member, other, losses in zip(together, apart, steps, strict=True):
        alone = [s.loss for s in train(other.model, Shuffled(rows(), 32), other.config)]
        assert losses == alone
        assert same(member.model, other.model)
    assert [len(losses) for losses in steps] == [23, 12, 23, 8]


def test_batches_are_read_once_for_all():
    one, four = Counting(Shuffled(rows(), 32)), Counting(Shuffled(rows(), 32))
    list(train_many(members()[:1], one))
    list(train_many(members(), four))
    assert one.read == four.read


def test_members_that_stand_apart_catch_up():
    whole = members()[:3]
    list(train_many(whole, Shuffled(rows(), 32)))
    parts = members()[:3]
    ahead = [(parts[0], 9), (parts[2], 4)]
    for member, steps in ahead:
        for step in train(member.model, Shuffled(rows(), 32), member.config):
            member.state = step.state
            if step.step == steps:
                break
    list(train_many(parts, Shuffled(rows(), 32)))
    for a, b in zip(whole, parts, strict=True):
        assert same(a.model, b.model)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("stores") / name for name in ("up_ft1-t25", "up_ft2-t25")]
    for seed, folder in enumerate(folders):
        write_store(folder, planted(90, 8, 12, 2, seed, 0.1)[0], [str(i) for i in range(90)])
    return folders


GRID = ["--grid.k", "2", "3", "--grid.seed", "0", "1", "--steps", "10"]


def test_a_grid_gives_a_run_folder_for_each_and_resumes(stores, tmp_path, monkeypatch):
    both = ["--grid.store", *map(str, stores)]
    train_ksae(stores[0], tmp_path / "whole", *GRID, *both)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) == 8
    assert names[0] == "up_ft1-t25-k2-seed0"
    stopped_after(33, monkeypatch)
    with pytest.raises(SystemExit):
        train_ksae(stores[0], tmp_path / "parts", *GRID, *both)
    monkeypatch.undo()
    train_ksae(stores[0], tmp_path / "parts", *GRID, *both, "--resume")
    for name in names:
        report = json.loads((tmp_path / "parts" / name / "report.json").read_text())
        assert report["trained_on"]["store"] == name[:10]
        for key, tensor in weights(tmp_path / "whole" / name).items():
            assert torch.equal(tensor, weights(tmp_path / "parts" / name)[key])


def test_a_store_is_read_once_for_the_grid_and_its_configs_stand_alone(
    stores, tmp_path, monkeypatch
):
    asked = []
    real = ActivationStore.rows
    monkeypatch.setattr(ActivationStore, "rows", lambda *a: asked.append(a[1:]) or real(*a))
    train_ksae(stores[0], tmp_path / "grid", *GRID)
    assert asked == [(0, 90)]
    config = tmp_path / "grid/k3-seed1/config.yaml"
    main(["train-ksae", "--config", str(config), "--out", str(tmp_path / "alone")])
    for key, tensor in weights(tmp_path / "grid/k3-seed1").items():
        assert torch.equal(tensor, weights(tmp_path / "alone")[key])


def test_a_grid_from_a_file_and_mistakes(stores, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(f"store: {stores[0]}\nout: {tmp_path / 'x'}\ngrid:\n  k: [2, 3]\n")
    main(["train-ksae", "--config", str(path), *FLAGS, "--steps", "2", "--plan"])
    assert capsys.readouterr().out.count("plan: 2 steps") == 2
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit) as stopped:
        train_ksae(stores[0], tmp_path / "y", "--grid.k", "2", "2")
    assert stopped.value.code == 2
    assert "k2 twice" in capsys.readouterr().err


def test_combinations_are_grouped_by_store():
    grid = SweepConfig(store=(Path("a"), Path("b")), expansion=(4, 8), learning_rate=(1e-3,))
    groups = expand(Config(store=Path("a"), out=Path("out"), seed=5, grid=grid))
    assert [[(c.store[0].name, c.expansion, c.order_seed) for c in group] for group in groups] == [
        [("a", 4, 5), ("a", 8, 5)],
        [("b", 4, 5), ("b", 8, 5)],
    ]
    assert groups[1][1].out == Path("out/b-x8-lr0.001")
