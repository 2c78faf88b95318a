"""Latents inside the model: effects against finite differences, ablations and edits by hand, the page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from llava_helpers import asked as asked
from llava_helpers import assistant as assistant
from llava_helpers import picture
from llava_helpers import root as root

from llava_ext.cli import main
from llava_ext.config import IMAGE_INDEX, ConversationData, TokensConfig, TowerConfig
from llava_ext.conversation import Turn
from llava_ext.explain import ask
from llava_ext.generate import Assistant
from llava_ext.latents import (
    ModelLayers,
    ablation_check,
    attribute,
    edited,
    log_probabilities,
    raster,
    read_edits,
    read_ksaes,
    removal,
    top_and_random,
    without,
)
from llava_ext.model_config import TowerShape
from llava_ext.tokens import fill, open_token_job
from revelio.activations.store import ActivationStore
from revelio.sae.config import Normalize
from revelio.sae.inputs import measure
from revelio.sae.kernels.base import Codes
from revelio.sae.model import KSparseAutoencoder

LAYERS = ("tower1", "projected0", "block1")


@pytest.fixture(scope="module")
def ksaes(root: Path) -> dict[str, KSparseAutoencoder]:
    return read_ksaes([f"{layer}={root / layer}" for layer in LAYERS])


def shifted(model, batch, layer: str, token: int, step: torch.Tensor) -> float:
    """The answer's log-probability with one token moved, by a plain forward hook."""

    def move(_module, _inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        changed = first.clone()
        changed[0, token] += step
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = ModelLayers(model).module(layer).register_forward_hook(move)
    with torch.no_grad():
        found = float(log_probabilities(model, batch))
    handle.remove()
    return found


def test_the_log_probability_is_the_loss_of_the_answer(assistant, asked) -> None:
    with torch.no_grad():
        loss = assistant.model(**asked.batch).loss
        found = log_probabilities(assistant.model, asked.batch)
    learned = int((asked.batch["labels"] >= 0).sum())
    assert float(found) == pytest.approx(-float(loss) * learned, rel=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_effects_are_what_a_small_step_along_the_latent_changes(
    layer: str, assistant, asked, ksaes
) -> None:
    ksae = ksaes[layer]
    (found,) = attribute(assistant.model, asked.batch, layer, ksae)
    assert (found.effects.diff() <= 0).all()
    assert len(found) > 20
    for place in (0, 1, len(found) - 1):
        latent, token = int(found.latents[place]), int(found.tokens[place])
        z = float(found.activations[place])
        step = 1e-2 * ksae.W_dec[latent].detach()
        up, down = (
            shifted(assistant.model, asked.batch, layer, token, sign * step) for sign in (1, -1)
        )
        assert float(found.effects[place]) == pytest.approx(
            z * (up - down) / 2e-2, rel=0.05, abs=2e-3
        )


@pytest.mark.parametrize("layer", LAYERS)
def test_latents_are_taken_away_at_their_tokens_only(layer: str, assistant, asked, ksaes) -> None:
    ksae = ksaes[layer]
    (found,) = attribute(assistant.model, asked.batch, layer, ksae)
    one = found.chosen(torch.tensor([0]))
    step = -float(one.activations[0]) * ksae.W_dec[int(one.latents[0])].detach()
    by_hand = shifted(assistant.model, asked.batch, layer, int(one.tokens[0]), step)
    removed = without(assistant.model, asked.batch, layer, ksae, [one])
    assert float(removed) == pytest.approx(by_hand, abs=1e-5)
    first, others = top_and_random(found, 5, 0)
    assert torch.equal(first.effects, found.effects[:5])
    pairs = set(zip(others.latents.tolist(), others.tokens.tolist(), strict=True))
    assert len(pairs) == 5
    top = zip(found.latents[:5].tolist(), found.tokens[:5].tolist(), strict=True)
    assert not pairs & set(top)


def test_top_and_random_pairs_are_as_many_and_apart(assistant, asked, ksaes) -> None:
    (found,) = attribute(assistant.model, asked.batch, "block1", ksaes["block1"])
    for count in (1, len(found) // 2, len(found) - 1, len(found), 10 * len(found)):
        top, random = top_and_random(found, count, 0)
        assert len(top) == len(random) == min(count, len(found) // 2)
        some, others = (
            set(zip(each.latents.tolist(), each.tokens.tolist(), strict=True))
            for each in (top, random)
        )
        assert not some & others and len(others) == len(random)
    for size in (0, 1):  # nothing to compare
        few = found.chosen(torch.arange(size))
        assert [len(each) for each in top_and_random(few, 8, 0)] == [0, 0]


@pytest.mark.parametrize("strength", ["2", "off"])
def test_edits_of_another_width_are_one_line_and_of_no_picture_nothing(
    strength: str, assistant, ksaes
) -> None:
    wide = KSparseAutoencoder(33, 64, 3)
    changes = read_edits([f"projected0:1:{strength}"], {"projected0": wide})
    turns = [[Turn("user", "<image>\nwhat is it?")]]
    refused = pytest.raises(ValueError, match="33 channels and the layer has 32")
    with refused, edited(assistant.model, changes):
        assistant.reply(turns, assistant.see([picture(1)]), max_new_tokens=2)
    ours = read_edits([f"tower1:1:{strength}", f"projected0:1:{strength}"], ksaes)
    text = [[Turn("user", "what is it?")]]
    expected = assistant.reply(text, max_new_tokens=4)
    with edited(assistant.model, ours):
        assert assistant.reply(text, max_new_tokens=4) == expected


@pytest.mark.parametrize("kind", ["mean-norm", "per-dimension"])
def test_latents_of_a_normalized_ksae_act_in_the_scale_of_the_tokens(
    kind: Normalize, assistant, asked
) -> None:
    model, layer = assistant.model, "tower1"
    seen: list[torch.Tensor] = []
    handle = (
        ModelLayers(model)
        .module(layer)
        .register_forward_hook(lambda _m, _i, out: seen.append(out.detach()[0]))
    )
    with torch.no_grad():
        log_probabilities(model, asked.batch)
    handle.remove()
    tokens = seen[0].float()
    ksae = KSparseAutoencoder(
        tokens.shape[1], 64, 3, seed=4, inputs=[measure({"store": "s"}, kind, [tokens])]
    )
    codes = ksae.encode(tokens)
    (found,) = attribute(model, asked.batch, layer, ksae)
    for place in (0, len(found) - 1):
        latent, token = int(found.latents[place]), int(found.tokens[place])
        # Its share of the token, by the k-SAE's own reconstruction with it and without.
        left = codes.values.masked_fill(codes.indices == latent, 0.0)
        share = (ksae.decode(codes) - ksae.decode(Codes(left, codes.indices)))[token]
        one = found.chosen(torch.tensor([place]))
        expected = torch.zeros_like(tokens)
        expected[token] = share
        taken = removal(ksae, [one], tokens[None].shape)
        torch.testing.assert_close(taken[0], expected, atol=1e-5, rtol=1e-4)
        up, down = (
            shifted(model, asked.batch, layer, token, sign * 1e-2 * share) for sign in (1, -1)
        )
        effect = float(found.effects[place])
        assert effect == pytest.approx((up - down) / 2e-2, rel=0.05, abs=2e-3)


def test_the_check_compares_top_and_random_pairs_answer_by_answer(assistant, ksaes) -> None:
    model, ksae = assistant.model, ksaes["projected0"]
    batches = [ask(assistant, picture(i), "what is it?", "a dog").batch for i in range(3)]
    found = ablation_check(model, batches, "projected0", ksae, count=4, seed=7)
    falls = {"top": [], "random": []}
    for number, batch in enumerate(batches):
        (effects,) = attribute(model, batch, "projected0", ksae)
        with torch.no_grad():
            before = float(log_probabilities(model, batch))
        chosen = dict(zip(("top", "random"), top_and_random(effects, 4, 7, number, 0), strict=True))
        for name, some in chosen.items():
            after = without(model, batch, "projected0", ksae, [some])
            falls[name].append(before - float(after))
    for name, values in falls.items():
        assert found[name]["value"] == pytest.approx(np.mean(values), abs=1e-4)
    gaps = np.array(falls["top"]) - np.array(falls["random"])
    half = 4.302653 * gaps.std(ddof=1) / np.sqrt(3)  # Student's t, 2 degrees
    assert found["difference"]["value"] == pytest.approx(gaps.mean(), abs=1e-4)
    assert found["difference"]["high"] == pytest.approx(gaps.mean() + half, abs=2e-4)
    assert found["answers"] == 3


def test_an_edit_adds_a_latents_direction_or_ablates_it_everywhere(assistant, asked, ksaes) -> None:
    model, ksae = assistant.model, ksaes["tower1"]
    (found,) = attribute(model, asked.batch, "tower1", ksae)
    counts = found.latents.bincount()
    latent = int(((counts > 0) & (counts < 16)).nonzero()[0])  # fires at some of the 16 tokens
    seen: list[torch.Tensor] = []
    handle = model.projectors[1].mlp.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    for edits in ([], [f"tower1:{latent}:2.5"], [f"tower1:{latent}:off"]):
        with edited(model, read_edits(edits, ksaes)), torch.no_grad():
            log_probabilities(model, asked.batch)
    handle.remove()
    plain, added, ablated = seen
    direction = ksae.W_dec[latent].detach()
    torch.testing.assert_close(added, plain + 2.5 * direction)
    codes = ksae.encode(plain[0])
    z = (codes.values * (codes.indices == latent)).sum(1)
    torch.testing.assert_close(ablated[0], plain[0] - z[:, None] * direction)
    assert (z > 0).any() and (z == 0).any()


def test_wrong_edits_and_layers_are_one_line(ksaes, assistant, asked) -> None:
    for text in ("tower1:5", "tower1:x:1", "tower1:5:much", "tower9:5:1", "tower1:99999:1"):
        with pytest.raises(ValueError, match=r"edit|strength|latent"):
            read_edits([text], ksaes)
    with pytest.raises(
        ValueError, match=r"'tower0' was given, only of tower1: give tower0=FOLDER as `ksae`"
    ):
        read_edits(["tower0:1:off"], {"tower1": ksaes["tower1"]})
    with pytest.raises(ValueError, match="'tower0' was given: give tower0=FOLDER as `ksae`"):
        read_edits(["tower0:1:off"], {})
    with pytest.raises(ValueError, match="LAYER=FOLDER"):
        read_ksaes(["tower1"])
    with pytest.raises(KeyError, match="no layer 'tower7'"):
        attribute(assistant.model, asked.batch, "tower7", ksaes["tower1"])


def test_a_layer_of_the_eleventh_tower_has_its_raster() -> None:
    towers = [TowerConfig("x", "l", tokens="pool", budget=(n + 1) ** 2) for n in range(12)]
    shapes = [TowerShape(8, (16, 16)) for _ in towers]
    model: Any = SimpleNamespace(settings=SimpleNamespace(towers=towers), shapes=shapes)
    for kind in ("tower", "projected"):
        found = [raster(model, f"{kind}{n}") for n in range(12)]
        assert found == [(n + 1, n + 1) for n in range(12)]


def test_tokens_are_stored_as_the_layers_give_them(root: Path, assistant, tmp_path: Path) -> None:
    records = [
        {
            "id": str(i),
            "image": "cat.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{'what ' * (i + 1)}?"},
                {"from": "gpt", "value": "a cat"},
            ],
        }
        for i in range(3)
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    words = ["tokens", "--model", str(root / "final"), "--data.json", str(tmp_path / "chat.json")]
    words += ["--data.images", str(root), "--batch-size", "2"]
    for layer in ("projected0", "block1"):
        main([*words, "--layer", layer, "--out", str(tmp_path / layer)])
    asked = ask(assistant, picture(1), "what what ?", "a cat")
    seen: dict[str, torch.Tensor] = {}
    modules = ModelLayers(assistant.model).modules
    for layer in ("projected0", "block1"):
        modules[layer].register_forward_hook(
            lambda _m, _i, out, layer=layer: seen.update({layer: out})
        )
    with torch.no_grad():
        log_probabilities(assistant.model, asked.batch)
    projected = ActivationStore.open(tmp_path / "projected0").rows(1, 2)[0]
    assert projected.shape == (32, 4, 4)
    torch.testing.assert_close(projected.flatten(1).T, seen["projected0"][0], atol=1e-5, rtol=1e-5)
    first = asked.batch["input_ids"][0].tolist().index(IMAGE_INDEX)
    hidden = ActivationStore.open(tmp_path / "block1").rows(1, 2)[0]
    torch.testing.assert_close(
        hidden[..., 0].T, seen["block1"][0, first : first + 32], atol=1e-5, rtol=1e-5
    )
    with pytest.raises(SystemExit):
        main([*words, "--layer", "tower0", "--out", str(tmp_path / "tower0")])


def test_tokens_are_of_the_records_that_can_be_used(root: Path, tmp_path: Path) -> None:
    """Of all others each kind is left out, and rows keep their records' names."""
    picture(1).save(tmp_path / "cat.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cat.png").read_bytes()[:200])

    def record(name: str, images: list[str], answer: str = "a cat") -> dict:
        asked = " ".join(["<image>"] * len(images)) + f" {name}?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        return {"id": name, "image": images, "conversations": turns}

    fine = [record("what", ["cat.png"]), record("a dog", ["cat.png"])]
    records = [
        record("cut", ["cut.png"]),
        fine[0],
        record("two", ["cat.png", "cat.png"]),
        record("tag", ["cat.png"], "<|im_end|>"),
        fine[1],
    ]
    stores = []
    for name, some in (("mixed", records), ("fine", fine)):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
        data = ConversationData(tmp_path / f"{name}.json", tmp_path)
        config = TokensConfig(
            model=str(root / "final"), data=data, layer="block1", out=tmp_path / name
        )
        if name == "mixed":
            with pytest.raises(ValueError, match=r"cut\.png"):
                open_token_job(config)
            with pytest.warns(UserWarning) as warned:
                job = open_token_job(replace(config, bad_records="skip"))
            said = [str(one.message) for one in warned]
            for wrong, one in zip(("'cut'", "'two' has 2 pictures", "'tag'"), said, strict=True):
                assert "mixed.json: left out" in one and wrong in one
        else:
            job = open_token_job(config)
        for _ in fill(job):
            pass
        stores.append(ActivationStore.open(tmp_path / name))
    assert list(stores[0].ids) == list(stores[1].ids) == ["what", "a dog"]
    assert stores[0].manifest["model"] == root.name
    assert torch.equal(stores[0].rows(0, 2), stores[1].rows(0, 2))


def test_tokens_are_of_what_the_saved_model_sees(root: Path, tmp_path: Path) -> None:
    """Pictures are made as in training, whatever the towers' own files say now."""
    shutil.copytree(root / "final", tmp_path / "final")
    entries = json.loads((tmp_path / "final" / "config.json").read_text())
    entries["transforms"][0]["resize"] = 40
    (tmp_path / "final" / "config.json").write_text(json.dumps(entries))
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a cat"}]
    record = {"id": "r", "image": "cat.png", "conversations": turns}
    (tmp_path / "d.json").write_text(json.dumps([record]))
    data = ConversationData(tmp_path / "d.json", root)
    config = TokensConfig(
        model=str(tmp_path / "final"), data=data, layer="block1", out=tmp_path / "o", device="cpu"
    )
    assistant = Assistant.load(tmp_path / "final", device="cpu")
    ((pixels, _),) = open_token_job(config).dataset[0]["images"]
    for found, tower in zip(pixels, assistant.towers, strict=True):
        assert torch.equal(found, tower.pixels(picture(1)))
    with pytest.raises(ValueError, match="device 'nowhere' can't be used"):
        open_token_job(replace(config, device="nowhere"))


def test_chat_answers_with_an_edit(root: Path, monkeypatch, capsys) -> None:
    words = ["chat", "--model", str(root / "final"), "--image", str(root / "cat.png")]
    words += ["--device", "cpu", "--max-new-tokens", "6", "--question", "what is it?"]
    main(words)
    plain = capsys.readouterr().out
    main([*words, "--ksae", f"block1={root / 'block1'}", "--edit", "block1:3:1000"])
    assert capsys.readouterr().out != plain
    main([*words, "--ksae", f"block1={root / 'block1'}", "--edit", "block1:3:0"])
    assert capsys.readouterr().out == plain
