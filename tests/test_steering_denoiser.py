"""Edits of a denoiser's layers, against arithmetic by hand."""

import pytest
import torch
from flow_helpers import sd3_pipeline
from steering_helpers import dit, draw, flux, ksae_of, sd

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.backbones.hooks import capture, hooked
from revelio.steering.edits import Direction, Edit, LatentChange
from revelio.steering.steer import edited

LAYER, WIDTH = "up_ft0", 12


def outputs(pipeline, edits, layer=LAYER) -> list[torch.Tensor]:
    """The layer's output in each step of a generation, after the edits."""
    found: list[torch.Tensor] = []
    with (
        edited(pipeline, edits),
        hooked(
            PipelineLayers(pipeline), {layer: lambda out: found.append(out.clone())}, exact=False
        ),
    ):
        draw(pipeline)
    return found


def first_change(pipeline, *edits, layer=LAYER) -> tuple[torch.Tensor, torch.Tensor]:
    """The first step's output without the edits, and with them."""
    return outputs(pipeline, [], layer)[0], outputs(pipeline, list(edits), layer)[0]


@pytest.mark.parametrize("operation", ["scale", "clamp", "ablate", "add"])
@pytest.mark.parametrize("read", ["cells", "pooled"])
@pytest.mark.parametrize("where", ["everywhere", "fires"])
def test_only_the_latents_share_changes(operation, read, where):
    ksae, values = ksae_of(WIDTH), {3: 2.5, 11: -1.0, 30: 0.5}
    change = LatentChange(ksae, values, operation, read, where)
    before, after = first_change(sd(), Edit(LAYER, change, WIDTH, strength=0.7, branch="both"))
    x = before.flatten(2).transpose(1, 2)
    rows = (x.mean(1, keepdim=True) if read == "pooled" else x).reshape(-1, WIDTH)
    codes = ksae.encode(rows)
    delta = torch.zeros_like(rows)
    fired = 0
    for row in range(len(rows)):
        active = dict(zip(codes.indices[row].tolist(), codes.values[row].tolist(), strict=True))
        for latent, c in values.items():
            z = active.get(latent, 0.0)
            fired += z != 0
            new = {"scale": c * z, "clamp": c, "ablate": 0.0, "add": z + c}[operation]
            if where == "fires" and z == 0:
                new = z
            delta[row] += 0.7 * (new - z) * ksae.W_dec[latent].detach()
    expected = x + delta.view(len(x), -1, WIDTH)
    torch.testing.assert_close(after.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    if read == "cells":
        assert 0 < fired < 3 * len(rows)


@pytest.mark.parametrize("operation", ["scale", "clamp", "ablate", "add"])
@pytest.mark.parametrize("where", ["everywhere", "fires"])
def test_whole_numbers_are_values_too(operation, where):
    ksae, x = ksae_of(WIDTH), torch.randn(2, 3, WIDTH)
    found = LatentChange(ksae, {3: 2, 11: -1}, operation, where=where)(x)
    wanted = LatentChange(ksae, {3: 2.0, 11: -1.0}, operation, where=where)(x)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_pooled_edits_move_the_pooled_activation_by_exactly_the_latents_share():
    ksae = ksae_of(WIDTH)
    before, after = first_change(
        sd(), Edit(LAYER, LatentChange(ksae, {5: 1.5}, "add", "pooled"), WIDTH, branch="both")
    )
    moved = (after - before).mean(dim=(2, 3))
    torch.testing.assert_close(
        moved, 1.5 * ksae.W_dec[5].detach().expand_as(moved), atol=1e-5, rtol=0
    )


def test_a_mask_a_range_of_timesteps_and_several_layers():
    pipeline = sd()
    vector = torch.ones(1, WIDTH)
    mask = torch.zeros(8, 8)
    mask[2:4, 5] = 1.0
    steps = pipeline.scheduler
    steps.set_timesteps(2)
    late = int(steps.timesteps[1])
    plain = outputs(pipeline, [])
    found = outputs(
        pipeline,
        [Edit(LAYER, Direction(vector), WIDTH, 2.0, "both", timesteps=(0, late), mask=mask)],
    )
    assert torch.equal(found[0], plain[0])  # an earlier step, of more noise
    torch.testing.assert_close(found[1], plain[1] + 2.0 * mask, atol=1e-5, rtol=0)
    two = [
        Edit("bottleneck", Direction(torch.ones(1, 12)), 12, branch="both"),
        Edit(LAYER, Direction(vector), WIDTH, branch="both"),
    ]
    only = outputs(pipeline, two[:1])[0]
    torch.testing.assert_close(outputs(pipeline, two)[0], only + 1.0, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("branch", "signs"),
    [("both", (1, 1)), ("conditional", (0, 1)), ("opposed", (-1, 1)), (None, (-1, 1))],
)
def test_branches_of_a_guided_batch(branch, signs):
    before, after = first_change(
        sd(), Edit(LAYER, Direction(torch.ones(1, WIDTH)), WIDTH, branch=branch)
    )
    for half, sign in enumerate(signs):
        torch.testing.assert_close(after[half], before[half] + sign, atol=1e-5, rtol=0)


def draw_dit(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    return torch.from_numpy(pipeline([3], generator=generator, **arguments).images)


def test_a_dit_tells_branches_by_the_null_class():
    pipeline, layer = dit(), "block1"
    ksae = ksae_of(16)
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    layers = PipelineLayers(pipeline)
    with hooked(layers, {layer: capture(before, layer)}, exact=False):
        plain = draw_dit(pipeline)
    change = LatentChange(ksae, {2: 3.0}, "add")
    one = Edit(layer, change, 16, branch="conditional", timesteps=(0, 100))
    with edited(layers, [one]), hooked(layers, {layer: capture(after, layer)}, exact=False):
        assert not torch.equal(draw_dit(pipeline), plain)
    moved = after[layer] - before[layer]
    torch.testing.assert_close(
        moved[0], (3 * ksae.W_dec[2].detach()).expand(64, 16), atol=1e-5, rtol=0
    )
    assert not moved[1].any()
    assert torch.equal(draw_dit(pipeline), plain)


@pytest.mark.parametrize(
    ("build", "layer", "path"),
    [
        (sd3_pipeline, "block0", "transformer_blocks.0"),
        (flux, "double0", "transformer_blocks.0"),
        (flux, "single0", "single_transformer_blocks.0"),
    ],
)
def test_blocks_of_text_and_image_tokens_are_edited_in_the_image(build, layer, path):
    pipeline = build()
    vector = torch.arange(16.0) / 4
    plain = draw(pipeline)
    module = pipeline.transformer.get_submodule(path)

    def by_hand(_module, _inputs, output):
        return output[0], output[1] + vector

    handle = module.register_forward_hook(by_hand)
    expected = draw(pipeline)
    handle.remove()
    with edited(pipeline, [Edit(layer, Direction(vector[None]), 16, branch="both")]):
        found = draw(pipeline)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.equal(found, plain)
    late = Edit(layer, Direction(vector[None]), 16, branch="both", timesteps=(0, 0))
    with edited(pipeline, [late]):
        assert torch.equal(draw(pipeline), plain)  # no step is of so little noise


def test_what_can_not_be_is_refused():
    pipeline = sd()
    wrong = Edit(LAYER, Direction(torch.ones(1, WIDTH)), WIDTH, mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"mask of 3x3 for layer up_ft0, whose grid is 8x8"):
        outputs(pipeline, [wrong])
    one = Edit("up_ft9", Direction(torch.ones(1, 12)), 12)
    with pytest.raises(KeyError, match=r"unknown layer 'up_ft9'.*up_ft1"), edited(pipeline, [one]):
        pass
    ksae = ksae_of(32)
    joined = Edit("text_encoder.block0+up_ft0", LatentChange(ksae, {0: 1.0}), 28)
    with (
        pytest.raises(ValueError, match=r"joins layers of the denoiser"),
        edited(pipeline, [joined]),
    ):
        pass
    assert torch.equal(outputs(pipeline, [])[0], outputs(sd(), [])[0])
    with (
        pytest.raises(ValueError, match="called for each branch by itself"),
        edited(flux(), [Edit("double0", Direction(torch.ones(1, 16)), 16, branch="opposed")]),
    ):
        pass
