"""Models loaded with quantised language models, by each backend that runs on a CPU.

The backends are no dependencies, so this file is not collected by default:

    python -m venv --system-site-packages peers
    peers/bin/pip install --no-deps torchao optimum-quanto bitsandbytes ninja
    PYTHONPATH=.:tests peers/bin/python -m pytest -c /dev/null --rootdir . tests/optional/check_quantised.py
"""

import shutil
from dataclasses import replace

import pytest
import torch
from llava_helpers import model_config, picture, tiny_llama, tower_configs
from llava_train_helpers import SMALL, data_options, losses, tiny_project
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)

import llava_ext  # noqa: F401  registers with the Auto classes
from llava_ext.adapter import add_lora, merge_adapter
from llava_ext.checkpoint import load_model, save_model
from llava_ext.config import FinetuneConfig
from llava_ext.language import build_model
from llava_ext.run import run
from llava_ext.stages import Finetune, LoraOptions
from llava_ext.towers import load_towers


def torchao() -> TorchAoConfig:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto() -> QuantoConfig:
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


def eight_bits() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def four_bits() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, its language model's folder, and a processor's input."""
    root = tmp_path_factory.mktemp("quantised")
    towers = tower_configs(root)
    # bitsandbytes packs blocks of 64 weights.
    lm = tiny_llama(root / "lm", width=64, intermediate=128)
    config = model_config(lm, towers["clip"], towers["sd"], template="tokenizer")
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    save_model(model, tokenizer, root / "model")
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "what is it?"}]
    processor = AutoProcessor.from_pretrained(root / "model")
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    return root / "model", lm, inputs


def load(folder, make=None):
    settings = {} if make is None else {"quantization_config": make()}
    return AutoModelForImageTextToText.from_pretrained(folder, **settings)


@pytest.mark.parametrize("make", [torchao, quanto, eight_bits, four_bits])
def test_the_language_model_is_quantised_and_nothing_else(saved, make, tmp_path) -> None:
    folder, lm, inputs = saved
    plain, model = load(folder), load(folder, make)
    own = AutoModelForCausalLM.from_pretrained(lm, quantization_config=make(), dtype=torch.float32)
    pictures = (inputs["pixel_values"], inputs["image_ids"])
    with torch.no_grad():
        for one, other in zip(model.see(*pictures), plain.see(*pictures), strict=True):
            assert torch.equal(one, other)
        assert all(
            torch.equal(value, plain.projectors.state_dict()[name])
            for name, value in model.projectors.state_dict().items()
        )
        embeddings = plain.embed_expanded(inputs["input_ids"], plain.get_image_features(*pictures))
        wanted = own(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits
        found = model(**inputs).logits
        assert torch.equal(found, wanted)
        assert (found - plain(**inputs).logits).abs().max() > 1e-4  # it is another model
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert greedy.shape[1] == inputs["input_ids"].shape[1] + 4
    # Its name and the projectors are what is saved: without the setting it is the plain model again.
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, plain(**inputs).logits)
    with pytest.raises(ValueError, match="quantised, so only its name can be saved"):
        model.save_pretrained(tmp_path / "whole", language="whole")


@pytest.mark.parametrize("make", [eight_bits, four_bits])
def test_an_adapter_on_it_trains_is_saved_and_loads(saved, make, tmp_path) -> None:
    folder, _, inputs = saved
    model = load(folder, make)
    add_lora(model, LoraOptions(rank=4))
    model.trainable("finetune")
    model.train()  # on a CPU bitsandbytes repacks what runs in evaluation mode
    with torch.no_grad():  # where gradients are kept, bitsandbytes rounds otherwise
        before = model(**inputs).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        labels = inputs["input_ids"].where(inputs["input_ids"] < 300, -100)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in trained)
    assert all("lora_" in name or name.startswith("projectors.") for name in trained)
    with torch.no_grad():
        after = model(**inputs).logits
    assert (after - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapted")
    with torch.no_grad():
        found = load(tmp_path / "adapted", make).train()(**inputs).logits
    torch.testing.assert_close(found, after, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_weights_that_the_four_bits_stand_for(saved) -> None:
    folder, _, inputs = saved
    found = []
    for plain in (False, True):
        model = load(folder, four_bits)
        if plain:
            model.set_language_model(model.language_model.dequantize())
        add_lora(model, LoraOptions(rank=4))
        model.trainable("finetune")
        for name, each in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(each)
        model.train()(**inputs).logits.log_softmax(-1)[..., 5].mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 8
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("load_in", "stage"),
    [("4bit", {}), ("8bit", {}), ("4bit", {"precision": "bfloat16", "checkpointing": True})],
)
def test_qlora_trains_resumes_and_fits_the_plain_model(load_in, stage, tmp_path, capsys) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_project(tmp_path)
    wide = tiny_llama(tmp_path / "wide", width=64, intermediate=128)
    config = FinetuneConfig(
        out=tmp_path / "fine",
        data=data_options(tmp_path),
        model=replace(model, language_model=str(wide)),
        stage=Finetune(**{**SMALL, "learning_rate": 1e-2, "keep": 2, **stage}),
        lora=LoraOptions(rank=2),
        load_in=load_in,
    )
    run(config)
    curve, adapter = (
        losses(config.out),
        config.out / "final" / "adapter" / "adapter_model.safetensors",
    )
    kept = load_file(adapter)
    assert len(curve) == 4 and curve[-1] < curve[0]
    # 2 x (4 d^2 - 2 d (d / 2) + 3 d 2 d) weights in linear layers of width 64, each a byte or half of one.
    said = capsys.readouterr().out
    assert "109,120" in said and {"4bit": "311.9 kB", "8bit": "348.8 kB"}[load_in] in said
    # From its checkpoint in the middle, to the same adapter.
    (config.out / "report.json").unlink()
    shutil.rmtree(config.out / "final")
    shutil.rmtree(config.out / "checkpoints" / "checkpoint-4")
    run(replace(config, resume=True))
    assert losses(config.out) == pytest.approx(curve, abs=1e-5)
    for name, value in load_file(adapter).items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=1e-5)
    # On the plain language model it can be folded in, on the quantised one not.
    make = {"4bit": four_bits, "8bit": eight_bits}[load_in]
    with pytest.raises(ValueError, match="quantised, so an adapter can't be folded in"):
        merge_adapter(load(config.out / "final", make))
    merged, tokenizer = load_model(config.out / "final")
    merge_adapter(merged)
    save_model(merged, tokenizer, tmp_path / "merged")
    again, _ = load_model(tmp_path / "merged")
    for name, value in again.language_model.state_dict().items():
        assert torch.equal(value, merged.language_model.state_dict()[name]), name
