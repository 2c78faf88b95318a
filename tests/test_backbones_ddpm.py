"""Pixel-space DDPMs against diffusers' own uncut U-Net with plain hooks."""

import json

import pytest
import torch
from backbones_helpers import picture, seeded
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from families_helpers import check_refused

from revelio.activations.extract import extract
from revelio.activations.store import ActivationStore
from revelio.backbones.base import DiffusionModel
from revelio.backbones.diffusion.schedule import keyed_noise
from revelio.backbones.layers import LayerSpec
from revelio.backbones.registry import describe_one, load_backbone
from revelio.data.dataset import ImageDataset

IDS = ["a", "b"]
LAYERS = {
    "bottleneck": LayerSpec(16, 4),
    "up_ft0": LayerSpec(16, 2),
    "up_ft1": LayerSpec(12, 1),
    "up_ft2": LayerSpec(8, 1),
}


def tiny_ddpm(folder, classes=None, out_channels=3):
    """A ``DDPMPipeline`` folder at 16 px."""
    unet = seeded(
        lambda: UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 12, 16),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            num_class_embeds=classes,
            out_channels=out_channels,
        ),
        3,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(clip_sample=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ddpm")
    return {
        "plain": tiny_ddpm(root / "plain"),
        "classes": tiny_ddpm(root / "classes", classes=5, out_channels=6),
    }


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def reference(folder, x0, timestep, labels):
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    kept, modules = {}, {"bottleneck": unet.mid_block}
    modules |= {f"up_ft{i}": block for i, block in enumerate(unet.up_blocks)}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
    noise = keyed_noise(x0.shape[1:], IDS, seed=0, timestep=timestep, draw=0)
    steps = torch.full((2,), timestep)
    x_t = DDPMScheduler.from_pretrained(folder, subfolder="scheduler").add_noise(x0, noise, steps)
    return kept, x_t, unet(x_t, steps, class_labels=labels).sample[:, :3]


@pytest.mark.parametrize(("name", "prompts"), [("plain", None), ("classes", ["3", "0"])])
@pytest.mark.parametrize("timestep", [0, 25, 999])
def test_activations_and_predictions_are_the_unets_own(folders, pixels, name, prompts, timestep):
    folder = folders[name]
    labels = None if prompts is None else torch.tensor([3, 0])
    expected, x_t, output = reference(folder, pixels, timestep, labels)
    whole = load_backbone(str(folder), device="cpu")
    assert isinstance(whole, DiffusionModel) and dict(whole.layers) == LAYERS
    found = whole.activations(pixels, IDS, list(LAYERS), timestep=timestep, prompts=prompts)
    for layer, spec in LAYERS.items():
        assert found[layer].shape == (2, spec.channels, 16 // spec.stride, 16 // spec.stride)
        torch.testing.assert_close(found[layer], expected[layer], atol=1e-5, rtol=1e-4)
        cut = load_backbone(str(folder), layers=[layer], device="cpu")
        assert list(cut.layers)[-1] == layer
        alone = cut.activations(pixels, IDS, [layer], timestep=timestep, prompts=prompts)
        assert torch.equal(alone[layer], found[layer])
    predicted = whole.predict(x_t, timestep, whole.conditioning(prompts or ["", ""]))
    torch.testing.assert_close(predicted, output, atol=1e-5, rtol=1e-4)
    assert torch.equal(whole.decode(whole.encode(pixels)), pixels)


def test_the_folder_is_described_and_extracted_like_any_other(folders, tmp_path):
    about = describe_one(str(folders["plain"]))
    assert (about.kind, about.image_size, dict(about.layers)) == ("U-Net", 16, LAYERS)
    images = ImageDataset("pictures", None, (), ["a", "b"], None, picture)
    backbone = load_backbone(str(folders["plain"]), layers=["up_ft0"], device="cpu")
    [path] = extract(
        images, backbone, tmp_path, layers=["up_ft0"], timesteps=[25], batch_size=1, workers=0
    )
    rows = ActivationStore.open(path).rows(0, 2)
    x0 = torch.stack([backbone.transform(picture(i)) for i in range(2)])
    expected = backbone.activations(x0, ["a", "b"], ["up_ft0"], timestep=25)["up_ft0"]
    torch.testing.assert_close(rows, expected.mean((2, 3)), atol=1e-5, rtol=1e-4)


def test_the_pipeline_generates_what_diffusers_does(folders):
    model, images = load_backbone(str(folders["plain"]), device="cpu"), []
    assert isinstance(model, DiffusionModel)
    for pipeline in (model.pipeline(), DDPMPipeline.from_pretrained(folders["plain"])):
        pipeline.set_progress_bar_config(disable=True)
        drawn = torch.Generator().manual_seed(1)
        made = pipeline(generator=drawn, num_inference_steps=3, output_type="np")
        images.append(torch.as_tensor(made.images))
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-3)


def test_what_it_does_not_take_is_one_line(folders, pixels, tmp_path):
    plain, classes = (load_backbone(str(folders[name]), device="cpu") for name in folders)
    with pytest.raises(ValueError, match="takes no prompts"):
        plain.activations(pixels, IDS, ["up_ft0"], timestep=1, prompts=["a", ""])
    for prompt in ("", "5", "a dog"):
        with pytest.raises(ValueError, match="give a class id from 0 to 4"):
            classes.activations(pixels, IDS, ["up_ft0"], timestep=1, prompts=["1", prompt])
    with pytest.raises(ValueError, match="no pipeline for classes"):
        classes.pipeline()
    with pytest.raises(ValueError, match="cut after up_ft0"):
        load_backbone(str(folders["plain"]), layers=["up_ft0"], device="cpu").pipeline()
    with pytest.raises(ValueError, match="must be multiples of 4"):
        plain.encode(torch.zeros(1, 3, 16, 18))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 1}, "takes 1 input channel:"),
        ({"class_embed_type": "timestep"}, "sets `class_embed_type`"),
        ({"num_class_embeds": "many"}, "has num_class_embeds = 'many'"),
        ({"sample_size": None}, "has no `sample_size`"),
        ({"up_block_types": ["SkipUpBlock2D"] * 3}, "has skip blocks"),
        ({"_class_name": "UNet1DModel"}, "is of a UNet1DModel"),
    ],
)
def test_other_unets_are_refused(folders, tmp_path, changes, words):
    check_refused(folders["plain"], tmp_path, "unet", changes, words)


def test_a_latent_unconditional_pipeline_is_not_taken_for_one(folders, tmp_path):
    folder = tiny_ddpm(tmp_path / "m")
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {"vqvae": ["diffusers", "VQModel"]}
    path.write_text(json.dumps(index | {"_class_name": "LDMPipeline"}))
    with pytest.raises(ValueError, match="is a LDMPipeline: supported are"):
        load_backbone(str(folder), device="cpu")
