import json
import re
from pathlib import Path

import pytest
import torch
from sae_helpers import planted

from revelio.activations.store import write_store
from revelio.cli import main
from revelio.cli.train_ksae import Config
from revelio.config import load_config
from revelio.sae.model import KSparseAutoencoder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "up_ft1-t25-empty-d0"
    rows, _ = planted(90, 8, 12, 2, noise=0.1)
    write_store(folder, rows, [f"image{i}" for i in range(90)], settings={"timestep": 25})
    return folder


FLAGS = ["--k", "3", "--expansion", "4", "--batch-size", "32", "--checkpoint-every", "4"]


def train_ksae(store: Path, out: Path, *flags: str) -> None:
    main(["train-ksae", "--store", str(store), "--out", str(out), *FLAGS, *flags])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return KSparseAutoencoder.from_pretrained(out / "final").state_dict()


def test_the_command_trains_reports_and_saves(store, tmp_path, capsys):
    train_ksae(store, tmp_path / "run", "--epochs", "4")
    said = capsys.readouterr().out
    assert f"{2 * 8 * 32 + 32 + 8} parameters; frozen: none" in said
    assert "unexplained" in said
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert (report["steps"], report["samples"], report["epochs"]) == (12, 360, 4)
    assert (report["d"], report["n"], report["k"]) == (8, 32, 3)
    assert report["trained_on"]["store"] == "up_ft1-t25-empty-d0"
    assert report["trained_on"]["timestep"] == 25
    assert 0 < report["fvu"] < 1.5
    assert str(tmp_path) not in (tmp_path / "run/report.json").read_text()
    model = KSparseAutoencoder.from_pretrained(tmp_path / "run/final")
    assert model.trained_on["fvu"] == report["fvu"]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 10, 12]


@pytest.mark.parametrize("flags", [["batch-topk"], ["jumprelu", "--prefixes", "4", "16"]])
def test_other_activations_are_a_flag_away(store, tmp_path, flags):
    train_ksae(store, tmp_path / "run", "--steps", "5", "--activation", *flags)
    report = json.loads((tmp_path / "run/report.json").read_text())
    model = KSparseAutoencoder.from_pretrained(tmp_path / "run/final")
    assert report["activation"] == model.activation == flags[0]
    assert report["prefixes"] == list(model.prefixes) == list(map(int, flags[2:]))
    assert float(model.threshold.min()) > 0


def test_resume_after_a_stop_is_bit_equal(store, tmp_path, monkeypatch, capsys):
    train_ksae(store, tmp_path / "whole", "--steps", "10")
    from revelio.sae import train as module

    real, calls = module.train_step, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "train_step", stops)
    with pytest.raises(SystemExit) as stopped:
        train_ksae(store, tmp_path / "parts", "--steps", "10")
    assert stopped.value.code == 130
    monkeypatch.setattr(module, "train_step", real)
    capsys.readouterr()
    train_ksae(store, tmp_path / "parts", "--steps", "10", "--resume")
    said = "".join(capsys.readouterr())
    assert re.search(r"plan: 10 steps \(4 of them done\) of 32 rows, ", said)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name])
    whole, parts = tmp_path / "whole/metrics.jsonl", tmp_path / "parts/metrics.jsonl"
    assert whole.read_text() == parts.read_text()


def test_a_streamed_store_gives_the_same_with_any_number_of_workers(store, tmp_path):
    for workers in ("0", "2"):
        train_ksae(
            store, tmp_path / workers, "--steps", "6", "--memory-gib", "0", "--workers", workers
        )
    for name, tensor in weights(tmp_path / "0").items():
        assert torch.equal(tensor, weights(tmp_path / "2")[name])


