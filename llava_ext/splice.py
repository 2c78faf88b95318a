"""Put image tokens where the text has placeholders: every IMAGE_INDEX becomes T rows of the image.

    text      a  IMG  b  pad          (l = 4)
    spliced   a  i0 i1 .. iT-1  b     (T + 2)

All samples at once by one gather: the source of each output position is found with a cumulative sum and
a search, so there is no loop over samples and no copy between host and device (the released code fills
a buffer on the CPU, sample by sample, SPEC 3.3).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX
from revelio.wording import plural

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Spliced:
    """What a language model takes in place of token ids.

    Attributes:
        embeddings: zeros where nothing is attended to.
        attention_mask: 1 at tokens, 0 at padding.
        labels: IGNORE_INDEX at images and padding; None where none were given.
        position_ids: 0, 1, ... from each sample's first token; 0 at padding.
    """

    embeddings: Float[Tensor, "b L d"]
    attention_mask: Int64[Tensor, "b L"]
    labels: Int64[Tensor, "b L"] | None
    position_ids: Int64[Tensor, "b L"]


def splice(
    input_ids: Int64[Tensor, "b l"],
    attention_mask: Int64[Tensor, "b l"],
    labels: Int64[Tensor, "b l"] | None,
    text: Float[Tensor, "b l d"],
    images: Float[Tensor, "i T d"],
    padding_side: Side = "right",
    length: int | None = None,
) -> Spliced:
    """Replace every placeholder by its image's tokens, and pad anew on ``padding_side``.

    Args:
        input_ids: IMAGE_INDEX stands for one image.
        attention_mask: 0 at padding, which may stand anywhere and is dropped.
        labels: per position; what stands at placeholders and padding doesn't matter.
        text: embeddings of ``input_ids``; the rows at placeholders and padding aren't used.
        images: in reading order of the placeholders, over the whole batch.
        padding_side: where shorter samples are filled up.
        length: L, if the caller has counted it (:func:`expanded_length` of the longest sample) and the
            placeholders; None counts both here, which for tensors on a GPU is a copy to the host.

    Raises:
        ValueError: the number of placeholders is not the number of images.
    """
    size = images.shape[1]
    attended = attention_mask.bool()
    is_image = (input_ids == IMAGE_INDEX) & attended
    spans = torch.where(is_image, size, 1) * attended
    long = _counted(is_image, spans, len(images)) if length is None else length
    place = _places(spans.sum(1, keepdim=True), long, padding_side)
    ends = spans.cumsum(1)
    mask = (place >= 0) & (place < ends[:, -1:])
    # The first input position whose span ends beyond this place; padding has no span and is passed over.
    source = torch.searchsorted(ends, place, right=True).clamp_max(input_ids.shape[1] - 1)
    from_image = is_image.gather(1, source) & mask
    inside = place - (ends - spans).gather(1, source)
    order = (is_image.flatten().cumsum(0) - 1).view_as(is_image).gather(1, source)
    # Rows of [text, images, one of zeros].
    first_image, zeros = input_ids.numel(), input_ids.numel() + len(images) * size
    offset = torch.arange(len(input_ids), device=input_ids.device)[:, None] * input_ids.shape[1]
    index = torch.where(from_image, first_image + order * size + inside, offset + source)
    index = torch.where(mask, index, zeros)
    rows = torch.cat([text.flatten(0, 1), images.flatten(0, 1), text.new_zeros(1, text.shape[-1])])
    found = None
    if labels is not None:
        found = torch.where(mask & ~from_image, labels.gather(1, source), IGNORE_INDEX)
    embeddings = rows.index_select(0, index.flatten()).view(*index.shape, -1)
    return Spliced(embeddings, mask.long(), found, place * mask)


def _counted(is_image: Tensor, spans: Tensor, images: int) -> int:
    """The longest sample's length, after counting the placeholders; one copy to the host."""
    placeholders, longest = torch.stack([is_image.sum(), spans.sum(1).max()]).tolist()
    if placeholders != images:
        raise ValueError(
            f"the batch has {plural(placeholders, 'image placeholder')} but "
            f"{plural(images, 'image was', 'images were')} given: give one for each placeholder"
        )
    return int(longest)


def _places(totals: Int64[Tensor, "b 1"], length: int, side: Side) -> Int64[Tensor, "b L"]:
    """Each output position, counted from its sample's first token; negative before it."""
    place = torch.arange(length, device=totals.device).repeat(len(totals), 1)
    return place - (length - totals) if side == "left" else place


def expanded_length(input_ids: Sequence[int], tokens_per_image: int) -> int:
    """Tokens of a sample after its placeholders are replaced."""
    images = sum(index == IMAGE_INDEX for index in input_ids)
    return len(input_ids) + images * (tokens_per_image - 1)


@contextmanager
def rows_only(head: nn.Module, rows: Int64[Tensor, " n"]) -> Iterator[None]:
    """Let the vocabulary head see only ``rows`` of all positions; whatever follows it stays as it is."""

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = arguments
        return (hidden.flatten(0, -2)[rows][None], *rest)

    handle = head.register_forward_pre_hook(select, prepend=True)
    try:
        yield
    finally:
        handle.remove()
