"""A transformers image classifier, by name, folder or hub id: the class probabilities of pictures.

Detectors of unsafe or of some style's pictures come in this form. As with every model, weights are read as
safetensors, strictly, and no code that came with them runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


class ImageClassifier:
    """Class probabilities of pictures.

    Args:
        name: a folder or hub id of a model with a head for image classification.
        device: where it runs.

    Attributes:
        classes: their names, in the order of the probabilities.

    Raises:
        ValueError: it is no image classifier, or a part is missing or unreadable.
    """

    def __init__(self, name: str, device: str = "auto") -> None:
        from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

        from revelio.backbones.loading import frozen, reading
        from revelio.backbones.registry import find_source
        from revelio.backbones.vit import transform_of
        from revelio.backbones.weights import TRANSFORMERS, read_weights, transformers_part
        from revelio.device_memory import placed
        from revelio.distributed import device_of

        source = find_source(name)
        entries = source.json("config.json")
        kind = str(entries.get("model_type"))
        if kind not in CONFIG_MAPPING or (
            CONFIG_MAPPING[kind] not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        ):
            raise ValueError(f"{source.name} is a {kind}: no image classifier of transformers")
        with reading(f"config.json of {source.name}"):
            config: Any = CONFIG_MAPPING[kind].from_dict(entries)
        head: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
        weights = read_weights(source, "", TRANSFORMERS)
        model = transformers_part(head, config, weights, dtype="auto")
        with reading(f"config.json of {source.name}"):
            self.classes = [str(config.id2label[place]) for place in range(config.num_labels)]
            self._transform = transform_of(source, source.crop_size(config.image_size))
        self._model = placed(
            frozen(model, model.device), device_of(device), source.name, "take a smaller model"
        )

    @torch.no_grad()
    def probabilities(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "b classes"]:
        """The softmax of the logits, on the CPU."""
        pixels = torch.stack([self._transform(picture) for picture in pictures])
        logits = self._model(pixels.to(self._model.device)).logits
        return logits.float().softmax(dim=-1).cpu()
