"""SD3 and SD3.5 against diffusers' own pipeline and transformer with plain hooks."""

import json
import shutil
from typing import Any

import pytest
import torch
from backbones_helpers import fp16_only
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from families_helpers import check_generation, check_refused
from flow_helpers import tiny_sd3

from revelio.backbones.base import DiffusionModel
from revelio.backbones.diffusion.schedule import keyed_noise, reference_schedule
from revelio.backbones.hooks import capture, edit, hooked
from revelio.backbones.layers import LayerSpec, dit_layers
from revelio.backbones.registry import describe_one, load_backbone

IDS = ["a", "b"]
PROMPTS = ["a cat", ""]
LAYERS = {f"block{i}": LayerSpec(16, 4) for i in range(3)}
NEARLY: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd3")
    return {
        "sd3": tiny_sd3(root / "sd3"),
        "sd3.5": tiny_sd3(root / "dual", dual=(0, 1)),
        "no-t5": tiny_sd3(root / "no-t5", t5=False),
    }


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(folder, **settings) -> Any:
    return load_backbone(str(folder), device="cpu", **settings)


def uncut(folder) -> Any:
    """Diffusers' pipeline; it has to be told of a T5 that isn't there."""
    without = (
        {}
        if (folder / "text_encoder_3").is_dir()
        else {"text_encoder_3": None, "tokenizer_3": None}
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def reference(folder, z0, index):
    """Blocks' image tokens, noised latents, prediction and text of the whole pipeline called by hand."""
    pipeline = uncut(folder)
    # The scheduler lists its timesteps from noise to image.
    time = pipeline.scheduler.timesteps.flip(0)[index].expand(2)
    noise = keyed_noise(z0.shape[1:], IDS, seed=0, timestep=index, draw=0)
    x_t = pipeline.scheduler.scale_noise(z0, time, noise)
    text = pipeline.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False)
    kept = {}
    for i, block in enumerate(pipeline.transformer.transformer_blocks):
        block.register_forward_hook(lambda _m, _i, out, i=i: kept.update({f"block{i}": out[1]}))
    output = pipeline.transformer(
        x_t, timestep=time, encoder_hidden_states=text[0], pooled_projections=text[2]
    ).sample
    return kept, x_t, output, text


@pytest.mark.parametrize(("name", "index"), [("sd3", 0), ("sd3.5", 500), ("no-t5", 999)])
def test_activations_and_predictions_are_the_pipelines_own(folders, pixels, name, index):
    whole = load(folders[name])
    assert isinstance(whole, DiffusionModel) and dict(whole.layers) == LAYERS
    encoded = whole.encode(pixels)
    kept, x_t, output, text = reference(folders[name], encoded.float(), index)
    conditioning = whole.conditioning([*PROMPTS, PROMPTS[0]])
    inputs = conditioning.inputs
    torch.testing.assert_close(inputs["encoder_hidden_states"], text[0], **NEARLY)
    torch.testing.assert_close(inputs["pooled_projections"], text[2], **NEARLY)
    assert conditioning.rows.tolist() == [0, 1, 0]
    torch.testing.assert_close(
        whole.predict(x_t, index, whole.conditioning(PROMPTS)), output, **NEARLY
    )
    found = whole.activations(encoded, IDS, list(LAYERS), timestep=index, prompts=PROMPTS)
    for layer in LAYERS:
        assert found[layer].shape == (2, 16, 8, 8)
        tokens = found[layer].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, kept[layer], **NEARLY)
    for layer in ("block0", "block2"):
        cut = load(folders[name], layers=[layer])
        assert list(cut.layers)[-1] == layer
        alone = cut.activations(encoded, IDS, [layer], timestep=index, prompts=PROMPTS)
        assert torch.equal(alone[layer], found[layer])


def test_an_edit_changes_the_image_tokens_only(folders, pixels):
    model = load(folders["sd3"])
    x_t = model.encode(pixels).float()
    text, image = [], {}

    def watch(_module, _inputs, output):
        text.append(output[0])

    handle = model.module("block0").register_forward_hook(watch)
    plain = model.predict(x_t, 100, model.conditioning(PROMPTS))
    with hooked(
        model, {"block0": edit(lambda h: h + torch.arange(16)), "block1": capture(image, "block1")}
    ):
        changed = model.predict(x_t, 100, model.conditioning(PROMPTS))
    handle.remove()
    assert torch.equal(text[0], text[1]) and image["block1"].shape == (2, 64, 16)
    assert (changed - plain).abs().max() > 1e-3


