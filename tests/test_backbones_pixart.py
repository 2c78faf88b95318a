"""PixArt against diffusers' own pipelines: T5 with its mask, learned variance, sizes as inputs."""

import json
import shutil

import pytest
import torch
from backbones_helpers import fp16_only, tiny_pixart
from diffusers import DDPMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from families_helpers import (
    IDS,
    NEAR,
    captured,
    check_family,
    check_generation,
    check_refused,
    load_whole,
    pixels_for,
)
from safetensors.torch import load_file

from revelio.backbones.diffusion.schedule import reference_schedule
from revelio.backbones.layers import LayerSpec
from revelio.backbones.registry import describe_one, load_backbone

PROMPTS = [" A Cat on grass", ""]
KINDS = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline, "sizes": PixArtAlphaPipeline}
# transformer/config.json of PixArt-alpha/PixArt-XL-2-512x512, and what Sigma's 512-MS has beside it.
REAL = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 64,
    "upcast_attention": False,
    "use_linear_projection": False,
}
SIGMA = {"interpolation_scale": 1, "use_additional_conditions": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: tiny_pixart(root / name, sigma=name == "sigma", sizes=name == "sizes")
        for name in KINDS
    }


@pytest.fixture(scope="module")
def pipelines(folders):
    return {name: kind.from_pretrained(folders[name]) for name, kind in KINDS.items()}


def told(name, pipeline, prompts, height=32, width=32):
    """What the pipeline itself tells its transformer; sizes as it does for checkpoints of 1024 px."""
    text, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=300 if name == "sigma" else 120,
    )
    added = {"resolution": None, "aspect_ratio": None}
    if name == "sizes":
        added["resolution"] = torch.tensor([height, width]).repeat(len(prompts), 1).float()
        added["aspect_ratio"] = torch.tensor([float(height / width)]).repeat(len(prompts), 1)
    return {
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "added_cond_kwargs": added,
    }


def blocks(pipeline):
    return {f"block{i}": b for i, b in enumerate(pipeline.transformer.transformer_blocks)}


def on_grid(tokens):
    """Tokens of a square picture, row by row."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("name", "timestep"), [("alpha", 0), ("sigma", 25), ("sizes", 999)])
def test_activations_and_predictions_are_the_pipelines_own(folders, pipelines, name, timestep):
    pipeline = pipelines[name]

    def predicted(x_t, steps):
        given = told(name, pipeline, PROMPTS)
        noise, _variance = pipeline.transformer(x_t, timestep=steps, **given).sample.chunk(2, dim=1)
        return noise

    check_family(
        folders[name],
        blocks(pipeline),
        pipeline.scheduler,
        predicted,
        PROMPTS,
        timestep,
        grid=on_grid,
    )


@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_conditioning_is_the_pipelines(folders, pipelines, name):
    model = load_whole(folders[name])
    conditioning = model.conditioning([*PROMPTS, PROMPTS[0]])
    expected = told(name, pipelines[name], PROMPTS)
    assert conditioning.rows.tolist() == [0, 1, 0]
    torch.testing.assert_close(
        conditioning.inputs["encoder_hidden_states"], expected["encoder_hidden_states"], **NEAR
    )
    mask = conditioning.inputs["encoder_attention_mask"]
    assert torch.equal(mask, expected["encoder_attention_mask"])
    assert mask.shape == (2, 300 if name == "sigma" else 120) and mask[1].sum() == 1


def test_padding_is_hidden_from_the_blocks(folders, pipelines):
    """Without the mask the activations would be others."""
    model = load_whole(folders["alpha"])
    x0 = model.encode(pixels_for(model))
    found = model.activations(x0, IDS, ["block2"], timestep=25, prompts=PROMPTS)["block2"]
    given = told("alpha", pipelines["alpha"], PROMPTS) | {"encoder_attention_mask": None}
    steps, x_t = torch.full((2,), 25), model.noised(x0, IDS, timestep=25)
    transformer, modules = pipelines["alpha"].transformer, blocks(pipelines["alpha"])
    kept, _ = captured(modules, lambda: transformer(x_t, timestep=steps, **given).sample)
    assert (found - on_grid(kept["block2"])).abs().max() > 1e-3


def test_the_sizes_follow_the_picture(folders, pipelines):
    model, pipeline = load_whole(folders["sizes"]), pipelines["sizes"]
    x_t, steps = torch.randn(2, 4, 12, 20), torch.full((2,), 25)
    given = told("sizes", pipeline, PROMPTS, height=24, width=40)
    with torch.no_grad():
        expected = pipeline.transformer(x_t, timestep=steps, **given).sample[:, :4]
        found = model.predict(x_t, 25, model.conditioning(PROMPTS))
        given = told("sizes", pipeline, PROMPTS)
        other = pipeline.transformer(x_t, timestep=steps, **given).sample[:, :4]
    torch.testing.assert_close(found, expected, **NEAR)
    assert (found - other).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_the_pipeline_generates_what_diffusers_does(folders, pipelines, name):
    model = load_whole(folders[name])
    assert type(model.pipeline()) is KINDS[name]
    check_generation(model.pipeline(), pipelines[name], use_resolution_binning=False)


def test_timesteps_match_by_signal_to_noise(folders):
    """t = 25 of Stable Diffusion's schedule is t = 43 of this one (SPEC 2.8)."""
    kept = DDPMScheduler(beta_start=0.0001, beta_end=0.02).alphas_cumprod
    theirs = reference_schedule("scaled_linear")
    ratio = (theirs.snr(25).log() - (kept / (1 - kept)).log()).abs()
    schedule = load_whole(folders["alpha"]).schedule
    assert schedule.match(theirs, 25) == int(ratio.argmin()) == 43


