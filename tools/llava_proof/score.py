"""Which held-out questions a model answers word for word, and what a linear probe reads off the same tokens.

An answer is right if the greedy answer is the reference with its closing tag. That is so if and only if
every token of the reference is the most probable one after the true tokens before it, so one pass over
question and answer tells it, without generating.
"""

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llava_ext.config import IGNORE_INDEX
from llava_ext.dataset import Collator, ConversationDataset
from llava_ext.model import LlavaModel, innermost
from llava_ext.tower_cache import CachedGrids
from revelio.probes.linear import linear_probe
from revelio.stats import paired, rounded, trainings95
from tools.llava_proof.questions import KINDS, Photos, Question

BATCH = 16
STRENGTHS = (1e-3, 1e-2, 1e-1)


@torch.no_grad()
def right_answers(model: LlavaModel, dataset: ConversationDataset) -> Iterator[dict[str, bool]]:
    """Whether the greedy answer to each sample is its reference, by the sample's id, a batch at a time."""
    collate = Collator(model.image_tokens, pad_id=0, stack=dataset.images.stack)
    order = sorted(range(len(dataset)), key=lambda i: dataset.lengths[i])
    for start in range(0, len(order), BATCH):
        samples = [dataset[i] for i in order[start : start + BATCH]]
        batch = collate(samples)
        wrong = wrong_tokens(model, batch)
        yield {
            sample["id"]: not missed for sample, missed in zip(samples, wrong.tolist(), strict=True)
        }


def wrong_tokens(model: LlavaModel, batch: dict[str, Any]) -> Tensor:
    """``(b,)``: how many learnt tokens are not the most probable one after those before them."""
    found = model.embed(
        batch["input_ids"], batch["attention_mask"], batch["labels"], batch["grids"]
    )
    language_model: Any = innermost(cast(Any, model.language_model))  # out of an adapter's wrapper
    hidden = language_model.base_model(
        inputs_embeds=found.embeddings,
        attention_mask=found.attention_mask,
        position_ids=found.position_ids,
        use_cache=False,
    ).last_hidden_state
    assert found.labels is not None
    targets = found.labels[:, 1:]
    row, place = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    best = model.language_model.get_output_embeddings()(hidden[row, place]).argmax(-1)
    missed = torch.zeros(len(targets), dtype=torch.int64)
    return missed.index_add_(0, row, (best != targets[row, place]).long())


def probe(
    images: CachedGrids, train: Photos, test: Photos, seed: int = 0
) -> tuple[list[bool], float]:
    """What a linear probe reads off the very tokens that a row's projectors get.

    Returns:
        Which test photographs it is right on, and the strength that it chose on a part of the training ones.
    """

    def rows(photos: Photos) -> np.ndarray:
        found = [
            torch.cat([grid.float().flatten() for grid in images.get(f)]) for f in photos.files
        ]
        return torch.stack(found).numpy()

    labels = [np.array(photos.labels) for photos in (train, test)]
    found = linear_probe(
        rows(train), labels[0], rows(test), labels[1], strengths=STRENGTHS, seed=seed
    )
    right = [bool(one == label) for one, label in zip(found.predicted, test.labels, strict=True)]
    return right, found.setting


def by_kind(questions: Sequence[Question], right: dict[str, bool]) -> dict[str, list[bool]]:
    """Which questions of each kind were answered rightly, in the questions' order."""
    return {
        kind: [right[q.question_id] for q in questions if q.category == kind]
        for kind in KINDS
        if any(q.category == kind and q.question_id in right for q in questions)
    }


def accuracy(trainings: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """The accuracy that trainings reach on average, with its 95 % interval over trainings and questions."""
    each = [sum(one) / len(one) for one in trainings]
    of = len(trainings[0])
    return rounded(mean(each), trainings95(each, of)) | {
        "of": of,
        "trainings": [round(one, 4) for one in each],
    }


def difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """How much oftener ``ours`` is right on the same questions, paired over trainings and questions."""
    found = paired(np.array(ours), np.array(theirs))
    return rounded(found.value, found.interval) | {"trainings": found.trainings}
