"""What the tower cache saves a stage-1 step, what the step costs beside plain transformers, ZeRO-3's memory.

    python benchmarks/llava_train.py --json llava_train.json
    python benchmarks/llava_train.py --rows clip clip-sd-t25 --batch 8 --no-memory
    python benchmarks/llava_train.py --rows

Step: forward and backward of one batch of stage 1, the towers run in it or their grids read from a cache; the
same model and samples, rounds interleaved; medians of wall time and of each round's ratio. "plain" is the
step written with transformers alone (embed, project, scatter, the language model's own loss), its features,
ids and labels ready in memory; the losses are compared first. --sd15 adds a step with a tower of SD-1.5's
real size: random weights, 512 px, 2 GB of temporary files. Memory: the peak resident size of the first
process of scripts/finetune.py with ZeRO-3 and LoRA, of one and of two on the CPU, for a random language model
of 2 billion parameters in float32 (8 GB of temporary files): when it is loaded, towers and libraries
included, and over the whole stage. Pictures and texts are made up; no data is needed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_ext.cli.command import read_section
from llava_ext.config import (
    IGNORE_INDEX,
    IMAGE_INDEX,
    CacheConfig,
    ConversationData,
    PretrainConfig,
)
from llava_ext.deepspeed import free_port
from llava_ext.images import smooth_picture
from llava_ext.run import Job, open_job
from llava_ext.tower_cache_job import fill, open_cache_job
from llava_ext.training import build_trainer, training_arguments
from revelio.distributed import Processes
from revelio.run_dir import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "llava" / "mini"
MEMORY_SAMPLES = 4
MIDDLE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
}


def made_up_data(folder: Path, records: int) -> ConversationData:
    """Pictures of different sizes with captions, in LLaVA's form."""
    (folder / "images").mkdir()
    entries = []
    for number in range(records):
        name = f"{number}.png"
        smooth_picture(160 + 8 * (number % 8), 160).save(folder / "images" / name)
        turns = [
            {"from": "human", "value": "<image>\nDescribe the picture."},
            {"from": "gpt", "value": "Smooth colours that go over into one another"},
        ]
        entries.append({"id": name, "image": name, "conversations": turns})
    write_json(folder / "data.json", entries)
    return ConversationData(folder / "data.json", folder / "images")


def one_step(job: Job, trainer: Any, samples: range) -> float:
    """Seconds of reading, forward and backward of a batch."""
    began = time.perf_counter()
    batch = job.collator([job.dataset[index] for index in samples])
    job.model(**trainer._prepare_inputs(batch)).loss.backward()
    seconds = time.perf_counter() - began
    job.model.zero_grad(set_to_none=True)
    return seconds


