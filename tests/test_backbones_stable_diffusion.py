"""Stable Diffusion against diffusers' own uncut pipeline with a plain hook."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from backbones_helpers import SD_LAYERS, picture, tiny_sd
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from families_helpers import NEAR, check_family, check_shapes, load_whole, unet_modules
from torch import nn

from revelio.backbones.diffusion.schedule import keyed_noise
from revelio.backbones.diffusion.unet import cut
from revelio.backbones.layers import unet_layers
from revelio.backbones.registry import describe_one, load_backbone

IDS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(str(folder), device="cpu")


@pytest.fixture(scope="module")
def pixels(backbone):
    return torch.stack([backbone.transform(picture(i)) for i in range(3)])


def reference_grids(folder, latents, ids, timestep, prompts):
    """The released way, with noise keyed as ours: the whole pipeline and hooks on the uncut U-Net."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    kept = {}
    modules = {"bottleneck": pipeline.unet.mid_block}
    modules |= {f"up_ft{i}": block for i, block in enumerate(pipeline.unet.up_blocks)}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
    with torch.no_grad():
        noise = keyed_noise(latents.shape[1:], ids, seed=0, timestep=timestep, draw=0)
        steps = torch.full((len(ids),), timestep)
        noised = pipeline.scheduler.add_noise(latents.float(), noise, steps)
        text, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, False)
        output = pipeline.unet(noised, steps, encoder_hidden_states=text).sample
    assert output.shape == latents.shape
    return {name: grid.float() for name, grid in kept.items()}


@pytest.mark.parametrize("timestep", [0, 25, 999])
def test_grids_equal_hooks_on_the_whole_pipeline(folder, backbone, pixels, timestep):
    prompts = ["", "a photo of a cat", "a dog"]
    encoded = backbone.encode(pixels)
    expected = reference_grids(folder, encoded, IDS, timestep, prompts)
    ours = backbone.activations(encoded, IDS, SD_LAYERS, timestep=timestep, prompts=prompts)
    assert tuple(ours) == SD_LAYERS
    for layer in SD_LAYERS:
        torch.testing.assert_close(ours[layer], expected[layer], atol=1e-5, rtol=1e-4)
        assert ours[layer].is_contiguous() and ours[layer].dtype == torch.float32


# text_encoder/config.json of SD-2.1, OpenCLIP's ViT-H without its last block, but for its width.
OPEN_CLIP = {"hidden_act": "gelu", "num_hidden_layers": 23, "projection_dim": 512}


@pytest.mark.parametrize("zero_snr", [False, True])
def test_sd_2_1_velocity_open_clip_and_zero_terminal_snr(tmp_path, zero_snr):
    folder = tiny_sd(
        tmp_path / "sd-2.1",
        prediction_type="v_prediction",
        text_width=20,
        text=OPEN_CLIP,
        zero_snr=zero_snr,
    )
    model, pipeline = load_whole(folder), StableDiffusionPipeline.from_pretrained(folder)
    assert len(model.text.layers) == 23
    text, _ = pipeline.encode_prompt(["a cat", ""], "cpu", 1, False)
    check_family(
        folder,
        unet_modules(pipeline.unet),
        pipeline.scheduler,
        lambda x_t, steps: pipeline.unet(x_t, steps, text).sample,
        ["a cat", ""],
        999 if zero_snr else 200,
        cuts=False,
    )
    # What the velocity says of the image and of the noise, by the scheduler's own step.
    schedule, ddim = model.schedule, pipeline.scheduler
    x_t, velocity = torch.randn(2, 2, 4, 16, 16)
    ddim.set_timesteps(1000)
    for timestep in (200, 998):
        clean = ddim.step(velocity, timestep, x_t).pred_original_sample
        torch.testing.assert_close(schedule.x0(velocity, x_t, timestep), clean, **NEAR)
        noised = schedule.add_noise(clean, schedule.epsilon(velocity, x_t, timestep), timestep)
        torch.testing.assert_close(noised, x_t, **NEAR)
    assert (float(schedule.alphas[999]) == 0) == zero_snr
    if zero_snr:
        torch.testing.assert_close(schedule.x0(velocity, x_t, 999), -velocity)
        torch.testing.assert_close(schedule.epsilon(velocity, x_t, 999), x_t)


