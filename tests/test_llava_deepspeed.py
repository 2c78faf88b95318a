"""The real scripts in two CPU processes: gloo, ZeRO-2, then ZeRO-3, and without.

One process without DeepSpeed is what all of them are held against: the same loss curve. A first run is
started by the real launcher, `deepspeed` and `torchrun`; others by ``in_processes``, which is faster.
"""

import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llava_helpers import tiny_llama, tiny_mpt, tiny_qwen2
from llava_train_helpers import (
    SCRIPTS,
    deepspeed_launcher,
    losses,
    record,
    run_launcher,
    tiny_project,
    torchrun,
    write_config,
    write_data,
)
from process_helpers import in_processes
from safetensors.torch import load_file, save_file

from llava_ext import deepspeed
from llava_ext.cli.command import parse
from llava_ext.config import FinetuneConfig
from llava_ext.deepspeed import checkpoint_bytes, state_bytes, zero_config
from llava_ext.model import LlavaModel
from llava_ext.run import run
from revelio.run_dir import read_json


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder and its config, with stage 1 and stage 2 done by one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("deepspeed")
    config = write_config(
        folder, tiny_project(folder, records=8), save_steps=1, keep=9, batch_size=2, epochs=2.0
    )
    for script in ("pretrain.py", "finetune.py"):
        more = ("--pretrained", folder / "pre") if script == "finetune.py" else ()
        done = in_processes(1, SCRIPTS / script, "--config", config, *more)
        assert done.returncode == 0, done.stderr
        assert "effective batch: 4 = 1 process x 2 samples x 2 accumulated" in done.stdout
    return folder, config


def same_weights(one: Path, other: Path, atol: float) -> None:
    states = [LlavaModel.from_pretrained(path / "final").state_dict() for path in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=atol, msg=name)


