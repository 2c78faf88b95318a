"""Memory that runs out in a training of Diff-C: one line names the batch that fits, and the run goes on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_helpers import fails
from diffc_helpers import separable, write_folders
from test_diffc_commands import report_of, train_flags

from revelio import cli
from revelio.diffc import cost
from revelio.diffc.config import FitConfig
from revelio.diffc.fit import Task
from revelio.diffc.fitting import training_step
from revelio.diffc.model import DiffC
from revelio.diffc.pixels import PixelsBackbone
from revelio.diffc.shared import Share
from revelio.diffc.sources import TensorGrids
from revelio.diffc.train import predict
from revelio.pipelines import train_diffc


@pytest.mark.parametrize("holds", [1, 3, 8])
def test_memory_that_runs_out_names_the_batch_that_fits_and_whole_epochs_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, holds: int
) -> None:
    """On a device that holds so many images of a batch, after the first epoch."""
    flags = train_flags(write_folders(tmp_path / "data", 16), tmp_path / "run")
    flags += ["--batch-size", "16", "--validation", "0"]
    plain, steps = DiffC.forward, []

    def forward(model: DiffC, grids: torch.Tensor) -> torch.Tensor:
        steps.append(model.training)
        # Three steps are measured beforehand, and an epoch has three.
        if sum(steps) > 3 + 4 and model.training and len(grids) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return plain(model, grids)

    with monkeypatch.context() as patch:
        patch.setattr(DiffC, "forward", forward)
        said = fails(capsys, *flags)
    largest = {1: "no smaller one fits", 3: "2 fits", 8: "8 fits"}[holds]
    assert f"batch_size 16 goes beyond the device's memory. {largest}: " in said
    assert "resume with it as it is under torchrun" in said
    assert (tmp_path / "run" / "checkpoints").exists()
    cli.main([*flags, "--resume"])
    cli.main(
        [
            *flags[: flags.index("--out")],
            "--out",
            str(tmp_path / "whole"),
            *flags[flags.index("--out") + 2 :],
        ]
    )
    one, other = (report_of(tmp_path / name)["seeds"] for name in ("run", "whole"))
    histories = [[{**end, "seconds": 0} for end in found[0]["history"]] for found in (one, other)]
    assert histories[0] == histories[1]


def held(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """A device that holds so many images in a pass of the backbone."""
    plain = PixelsBackbone.activations

    def activations(model: PixelsBackbone, encoded: torch.Tensor, *given, **named):
        if len(encoded) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return plain(model, encoded, *given, **named)

    monkeypatch.setattr(PixelsBackbone, "activations", activations)


@pytest.mark.parametrize(
    ("holds", "said"), [(0, "not even one image fits"), (1, "1 fits"), (3, "2 fits")]
)
def test_a_pass_that_makes_kept_views_names_the_one_that_fits_and_the_run_goes_on_with_it(
    tmp_path: Path, capsys, monkeypatch, holds: int, said: str
) -> None:
    flags = [*train_flags(write_folders(tmp_path / "data", 8), tmp_path / "run"), "--epochs", "1"]
    with monkeypatch.context() as patch:
        held(patch, holds)
        line = fails(capsys, *flags)
        assert said in line and "Tried to allocate" not in line
        if not holds:
            assert "image_size" in line
            return
        fits = said[0]
        assert (
            f"pass_size 8 goes beyond the device's memory: {fits} fits; resume with pass_size {fits}"
            in line
        )
        cli.main([*flags, "--pass-size", fits, "--resume"])
    cli.main(
        [
            *flags[: flags.index("--out")],
            "--out",
            str(tmp_path / "whole"),
            *flags[flags.index("--out") + 2 :],
        ]
    )
    one, other = (report_of(tmp_path / name)["seeds"][0]["last"] for name in ("run", "whole"))
    assert one == other


def test_a_batch_that_a_backbone_makes_on_line_is_tried_with_its_pass(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    """The classifier alone would take any: it is the backbone whose passes are too large."""
    flags = train_flags(write_folders(tmp_path / "data", 8), tmp_path / "run")
    flags[flags.index("--views") + 1] = "-1"
    with monkeypatch.context() as patch:
        held(patch, 5)
        said = fails(capsys, *flags, "--batch-size", "16", "--validation", "0")
    assert (
        "batch_size 16 goes beyond the device's memory. 4 fits: " in said and "kept views" in said
    )


@pytest.mark.parametrize("holds", [1, 2, 3, 7])
def test_testing_halves_its_batches_where_they_do_not_fit(monkeypatch, holds: int) -> None:
    grids, labels = separable(4)
    model, source, at_once = DiffC(6, 3, width=4, seed=0), TensorGrids([grids], labels), []
    wanted = model.eval()(grids).detach()
    plain = DiffC.forward

    def forward(model: DiffC, grids: torch.Tensor) -> torch.Tensor:
        at_once.append(len(grids))
        if len(grids) > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, grids)

    monkeypatch.setattr(DiffC, "forward", forward)
    assert torch.allclose(predict(model, source, range(12), 8), wanted, atol=1e-5)
    assert max(one for one in at_once if one <= holds) == {1: 1, 2: 2, 3: 2, 7: 4}[holds]
    monkeypatch.setattr(
        DiffC, "forward", lambda *_: forward(model, torch.zeros(holds + 1, 6, 4, 4))
    )
    with pytest.raises(torch.OutOfMemoryError):
        predict(model, source, range(12), 8)


@pytest.mark.parametrize(
    ("held", "world", "batch"), [(0.0, 1, 8), (0.25, 1, 8), (0.25, 2, 8), (0.25, 1, 32)]
)
def test_a_training_s_time_is_that_of_all_its_steps_and_passes(
    monkeypatch, held: float, world: int, batch: int
) -> None:
    """By a loop over what is done to each image, with a clock that tells what calls take."""
    grids, labels = separable(8)
    task = Task(TensorGrids([grids], labels), TensorGrids([grids[:9]], labels[:9]), ("a", "b", "c"))
    config = FitConfig(epochs=3, seeds=2, batch_size=batch, width=4, validation=held, device="cpu")
    now, runs = [0.0], []

    def took(seconds: float):
        def run(*given: Any) -> torch.Tensor:
            size = given[2] if seconds == 0.03 else len(given[2])
            runs.append(size)
            # What is done once a size counts for nothing.
            now[0] += seconds * size + (1.0 if runs.count(size) == 1 and size > 2 else 0.0)
            return torch.zeros(1)

        return run

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(cost, "training_step", took(0.03))
    monkeypatch.setattr(cost, "predict", took(0.01))
    wanted = 0.0
    for seed in range(2):
        kept, validation = task.split(config, config.seed + seed)
        for _ in range(3):
            wanted += 0.03 * len(kept) + 0.01 * len(validation)
        wanted += 0.01 * 9 * (2 if validation else 1)
    found = cost.training_seconds(task, config, Share(0, world))
    assert found == pytest.approx(wanted / world)
    assert max(runs) == batch // world


@pytest.mark.parametrize("heard", [True, False])
def test_processes_that_nobody_listens_to_wait_as_often_as_those_that_measure(
    monkeypatch, heard: bool
) -> None:
    """A caller may listen to the first process alone."""
    waits: list[int] = []
    processes: Any = SimpleNamespace(rank=0, world=2, wait=lambda: waits.append(1))
    unread: Any = None
    monkeypatch.setattr(train_diffc, "training_seconds", lambda *_: 7.0)
    found = train_diffc._seconds(unread, unread, processes, heard)
    assert len(waits) == 2 and found == (7.0 if heard else None)


def test_large_batches_are_measured_with_few_images(monkeypatch) -> None:
    now, runs = [0.0], []

    def run(size: int) -> torch.Tensor:
        runs.append(size)
        now[0] += 1.5 * size
        return torch.zeros(())

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert cost.an_image(run, 500) == 1.5 and max(runs) == 2


def test_measuring_a_step_changes_neither_weights_nor_random_state() -> None:
    grids, labels = separable(4)
    model = DiffC(6, 3, width=4, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    training_step(model, TensorGrids([grids], labels), 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
