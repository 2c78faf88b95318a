"""What a diffusion model offers beside activations: hooks, predictions, decoding, pipelines, text tokens."""

import json
import math
from typing import Any

import pytest
import torch
from backbones_helpers import SD_LAYERS, picture, tiny_clip, tiny_dit, tiny_sd
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from revelio.activations.extract import extract
from revelio.activations.store import ActivationStore
from revelio.backbones.base import Backbone, DiffusionModel, check_request, schedule_of
from revelio.backbones.diffusion.base import register_family
from revelio.backbones.diffusion.scheduler import load_schedule
from revelio.backbones.hooks import capture, edit, hooked
from revelio.backbones.layers import LayerSpec
from revelio.backbones.registry import load_backbone
from revelio.backbones.source import Source
from revelio.data.dataset import ImageDataset
from revelio.data.transforms import SquareTransform
from revelio.diffc.sources import LiveGrids

IDS = ["a", "b", "c"]
PROMPTS = {"sd": ["a cat", "", "a cat"], "dit": ["3", "", "3"]}
LAYERS = {"sd": "up_ft1", "dit": "block2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    built = {"sd": tiny_sd(root / "sd"), "dit": tiny_dit(root / "dit", classes=1000)}
    return built | {
        "velocity": tiny_sd(root / "v", prediction_type="v_prediction", seed=2),
        "clip": tiny_clip(root / "clip"),
    }


@pytest.fixture(scope="module")
def models(folders) -> dict[str, DiffusionModel]:
    return {name: load_backbone(str(folders[name]), device="cpu") for name in ("sd", "dit")}  # type: ignore[misc]


def encoded(model: Backbone) -> torch.Tensor:
    return model.encode(torch.stack([model.transform(picture(i)) for i in range(3)]))


def uncut(folder, name: str) -> Any:
    kind = StableDiffusionPipeline if name == "sd" else DiTPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_the_models_are_what_the_protocol_says(models, folders, name):
    assert isinstance(models[name], DiffusionModel)
    assert schedule_of(models[name]) is models[name].schedule
    assert schedule_of(load_backbone(str(folders["clip"]), device="cpu")) is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "dit"])
def test_predictions_are_those_of_the_whole_pipeline(folders, models, name):
    model, pipeline = models[name], uncut(folders[name], name)
    x_t, steps = torch.randn(3, 4, 16, 16), torch.tensor([3, 500, 999])
    conditioning = model.conditioning(PROMPTS[name])
    assert {len(table) for table in conditioning.inputs.values()} == {2}
    if name == "sd":
        text, _ = pipeline.encode_prompt(PROMPTS[name], "cpu", 1, False)
        expected = pipeline.unet(x_t, steps, encoder_hidden_states=text).sample
    else:
        labels = torch.tensor([3, 1000, 3])
        expected = pipeline.transformer(x_t, steps, class_labels=labels).sample[:, :4]
    found = model.predict(x_t, steps, conditioning)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    one = model.predict(x_t[1:2], 500, conditioning[torch.tensor([1])])
    torch.testing.assert_close(one, expected[1:2], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "dit"])
def test_decoding_is_the_vaes_own(folders, models, name):
    vae = AutoencoderKL.from_pretrained(folders[name], subfolder="vae")
    z = encoded(models[name])
    expected = vae.decode(z.float() / vae.config["scaling_factor"]).sample
    torch.testing.assert_close(models[name].decode(z), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_the_pipeline_generates_what_diffusers_does(folders, models, name):
    pictures = []
    for pipeline in (models[name].pipeline(), uncut(folders[name], name)):
        pipeline.set_progress_bar_config(disable=True)
        wanted = "a cat" if name == "sd" else [3]
        settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
        drawn = torch.Generator().manual_seed(4)
        pictures.append(torch.as_tensor(pipeline(wanted, generator=drawn, **settings).images))
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-4, rtol=1e-3)


def test_a_velocity_models_schedule_says_so(folders):
    model = load_backbone(str(folders["velocity"]), device="cpu")
    schedule = schedule_of(model)
    assert schedule is not None and schedule.prediction == "v_prediction"


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_cut_model_refuses_what_it_can_not(folders, name):
    model = load_backbone(str(folders[name]), layers=[LAYERS[name]], device="cpu")
    assert isinstance(model, DiffusionModel)
    words = f"cut after {LAYERS[name]} when it was loaded.*layers=None"
    with pytest.raises(ValueError, match=words):
        model.predict(torch.zeros(1, 4, 16, 16), 1, model.conditioning([""]))
    with pytest.raises(ValueError, match=words):
        model.pipeline()
    with pytest.raises(ValueError, match="without its decoder"):
        model.decode(torch.zeros(1, 4, 16, 16))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "dit"])