def test_variants_old_class_names_and_eager_attention(folders, tmp_path):
    """The release's folders call the transformer by its class in older versions of diffusers."""
    model = load_whole(folders["sigma"])
    x0 = model.encode(pixels_for(model))
    expected = model.activations(x0, IDS, ["block1"], timestep=25, prompts=PROMPTS)["block1"]
    old = shutil.copytree(folders["sigma"], tmp_path / "old")
    index = json.loads((old / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (old / "model_index.json").write_text(json.dumps(index))
    config = json.loads((old / "transformer" / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "use_linear_projection": False}
    (old / "transformer" / "config.json").write_text(json.dumps(config))
    half = fp16_only(folders["sigma"], tmp_path / "half")
    for folder, tolerance, attention in (
        (old, 0, "sdpa"),
        (half, 0.02, "sdpa"),
        (old, 1e-4, "eager"),
    ):
        other = load_backbone(str(folder), layers=["block1"], device="cpu", attention=attention)
        found = other.activations(x0, IDS, ["block1"], timestep=25, prompts=PROMPTS)["block1"]
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_a_transformer_alone_takes_the_rest_from_another_pipeline(folders, tmp_path):
    """As Sigma's 512 px on the hub: its size is its own."""
    alone = shutil.copytree(folders["sigma"] / "transformer", tmp_path / "tuned")
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config | {"sample_size": 8}))
    file = alone / "diffusion_pytorch_model.safetensors"
    for name, size in ((alone, 16), (file, 32)):
        model = load_whole(f"{folders['alpha']}+{name}")
        assert model.transform.size == size
        with torch.no_grad():
            found = model.transformer.state_dict()
            assert all(torch.equal(found[key], tensor) for key, tensor in load_file(file).items())
        with pytest.raises(ValueError, match="is a denoiser alone"):
            load_whole(name)
    inside = folders["sigma"] / "transformer"
    assert load_whole(inside).name == "sigma+transformer"


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"norm_type": "ada_norm_zero"}, "has norm_type 'ada_norm_zero'"),
        ("transformer", {"caption_channels": 8}, "text encoder of m is 16 wide, .* takes 8"),
        ("transformer", {"in_channels": 8}, "takes 8 channels, its VAE gives 4"),
        ("transformer", {"_class_name": "X"}, "not of a PixArtTransformer2DModel or Transformer2D"),
        ("text_encoder", {"model_type": "umt5"}, "is of a umt5, not of a t5"),
    ],
)
def test_other_models_are_one_line(folders, tmp_path, part, changes, words):
    check_refused(folders["alpha"], tmp_path, part, changes, words)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_missing_text_part_is_one_line(folders, tmp_path, part):
    copy = shutil.copytree(folders["alpha"], tmp_path / "m")
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"m has no .*{part}"):
        load_whole(copy)


@pytest.mark.parametrize(
    ("name", "config"), [("pixart-alpha-512", REAL), ("pixart-sigma-512", REAL | SIGMA)]
)
def test_the_real_transformer_has_the_catalogues_layers(name, config):
    """On the meta device, from its own config; 0.6 billion parameters, as published."""
    about = describe_one(name)
    with torch.device("meta"):
        transformer = PixArtTransformer2DModel.from_config(config)
        assert 0.60e9 < transformer.num_parameters() < 0.62e9
        modules = {f"block{i}": block for i, block in enumerate(transformer.transformer_blocks)}
        kept, _ = captured(
            modules,
            lambda: (
                transformer(
                    torch.empty(1, 4, 64, 64),
                    torch.empty(1, 120, 4096),
                    timestep=torch.empty(1),
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                    encoder_attention_mask=torch.empty(1, 120),
                ).sample
            ),
        )
    assert list(kept) == list(about.layers) and len(kept) == 28
    for layer, output in kept.items():
        assert output.shape == (1, 1024, 1152)
        assert about.layers[layer] == LayerSpec(1152, about.image_size // 32)