def test_latents_are_the_posterior_mode_scaled_in_half_precision(folder, backbone, pixels):
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    encoded = backbone.encode(pixels)
    assert encoded.dtype == torch.float16 and encoded.shape == (3, 4, 16, 16)
    torch.testing.assert_close(encoded.float(), mean, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("layers", [["bottleneck"], ["up_ft1"], ["up_ft3"]])
def test_a_cut_model_gives_the_same_with_fewer_parameters(folder, backbone, pixels, layers):
    small = load_backbone(str(folder), layers=layers, device="cpu")
    whole = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    deepest = SD_LAYERS.index(layers[0])
    assert tuple(small.layers) == SD_LAYERS[: deepest + 1]
    later = list(whole.up_blocks)[deepest:]
    dropped = [*later, whole.conv_norm_out, whole.conv_out]
    gone = sum(p.numel() for module in dropped for p in module.parameters())
    assert small.unet.num_parameters() == whole.num_parameters() - gone
    encoded = backbone.encode(pixels)
    expected = backbone.activations(encoded, IDS, layers, timestep=25)[layers[0]]
    assert torch.equal(small.activations(encoded, IDS, layers, timestep=25)[layers[0]], expected)


def test_what_is_cut_off_is_freed(folder):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    dropped = [weakref.ref(unet.up_blocks[2]), weakref.ref(unet.conv_out.weight)]
    kept = unet_layers(unet.config, {"block_out_channels": (8, 8)})
    cut(unet, {layer: kept[layer] for layer in ("bottleneck", "up_ft0", "up_ft1")})
    gc.collect()
    assert [ref() for ref in dropped] == [None, None]


def test_a_cut_model_has_no_decoder(folder):
    backbone = load_backbone(str(folder), layers=["up_ft3"], device="cpu")
    assert isinstance(backbone.latents.vae.decoder, nn.Identity)
    assert isinstance(backbone.unet.conv_out, nn.Identity)


def test_grids_do_not_change_with_batch_size_or_order(backbone, pixels):
    encoded = backbone.encode(pixels)
    together = backbone.activations(encoded, IDS, ["up_ft1"], timestep=25)["up_ft1"]
    for i, name in enumerate(IDS):
        alone = backbone.activations(encoded[i : i + 1], [name], ["up_ft1"], timestep=25)["up_ft1"]
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-5)
    turned = backbone.activations(encoded.flip(0), IDS[::-1], ["up_ft1"], timestep=25)["up_ft1"]
    torch.testing.assert_close(turned.flip(0), together, atol=1e-6, rtol=1e-5)


def test_grids_are_repeatable_and_keyed(backbone, pixels):
    encoded = backbone.encode(pixels)

    def grid(**changes):
        return backbone.activations(encoded, IDS, ["up_ft0"], **({"timestep": 25} | changes))[
            "up_ft0"
        ]

    state = torch.random.get_rng_state()
    assert torch.equal(grid(), grid())
    assert torch.equal(torch.random.get_rng_state(), state)
    for change in ({"seed": 1}, {"draw": 1}, {"timestep": 26}, {"prompts": ["a", "b", "c"]}):
        assert (grid(**change) - grid()).abs().max() > 1e-3


def test_each_text_is_encoded_once(folder, pixels):
    backbone = load_backbone(str(folder), layers=["bottleneck"], device="cpu")
    encoded = backbone.encode(pixels)
    for timestep in (0, 25):
        backbone.activations(encoded, IDS, ["bottleneck"], timestep=timestep)
        backbone.activations(
            encoded, IDS, ["bottleneck"], timestep=timestep, prompts=["cat", "dog", "cat"]
        )
    assert backbone.text.encoded == 3
    assert torch.equal(backbone.text.embed(["dog", "cat"])[1:], backbone.text.embed(["cat"]))


def test_long_prompts_are_cut_to_the_models_length(backbone):
    assert backbone.text.embed(["word " * 100]).shape == (1, 16, 16)


