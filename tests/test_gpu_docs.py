"""docs/gpu.md and docs/scaling.md are what their JSON says; the cluster's scripts use flags that exist."""

import json
import re
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from llava_ext.config import CacheConfig, FinetuneConfig, PretrainConfig
from revelio.cli import extract, train_ksae
from revelio.run_dir import write_json
from tools import gpu_page, scaling, scaling_runs
from tools.scaling import Rates

ROOT = Path(__file__).parent.parent
GPU = json.loads((ROOT / "docs/gpu.json").read_text())
FIGURES = json.loads((ROOT / "docs/scaling.json").read_text())
SCRIPTS = sorted((ROOT / "configs/cluster").glob("*.sbatch"))
TAKES = {
    "-m revelio extract": extract.Config,
    "-m revelio train-ksae": train_ksae.Config,
    "scripts/cache_towers.py": CacheConfig,
    "scripts/pretrain.py": PretrainConfig,
    "scripts/finetune.py": FinetuneConfig,
}


@pytest.mark.parametrize("tool", [gpu_page, scaling])
def test_pages_are_what_the_json_says(tool, tmp_path, capsys) -> None:
    assert tool.main(["--docs", str(ROOT / "docs"), "--check"]) == 0
    for name in (
        "gpu.json",
        "gpu_compiled.json",
        "gpu.md",
        "gpu_memory.json",
        "scaling.json",
        "scaling.md",
    ):
        (tmp_path / name).write_text((ROOT / "docs" / name).read_text())
    (tmp_path / "benchmarks").mkdir()
    name = "benchmarks/plans.json"
    (tmp_path / name).write_text((ROOT / "docs" / name).read_text())
    changed = json.loads((tmp_path / "gpu.json").read_text())
    changed["extraction"]["seconds"]["one timestep from scratch"] *= 2
    changed["extraction"]["images_per_second"]["one timestep from scratch"] /= 2
    (tmp_path / "gpu.json").write_text(json.dumps(changed))
    assert tool.main(["--docs", str(tmp_path), "--check"]) == 1
    assert "is not what gpu.json says" in capsys.readouterr().out


def test_what_is_absent_is_said() -> None:
    text = (ROOT / "docs/gpu.md").read_text()
    last = {one["batch"] for one in GPU["ksae"]["runs"][-1]["batches"]}
    assert 16_384 not in last and re.search(r"\| 16,384 \| not measured", text)
    for what in GPU["not_run"]:
        assert f"- {what}" in text
    assert GPU["card"] in text and text.count("nan") == 0


def test_the_ceiling_of_the_products_share_is_the_time_that_memory_takes() -> None:
    """By hand: six float32 matrices of n x d and six of the biases, read and written at 3.35 TB/s."""
    ksae = GPU["ksae"]
    n, d = ksae["n"], ksae["d"]
    moved = 2 * 4 * 3 * (2 * n * d + n + d) / 3.35e12 * 1e3
    said = re.search(
        r"once, ([\d.]+) ms at .* would be (.*?)\. The goal", (ROOT / "docs/gpu.md").read_text()
    )
    assert said and float(said[1]) == pytest.approx(moved, abs=0.005)
    shares = {
        int(size.replace(",", "")): float(share)
        for share, size in re.findall(r"(\d+) % at ([\d,]+\d)", said[2])
    }
    last = ksae["runs"][-1]["batches"]
    assert set(shares) == {1_024, 4_096, 16_384}
    for one in last:
        product = one["product_alone_ms"]["float16"]
        assert shares[one["batch"]] == pytest.approx(100 * product / (product + moved), abs=0.51)


