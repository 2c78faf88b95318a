"""Tiny random models, written as whole folders that ``from_pretrained`` takes.

Every builder is seeded and leaves the global random state alone; each writes under a second.

    tiny_sd      32 px, latents 4x16x16, U-Net with SD-1.5's block types
                 bottleneck 16x2x2, up_ft0 16x4x4, up_ft1 16x8x8, up_ft2 12x16x16, up_ft3 8x16x16
    tiny_sdxl    32 px, latents 4x16x16, three levels, two text encoders of 16 and 20 channels
                 bottleneck 16x4x4, up_ft0 16x8x8, up_ft1 12x16x16, up_ft2 8x16x16
    tiny_if      16 px, U-Net with DeepFloyd-IF's block types, learned variance
                 bottleneck 16x4x4, up_ft0 16x8x8, up_ft1 16x16x16, up_ft2 8x16x16
    tiny_dit     32 px, latents 4x16x16, 4 blocks of 64 tokens x 16, 10 classes (null class 10)
    tiny_pixart  32 px, latents 4x16x16, 3 blocks of 64 tokens x 24, learned variance
    tiny_clip    32 px, patches of 8, 3 blocks of 16 tokens x 16 (image and text encoder, tokenizer)
    tiny_dinov2  28 px, patches of 7, 3 blocks of 16 tokens x 16 (``registers`` for the variant)
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    IFPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_LENGTH = 16
SD_LAYERS = ("bottleneck", "up_ft0", "up_ft1", "up_ft2", "up_ft3")


def seeded(build: Callable[[], Any], seed: int) -> Any:
    """``build()`` with its own random state, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every text has its own ids."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


def tiny_text_config(width: int = 16, **changes: Any) -> CLIPTextConfig:
    tokenizer = tiny_tokenizer()
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16} | changes
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )


def tiny_projected_clip(width: int = 16, seed: int = 0) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with its projection, to 16 channels."""
    return seeded(lambda: CLIPTextModelWithProjection(tiny_text_config(width)), seed)


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose words are single letters."""
    letters = [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz ,."]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=32)


def tiny_t5(width: int = 16, words: int = 40, seed: int = 0) -> T5EncoderModel:
    """A T5 encoder; its embedding has a few rows more than its tokenizer has words, as T5's own."""
    config = T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return seeded(lambda: T5EncoderModel(config), seed)


def tiny_vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """A VAE that halves 32 px to 16; ``changes`` to its config."""
    config = {"latent_channels": 4, "scaling_factor": 0.5} | changes
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
            **config,
        ),
        seed,
    )


def _scheduler(schedule: str, prediction_type: str, **changes: Any) -> DDIMScheduler:
    first, last = (0.0001, 0.02) if schedule == "linear" else (0.00085, 0.012)
    return DDIMScheduler(
        beta_start=first,
        beta_end=last,
        beta_schedule=schedule,
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **changes,
    )


def tiny_sd(
    folder: Path,
    *,
    prediction_type: str = "epsilon",
    text_width: int = 16,
    text: dict[str, Any] | None = None,
    zero_snr: bool = False,
    seed: int = 0,
) -> Path:
    """A whole ``StableDiffusionPipeline`` folder; ``v_prediction`` for the shape of SD-2.1.

    Args:
        folder: where.
        prediction_type: of the U-Net.
        text_width: channels of the text encoder.
        text: what else its config says.
        zero_snr: whether nothing of the image is left at the last timestep.
        seed: of the weights.
    """
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 12, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=[2, 3, 4, 4],
            cross_attention_dim=text_width,
            use_linear_projection=prediction_type == "v_prediction",
        ),
        seed,
    )
    StableDiffusionPipeline(
        vae=tiny_vae(seed),
        text_encoder=seeded(
            lambda: CLIPTextModel(tiny_text_config(text_width, **(text or {}))), seed
        ),
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=_scheduler("scaled_linear", prediction_type, rescale_betas_zero_snr=zero_snr),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_sdxl(folder: Path, *, seed: int = 0) -> Path:
    """A whole ``StableDiffusionXLPipeline`` folder."""
    sdxl_pipeline(seed).save_pretrained(folder)
    return folder


def sdxl_pipeline(seed: int = 0, **more: Any) -> StableDiffusionXLPipeline:
    """The pipeline of :func:`tiny_sdxl` in memory."""
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 12, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=[2, 3, 4],
            transformer_layers_per_block=[1, 1, 2],
            cross_attention_dim=36,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        seed,
    )
    text, text_2 = tiny_text_config(), tiny_text_config(20, hidden_act="gelu")
    tokenizer_2 = tiny_tokenizer()
    tokenizer_2.pad_token = "!"  # as OpenCLIP's
    return StableDiffusionXLPipeline(
        vae=tiny_vae(seed),
        text_encoder=seeded(lambda: CLIPTextModel(text), seed),
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(text_2), seed + 1),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=_scheduler("scaled_linear", "epsilon"),
        add_watermarker=False,
        **more,
    )


