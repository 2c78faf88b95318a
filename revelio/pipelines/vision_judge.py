"""Questions with a picture to a vision-language judge behind an endpoint; every reply is kept at once.

A stopped run goes on where it was, and a second one sends nothing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from revelio.endpoint import Settings, ask_all, key_of
from revelio.naming.questions import body
from revelio.pipelines import Report, counted
from revelio.reply_cache import ReplyCache
from revelio.thinking import without_thinking
from revelio.wording import plural

T = TypeVar("T")


class VisionJudge:
    """Replies, from the cache or else from the endpoint.

    Args:
        model: the judge's name at the endpoint.
        max_tokens: longest reply.
        settings: how the endpoint is reached.
        cache: of replies.
        progress: told how many there are.
    """

    def __init__(
        self, model: str, max_tokens: int, settings: Settings, cache: ReplyCache, progress: Report
    ) -> None:
        self._model, self._max_tokens = model, max_tokens
        self._cache, self._progress = cache, progress
        self._address = settings.base_url or os.environ.get("OPENAI_BASE_URL")
        self._settings = replace(settings, base_url=self._address)

    def ask(
        self, title: str, questions: Sequence[tuple[str, bytes]], read: Callable[[int, str], T]
    ) -> list[T | None]:
        """What is read out of the reply to each question; None where it can't be.

        Raises:
            ValueError: the judge is down, or not one reply is of use.
        """
        bodies = [body(self._model, text, jpeg, self._max_tokens) for text, jpeg in questions]
        entries = [{"body": one, "base_url": self._address or ""} for one in bodies]
        lacking = [i for i, entry in enumerate(entries) if self._cache.get(entry) is None]
        count = counted(self._progress, title, len(bodies), "reply")
        count(len(bodies) - len(lacking))
        if lacking:
            key_of(self._settings)

            def keep(index: int, reply: Any) -> None:
                self._cache.put(entries[lacking[index]], reply)
                count(1)

            outcome = ask_all([bodies[i] for i in lacking], self._settings, keep)
            if outcome.unanswered:
                why = outcome.down or next(iter(outcome.unanswered.values()))
                raise ValueError(
                    f"no reply from {self._address or 'the endpoint'} to {len(outcome.unanswered)} of "
                    f"{plural(len(lacking), 'question')} ({why}); the replies so far are kept: run it again "
                    "to go on"
                )
        return self._read(entries, read)

    def _read(self, entries: Sequence[Mapping[str, Any]], read: Callable[[int, str], T]):
        found: list[T | None] = []
        why = ""
        for index, entry in enumerate(entries):
            reply = self._cache.get(entry)
            try:
                found.append(read(index, without_thinking(reply.text) if reply else ""))
            except ValueError as error:
                found.append(None)
                why = str(error)
        if all(one is None for one in found):
            raise ValueError(
                f"not one of {plural(len(found), 'reply', 'replies')} is of use ({why}): take another judge"
            )
        return found