def test_latents_come_back_as_the_pipelines_pixels(folders, pixels):
    model = load(folders["sd3"])
    vae = uncut(folders["sd3"]).vae
    z, (scale, shift) = model.encode(pixels), (vae.config.scaling_factor, vae.config.shift_factor)
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
        expected = vae.decode(z.float() / scale + shift)
    assert shift == 0.25
    torch.testing.assert_close(z.float(), (mode - shift) * scale, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.decode(z), expected.sample, **NEARLY)


@pytest.mark.parametrize("name", ["sd3", "no-t5"])
def test_the_pipeline_generates_what_diffusers_does(folders, name):
    check_generation(load(folders[name]).pipeline(), uncut(folders[name]))


def test_half_precision_variants_and_eager_attention(folders, pixels, tmp_path):
    model = load(folders["sd3"])
    encoded = model.encode(pixels)
    wanted: Any = {"timestep": 300, "prompts": PROMPTS}
    expected = model.activations(encoded, IDS, ["block2"], **wanted)["block2"]
    eager = load(folders["sd3"], attention="eager")
    found = eager.activations(encoded, IDS, ["block2"], **wanted)["block2"]
    torch.testing.assert_close(found, expected, **NEARLY)
    folder = fp16_only(folders["sd3"], tmp_path / "fp16")
    small = load(folder)
    found = small.activations(encoded, IDS, ["block2"], **wanted)["block2"]
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_timesteps_match_ddpms_by_signal_to_noise_ratio(folders):
    flow = load(folders["sd3"]).schedule
    fraction = torch.arange(1, 1001, dtype=torch.float64) / 1000
    sigma = 3 * fraction / (1 + 2 * fraction)
    noise = 2 * ((1 - sigma) / sigma).log()  # of the flow, from its definition
    for name in ("scaled_linear", "linear", "cosine"):
        other = reference_schedule(name)
        ratios = other.alphas.double() ** 2 / other.sigmas.double() ** 2
        for t in (0, 25, 200, 600, 950):
            gaps = [abs(float(value - ratios[t].log())) for value in noise]
            found = flow.match(other, t)
            assert gaps[found] <= min(gaps) + 1e-4
            back = other.match(flow, found)
            gaps = [abs(float(noise[found] - ratio.log())) for ratio in ratios]
            assert gaps[back] <= min(gaps) + 1e-4


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"in_channels": 16}, "takes 16 channels, its VAE gives 4"),
        ("transformer", {"num_layers": None}, "has num_layers = None"),
        ("transformer", {"joint_attention_dim": 64}, "is 48 wide, its denoiser takes 64"),
        ("transformer", {"pooled_projection_dim": 16}, "is 32 wide, its denoiser takes 16"),
        ("text_encoder_3", {"model_type": "umt5"}, "is of a umt5, not of a t5"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(folders, tmp_path, part, changes, words):
    check_refused(folders["sd3"], tmp_path, part, changes, words)


def test_another_schedule_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "m")
    config = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
    betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config | betas))
    with pytest.raises(ValueError, match="not of a rectified flow"):
        load(folder)


MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
MEDIUM_35 = MEDIUM | {
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}


@pytest.mark.parametrize(("name", "config"), [("sd3-medium", MEDIUM), ("sd3.5-medium", MEDIUM_35)])
def test_the_full_size_models_have_24_blocks_of_width_1536(name, config):
    """At 1024 px on the meta device: the first and the last block of the real config."""
    layers = dit_layers(config, {"block_out_channels": (128, 256, 512, 512)})
    assert layers == {f"block{i}": LayerSpec(1536, 16) for i in range(24)}
    assert dict(describe_one(name).layers) == layers
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config)
        kept = []
        for i in (0, 23):
            transformer.transformer_blocks[i].register_forward_hook(
                lambda _m, _i, out: kept.append(tuple(out[1].shape))
            )
        with torch.no_grad():
            output = transformer(
                torch.empty(1, 16, 128, 128),
                encoder_hidden_states=torch.empty(1, 333, 4096),
                pooled_projections=torch.empty(1, 2048),
                timestep=torch.empty(1),
            ).sample
    assert kept == [(1, (1024 // 16) ** 2, 1536)] * 2 and output.shape == (1, 16, 128, 128)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert count == {"sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520}[name]