def tiny_if(folder: Path, *, seed: int = 0) -> Path:
    """A whole ``IFPipeline`` folder, stage I."""
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(8, 16, 16),
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 2),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 2, "ResnetUpsampleBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=32,
            cross_attention_norm="group_norm",
            encoder_hid_dim=16,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            act_fn="gelu",
            resnet_time_scale_shift="scale_shift",
        ),
        seed,
    )
    IFPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(seed=seed),
        unet=unet,
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_dit(folder: Path, *, classes: int = 10, seed: int = 0) -> Path:
    """A whole ``DiTPipeline`` folder."""
    dit_pipeline(classes, seed).save_pretrained(folder)
    return folder


def dit_pipeline(classes: int, seed: int = 0) -> DiTPipeline:
    """The pipeline of :func:`tiny_dit` in memory."""
    transformer = seeded(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=classes,
        ),
        seed,
    )
    return DiTPipeline(
        transformer=transformer, vae=tiny_vae(seed), scheduler=_scheduler("linear", "epsilon")
    )


def tiny_pixart(folder: Path, *, sigma: bool = False, sizes: bool = False, seed: int = 0) -> Path:
    """A whole ``PixArtAlphaPipeline`` folder, or a ``PixArtSigmaPipeline`` one; ``sizes`` as inputs."""
    transformer = seeded(
        lambda: PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=8,
            num_layers=3,
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            caption_channels=16,
            use_additional_conditions=sizes,
        ),
        seed,
    )
    pipeline: Any = (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(seed=seed),
        vae=tiny_vae(seed),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """A ``CLIPModel`` folder with its tokenizer and image processor."""
    config = CLIPConfig(
        text_config=tiny_text_config().to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=16,
        ).to_dict(),
        projection_dim=16,
    )
    seeded(lambda: CLIPModel(config), seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def seeing_clip(folder: Path) -> Path:
    """A ``CLIPModel`` folder whose image embedding depends on the picture: random ones hardly look at it."""
    model = CLIPModel.from_pretrained(tiny_clip(folder, seed=4))
    for name, parameter in model.vision_model.named_parameters():
        if name.endswith(("v_proj.weight", "out_proj.weight", "patch_embedding.weight")):
            parameter.data.mul_(20)
    model.save_pretrained(folder)
    return folder


def tiny_dinov2(folder: Path, *, registers: int = 0, seed: int = 0) -> Path:
    """A ``Dinov2Model`` folder, or with ``registers`` > 0 a ``Dinov2WithRegistersModel`` one."""
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    if registers:
        config = Dinov2WithRegistersConfig(num_register_tokens=registers, **shape)
        seeded(lambda: Dinov2WithRegistersModel(config), seed).save_pretrained(folder)
    else:
        seeded(lambda: Dinov2Model(Dinov2Config(**shape)), seed).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = {"crop_size": {"height": 28, "width": 28}, "image_mean": mean, "image_std": std}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def fp16_only(folder: Path, copy: Path) -> Path:
    """A copy of a pipeline's folder whose safetensors are float16 and called ``.fp16`` only."""
    shutil.copytree(folder, copy)
    for file in copy.glob("*/*.safetensors"):
        halves = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        file.unlink()
    return copy


def picture(index: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture of smooth random colours, the same for the same index."""
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)
