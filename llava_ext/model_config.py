"""What is in a saved model's ``config.json``; its settings are a :class:`ModelConfig`'s fields."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


@dataclass(frozen=True)
class TowerShape:
    """What the model needs to know of a tower: its grid's channels, and height and width."""

    channels: int
    grid: tuple[int, int]


class RevelioLlavaConfig(PreTrainedConfig):
    """What is in a saved model's ``config.json``.

    Attributes:
        format: of the folder.
        model: the fields of a :class:`ModelConfig`.
        shapes: of the towers' grids, ``{channels, grid}`` each.
        transforms: how each tower's pictures are made, as :class:`SquareTransform`'s fields.
        language: ``whole`` where the language model's weights are in the folder, ``reference`` where only its
            name is.
        adapter: whether there is an adapter on top.
        image_token_id: stands for a token of an image in a processor's text.
        text_config: the language model's own.
    """

    model_type = "revelio_llava"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        shapes: Sequence[dict[str, Any]] = (),
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        *,
        transforms: Sequence[dict[str, Any]] = (),
        image_token_id: int | None = None,
        language: str = "reference",
        adapter: bool = False,
        format: int = 2,
        **settings: Any,
    ) -> None:
        self.model, self.shapes, self.transforms = model, list(shapes), list(transforms)
        self.image_token_id, self.format = image_token_id, format
        self.language, self.adapter = language, adapter
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        super().__init__(**settings)


AutoConfig.register(RevelioLlavaConfig.model_type, RevelioLlavaConfig, exist_ok=True)