def test_times_on_more_gpus_and_the_other_card() -> None:
    """By hand from the raw seconds: 10 M images, the two data sheets' ratios, eight and 32 GPUs."""
    seconds, images = GPU["extraction"]["seconds"], GPU["extraction"]["settings"]["images"]
    job = next(job for job in FIGURES["jobs"] if job["name"] == "10 M images: extraction")
    one = 1e7 / images * seconds["one timestep from scratch"] / 3600
    for place, count in (("one", 1), ("eight", 8), ("four nodes of eight", 32)):
        hours = job["hours"][place]
        assert hours["H100"] == pytest.approx(one / count, rel=6e-3)
        assert hours["A100"] == pytest.approx(
            [one / count * 3.35 / 2, one / count * 989 / 312], rel=6e-3
        )
    assert job["disk_gb"] == pytest.approx(10_000_000 * 1280 * 2 / 1e9, rel=6e-3)
    for each in FIGURES["jobs"]:
        assert each["basis"] in ("extrapolated", "assumed")
        assert ("LLaVA" in each["name"]) == (each["basis"] == "assumed")


def test_a_step_lies_between_the_measured_ones() -> None:
    rates = Rates.of(GPU)
    for batch, seconds in rates.steps.items():
        assert rates.step(batch) == seconds
    sizes = [256, 1024, 2000, 4096, 8192, 16_384, 32_768]
    times = [rates.step(size) for size in sizes]
    assert times == sorted(times)
    assert rates.step(8192) == pytest.approx((2 * 7.355 + 17.408) / 3000, rel=1e-6)
    assert rates.step(32_768) == 2 * rates.step(16_384)


def test_the_formulas_are_near_what_was_measured() -> None:
    for check in FIGURES["checks"]:
        low = 0.01 if "lower bound" in check["what"] else 0.85
        assert low < check["ratio"] < 1.15, check


def flags_of(cls, above="") -> set[str]:
    hints, found = get_type_hints(cls), set()
    for field in fields(cls):
        name = f"{above}{field.name}".replace("_", "-")
        inner = hints[field.name]
        found |= flags_of(inner, f"{name}.") if is_dataclass(inner) else {f"--{name}"}
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_cluster_scripts_are_bash_with_flags_that_exist(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text().replace("\\\n", " ")
    found = 0
    for line in text.splitlines():
        for call, cls in TAKES.items():
            if call in line and not line.startswith("#"):
                own = re.findall(r"(--[a-z][\w.-]*)", line.split(call)[1])
                assert set(own) <= flags_of(cls) | {"--config"}, line
                found += 1
    assert found == (2 if "extract" in path.name else 3)
    for named in re.findall(r"(configs/[\w./-]+\.yaml|scripts/\w+\.py)", text):
        assert (ROOT / named).exists()


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_the_effective_batch_stays_128(nodes: int) -> None:
    text = next(path for path in SCRIPTS if path.name == "llava.sbatch").read_text()
    lines = [line for line in text.splitlines() if re.match(r"(gpus|batch)=", line)]
    sizes = (
        f"SLURM_JOB_NUM_NODES={nodes}; SLURM_GPUS_ON_NODE=8; {'; '.join(lines)}; echo $gpus $batch"
    )
    said = subprocess.run(["bash", "-c", sizes], capture_output=True, text=True, check=True).stdout
    gpus, batch = map(int, said.split())
    assert gpus == 8 * nodes and 128 % (gpus * batch) == 0 and 1 <= batch <= 16


def test_first_commands_make_the_smallest_cache_of_the_table() -> None:
    """What README and the script keep is the row of docs/llava_data.md that takes the least disk."""
    table = (ROOT / "docs" / "llava_data.md").read_text()
    rows = re.findall(r"^\| `(\w+)`.*\| ([\d.]+) ([GT]B) \| .* \|$", table, re.MULTILINE)
    sizes = {keep: float(size) * {"GB": 1, "TB": 1000}[unit] for keep, size, unit in rows}
    assert len(sizes) == 3
    smallest = min(sizes, key=lambda keep: sizes[keep])
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"^revelio llava cache .*--keep (\w+)", readme, re.MULTILINE) == [smallest]
    script = (ROOT / "configs" / "cluster" / "llava.sbatch").read_text()
    assert re.findall(r"^KEEP=\$\{KEEP:-(\w+)\}", script, re.MULTILINE) == [smallest]
    assert re.search(r"cache_towers\.py [^\n]*\\\n +--keep \"\$KEEP\"", script)


