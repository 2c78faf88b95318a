"""A tiny LLaVA project in a folder: towers, language model, pictures, data, and a config for the scripts."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from backbones_helpers import picture, tiny_clip, tiny_sd
from llava_helpers import model_config, tiny_llama

from llava_ext.config import ConversationData, ModelConfig, PretrainConfig, TowerConfig
from llava_ext.deepspeed import free_port
from llava_ext.stages import Pretrain
from revelio.config import to_plain

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SMALL = {"effective_batch": 4, "batch_size": 2, "zero": 0, "threads": 1, "save_steps": 2}
WORDS = ("dog", "cat", "green grass", "a small picture", "it")


def tiny_project(folder: Path, *, records: int = 16) -> ModelConfig:
    """Everything that a stage reads, below ``folder``; gives the model's config."""
    clip, sd = tiny_clip(folder / "clip"), tiny_sd(folder / "sd")
    towers = (
        TowerConfig(str(clip), "block1", tokens="pool", budget=4),
        TowerConfig(str(sd), "up_ft1", timestep=25, tokens="conv", budget=16, width=12),
    )
    towers = (towers[0], replace(towers[1], tokens="pool", budget=4))
    (folder / "images").mkdir()
    for number in range(records):
        picture(number).save(folder / "images" / f"{number}.png")
    write_data(folder / "data.json", [record(number) for number in range(records)])
    return model_config(tiny_llama(folder / "lm"), *towers, template="tokenizer", system="")


def record(number: int, **changes: Any) -> dict[str, Any]:
    """A record of LLaVA's form, about image ``number``; answers differ in length."""
    answer = " ".join(WORDS[: 1 + number % len(WORDS)])
    turns = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": f"r{number}", "image": f"{number}.png", "conversations": turns} | changes


def write_data(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records))
    return path


def data_options(folder: Path) -> ConversationData:
    return ConversationData(folder / "data.json", folder / "images")


def pretrain(project: tuple[Path, ModelConfig], out: Path, **changes: object) -> PretrainConfig:
    """A first stage on a project; ``stage`` changes its options."""
    folder, model = project
    stage = Pretrain(**{**SMALL, **changes.pop("stage", {})})  # type: ignore[arg-type, dict-item]
    return replace(
        PretrainConfig(out=out, data=data_options(folder), model=model, stage=stage),
        **changes,  # type: ignore[arg-type]
    )


def write_config(folder: Path, model: ModelConfig, **stage: Any) -> Path:
    """A YAML for both stages."""
    common = {"effective_batch": 4, "batch_size": 1, "zero": 0, "precision": "float32"} | stage
    data = {"json": str(folder / "data.json"), "images": str(folder / "images")}
    values = {
        "model": to_plain(model),
        "pretrain": {"data": data, "out": str(folder / "pre"), "stage": common},
        "finetune": {"data": data, "out": str(folder / "fine"), "stage": common},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def deepspeed_launcher() -> tuple[str, ...]:
    # Without an empty host file the launcher would look for one of this machine's.
    port = str(free_port())
    flags = ("--num_accelerators", "2", "--master_port", port, "--hostfile", "/dev/null")
    return (sys.executable, str(Path(sys.executable).parent / "deepspeed"), *flags)


def torchrun() -> tuple[str, ...]:
    port = str(free_port())
    run = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    return (sys.executable, *run)


def run_launcher(
    launcher: tuple[str, ...], script: str, *words: Any, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user of a launcher does."""
    known = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment = known | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [*launcher, str(SCRIPTS / script), *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=SCRIPTS.parent,
        env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # The launcher's own children, too.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
