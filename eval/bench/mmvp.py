"""MMVP (Tong et al., arXiv 2401.06209): pairs of pictures that CLIP takes for alike, told apart or not.

    Questions.csv    Index, Question, Options "(a) Open (b) Closed", Correct Answer "(a)"
    MMVP Images/     1.jpg ... 300.jpg

Questions 1 and 2 are a pair, 3 and 4, ...: 150 in all. Credit is for a pair whose both answers are right, so
that chance is a quarter for two choices. A question is asked as by MMVP's own script. An answer that is a
choice and nothing else (letter, text, or both) is compared with the key; of any other a judge says yes
or no, by the prompts of MMVP's own grader, which asks about every answer.
Beside the score stands the share of pairs in which both pictures got one choice: what can't tell the pictures
apart gives that everywhere, and scores 0.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.bench.files import Question
from revelio.endpoint import Settings, ask_all
from revelio.reply_cache import Reply, ReplyCache
from revelio.stats import proportion
from revelio.thinking import without_thinking
from revelio.trust import printable, read_csv
from revelio.wording import plural

QUESTIONS, PICTURES = "Questions.csv", "MMVP Images"
COLUMNS = ("Index", "Question", "Options", "Correct Answer")
LETTER = re.compile(r"\(([a-z])\)", re.I)
INDEX = re.compile(r"[0-9]{1,9}")
SYSTEM = (
    "You are a helpful and precise assistant for checking the quality of the answer. "
    "Please answer in only yes or no."
)


@dataclass(frozen=True)
class Item:
    """A question with its choices.

    Attributes:
        question: as it is asked of the model; its image is named as in the folder.
        options: texts by letter.
        key: the letter of the right one.
    """

    question: Question
    options: Mapping[str, str]
    key: str


def read_items(bench: Path) -> list[Item]:
    """The questions of a folder, in pairs one behind the other.

    Raises:
        ValueError: there are none, their number is odd, or a row is no such question; names the row.
    """
    path = bench / QUESTIONS
    if not path.is_file():
        raise ValueError(f"{bench} holds no {QUESTIONS}: give MMVP's folder")
    items = [_item(row, path) for row in read_csv(path)]
    if not items or len(items) % 2:
        raise ValueError(f"{path} holds {plural(len(items), 'question')}: they must be pairs")
    if len({item.question.id for item in items}) < len(items):
        raise ValueError(f"{path} has an Index twice")
    return items


def _item(row: Mapping[str, str], path: Path) -> Item:
    lacking = [name for name in COLUMNS if name not in row]
    if lacking:
        raise ValueError(f"{path} lacks the column {lacking[0]}")
    _, *parts = LETTER.split(row["Options"])
    options = dict(zip(map(str.lower, parts[::2]), map(str.strip, parts[1::2]), strict=True))
    key = row["Correct Answer"].strip(" ()").lower()
    if not INDEX.fullmatch(row["Index"]) or len(options) < 2 or key not in options:
        raise ValueError(
            f"{path}: question {printable(row['Index'])} has the options {printable(row['Options'])} and the "
            f"answer {printable(row['Correct Answer'])}: they must be as `(a) Open (b) Closed` and `(a)`"
        )
    text = f"{row['Question']} {row['Options']}"
    image = f"{PICTURES}/{row['Index']}.jpg"
    return Item(Question(int(row["Index"]), image, text, "mmvp"), options, key)


def parse_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of an answer that is a choice and nothing else; None for any other."""
    said = _plain(answer)
    for letter, text in options.items():
        if said in (letter, f"({letter})", f"{letter})", _plain(text)) or said in (
            f"({letter}) {_plain(text)}",
            f"{letter}) {_plain(text)}",
        ):
            return letter
    return None


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" \t\n.,:;!\"'*").split())


def judge_body(item: Item, answer: str, model: str) -> dict[str, Any]:
    """The chat completion by which a judge grades an answer, in the words of MMVP's own grader."""
    message = (
        f"Given the following question {item.question.text}, the correct answer is ({item.key}). "
        f"Does the following answer correctly answers the question, answer:{answer}?"
    )
    roles = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": message})
    return {"model": model, "messages": list(roles), "temperature": 0.0}


def read_verdict(reply: str) -> bool | None:
    """A judge's yes or no; None where it said neither first."""
    match = re.match(r"\W*(yes|no)\b", without_thinking(reply), re.I)
    return None if match is None else match[1].lower() == "yes"


def judge_all(bodies: Sequence[Mapping[str, Any]], settings: Settings, cache: ReplyCache) -> None:
    """Ask for what the cache lacks.

    Raises:
        ValueError: a question got no reply; what came is kept, and the next run goes on.
    """
    entries = [judge_entry(body, settings) for body in bodies]
    left = [number for number, entry in enumerate(entries) if cache.get(entry) is None]

    def keep(place: int, reply: Reply) -> None:
        cache.put(entries[left[place]], reply)

    outcome = ask_all([bodies[number] for number in left], settings, keep) if left else None
    if outcome and (outcome.down or outcome.unanswered):
        why = outcome.down or next(iter(outcome.unanswered.values()))
        raise ValueError(
            f"the judge gave no reply to {len(outcome.unanswered)} of {plural(len(left), 'question')} "
            f"({why}): run the same command again to go on"
        )


def judge_entry(body: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What the cache knows a request by."""
    return {"body": dict(body), "base_url": settings.base_url or ""}


def score(
    items: Sequence[Item], choices: Sequence[str | None], judged: Mapping[int, bool | None]
) -> dict[str, Any]:
    """The scores of one model.

    Args:
        items: the questions, pairs one behind the other.
        choices: the choice of each answer, where it is one.
        judged: the judge's verdict of others, by place.
    """
    pairs = list(zip(items, choices, strict=True))
    right = [choice == item.key for item, choice in pairs]
    for place, verdict in judged.items():
        right[place] = bool(verdict)
    both = [one and two for one, two in zip(right[::2], right[1::2], strict=True)]
    chosen = list(zip(choices[::2], choices[1::2], strict=True))
    same = sum(one == two for one, two in chosen if None not in (one, two))
    unread = [place for place, choice in enumerate(choices) if choice is None]
    return {
        "pairs": proportion(sum(both), len(both)),
        "questions": proportion(sum(right), len(right)),
        "chance": round(
            sum(
                1 / (len(one.options) * len(two.options))
                for one, two in zip(items[::2], items[1::2], strict=True)
            )
            / len(both),
            4,
        ),
        "one choice for both pictures": proportion(same, len(both)),
        "judged": sum(verdict is not None for verdict in judged.values()),
        "neither a choice nor judged": sum(judged.get(place) is None for place in unread),
    }