class PlainStep:
    """Stage 1 with transformers alone, from what is ready in memory."""

    def __init__(self, job: Job, batch: dict[str, Any]) -> None:
        model = job.model
        self.language_model: Any = model.language_model
        self.projectors, self.grids = model.projectors, batch["grids"]
        rows = [
            self._expanded(row[0], row[1], row[2], model.image_tokens)
            for row in zip(
                *(batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")),
                strict=True,
            )
        ]
        columns = (
            pad_sequence([torch.tensor(row[i]) for row in rows], True, padding)
            for i, padding in enumerate((0, IGNORE_INDEX))
        )
        self.ids, self.labels = columns
        lengths = torch.tensor([len(row[0]) for row in rows])
        self.mask = (torch.arange(self.ids.shape[1]) < lengths[:, None]).long()

    @staticmethod
    def _expanded(
        ids: list[int], labels: list[int], mask: list[int], tokens: int
    ) -> tuple[list[int], list[int]]:
        new_ids: list[int] = []
        new_labels: list[int] = []
        for token, label, kept in zip(ids, labels, mask, strict=True):
            count = tokens if token == IMAGE_INDEX else kept
            new_ids += [token] * count
            new_labels += [IGNORE_INDEX if token == IMAGE_INDEX else label] * count
        return new_ids, new_labels

    def loss(self) -> torch.Tensor:
        """Embed, project, interleave, scatter, the language model's own loss."""
        place = self.ids == IMAGE_INDEX
        text = self.language_model.get_input_embeddings()(self.ids.masked_fill(place, 0))
        parts = [each(grid) for each, grid in zip(self.projectors, self.grids, strict=True)]
        images = torch.stack(parts, dim=2).flatten(0, 2)
        embeddings = text.masked_scatter(place[..., None], images.to(text))
        return self.language_model(
            inputs_embeds=embeddings, attention_mask=self.mask, labels=self.labels, use_cache=False
        ).loss

    def __call__(self) -> float:
        """Seconds of forward and backward."""
        began = time.perf_counter()
        self.loss().backward()
        seconds = time.perf_counter() - began
        self.projectors.zero_grad(set_to_none=True)
        return seconds


def write_sd15(folder: Path) -> Path:
    """A folder of SD-1.5's architecture with random weights and a shipped model's tokenizer."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from extraction import UNET, VAE, random_model
    from transformers import CLIPTextConfig, CLIPTextModel

    shutil.copytree(ROOT / "models" / "mini-sd-photo", folder)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    parts = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(text),
    }
    for name, make in parts.items():
        shutil.rmtree(folder / name)
        random_model(make, torch.float16, torch.device("cpu")).save_pretrained(folder / name)
    return folder


def row_config(row: str, sd15: Path | None) -> PretrainConfig:
    """One of the paper's rows, small; its Stable Diffusion, if asked, of the real size."""
    config = read_section(CONFIGS / f"{row}.yaml", "pretrain", PretrainConfig)
    if sd15 is None:
        return config
    clip, sd = config.model.towers
    towers = (clip, replace(sd, backbone=str(sd15)))
    return replace(config, model=replace(config.model, towers=towers))


def steps(
    config: PretrainConfig, data: ConversationData, folder: Path, batch: int, rounds: int
) -> dict[str, Any]:
    """Steps in turn, towers run or grids cached."""
    stage = replace(config.stage, effective_batch=batch, batch_size=batch, zero=0)
    config = replace(config, data=data, stage=stage, cache=None)
    cached = replace(config, cache=folder / "cache")
    options = CacheConfig(cache=cached.cache, data=config.data, model=config.model)
    for _ in fill(open_cache_job(options, Processes())):
        pass
    jobs = {"towers run": open_job(config, "pretrain"), "cached": open_job(cached, "pretrain")}
    runs = {}
    for name, job in jobs.items():
        trainer = build_trainer(
            job.model,
            job.dataset,
            job.collator,
            stage,
            training_arguments(stage, folder / name),
            towers=job.towers,
        )
        runs[name] = (job, trainer)
        one_step(job, trainer, range(batch))
    job, trainer = runs["cached"]
    prepared = trainer._prepare_inputs(job.collator([job.dataset[index] for index in range(batch)]))
    plain = PlainStep(job, prepared)
    torch.testing.assert_close(plain.loss(), job.model(**prepared).loss, rtol=2e-2, atol=1e-4)
    plain()
    times: dict[str, list[float]] = {name: [] for name in (*runs, "plain")}
    for _ in range(rounds):
        for name, (job, trainer) in runs.items():
            times[name].append(one_step(job, trainer, range(batch)))
        times["plain"].append(plain())
    ratios, beside = (
        [a / b for a, b in zip(times[name], times["cached"], strict=True)]
        for name in ("towers run", "plain")
    )
    return {
        "batch": batch,
        "rounds": rounds,
        "seconds": {name: round(median(some), 3) for name, some in times.items()},
        "speedup": round(median(ratios), 2),
        "plain / cached": round(median(beside), 2),
        "towers": [f"{Path(tower.backbone).name} {tower.layer}" for tower in config.model.towers],
    }


def write_language_model(
    folder: Path,
    layers: int = MIDDLE["num_hidden_layers"],
    dtype: torch.dtype = torch.float32,
) -> int:
    """A Llama with random weights and a shipped model's tokenizer; gives its number of parameters."""
    from extraction import random_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from llava_ext.language import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    sizes: dict[str, Any] = MIDDLE | {"num_hidden_layers": layers, "vocab_size": len(tokenizer)}
    config = LlamaConfig(**sizes)
    make = partial(LlamaForCausalLM, config)
    model = random_model(make, dtype, torch.device("cpu"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def memory(path: Path, data: ConversationData, folder: Path) -> dict[str, Any]:
    """Peak resident bytes of the first of one and of two processes of stage 2 (LoRA) with ZeRO-3.

    The first process reads the files; the others hold no more than it does.
    """
    language_model = folder / "language-model"
    parameters = write_language_model(language_model)
    found: dict[str, dict[str, int]] = {"loading": {}, "whole stage": {}}
    for processes in (1, 2):
        launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed")]
        launcher += ["--num_accelerators", str(processes), "--master_port", str(free_port())]
        out = folder / f"zero3-{processes}"
        words = ["--config", path, "--pretrained", "None", "--out", out, "--stage.zero", 3]
        words += ["--stage.effective-batch", 2, "--stage.batch-size", 1, "--limit", MEMORY_SAMPLES]
        words += ["--data.json", data.json, "--data.images", data.images]
        words += ["--model.language-model", language_model]
        command = [*launcher, "--hostfile", "/dev/null", str(ROOT / "scripts" / "finetune.py")]
        subprocess.run(
            [*command, *map(str, words)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        report = read_json(out / "report.json")
        found["loading"][str(processes)] = report["loading_memory_bytes"]
        found["whole stage"][str(processes)] = report["peak_memory_bytes"]
    ratios = {what: round(peaks["2"] / peaks["1"], 3) for what, peaks in found.items()}
    return {
        "parameters": parameters,
        "peak_bytes": found["whole stage"],
        "two_to_one": ratios["whole stage"],
        "loading": {"peak_bytes": found["loading"], "two_to_one": ratios["loading"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=["clip-dinov2", "clip-sd-t25"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sd15", action="store_true", help="a tower of SD-1.5's size, batch 2, one round"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave ZeRO-3's memory out")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    with TemporaryDirectory() as place:
        folder = Path(place)
        data = made_up_data(folder, max(given.batch, MEMORY_SAMPLES))
        results["stage-1 step"] = {
            row: steps(row_config(row, None), data, folder / row, given.batch, given.rounds)
            for row in given.rows
        }
        if given.sd15:
            config = row_config("clip-sd-t25", write_sd15(folder / "sd-1.5"))
            results["stage-1 step"]["clip + sd-1.5's size"] = steps(
                config, data, folder / "full", 2, 1
            )
        if not given.no_memory:
            path = CONFIGS / "clip-dinov2.yaml"
            results["ZeRO-3 memory"] = memory(path, data, folder)
    print(json.dumps(results, indent=2))
    if given.json:
        write_json(given.json, results)


if __name__ == "__main__":
    main()
