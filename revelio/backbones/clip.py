"""CLIP's image encoder as a backbone (SPEC 2.6, 3.1); see :mod:`revelio.backbones.vit` for its layers.

Other image sizes than the model's own interpolate its position embeddings.
"""

from transformers import CLIPVisionModel

from revelio.backbones.loading import LoadSettings, frozen, quiet
from revelio.backbones.source import Source
from revelio.backbones.specs import cut_after, vit_layers
from revelio.backbones.vit import VitBackbone, cut_blocks, transform_of

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def load(source: Source, settings: LoadSettings) -> VitBackbone:
    """Load the image encoder of a ``CLIPModel`` or ``CLIPVisionModel``.

    Raises:
        KeyError: an unknown layer.
        ValueError: a setting the model can't take.
        OSError: a part is missing or unreadable.
    """
    vision = source.vision_config()
    kept = cut_after(vit_layers(vision), settings.layers, source.name)
    size = settings.side(source, vision["patch_size"])
    with quiet():
        model = CLIPVisionModel.from_pretrained(
            source.location,
            revision=source.revision or "main",
            dtype=settings.number_format,
            attn_implementation=settings.attention,
        )
    modules = cut_blocks(model, kept)
    return VitBackbone(
        source.name,
        kept,
        transform_of(source, size, MEAN, STD),
        frozen(model, settings.place),
        modules,
        settings={"interpolate_pos_encoding": size != vision["image_size"]},
    )