def test_what_is_captured_is_what_activations_give(models, name):
    model, layer = models[name], LAYERS[name]
    z = encoded(model)
    x_t = model.noised(z, IDS, timestep=25)
    found: dict[str, torch.Tensor] = {}
    with hooked(model, {layer: capture(found, layer)}):
        model.predict(x_t, 25, model.conditioning(PROMPTS[name]))
    given = model.activations(z, IDS, [layer], timestep=25, prompts=PROMPTS[name])[layer]
    output = found[layer]
    if name == "dit":  # tokens (b t c), row by row
        output = output.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    torch.testing.assert_close(given, output, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_edit_changes_what_comes_after_and_nothing_before(models):
    model = models["sd"]
    z, shift = encoded(model), torch.linspace(-1, 1, 16).view(1, -1, 1, 1)
    layers = SD_LAYERS[:4]
    before = model.activations(z, IDS, layers, timestep=25)
    with hooked(model, {"up_ft0": edit(lambda h: h + shift)}):
        after = model.activations(z, IDS, layers, timestep=25)
    assert torch.equal(after["bottleneck"], before["bottleneck"])
    torch.testing.assert_close(after["up_ft0"], before["up_ft0"] + shift)
    following = model.unet.up_blocks[1]
    assert (after["up_ft1"] - before["up_ft1"]).abs().max() > 1e-3
    again = model.activations(z, IDS, layers, timestep=25)
    assert all(torch.equal(again[layer], before[layer]) for layer in layers)
    assert not following._forward_hooks and not model.unet.up_blocks[0]._forward_hooks


def test_an_edit_that_changes_nothing_is_bit_equal_and_gradients_reach_it(models):
    model, x_t = models["sd"], torch.randn(1, 4, 16, 16)
    conditioning = model.conditioning([""])
    plain = model.predict(x_t, 25, conditioning)
    added = torch.zeros(1, 16, 4, 4, requires_grad=True)
    with hooked(model, {"up_ft0": edit(lambda h: h + added)}):
        changed = model.predict(x_t, 25, conditioning)
    torch.testing.assert_close(changed, plain, atol=0, rtol=0)
    changed.square().sum().backward()
    assert added.grad is not None and added.grad.abs().max() > 0


def test_hooks_go_when_the_block_ends_with_an_error(models):
    model = models["sd"]
    with (
        pytest.raises(ValueError, match=r"must keep the shape"),
        hooked(model, {"up_ft1": edit(lambda h: h[:, :1])}),
    ):
        model.predict(torch.zeros(1, 4, 16, 16), 1, model.conditioning([""]))
    assert not model.module("up_ft1")._forward_hooks
    with (
        pytest.raises(KeyError, match="unknown layer 'up_ft9'"),
        hooked(model, {"up_ft1": capture({}, "up_ft1"), "up_ft9": capture({}, "up_ft9")}),
    ):
        pass
    assert not model.module("up_ft1")._forward_hooks


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_pass_ends_after_the_deepest_wanted_layer(models, name):
    model, calls = models[name], []
    deeper = {"sd": "up_ft2", "dit": "block3"}[name]
    z = encoded(model)
    with hooked(model, {deeper: lambda output: calls.append(output)}):
        model.activations(z, IDS, [LAYERS[name]], timestep=25)
        assert not calls
        model.activations(z, IDS, [deeper, LAYERS[name]], timestep=25)
    assert len(calls) == 1


@torch.no_grad()
def test_the_text_encoders_tokens_are_transformers_hidden_states(folders, models):
    text = models["sd"].text
    tokenizer = CLIPTokenizer.from_pretrained(folders["sd"], subfolder="tokenizer")
    whole = CLIPTextModel.from_pretrained(folders["sd"], subfolder="text_encoder").eval()
    texts = ["a cat", "a much longer text"]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = whole(ids, output_hidden_states=True).hidden_states
    found = text.activations(texts, ["block0", "block1"])
    for i, layer in enumerate(("block0", "block1")):
        spec = text.layers[layer]
        assert (spec.kind, spec.channels) == ("tokens", found[layer].shape[-1])
        torch.testing.assert_close(found[layer], states[i + 1], atol=1e-5, rtol=1e-4)
    with pytest.raises(KeyError, match="unknown layer 'block2' of the text encoder"):
        text.module("block2")


@torch.no_grad()
def test_an_edit_of_the_text_encoder_is_never_cached(models):
    model = models["sd"]
    plain = model.conditioning(["a dog"]).arguments()["encoder_hidden_states"]
    with hooked(model.text, {"block0": edit(lambda h: h + torch.arange(16))}):
        edited = model.conditioning(["a dog"]).arguments()["encoder_hidden_states"]
    assert (edited - plain).abs().max() > 1e-2
    again = model.conditioning(["a dog"]).arguments()["encoder_hidden_states"]
    assert torch.equal(again, plain)


@pytest.mark.parametrize(
    ("name", "timestep", "prompts", "words"),
    [
        ("sd", None, [], "give a timestep"),
        ("sd", 1000, [], "outside"),
        ("dit", 25, ["a dog"], "not on text like 'a dog'"),
        ("clip", 25, [], "works without noise"),
        ("clip", None, ["a dog"], "takes no prompts"),
    ],
)
def test_requests_are_checked_before_any_pass(folders, name, timestep, prompts, words):
    model = load_backbone(str(folders[name]), device="cpu")
    with pytest.raises(ValueError, match=words):
        check_request(model, timestep, prompts)


def test_timesteps_of_predictions_are_checked(models):
    model, x_t = models["sd"], torch.zeros(2, 4, 16, 16)
    conditioning = model.conditioning(["", "a"])
    for wrong in (1000, torch.tensor([0, 1000]), torch.tensor([-1, 3])):
        with pytest.raises(ValueError, match="outside"):
            model.predict(x_t, wrong, conditioning)
    with pytest.raises(ValueError, match="2 images but a conditioning of 1"):
        model.predict(x_t, 1, conditioning[torch.tensor([0])])


def test_a_familys_name_is_taken_once(models):
    kind = type(models["sd"])
    assert register_family(kind) is kind
    other: Any = type("Other", (kind,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="'stable-diffusion' is registered already"):
        register_family(other)


BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.mark.parametrize(
    ("kind", "config", "sigma"),
    [
        ("EulerDiscreteScheduler", BETAS, 0.0001**0.5),
        ("DDIMScheduler", BETAS | {"rescale_betas_zero_snr": True}, 0.0001**0.5),
        ("PNDMScheduler", {"trained_betas": [0.04] * 10}, 0.2),
        ("DPMSolverMultistepScheduler", BETAS | {"lambda_min_clipped": -math.inf}, 0.0001**0.5),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 0.003 / 1.002),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}, 0.001),
    ],
)
def test_a_schedulers_config_is_read(tmp_path, kind, config, sigma):
    steps = len(config.get("trained_betas", range(1000)))
    whole = {"_class_name": kind, "num_train_timesteps": steps} | config
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(whole))
    schedule = load_schedule(Source("m", str(tmp_path)))
    assert len(schedule) == steps
    assert float(schedule.sigmas[0]) == pytest.approx(sigma, rel=1e-3)
    if config.get("rescale_betas_zero_snr"):
        assert float(schedule.alphas[-1]) == 0
    for wrong in ({"num_train_timesteps": 0}, {"num_train_timesteps": "1"}, {"_class_name": "X"}):
        path.write_text(json.dumps(whole | wrong))
        with pytest.raises(ValueError, match=r"scheduler_config.json of m"):
            load_schedule(Source("m", str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("DDIMScheduler", BETAS | {"prediction_type": "score"}),
        ("DDIMScheduler", BETAS | {"prediction_type": ["epsilon"]}),
        ("DDIMScheduler", BETAS | {"beta_end": 3.0}),
        ("DDIMScheduler", BETAS | {"beta_end": math.inf}),
        ("DDIMScheduler", BETAS | {"beta_end": math.nan}),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}),
        ("DDIMScheduler", {"trained_betas": "all"}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": "3"}),
    ],
)
def test_a_config_that_says_no_schedule_is_one_line(tmp_path, kind, wrong):
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": kind, "num_train_timesteps": 1000} | wrong))
    with pytest.raises(ValueError, match=r"scheduler_config.json of m") as error:
        load_schedule(Source("m", str(tmp_path)))
    assert "\n" not in str(error.value)


