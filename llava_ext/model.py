"""The trained model: projectors and a causal language model. The frozen towers stay outside.

    grids of each tower (i c h w) -> projector -> fuse -> (i T d) -> spliced into the text -> language model

It is a model of transformers: the Auto classes, ``generate``, ``pipeline`` and the rest know it once
``llava_ext`` is imported. Text comes in one of two forms. In training one ``IMAGE_INDEX`` stands for an image
and is replaced by its tokens (:mod:`llava_ext.splice`). A processor's text already has as many
``image_token_id`` as the image has tokens, and brings the pictures in ``pixel_values`` and their names in
``image_ids`` (:mod:`llava_ext.processor`); the towers then run here.

Training's loss is :mod:`llava_ext.loss`'s. Every submodule is called through its ``forward``, so that
ZeRO-3's hooks gather what is partitioned, and a batch without images runs the projectors on none, so that all
processes do the same and gradients are zeros, not missing (SPEC L10).
"""

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_ext.asked import split_questions
from llava_ext.config import ModelConfig
from llava_ext.decoding import drafts_from_words
from llava_ext.fusion import fuse, fused_length, widths
from llava_ext.images import names_of, split_pixels
from llava_ext.loss import spliced_loss
from llava_ext.model_config import RevelioLlavaConfig, TowerShape
from llava_ext.projector import Projector, token_raster
from llava_ext.splice import Side, Spliced, splice
from llava_ext.stages import Stage
from llava_ext.towers import Tower, load_towers, look, plain_transforms
from revelio.backbones.loading import dtype_of
from revelio.config import to_plain
from revelio.seeds import key_seed, lent
from revelio.wording import plural


