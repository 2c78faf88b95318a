"""The judge: requests -> replies (from the cache, else from the endpoint) -> reviews.

A review is one line of LLaVA's own form with what made it: `tuple` is always (reference, model), whatever
the order shown; it is null, with the reason in `failure`, where the reply held no two scores.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.bench.files import CATEGORY_PREFIX
from eval.bench.parse import parse_scores
from eval.bench.prompts import Mode, Request, put_back
from revelio.endpoint import Outcome, Settings, ask_all
from revelio.reply_cache import Reply, ReplyCache, request_key
from revelio.run_dir import write_whole
from revelio.wording import plural

USELESS = 8  # replies without scores, and none with them, after which nothing more is sent


@dataclass(frozen=True)
class Judge:
    """Who judges: all that decides what a reply may be."""

    model: str
    system: str
    temperature: float | None
    max_tokens: int
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    run: int = 0

    def body(self, request: Request) -> dict[str, Any]:
        """The chat completion to ask for."""
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": request.message},
        ]
        body = {"model": self.model, "messages": messages, self.limit_field: self.max_tokens}
        return body if self.temperature is None else body | {"temperature": self.temperature}


def cache_entries(
    judge: Judge, requests: Sequence[Request], base_url: str | None
) -> list[dict[str, Any]]:
    """What the cache knows each request by: the body, the address, and the number of the run."""
    address = (base_url or "").rstrip("/")
    return [
        {"body": judge.body(request), "base_url": address, "run": judge.run} for request in requests
    ]


def scores_of(reply: Reply) -> tuple[float, float]:
    """The scores of answer 1 and answer 2, as the judge saw them.

    Raises:
        ValueError: there are none; says why.
    """
    try:
        return parse_scores(reply.text)
    except ValueError as error:
        if reply.cut_off:
            raise ValueError("the reply was cut off before its scores: raise max_tokens") from error
        raise


def _has_scores(reply: Reply) -> bool:
    try:
        scores_of(reply)
    except ValueError:
        return False
    return True


def missing(cache: ReplyCache, entries: Sequence[dict[str, Any]], *, ask_again: bool) -> list[int]:
    """The indices of entries to send, equal ones once, those that got no reply before last.

    With ``ask_again`` also those whose reply held no scores.
    """
    distinct = {request_key(entry): index for index, entry in reversed(list(enumerate(entries)))}
    found = []
    for index in sorted(distinct.values()):
        reply = cache.get(entries[index])
        if reply is None or (ask_again and not _has_scores(reply)):
            found.append(index)
    return sorted(found, key=lambda index: cache.failed(entries[index]))


def ask_missing(
    cache: ReplyCache,
    entries: Sequence[dict[str, Any]],
    to_send: Sequence[int],
    settings: Settings,
    seen: Callable[[], object],
) -> Outcome:
    """Send what is missing and keep each reply as it comes; indices are those of ``entries``.

    It stops where the first few replies hold no scores: such a judge would cost its full price for nothing.
    """
    useless = 0
    useful = False

    def keep(index: int, reply: Reply) -> str | None:
        nonlocal useless, useful
        cache.put(entries[to_send[index]], reply)
        seen()
        useful = useful or _has_scores(reply)
        useless += not useful
        if useless < USELESS:
            return None
        try:
            scores_of(reply)
        except ValueError as error:
            return f"not one of the first {plural(useless, 'reply', 'replies')} holds two scores: {error}"
        return None

    failed = {place for place, index in enumerate(to_send) if cache.failed(entries[index])}
    outcome = ask_all([entries[index]["body"] for index in to_send], settings, keep, failed)
    outcome.unanswered = {to_send[index]: why for index, why in outcome.unanswered.items()}
    for index in outcome.unanswered:
        cache.note_failure(entries[index])
    return outcome


def review(
    number: int,
    request: Request,
    judge: Judge,
    mode: Mode,
    entry: dict[str, Any],
    reply: Reply | None,
) -> dict[str, Any]:
    """One line of the reviews file; ``reply`` is None when the endpoint gave none."""
    scores, failure = None, "no reply"
    if reply is not None:
        try:
            scores, failure = put_back(request.order, scores_of(reply)), None
        except ValueError as error:
            failure = str(error)
    return {
        "id": number,
        "question_id": request.question.id,
        "answer1_id": request.reference.answer_id,
        "answer2_id": request.model.answer_id,
        "category": CATEGORY_PREFIX + request.question.category,
        "content": reply.text if reply else None,
        "tuple": list(scores) if scores else None,
        "failure": failure,
        "order": request.order,
        "reference_id": request.reference.model_id,
        "model_id": request.model.model_id,
        "mode": mode,
        "judge": {
            "model": judge.model,
            "temperature": judge.temperature,
            "max_tokens": judge.max_tokens,
            "run": judge.run,
        },
        "request": request_key(entry),
    }


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object a line; the file is there whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