def test_zero_2_in_two_processes_is_one_process(project, tmp_path) -> None:
    folder, config = project
    words = ("--config", config, "--stage.zero", 2, "--out", tmp_path / "pre")
    done = run_launcher(deepspeed_launcher(), "pretrain.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "effective batch: 4 = 2 processes x 2 samples x 1 accumulated; ZeRO 2" in done.stdout
    assert losses(tmp_path / "pre") == pytest.approx(losses(folder / "pre"), rel=1e-3)
    same_weights(tmp_path / "pre", folder / "pre", 1e-3)
    final = tmp_path / "pre" / "final"
    assert not (final / "language_model").exists()
    # The frozen language model is in no checkpoint.
    states = list((tmp_path / "pre" / "checkpoints").glob("*/*/*model_states.pt"))
    held = [set(torch.load(path, weights_only=False)["module"]) for path in states]
    assert held and all(names for names in held)
    assert all(name.startswith("projectors.") for names in held for name in names)
    # Back to the middle of the second epoch, as a kill would leave it.
    resume(tmp_path / "pre", words)
    assert losses(tmp_path / "pre") == pytest.approx(losses(folder / "pre"), rel=1e-3)


def resume(out: Path, words: tuple[object, ...], script: str = "pretrain.py") -> None:
    """Cut off the end of a run and go on: the projectors must come out bit for bit as before."""
    kept = load_file(out / "final" / "projectors.safetensors")
    assert read_json(out / "manifest.json")["status"] == "finished"
    (out / "report.json").unlink()
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    done = in_processes(2, SCRIPTS / script, *words, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step 3" in done.stdout
    again = load_file(out / "final" / "projectors.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_torchrun_resumes_in_the_second_epoch(project, tmp_path) -> None:
    folder, config = project
    words = ("--config", config, "--out", tmp_path / "pre")
    done = run_launcher(torchrun(), "pretrain.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "pre") == pytest.approx(losses(folder / "pre"), rel=1e-3)
    same_weights(tmp_path / "pre", folder / "pre", 1e-3)
    resume(tmp_path / "pre", words)
    assert losses(tmp_path / "pre") == pytest.approx(losses(folder / "pre"), rel=1e-3)


def test_zero_3_in_two_processes_is_one_process(project, tmp_path) -> None:
    folder, config = project
    words = ("--config", config, "--stage.zero", 3, "--out", tmp_path / "fine")
    words = (*words, "--pretrained", folder / "pre")
    done = in_processes(2, SCRIPTS / "finetune.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "fine") == pytest.approx(losses(folder / "fine"), rel=1e-3)
    same_weights(tmp_path / "fine", folder / "fine", 1e-3)
    resume(tmp_path / "fine", words, script="finetune.py")
    assert losses(tmp_path / "fine") == pytest.approx(losses(folder / "fine"), rel=1e-3)
    same_weights(tmp_path / "fine", folder / "fine", 1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lora_under_zero_3_is_one_process(project, tmp_path, precision) -> None:
    """The language model is partitioned as it is loaded, the adapter is put in afterwards."""
    folder, config = project
    words = ("--config", config, "--pretrained", folder / "pre", "--lora.rank", 2)
    words = (*words, "--stage.precision", precision, "--stage.learning-rate", 0.01)
    alone = map(str, (*words, "--stage.threads", 1, "--out", tmp_path / "one"))
    run(parse(FinetuneConfig, list(alone), "", "finetune"))
    words = (*words, "--stage.zero", 3, "--out", tmp_path / "two")
    done = in_processes(2, SCRIPTS / "finetune.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    near = 1e-3 if precision == "float32" else 2e-2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=near)
    file = Path("final") / "adapter" / "adapter_model.safetensors"
    one, shared = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == shared.keys()
    for name, value in one.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(shared[name].float(), value, rtol=0, atol=near, msg=name)
    assert not (tmp_path / "two" / "final" / "language_model").exists()
    resume(tmp_path / "two", words, script="finetune.py")
    again = load_file(tmp_path / "two" / file)
    assert all(torch.equal(value, again[name]) for name, value in shared.items())


ENDING = """
import gc
import torch
from torch.nn.parallel import DistributedDataParallel
from llava_ext.cli import run_script

leave = torch.distributed.destroy_process_group

def leave_without_a_wrapper(*group):
    assert not any(type(one) is DistributedDataParallel for one in gc.get_objects())
    print("left")
    leave(*group)

torch.distributed.destroy_process_group = leave_without_a_wrapper
run_script("pretrain")
"""


def test_what_shares_gradients_is_freed_before_the_group(project, tmp_path) -> None:
    """As the last to hold gloo's group it would now and then wait for ever."""
    (tmp_path / "end.py").write_text(ENDING)
    words = ("--config", project[1], "--out", tmp_path / "pre")
    done = in_processes(2, tmp_path / "end.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("left") == 2


LOADING = """
import sys
from llava_ext import deepspeed
deepspeed.prepare(cpu=True)
import torch
from deepspeed.runtime import zero as ds
from llava_ext.language import load_language_model

GatheredParameters = ds.GatheredParameters
zero = deepspeed.zero_config(3, bfloat16=False, clip=1.0)
plain = deepspeed._is_plain
for gathered, folder in [(False, each) for each in sys.argv[1:]] + [(True, sys.argv[1])]:
    # Shares are read from the files alone, unless DeepSpeed keeps them in another form.
    deepspeed._is_plain = (lambda _: False) if gathered else plain
    ds.GatheredParameters = GatheredParameters if gathered else None
    wanted, found = load_language_model(folder), load_language_model(folder, zero=zero)
    shares = sum(parameter.ds_tensor.numel() for parameter in found.parameters())
    assert shares <= 0.5 * sum(parameter.numel() for parameter in wanted.parameters()) + 99
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    ids = torch.arange(12)[None]
    with GatheredParameters(list(found.parameters())), torch.no_grad():
        state = found.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in wanted.state_dict().items())
        assert torch.equal(found(ids).logits, wanted(ids).logits)
"""


def test_each_process_loads_its_share_of_a_language_model(tmp_path) -> None:
    """Tied and untied embeddings, and position tables that are no parameters."""
    folders = [
        tiny_llama(tmp_path / "llama"),
        tiny_mpt(tmp_path / "mpt"),
        tiny_qwen2(tmp_path / "q"),
    ]
    (tmp_path / "load.py").write_text(LOADING)
    done = in_processes(2, tmp_path / "load.py", *folders)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("block", [1, 7, 1 << 24])
def test_a_share_is_those_numbers_of_a_weight(tmp_path, monkeypatch, block) -> None:
    """Shares begin and end within rows, and lie over several blocks."""
    shapes = {"flat": (5,), "matrix": (6, 5), "kernel": (3, 2, 2), "number": ()}
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(whole, tmp_path / "weights.safetensors")
    monkeypatch.setattr(deepspeed, "BLOCK", block)
    for name, weight in whole.items():
        wanted = weight.numpy().ravel()
        for first in range(len(wanted)):
            for stop in range(first + 1, len(wanted) + 1):
                found = torch.zeros(stop - first, dtype=torch.bfloat16)
                deepspeed._read_into(
                    found, tmp_path / "weights.safetensors", name, shapes[name], first
                )
                assert torch.equal(found, torch.tensor(wanted[first:stop]).bfloat16())


FREED = """
from pathlib import Path
import torch
from llava_ext.deepspeed import freed_memory_returned

def kept():
    before = held()
    weights = [torch.ones(2 << 20) for _ in range(20)]
    other = [torch.ones(8) for _ in range(2000)]
    assert held() - before > 150 << 20
    weights.clear()
    return held() - before

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.ones(31 << 18)  # glibc keeps blocks up to the largest that was freed
with freed_memory_returned():
    assert kept() < 16 << 20
assert kept() > 100 << 20
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_weights_that_are_shared_out_go_back_to_the_system(tmp_path) -> None:
    (tmp_path / "freed.py").write_text(FREED)
    done = in_processes(1, tmp_path / "freed.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_cache_filled_by_two_processes_is_that_of_one(project, tmp_path) -> None:
    _, config = project
    found = {}
    for processes, name in ((1, "one"), (2, "two")):
        words = ("--config", config, "--cache", tmp_path / name, "--batch-size", 2)
        done = in_processes(processes, SCRIPTS / "cache_towers.py", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 stores in" in done.stdout
        files = sorted((tmp_path / name).rglob("*.safetensors"))
        found[name] = {file.relative_to(tmp_path / name): file.read_bytes() for file in files}
    assert found["one"] == found["two"] and len(found["one"]) >= 2


def test_zero_without_a_launcher(project, tmp_path) -> None:
    folder, config = project
    words = ("--config", config, "--out", tmp_path / "pre", "--stage.zero", 2)
    done = in_processes(1, SCRIPTS / "pretrain.py", "--local_rank=0", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "pre") == pytest.approx(losses(folder / "pre"), rel=1e-3)


def test_a_mistake_is_one_line_and_status_2(project, tmp_path) -> None:
    folder, config = project
    bad = write_data(tmp_path / "bad.json", [record(0), record(1, image="99.png")])
    for words, message in [
        (("--data.json", bad), "record 1 (id 'r1'): no image 99.png"),
        (("--stage.batch-size", 3), "effective_batch 4 is not a multiple"),
        (("--out", folder / "pre"), "already holds a run"),
        (("--cache", tmp_path), "no finished cache"),
    ]:
        extra = () if "--out" in words else ("--out", tmp_path / "out")
        done = in_processes(1, SCRIPTS / "pretrain.py", "--config", config, *extra, *words)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_help_needs_no_torch() -> None:
    for script in ("pretrain.py", "finetune.py", "cache_towers.py", "show_sample.py"):
        code = (
            "import runpy, sys; sys.argv = ['x', '--help']\n"
            f"try: runpy.run_path('scripts/{script}', run_name='__main__')\n"
            "except SystemExit as stop: assert not stop.code\n"
            "assert 'torch' not in sys.modules"
        )
        done = run_code(code)
        assert done == "", (script, done)


def run_code(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS.parent)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_config(stage: int) -> None:
    config = zero_config(stage, bfloat16=True, clip=1.0)
    assert config["zero_optimization"]["stage"] == stage and config["bf16"] == {"enabled": True}
    assert ("stage3_gather_16bit_weights_on_model_save" in config["zero_optimization"]) == (
        stage == 3
    )


def test_memory_of_a_process_and_offload() -> None:
    """Stage 2 of a 7B model: 106 GB on one process, as the configs' comments say."""
    mpt = 6_650_000_000
    shares = [state_bytes(mpt, 0, zero=3, processes=count) / 1e9 for count in (1, 2, 4, 8)]
    assert [round(share) for share in shares] == [106, 53, 27, 13]
    assert round(state_bytes(60_000_000, mpt, zero=2, processes=2) / 1e9) == 14
    assert state_bytes(10, 0, zero=0, processes=1) == 160
    # Several processes exchange gradients in buckets of their own.
    assert state_bytes(10, 0, zero=0, processes=4) == 200
    # Files that DeepSpeed wrote in bfloat16: two processes' optimisers and the model; the optimisers alone.
    for zero, written in ((2, 2_334_917 + 2_334_853 + 805_093), (3, 2 * 2_334_661)):
        assert checkpoint_bytes(388_224, zero=zero, bfloat16=True) == pytest.approx(
            written, rel=0.01
        )
    assert state_bytes(10, 5, zero=2, processes=2, weight=4) == 4 * 15 + (4 + 12) * 10 // 2
    zero = zero_config(3, bfloat16=True, clip=1.0, offload=True)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert (
        "offload_param"
        not in zero_config(2, bfloat16=True, clip=1.0, offload=True)["zero_optimization"]
    )


def test_every_config_file_is_read_by_both_stages() -> None:
    from llava_ext.cli.command import read_section
    from llava_ext.config import CacheConfig, PretrainConfig

    root = Path(__file__).resolve().parents[1] / "configs" / "llava"
    files = sorted(root.rglob("*.yaml"))
    rows = {"clip", "clip-dinov2", "clip-sd-t25", "clip-sd-t200"}
    living = {"vicuna-7b", "smollm2-1.7b", "vicuna-7b-qlora", "qwen2.5-7b", "qwen3-8b"}
    assert {path.stem for path in files} == rows | living and len(files) == 13
    for path in files:
        one = read_section(path, "pretrain", PretrainConfig)
        two = read_section(path, "finetune", FinetuneConfig)
        assert one.model == two.model == read_section(path, "pretrain", CacheConfig).model
        assert two.pretrained == one.out and one.data != two.data
        if path.parent == root:
            assert (one.stage.effective_batch, one.stage.learning_rate, one.stage.zero) == (
                128,
                2e-3,
                2,
            )
            assert bool(two.lora.rank) == (one.load_in == two.load_in == "4bit")
            assert (two.stage.effective_batch, two.stage.learning_rate, two.stage.zero) == (
                (128, 2e-4, 2) if two.load_in else (128, 2e-5, 3)
            )
            assert one.stage.warmup == two.stage.warmup == 0.03 and two.stage.epochs == 1.0
            sizes = [(tower.tokens, tower.budget) for tower in one.model.towers]
            assert all(size in (("flatten", 256), ("conv", 256)) for size in sizes)


def test_config_keys_are_strict(tmp_path: Path) -> None:
    from llava_ext.cli.command import read_section
    from llava_ext.config import PretrainConfig

    path = tmp_path / "c.yaml"
    path.write_text("pretrain: {stage: {learning_rat: 1.0}}\nfinetune: {lora: {rank: 4}}\n")
    with pytest.raises(
        ValueError, match=r"c\.yaml: unknown key `stage.learning_rat`: did you mean"
    ):
        read_section(path, "pretrain", PretrainConfig)
    path.write_text("modle: {}\n")
    with pytest.raises(ValueError, match="unknown key `modle`: did you mean `model`"):
        read_section(path, "pretrain", PretrainConfig)
    path.write_text("limit: 3\npretrain: {limit: 4, out: here}\n")
    words = ["--local_rank=1", "--config", str(path), "--stage.batch-size", "2"]
    found = parse(PretrainConfig, words, "", "pretrain")
    assert (found.limit, found.out, found.stage.batch_size) == (4, Path("here"), 2)
    assert replace(found.stage, batch_size=4) == PretrainConfig().stage