def test_grids_are_pooled(store, tmp_path):
    rows, _ = planted(90, 8, 12, 2, noise=0.1)
    grids = rows[:, :, None, None] + torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
    write_store(tmp_path / "grids", grids, [str(i) for i in range(90)])
    train_ksae(tmp_path / "grids", tmp_path / "a", "--steps", "3")
    train_ksae(store, tmp_path / "b", "--steps", "3")
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "b")[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--k", "33"], "k=33"),
        (["--epochs", "1", "--samples", "5"], "not both"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--device", "abacus"], "abacus"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0"),
        (["--mode", "as_code", "--auxk", "4"], "no AuxK"),
        (["--expansion", "0"], "--expansion is 0"),
        (["--prefixes", "9", "3"], "ascending"),
        (["--activation", "jumprelu", "--mode", "as_code"], "mode as_code"),
    ],
)
def test_mistakes_are_one_line_and_status_2(store, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit) as stopped:
        train_ksae(store, tmp_path / "run", *flags)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert named in errors[-1]
    assert errors[-1].startswith("revelio: ")


HUGE = ["--expansion", "1000000000", "--k", "4"]


def test_a_plan_beyond_the_machine_warns_and_a_training_is_refused_with_its_plan(
    store, tmp_path, capsys
):
    train_ksae(store, tmp_path / "run", *HUGE, "--plan")
    said = capsys.readouterr().out
    assert "warning: this does not fit: it takes" in said
    assert "of memory, of which" in said and "available)" in said and "TB" in said
    with pytest.raises(SystemExit) as stopped:
        train_ksae(store, tmp_path / "run", *HUGE)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("plan: ")
    assert captured.err.count("\n") == 1 and "lower expansion" in captured.err
    assert not (tmp_path / "run").exists()


def test_together_the_members_of_a_grid_must_fit(store, tmp_path, capsys, monkeypatch):
    from revelio.pipelines import plan_sae
    from revelio.pipelines.plan_sae import shortage
    from revelio.sae.config import RunConfig
    from revelio.sae.cost import Job, memory

    config = RunConfig(k=4, expansion=256, batch_size=50, steps=5)
    job = Job(config=config, rows=100, d=16)
    alone = memory(job).total - memory(job).process
    several = 3 * (alone - memory(job).rows) + memory(job).rows
    for available, jobs, fits in (
        (alone, 1, True), (alone - 1, 1, False), (several, 3, True), (several - 1, 3, False),
    ):  # fmt: skip
        monkeypatch.setattr(plan_sae, "available_memory", lambda available=available: available)
        assert (shortage([job] * jobs, tmp_path, in_memory=True) is None) == fits
        assert shortage([job] * jobs, tmp_path, in_memory=False) is None
    monkeypatch.setattr(plan_sae, "free_disk", lambda path: 1)
    assert "disk" in (shortage([job], tmp_path, in_memory=False) or "")


def test_the_bar_and_the_report_mean_the_same_by_dead(store, tmp_path, capsys):
    """Active on no row of the store: what the bar shows at the end of a pass is counted by hand."""
    from types import SimpleNamespace

    from revelio.pipelines.train_sae import _dead

    fired = torch.tensor([0, 10, 11, 100, 90])
    step = SimpleNamespace(samples=100, state=SimpleNamespace(fired_at=fired))
    for rows in (10, 89, 90, 100):
        dead = sum(100 - int(at) >= rows for at in fired) / 5
        assert _dead(step, rows) == {"dead": f"{dead:.1%}"}  # type: ignore[arg-type]
    assert _dead(step, 101) == {}  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path, capsys):
    rows, _ = planted(40, 8, 12, 2, noise=0.1)
    huge = tmp_path / "up_ft1-t25-empty-d0"
    write_store(huge, rows * 1e25, [f"image{i}" for i in range(40)], settings={"timestep": 25})
    with pytest.raises(SystemExit) as stopped:
        train_ksae(huge, tmp_path / "run", "--steps", "5", "--mode", "as_paper")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert "the loss of step 1 is not finite" in said and "lower learning_rate" in said
    assert not (tmp_path / "run/report.json").exists()


def test_every_config_loads():
    found = sorted(Path("configs/ksae").glob("*.yaml"))
    assert len(found) >= 4
    modes = {path.stem: load_config(Config, path).mode for path in found}
    assert modes["as-code"] == "as_code"
    assert modes["as-paper"] == "as_paper"
