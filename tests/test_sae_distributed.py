import json
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import sae_parallel_worker as worker
import torch
from process_helpers import REVELIO, in_processes
from sae_helpers import planted
from test_sae_command import FLAGS, train_ksae, weights

from revelio.activations.store import write_store
from revelio.pipelines.sae_processes import DistContext
from revelio.pipelines.train_sae import plan_sae, train_sae
from revelio.sae.checkpoint import load_checkpoint
from revelio.sae.config import TrainSAEConfig
from revelio.sae.distributed import Group
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train


def in_two(script: Path, *words: object) -> CompletedProcess[str]:
    done = in_processes(2, script, *words)
    assert done.returncode == 0, "\n".join(done.stderr.splitlines()[:60])
    return done


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes made of every case."""
    out = tmp_path_factory.mktemp("two")
    in_two(Path(worker.__file__), out)
    return out


def alone(mode: str):
    model = KSparseAutoencoder(**worker.model_settings(mode))
    steps = list(train(model, worker.batches(worker.source()), worker.settings_of(mode)))
    return model, [step.loss for step in steps]


def furthest(a: KSparseAutoencoder, b: KSparseAutoencoder) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs)


@pytest.mark.parametrize("sharing", ["data", "latents"])
@pytest.mark.parametrize("mode", worker.CASES)
def test_two_processes_train_what_one_does(two, mode, sharing):
    model, losses = alone(mode)
    shared = KSparseAutoencoder.from_pretrained(two / f"{mode}-{sharing}")
    found = json.loads((two / "losses.json").read_text())[f"{mode}-{sharing}"]
    assert found == pytest.approx(losses, rel=1e-5)
    assert furthest(shared, model) < 2e-6
    assert shared.settings() | {"trained_on": {}} == model.settings()


def test_a_model_in_parts_is_measured_like_a_whole_one(two):
    shared = KSparseAutoencoder.from_pretrained(two / "fixed-latents")
    whole = evaluate(shared, worker.source().held.split(50))
    assert shared.trained_on["fvu"] == pytest.approx(whole.fvu, rel=1e-5)


def test_one_process_goes_on_from_a_checkpoint_of_two(two):
    whole, losses = alone("fixed")
    model = KSparseAutoencoder(worker.D, worker.N, worker.K)
    state = load_checkpoint(two / "fixed-checkpoint", model)
    assert state.step == 17
    steps = list(train(model, worker.batches(worker.source()), worker.settings_of("fixed"), state))
    assert [step.loss for step in steps] == pytest.approx(losses[17:], rel=1e-5)
    assert furthest(model, whole) < 2e-6


@pytest.mark.parametrize("count", [1, 2, 5, 97])
def test_shares_cover_everything_once(count):
    shares = [Group(rank, 4).share(count) for rank in range(4)]
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(shares[0]) == max(map(len, shares))


@pytest.mark.parametrize("sharing", ["data", "latents"])
def test_the_command_in_two_processes_goes_on_with_what_one_began(sharing, tmp_path, monkeypatch):
    store = tmp_path / "store"
    write_store(store, planted(90, 8, 12, 2, noise=0.1)[0], [str(i) for i in range(90)])
    options = ["--steps", "10", "--memory-gib", "0", "--workers", "1"]
    train_ksae(store, tmp_path / "whole", *options)
    stopped_after(7, monkeypatch)
    with pytest.raises(SystemExit):
        train_ksae(store, tmp_path / "two", *options)
    monkeypatch.undo()
    command = ["train-ksae", "--store", store, "--out", tmp_path / "two"]
    done = in_two(REVELIO, *command, *FLAGS, *options, "--resume", "--sharing", sharing)
    assert done.stdout.count("fraction of variance unexplained") == 1
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "two")[name], atol=2e-6, rtol=1e-5)
    whole, two = (tmp_path / name / "metrics.jsonl" for name in ("whole", "two"))
    steps = [
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in (whole, two)
    ]
    assert steps[0] == steps[1]


def stopped_after(steps: int, monkeypatch) -> None:
    """Ctrl-C in the step after so many."""
    from revelio.sae import train as many

    real, calls = many.train_step, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == steps:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(many, "train_step", stops)


def test_processes_measure_together(tmp_path, monkeypatch):
    """All of them, each after the others are ready; before, one alone had the cores of both."""
    events = []

    def measured(*arguments):
        events.append("measured")
        raise InterruptedError

    monkeypatch.setattr("revelio.pipelines.plan_sae.measured_speed", measured)
    monkeypatch.setattr("revelio.pipelines.train_sae._batches", lambda *_: None)
    write_store(tmp_path / "s", torch.randn(90, 8), [str(i) for i in range(90)])
    config = TrainSAEConfig(
        store=(tmp_path / "s",), out=tmp_path / "run", k=2, expansion=2, steps=3
    )
    for rank in (0, 1):  # the first one makes the run folder
        shared = DistContext(
            torch.device("cpu"), Group(rank, 2, None), wait=lambda: events.append("wait")
        )
        monkeypatch.setattr(DistContext, "gather", lambda *_, one=shared: one)
        for make in (train_sae, plan_sae):
            events.clear()
            with pytest.raises(InterruptedError):
                make(config, progress=lambda told: None)
            assert events[-2:] == ["wait", "measured"], (rank, make)
    # Where nobody listens, nothing is measured.
    events.clear()
    monkeypatch.setattr("revelio.pipelines.train_sae._follow", lambda *_: events.append("trained"))
    with pytest.raises(AssertionError):
        train_sae(replace(config, resume=True))
    assert "trained" in events and "measured" not in events
