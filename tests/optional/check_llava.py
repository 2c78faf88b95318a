"""The plug-in inside LLaVA itself: its builders, its Llama model, its loader of projectors, its tools.

LLaVA is no dependency, so this file is not collected by default. Its files run with Revelio's transformers:

    python -m venv --system-site-packages peers && peers/bin/pip install --no-deps llava-torch
    PYTHONPATH=.:tests peers/bin/python -m pytest -c /dev/null --rootdir . tests/optional/check_llava.py
"""

from types import SimpleNamespace

import pytest
import torch
from llava_helpers import model_config, picture, tiny_llama, tower_configs

from llava_ext.export import export_projectors
from llava_ext.language import build_model
from llava_ext.llava_plugin import VisionTower, install, tower_names
from llava_ext.towers import load_towers

pytest.importorskip("llava")
from llava.mm_utils import process_images
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

IDS = torch.tensor([[5, -200, 9, 12, 7]])


@pytest.fixture(scope="module", autouse=True)
def installed():
    install()


@pytest.fixture(scope="module", params=["clip", "sd", "clip+sd", "clip+dinov2"])
def ours(request, tmp_path_factory):
    """A model of ours, its folder in LLaVA's form, and its language model's folder."""
    root = tmp_path_factory.mktemp("llava")
    towers = tower_configs(root)
    config = model_config(tiny_llama(root / "lm"), *(towers[n] for n in request.param.split("+")))
    model, _ = build_model(config, load_towers(config, "cpu"), seed=4)
    model.load_towers()
    export_projectors(model, root / "llava-tiny", "llava")
    return model.eval(), root / "llava-tiny", root / "lm"


def loaded(folder, base) -> LlavaLlamaForCausalLM:
    """As llava.model.builder.load_pretrained_model does with a base model and a projector."""
    config = LlavaConfig.from_pretrained(folder, pretraining_tp=1)
    model = LlavaLlamaForCausalLM.from_pretrained(base, config=config)
    state = torch.load(folder / "mm_projector.bin", map_location="cpu", weights_only=True)
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and not [k for k in found.missing_keys if "mm_proj" in k]
    tower = model.get_vision_tower()
    assert isinstance(tower, VisionTower) and not tower.is_loaded
    tower.load_model(device_map="auto")
    return model.eval()


def test_its_llama_model_gives_our_logits_loss_and_answer(ours) -> None:
    model, folder, base = ours
    theirs = loaded(folder, base)
    image = picture(3, (57, 40))
    seen = process_images([image], theirs.get_vision_tower().image_processor, theirs.config)
    assert theirs.get_vision_tower().num_patches == model.image_tokens
    grids = model.see(*_as_ours(model, image))
    labels = IDS.clamp_min(0)
    with torch.no_grad():
        for numbers in (seen, seen.half().float()):
            found = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS), images=numbers)
            wanted = model(IDS, torch.ones_like(IDS), None, grids).logits
            torch.testing.assert_close(found.logits, wanted, rtol=0, atol=1e-4)
        loss = theirs(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), images=seen, labels=labels
        ).loss
        assert loss.item() == pytest.approx(
            model(IDS, torch.ones_like(IDS), labels, grids).loss.item(), abs=1e-4
        )
        answer = theirs.generate(IDS, images=seen, max_new_tokens=6, do_sample=False)
        embedded = model.embed(IDS, torch.ones_like(IDS), None, grids)
        own = model.generate(
            inputs_embeds=embedded.embeddings, attention_mask=embedded.attention_mask,
            max_new_tokens=6, do_sample=False,
        )  # fmt: skip
    assert torch.equal(answer, own)


def _as_ours(model, image):
    from llava_ext.images import id_of, image_id, join_pixels

    return join_pixels(image, model.config.transforms)[None], torch.tensor([id_of(image_id(image))])


def test_its_stage_1_builds_trains_and_saves_what_we_import(ours, tmp_path) -> None:
    from llava_ext.import_llava import import_projectors

    model, _, base = ours
    name = tower_names(model.settings.towers)
    config = LlavaConfig.from_pretrained(base, pretraining_tp=1)
    theirs = LlavaLlamaForCausalLM.from_pretrained(base, config=config)
    arguments = SimpleNamespace(
        vision_tower=name, mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None, mm_patch_merge_type="flat", mm_projector_type="mlp2x_gelu",
    )  # fmt: skip
    theirs.get_model().initialize_vision_modules(arguments)
    theirs.requires_grad_(False)
    projector = theirs.get_model().mm_projector.requires_grad_(True)
    tower = theirs.get_vision_tower().to(dtype=torch.bfloat16)
    seen = tower.image_processor.preprocess(picture(2), return_tensors="pt")["pixel_values"]
    blank = torch.zeros(1, 3, *tower.image_processor.crop_size.values())
    images = torch.cat([seen, blank])
    ids = torch.cat([IDS, torch.tensor([[5, 6, 7, 8, 9]])])
    loss = theirs(
        input_ids=ids, attention_mask=torch.ones_like(ids), images=images, labels=ids.clamp_min(0)
    ).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in projector.parameters())
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter -= 0.1 * parameter.grad
    state = {key: p for key, p in theirs.state_dict().items() if "mm_projector" in key}
    torch.save(state, tmp_path / "mm_projector.bin")
    import_projectors(model, tmp_path)
    grids = tower(seen)
    with torch.no_grad():
        own = model.image_embeddings(model.see(*_as_ours(model, picture(2))))
        torch.testing.assert_close(projector(grids), own, rtol=0, atol=1e-5)
    assert not any("vision_tower" in key for key in theirs.state_dict())
