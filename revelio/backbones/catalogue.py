"""The models known by name. A description is a few numbers; nothing is downloaded to list them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from revelio.backbones.families import describe_source
from revelio.backbones.layers import Layers, dit_layers, flux_layers, unet_layers, vit_layers
from revelio.backbones.source import Description, Source

VAE = {"block_out_channels": (128, 256, 512, 512)}
UNET = {"block_out_channels": (320, 640, 1280, 1280)}
DIT_XL_2 = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "patch_size": 2}

SDXL = {"block_out_channels": (320, 640, 1280)}

# name: (hub id, image size, U-Net, summary). SD-2.1 comes in two: trained at 768 px to predict velocity,
# and -base, at 512 px to predict noise. The paper doesn't say which (SPEC 2.8).
UNETS = {
    "sd-1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, UNET, "the paper's main model"),
    "sd-1.4": ("CompVis/stable-diffusion-v1-4", 512, UNET, "the version before"),
    "sd-2.0-base": ("stabilityai/stable-diffusion-2-base", 512, UNET, "predicts noise"),
    "sd-2.1": ("stabilityai/stable-diffusion-2-1", 768, UNET, "predicts velocity"),
    "sd-2.1-base": ("stabilityai/stable-diffusion-2-1-base", 512, UNET, "predicts noise"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 1024, SDXL, "two text encoders"),
    "sdxl-turbo": ("stabilityai/sdxl-turbo", 512, SDXL, "SDXL distilled to few steps"),
}
# On pixels, without a VAE.
IF_UNET = {"block_out_channels": (704, 1408, 2112, 2816)}
IFS = {"deepfloyd-if-xl": ("DeepFloyd/IF-I-XL-v1.0", 64, IF_UNET, "on pixels; T5 text encoder")}
DITS = {
    "dit-xl-2-256": ("facebook/DiT-XL-2-256", 256, "ImageNet classes"),
    "dit-xl-2-512": ("facebook/DiT-XL-2-512", 512, "ImageNet classes"),
}
# The transformer is DiT-XL/2's with cross-attention.
PIXARTS = {
    "pixart-alpha-512": ("PixArt-alpha/PixArt-XL-2-512x512", 512, "T5 text encoder"),
    "pixart-sigma-512": ("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", 512, "T5, up to 300 tokens"),
    "pixart-sigma-1024": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 1024, "T5, up to 300 tokens"),
}
SD3_MEDIUM = {
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "num_layers": 24,
    "patch_size": 2,
}
SD3S = {
    "sd3-medium": ("stabilityai/stable-diffusion-3-medium-diffusers", "rectified flow"),
    "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", "rectified flow"),
}
FLUX_1 = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 19,
    "num_single_layers": 38,
}
FLUXES = {
    "flux-1-dev": ("black-forest-labs/FLUX.1-dev", "guidance-distilled"),
    "flux-1-schnell": ("black-forest-labs/FLUX.1-schnell", "few-step"),
}
# What `revelio backbones NAME` says beside the layers.
WITHDRAWN = (
    "its owner withdrew it from the hub: give the folder of a copy. Others keep one there as "
    "sd2-community/{}, which neither its owner nor Revelio vouches for"
)
HALF = "its VAE overflows in float16: load it in bfloat16 or float32"
GATED = "gated: accept its license on the hub and log in with `hf auth login`, or give a folder"
ALONE = (
    "its hub id holds the transformer alone: download it, and load it with the other parts of the model at "
    "1024 px, as pixart-sigma-1024+path/to/transformer"
)
NOTES = {
    "pixart-sigma-512": ALONE,
    "sd-2.0-base": WITHDRAWN.format("stable-diffusion-2-base"),
    "sd-2.1": WITHDRAWN.format("stable-diffusion-2-1"),
    "sd-2.1-base": WITHDRAWN.format("stable-diffusion-2-1-base"),
    "sdxl": HALF,
    "sdxl-turbo": HALF,
    **dict.fromkeys(("deepfloyd-if-xl", "sd3-medium", "sd3.5-medium", "flux-1-dev"), GATED),
}
# name: (hub id, image size, width, blocks, patch)
CLIPS = {
    "clip-vit-b-32": ("openai/clip-vit-base-patch32", 224, 768, 12, 32),
    "clip-vit-b-16": ("openai/clip-vit-base-patch16", 224, 768, 12, 16),
    "clip-vit-l-14": ("openai/clip-vit-large-patch14", 224, 1024, 24, 14),
    "clip-vit-l-14-336": ("openai/clip-vit-large-patch14-336", 336, 1024, 24, 14),
}
DINOS = {
    "dinov2-vit-s-14": ("facebook/dinov2-small", 224, 384, 12, 14),
    "dinov2-vit-b-14": ("facebook/dinov2-base", 224, 768, 12, 14),
    "dinov2-vit-l-14": ("facebook/dinov2-large", 224, 1024, 24, 14),
    "dinov2-vit-l-14-registers": ("facebook/dinov2-with-registers-large", 224, 1024, 24, 14),
}
MINIS = {
    "mini-sd": "U-Net on Fashion-MNIST at 32 px, with SD-1.5's block types",
    "mini-sd-photo": "U-Net on Caltech-101 and CIFAR-10 photographs at 64 px",
    "mini-dit": "diffusion transformer on mini-sd's latents",
    "mini-clip": "CLIP on captions made of class names",
}


def hub_models() -> Iterator[Description]:
    """The models that come from the hub."""
    for name, (hub_id, size, unet, summary) in (UNETS | IFS).items():
        layers = unet_layers(unet, VAE if name in UNETS else None)
        note = NOTES.get(name, "")
        yield Description(name, "U-Net", size, layers, hub_id, summary, note)
    for name, (hub_id, size, summary) in (DITS | PIXARTS).items():
        layers, note = dit_layers(DIT_XL_2, VAE), NOTES.get(name, "")
        yield Description(name, "DiT", size, layers, hub_id, summary, note)
    for name, (hub_id, summary) in SD3S.items():
        layers, note = dit_layers(SD3_MEDIUM, VAE), NOTES.get(name, "")
        yield Description(name, "MMDiT", 1024, layers, hub_id, summary, note)
    for name, (hub_id, summary) in FLUXES.items():
        layers, note = flux_layers(FLUX_1, 16), NOTES.get(name, "")
        yield Description(name, "MMDiT", 1024, layers, hub_id, summary, note)
    for name, row in CLIPS.items():
        yield _vit(name, row, "image encoder", norm=False)
    for name, row in DINOS.items():
        yield _vit(name, row, "self-supervised", norm=True)


def shipped_models() -> Iterator[Description]:
    """The models that come with Revelio, described by their own config files."""
    for name, summary in MINIS.items():
        path = find_shipped(name)
        if path is None:
            layers: Layers = {}
            yield Description(name, "-", 0, layers, "not in this copy", summary)
        else:
            found = describe_source(Source(name, str(path)))
            yield Description(name, found.kind, found.image_size, found.layers, "shipped", summary)


def find_shipped(name: str) -> Path | None:
    """The folder of a shipped model: in a wheel, or in the repository this runs from."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "shipped_models" / name, package.parent / "models" / name):
        if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
            return folder
    return None


def _vit(name: str, row: tuple[str, int, int, int, int], summary: str, *, norm: bool) -> Any:
    hub_id, size, width, blocks, patch = row
    config = {"hidden_size": width, "num_hidden_layers": blocks, "patch_size": patch}
    return Description(name, "ViT", size, vit_layers(config, norm=norm), hub_id, summary)
