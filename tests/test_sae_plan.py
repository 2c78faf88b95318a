import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from sae_helpers import planted

from revelio.activations.store import write_store
from revelio.cli import main
from revelio.sae.checkpoint import save_checkpoint
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.plan import Job, disk, given_speed, measured_speed, memory
from revelio.sae.state import TrainSettings
from revelio.sae.train import train

JOB = Job(rows=200, d=16, n=1024, k=4, batch_size=64, steps=10)


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_moments_and_files_are_what_training_makes(tmp_path):
    model = KSparseAutoencoder(16, 1024, 4)
    state = next(train(model, planted(200, 16, 20, 3)[0], TrainSettings(batch_size=64))).state
    found = memory(JOB)
    assert found.weights == bytes_of(*model.parameters())
    moments = (state.moments.W_enc, state.moments.W_dec, state.moments.b_enc, state.moments.b_dec)
    assert found.moments == bytes_of(*(part for of in moments for part in (of.mean, of.square)))
    assert found.total == sum(asdict(found).values())
    (tmp_path / "checkpoint").mkdir()
    save_checkpoint(tmp_path / "checkpoint", model, state)
    model.save_pretrained(tmp_path / "final")
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint").iterdir())
    assert disk(JOB).checkpoint == pytest.approx(size, rel=0.02)
    size = (tmp_path / "final/model.safetensors").stat().st_size
    assert disk(JOB).model == pytest.approx(size, rel=0.02)
    assert disk(JOB).written == disk(JOB).model + 3 * disk(JOB).checkpoint
    assert disk(JOB).store == 4 * 200 * 16


def test_sharing_splits_what_it_says():
    data, latents = (replace(JOB, devices=4, sharing=how) for how in ("data", "latents"))
    assert memory(data).weights == memory(JOB).weights
    assert data.local_rows == 16 and latents.local_rows == 64
    assert memory(latents).weights == 4 * (2 * 256 * 16 + 256 + 16)
    one, four = given_speed(JOB, 1e9), given_speed(data, 1e9)
    encode = 2 * 64 * 1024 * 16 / 1e9
    assert one.step - four.step == pytest.approx(encode * 3 / 4)


def test_a_measured_second_is_near_the_real_step():
    """Within a factor: the machine may be busy, but a wrong unit or scale would show."""
    import time

    job = Job(rows=512, d=64, n=8192, k=16, batch_size=256, steps=10)
    x, _ = planted(512, 64, 80, 4)
    model = KSparseAutoencoder(64, 8192, 16)
    loop = train(model, x, TrainSettings(batch_size=256, steps=12))
    next(loop)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        next(loop)
        times.append(time.perf_counter() - began)
    real = sorted(times)[4]
    found = measured_speed(job, seconds=0.3)
    assert real / 8 < found.step < real * 8
    assert found.slowest >= found.step


def test_the_command_takes_sizes_or_a_store(tmp_path: Path, capsys):
    main(["plan-ksae", "--rows", "1000", "--d", "8", "--k", "4", "--flops", "1e12", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["job"]["n"] == 512
    assert found["seconds"]["total"] == pytest.approx(10240 * found["seconds"]["step"])
    write_store(tmp_path / "s", torch.randn(30, 8).half(), [str(i) for i in range(30)])
    main(["plan-ksae", "--store", str(tmp_path / "s"), "--expansion", "4", "--k", "4"])
    page = capsys.readouterr().out
    assert "d 8, n 32, k 4" in page and "measured" in page
    assert "30 rows, 10,240 steps of 30" in page


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rows", "5"], "--rows and --d"),
        (["--rows", "5", "--d", "4", "--store", "."], "not both"),
        (["--rows", "5", "--d", "4", "--k", "999"], "k=999"),
        (["--rows", "5", "--d", "0"], "--d is 0"),
        (["--rows", "5", "--d", "2", "--k", "2", "--flops", "0"], "--flops is 0.0"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, flags, named):
    with pytest.raises(SystemExit) as stopped:
        main(["plan-ksae", *flags])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_measured_fits_however_small_a_batch_is(monkeypatch):
    made = []

    def build(d, n, k):
        made.append(n)
        raise LookupError

    monkeypatch.setattr("revelio.sae.plan.KSparseAutoencoder", build)
    for batch_size in (1, 20, 1024):
        job = Job(rows=2000, d=4, n=4 * 10**8, k=4, batch_size=batch_size, steps=1)
        with pytest.raises(LookupError):
            measured_speed(job)
    # Weights, gradients and moments of the last: some 400 MB.
    assert made == [3_051_757] * 3
