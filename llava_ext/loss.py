"""Training's loss of a spliced batch: the language model's own, computed only where a label stands.

With a vocabulary of 49,152 the head is a good part of a small model's time and memory.
"""

from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers.utils.generic import ModelOutput

from llava_ext.config import IGNORE_INDEX
from llava_ext.splice import Spliced, rows_only


@dataclass
class Output(ModelOutput):
    """The loss where labels were given, else all logits."""

    loss: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "b L v"] | None = None


def spliced_loss(
    language_model: Any,
    found: Spliced,
    num_items_in_batch: Tensor | int | None = None,
    *,
    positions: bool = True,
) -> Output:
    """The loss of a batch, or without labels its logits.

    Args:
        language_model: takes embeddings.
        found: the batch.
        num_items_in_batch: what to divide the summed loss by; None is the labels in this batch.
        positions: whether the language model takes position ids; else it counts for itself.
    """
    inputs: dict[str, Any] = {
        "inputs_embeds": found.embeddings,
        "attention_mask": found.attention_mask,
        "use_cache": False,
    }
    if positions:
        inputs["position_ids"] = found.position_ids
    if found.labels is None:
        return Output(logits=language_model(**inputs).logits)
    targets = pad(found.labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    rows = (targets != IGNORE_INDEX).nonzero().flatten()
    head = cast(nn.Module, language_model.get_output_embeddings())
    with rows_only(head, rows):
        logits = language_model(**inputs).logits.flatten(0, -2)
    total = cross_entropy(logits.float(), targets[rows], reduction="sum")
    if num_items_in_batch is None:
        return Output(loss=total / max(len(rows), 1))
    return Output(loss=total / num_items_in_batch)
