"""Memory that runs out in a training of Diff-C: one line names the batch that fits, and the run goes on."""

from pathlib import Path

import pytest
import torch
from command_helpers import fails
from diffc_helpers import write_folders
from test_diffc_commands import report_of, train_flags

from revelio import cli
from revelio.diffc.model import DiffC


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
        if sum(steps) > 4 and model.training and len(grids) > holds:
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
