"""The model on tiny MPT and Llama: sparse loss against the language model's own, gradients, stages, files."""

import shutil
from dataclasses import replace

import pytest
import torch
from files_helpers import contents
from llava_helpers import model_config, tiny_llama, tiny_mpt
from safetensors.torch import load_file

from llava_ext.adapter import add_lora
from llava_ext.checkpoint import load_model, load_projectors, save_model
from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX, ModelConfig, TowerConfig
from llava_ext.language import assemble, context_length, load_language_model, load_tokenizer
from llava_ext.model import LlavaModel
from llava_ext.model_config import TowerShape
from llava_ext.run import frozen_and_trained
from llava_ext.stages import LoraOptions

CLIP = TowerConfig("clip", "block1", budget=4)
SD = TowerConfig("sd", "up_ft1", timestep=25, tokens="conv", budget=4, width=6)
SHAPES = (TowerShape(8, (2, 2)), TowerShape(10, (4, 4)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    return {"llama": tiny_llama(root / "llama"), "mpt": tiny_mpt(root / "mpt")}


def build(folder, towers=(CLIP, SD), shapes=SHAPES, **settings) -> LlavaModel:
    config = model_config(folder, *towers, **settings)
    return assemble(config, load_language_model(str(folder)), load_tokenizer(str(folder)), shapes)


def batch(side: str = "right"):
    """Three samples: one image, none, two images; and their images' grids."""
    rows = [[5, IMAGE_INDEX, 6, 7, 8], [9, 10, 11], [IMAGE_INDEX, 12, IMAGE_INDEX, 13]]
    gaps = [[0] * (5 - len(row)) for row in rows]
    pairs = list(zip(rows, gaps, strict=True))
    ids = torch.tensor([gap + row if side == "left" else row + gap for row, gap in pairs])
    ones = [([1] * len(row), gap) for row, gap in pairs]
    mask = torch.tensor([gap + row if side == "left" else row + gap for row, gap in ones])
    labels = torch.where((ids > 6) & (mask == 1), ids, IGNORE_INDEX)
    draw = torch.Generator().manual_seed(1)
    grids = [torch.randn(3, s.channels, *s.grid, generator=draw) for s in SHAPES]
    return ids, mask, labels, grids


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_loss_and_gradients_are_those_of_all_logits(folders, name, side):
    model = build(folders[name])
    ids, mask, labels, grids = batch(side)
    model.trainable("finetune")
    loss = model(ids, mask, labels, grids).loss
    loss.backward()
    sparse = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = model.embed(ids, mask, labels, grids)
    positions = {"position_ids": found.position_ids} if name == "llama" else {}
    full = model.language_model(
        inputs_embeds=found.embeddings,
        attention_mask=found.attention_mask,
        labels=found.labels,
        **positions,
    ).loss
    full.backward()
    assert torch.allclose(loss, full, atol=1e-6) and loss > 1
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.allclose(sparse[key], parameter.grad, atol=1e-5), key


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_padding_side_and_neighbours_change_nothing(folders, name):
    model = build(folders[name]).eval()
    ids, mask, labels, grids = batch()
    with torch.no_grad():
        loss = model(ids, mask, labels, grids).loss
        left = model(*batch("left")).loss
        summed = sum(
            model(ids[[row]], mask[[row]], labels[[row]], own, num_items_in_batch=1).loss
            for row, own in ((0, [g[:1] for g in grids]), (1, ()), (2, [g[1:] for g in grids]))
        )
    count = int((labels[:, 1:] != IGNORE_INDEX).sum())
    assert torch.allclose(loss, left, atol=1e-5)
    assert torch.allclose(loss, summed / count, atol=1e-5)


def test_images_are_seen(folders):
    model = build(folders["llama"]).eval()
    ids, mask, labels, grids = batch()
    with torch.no_grad():
        seen = model(ids, mask, labels, grids).loss
        for place in range(2):
            other = [g.flip(0) if n == place else g for n, g in enumerate(grids)]
            assert abs(model(ids, mask, labels, other).loss - seen) > 1e-4


def test_without_labels_all_logits_come(folders):
    model = build(folders["llama"])
    ids, mask, _, grids = batch()
    logits = model(ids, mask, None, grids).logits
    assert model.image_tokens == 8 and logits.shape[:2] == (3, 2 + 2 * 8)


def test_a_batch_of_text_gives_the_projectors_zero_gradients(folders):
    for name in ("llama", "mpt"):
        model = build(folders[name])
        model.trainable("finetune")
        ids = torch.tensor([[5, 6, 7]])
        model(ids, torch.ones_like(ids), ids).loss.backward()
        for key, parameter in model.projectors.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), key


def test_a_batch_without_labels_to_learn_has_loss_zero(folders):
    model = build(folders["llama"])
    ids = torch.tensor([[5, 6, 7]])
    loss = model(ids, torch.ones_like(ids), torch.full_like(ids, IGNORE_INDEX)).loss
    loss.backward()
    assert loss == 0


def test_stages_train_what_they_should(folders):
    model = build(folders["mpt"])
    model.trainable("pretrain")
    assert all(p.requires_grad for p in model.projectors.parameters())
    assert not any(p.requires_grad for p in model.language_model.parameters())
    ids, mask, labels, grids = batch()
    model(ids, mask, labels, grids).loss.backward()
    table = frozen_and_trained(model, ["clip block1"])
    assert "outside the model" in table and "language model" in table
    learnt = sum(p.numel() for p in model.projectors.parameters())
    assert f"{learnt:,} train" in table.splitlines()[-1]
    model.trainable("finetune")
    assert all(p.requires_grad for p in model.parameters())
    assert "frozen" not in frozen_and_trained(model)


def test_gradient_checkpointing_changes_no_gradient(folders):
    ids, mask, labels, grids = batch()
    found = []
    for checkpointing in (False, True):
        model = build(folders["llama"]).train()
        model.trainable("pretrain")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(ids, mask, labels, grids).loss.backward()
        found.append([p.grad for p in model.projectors.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fusion", ["interleave", "sequence", "channels"])
def test_every_fusion_builds_and_learns(folders, fusion):
    model = build(folders["llama"], fusion=fusion)
    ids, mask, labels, grids = batch()
    model(ids, mask, labels, grids).loss.backward()
    assert model.image_tokens == (4 if fusion == "channels" else 8)
    assert all(p.grad.any() for p in model.projectors.parameters())


def test_projectors_are_the_same_for_a_seed_and_leave_the_global_state(folders):
    before = torch.get_rng_state()
    first, second = (build(folders["llama"]).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_saved_by_reference_and_whole(folders, name, tmp_path):
    model = build(folders[name])
    tokenizer = load_tokenizer(str(folders[name]))
    ids, mask, labels, grids = batch()
    model.trainable("pretrain")
    save_model(model, tokenizer, tmp_path / "stage1")
    assert not (tmp_path / "stage1/language_model").exists()
    model.trainable("finetune")
    with torch.no_grad():
        next(model.language_model.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="save it `whole`"):
        save_model(model, tokenizer, tmp_path / "lost", language="reference")
    save_model(model, tokenizer, tmp_path / "stage2")
    losses = [
        LlavaModel.from_pretrained(tmp_path / stage)(ids, mask, labels, grids).loss
        for stage in ("stage1", "stage2")
    ]
    assert torch.equal(losses[1], model(ids, mask, labels, grids).loss)
    assert abs(losses[0] - losses[1]) > 1e-3
    again, own = load_model(tmp_path / "stage2")
    assert own.pad_token == tokenizer.pad_token and again.settings == model.settings
    save_model(again, own, tmp_path / "again")
    assert (tmp_path / "again/language_model").is_dir(), "a reference would lose what was trained"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_embeddings_are_saved_once_in_any_number_format(folders, dtype, tmp_path):
    """Trained in float32 and saved in fewer bits: as many bytes as the model has parameters."""
    model = build(folders["llama"], dtype=dtype)
    model.trainable("finetune")
    model.language_model.float()
    save_model(model, load_tokenizer(str(folders["llama"])), tmp_path / "out")
    saved = load_file(tmp_path / "out/language_model/model.safetensors")
    assert sum(each.numel() for each in saved.values()) == model.language_model.num_parameters()
    assert {str(each.dtype) for each in saved.values()} == {f"torch.{dtype}"}
    again, _ = load_model(tmp_path / "out")
    output = again.language_model.get_output_embeddings().weight
    assert output.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    wanted = model.get_input_embeddings().weight.to(output.dtype)
    assert torch.equal(output, wanted)


def test_saved_with_an_adapter(folders, tmp_path):
    for base_changed in (False, True):
        model = build(folders["llama"])
        if base_changed:
            model.trainable("finetune")
            with torch.no_grad():
                model.language_model.get_input_embeddings().weight.mul_(1.5)
        add_lora(model, LoraOptions(rank=2, alpha=4))
        model.trainable("finetune")
        assert "lora" not in str(model.settings) and model.language_changed == base_changed
        learnt = [n for n, p in model.language_model.named_parameters() if p.requires_grad]
        assert learnt and all("lora_" in name for name in learnt)
        with torch.no_grad():
            for parameter in model.language_model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        ids, mask, labels, grids = batch()
        folder = tmp_path / f"adapter{base_changed}"
        save_model(model, load_tokenizer(str(folders["llama"])), folder)
        assert (folder / "language_model").exists() == base_changed
        again, _ = load_model(folder)
        assert torch.allclose(
            again(ids, mask, labels, grids).loss, model(ids, mask, labels, grids).loss, atol=1e-6
        )


def test_an_adapter_is_saved_without_the_hub(folders, tmp_path, monkeypatch):
    """A packaged model's name is no hub id, and peft would look it up, and warn where it isn't found."""
    model = build(folders["llama"])
    add_lora(model, LoraOptions(rank=2))
    model.settings = replace(model.settings, language_model="packaged-name")
    asked: list[object] = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *a, **_: asked.append(a)
    )
    save_model(model, load_tokenizer(str(folders["llama"])), tmp_path)
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert not asked and weights and all("lora_" in name for name in weights)


def test_stage_two_begins_with_the_projectors_of_stage_one(folders, tmp_path):
    model, other = build(folders["llama"]), build(folders["llama"])
    with torch.no_grad():
        next(model.projectors.parameters()).add_(1)
    tokenizer = load_tokenizer(str(folders["llama"]))
    save_model(model, tokenizer, tmp_path / "a")
    load_projectors(other, tmp_path / "a")
    mine, theirs = model.projectors.state_dict(), other.projectors.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    wide = build(folders["llama"], (CLIP,), (TowerShape(9, (2, 2)),))
    save_model(wide, tokenizer, tmp_path / "b")
    narrow = build(folders["llama"], (CLIP,), (TowerShape(8, (2, 2)),))
    with pytest.raises(ValueError, match=r"0.mlp.0.weight of shape \(32, 9\).*wants \(32, 8\)"):
        load_projectors(narrow, tmp_path / "b")
    with pytest.raises(ValueError, match=r"lacks 1\.mlp\.0\.bias"):
        load_projectors(other, tmp_path / "b")


def test_damaged_or_foreign_folders_are_one_line(folders, tmp_path):
    model = build(folders["llama"])
    save_model(model, load_tokenizer(str(folders["llama"])), tmp_path / "a")
    (tmp_path / "a/projectors.safetensors").write_bytes(b"12345678901")
    for path, message in [
        (tmp_path / "a", "is cut, or is no safetensors file"),
        (tmp_path, "holds no config.json"),
        (tmp_path / "nothing here", "no model at"),
        (folders["llama"], "is of no model that llava_ext 2 can read"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_model(path)
        assert "\n" not in str(error.value)
    shutil.copytree(tmp_path / "a", tmp_path / "run/final")
    with pytest.raises(ValueError, match=r"run holds no config.json: give .*run/final$"):
        load_model(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    for name in ("manifest.json", "config.yaml"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(
        ValueError, match=r"config.json: it is a run that isn't finished, .*`resume`$"
    ):
        load_model(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no model"):
        save_model(model, load_tokenizer(str(folders["llama"])), tmp_path / "full")


def test_saving_over_a_model_leaves_other_files_and_refuses_stale_weights(folders, tmp_path):
    model = build(folders["llama"])
    tokenizer = load_tokenizer(str(folders["llama"]))
    save_model(model, tokenizer, tmp_path / "a", language="whole")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "a")
    save_model(model, tokenizer, tmp_path / "a", language="whole")
    assert contents(tmp_path / "a") == before
    (tmp_path / "a" / "language_model" / "model-00001-of-00002.safetensors").write_text("stale")
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=r"model-00001-of-00002.*no part of this model"):
        save_model(model, tokenizer, tmp_path / "a", language="whole")
    assert contents(tmp_path / "a") == before


def test_pad_token_and_context(folders):
    assert load_tokenizer(str(folders["mpt"])).pad_token == "<|endoftext|>"
    assert load_tokenizer(str(folders["llama"])).pad_token == "<|pad|>"
    assert context_length(load_language_model(str(folders["mpt"])).config) == 128
    assert context_length(load_language_model(str(folders["llama"])).config) == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 200}, "`max_length` 200 is beyond .*`max_length: 128`"),
        ({"max_length": 8}, "an image takes 8 tokens"),
        ({"template": "mtp"}, "unknown template 'mtp'"),
    ],
)
def test_settings_that_do_not_fit_are_errors(folders, settings, message):
    with pytest.raises(ValueError, match=message):
        build(folders["mpt"], **settings)


def test_language_models_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("./nowhere", "no language model at './nowhere'"),
        (str(tmp_path / "empty"), "can't be loaded as a causal language model"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_language_model(name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="`towers` is empty"):
        ModelConfig("x", ())


def test_a_wrong_number_of_grids_is_an_error(folders):
    ids, mask, labels, grids = batch()
    with pytest.raises(ValueError, match="1 grid but 2 towers"):
        build(folders["llama"])(ids, mask, labels, grids[:1])
