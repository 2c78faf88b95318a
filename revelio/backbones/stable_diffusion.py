"""Stable Diffusion 1.x and 2.x: grids of the U-Net's middle and decoder blocks (SPEC 1.1, 2.2).

    pixels (b 3 512 512) -> z0 (b 4 64 64) -> z_t -> U-Net cut after the deepest wanted layer

Any folder or hub id whose model_index.json says ``StableDiffusionPipeline`` takes this path. Whether the
model predicts noise or velocity (SD-2.1 at 768 px) makes no difference: grids need the noised input only.
"""

from collections.abc import Sequence

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from revelio.backbones.capture import as_grid, captured
from revelio.backbones.latents import LatentSpace, load_latent_space
from revelio.backbones.loading import (
    LoadSettings,
    check_batch,
    frozen,
    quiet,
    use_eager_attention,
)
from revelio.backbones.source import Source
from revelio.backbones.specs import Layers, check_layers, cut_after, unet_layers, unet_multiple
from revelio.backbones.text import PromptEncoder
from revelio.data.transforms import SquareTransform


class StableDiffusionBackbone:
    """A U-Net with its VAE and text encoder; make one with :func:`load`.

    Attributes:
        unet: the U-Net, cut.
        latents: VAE and noise schedule.
        text: the prompt encoder.
    """

    def __init__(
        self,
        name: str,
        layers: Layers,
        image_size: int,
        unet: UNet2DConditionModel,
        latents: LatentSpace,
        text: PromptEncoder,
    ) -> None:
        self.name = name
        self.layers = layers
        self.transform = SquareTransform(image_size)
        self.unet = unet
        self.latents = latents
        self.text = text

    @property
    def alphas_cumprod(self) -> Float[Tensor, " steps"]:
        """The noise schedule, for :func:`revelio.backbones.noise.match_timestep`."""
        return self.latents.alphas_cumprod

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c zh zw"]:
        """VAE latents z_0 in float16; see :meth:`LatentSpace.encode`."""
        return self.latents.encode(pixels)

    @torch.no_grad()
    def grids(
        self,
        encoded: Float[Tensor, "b c h w"],
        ids: Sequence[str],
        layers: Sequence[str],
        *,
        timestep: int | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> dict[str, Tensor]:
        """See :meth:`Backbone.grids`."""
        check_layers(self.layers, layers, self.name)
        check_batch(len(encoded), ids, prompts)
        noised, steps = self.latents.noised(encoded, ids, timestep=timestep, seed=seed, draw=draw)
        if noised.device.type == "cpu":
            noised = noised.contiguous(memory_format=torch.channels_last)
        texts = [""] * len(encoded) if prompts is None else prompts
        with captured({layer: layer_module(self.unet, layer) for layer in layers}) as kept:
            self.unet(noised, steps, encoder_hidden_states=self.text.embed(texts))
        return {layer: as_grid(kept[layer]) for layer in layers}


def layer_module(unet: UNet2DConditionModel, layer: str) -> nn.Module:
    """The module whose output is ``layer``: ``mid_block`` or one of ``up_blocks``."""
    if layer == "bottleneck":
        return unet.get_submodule("mid_block")
    return unet.up_blocks[int(layer.removeprefix("up_ft"))]


def cut(unet: UNet2DConditionModel, layers: Layers) -> None:
    """Drop everything that comes after the last of ``layers``; its memory is freed."""
    depth = sum(layer.startswith("up_ft") for layer in layers)
    unet.up_blocks = unet.up_blocks[:depth]
    unet.conv_norm_out = None
    unet.conv_out = nn.Identity()  # type: ignore[assignment]


def load(source: Source, settings: LoadSettings) -> StableDiffusionBackbone:
    """Load vae, unet, text_encoder, tokenizer and scheduler; nothing else of the pipeline.

    Raises:
        KeyError: an unknown layer.
        ValueError: a setting the model can't take.
        OSError: a part is missing or unreadable.
    """
    unet_config, vae_config = source.json("unet/config.json"), source.json("vae/config.json")
    kept = cut_after(unet_layers(unet_config, vae_config), settings.layers, source.name)
    multiple = unet_multiple(unet_config, vae_config)
    if unet_config["in_channels"] != vae_config["latent_channels"]:
        raise ValueError(
            f"{source.name} takes {unet_config['in_channels']} input channels (for inpainting or "
            "depth): only text-to-image models are supported"
        )
    side = settings.side(source, multiple)
    latents = load_latent_space(source, settings, multiple)
    unet, text = _load_unet(source, settings, kept), _load_text(source, settings)
    return StableDiffusionBackbone(source.name, kept, side, unet, latents, text)


def _load_unet(source: Source, settings: LoadSettings, kept: Layers) -> UNet2DConditionModel:
    with quiet():
        unet = UNet2DConditionModel.from_pretrained(
            source.location,
            subfolder="unet",
            revision=source.revision,
            torch_dtype=settings.number_format,
        )
    cut(unet, kept)
    if settings.attention == "eager":
        use_eager_attention(unet)
    return frozen(unet, settings.place, convolutional=True)


def _load_text(source: Source, settings: LoadSettings) -> PromptEncoder:
    with quiet():
        tokenizer = CLIPTokenizer.from_pretrained(
            source.location, subfolder="tokenizer", revision=source.revision or "main"
        )
        model = CLIPTextModel.from_pretrained(
            source.location,
            subfolder="text_encoder",
            revision=source.revision or "main",
            dtype=settings.number_format,
            attn_implementation=settings.attention,
        )
    return PromptEncoder(tokenizer, frozen(model, settings.place))
