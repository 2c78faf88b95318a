"""Stable Diffusion XL against diffusers' own pipeline: both text encoders, pooled text, sizes."""

import json
import shutil

import pytest
import torch
from backbones_helpers import tiny_sdxl
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from families_helpers import (
    IDS,
    NEAR,
    captured,
    check_family,
    check_files,
    check_generation,
    check_refused,
    check_shapes,
    load_whole,
    pixels_for,
    unet_modules,
)
from safetensors.torch import load_file, save_file

from revelio.backbones.diffusion.schedule import reference_schedule
from revelio.backbones.hooks import edit, hooked
from revelio.backbones.registry import describe_one, load_backbone

PROMPTS = ["a cat on grass", ""]
# unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, what of it is no default.
REAL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


@pytest.fixture(scope="module")
def model(folder):
    return load_whole(folder)


def told(pipeline, prompts, side):
    """What the pipeline itself tells its U-Net of prompts and of pictures of ``side`` pixels."""
    text, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    sizes = pipeline._get_add_time_ids(
        (side, side), (0, 0), (side, side), text.dtype, text_encoder_projection_dim=pooled.shape[-1]
    )
    added = {"text_embeds": pooled, "time_ids": sizes.repeat(len(prompts), 1)}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


@pytest.mark.parametrize("timestep", [0, 25, 999])
def test_activations_and_predictions_are_the_pipelines_own(folder, pipeline, timestep):
    check_family(
        folder,
        unet_modules(pipeline.unet),
        pipeline.scheduler,
        lambda x_t, steps: pipeline.unet(x_t, steps, **told(pipeline, PROMPTS, 32)).sample,
        PROMPTS,
        timestep,
        cuts=timestep == 25,
    )


def test_conditioning_is_the_pipelines_and_zeroes_no_empty_prompt(pipeline, model):
    conditioning = model.conditioning([*PROMPTS, PROMPTS[0]])
    text, negative, pooled, _ = pipeline.encode_prompt(PROMPTS)
    assert conditioning.rows.tolist() == [0, 1, 0]
    torch.testing.assert_close(conditioning.inputs["encoder_hidden_states"], text, **NEAR)
    torch.testing.assert_close(conditioning.inputs["text_embeds"], pooled, **NEAR)
    assert not negative.any() and conditioning.inputs["text_embeds"][1].abs().max() > 1e-3
    model.conditioning(PROMPTS)
    assert [text.encoded for text in model.texts] == [2, 2]


def test_an_edit_of_a_text_block_reaches_the_conditioning(model):
    plain = model.conditioning(["a dog"]).inputs["encoder_hidden_states"]
    with hooked(model.texts[1], {"block0": edit(lambda h: h + torch.arange(20))}):
        edited = model.conditioning(["a dog"]).inputs["encoder_hidden_states"]
    assert torch.equal(edited[..., :16], plain[..., :16])
    torch.testing.assert_close(edited[..., 16:], plain[..., 16:] + torch.arange(20), **NEAR)
    again = model.conditioning(["a dog"]).inputs["encoder_hidden_states"]
    assert torch.equal(again, plain)


def test_the_sizes_follow_the_picture(folder, pipeline):
    """Another picture size is told to the U-Net; that of the checkpoint would give other activations."""
    large = load_whole(folder, image_size=48)
    x0 = large.encode(pixels_for(large))
    found = large.activations(x0, IDS, ["up_ft1"], timestep=25, prompts=PROMPTS)["up_ft1"]
    x_t, modules = large.noised(x0, IDS, timestep=25), {"up_ft1": pipeline.unet.up_blocks[1]}
    by_side = {}
    for side in (48, 32):
        given, steps = told(pipeline, PROMPTS, side), torch.full((2,), 25)
        kept, _ = captured(modules, lambda g=given, s=steps: pipeline.unet(x_t, s, **g).sample)
        by_side[side] = kept["up_ft1"]
    torch.testing.assert_close(found, by_side[48], **NEAR)
    assert (found - by_side[32]).abs().max() > 1e-4


