"""LLaVA's own stage 1, its script as it is, with two of Revelio's towers by the plug-in.

The script wants a transformers between 4.45 and 4.51, so it is checked in an environment of its own:

    python -m venv old && old/bin/pip install -e . && old/bin/pip install --no-deps llava-torch \\
        transformers==4.46.3 tokenizers==0.20.3 "huggingface_hub<1" accelerate==1.1.1 datasets==3.1.0 \\
        peft==0.17.1 diffusers==0.35.2
    PYTHONPATH=.:tests old/bin/python -m pytest -c /dev/null --rootdir . tests/optional/check_llava_train.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

llava = pytest.importorskip("llava")
ROOT = Path(__file__).resolve().parents[2]
WORDS = ["<s>", "</s>", "<unk>", "dog", "cat", "grass", "what", "is", "it", "?"]


def tiny_project(folder: Path) -> None:
    """A language model, two CLIPs of different width, pictures and records."""
    words = models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "lm")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(len(WORDS), 32, **shape)).save_pretrained(folder / "lm")
    for name, width in (("narrow", 16), ("wide", 24)):
        vision = CLIPVisionConfig(width, image_size=32, patch_size=8, **shape)
        CLIPVisionModel(vision).save_pretrained(folder / name)
        size = {"size": {"shortest_edge": 32}, "crop_size": 32}
        CLIPImageProcessor(**size).save_pretrained(folder / name)
    records = []
    for number in range(8):
        Image.new("RGB", (40, 36), (30 * number, 90, 200)).save(folder / f"{number}.png")
        turns = [("human", "<image>\nwhat is it ?"), ("gpt", WORDS[3 + number % 3])]
        said = [{"from": side, "value": text} for side, text in turns]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    (folder / "data.json").write_text(json.dumps(records))


def test_its_training_script_takes_the_towers(tmp_path) -> None:
    tiny_project(tmp_path)
    flags = {
        "model_name_or_path": tmp_path / "lm",
        "version": "plain",
        "data_path": tmp_path / "data.json",
        "image_folder": tmp_path,
        "vision_tower": f"revelio:{tmp_path}/narrow/block1:pool4+revelio:{tmp_path}/wide/block0:conv4x12",
        "mm_projector_type": "mlp2x_gelu",
        "tune_mm_mlp_adapter": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "bf16": False,
        "use_cpu": True,
        "output_dir": tmp_path / "out",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "model_max_length": 128,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    script = Path(llava.__path__[0]) / "train" / "train.py"
    command = [sys.executable, "-m", "llava_ext.llava_plugin", str(script)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(found) for found in re.findall(r"'loss': ([\d.]+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    state = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert state["model.mm_projector.0.mlp.0.weight"].shape == (32, 16)
    assert state["model.mm_projector.1.tokens.conv2.weight"].shape == (12, 12, 3, 3)