class LlavaModel(PreTrainedModel, GenerationMixin):
    """Projectors and language model.

    Attributes:
        settings: what it was built from.
        shapes: of the towers' grids.
        towers: the frozen towers, no part of the module; loaded when pictures first come in.
        language_model: any causal language model, or a peft model around one.
        projectors: one a tower.
        language_changed: whether the language model's own weights differ from those it was named after.
        image_tokens: tokens an image.
    """

    config_class = RevelioLlavaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    # The Trainer hands over the number of labels of a whole (accumulated, all processes') batch.
    accepts_loss_kwargs = True

    def __init__(
        self,
        config: ModelConfig,
        language_model: PreTrainedModel,
        shapes: Sequence[TowerShape],
        *,
        seed: int = 0,
    ) -> None:
        """New projectors on a given language model; see :func:`llava_ext.language.build_model`.

        Args:
            config: of the model.
            language_model: in the number format wanted.
            shapes: one a tower, in the config's order.
            seed: of the projectors' weights.

        Raises:
            ValueError: a budget or the fusion can't be met.
        """
        entries = [{"channels": each.channels, "grid": list(each.grid)} for each in shapes]
        # In files that are saved: not where it lies on this machine.
        language_model.name_or_path = language_model.config._name_or_path = config.language_model
        # A copy: transformers writes its choice of attention into a model's config and those inside it.
        text_config = deepcopy(language_model.config)
        super().__init__(RevelioLlavaConfig(to_plain(config), entries, text_config))
        self.settings = config
        self.shapes = tuple(shapes)
        self.towers: tuple[Tower, ...] = ()
        self.language_changed = False
        self.set_language_model(language_model)
        rasters = [
            token_raster(tower, shape.grid)
            for tower, shape in zip(config.towers, self.shapes, strict=True)
        ]
        self.image_tokens = fused_length(config.fusion, [h * w for h, w in rasters])
        width = cast(nn.Embedding, language_model.get_input_embeddings()).embedding_dim
        self.projectors = nn.ModuleList(self._build_projectors(width, seed))

    def set_language_model(self, language_model: Any) -> None:
        """Take a language model: at the start, or the same one with adapters in it."""
        self.language_model = language_model
        self.generation_config = language_model.generation_config
        accepted = signature(innermost(language_model).forward).parameters
        self._takes_positions = "position_ids" in accepted

    def _build_projectors(self, width: int, seed: int) -> Iterator[Projector]:
        towers, dtype = self.settings.towers, dtype_of(self.settings.dtype)
        shares = widths(self.settings.fusion, len(towers), width)
        for place, (tower, shape) in enumerate(zip(towers, self.shapes, strict=True)):
            # Layers draw their first weights from the global state: put aside, keyed, put back.
            with lent(key_seed(seed, "projector", place)):
                projector = Projector(tower, shape.channels, shape.grid, shares[place])
            yield projector.to(dtype)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return cast(nn.Module, self.language_model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return cast(nn.Module, self.language_model.get_output_embeddings())

    @property
    def device(self) -> torch.device:
        """Where the projectors are."""
        return next(self.projectors.parameters()).device

    def load_towers(self, allow: Collection[str] = ()) -> None:
        """Load the towers that the config names, on the model's device.

        Args:
            allow: towers named ``module:function`` that may be imported: none, for a saved model may come
                from anywhere.

        Raises:
            KeyError: an unknown backbone or layer.
            ValueError: one that can't be loaded here, or may not be imported.
        """
        known = self.config.transforms
        self.towers = load_towers(self.settings, str(self.device), allow, known)
        self.config.transforms = plain_transforms(self.towers)

    def see(
        self,
        pixel_values: UInt8[Tensor, "i n"],
        image_ids: Int64[Tensor, "i 2"],
        image_questions: UInt8[Tensor, " q"] | None = None,
    ) -> list[Float[Tensor, "i c h w"]]:
        """The towers' grids of a processor's pictures, one tensor a tower.

        Raises:
            ValueError: a tower is prompted by the question, and there is not one a picture.
        """
        if not self.towers:
            self.load_towers()
        pixels = split_pixels(pixel_values.to(self.device), self.config.transforms)
        ids = names_of(image_ids)
        asked = None if image_questions is None else split_questions(image_questions)
        if asked is not None and len(asked) != len(ids):
            raise ValueError(
                f"{plural(len(asked), 'question')} about {plural(len(ids), 'picture')}: give one each"
            )
        pairs = zip(self.towers, pixels, strict=True)
        with torch.no_grad():
            return [look(tower, each, ids, asked) for tower, each in pairs]

    def image_embeddings(self, grids: Sequence[Float[Tensor, "i c h w"]]) -> Float[Tensor, "i T d"]:
        """Image tokens in the language model's width; no grids at all stand for no images.

        Raises:
            ValueError: not one tensor a tower.
        """
        given = grids or [torch.empty(0, shape.channels, *shape.grid) for shape in self.shapes]
        if len(given) != len(self.projectors):
            raise ValueError(
                f"{plural(len(given), 'grid')} but {plural(len(self.projectors), 'tower')}: give one a tower"
            )
        pairs = zip(self.projectors, given, strict=True)
        tokens = [projector(each.to(self.device)) for projector, each in pairs]
        return fuse(self.settings.fusion, tokens)

    def embed(
        self,
        input_ids: Int64[Tensor, "b l"],
        attention_mask: Int64[Tensor, "b l"],
        labels: Int64[Tensor, "b l"] | None = None,
        grids: Sequence[Float[Tensor, "i c h w"]] = (),
        *,
        padding_side: Side = "right",
        length: int | None = None,
    ) -> Spliced:
        """Text and images as one run of embeddings; see :func:`llava_ext.splice.splice`."""
        embedding = self.language_model.get_input_embeddings()
        text = embedding(input_ids.clamp_min(0))
        images = self.image_embeddings(grids).to(text.dtype)
        return splice(input_ids, attention_mask, labels, text, images, padding_side, length)

    def embed_expanded(
        self, input_ids: Int64[Tensor, "b L"], features: BaseModelOutputWithPooling | None = None
    ) -> Float[Tensor, "b L d"]:
        """Embeddings of a processor's text, whose images (:meth:`get_image_features`) have their full length.

        Raises:
            ValueError: there are not as many image tokens as the pictures have.
        """
        place = input_ids == self.config.image_token_id
        text = self.get_input_embeddings()(input_ids.masked_fill(place, 0))
        if features is None:
            return text
        images = torch.stack(tuple(cast(Any, features.pooler_output))).to(text)
        if int(place.sum()) != images.shape[0] * images.shape[1]:
            raise ValueError(
                f"the text has {plural(int(place.sum()), 'image token')}, the "
                f"{plural(len(images), 'picture has', 'pictures have')} {images.shape[0] * images.shape[1]}: "
                "make both by one call of the processor"
            )
        return text.masked_scatter(place[..., None], images)

    def get_image_features(
        self,
        pixel_values: UInt8[Tensor, "i n"],
        image_ids: Int64[Tensor, "i 2"] | None = None,
        image_questions: UInt8[Tensor, " q"] | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """What ``generate`` asks for once, before the first token: a processor's pictures as tokens.

        Returns:
            (T d) of each picture as ``pooler_output``.

        Raises:
            ValueError: the pictures come without their names.
        """
        if image_ids is None:
            raise ValueError(
                "pictures come with `image_ids`: give all that one call of the processor gives"
            )
        found = self.image_embeddings(self.see(pixel_values, image_ids, image_questions))
        return BaseModelOutputWithPooling(pooler_output=cast(Any, list(found)))

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The language model's own way, which passes pictures on in the first step only."""
        inner: Any = innermost(self.language_model)
        return inner.prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )

    def _supports_logits_to_keep(self) -> bool:
        return cast(Any, innermost(self.language_model))._supports_logits_to_keep()

    def _get_candidate_generator(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, input_ids: Tensor, model_kwargs: dict[str, Any], **tools: Any
    ) -> CandidateGenerator:
        """Let assistants and prompt lookup draft from the words alone, without the tokens of pictures."""
        make = cast(Any, innermost(self.language_model))._get_candidate_generator
        return drafts_from_words(make, self.config.image_token_id, input_ids, model_kwargs, **tools)

    def forward(
        self,
        input_ids: Int64[Tensor, "b l"] | None = None,
        attention_mask: Int64[Tensor, "b l"] | None = None,
        labels: Int64[Tensor, "b l"] | None = None,
        grids: Sequence[Float[Tensor, "i c h w"]] | None = None,
        *,
        length: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        pixel_values: UInt8[Tensor, "i n"] | None = None,
        image_ids: Int64[Tensor, "i 2"] | None = None,
        image_questions: UInt8[Tensor, " q"] | None = None,
        inputs_embeds: Float[Tensor, "b L d"] | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        position_ids: Int64[Tensor, "b L"] | None = None,
        **settings: Any,
    ) -> Any:
        """The loss of a batch, or without labels its logits.

        The text is training's where there are ``grids``, or labels and no pictures; else a processor's.

        Args:
            input_ids: IMAGE_INDEX stands for an image.
            attention_mask: 0 at padding, on either side.
            labels: per position, not shifted; IGNORE_INDEX where nothing is learnt.
            grids: one tensor a tower, images in the placeholders' reading order; () for none.
            length: of the longest sample with its images expanded, if the caller has counted it.
            num_items_in_batch: what to divide the summed loss by; None is the labels in this batch.
            pixel_values: a processor's pictures.
            image_ids: their names.
            image_questions: what each is asked; only towers whose prompt it is want it.
            inputs_embeds: instead of a processor's text.
            mm_encoder_outputs: ``image``, of :meth:`get_image_features`, in place of the pictures.
            position_ids: left out where the language model counts for itself.
            settings: of the language model's ``forward``: ``past_key_values``, ``use_cache``, ...

        Raises:
            ValueError: the number of placeholders is not the number of images.
        """
        own = pixel_values is not None or inputs_embeds is not None
        if grids is not None or not (own or labels is None):
            assert input_ids is not None and attention_mask is not None
            found = self.embed(input_ids, attention_mask, labels, grids or (), length=length)
            takes = self._takes_positions
            return spliced_loss(self.language_model, found, num_items_in_batch, positions=takes)
        if inputs_embeds is None:
            assert input_ids is not None
            features = (mm_encoder_outputs or {}).get("image")
            if pixel_values is not None:
                features = self.get_image_features(pixel_values, image_ids, image_questions)
            inputs_embeds = self.embed_expanded(input_ids, features)
        if self._takes_positions:
            settings["position_ids"] = position_ids
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **settings
        )

    def trainable(self, stage: Stage) -> None:
        """Choose what trains: projectors only, or with the language model (of a peft model its adapter)."""
        self.projectors.requires_grad_(True)
        adapted = [
            parameter
            for name, parameter in self.language_model.named_parameters()
            if "lora_" in name
        ]
        self.language_model.requires_grad_(stage == "finetune" and not adapted)
        self.language_changed |= stage == "finetune" and not adapted
        for parameter in adapted:
            parameter.requires_grad_(stage == "finetune")

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the model to a folder, without its processor; see :func:`llava_ext.checkpoint.save_model`.

        Raises:
            ValueError: the folder holds something else, or it is to be uploaded too.
        """
        from llava_ext.checkpoint import save_model

        if settings.get("push_to_hub"):
            raise ValueError("saving uploads nothing: call `push_to_hub(REPO)`")
        known = {name: settings[name] for name in ("language", "state") if name in settings}
        save_model(self, None, Path(save_directory), **known)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Upload the model, without its processor; see :func:`llava_ext.checkpoint.upload_model`."""
        from llava_ext.checkpoint import upload_model

        return upload_model(self, repo_id, **settings)

    @classmethod
    def from_pretrained(cls, path: str | Path, *_: Any, **settings: Any) -> "LlavaModel":  # pyright: ignore[reportIncompatibleMethodOverride]
        """A model from a folder or hub id; see :func:`llava_ext.checkpoint.load_model`."""
        from llava_ext.checkpoint import load_model

        return load_model(path, **settings)[0]

    @classmethod
    def _from_config(cls, config: Any, **settings: Any) -> "LlavaModel":
        raise ValueError(
            "a config alone holds no language model: make a new model with `llava_ext.language.build_model`, "
            "or read a saved one with `from_pretrained`"
        )

    def resize_token_embeddings(self, *arguments: Any, **settings: Any) -> Any:
        """Not to be had: what stands for an image lies beyond the vocabulary, and would lie in it.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the vocabulary is the language model's: resize that before the model is built around it"
        )

    def activation_checkpointing_enable(self, *arguments: Any, **settings: Any) -> None:
        """Pass through to the language model, which holds nearly all activations."""
        self.language_model.activation_checkpointing_enable(*arguments, **settings)

    def activation_checkpointing_disable(self) -> None:
        """Pass through to the language model."""
        self.language_model.activation_checkpointing_disable()


def innermost(model: PreTrainedModel) -> nn.Module:
    """The language model itself, out of any peft wrapper."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


AutoModelForImageTextToText.register(RevelioLlavaConfig, LlavaModel, exist_ok=True)
