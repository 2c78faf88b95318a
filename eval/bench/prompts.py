"""What the judge is asked: one system line, one user message of five blocks.

    [Context] captions - [Question] - [Assistant 1] answer - [Assistant 2] answer - [System] the rule

As published, assistant 1 is always the reference. A judge favours a seat, so that by default each pair is
shown in both orders, and the scores are put back to (reference, model).

One deviation in every mode: versions of LLaVA's script that join a caption which is one text spell it out a
letter a line. Here such a caption stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eval.bench.files import (
    CATEGORY_PREFIX,
    Answer,
    Question,
    read_answers,
    read_contexts,
    read_questions,
    read_rules,
)

Order = Literal["reference_first", "model_first"]
Mode = Literal["fixed", "as_paper"]
ORDERS: dict[Mode, tuple[Order, ...]] = {
    "fixed": ("reference_first", "model_first"),
    "as_paper": ("reference_first",),
}

# LLaVA's published system line: part of the protocol, so that scores can be compared.
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."

# Used when a bench folder brings no rule file of its own.
DEFAULT_RULE = {
    "role": "Assistant",
    "prompt": (
        "Two assistants answered the question above about an image. You can't see the image; the "
        "context describes it.\n"
        "Judge how helpful, relevant, accurate and detailed each answer is, and give each an overall "
        "score from 1 (useless) to 10 (excellent).\n"
        "Your first line must hold only the two scores, of Assistant 1 and then of Assistant 2, "
        "separated by a space.\n"
        "From the second line on, explain the scores. The order in which the answers are shown must "
        "not influence you."
    ),
}


@dataclass(frozen=True)
class Request:
    """One question with both answers in one order, ready for the judge."""

    question: Question
    reference: Answer
    model: Answer
    order: Order
    message: str

    @property
    def name(self) -> str:
        """How a message calls this record."""
        return f"question {self.question.id} ({self.order.replace('_', ' ')})"


def read_requests(bench: Path, answers: Path, reference: Path, mode: Mode) -> list[Request]:
    """Every question of the bench in every order of ``mode``, from its files.

    Raises:
        ValueError: a file is missing or wrong, or two of them do not match; names the ids.
    """
    questions = read_questions(bench)
    contexts, rules = read_contexts(bench), read_rules(bench)
    pairs = zip(read_answers(reference, questions), read_answers(answers, questions), strict=True)
    requests = []
    for question, (theirs, ours) in zip(questions, pairs, strict=True):
        if question.image not in contexts:
            raise ValueError(f"context.jsonl has no {question.image}, of question {question.id}")
        rule = _rule(question, rules, bench)
        for order in ORDERS[mode]:
            texts = (
                (theirs.text, ours.text) if order == "reference_first" else (ours.text, theirs.text)
            )
            message = user_message(contexts[question.image], question.text, texts, rule)
            requests.append(Request(question, theirs, ours, order, message))
    return requests


def _rule(question: Question, rules: Mapping | None, bench: Path) -> Mapping[str, str]:
    if rules is None:
        return DEFAULT_RULE
    name = CATEGORY_PREFIX + question.category
    if not isinstance(rules.get(name), dict) or "prompt" not in rules[name]:
        raise ValueError(
            f"{bench / 'rule.json'} has no `{name}` with a `prompt`, which question {question.id} needs"
        )
    return rules[name]


def user_message(
    context: str, question: str, answers: Sequence[str], rule: Mapping[str, str]
) -> str:
    """The judge's user message: context, question, answer 1, answer 2, rule."""
    role = rule.get("role", "Assistant")
    blocks = [f"[Context]\n{context}", f"[Question]\n{question}"]
    for seat, answer in enumerate(answers, start=1):
        blocks.append(f"[{role} {seat}]\n{answer}\n\n[End of {role} {seat}]")
    blocks.append(f"[System]\n{rule['prompt']}")
    return "".join(f"{block}\n\n" for block in blocks)


def put_back(order: Order, scores: tuple[float, float]) -> tuple[float, float]:
    """Scores in the order shown -> (reference, model)."""
    return scores if order == "reference_first" else (scores[1], scores[0])
