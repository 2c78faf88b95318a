import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_helpers import fails
from sae_helpers import planted

from revelio.activations.store import write_store
from revelio.cli import main
from revelio.machine import duration
from revelio.pipelines.plan_sae import figures
from revelio.sae.checkpoint import save_checkpoint
from revelio.sae.config import RunConfig, TrainConfig, TrainSAEConfig
from revelio.sae.cost import Job, disk, given_speed, measured_speed, memory
from revelio.sae.dataloader import Shuffled
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train

CONFIG = RunConfig(k=4, batch_size=64, steps=10)
JOB = Job(config=CONFIG, rows=200, d=16)


def with_batch(job: Job, size: int) -> Job:
    return replace(job, config=replace(job.config, batch_size=size))


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_moments_and_files_are_what_training_makes(tmp_path):
    model = KSparseAutoencoder(16, 1024, 4)
    state = next(train(model, planted(200, 16, 20, 3)[0], TrainConfig(batch_size=64))).state
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
    data, latents = (
        replace(JOB, devices=4, config=replace(CONFIG, sharing=how)) for how in ("data", "latents")
    )
    assert memory(data).weights == memory(JOB).weights
    assert data.local_rows == 16 and latents.local_rows == 64
    assert memory(latents).weights == 4 * (2 * 256 * 16 + 256 + 16)
    one, four = given_speed(JOB, 1e9), given_speed(data, 1e9)
    # 200 rows are three batches of 64 and one of 8: 50 on average.
    encode = 2 * 50 * 1024 * 16 / 1e9
    assert one.step - four.step == pytest.approx(encode * 3 / 4)


def test_a_measured_second_is_near_the_real_step():
    """Within a factor: the machine may be busy, but a wrong unit or scale would show."""
    import time

    job = Job(config=RunConfig(k=16, expansion=128, batch_size=256, steps=10), rows=512, d=64)
    x, _ = planted(512, 64, 80, 4)
    model = KSparseAutoencoder(64, 8192, 16)
    loop = train(model, x, TrainConfig(batch_size=256, steps=12))
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
    main(["plan-ksae", "--store-rows", "1000", "--d", "8", "--k", "4", "--flops", "1e12", "--json"])
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
        (["--store-rows", "5"], "--store-rows and --d"),
        (["--store-rows", "5", "--d", "4", "--store", "."], "not both"),
        (["--store-rows", "5", "--d", "4", "--k", "999"], "k=999"),
        (["--store-rows", "5", "--d", "0"], "--d is 0"),
        (["--store-rows", "5", "--d", "2", "--k", "2", "--flops", "0"], "--flops is 0.0"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, flags, named):
    assert named in fails(capsys, "plan-ksae", *flags)


def test_a_device_holds_what_was_measured_on_an_h100():
    """PyTorch's peak, as docs/gpu.json has it: the estimate is no less, and by a quarter more at most.

    Steps held their errors to the end then, which is an array of the batch's size more than now.
    """
    from revelio.sae.cost import CONTEXT_BYTES, device_memory

    for batch, peak in ((1024, 2.78), (4096, 2.768), (16384, 3.089)):
        job = Job(config=RunConfig(batch_size=batch), rows=65_536, d=1280)
        peak -= 4 * batch * 1280 / 2**30
        assert peak < (device_memory(job) - CONTEXT_BYTES) / 2**30 < 1.25 * peak


def test_live_storages_are_counted_once_and_as_long_as_they_live():
    from tools.ksae_memory import BLOCK, Live

    kept = torch.zeros(1000)
    with Live(without=[kept]) as live:
        one = kept + 1  # 4,000 bytes: eight blocks
        view = one[10:].reshape(-1)
        assert live.now == 8 * BLOCK
        del one
        both = torch.cat([view, view])  # 7,920 bytes
        assert (live.now, len(live.parts)) == (24 * BLOCK, 2)
        del view
        both = both.sum()
    assert (live.now, live.peak) == (BLOCK, 24 * BLOCK) and both == 1980