def test_plans_are_read_from_the_lines_that_users_read(tmp_path) -> None:
    """The lines of a cache, an extraction and a k-SAE; seconds between two lines, bytes of files."""
    (tmp_path / "shard.safetensors").write_bytes(bytes(2_000_000))
    write_json(tmp_path / "report.json", {"seconds": 7.5})
    extracted = scaling_runs.Ran(
        [
            (3.0, "plan: 1,600 images (1,600 to encode), 2 passes each, at 80 images/s in 2 processes: 20 s; "
             "4 stores, 1.9 MB (59.5 GB free)"),
            (28.0, "4 stores in out, 1.01 MB, in 25 s"),
        ], 0, 0,
    )  # fmt: skip
    found = scaling_runs.figures("extract --out OUT", extracted, tmp_path)
    assert found == {"s": [20, 25], "disk, MB": [1.9, 2]}
    cached = scaling_runs.Ran(
        [
            (1.0, "plan: 560 of 560 images, 2 towers, 2 processes; 59.5 GB free at c; in training\n"
             "  -> grids      4.01 MB, 6 s at 98.3 images/s; no tower runs"),
            (8.5, "2 stores in 7 s"),
        ], 0, 0,
    )  # fmt: skip
    found = scaling_runs.figures("llava cache", cached, tmp_path)
    assert found == {"s": [pytest.approx(560 / 98.3), 7.5], "disk, MB": [4.01, 2]}
    line = "plan: 400 steps of 128 rows, 2 s to 3 min (measured); memory 331 MB a process (2 processes share "
    line += "the batches) (18.8 GB available); disk 1.5 GB"
    trained = scaling_runs.Ran([(1.0, line)], 310_000_000, 1_400_000_000)
    assert scaling_runs.figures("train-ksae", trained, tmp_path) == {
        "s": [180, 7.5],
        "memory of a process, MB": [331, 310],
        "disk at most, MB": [1500, 1400],
    }


def test_plans_of_diff_c_and_of_the_papers_items_are_read_likewise(tmp_path) -> None:
    out, views = tmp_path / "out", tmp_path / "out-views"
    (out / "rows").mkdir(parents=True)
    views.mkdir()
    write_json(out / "report.json", {"seconds": {"views": 9.0, "training": 33.0}})
    (views / "a-v0.bin").write_bytes(bytes(39_000_000))
    for name in ("shard-00000", "model", "top_images"):
        (out / "rows" / f"{name}.safetensors").write_bytes(bytes(1_000_000))
    lines = [
        "train grids: 2,400 of 128x8x8, 39.3 MB in out-views, 300 images/s, about 8 s",
        "test grids: 400 of 128x8x8, 6.55 MB in out-views, 400 images/s, about 1 s",
        "training: 1,080 images x 6 epochs x 1 seed, 0.0313 GMAC an image forward, 1.21 TFLOP in all, 1.6 "
        "min with the tests (measured); views kept",
    ]
    ran = scaling_runs.Ran([(1.0, line) for line in lines], 0, 0)
    assert scaling_runs.figures("train-diffc --out OUT", ran, out) == {
        "views, s": [9, 9.0],
        "trainings and tests, s": [96, 33.0],
        "kept views, MB": [pytest.approx(45.85), 39],
    }
    lines = [
        "plan: 3 runs, 11.4 MB on disk, about 30 s at 0.03 TFLOP/s",
        "wrote out/figure3.md and figure3.json",
    ]
    ran = scaling_runs.Ran([(0.0, lines[0]), (54.0, lines[1])], 0, 0)
    assert scaling_runs.figures("reproduce figure3 --out OUT", ran, out) == {
        "s of multiplications (a lower bound)": [30, 54.0],
        "disk, MB": [11.4, 2],
    }


def test_plans_are_near_what_was_measured() -> None:
    """Sizes within an eighth, lower bounds below, times on a shared machine within a factor of three."""
    assert len(FIGURES["plans"]) > 20
    for row in FIGURES["plans"]:
        if "lower bound" in row["what"]:
            low, high = 0.01, 1.0
        else:
            low, high = (1 / 3, 3.0) if row["what"].endswith(", s") else (0.875, 1.125)
        assert low < row["ratio"] < high, row