@pytest.mark.parametrize("zeros", [True, False])
def test_the_pipeline_generates_what_diffusers_does(folder, tmp_path, zeros):
    copy = shutil.copytree(folder, tmp_path / "m")
    path = copy / "model_index.json"
    index = json.loads(path.read_text()) | {"force_zeros_for_empty_prompt": zeros}
    path.write_text(json.dumps(index))
    theirs = StableDiffusionXLPipeline.from_pretrained(copy, add_watermarker=False)
    model = load_whole(copy)
    check_generation(model.pipeline(), theirs)
    # Diffusers' pipeline leaves recorders on the shared text encoders: texts are kept all the same.
    model.conditioning(["twice"])
    encoded = model.texts[0].encoded
    model.conditioning(["twice"])
    assert model.texts[0].encoded == encoded


def test_timesteps_match_by_signal_to_noise(model):
    kept = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    theirs = reference_schedule("linear")
    ratio = (theirs.snr(43).log() - (kept / (1 - kept)).log()).abs()
    assert model.schedule.match(theirs, 43) == int(ratio.argmin()) == 25


def test_half_precision_variants_and_single_files_load(folder, tmp_path, model):
    x0 = model.encode(pixels_for(model))
    expected = model.activations(x0, IDS, ["up_ft1"], timestep=25, prompts=PROMPTS)["up_ft1"]
    check_files(folder, tmp_path, "up_ft1", x0, PROMPTS, expected)


def test_a_checkpoint_under_the_original_names_gives_the_same(folder, tmp_path, model):
    """The names of the release's single file, as convert_diffusers_to_original_sdxl.py writes them."""
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.4.0.op",
    }
    for level in range(3):
        names[f"down_blocks.{level}.resnets.0"] = f"input_blocks.{2 * level + 1}.0"
        names[f"down_blocks.{level}.attentions.0"] = f"input_blocks.{2 * level + 1}.1"
        for i in range(2):
            names[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{2 * level + i}.0"
            names[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{2 * level + i}.1"
        names[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{2 * level + 1}.2"
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    original = {}
    for name, tensor in tensors.items():
        start = next(key for key in names if name.startswith(f"{key}."))
        rest = name.removeprefix(f"{start}.")
        head, _, tail = rest.partition(".")
        if "resnets" in start:
            rest = f"{inside[head]}.{tail}"
        original[f"model.diffusion_model.{names[start]}.{rest}"] = tensor
    original["first_stage_model.unused.weight"] = torch.zeros(1)
    save_file(original, tmp_path / "sd_xl.safetensors")
    other = load_backbone(f"{folder}+{tmp_path / 'sd_xl.safetensors'}", device="cpu")
    x0 = model.encode(pixels_for(model))
    for layer in model.layers:
        expected = model.activations(x0, IDS, [layer], timestep=25, prompts=PROMPTS)[layer]
        found = other.activations(x0, IDS, [layer], timestep=25, prompts=PROMPTS)[layer]
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("unet", {"addition_embed_type": "image"}, "has addition_embed_type 'image'"),
        ("unet", {"addition_time_embed_dim": None}, "has addition_time_embed_dim = None"),
        ("unet", {"in_channels": 9}, "takes 9 input channels"),
        ("unet", {"encoder_hid_dim_type": "ip_image_proj"}, "sets `encoder_hid_dim_type`"),
        ("text_encoder_2", {"model_type": "t5"}, "text_encoder_2/config.json of m is of a t5"),
    ],
)
def test_other_models_are_one_line(folder, tmp_path, part, changes, words):
    check_refused(folder, tmp_path, part, changes, words)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_missing_or_swapped_text_part_is_one_line(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "m")
    (copy / part).rename(tmp_path / "kept")
    (copy / part).mkdir()
    with pytest.raises(ValueError, match=part):
        load_whole(copy)
    if part == "text_encoder":
        (copy / part).rmdir()
        shutil.copytree(copy / "text_encoder_2", copy / part)
        with pytest.raises(ValueError, match=r"model\.safetensors of m has unexpected"):
            load_whole(copy)


def test_the_real_unet_has_the_catalogues_layers():
    """SDXL at 1024 px on the meta device, from its own config."""
    about = describe_one("sdxl")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(REAL)
        assert unet.num_parameters() == 2_567_463_684
        latents, text = torch.empty(1, 4, 128, 128), torch.empty(1, 77, 2048)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        shapes = {
            "bottleneck": (1280, 32, 32),
            "up_ft0": (1280, 64, 64),
            "up_ft1": (640, 128, 128),
            "up_ft2": (320, 128, 128),
        }
        check_shapes(
            unet, about, lambda: unet(latents, 25, text, added_cond_kwargs=added).sample, shapes
        )
    assert describe_one("sdxl-turbo").image_size == 512
