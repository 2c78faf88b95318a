"""Flux against diffusers' own pipeline and transformer with plain hooks."""

from typing import Any

import pytest
import torch
from backbones_helpers import fp16_only
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from families_helpers import check_generation, check_refused
from flow_helpers import tiny_flux

from revelio.backbones.base import DiffusionModel
from revelio.backbones.diffusion.schedule import keyed_noise
from revelio.backbones.layers import LayerSpec, flux_layers
from revelio.backbones.registry import describe_one, load_backbone

IDS = ["a", "b"]
PROMPTS = ["a cat", ""]
LAYERS = dict.fromkeys(["double0", "double1", "single0", "single1", "single2"], LayerSpec(16, 4))
NEARLY: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
SIZE = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    return {"dev": tiny_flux(root / "dev"), "schnell": tiny_flux(root / "schnell", dev=False)}


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(folder, **settings) -> Any:
    return load_backbone(str(folder), image_size=SIZE, device="cpu", **settings)


def uncut(folder) -> Any:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def reference(folder, z0, index, guidance):
    """Blocks' image tokens, noised latents, prediction and text of the whole pipeline called by hand."""
    pipeline = uncut(folder)
    # The scheduler lists its timesteps from noise to image.
    time = pipeline.scheduler.timesteps.flip(0)[index].expand(2)
    noise = keyed_noise(z0.shape[1:], IDS, seed=0, timestep=index, draw=0)
    x_t = pipeline.scheduler.scale_noise(z0, time, noise)
    states, pooled, text_ids = pipeline.encode_prompt(PROMPTS)
    height, width = x_t.shape[-2:]
    packed, image_ids = pipeline.prepare_latents(
        2,
        4,
        SIZE,
        SIZE,
        torch.float32,
        "cpu",
        None,
        pipeline._pack_latents(x_t, 2, 4, height, width),
    )
    kept, transformer = {}, pipeline.transformer
    blocks = {f"double{i}": each for i, each in enumerate(transformer.transformer_blocks)}
    blocks |= {f"single{i}": each for i, each in enumerate(transformer.single_transformer_blocks)}
    for name, block in blocks.items():
        block.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out[1]}))
    output = transformer(
        packed,
        timestep=time / 1000,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=image_ids,
    ).sample
    output = pipeline._unpack_latents(output, SIZE, SIZE, pipeline.vae_scale_factor)
    return kept, x_t, output, states, pooled


@pytest.mark.parametrize(("name", "index"), [("dev", 500), ("schnell", 0), ("schnell", 999)])
def test_activations_and_predictions_are_the_pipelines_own(folders, pixels, name, index):
    whole = load(folders[name])
    assert isinstance(whole, DiffusionModel) and dict(whole.layers) == LAYERS
    encoded = whole.encode(pixels)
    guidance = torch.full((2,), 3.5) if name == "dev" else None
    kept, x_t, output, states, pooled = reference(folders[name], encoded.float(), index, guidance)
    conditioning = whole.conditioning([*PROMPTS, PROMPTS[0]])
    torch.testing.assert_close(conditioning.inputs["encoder_hidden_states"], states, **NEARLY)
    torch.testing.assert_close(conditioning.inputs["pooled_projections"], pooled, **NEARLY)
    assert conditioning.rows.tolist() == [0, 1, 0]
    predicted = whole.predict(x_t, index, whole.conditioning(PROMPTS))
    torch.testing.assert_close(predicted, output, **NEARLY)
    found = whole.activations(encoded, IDS, list(LAYERS), timestep=index, prompts=PROMPTS)
    for layer in LAYERS:
        assert found[layer].shape == (2, 16, 8, 8)
        for row in range(8):
            # Image tokens alone: the text, 512 tokens long, never enters the grid.
            tokens = kept[layer][:, 8 * row : 8 * row + 8]
            torch.testing.assert_close(found[layer][:, :, row].mT, tokens, **NEARLY)
    for layer in ("double0", "single1"):
        cut = load(folders[name], layers=[layer])
        assert list(cut.layers)[-1] == layer
        alone = cut.activations(encoded, IDS, [layer], timestep=index, prompts=PROMPTS)
        assert torch.equal(alone[layer], found[layer])


def test_a_change_in_one_corner_shows_in_that_corner(folders, pixels):
    model = load(folders["schnell"])
    encoded = model.encode(pixels[:1])
    changed = encoded.clone()
    changed[:, :, :2, 14:] += 4
    for layer in ("double0", "single0"):
        grids = [
            model.activations(z, ["a"], [layer], timestep=0)[layer] for z in (encoded, changed)
        ]
        moved = (grids[1] - grids[0]).norm(dim=1)[0]
        assert divmod(int(moved.argmax()), 8) == (0, 7)


