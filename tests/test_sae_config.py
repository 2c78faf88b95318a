"""Settings of a k-SAE: declared once, checked by their bounds, carried whole from YAML to the training."""

import ast
import subprocess
import sys
from dataclasses import fields, replace
from math import ceil
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sae_helpers import planted

import revelio
from revelio.activations.store import write_store
from revelio.cli import plan_ksae, train_ksae
from revelio.config import load_config, to_plain, to_yaml
from revelio.pipelines import Progress
from revelio.pipelines.train_sae import plan_sae, train_sae
from revelio.sae.config import RunConfig, SAEConfig, SweepConfig, TrainConfig, TrainSAEConfig
from revelio.sae.cost import Job
from revelio.sae.dataloader import batches_of
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train

ROOT = Path(__file__).parent.parent
HOME = ROOT / "revelio/sae/config.py"
# How a run folder of the first version has its settings: in that version's order, plan and grid included.
FIRST_ORDER = (
    "store", "out", "mode", "k", "expansion", "activation",
    "prefixes", "steps", "epochs", "samples", "batch_size", "learning_rate",
    "warmup_steps", "seed", "order_seed", "pre_bias", "auxk", "auxk_coefficient",
    "dead_after", "bandwidth", "sparsity", "early_stop", "early_stop_window", "memory_gib",
    "workers", "log_every", "checkpoint_every", "device", "kernel", "sharing",
    "grid", "plan", "resume",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "up_ft1-t25-empty-d0"
    write_store(folder, planted(90, 8, 12, 2, noise=0.1)[0], [str(i) for i in range(90)])
    return folder


def own(cls: type) -> set[str]:
    """The fields that a class declares itself."""
    return set(cls.__annotations__) & {field.name for field in fields(cls)}


def test_commands_inherit_the_settings_and_declare_none_again():
    settings = {f.name for f in fields(RunConfig)}
    assert own(SAEConfig) | own(TrainConfig) | own(RunConfig) == settings
    assert not own(SAEConfig) & own(TrainConfig)
    assert own(train_ksae.Config) == {"plan"}
    assert issubclass(train_ksae.Config, TrainSAEConfig) and issubclass(plan_ksae.Config, RunConfig)
    for cls in (TrainSAEConfig, train_ksae.Config, plan_ksae.Config):
        assert not own(cls) & settings
    # A sweep lists values of the same types as the settings that it varies.
    for name, kind in get_type_hints(SweepConfig, include_extras=True).items():
        if name != "store":  # of which a k-SAE takes several too
            assert kind == tuple[get_type_hints(TrainSAEConfig, include_extras=True)[name], ...]


def test_every_setting_is_documented_and_of_a_command_line_s_order_it_is_free():
    tree = ast.parse(HOME.read_text(encoding="utf-8"))
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for at, node in enumerate(cls.body):
            # What belongs to the class, not to its settings, needs no help text.
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                text = cls.body[at + 1]
                assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), (
                    node.target
                )
    with pytest.raises(TypeError):
        TrainConfig(100)  # type: ignore[misc]


def test_settings_need_no_torch():
    code = "import sys, revelio.sae.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (SAEConfig, {"k": 0}),
        (SAEConfig, {"expansion": 0}),
        (SAEConfig, {"prefixes": (0,)}),
        (TrainConfig, {"batch_size": 0}),
        (TrainConfig, {"learning_rate": float("nan")}),
        (TrainConfig, {"learning_rate": 2.0}),
        (TrainConfig, {"early_stop": 1.0}),
        (TrainConfig, {"epochs": 0.0}),
        (TrainConfig, {"workers": -1}),
    ],
)
def test_a_value_outside_its_bounds_is_refused_under_the_field_s_name(cls, bad, store, tmp_path):
    [name] = bad
    with pytest.raises(ValueError, match=f"^{name}=.*give") as refused:
        cls(**bad)
    assert "--" not in str(refused.value)
    # Command lines check by flag; a pipeline checks before it makes anything.
    config = TrainSAEConfig(store=store, out=tmp_path / "out", **bad)
    for call in (train_sae, plan_sae):
        with pytest.raises(ValueError, match=f"^{name}="):
            call(config)
    with pytest.raises(ValueError, match=f"^{name}="):
        Job(config=config, rows=90, d=8)
    assert not (tmp_path / "out").exists()