class TokensBackbone:
    """A backbone of a user's own with one layer of tokens: the columns of the picture's mean over height."""

    name = "tokens"
    layers = {"columns": LayerSpec(3, 1, "tokens")}  # noqa: RUF012

    def __init__(self) -> None:
        self.transform = SquareTransform(8)

    def encode(self, pixels):
        return pixels

    def activations(self, encoded, ids, layers, **settings):
        return {layer: self.module(layer)(encoded).squeeze(2).transpose(1, 2) for layer in layers}

    def module(self, layer):
        return torch.nn.AvgPool2d((8, 1))


def test_tokens_are_stored_by_their_mean_and_refused_where_a_grid_is_needed(tmp_path):
    images = ImageDataset("pictures", None, ("x",), IDS, [0, 0, 0], picture)
    backbone = TokensBackbone()
    pixels = torch.stack([backbone.transform(picture(i)) for i in range(3)])
    tokens = backbone.activations(pixels, IDS, ["columns"])["columns"]
    assert tokens.shape == (3, 8, 3)
    [path] = extract(
        images, backbone, tmp_path / "a", layers=["columns"], timesteps=[], batch_size=2, workers=0
    )
    rows = ActivationStore.open(path).rows(0, 3)
    torch.testing.assert_close(rows, pixels.mean((2, 3)), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="gives tokens, not a grid"):
        extract(images, backbone, tmp_path / "b", layers=["columns"], timesteps=[], pool="none")
    with pytest.raises(ValueError, match="a layer on a grid"):
        LiveGrids(images, backbone, "columns", timestep=None)
