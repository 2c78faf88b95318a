"""The trained model: projectors and a causal language model. The frozen towers stay outside.

    grids of each tower (i c h w) -> projector -> fuse -> (i T d) -> spliced into the text -> language model

Loss: the language model's own, but logits are computed only where a label stands: with a vocabulary of
49,152 the head is a good part of a small model's time and memory. Every submodule is called through its
``forward``, so that ZeRO-3's hooks gather what is partitioned, and a batch without images runs the
projectors on none, so that all processes do the same and gradients are zeros, not missing (SPEC L10).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from llava_ext.config import IGNORE_INDEX, ModelConfig, Stage
from llava_ext.fusion import fuse, fused_length, widths
from llava_ext.projector import Projector, token_raster
from llava_ext.splice import Side, Spliced, splice
from revelio.backbones.loading import dtype_of
from revelio.seeds import key_seed


@dataclass(frozen=True)
class TowerShape:
    """What the model needs to know of a tower: its grid's channels, and height and width."""

    channels: int
    grid: tuple[int, int]


@dataclass
class Output(ModelOutput):
    """What :meth:`LlavaModel.forward` gives: the loss where labels were given, else all logits."""

    loss: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "b L v"] | None = None


class LlavaModel(nn.Module):
    """Projectors and language model.

    Attributes:
        settings: what it was built from.
        shapes: of the towers' grids.
        language_model: any causal language model, or a peft model around one.
        projectors: one a tower.
        language_changed: whether the language model's own weights differ from those it was named after.
        image_tokens: tokens an image.
        config: the language model's, for the Trainer and DeepSpeed (``hidden_size``).
    """

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
        super().__init__()
        self.settings = config
        self.shapes = tuple(shapes)
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
        self.config = language_model.config
        accepted = signature(_innermost(language_model).forward).parameters
        self._takes_positions = "position_ids" in accepted

    def _build_projectors(self, width: int, seed: int) -> Iterator[Projector]:
        towers, dtype = self.settings.towers, dtype_of(self.settings.dtype)
        shares = widths(self.settings.fusion, len(towers), width)
        for place, (tower, shape) in enumerate(zip(towers, self.shapes, strict=True)):
            # Layers draw their first weights from the global state: put aside, keyed, put back.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key_seed(seed, "projector", place))
                projector = Projector(tower, shape.channels, shape.grid, shares[place])
            yield projector.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the projectors are."""
        return next(self.projectors.parameters()).device

    def image_embeddings(self, grids: Sequence[Float[Tensor, "i c h w"]]) -> Float[Tensor, "i T d"]:
        """Image tokens in the language model's width; no grids at all stand for no images.

        Raises:
            ValueError: not one tensor a tower.
        """
        given = grids or [torch.empty(0, shape.channels, *shape.grid) for shape in self.shapes]
        if len(given) != len(self.projectors):
            raise ValueError(
                f"{len(given)} grids but {len(self.projectors)} towers: give one a tower"
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

    def forward(
        self,
        input_ids: Int64[Tensor, "b l"],
        attention_mask: Int64[Tensor, "b l"],
        labels: Int64[Tensor, "b l"] | None = None,
        grids: Sequence[Float[Tensor, "i c h w"]] = (),
        *,
        length: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Output:
        """The loss of a batch, or without labels its logits.

        Args:
            input_ids: IMAGE_INDEX stands for an image.
            attention_mask: 0 at padding, on either side.
            labels: per position, not shifted; IGNORE_INDEX where nothing is learnt.
            grids: one tensor a tower, images in the placeholders' reading order; () for none.
            length: of the longest sample with its images expanded, if the caller has counted it.
            num_items_in_batch: what to divide the summed loss by; None is the labels in this batch.

        Raises:
            ValueError: the number of placeholders is not the number of images.
        """
        found = self.embed(input_ids, attention_mask, labels, grids, length=length)
        inputs: dict[str, Any] = {
            "inputs_embeds": found.embeddings,
            "attention_mask": found.attention_mask,
            "use_cache": False,
        }
        if self._takes_positions:
            inputs["position_ids"] = found.position_ids
        if found.labels is None:
            return Output(logits=self.language_model(**inputs).logits)
        targets = nn.functional.pad(found.labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        rows = (targets != IGNORE_INDEX).nonzero().flatten()
        head = cast(nn.Module, self.language_model.get_output_embeddings())
        with _rows_only(head, rows):
            logits = self.language_model(**inputs).logits.flatten(0, -2)
        total = cross_entropy(logits.float(), targets[rows], reduction="sum")
        if num_items_in_batch is None:
            return Output(loss=total / max(len(rows), 1))
        return Output(loss=total / num_items_in_batch)

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

    def save_pretrained(self, path: Path, tokenizer: Any, **settings: Any) -> None:
        """Write the model to a folder; see :func:`llava_ext.checkpoint.save_model`."""
        from llava_ext.checkpoint import save_model

        save_model(self, tokenizer, path, **settings)

    @staticmethod
    def from_pretrained(path: str | Path, **settings: Any) -> "tuple[LlavaModel, Any]":
        """Model and tokenizer from a folder or hub id; see :func:`llava_ext.checkpoint.load_model`."""
        from llava_ext.checkpoint import load_model

        return load_model(path, **settings)

    def activation_checkpointing_enable(self, *arguments: Any, **settings: Any) -> None:
        """Pass through to the language model, which holds nearly all activations."""
        self.language_model.activation_checkpointing_enable(*arguments, **settings)

    def activation_checkpointing_disable(self) -> None:
        """Pass through to the language model."""
        self.language_model.activation_checkpointing_disable()


@contextmanager
def _rows_only(head: nn.Module, rows: Int64[Tensor, " n"]) -> Iterator[None]:
    """Let the vocabulary head see only ``rows`` of all positions; whatever follows it stays as it is."""

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = arguments
        return (hidden.flatten(0, -2)[rows][None], *rest)

    handle = head.register_forward_pre_hook(select, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _innermost(model: PreTrainedModel) -> nn.Module:
    """The language model itself, out of any peft wrapper."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model
