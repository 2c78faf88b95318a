"""DeepFloyd-IF, stage I: a text-conditional U-Net on pixels (Saharia et al. 2022; SPEC 2.8).

    pixels x0 (b 3 64 64) -> x_t -> U-Net cut after the deepest wanted layer

The layers are named as Stable Diffusion's. The U-Net is told T5's states of the prompt in lower case, as
the pipeline does it, and predicts the noise and its variance, six channels: the noise are the first three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import Request, Shape, register_family
from revelio.backbones.diffusion.unet import PixelUNetBackbone, load_unet, unet_config, unet_shape
from revelio.backbones.source import Source
from revelio.wording import plural

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.text_encoder import TextEncoder

CHANNELS = 3
TOKENS = 77  # the text length that it was trained with
# Settings by which text goes in, and what they may be; what else they stand for are other models' inputs.
TEXT_INPUTS = {"addition_embed_type": "text", "encoder_hid_dim_type": "text_proj"}


@register_family
class DeepFloydBackbone(PixelUNetBackbone):
    """A U-Net on pixels with its text encoder.

    Attributes:
        unet: the U-Net.
        text: the text encoder.
    """

    family = "deepfloyd-if"
    title = "DeepFloyd-IF (stage I)"
    parts = {"unet": "UNet2DConditionModel", "text_encoder": "T5EncoderModel"}  # noqa: RUF012
    without = ("vae", "vqvae", "movq", "image_noising_scheduler")
    pipelines = ("IFPipeline",)

    def __init__(
        self, unet: UNet2DConditionModel, multiple: int, text: TextEncoder, **common: Any
    ) -> None:
        super().__init__(unet, multiple, **common)
        self.text = text

    @classmethod
    def load(cls, request: Request) -> DeepFloydBackbone:
        """Load U-Net, text encoder and tokenizer."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        from revelio.backbones.diffusion.t5 import load_t5, lowercased
        from revelio.backbones.diffusion.text_encoder import check_width

        source, common = request.source, request.common()
        config = _config(source)
        text = load_t5(source, request.settings, length=TOKENS, masked=True, prepare=lowercased)
        width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
        check_width(source, text.width, width)
        unet = load_unet(UNet2DConditionModel, request, config)
        return cls(unet, request.multiple, text, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the U-Net's config."""
        return unet_shape(_config(source), None)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The text states of any texts, each encoded once."""
        from revelio.backbones.diffusion.conditioning import Conditioning

        told, rows = self.text.tables(prompts)
        return Conditioning(rows, {"encoder_hidden_states": told["states"]})

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """An ``IFPipeline`` without the safety checker and the watermark."""
        from diffusers.pipelines.deepfloyd_if.pipeline_if import IFPipeline

        model, tokenizer = self.text.parts()
        return IFPipeline(
            tokenizer=tokenizer,
            text_encoder=model,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )


def _config(source: Source) -> dict[str, Any]:
    """The config of the U-Net.

    Raises:
        ValueError: it is missing, or of a U-Net with other inputs, such as that of stage II.
    """
    config = unet_config(source, refused=("class_embed_type", "num_class_embeds"))
    if config["in_channels"] != CHANNELS:
        raise ValueError(
            f"{source.name} takes {plural(config['in_channels'], 'input channel')}: stage I of DeepFloyd-IF "
            f"takes {CHANNELS}"
        )
    for name, known in TEXT_INPUTS.items():
        if config.get(name) not in (None, known):
            raise ValueError(
                f"unet/config.json of {source.name} has {name} {config[name]!r}: DeepFloyd-IF has {known}"
            )
    return config
