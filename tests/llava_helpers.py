"""Tiny language models and tokenizers, written as folders that ``from_pretrained`` takes.

tiny_llama   2 blocks, 32 wide, context 256; ChatML-like chat template, tags as tokens, pad token
tiny_mpt     2 blocks, 32 wide, max_seq_len 128; no pad token, unk = end of text, as MPT's tokenizer
"""

from pathlib import Path
from typing import Any

import pytest
from backbones_helpers import picture, seeded, tiny_clip, tiny_dinov2, tiny_sd
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llava_ext.checkpoint import save_model
from llava_ext.config import ModelConfig, TowerConfig
from llava_ext.explain import Asked, ask
from llava_ext.generate import Assistant
from llava_ext.language import build_model
from llava_ext.towers import load_towers
from revelio.sae.model import KSparseAutoencoder

END, START, STOP, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CORPUS = [
    "what is in this picture? a small dog on green grass. describe it in a few words.",
    "USER: is it a cat or a dog? ASSISTANT: it is a cat. user assistant system",
]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 32


def tiny_language_tokenizer(*, pad: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on two lines."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = ByteLevelDecoder()  # type: ignore[assignment]
    special = [END, START, STOP, *([PAD] if pad else [])]
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    names: dict[str, Any] = {"pad_token": PAD} if pad else {"unk_token": END}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=STOP if pad else END, **names
    )
    if pad:
        wrapped.chat_template = CHAT
    return wrapped


def tiny_llama(folder: Path, *, seed: int = 0, width: int = WIDTH, intermediate: int = 64) -> Path:
    """A ``LlamaForCausalLM`` folder with its tokenizer."""
    tokenizer = tiny_language_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    seeded(lambda: LlamaForCausalLM(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_mpt(folder: Path, *, seed: int = 0) -> Path:
    """An ``MptForCausalLM`` folder with its tokenizer."""
    tokenizer = tiny_language_tokenizer(pad=False)
    config = MptConfig(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        n_heads=4,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    seeded(lambda: MptForCausalLM(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_qwen2(folder: Path, *, seed: int = 0) -> Path:
    """A ``Qwen2ForCausalLM`` folder with its tokenizer."""
    tokenizer = tiny_language_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    seeded(lambda: Qwen2ForCausalLM(config), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tower_configs(folder: Path) -> dict[str, TowerConfig]:
    """The paper's three towers in little, 16 tokens each; their models are written to ``folder``."""
    clip, dinov2 = tiny_clip(folder / "clip"), tiny_dinov2(folder / "dinov2")
    sd = tiny_sd(folder / "sd")
    return {
        "clip": TowerConfig(str(clip), "block1", budget=16),
        "dinov2": TowerConfig(str(dinov2), "block2", budget=16),
        "sd": TowerConfig(str(sd), "up_ft1", timestep=25, tokens="conv", budget=16, width=12),
    }


def model_config(language_model: Path, *towers: TowerConfig, **settings: Any) -> ModelConfig:
    """A config that fits both tiny language models."""
    return ModelConfig(str(language_model), towers, **{"max_length": 128, **settings})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with two towers, and a random k-SAE of each of three layers."""
    root = tmp_path_factory.mktemp("inside")
    write_answering(root)
    return root


@pytest.fixture(scope="module")
def assistant(root: Path) -> Assistant:
    """The saved model, ready to answer."""
    return Assistant.load(root / "final", device="cpu")


@pytest.fixture(scope="module")
def asked(assistant: Assistant) -> Asked:
    """A question about a picture and its answer."""
    return ask(assistant, picture(1), "what is it?", "a small dog")


def write_answering(root: Path) -> None:
    """A model of two towers in ``final``, a k-SAE of each of three layers, named by it, and ``cat.png``."""
    towers = tower_configs(root)
    config = model_config(
        tiny_llama(root / "llama"), towers["clip"], towers["dinov2"], template="tokenizer"
    )
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    save_model(model, tokenizer, root / "final")
    widths = {"tower1": model.shapes[1].channels, "projected0": 32, "block1": 32}
    for seed, (layer, width) in enumerate(widths.items()):
        KSparseAutoencoder(width, 4 * width, 3, seed=seed).save_pretrained(root / layer)
    picture(1).save(root / "cat.png")


__all__ = [
    "asked",
    "assistant",
    "model_config",
    "picture",
    "root",
    "tiny_language_tokenizer",
    "tiny_llama",
    "tiny_mpt",
    "tiny_qwen2",
    "write_answering",
]
