"""LLaVA-Bench's files: one JSON object a line, matched by question id and never by position.

questions.jsonl      question_id, image, text, category (conv, detail, complex)
context.jsonl        image, caption: a text, or a list of texts that are joined by newlines
answers_gpt4.jsonl   question_id, text, answer_id, model_id: the reference
rule.json            what the judge is asked to do, by `llava_bench_<category>`
images/              001.jpg ...
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.trust import leads_out, parse_json, printable, read_json, read_text
from revelio.wording import plural

CATEGORY_PREFIX = "llava_bench_"
REFERENCE_FILE = "answers_gpt4.jsonl"
MADE = ("answers", "reviews")  # what names of files say that they hold
NAMED_IDS = 8  # ids that a message names before it says "and n more"


@dataclass(frozen=True)
class Question:
    """One question about one image of the bench."""

    id: int | str
    image: str
    text: str
    category: str


@dataclass(frozen=True)
class Answer:
    """One assistant's answer to one question."""

    question_id: int | str
    text: str
    answer_id: str
    model_id: str


def made_of(path: Path, what: str, suffix: str = ".jsonl") -> Path:
    """A name beside a file for what is made of it: ``a/answers.jsonl`` -> ``a/reviews.jsonl``."""
    made = next((word for word in MADE if word in path.stem), None)
    stem = path.stem.replace(made, what) if made else f"{path.stem}-{what}"
    return path.with_name(f"{stem}{suffix}")


def read_lines(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; blank lines are passed over.

    Args:
        path: the file.
        needed: keys that every object must have.

    Raises:
        ValueError: there is no such file, or lines are no objects or lack a key; names the lines.
    """
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        try:
            if line.strip():
                found.append(_object(line, f"line {number}", needed))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        more = (
            f"; and {plural(len(wrong) - NAMED_IDS, 'more line')}" if len(wrong) > NAMED_IDS else ""
        )
        raise ValueError(f"{printable(path)} {'; '.join(wrong[:NAMED_IDS])}{more}")
    return found


def _object(line: str, where: str, needed: Sequence[str]) -> dict[str, Any]:
    value = parse_json(line, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, not {type(value).__name__}")
    missing = [key for key in needed if key not in value]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: it has {', '.join(value)}")
    for key in ("question_id", "image", "text", "category", "answer_id", "model_id", "order"):
        if isinstance(value.get(key), dict | list | bool | float):
            raise ValueError(f"{where}: `{key}` is {value[key]!r}, no text")
    return value


def read_questions(bench: Path) -> list[Question]:
    """The questions of a bench folder, in the file's order.

    Raises:
        ValueError: the folder or file is wrong, or an id stands twice.
    """
    path = bench / "questions.jsonl"
    if not path.is_file():
        raise ValueError(f"{bench} holds no questions.jsonl: give a LLaVA-Bench folder")
    rows = read_lines(path, ("question_id", "image", "text", "category"))
    _check_unique([row["question_id"] for row in rows], path)
    if out := [row for row in rows if leads_out(row["image"])]:
        raise ValueError(
            f"{printable(path)}: the image of question {printable(out[0]['question_id'])} is "
            f"{printable(repr(out[0]['image']))}, no file of the folder of images"
        )
    return [
        Question(
            row["question_id"],
            str(row["image"]),
            str(row["text"]),
            str(row["category"]).removeprefix(CATEGORY_PREFIX),
        )
        for row in rows
    ]


def read_contexts(bench: Path) -> dict[str, str]:
    """The human-written description of each image, by image name.

    Raises:
        ValueError: a line is broken, or a caption is neither a text nor a list of them.
    """
    path, found = bench / "context.jsonl", {}
    for row in read_lines(path, ("image", "caption")):
        caption = row["caption"]
        texts = [caption] if isinstance(caption, str) else caption
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{printable(path)}: the caption of {row['image']} is no text")
        found[row["image"]] = "\n".join(texts)
    return found


def read_rules(bench: Path) -> dict[str, dict[str, str]] | None:
    """The bench's own rules by name, or None when the folder has no rule file."""
    path = bench / "rule.json"
    if not path.is_file():
        return None
    rules = read_json(path)
    if not isinstance(rules, dict):
        raise ValueError(f"{path} must hold an object of rules by name")
    return rules


def read_answers(path: Path, questions: Sequence[Question]) -> list[Answer]:
    """The answers of ``path`` in the order of ``questions``, matched by question id.

    Raises:
        ValueError: an id stands twice, is no question's, or a question has no answer; names the ids.
    """
    rows = read_lines(path, ("question_id", "text"))
    found = {str(row["question_id"]): row for row in rows}
    _check_unique([row["question_id"] for row in rows], path)
    match_ids([question.id for question in questions], found, "the questions", str(path))
    return [_answer(found[str(question.id)], path) for question in questions]


def _answer(row: Mapping[str, Any], path: Path) -> Answer:
    if not isinstance(row["text"], str):
        raise ValueError(f"{path}: the answer to question {row['question_id']} is no text")
    return Answer(
        question_id=row["question_id"],
        text=row["text"],
        answer_id=str(row.get("answer_id", row["question_id"])),
        model_id=str(row.get("model_id", path.stem)),
    )


def match_ids(
    wanted: Iterable[int | str], found: Iterable[int | str], whose: str, other: str
) -> None:
    """Check that two files are about the same questions.

    Raises:
        ValueError: they are not; one line that names the ids on both sides.
    """
    left, right = [str(one) for one in wanted], [str(one) for one in found]
    missing = [one for one in left if one not in set(right)]
    unknown = [one for one in right if one not in set(left)]
    parts = []
    if missing:
        parts.append(f"it lacks {name_ids(missing)}")
    if unknown:
        parts.append(f"it has {name_ids(unknown)}, not in {whose}")
    if parts:
        raise ValueError(f"{other} does not match {whose}: {'; '.join(parts)}")


def name_ids(ids: Sequence[int | str]) -> str:
    """``question 3`` or ``questions 3, 5 and 12 more``."""
    named = ", ".join(map(str, ids[:NAMED_IDS]))
    more = f" and {len(ids) - NAMED_IDS} more" if len(ids) > NAMED_IDS else ""
    return f"question{'s' if len(ids) > 1 else ''} {named}{more}"


def _check_unique(ids: Sequence[int | str], path: Path) -> None:
    seen: set[str] = set()
    twice = [one for one in map(str, ids) if one in seen or seen.add(one)]
    if twice:
        raise ValueError(f"{path} holds {name_ids(sorted(set(twice)))} more than once")
