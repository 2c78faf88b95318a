"""Models for others: adapters folded in, projectors under LLaVA's names and transformers'; read back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones_helpers import seeded
from llava_helpers import (
    model_config,
    tiny_language_tokenizer,
    tiny_llama,
    tiny_mpt,
    tiny_qwen2,
    tower_configs,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_ext.adapter import add_lora
from llava_ext.checkpoint import load_model, save_model
from llava_ext.cli import main
from llava_ext.export import export_model, export_projectors, llava_config
from llava_ext.import_llava import import_projectors
from llava_ext.language import build_model
from llava_ext.stages import LoraOptions
from llava_ext.towers import load_towers

LANGUAGE = {"llama": tiny_llama, "mpt": tiny_mpt, "qwen2": tiny_qwen2}


def built(folder: Path, *names: str, language: str = "llama", seed: int = 0, **settings):
    towers = tower_configs(folder)
    language_model = LANGUAGE[language](folder / "lm")
    config = model_config(language_model, *(towers[name] for name in names), **settings)
    return build_model(config, load_towers(config, "cpu"), seed=seed)


def loss_of(model) -> torch.Tensor:
    """The loss of a text with a picture."""
    ids = torch.tensor([[5, -200, 9, 12, 7]])
    draw = torch.Generator().manual_seed(3)
    grids = [torch.randn(1, s.channels, *s.grid, generator=draw) for s in model.shapes]
    return model(ids, torch.ones_like(ids), ids.clamp_min(0), grids).loss


@pytest.mark.parametrize("language", LANGUAGE)
def test_an_adapter_trains_is_saved_loads_and_folds_in(tmp_path, language, capsys) -> None:
    model, tokenizer = built(tmp_path, "clip", language=language)
    add_lora(model, LoraOptions(rank=4))
    model.trainable("finetune")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = loss_of(model).item()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    wanted = loss_of(model.eval()).item()
    assert wanted < before - 0.01
    save_model(model, tokenizer, tmp_path / "final")
    words = ["--model", tmp_path / "final", "--form", "merged", "--out", tmp_path / "merged"]
    main(["export", *map(str, words)])
    assert f"{tmp_path / 'merged' / 'projectors.safetensors'}" in capsys.readouterr().out
    merged, _ = load_model(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter").exists()
    assert not any("lora" in name for name in merged.state_dict())
    for loaded in (merged, load_model(tmp_path / "final")[0]):
        assert loss_of(loaded).item() == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(SystemExit):
        main(["export", *map(str, words)])
    assert "already holds files: choose another folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no adapter, so there is nothing to fold in"):
        export_model(tmp_path / "merged", tmp_path / "again", "merged")


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 128},
    "qwen3_moe": {
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8},
        **{"num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 16},
        **{"num_experts": 4, "num_experts_per_tok": 2},
    },
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:The following .*_pattern keys")
@pytest.mark.parametrize("kind", SIZES)
def test_what_peft_sets_by_itself_is_no_foreign_setting(tmp_path, kind) -> None:
    """GPT-2's transposed layers and the experts of a mixture: such adapters once trained and did not load."""
    tokenizer = tiny_language_tokenizer()
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SIZES[kind]
    )
    seeded(lambda: AutoModelForCausalLM.from_config(config), 0).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    settings = model_config(tmp_path / "lm", tower_configs(tmp_path)["clip"])
    model, tokenizer = build_model(settings, load_towers(settings, "cpu"))
    plain = loss_of(model.eval()).item()
    add_lora(model, LoraOptions(rank=4))
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1, generator=draw)
    wanted = loss_of(model.eval()).item()
    assert abs(wanted - plain) > 1e-3
    save_model(model, tokenizer, tmp_path / "final")
    export_model(tmp_path / "final", tmp_path / "merged", "merged")
    for name in ("final", "merged"):
        loaded = load_model(tmp_path / name)[0]
        assert loss_of(loaded.eval()).item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("language", ["llama", "mpt"])
def test_one_tower_is_llava_s_own_projector_and_comes_back(tmp_path, language) -> None:
    model, _ = built(tmp_path, "clip", language=language)
    assert export_projectors(model, tmp_path / "out", "llava") == [
        "config.json",
        "mm_projector.bin",
    ]
    state = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    prefix = {"llama": "model", "mpt": "transformer"}[language]
    # As LLaVA's builder makes `mlp2x_gelu`, and as it takes a file's weights (initialize_vision_modules).
    theirs = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32))
    theirs.load_state_dict({k.split("mm_projector.")[1]: v for k, v in state.items()})
    assert all(key.startswith(f"{prefix}.mm_projector.") for key in state)
    grids = torch.randn(2, 16, 4, 4)
    wanted = model.projectors[0](grids)
    assert torch.equal(theirs(grids.flatten(2).transpose(1, 2)), wanted)
    other, _ = built(tmp_path, "clip", language=language, seed=1)
    import_projectors(other, tmp_path / "out")
    assert torch.equal(other.projectors[0](grids), wanted)
    config = llava_config(model)
    assert config["model_type"] == f"llava_{language}" and config["mm_hidden_size"] == 16
    assert config["mm_vision_tower"].endswith("/clip/block1")


def test_several_towers_come_back_each_in_its_place(tmp_path) -> None:
    model, _ = built(tmp_path, "clip", "sd", "dinov2")
    export_projectors(model, tmp_path / "out", "llava")
    other, _ = built(tmp_path, "clip", "sd", "dinov2", seed=1)
    assert len(import_projectors(other, tmp_path / "out")) == 3
    for name, value in model.projectors.state_dict().items():
        assert torch.equal(value, other.projectors.state_dict()[name])


def test_transformers_own_projector_takes_its_names(tmp_path) -> None:
    model, _ = built(tmp_path, "dinov2")
    export_projectors(model, tmp_path / "out", "transformers")
    state = load_file(tmp_path / "out" / "mm_projector.safetensors")
    vision = CLIPVisionConfig(hidden_size=16, num_attention_heads=2)
    theirs = LlavaMultiModalProjector(
        LlavaConfig(vision_config=vision, text_config=model.config.text_config)
    )
    theirs.load_state_dict({k.removeprefix("multi_modal_projector."): v for k, v in state.items()})
    grids = torch.randn(2, 16, 4, 4)
    wanted = model.projectors[0](grids)
    torch.testing.assert_close(theirs(grids.flatten(2).transpose(1, 2)), wanted, rtol=0, atol=1e-6)
    other, _ = built(tmp_path, "dinov2", seed=1)
    import_projectors(other, tmp_path / "out")
    assert torch.equal(other.projectors[0](grids), wanted)


def test_what_a_form_cannot_hold_is_one_line(tmp_path) -> None:
    model, _ = built(tmp_path, "clip", "dinov2", fusion="sequence")
    with pytest.raises(ValueError, match="fusion sequence is not LLaVA's"):
        export_projectors(model, tmp_path / "out", "llava")
    with pytest.raises(ValueError, match="one tower and a projector of two linear layers"):
        export_projectors(model, tmp_path / "out", "transformers")
    one, _ = built(tmp_path, "sd")
    prompted = replace(one.settings.towers[0], prompt="a dog")
    one.settings = replace(one.settings, towers=(prompted,))
    with pytest.raises(ValueError, match="a setting beside layer, timestep and tokens"):
        export_projectors(one, tmp_path / "out", "llava")
    assert not (tmp_path / "out").exists()