@given(
    rows=st.integers(1, 500),
    size=st.integers(1, 100),
    epochs=st.none() | st.floats(0.1, 5),
    samples=st.none() | st.integers(1, 2000),
)
def test_epochs_and_samples_become_the_steps_that_reading_the_rows_takes(
    rows, size, epochs, samples
):
    if epochs is not None and samples is not None:
        with pytest.raises(ValueError, match="not both"):
            TrainConfig(batch_size=size, epochs=epochs, samples=samples)
        return
    config = TrainConfig(batch_size=size, epochs=epochs, samples=samples, steps=7)
    found = config.for_rows(rows)
    an_epoch = len(list(batches_of(torch.zeros(rows, 1), config).epoch(0)))
    passes = epochs if samples is None else samples / rows
    assert found.steps == (7 if passes is None else ceil(passes * an_epoch))
    assert found.batch_size == max(map(len, batches_of(torch.zeros(rows, 1), config).epoch(0)))
    assert found.for_rows(rows) == found


def test_training_takes_epochs_where_it_knows_the_rows_and_says_so_where_not():
    rows, config = planted(50, 8, 12, 2)[0], TrainConfig(epochs=2, batch_size=20)
    assert len(list(train(KSparseAutoencoder(8, 32, 3), rows, config))) == 6
    with pytest.raises(ValueError, match="give steps"):
        next(train(KSparseAutoencoder(8, 32, 3), [rows], config))


def test_the_pipeline_returns_what_it_made_and_prints_nothing(store, tmp_path, capfd):
    said: list[Progress] = []
    config = TrainSAEConfig(
        store=store, out=tmp_path / "runs", k=3, expansion=4, batch_size=32, epochs=2, kernel="torch",
        grid=SweepConfig(k=(2, 3)),
    )  # fmt: skip
    jobs = plan_sae(config, said.append)
    assert [(job.config.k, job.n, job.train.steps) for job in jobs] == [(2, 32, 6), (3, 32, 6)]
    assert not config.out.exists() and any("plan: 6 steps" in one.message for one in said)
    made = train_sae(config, said.append)
    assert [run.path for run in made] == [tmp_path / "runs/k2", tmp_path / "runs/k3"]
    for run, k in zip(made, (2, 3), strict=True):
        model = run.model()
        assert (model.k, model.n, run.report["steps"]) == (k, 32, 6)
        assert run.report["fvu"] == model.trained_on["fvu"]
        # The same object trains in the library, to the same bits.
        alone = KSparseAutoencoder(**replace(config, k=k).sizes(8))
        rows = torch.cat([batch for _, batch in revelio.ActivationStore.open(store).batches(64)])
        for _ in revelio.train(alone, rows, replace(config, k=k), kernel=alone.kernel):
            pass
        assert torch.equal(alone.W_dec, model.W_dec)
    counted = [one.done for one in said if one.total]
    assert counted == list(range(1, 13))
    again = train_sae(replace(config, resume=True))
    assert [run.report for run in again] == [run.report for run in made]
    assert capfd.readouterr().out == ""


def test_a_run_folder_in_the_first_version_s_order_resumes(store, tmp_path):
    config = train_ksae.Config(
        store=store, out=tmp_path / "run", steps=3, kernel="torch", k=3, expansion=4
    )
    assert sorted([*FIRST_ORDER, "held_out", "rows", "normalize", "decay"]) == sorted(
        to_plain(config)
    )
    [made] = train_sae(config)
    path = tmp_path / "run/config.yaml"
    plain = to_plain(config)
    old = yaml.safe_dump({name: plain[name] for name in FIRST_ORDER}, sort_keys=False)
    assert old != to_yaml(config)
    assert load_config(train_ksae.Config, path) == replace(config, held_out=0.1)
    path.write_text(old)
    assert train_sae(replace(config, resume=True))[0].report == made.report
    with pytest.raises(ValueError, match="k: 3"):
        train_sae(replace(config, resume=True, k=4))


@pytest.mark.parametrize("grids", [False, True])
@pytest.mark.parametrize(("auxk", "dead_after"), [(0, 10), (4, 90), (4, 91)])
def test_the_plan_says_that_grids_are_averaged_and_that_auxk_cannot_act(
    grids, auxk, dead_after, tmp_path
):
    rows = planted(90, 8, 12, 2)[0]
    write_store(
        tmp_path / "s", rows[:, :, None, None].repeat(1, 1, 2, 2) if grids else rows,
        [str(i) for i in range(90)],
    )  # fmt: skip
    config = TrainSAEConfig(
        store=tmp_path / "s", out=tmp_path / "out", k=3, expansion=4, epochs=2, kernel="torch",
        auxk=auxk, dead_after=dead_after,
    )  # fmt: skip
    said: list[Progress] = []
    plan_sae(config, said.append)
    notes = [one.message for one in said if one.message.startswith("note: ")]
    assert any("grids" in note for note in notes) == grids
    # Two steps of 90 rows: a latent that never fires is dead in the second one if 90 rows suffice.
    assert any("auxk cannot act" in note for note in notes) == (auxk > 0 and dead_after > 90)


def test_public_names():
    assert revelio.TrainConfig is TrainConfig and revelio.train is train
    assert {"KSparseAutoencoder", "TrainConfig", "train"} <= set(revelio.__all__)