def test_only_a_guidance_distilled_model_is_told_a_scale(folders, pixels):
    for name, told in (("dev", True), ("schnell", False)):
        model = load(folders[name])
        x_t, text = model.encode(pixels).float(), model.conditioning(PROMPTS)
        before = model.predict(x_t, 500, text)
        model.guidance = 1.0
        assert torch.equal(model.predict(x_t, 500, text), before) is not told


def test_a_cut_model_has_fewer_parameters(folders):
    whole, double, single = (
        load(folders["dev"], **settings).transformer
        for settings in ({}, {"layers": ["double0"]}, {"layers": ["single0"]})
    )
    assert len(double.transformer_blocks) == 1 and not len(double.single_transformer_blocks)
    assert len(single.transformer_blocks) == 2 and len(single.single_transformer_blocks) == 1
    counts = [sum(p.numel() for p in part.parameters()) for part in (double, single, whole)]
    assert counts == sorted(set(counts))


def test_schedules_are_shifted_where_the_scheduler_shifts(folders):
    """With dynamic shifting the shift depends on the picture's size, and only in sampling."""
    for name in folders:
        schedule = load(folders[name]).schedule
        torch.testing.assert_close(schedule.sigmas, torch.arange(1, 1001) / 1000)
        assert schedule.prediction == "flow"
        torch.testing.assert_close(schedule.times, torch.arange(1, 1001) * 1.0)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_the_pipeline_generates_what_diffusers_does(folders, name):
    check_generation(load(folders[name]).pipeline(), uncut(folders[name]), height=SIZE, width=SIZE)


def test_half_precision_variants_and_eager_attention(folders, pixels, tmp_path):
    model = load(folders["dev"])
    encoded = model.encode(pixels)
    # A time that bfloat16 holds: like the pipeline, the transformer rounds it to its own format.
    wanted: Any = {"timestep": 255, "prompts": PROMPTS}
    expected = model.activations(encoded, IDS, ["single2"], **wanted)["single2"]
    eager = load(folders["dev"], attention="eager")
    found = eager.activations(encoded, IDS, ["single2"], **wanted)["single2"]
    torch.testing.assert_close(found, expected, **NEARLY)
    small = load(fp16_only(folders["dev"], tmp_path / "fp16"))
    found = small.activations(encoded, IDS, ["single2"], **wanted)["single2"]
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    expected, found = (
        load(folders["schnell"], dtype=dtype).activations(encoded, IDS, ["single2"], **wanted)[
            "single2"
        ]
        for dtype in ("float32", "bfloat16")
    )
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"in_channels": 64}, "takes 64 channels, its VAE gives 4"),
        ("transformer", {"num_single_layers": None}, "has num_single_layers = None"),
        ("transformer", {"joint_attention_dim": 32}, "is 24 wide, its denoiser takes 32"),
        ("transformer", {"pooled_projection_dim": 24}, "is 16 wide, its denoiser takes 24"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(folders, tmp_path, part, changes, words):
    check_refused(folders["dev"], tmp_path, part, changes, words, image_size=SIZE)


FULL: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}


def test_the_full_size_model_has_19_and_38_blocks_of_width_3072():
    """FLUX.1-dev at 1024 px on the meta device, from the real config."""
    layers = flux_layers(FULL, 16)
    for name in ("flux-1-dev", "flux-1-schnell"):
        assert dict(describe_one(name).layers) == layers
    assert list(layers)[18:20] == ["double18", "single0"] and len(layers) == 57
    assert set(layers.values()) == {LayerSpec(3072, 16)}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**FULL, guidance_embeds=True)
        kept = []
        for block in (
            transformer.transformer_blocks[18],
            transformer.single_transformer_blocks[37],
        ):
            block.register_forward_hook(lambda _m, _i, out: kept.append(tuple(out[1].shape)))
        with torch.no_grad():
            transformer(
                torch.empty(1, 4096, 64),
                encoder_hidden_states=torch.empty(1, 512, 4096),
                pooled_projections=torch.empty(1, 768),
                timestep=torch.empty(1),
                guidance=torch.empty(1),
                img_ids=torch.empty(4096, 3),
                txt_ids=torch.empty(512, 3),
            )
    assert kept == [(1, (1024 // 16) ** 2, 3072)] * 2
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320
