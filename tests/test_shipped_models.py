"""The models that come with Revelio: small, in half precision, with their cards, and trained.

What they are worth is measured in docs/mini_models.md; here only what no untrained or damaged file could do,
through diffusers' and transformers' own classes.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from revelio.backbones.registry import load_backbone
from revelio.data.open import open_dataset
from revelio.mini.captions import PROMPT, noun

ROOT = Path(__file__).resolve().parents[1] / "models"
NAMES = ("mini-clip", "mini-sd", "mini-sd-photo", "mini-dit")
PICTURES = 60


@pytest.fixture(scope="module")
def pictures():
    dataset = open_dataset("samples", split="test", limit=PICTURES)
    return dataset, [dataset.read(index) for index in range(PICTURES)]


def test_all_together_are_small_and_in_half_precision() -> None:
    files = [file for file in ROOT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 80e6
    assert {file.relative_to(ROOT).parts[0] for file in files} == set(NAMES)
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 1 + 3 + 3 + 2
    for file in weights:
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, file
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_card_and_loads_by_name(name) -> None:
    card = (ROOT / name / "README.md").read_text(encoding="utf-8")
    parts = ("## Data", "licence", "No held-out picture", "## Training", "## Measured", "## Limits")
    assert all(part in card for part in parts)
    backbone = load_backbone(name, device="cpu")
    assert backbone.name == name and len(backbone.layers) >= 4


def test_mini_clip_knows_clothes(pictures) -> None:
    dataset, samples = pictures
    model = CLIPModel.from_pretrained(ROOT / "mini-clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "mini-clip")
    prompts = [PROMPT.format(noun(name)) for name in dataset.classes]
    asked = tokenizer(prompts, padding=True, return_tensors="pt")
    transform = load_backbone("mini-clip", device="cpu").transform
    pixels = torch.stack([transform(picture) for picture in samples])
    with torch.no_grad():
        found = model(pixel_values=pixels, **asked).logits_per_image.argmax(1)
    labels = torch.tensor(dataset.labels)
    assert (found == labels).float().mean() > 0.75  # chance is a tenth


@pytest.mark.parametrize("name", ["mini-sd", "mini-sd-photo"])
def test_mini_clip_keeps_the_text_encoder_that_the_unets_were_trained_with(name) -> None:
    clip = load_file(ROOT / "mini-clip" / "model.safetensors")
    used = load_file(ROOT / name / "text_encoder" / "model.safetensors")
    kept = {key: value for key, value in clip.items() if key.startswith("text_model.")}
    own = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in used.items()}
    assert kept.keys() == own.keys() and len(kept) > 40
    assert all(torch.equal(kept[key], own[key]) for key in kept)


def squared_error(pipeline, name, samples, timestep, **condition) -> float:
    """Mean squared error of the predicted noise; a model that predicts none has 1."""
    transform = load_backbone(name, device="cpu").transform
    pixels = torch.stack([transform(picture) for picture in samples])
    latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    steps = torch.full((len(latents),), timestep)
    noised = pipeline.scheduler.add_noise(latents, noise, steps)
    model = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    found = model(noised, steps, **condition).sample[:, : latents.shape[1]]
    return float((found - noise).square().mean())


@pytest.mark.parametrize(("name", "bound"), [("mini-sd", 0.1), ("mini-sd-photo", 0.1)])
@torch.no_grad()
def test_a_stable_diffusion_predicts_noise(name, bound, pictures) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / name, torch_dtype=torch.float32)
    states = pipeline.encode_prompt("", "cpu", 1, False)[0].expand(PICTURES, -1, -1)
    error = squared_error(pipeline, name, pictures[1], 300, encoder_hidden_states=states)
    assert error < bound


@torch.no_grad()
def test_mini_dit_predicts_noise_and_knows_its_classes(pictures) -> None:
    pipeline = DiTPipeline.from_pretrained(ROOT / "mini-dit", torch_dtype=torch.float32)
    labels = torch.tensor(pictures[0].labels)
    own, other, none = (
        squared_error(pipeline, "mini-dit", pictures[1], 500, class_labels=classes)
        for classes in (labels, (labels + 5) % 10, torch.full_like(labels, 1000))
    )
    assert own < none < other < 0.3
    assert pipeline.get_label_ids(["ankle boot"]) == [9]
    index = json.loads((ROOT / "mini-dit" / "model_index.json").read_text())
    assert len(index["id2label"]) == 10
