"""Several processes: how they end when one fails, and that one script can put them to work twice."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from process_helpers import in_processes

from revelio.activations.store import write_store
from revelio.command_line import one_line_errors
from revelio.distributed import Processes

LEFT_ALONE = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from revelio.command_line import one_line_errors
from revelio.distributed import launched

processes = launched("cpu")
if processes.rank == {failing}:
    dist.destroy_process_group()  # as when a process has ended
    while not Path(sys.argv[1]).exists():
        time.sleep(0.01)
else:
    try:
        with one_line_errors("revelio"):
            {exchange}
    finally:
        Path(sys.argv[1]).touch()
"""


def test_a_process_whose_peer_has_ended_says_so_in_a_line(tmp_path: Path) -> None:
    for failing, exchange in ((0, "processes.wait()"), (1, "processes.gather([1])")):
        script = tmp_path / "script.py"
        script.write_text(LEFT_ALONE.format(failing=failing, exchange=exchange))
        done = in_processes(2, script, tmp_path / f"ended-{failing}")
        left = 1 - failing
        line = f"revelio: process {left} ends, because another one has: what that one says is why\n"
        assert done.returncode == 2
        assert line in done.stderr and "Traceback" not in done.stderr


def test_one_process_says_what_all_would_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, line in (("0", "revelio: warning: one class\n"), ("1", "")):
        monkeypatch.setenv("RANK", number)
        with one_line_errors("revelio"):
            said = warnings.formatwarning(UserWarning("one class"), UserWarning, "file", 1)
        assert said == line


TWICE = """
import json, sys
from pathlib import Path
from revelio.pipelines.train_sae import TrainSAEConfig, train_sae

store, out = Path(sys.argv[1]), Path(sys.argv[2])
for seed in range(2):
    [made] = train_sae(TrainSAEConfig(
        store=(store,), out=out / str(seed), seed=seed, k=2, expansion=2, steps=3, batch_size=8, device="cpu"
    ))
"""


def test_one_script_may_train_twice_in_the_same_processes(tmp_path: Path) -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    write_store(tmp_path / "store", rows, [str(i) for i in range(40)])
    script = tmp_path / "script.py"
    script.write_text(TWICE)
    for count in (1, 2):
        done = in_processes(count, script, tmp_path / "store", tmp_path / str(count))
        assert done.returncode == 0, done.stderr[-2000:]
    for seed in "01":
        one, two = (
            json.loads((tmp_path / count / seed / "report.json").read_text())["fvu"]
            for count in "12"
        )
        assert abs(one - two) < 1e-5


def test_processes_read_token_stores_only_when_they_are_closed(tmp_path: Path, monkeypatch) -> None:
    from test_steering_store import extraction, text_config

    from revelio.pipelines import extract_text as pipeline

    job = extraction(tmp_path)
    list(job.run())
    manifest, aside = tmp_path / "text_encoder.block1" / "manifest.json", tmp_path / "aside"
    # The main process closes the stores between the second meeting of all and the third.
    meetings = iter([lambda: manifest.rename(aside), lambda: None, lambda: aside.rename(manifest)])
    other = Processes(1, 2, wait=lambda: next(meetings)() and None)
    monkeypatch.setattr(pipeline, "launched", lambda device: other)
    monkeypatch.setattr(pipeline, "the_prompts", lambda config: job.prompts)
    monkeypatch.setattr(pipeline, "open_pipeline", lambda backbone: job.source)
    [store] = pipeline.extract_text(text_config(tmp_path, "text_encoder.block1", shard_prompts=2))
    assert len(store) and next(meetings, None) is None
