"""A model's answers to the bench's questions, in LLaVA's answers.jsonl form, resumable by question id.

The file is rewritten whole, under a temporary name, after every batch: a run that is killed leaves the
answers so far, and the next one goes on behind them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eval.bench.files import Question, name_ids, read_lines
from eval.bench.judge import write_lines
from llava_ext.config import Decoding
from revelio.data.contents import combined, digest_of
from revelio.data.dataset import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

ID_LENGTH = 22  # as long as the ids in LLaVA's own files
_OF_AN_ANSWER = ("question_id", "prompt", "text", "model_id")


class Answerer(Protocol):
    """What is needed of a model: `llava_ext.generate.Assistant` is one."""

    def answer(
        self,
        prompts: Sequence[str],
        images: "Sequence[Sequence[Image]]",
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """One answer a prompt, each about its own images."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asking(Decoding):
    """How the model is asked: recorded with each answer, and the same throughout a file."""

    model_id: str
    weights: str | None = None
    """A hash of the model's files, so that another model in the same place is noticed; none: not compared."""

    def metadata(self) -> dict[str, Any]:
        """What is noted with each answer."""
        return self.decoding() | ({} if self.weights is None else {"weights": self.weights})


def weights_of(model: str) -> str | None:
    """A hash of the files of a finished model's folder; None for one on a hub."""
    folder = Path(model)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [f"{path.relative_to(folder)}:{digest_of(path)}" for path in files]
    return combined(names) if names else None


def answer_id(row: Mapping[str, Any]) -> str:
    """An id from what the answer is: the same answer has the same id wherever it is made."""
    content = [row["model_id"], row["question_id"], row["prompt"], row["text"], row["metadata"]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()[:ID_LENGTH]


def read_finished(path: Path, questions: Sequence[Question], asking: Asking) -> dict[str, dict]:
    """The answers that are in ``path`` already, by question id as text.

    Raises:
        ValueError: they are another model's, other settings' or other questions'; names the record.
    """
    if not path.exists():
        return {}
    asked = {str(question.id): question for question in questions}
    finished = {}
    for row in read_lines(path, _OF_AN_ANSWER):
        key = str(row["question_id"])
        if key not in asked:
            raise ValueError(
                f"{path} answers question {key}, unknown to the bench: choose another output file"
            )
        now = {
            "model_id": asking.model_id,
            "metadata": asking.metadata(),
            "prompt": asked[key].text,
        }
        noted = row.get("metadata")
        if isinstance(noted, dict) and "weights" not in noted:  # of an earlier version
            now["metadata"] = asking.decoding()
        for field, value in now.items():
            if row.get(field) != value:
                raise ValueError(
                    f"{path} answers question {key} with {field} {row.get(field)!r}, not {value!r}: "
                    "go on with the same settings, or choose another output file"
                )
        finished[key] = row
    if not finished:
        raise ValueError(f"{path} holds no answers: choose another output file")
    return finished


def check_images(questions: Sequence[Question], folder: Path) -> None:
    """Check that every image is there before a model is loaded.

    Raises:
        ValueError: some are not; names the questions and the first file.
    """
    missing = [question for question in questions if not (folder / question.image).is_file()]
    if missing:
        ids = name_ids([question.id for question in missing])
        raise ValueError(f"no image {folder / missing[0].image}, which {ids} need")


def answer_all(
    answerer: Answerer,
    questions: Sequence[Question],
    images: Path,
    asking: Asking,
    out: Path,
    *,
    batch: int = 1,
) -> Iterator[int]:
    """Answer what ``out`` lacks, in batches; yields the number of new answers after each is written.

    Raises:
        ValueError: ``out`` holds other answers, an image can't be read, or the model gives another
            number of answers than it was asked for.
    """
    finished = read_finished(out, questions, asking)
    left = [question for question in questions if str(question.id) not in finished]
    for start in range(0, len(left), batch):
        part = left[start : start + batch]
        texts = _ask(answerer, part, images, asking)
        for question, text in zip(part, texts, strict=True):
            finished[str(question.id)] = _row(question, text, asking)
        rows = [finished[key] for question in questions if (key := str(question.id)) in finished]
        write_lines(out, rows)
        yield len(part)


def _ask(answerer: Answerer, part: Sequence[Question], images: Path, asking: Asking) -> list[str]:
    pictures = [[_picture(question, images)] for question in part]
    try:
        return answerer.answer([question.text for question in part], pictures, **asking.decoding())
    except ValueError as error:
        # The model counts the questions of its batch; a user knows them by the bench's ids.
        ids = name_ids([question.id for question in part])
        raise ValueError(f"asked {ids}: {error}") from error


def _picture(question: Question, folder: Path) -> "Image":
    from revelio.data.picture import read_picture

    try:
        return read_picture(folder / question.image, question.image)
    except ImageError as error:
        raise ValueError(f"question {question.id}: {error}") from error


def _row(question: Question, text: str, asking: Asking) -> dict[str, Any]:
    row = {"question_id": question.id, "prompt": question.text, "model_id": asking.model_id}
    row |= {"text": text.strip(), "metadata": asking.metadata()}
    order = ("question_id", "prompt", "answer_id", "model_id", "text", "metadata")
    row["answer_id"] = answer_id(row)
    return {key: row[key] for key in order}