# d, n, k, batch, AuxK: the paper's size; few rows, few latents, more codes than are chosen by candidates.
STEPS = [
    *((1280, 81_920, 32, batch, 0) for batch in (1024, 4096, 16_384, 65_536)),
    *((1280, 81_920, 32, 8192, auxk) for auxk in (64, 512)),
    *((16, 1024, 4, 64, 0), (320, 20_480, 16, 4096, 0), (512, 8192, 400, 1280, 0)),
    *((64, 4096, 32, 16_384, 0), (2560, 163_840, 4, 16_384, 0), (1280, 81_920, 256, 16_384, 0)),
    *((1280, 1_310_720, 32, 4096, 0), (4096, 131_072, 64, 16_384, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("d", "n", "k", "batch", "auxk"), STEPS)
def test_a_steps_memory_is_that_of_the_storages_that_it_makes(d, n, k, batch, auxk):
    """Counted while the CUDA kernel takes its step without launches and numbers (tools/ksae_memory.py)."""
    from revelio.sae.cost import CONTEXT_BYTES, WORKSPACE_BYTES, device_memory
    from tools.ksae_memory import held

    counted = held(d, n, k, batch, auxk)
    config = RunConfig(k=k, batch_size=batch, auxk=auxk, steps=1)
    job = Job(config=config, rows=batch, d=d, latents=n)
    planned = device_memory(job) - CONTEXT_BYTES - WORKSPACE_BYTES
    assert counted.state == memory(job).weights + memory(job).moments
    assert counted.peak <= planned - counted.state <= 1.06 * counted.peak + 2**14


def test_selection_within_the_product_holds_no_scores():
    """The goal of a tenth above parameters and moments, at the batch where nothing else is large."""
    from tools.ksae_memory import held

    after, within = (held(1280, 81_920, 32, 1024, how=how) for how in ("after", "within"))
    assert within.peak <= 0.1 * within.state < after.peak
    scores = 2 * 512 * 81_920
    assert scores / 2 < after.peak - within.peak < scores


def test_counting_leaves_triton_as_it_was():
    import sys
    from importlib.util import find_spec

    from tools.ksae_memory import without_launches

    found, loaded = find_spec("triton"), sys.modules.get("revelio.sae.kernels.cuda")
    assert without_launches().CudaKernel is not getattr(loaded, "CudaKernel", None)
    assert find_spec("triton") == found and sys.modules.get("revelio.sae.kernels.cuda") is loaded


@pytest.mark.parametrize("room", [10**6, 10**9, 4 * 10**9, 10**10, 10**12])
def test_too_little_device_memory_names_what_helps(room):
    from revelio.pipelines.plan_sae import device_shortage
    from revelio.sae.cost import device_memory, smaller_batch

    job = Job(config=RunConfig(batch_size=65_536), rows=65_536, d=1280)
    fits, said = smaller_batch([job], room), device_shortage([job], room)
    assert (said is None) == (fits == job.train.batch_size)
    if said is not None:
        assert ("take batch_size" in said) == bool(fits) and "free" in said and "--" not in said
    if fits:
        assert device_memory(with_batch(job, fits)) <= room
        assert fits == job.train.batch_size or device_memory(with_batch(job, 2 * fits)) > room
    else:
        assert device_memory(with_batch(job, 1)) > room
    several = device_shortage([job] * 3, room)
    assert several is None or "smaller grid" in several


@pytest.mark.parametrize("free", [10**6, 2 * 10**8, 10**9, 10**12, None])
def test_memory_that_runs_out_in_training_names_the_batch_that_fits(
    tmp_path, monkeypatch, capsys, free
):
    """By hand: of the batch's halves the largest whose estimate is within what is free."""
    from revelio.sae.cost import CONTEXT_BYTES, device_memory

    write_store(tmp_path / "store", torch.randn(2048, 8), [str(i) for i in range(2048)])

    def runs_out(*_given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("revelio.pipelines.train_sae._train_group", runs_out)
    monkeypatch.setattr("revelio.pipelines.train_sae.room", lambda _: free or 0)
    words = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main(
            ["train-ksae", *words, "--batch-size", "2048", "--expansion", "4096", "--held-out", "0"]
        )
    said = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and said.count("\n") == 1 and "ran out at batch_size 2048" in said
    )
    if free is None:
        assert "estimate" not in said and "smaller one in another folder" in said
        return
    jobs = {
        size: Job(config=RunConfig(batch_size=size, expansion=4096), rows=2048, d=8)
        for size in (2048 >> times for times in range(12))
    }
    need = {size: device_memory(job) - CONTEXT_BYTES for size, job in jobs.items()}
    fits = max((size for size, count in need.items() if count <= free), default=0)
    assert "by an estimate" in said and "(resume)" in said
    assert ("smaller expansion" in said) == (fits == 0)
    assert (f"batch_size {fits} fits" in said) == (0 < fits < 2048)
    assert {10**6: 0, 10**12: 2048}.get(free, fits) == fits


def test_what_is_measured_fits_however_small_a_batch_is(monkeypatch):
    made = []

    def build(d, n, k, seed):
        made.append(d * n)
        raise LookupError

    monkeypatch.setattr("revelio.sae.cost.KSparseAutoencoder", build)
    for batch_size in (1, 20, 1024):
        job = Job(
            config=RunConfig(batch_size=batch_size, k=4, steps=1), rows=2000, d=4, latents=4 * 10**8
        )
        with pytest.raises(LookupError):
            measured_speed(job)
    # Weights, gradients and moments of the last: some 400 MB.
    assert max(made) <= 1 << 24


@pytest.mark.parametrize("shape", [(6,), (6, 5, 5)])
def test_the_planners_agree_on_a_stores_rows_and_bytes(tmp_path, capsys, shape):
    write_store(tmp_path / "store", torch.randn(40, *shape), [str(i) for i in range(40)])
    on_disk = sum(path.stat().st_size for path in (tmp_path / "store").glob("shard-*"))
    words = ["--store", str(tmp_path / "store"), "--epochs", "3", "--batch-size", "16"]
    main(["plan-ksae", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["disk"]["store"] == on_disk and found["job"]["rows"] == 40
    main(["plan-ksae", *words])
    assert capsys.readouterr().out.rstrip().endswith("--epochs 3.0 --out runs/ksae")
    main(["train-ksae", *words, "--plan", "--device", "cpu", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"plan: {found['job']['steps']} steps of 16 rows" in said and "40 rows" in said


@pytest.mark.parametrize("rows", [64, 65, 100, 640, 30])
def test_a_plan_counts_an_epochs_last_batch_as_it_is(rows: int):
    """Two batches of 8,192 rows and one of 896 were planned as three full ones."""
    job = Job(config=RunConfig(k=4, batch_size=64, epochs=3), rows=rows, d=16)
    batches = [b for e in range(3) for b in Shuffled(torch.zeros(rows, 1), 64).epoch(e)]
    encode = sum(2 * len(batch) * job.n * 16 + 8 * len(batch) * 4 * 16 for batch in batches)
    assert job.train.steps == len(batches)
    assert job.train.steps * given_speed(job, 1e9).step == pytest.approx(encode / 1e9)
    seconds = figures(job, given_speed(job, 1e9))["seconds"]
    assert seconds["rows_per_second"] * seconds["total"] == pytest.approx(3 * rows)


def test_times_are_said_in_units_that_show_them():
    said = {0.004: "under 0.1 s", 0.3: "0.3 s", 0.97: "1 s", 7: "7 s", 89: "89 s", 95: "1.6 min",
            500: "8.3 min", 600: "10 min", 5000: "83 min", 5400: "1.5 h", 11520: "3.2 h"}  # fmt: skip
    assert {seconds: duration(seconds) for seconds in said} == said
    units = {"s": 1, "min": 60, "h": 3600}
    for seconds in np.geomspace(1, 1e6, 4000):
        number, unit = duration(seconds).split()
        # Half of the last figure, which is a tenth in hours and in few minutes.
        half = 0.5 if unit == "s" or (seconds >= 597 and unit == "min") else 0.05
        assert abs(float(number) - seconds / units[unit]) <= half + 1e-9


def test_a_training_too_short_for_its_warm_up_or_its_latents_is_remarked_on(tmp_path, capsys):
    write_store(tmp_path / "s", torch.randn(60, 8), [str(i) for i in range(60)])
    words = ["train-ksae", "--store", str(tmp_path / "s"), "--plan", "--device", "cpu", "--k", "2"]
    words += ["--out", str(tmp_path / "o"), "--steps", "150", "--batch-size", "20"]
    main([*words, "--expansion", "32"])
    said = capsys.readouterr().out
    assert "note: the learning rate rises over 500 (warmup_steps) of 150 steps" in said
    assert "set warmup_steps 15" in said
    assert "note: 256 latents for 60 rows" in said and "set expansion 7" in said
    main([*words, "--expansion", "7", "--warmup-steps", "15"])
    said = capsys.readouterr().out
    assert "learning rate" not in said and "latents for" not in said


def test_the_first_steps_tell_the_time_by_rows(tmp_path, monkeypatch):
    """Batches of 40 and of 20 rows, a row a second: what is left is rows, in whatever batches they come."""
    from revelio.pipelines import train_sae

    write_store(tmp_path / "s", torch.randn(60, 8), [str(i) for i in range(60)])
    told, clock = [], iter([0.0, 20.0 + 2 * 60])
    monkeypatch.setattr(train_sae, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    config = TrainSAEConfig(
        store=(tmp_path / "s",), out=tmp_path / "o", k=2, expansion=2, batch_size=40, epochs=50, device="cpu"
    )  # fmt: skip
    train_sae.train_sae(config, lambda progress: told.append(progress.message))
    (line,) = (one for one in told if "rows/s" in one)
    # 6 of 100 steps are taken: 3 of 50 epochs of 60 rows.
    assert line == "1 rows/s: about 47 min"
