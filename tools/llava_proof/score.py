"""Which held-out questions a model answers word for word, and how often it does blind.

An answer is right if the greedy answer is the reference with its closing tag. That is so if and only if
every token of the reference is the most probable one after the true tokens before it, so one pass over
question and answer tells it, without generating.
"""

from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from llava_ext.config import IGNORE_INDEX
from llava_ext.dataset import Collator, ConversationDataset
from llava_ext.model import LlavaModel
from revelio.stats import mean95, proportion, rounded
from tools.llava_proof.questions import KINDS, Question

BATCH = 16


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
    hidden = model.language_model.base_model(
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


def accuracies(questions: Sequence[Question], right: dict[str, bool]) -> dict[str, Any]:
    """Accuracy with its Wilson interval and chance, over all questions and by kind."""
    groups = {"all": list(questions)} | {
        kind: [q for q in questions if q.category == kind] for kind in KINDS
    }
    return {
        name: interval(sum(right[q.question_id] for q in group), len(group))
        | {"chance": round(sum(q.chance for q in group) / len(group), 4)}
        for name, group in groups.items()
    }


def interval(right: int, of: int) -> dict[str, float | int]:
    """A share with its 95 % Wilson interval.

    Args:
        right: how many were right.
        of: out of how many.
    """
    return {
        **proportion(right, of),
        "of": of,
    }


def gain(first: dict[str, bool], second: dict[str, bool]) -> dict[str, float]:
    """How much oftener ``first`` is right than ``second`` on the same questions, with its 95 % interval.

    The questions are paired: the standard error is that of the mean of their differences.

    Raises:
        ValueError: the questions differ.
    """
    if set(first) != set(second):
        raise ValueError("the two models were asked different questions: score them anew")
    gains = [float(first[name]) - float(second[name]) for name in first]
    return rounded(mean(gains), mean95(gains))
