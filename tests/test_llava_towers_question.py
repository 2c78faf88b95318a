"""Towers beyond the paper: the question as the prompt, several layers and timesteps in one, a resampler."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from llava_helpers import model_config, picture, tiny_llama, tower_configs

from llava_ext.chat import Dialogue
from llava_ext.config import TowerConfig
from llava_ext.dataset import Collator, ConversationDataset, Pictures
from llava_ext.generate import Assistant
from llava_ext.images import image_id
from llava_ext.language import build_model
from llava_ext.llava_json import Record
from llava_ext.projector import Resampler, token_raster
from llava_ext.templates import Turn
from llava_ext.tower_cache import store_name
from llava_ext.towers import BackboneTower, Tower, load_tower, load_towers, look
from revelio.backbones.registry import load_backbone

QUESTIONS = ["is it a cat or a dog?", "what is in this picture?"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> TowerConfig:
    return tower_configs(tmp_path_factory.mktemp("towers"))["sd"]


def seen(tower: Tower, questions: list[str] | None = None) -> torch.Tensor:
    image = picture(3)
    pixels = torch.stack([tower.pixels(image)] * 2)
    return look(tower, pixels, [image_id(image)] * 2, questions)


def test_the_question_is_the_prompt_of_its_picture(sd: TowerConfig) -> None:
    tower = load_tower(replace(sd, prompt="question"), "cpu")
    found = seen(tower, QUESTIONS)
    backbone = load_backbone(sd.backbone, layers=["up_ft1"], device="cpu")
    for number, question in enumerate(QUESTIONS):
        pixels = backbone.transform(picture(3))[None]
        wanted = backbone.activations(
            backbone.encode(pixels),
            [image_id(picture(3))],
            ["up_ft1"],
            timestep=25,
            prompts=[question],
        )["up_ft1"][0]
        torch.testing.assert_close(found[number], wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    with pytest.raises(ValueError, match="prompted by the question, which is not known here"):
        seen(tower)
    with pytest.raises(ValueError, match="train without a cache"):
        store_name(tower.config)


def test_questions_reach_the_tower_in_training_and_in_answers(
    sd: TowerConfig, tmp_path: Path
) -> None:
    tower_config = replace(sd, prompt="question")
    config = model_config(tiny_llama(tmp_path / "lm"), tower_config, template="tokenizer")
    towers = load_towers(config, "cpu")
    model, tokenizer = build_model(config, towers)
    picture(3).save(tmp_path / "a.png")
    turns = [Turn("user", f"<image>\n{QUESTIONS[0]}"), Turn("assistant", "a cat")]
    records = [Record("r", ("a.png",), (*turns, Turn("user", "why?"), Turn("assistant", "no")))]
    pictures = Pictures(tmp_path, towers)
    dataset = ConversationDataset(records, tokenizer, config, model.image_tokens, pictures)
    batch = Collator(model.image_tokens, 0, pictures.stack)([dataset[0]])
    assert batch["questions"] == [QUESTIONS[0]]

    asked: list[list[str]] = []
    tower = towers[0]
    assert isinstance(tower, BackboneTower)
    given = tower.backbone.activations

    def spy(*arguments, prompts, **settings):
        asked.append(prompts)
        return given(*arguments, prompts=prompts, **settings)

    tower.backbone.activations = spy  # type: ignore[method-assign]
    assistant = Assistant(model, tokenizer, towers)
    prompts = [f"<image>\n{QUESTIONS[1]}", "<image><image> same?"]
    assistant.answer(prompts, [[picture(1)], [picture(1), picture(2)]], max_new_tokens=2)
    assert asked == [[QUESTIONS[1], "same?", "same?"]]

    asked.clear()
    talk = Dialogue(assistant, [picture(1)], StringIO())
    for question in QUESTIONS:  # the first one that is asked, and of a new talk its own
        talk.ask(question, max_new_tokens=2)
    talk.turns = []
    talk.ask("and now?", max_new_tokens=2)
    assert asked == [[QUESTIONS[0]], ["and now?"]]


def test_several_layers_and_timesteps_are_one_tower(sd: TowerConfig) -> None:
    several = replace(
        sd, layer="up_ft1+bottleneck", timestep=None, timesteps=(25, 200), tokens="pool"
    )
    tower = load_tower(several, "cpu")
    found = seen(tower)
    backbone = load_backbone(sd.backbone, layers=["up_ft1", "bottleneck"], device="cpu")
    encoded = backbone.encode(backbone.transform(picture(3))[None])
    parts = []
    for timestep in (25, 200):
        layers = backbone.activations(
            encoded, [image_id(picture(3))], ["up_ft1", "bottleneck"], timestep=timestep
        )
        coarse = layers["bottleneck"][0]
        times = layers["up_ft1"].shape[-1] // coarse.shape[-1]
        parts += [
            layers["up_ft1"][0],
            coarse.repeat_interleave(times, 1).repeat_interleave(times, 2),
        ]
    wanted = torch.cat(parts)
    assert (tower.channels, *tower.grid) == tuple(wanted.shape)
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-4)
    assert "t25-200" in store_name(several)
    old = load_tower(replace(sd, layer="up_ft1"), "cpu").identity()
    assert "timesteps" not in old, "caches of before stay valid"


def test_the_resampler_is_one_attention_of_learned_queries() -> None:
    torch.manual_seed(0)
    module = Resampler(channels=6, cells=12, budget=5, width=8)
    grids = torch.randn(2, 6, 3, 4)
    found = module(grids).detach().numpy()
    weights = {name: value.detach().numpy() for name, value in module.named_parameters()}
    for image in range(2):
        cells = grids[image].flatten(1).T.numpy()
        cells = (cells - cells.mean(1, keepdims=True)) / np.sqrt(cells.var(1, keepdims=True) + 1e-5)
        keys = cells @ weights["keys.weight"].T + weights["keys.bias"] + weights["places"]
        values = cells @ weights["values.weight"].T + weights["values.bias"]
        for token in range(5):
            score = np.exp(keys @ weights["queries"][token] / np.sqrt(8))
            mixed = (score / score.sum()) @ values
            wanted = mixed @ weights["out.weight"].T + weights["out.bias"]
            np.testing.assert_allclose(found[image, token], wanted, atol=1e-5)
    module(torch.empty(0, 6, 3, 4)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    config = TowerConfig("x", "y", tokens="resample", budget=7)
    assert token_raster(config, (3, 4)) == (1, 7)


def test_normalized_tokens_start_alike_whatever_their_scale() -> None:
    from llava_ext.projector import Projector

    config = TowerConfig("x", "y", tokens="pool", budget=4, normalize=True)
    torch.manual_seed(0)
    projector = Projector(config, 6, (4, 4), 8)
    grids = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(projector(100 * grids + 3), projector(grids), atol=1e-3, rtol=1e-3)
    tokens = torch.nn.functional.adaptive_avg_pool2d(grids, 2).flatten(2).transpose(1, 2)
    centred = tokens - tokens.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(projector(grids), projector.mlp(scaled), atol=1e-5, rtol=1e-4)
