"""CLIP's image encoder as a backbone (SPEC 2.6, 3.1); see :mod:`revelio.backbones.vit` for its layers.

Other image sizes than the model's own interpolate its position embeddings.
"""

from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from revelio.backbones.layers import cut_after, vit_layers
from revelio.backbones.loading import LoadSettings, frozen, reading
from revelio.backbones.source import Source
from revelio.backbones.vit import VitBackbone, cut_blocks, transform_of
from revelio.backbones.weights import TRANSFORMERS, read_weights, transformers_part

# What a whole CLIPModel holds beside its image encoder.
TEXT_HALF = r"text_model\..*|(text|visual)_projection\.weight|logit_scale"


def load(source: Source, settings: LoadSettings) -> VitBackbone:
    """Load the image encoder of a ``CLIPModel`` or ``CLIPVisionModel``.

    Raises:
        KeyError: an unknown layer.
        ValueError: a setting the model can't take; or its files are missing, unreadable, or don't fit.
    """
    vision = source.vision_config()
    kept = cut_after(vit_layers(vision), settings.layers, source.name)
    size = settings.side(source.crop_size(vision["image_size"]), vision["patch_size"], source.name)
    model = transformers_part(
        CLIPVisionModel,
        image_config(source),
        read_weights(source, "", TRANSFORMERS),
        unused=TEXT_HALF,
        dtype=settings.number_format,
        attn_implementation=settings.attention,
    )
    modules = cut_blocks(model, kept)
    return VitBackbone(
        source.name,
        kept,
        transform_of(source, size),
        frozen(model, settings.place),
        modules,
        whole=settings.layers is None,
        settings={"interpolate_pos_encoding": size != vision["image_size"]},
    )


def image_config(source: Source) -> CLIPVisionConfig:
    """The config of the image encoder, out of its own or a whole CLIP model's.

    Raises:
        ValueError: it is missing or broken.
    """
    entries = source.json("config.json")
    with reading(f"config.json of {source.name}"):
        if entries.get("model_type") == "clip":
            return CLIPConfig.from_dict(entries).vision_config  # type: ignore[return-value]
        return CLIPVisionConfig.from_dict(entries)
