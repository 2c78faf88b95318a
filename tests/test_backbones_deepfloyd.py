"""DeepFloyd-IF, stage I, against diffusers' own pipeline: pixels, T5, learned variance."""

import json
import shutil

import pytest
import torch
from backbones_helpers import tiny_if
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from families_helpers import (
    IDS,
    NEAR,
    check_family,
    check_files,
    check_generation,
    check_refused,
    check_shapes,
    load_whole,
    pixels_for,
    unet_modules,
)

from revelio.backbones.diffusion.schedule import reference_schedule
from revelio.backbones.registry import describe_one

PROMPTS = [" A Cat on grass", ""]
# unet/config.json of DeepFloyd/IF-I-XL-v1.0, what of it is no default.
REAL = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "attention_head_dim": 64,
    "block_out_channels": [704, 1408, 2112, 2816],
    "cross_attention_dim": 2816,
    "cross_attention_norm": "group_norm",
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "encoder_hid_dim": 4096,
    "in_channels": 3,
    "layers_per_block": 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_if(tmp_path_factory.mktemp("models") / "if")


@pytest.fixture(scope="module")
def pipeline(folder):
    return IFPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return load_whole(folder)


@pytest.mark.parametrize("timestep", [0, 25, 999])
def test_activations_and_predictions_are_the_pipelines_own(folder, pipeline, timestep):
    text, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)

    def predicted(x_t, steps):
        noise, _variance = pipeline.unet(x_t, steps, text).sample.split(3, dim=1)
        return noise

    modules, cuts = unet_modules(pipeline.unet), timestep == 25
    check_family(folder, modules, pipeline.scheduler, predicted, PROMPTS, timestep, cuts=cuts)


def test_pixels_stay_as_they_are(model):
    pixels = pixels_for(model)
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert torch.equal(model.encode(pixels), pixels)
    assert torch.equal(model.decode(pixels), pixels)
    with pytest.raises(ValueError, match="must be multiples of 4"):
        model.encode(torch.zeros(1, 3, 16, 18))


def test_conditioning_is_the_pipelines_in_lower_case(pipeline, model):
    conditioning = model.conditioning([*PROMPTS, PROMPTS[0]])
    text, empty = pipeline.encode_prompt(PROMPTS)
    found = conditioning.inputs["encoder_hidden_states"]
    assert conditioning.rows.tolist() == [0, 1, 0] and found.shape == (2, 77, 16)
    torch.testing.assert_close(found, text, **NEAR)
    torch.testing.assert_close(found[1], empty[0], **NEAR)
    assert torch.equal(model.conditioning(["a cat on grass"]).arguments().popitem()[1][0], found[0])


def test_eager_attention_agrees(folder, model):
    eager, x0 = load_whole(folder, attention="eager"), pixels_for(model)
    names = {type(each).__name__ for each in eager.unet.attn_processors.values()}
    assert names == {"AttnAddedKVProcessor"}
    for layer in model.layers:
        expected = model.activations(x0, IDS, [layer], timestep=25, prompts=PROMPTS)[layer]
        found = eager.activations(x0, IDS, [layer], timestep=25, prompts=PROMPTS)[layer]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_pipeline_generates_what_diffusers_does(model, pipeline):
    check_generation(model.pipeline(), pipeline)


def test_timesteps_match_by_signal_to_noise(model):
    """t = 25 of Stable Diffusion's schedule is t = 90 of this one (SPEC 2.8)."""
    kept = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    theirs = reference_schedule("scaled_linear")
    ratio = (theirs.snr(25).log() - (kept / (1 - kept)).log()).abs()
    assert model.schedule.match(theirs, 25) == int(ratio.argmin()) == 90


def test_half_precision_variants_and_single_files_load(folder, tmp_path, model):
    x0 = pixels_for(model)
    expected = model.activations(x0, IDS, ["up_ft0"], timestep=25, prompts=PROMPTS)["up_ft0"]
    check_files(folder, tmp_path, "up_ft0", x0, PROMPTS, expected)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "listed"])
def test_a_missing_text_part_is_one_line(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "m")
    if part == "listed":
        path = copy / "model_index.json"
        index = json.loads(path.read_text()) | {"text_encoder": [None, None]}
        path.write_text(json.dumps(index))
        words = "lists no `text_encoder` of class T5EncoderModel"
    else:
        shutil.rmtree(copy / part)
        words = f"m has no .*{part}"
    with pytest.raises(ValueError, match=words) as error:
        load_whole(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 6}, "takes 6 input channels: stage I"),
        ({"class_embed_type": "timestep"}, "sets `class_embed_type`"),
        ({"addition_embed_type": "image"}, "has addition_embed_type 'image'"),
        ({"encoder_hid_dim": 8}, "text encoder of m is 16 wide, its denoiser takes 8"),
    ],
)
def test_other_unets_are_refused(folder, tmp_path, changes, words):
    check_refused(folder, tmp_path, "unet", changes, words)


def test_the_real_unet_has_the_catalogues_layers():
    """IF-I-XL at 64 px on the meta device, from its own config; 4.3 billion parameters, as published."""
    about = describe_one("deepfloyd-if-xl")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(REAL)
        assert 4.25e9 < unet.num_parameters() < 4.35e9
        pixels, text = torch.empty(1, 3, 64, 64), torch.empty(1, 77, 4096)
        shapes = {
            "bottleneck": (2816, 8, 8),
            "up_ft0": (2816, 16, 16),
            "up_ft1": (2112, 32, 32),
            "up_ft2": (1408, 64, 64),
            "up_ft3": (704, 64, 64),
        }
        check_shapes(unet, about, lambda: unet(pixels, 25, text).sample, shapes)
    assert about.image_size == 64
