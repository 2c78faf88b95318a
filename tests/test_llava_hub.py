"""Up to a hub and down again: what is uploaded is all that another machine needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_helpers import hub_server
from llava_helpers import model_config, picture, tiny_llama, tower_configs

from llava_ext.checkpoint import load_model, save_model
from llava_ext.language import build_model
from llava_ext.towers import load_towers

# Another process: the hub's address is read once, when its library is imported.
UP_AND_DOWN = """
import sys, warnings, llava_ext
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
folder, image, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.push_to_hub("me/pictures", token="hf_x")
assert any("is a folder of this machine" in str(each.message) for each in caught), caught
AutoProcessor.from_pretrained(folder).push_to_hub("me/pictures", token="hf_x")
again = AutoModelForImageTextToText.from_pretrained("me/pictures", revision="main")
processor = AutoProcessor.from_pretrained("me/pictures")
content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
found = again.generate(**inputs, max_new_tokens=6, do_sample=False)
open(out, "w").write(str(found.tolist()))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    towers = tower_configs(root)
    lm = tiny_llama(root / "lm")
    config = model_config(lm, towers["clip"], towers["sd"], template="tokenizer")
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    save_model(model, tokenizer, root / "model")
    return root / "model"


def test_what_is_uploaded_is_all_that_is_needed(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    picture(3).save(tmp_path / "image.png")
    with hub_server(tmp_path / "hub") as address:
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        words = [str(saved), str(tmp_path / "image.png"), str(tmp_path / "found")]
        done = subprocess.run(
            [sys.executable, "-c", UP_AND_DOWN, *words],
            env=environment,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    model, processor = (
        loader.from_pretrained(saved) for loader in (AutoModelForImageTextToText, AutoProcessor)
    )
    content = [{"type": "image", "image": picture(3)}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
    assert (tmp_path / "found").read_text() == str(wanted)
    folder = tmp_path / "hub" / "me" / "pictures"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names >= {"config.json", "projectors.safetensors", "processor_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "README.md"}
    assert not any(
        name.endswith((".bin", ".safetensors")) for name in names - {"projectors.safetensors"}
    )
    card = (folder / "README.md").read_text()
    towers = json.loads((folder / "config.json").read_text())["model"]["towers"]
    assert [tower["layer"] for tower in towers] == ["block1", "up_ft1"]
    assert all(f"`{tower['backbone']}`, layer `{tower['layer']}`" in card for tower in towers)
    assert "pipeline_tag: image-text-to-text" in card


def test_a_model_saved_alone_takes_its_language_model_s_tokenizer(saved: Path, tmp_path) -> None:
    model, tokenizer = load_model(saved)
    model.save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone" / "tokenizer.json").exists()
    again, words = load_model(tmp_path / "alone")
    assert words.get_vocab() == tokenizer.get_vocab()
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_settings_that_mean_nothing_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"take no `load_in_4bit`: choose from dtype, device_map"):
        load_model(saved, load_in_4bit=True)
    with pytest.raises(ValueError, match="call `push_to_hub"):
        load_model(saved)[0].save_pretrained(tmp_path / "x", push_to_hub=True)
