"""Stable Diffusion 1.x and 2.x: grids of the U-Net's middle and decoder blocks (SPEC 1.1, 2.2).

    pixels (b 3 512 512) -> z0 (b 4 64 64) -> z_t -> U-Net cut after the deepest wanted layer

Any folder or hub id whose model_index.json lists such parts takes this path, whatever its pipeline is
called. Whether the model predicts noise or velocity (SD-2.1 at 768 px) makes no difference: grids need
the noised input only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from revelio.backbones.capture import as_grid, captured
from revelio.backbones.latents import LatentSpace, load_latent_space
from revelio.backbones.loading import (
    LoadSettings,
    check_batch,
    frozen,
    reading,
    use_eager_attention,
)
from revelio.backbones.source import Source
from revelio.backbones.specs import Layers, check_layers, cut_after, unet_layers, unet_multiple
from revelio.backbones.text import PromptEncoder, load_clip_tokenizer
from revelio.backbones.weights import (
    DIFFUSERS,
    TRANSFORMERS,
    Weights,
    diffusers_part,
    read_file,
    read_weights,
    transformers_part,
)
from revelio.data.transforms import SquareTransform
from revelio.trust import printable

# What the original releases put before the names of the U-Net's weights.
ORIGINAL = "model.diffusion_model."


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
        ValueError: a setting the model can't take; or a part is missing, unreadable, or doesn't fit.
    """
    unet_config, vae_config = source.unet_config(), source.part_config("vae", "AutoencoderKL")
    kept = cut_after(unet_layers(unet_config, vae_config), settings.layers, source.name)
    multiple = unet_multiple(unet_config, vae_config)
    if unet_config["in_channels"] != vae_config["latent_channels"]:
        raise ValueError(
            f"{source.name} takes {unet_config['in_channels']} input channels (for inpainting or "
            "depth): only text-to-image models are supported"
        )
    side = settings.side(source, multiple)
    latents = load_latent_space(source, settings, multiple)
    unet = _load_unet(source, settings, kept, unet_config)
    return StableDiffusionBackbone(
        source.name, kept, side, unet, latents, _load_text(source, settings, unet)
    )


def _load_unet(
    source: Source, settings: LoadSettings, kept: Layers, config: Mapping[str, Any]
) -> UNet2DConditionModel:
    weights = _unet_weights(source, config)
    unet = diffusers_part(UNet2DConditionModel, config, weights, settings.number_format)
    cut(unet, kept)
    if settings.attention == "eager":
        use_eager_attention(unet)
    return frozen(unet, settings.place, convolutional=True)


def _unet_weights(source: Source, config: Mapping[str, Any]) -> Weights:
    """The U-Net's weights; out of a single file also by the names of the original releases."""
    file = source.unet
    if file is None or file.is_dir():
        return read_weights(source, "unet", DIFFUSERS)
    weights = read_file(file)
    original = {k: v for k, v in weights.tensors.items() if k.startswith(ORIGINAL)}
    if not original:
        return weights
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with reading(f"the U-Net in {weights.where} (with the config of {source.location})"):
        return replace(weights, tensors=convert_ldm_unet_checkpoint(original, dict(config)))


def _load_text(source: Source, settings: LoadSettings, unet: UNet2DConditionModel) -> PromptEncoder:
    path = "text_encoder/config.json"
    entries = source.json(path)
    if entries.get("model_type") != "clip_text_model":
        found = printable(entries.get("model_type"))
        raise ValueError(f"{path} of {source.name} is of a {found}, not of a clip_text_model")
    source.check(path, entries, {})
    with reading(f"{path} of {source.name}"):
        config = CLIPTextConfig.from_dict(entries)
    width = unet.config["cross_attention_dim"]
    if config.hidden_size != width:
        raise ValueError(
            f"the text encoder of {source.name} is {config.hidden_size} wide, its U-Net takes {width}: "
            "they belong to different models"
        )
    model = transformers_part(
        CLIPTextModel,
        config,
        read_weights(source, "text_encoder", TRANSFORMERS),
        dtype=settings.number_format,
        attn_implementation=settings.attention,
    )
    tokenizer = load_clip_tokenizer(source, "tokenizer", config.vocab_size)
    return PromptEncoder(tokenizer, frozen(model, settings.place))