def test_backbone_grids_can_train_a_head(backbone, pixels):
    grid = backbone.activations(backbone.encode(pixels), IDS, ["up_ft0"], timestep=25)["up_ft0"]
    head = nn.Conv2d(16, 2, 1)
    head(grid).sum().backward()
    assert head.weight.grad is not None and not grid.requires_grad
    assert not any(p.requires_grad for p in backbone.unet.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(folder, backbone, pixels, dtype):
    low = load_backbone(str(folder), dtype=dtype, device="cpu")
    assert low.unet.dtype == getattr(torch, dtype)
    encoded = backbone.encode(pixels)
    ours = low.activations(encoded, IDS, ["up_ft1"], timestep=25)["up_ft1"]
    expected = backbone.activations(encoded, IDS, ["up_ft1"], timestep=25)["up_ft1"]
    error = (ours - expected).norm() / expected.norm()
    assert 0 < error < 0.05


def test_eager_attention_agrees(folder, backbone, pixels):
    eager = load_backbone(str(folder), attention="eager", device="cpu")
    names = {type(p).__name__ for p in eager.unet.attn_processors.values()}
    assert names == {"AttnProcessor"}
    encoded = backbone.encode(pixels)
    ours = eager.activations(encoded, IDS, SD_LAYERS, timestep=25)
    expected = backbone.activations(encoded, IDS, SD_LAYERS, timestep=25)
    for layer in SD_LAYERS:
        torch.testing.assert_close(ours[layer], expected[layer], atol=1e-5, rtol=1e-4)


def test_other_image_sizes(folder):
    backbone = load_backbone(str(folder), image_size=48, device="cpu")
    encoded = backbone.encode(backbone.transform(picture(0))[None])
    assert backbone.activations(encoded, ["a"], ["up_ft0"], timestep=0)["up_ft0"].shape == (
        1,
        16,
        6,
        6,
    )
    with pytest.raises(
        ValueError, match=r"image_size 40 doesn't fit .* multiples of 16.* 32 or 48"
    ):
        load_backbone(str(folder), image_size=40)
    with pytest.raises(ValueError, match="pixels of 40x32 don't fit"):
        backbone.encode(torch.zeros(1, 3, 40, 32))


def test_a_vae_that_overflows_is_named(folder, tmp_path, pixels):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    path = broken / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"scaling_factor": 1e6}))
    with pytest.raises(ValueError, match=r"overflows .* float32 or bfloat16"):
        load_backbone(str(broken), device="cpu").encode(pixels)


def test_mistakes_are_named(folder, backbone, pixels):
    encoded = backbone.encode(pixels)
    with pytest.raises(KeyError, match=r"unknown layer 'up_ft9' .* up_ft3"):
        load_backbone(str(folder), layers=["up_ft9"])
    cut_off = load_backbone(str(folder), layers=["bottleneck"], device="cpu")
    with pytest.raises(KeyError, match="choose from bottleneck"):
        cut_off.activations(encoded, IDS, ["up_ft1"], timestep=0)
    with pytest.raises(ValueError, match="give a timestep"):
        backbone.activations(encoded, IDS, ["up_ft1"])
    with pytest.raises(ValueError, match="1000 is outside"):
        backbone.activations(encoded, IDS, ["up_ft1"], timestep=1000)
    with pytest.raises(ValueError, match="3 images but 2 ids"):
        backbone.activations(encoded, IDS[:2], ["up_ft1"], timestep=0)
    with pytest.raises(ValueError, match="3 images but one text"):
        backbone.activations(encoded, IDS, ["up_ft1"], timestep=0, prompts="a cat")


SD_2_1 = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("name", "config", "parameters", "sides"),
    [
        ("sd-1.5", {"cross_attention_dim": 768}, 859_520_964, (8, 16, 32, 64, 64)),
        ("sd-2.1", SD_2_1, 865_910_724, (12, 24, 48, 96, 96)),
    ],
)
def test_the_full_size_unet_has_the_papers_shapes(name, config, parameters, sides):
    """On the meta device: shapes without 3.4 GB of weights."""
    about = describe_one(name)
    latents = about.image_size // 8
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=latents, **config)
        assert unet.num_parameters() == parameters
        z, text = (
            torch.empty(1, 4, latents, latents),
            torch.empty(1, 77, config["cross_attention_dim"]),
        )
        channels = (1280, 1280, 1280, 640, 320)
        shapes = {
            layer: (width, side, side)
            for layer, width, side in zip(SD_LAYERS, channels, sides, strict=True)
        }
        check_shapes(unet, about, lambda: unet(z, 25, text)[0], shapes)
