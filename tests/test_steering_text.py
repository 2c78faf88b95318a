"""Text-route steering on tiny random pipelines of every family, against forwards edited by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from steering_helpers import PIPELINES, TEXT_LAYERS, dit, draw, ksae_of, sd
from torch import nn

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.sae.inputs import measure
from revelio.sae.kernels.base import Codes
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import Concept, combined, from_latents, from_rows, from_texts
from revelio.steering.edits import Direction, Edit, LatentChange
from revelio.steering.steer import edited, steered

FAMILIES = list(PIPELINES)
GUIDED = {"flux": {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}}


def concept_of(layer: str, width: int, t: int = 16, seed: int = 3) -> Concept:
    vector = torch.randn(t, width, generator=torch.Generator().manual_seed(seed))
    return Concept("the pipeline", layer, vector, {})


def by_hand(layers: PipelineLayers, layer: str, vector: torch.Tensor, signs: list[float]) -> list:
    """Plain hooks that add ``signs[call] * vector`` to the blocks, found by their own paths."""
    handles, first = [], 0
    for part in layer.split("+"):
        name, block = part.split(".block")
        encoder = layers.pipeline.components[name]
        inner = encoder.encoder if hasattr(encoder, "encoder") else encoder.text_model.encoder
        module = (inner.layers if hasattr(inner, "layers") else inner.block)[int(block)]
        width = encoder.config.hidden_size
        added, calls = vector[:, first : first + width], []

        def hook(_module, _inputs, output, added=added, calls=calls):
            calls.append(1)
            change = signs[len(calls) - 1] * added
            if isinstance(output, tuple):
                return (output[0] + change, *output[1:])
            return output + change

        handles.append(module.register_forward_hook(hook, prepend=True))
        first += width
    return handles


@pytest.mark.parametrize("family", FAMILIES)
def test_conditional_gets_plus_and_unconditional_minus(family):
    pipeline = PIPELINES[family]()
    layers, layer = PipelineLayers(pipeline), TEXT_LAYERS[family]
    concept = concept_of(layer, sum(layers.parts(layer).values()))
    more = GUIDED.get(family, {})
    plain = draw(pipeline, **more)
    with steered(pipeline, concept, 2.0):
        found = [draw(pipeline, **more), draw(pipeline, **more)]
    assert torch.equal(draw(pipeline, **more), plain)
    handles = by_hand(layers, layer, concept.vector, [2.0, -2.0])
    expected = draw(pipeline, **more)
    for handle in handles:
        handle.remove()
    assert not torch.equal(expected, plain)
    for drawn in found:
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_collected_before_are_edited_too(family):
    """transformers hooks the blocks itself at the first call that wants hidden states."""
    pipeline = PIPELINES[family]()
    layer = TEXT_LAYERS[family].split("+")[-1]
    concept = concept_of(layer, PipelineLayers(pipeline).parts(layer)[layer])
    plain = draw(pipeline)
    with steered(pipeline, concept, 1.0):
        assert not torch.equal(draw(pipeline), plain)


def test_without_guidance_the_one_call_gets_plus():
    pipeline = sd()
    concept = concept_of("text_encoder.block0", 16)
    with steered(pipeline, concept, 1.0):
        found = [draw(pipeline, guidance_scale=1.0) for _ in range(2)]
    handles = by_hand(PipelineLayers(pipeline), "text_encoder.block0", concept.vector, [1.0])
    expected = draw(pipeline, guidance_scale=1.0)
    handles[0].remove()
    assert all(torch.equal(drawn, expected) for drawn in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_0_and_edits_of_nothing_give_the_plain_bytes(family):
    pipeline = PIPELINES[family]()
    layers, layer = PipelineLayers(pipeline), TEXT_LAYERS[family]
    plain = draw(pipeline)
    with steered(pipeline, concept_of(layer, sum(layers.parts(layer).values())), 0.0):
        assert torch.equal(draw(pipeline), plain)


def hooks_of(pipeline) -> int:
    modules = [m for part in pipeline.components.values() if isinstance(part, nn.Module)
               for m in part.modules()]  # fmt: skip
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_all_is_as_before_after_an_exception_and_the_next_generation_has_the_right_signs():
    pipeline = sd()
    concept = concept_of("text_encoder.block0", 16)
    plain, hooks, names = draw(pipeline), hooks_of(pipeline), set(vars(pipeline))
    with steered(pipeline, concept, 1.0):
        right = draw(pipeline)
        with pytest.raises(ValueError, match=r"Unexpected latents|shape|size"):
            draw(pipeline, latents=torch.zeros(7, 4, 8, 8), generator=[torch.Generator()] * 5)
        assert torch.equal(draw(pipeline), right)
    with pytest.raises(RuntimeError), steered(pipeline, concept, 1.0):
        raise RuntimeError
    assert hooks_of(pipeline) == hooks
    assert set(vars(pipeline)) == names
    assert torch.equal(draw(pipeline), plain)


def test_contexts_nest_and_negative_prompts_and_several_images_work():
    pipeline = sd()
    one, two = (concept_of("text_encoder.block0", 16, seed=seed) for seed in (1, 2))
    more = {"negative_prompt": "a dog", "num_images_per_prompt": 2}
    with steered(pipeline, one, 1.0), steered(pipeline, two, -0.5):
        nested = draw(pipeline, **more)
    with steered(pipeline, combined([one, two], [1.0, -0.5]), 1.0):
        together = draw(pipeline, **more)
    torch.testing.assert_close(nested, together, rtol=0, atol=1e-5)
    assert nested.shape[0] == 2


def test_a_batch_of_prompts_equals_the_single_prompts():
    pipeline = sd()
    concept = concept_of("text_encoder.block0", 16)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    with steered(pipeline, concept, 1.0):
        batch = draw(pipeline, ["a cat", "dogs"], generator=generators)
        single = [
            draw(pipeline, text, generator=torch.Generator().manual_seed(seed))
            for text, seed in (("a cat", 5), ("dogs", 6))
        ]
    torch.testing.assert_close(batch, torch.cat(single), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_blocks_own_outputs(family):
    pipeline = PIPELINES[family]()
    layers, layer = PipelineLayers(pipeline), TEXT_LAYERS[family]
    tokens = layers.tokens(["a cat", "b"], layer)
    name, block = layer.split("+")[-1].split(".block")
    encoder = pipeline.components[name]
    text_ids = pipeline.components[layers.kind.tokenizers[name]](
        ["a cat", "b"], padding="max_length", max_length=tokens.states.shape[1], return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        states = encoder(text_ids, output_hidden_states=True).hidden_states[int(block) + 1]
    torch.testing.assert_close(tokens.states[..., -states.shape[-1] :], states)
    # CLIP: start, one token a letter (the space counts none), end. T5: a mark a word, a token a letter, end.
    assert tokens.content.sum(dim=1).tolist() == ([7, 3] if family in ("sd3", "flux") else [6, 3])


def test_a_concept_of_a_text_is_its_codes_times_the_decoder():
    layers, ksae = PipelineLayers(sd()), ksae_of(16)
    states = layers.tokens(["a dog"], "text_encoder.block1").states[0]
    pre = (states - ksae.b_dec) @ ksae.W_enc.T + ksae.b_enc
    dense = from_texts(layers, "text_encoder.block1", ksae, ["a dog"])
    torch.testing.assert_close(dense.vector, (pre.clamp(min=0) @ ksae.W_dec).detach())
    sparse = from_texts(layers, "text_encoder.block1", ksae, ["a dog"], codes="sparse")
    kept = pre.clamp(min=0) * (pre >= pre.topk(ksae.k).values[:, -1:])
    torch.testing.assert_close(sparse.vector, (kept @ ksae.W_dec).detach())


def test_a_contrast_is_the_difference_of_means_and_of_one_set_with_itself_nothing():
    layers, ksae = PipelineLayers(sd()), ksae_of(16)
    layer, texts, against = "text_encoder.block1", ["a dog", "dogs"], ["a cat"]
    found = from_texts(layers, layer, ksae, texts, against)
    each = [from_texts(layers, layer, ksae, [text]).vector for text in (*texts, *against)]
    torch.testing.assert_close(found.vector, (each[0] + each[1]) / 2 - each[2])
    assert from_texts(layers, layer, ksae, texts, texts).vector.abs().max() < 1e-6
    plain = from_texts(layers, layer, None, texts, against, positions="mean")
    tokens = layers.tokens([*texts, *against], layer)
    means = [
        rows[inside].mean(0) for rows, inside in zip(tokens.states, tokens.content, strict=True)
    ]
    torch.testing.assert_close(plain.vector[0], (means[0] + means[1]) / 2 - means[2])


def test_latents_by_number_and_rows_and_sums():
    ksae = ksae_of(16)
    one = from_latents("m", "l", ksae, {3: 2.0, 7: -1.0})
    torch.testing.assert_close(one.vector[0], (2 * ksae.W_dec[3] - ksae.W_dec[7]).detach())
    rows = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    means = from_rows("m", "l", None, rows[:8], rows[8:])
    torch.testing.assert_close(means.vector[0], rows[:8].mean(0) - rows[8:].mean(0))
    both = combined([one, means], [2.0, 1.0])
    torch.testing.assert_close(both.vector, 2 * one.vector + means.vector)


def test_concepts_round_trip(tmp_path: Path):
    concept = from_latents("m", "up_ft0", ksae_of(16), {3: 2.0})
    concept = replace(concept, strengths=(-2.0, 0.5))
    concept.save(tmp_path / "c")
    found = Concept.load(tmp_path / "c")
    assert torch.equal(found.vector, concept.vector)
    assert (found.model, found.layer, found.strengths) == ("m", "up_ft0", (-2.0, 0.5))
    assert found.latents == {3: 2.0}
    assert found.ksae == concept.ksae
    assert found.made == {"latents": 1}


def test_latents_of_a_text_layer_are_ablated_in_the_prompt_and_kept_in_the_negative_prompt():
    pipeline, ksae = sd(), ksae_of(16)
    layer = "text_encoder.block0"
    states = PipelineLayers(pipeline).tokens(["a cat"], layer).states[0]
    codes = ksae.encode(states)
    latent = int(codes.indices[2, 0])
    share = torch.zeros(16, 1)
    for position in range(16):
        for value, index in zip(codes.values[position], codes.indices[position], strict=True):
            if int(index) == latent:
                share[position] = value
    change = LatentChange(ksae, {latent: 0.0}, "ablate")
    with edited(pipeline, [Edit(layer, change, 16)]):
        found = draw(pipeline)
    by = by_hand(PipelineLayers(pipeline), layer, -share * ksae.W_dec[latent].detach(), [1.0, 0.0])
    expected = draw(pipeline)
    by[0].remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.equal(found, draw(pipeline))


class Unknown:
    components = {"prior": nn.Linear(1, 1)}  # noqa: RUF012


def test_what_can_not_be_is_refused_in_one_line(tmp_path: Path):
    pipeline = sd()
    layers, ksae, layer = PipelineLayers(pipeline), ksae_of(16), "text_encoder.block0"
    concept = concept_of(layer, 16)
    with pytest.raises(ValueError, match=r"a Unknown can't be steered.*SDXL.*Flux"):
        PipelineLayers(Unknown())
    for bad in (float("nan"), "strong"):
        with (
            pytest.raises(ValueError, match=r"strength is .*: give a"),
            steered(pipeline, concept, bad),
        ):
            pass
    with pytest.raises(KeyError, match=r"unknown layer 'text_encoder.block7'.*text_encoder.block1"):
        from_texts(layers, "text_encoder.block7", ksae, ["a"])
    with pytest.raises(ValueError, match=r"takes no text: text layers are text_encoder.block0"):
        from_texts(layers, "up_ft0", None, ["a"])
    with (
        pytest.raises(ValueError, match=r"width 7 .*another model or layer"),
        steered(pipeline, concept_of(layer, 7), 1.0),
    ):
        pass
    with pytest.raises(ValueError, match=r"k-SAE is 8 wide"):
        from_texts(layers, layer, ksae_of(8), ["a"])
    with pytest.raises(ValueError, match=r"latent 99 is out of range: the k-SAE has 0 to 31"):
        from_latents("m", layer, ksae, {99: 1.0})
    with pytest.raises(ValueError, match=r"latent 32 is out of range"):
        LatentChange(ksae, {32: 1.0})
    with (
        pytest.raises(ValueError, match=r"no timesteps and no mask"),
        steered(pipeline, concept, 1.0, mask=torch.ones(2, 2)),
    ):
        pass
    with pytest.raises(ValueError, match=r"was made of the pipeline, not of sd-1.5"):
        concept.check("sd-1.5")
    with pytest.raises(ValueError, match=r"no file at"):
        Concept.load(tmp_path)
    with pytest.raises(ValueError, match=r"encoded already"), steered(pipeline, concept, 1.0):
        draw(pipeline, None, prompt_embeds=torch.zeros(1, 16, 16))
    # What `module.compile()` sets, without the seconds it takes to import the compiler.
    pipeline.text_encoder._compiled_call_impl = pipeline.text_encoder._call_impl
    with (
        pytest.raises(ValueError, match=r"torch.compile was applied to the text encoder"),
        steered(pipeline, concept, 1.0),
    ):
        pass
    pipeline.unet._compiled_call_impl = pipeline.unet._call_impl
    with (
        pytest.raises(ValueError, match=r"torch.compile was applied to the denoiser of up_ft0"),
        edited(pipeline, [Edit("up_ft0", Direction(torch.ones(1, 12)), 12)]),
    ):
        pass
    assert not vars(pipeline).keys() & {"check_inputs", "encode_prompt"}
    assert "text_encoder.block0" not in PipelineLayers(dit()).layers


def test_a_vector_shorter_or_longer_than_the_text_keeps_its_positions():
    x = torch.zeros(2, 5, 3)
    vector = torch.arange(12.0).view(4, 3)
    assert torch.equal(Direction(vector)(x)[1], torch.cat([vector, torch.zeros(1, 3)]))
    assert torch.equal(Direction(vector)(x[:, :3])[0], vector[:3])


SCHEDULERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_any_scheduler_gets_both_routes_at_the_steps_that_are_asked_for(kind):
    """Heun's calls the denoiser twice a step: the edits follow the calls, not the steps."""
    pipeline = sd()
    more = {"skip_prk_steps": True} if kind is PNDMScheduler else {}  # as Stable Diffusion has it
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **more)
    layer, vector = "text_encoder.block0", torch.ones(16, 16)
    concept = Concept("the pipeline", layer, vector, {})
    late = Edit("up_ft0", Direction(torch.ones(1, 12)), 12, 3.0, "both", timesteps=(0, 500))
    plain = draw(pipeline)
    with steered(pipeline, concept, 1.0), edited(pipeline, [late]):
        found = draw(pipeline)
    handles = by_hand(PipelineLayers(pipeline), layer, vector, [1.0, -1.0])
    times: list[float] = []
    unet = pipeline.unet
    handles.append(
        unet.register_forward_pre_hook(
            lambda _m, args, kwargs: times.append(float((*args, kwargs.get("timestep"))[1])),
            with_kwargs=True,
        )
    )
    handles.append(
        unet.up_blocks[0].register_forward_hook(
            lambda _m, _i, out: out + 3.0 * (times[-1] <= 500), prepend=True
        )
    )
    expected = draw(pipeline)
    for handle in handles:
        handle.remove()
    assert min(times) <= 500 < max(times)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_prompts_images_and_negative_prompts_equal_forwards_edited_by_hand(family):
    pipeline = PIPELINES[family]()
    layers, layer = PipelineLayers(pipeline), TEXT_LAYERS[family]
    concept = concept_of(layer, sum(layers.parts(layer).values()))
    more = {"negative_prompt": ["a bird", "b"], "num_images_per_prompt": 2} | (
        {"true_cfg_scale": 3.0} if family == "flux" else {}
    )
    with steered(pipeline, concept, 1.5):
        found = draw(pipeline, ["a cat", "dogs"], **more)
    handles = by_hand(layers, layer, concept.vector, [1.5, -1.5])
    expected = draw(pipeline, ["a cat", "dogs"], **more)
    for handle in handles:
        handle.remove()
    assert len(found) == 4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_k_sae_of_scaled_activations_contributes_in_the_scale_of_the_activations():
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 7
    ksae = KSparseAutoencoder(16, 32, 4, inputs=[measure({}, "per-dimension", [rows])]).eval()
    scale = rows.double().std(0, correction=0).float()
    concept = from_latents("m", "l", ksae, {3: 2.0})
    torch.testing.assert_close(concept.vector[0], 2 * ksae.W_dec[3].detach() * scale)
    # Ablating every latent takes off what the k-SAE explains, bias and shift aside.
    change = LatentChange(ksae, dict.fromkeys(range(32), 0.0), "ablate")
    codes = ksae.encode(rows)
    empty = Codes(torch.zeros_like(codes.values), codes.indices)
    torch.testing.assert_close(
        change(rows[None])[0], ksae.decode(empty) - ksae.decode(codes), rtol=1e-4, atol=1e-4
    )
    two = [measure({"layer": name}, "mean-norm", [rows]) for name in "ab"]
    with pytest.raises(ValueError, match="normalizes by store"):
        LatentChange(KSparseAutoencoder(16, 32, 4, inputs=two), {1: 0.0})
