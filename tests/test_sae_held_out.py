"""Rows that a k-SAE never sees: which they are, that it does not see them, and what is said of them."""

import json
from dataclasses import replace
from hashlib import blake2b

import pytest
import torch
import yaml
from sae_helpers import planted

from revelio.activations.store import ActivationStore, write_store
from revelio.pipelines import Progress
from revelio.pipelines.held_out import divide
from revelio.pipelines.sae_rows import StoreRows
from revelio.pipelines.train_sae import TrainSAEConfig, plan_sae, train_sae
from revelio.sae.metrics import evaluate
from revelio.trust import read_object

IDS = [f"class{number % 7}/image{number}.jpg" for number in range(600)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "up_ft1-t25"
    write_store(folder, planted(600, 8, 12, 2, noise=0.3)[0], IDS)
    return folder


@pytest.fixture
def config(store, tmp_path) -> TrainSAEConfig:
    return TrainSAEConfig(
        store=store, out=tmp_path / "run", k=3, expansion=4, batch_size=128, steps=12,
        checkpoint_every=4, kernel="torch",
    )  # fmt: skip


def smallest(count: int) -> set[int]:
    keys = {
        place: blake2b(name.encode(), digest_size=8).hexdigest() for place, name in enumerate(IDS)
    }
    return set(sorted(keys, key=keys.__getitem__)[:count])


@pytest.mark.parametrize("memory_gib", [4.0, 0.0])
def test_the_report_measures_rows_that_training_never_reads(config, store, memory_gib, monkeypatch):
    rows, held = ActivationStore.open(store).rows(0, 600), smallest(60)
    read: list[torch.Tensor] = []
    real = StoreRows.rows
    monkeypatch.setattr(StoreRows, "rows", lambda *given: read.append(real(*given)) or read[-1])
    [made] = train_sae(replace(config, memory_gib=memory_gib))
    unseen = made.report["held_out"]
    assert (made.report["rows"], unseen["rows"]) == (540, 60)
    apart = torch.tensor([place in held for place in range(600)])
    # The last read is that of the held-out rows: before it, none of them is among what was read.
    assert torch.equal(read[-1], rows[apart])
    before = {tuple(row) for part in read[:-1] for row in part.tolist()}
    assert before == {tuple(row) for row in rows[~apart].tolist()}
    for found, these in ((made.report, rows[~apart]), (unseen, rows[apart])):
        own = evaluate(made.model(), [these])
        assert found["fvu"] == pytest.approx(own.fvu, rel=1e-4) and found["l0"] == own.l0
    assert made.report["trained_on"]["held_out_fvu"] == unseen["fvu"]
    assert unseen["fvu"] > made.report["fvu"] > 0


def test_a_division_is_by_ids_alone(store, tmp_path):
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1)).tolist()
    write_store(tmp_path / "other", torch.randn(600, 5, 2, 2), [IDS[place] for place in order])
    ours, other = (
        divide([ActivationStore.open(path)], 0.25)[1] for path in (store, tmp_path / "other")
    )
    assert len(ours) == 150
    assert {IDS[place] for place in ours.parts[0].images} == {
        IDS[order[place]] for place in other.parts[0].images
    }
    assert sum(map(len, other.batches())) == 150 and other.rows(3, 9).shape == (6, 5)
    assert other.rows(4, 4).shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "held", "word"),
    [
        ({}, 60, "held out: 60 of 600 rows"),
        ({"held_out": 0.5}, 300, "held out: 300 of 600 rows"),
        ({"held_out": 0.0}, 0, None),
        ({"held_out": 0.05}, 0, "held out: no rows, as 0.05 of 600 are fewer than 50"),
        ({"mode": "as_paper"}, 0, None),
    ],
)
def test_the_plan_says_what_is_kept_out(config, change, held, word):
    said: list[Progress] = []
    [job] = plan_sae(replace(config, **change), said.append)
    notes = [one.message for one in said if "held out" in one.message]
    assert job.rows == 600 - held
    assert notes == [] if word is None else len(notes) == 1 and word in notes[0]


def test_a_run_of_before_goes_on_with_all_rows_and_a_new_one_with_its_own(config):
    [whole] = train_sae(replace(config, held_out=0.0, out=config.out.with_name("whole")))
    begun = whole.path / "config.yaml"
    values = yaml.safe_load(begun.read_text())
    del values["held_out"]
    begun.write_text(yaml.safe_dump(values))
    # As an interrupted run of the version before looks.
    (whole.path / "report.json").unlink()
    [again] = train_sae(replace(config, out=whole.path, resume=True))
    assert again.report["rows"] == 600 and again.report["held_out"] is None
    assert again.report["fvu"] == whole.report["fvu"]
    [made] = train_sae(replace(config, held_out=0.2))
    assert yaml.safe_load((made.path / "config.yaml").read_text())["held_out"] == 0.2
    assert train_sae(replace(config, resume=True))[0].report == made.report
    with pytest.raises(ValueError, match=r"held_out: 0\.2"):
        train_sae(replace(config, resume=True, held_out=0.3))


def test_held_out_rows_that_cannot_be_measured_lose_nothing(config, tmp_path):
    rows = planted(600, 8, 12, 2, noise=0.3)[0]
    rows[sorted(smallest(60))] = 0.5
    write_store(tmp_path / "same", rows, IDS)
    [made] = train_sae(replace(config, store=tmp_path / "same"))
    assert made.report["held_out"]["fvu"] is None and "same" in made.report["held_out"]["reason"]
    assert json.dumps(read_object(made.path / "report.json")) and made.model().n == 32
