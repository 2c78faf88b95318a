"""Diff-C in two processes against one."""

import json
from pathlib import Path

import pytest
import torch
from diffc_helpers import write_folders
from process_helpers import REVELIO, in_processes
from safetensors.torch import load_file
from test_diffc_commands import report_of, train_flags

from revelio import cli
from revelio.diffc.shared import Share
from revelio.pipelines import train_diffc as pipeline


@pytest.mark.parametrize("count", [0, 1, 2, 5, 97])
def test_shares_cover_everything_once(count: int) -> None:
    shares = [list(range(count)[Share(rank, 4).of(count)]) for rank in range(4)]
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes_train_what_one_does_and_go_on_with_what_one_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 8 and 9 images, dropout, kept views; one process was stopped after the first epochs."""
    data = write_folders(tmp_path / "data", 15)
    flags = ["--seeds", "2", "--batch-size", "8", "--device", "cpu", "--dropout", "0.4"]
    cli.main([*train_flags(data, tmp_path / "one"), *flags])

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "finish_seed", stops)
        with pytest.raises(SystemExit):
            cli.main([*train_flags(data, tmp_path / "two"), *flags])
    done = in_processes(2, REVELIO, *train_flags(data, tmp_path / "two"), *flags, "--resume")
    assert done.returncode == 0, "\n".join(done.stderr.splitlines()[:60])
    assert done.stdout.count("top-1 on") == 1  # the first process alone reports
    one, two = (report_of(tmp_path / name) for name in ("one", "two"))
    assert one["images"] == two["images"] and one["views"] == two["views"]
    for alone, shared in zip(one["seeds"], two["seeds"], strict=True):
        for a, b in zip(alone["history"], shared["history"], strict=True):
            assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
            # Running moments lag behind biases that a batch norm takes off again: their gradient is
            # rounding, of which Adam makes whole steps.
            assert b["validation_loss"] == pytest.approx(a["validation_loss"], rel=2e-2)
    first, second = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two")
    )
    biases = {f"blocks.{i}.0.bias" for i in range(4)} | {
        f"blocks.{i}.1.running_mean" for i in range(4)
    }
    for name in first.keys() - biases:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-3, msg=name)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
    assert not (tmp_path / "two" / "cache").exists()
