"""The judge's replies in one sqlite file, by the hash of what was sent: nothing is asked twice.

A reply is committed as soon as it is there, so that a run that is killed loses none. The file holds what
was sent and what came back, and no key of anybody's account.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, text TEXT NOT NULL,
    prompt_tokens INTEGER, reply_tokens INTEGER)"""
_FAILURES = "CREATE TABLE IF NOT EXISTS failures (key TEXT PRIMARY KEY)"
_WAIT = 60.0  # seconds to wait for another process that writes the same cache


@dataclass(frozen=True)
class Reply:
    """What a judge wrote, the tokens it counted (None: it did not say), and whether it was cut off."""

    text: str
    prompt_tokens: int | None = None
    reply_tokens: int | None = None
    cut_off: bool = False


def request_key(request: Mapping[str, Any]) -> str:
    """The sha256 of a request of plain values: equal requests have equal keys."""
    return hashlib.sha256(_canonical(request).encode()).hexdigest()


def _canonical(request: Mapping[str, Any]) -> str:
    return json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


class ReplyCache:
    """Replies by request. Make one with :func:`open_cache`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, request: Mapping[str, Any]) -> Reply | None:
        """The reply that ``request`` got before, or None."""
        query = "SELECT text, prompt_tokens, reply_tokens, cut_off FROM replies WHERE key = ?"
        row = self._connection.execute(query, (request_key(request),)).fetchone()
        return Reply(*row[:3], cut_off=bool(row[3])) if row else None

    def put(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keep ``reply``, instead of one that is there; it is on disk when this returns."""
        values = (reply.text, reply.prompt_tokens, reply.reply_tokens, int(reply.cut_off))
        with self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO replies (key, request, text, prompt_tokens, reply_tokens, cut_off) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (request_key(request), _canonical(request), *values),
            )

    def note_failure(self, request: Mapping[str, Any]) -> None:
        """Remember that ``request`` got no reply: it is asked last the next time."""
        with self._connection:
            key = (request_key(request),)
            self._connection.execute("INSERT OR IGNORE INTO failures VALUES (?)", key)

    def failed(self, request: Mapping[str, Any]) -> bool:
        """Whether ``request`` got no reply before."""
        query = "SELECT 1 FROM failures WHERE key = ?"
        return self._connection.execute(query, (request_key(request),)).fetchone() is not None


@contextmanager
def open_cache(path: Path, *, write: bool = True) -> Iterator[ReplyCache]:
    """Open the cache at ``path``; without ``write``, a file that isn't there counts as empty.

    Raises:
        ValueError: the file is no such cache.
    """
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
    place = str(path) if write or path.is_file() else ":memory:"
    try:
        with closing(sqlite3.connect(place, timeout=_WAIT)) as connection:
            connection.execute(_TABLE)
            connection.execute(_FAILURES)
            columns = [row[1] for row in connection.execute("PRAGMA table_info(replies)")]
            if "cut_off" not in columns:  # a cache of the first version
                connection.execute("ALTER TABLE replies ADD COLUMN cut_off INTEGER DEFAULT 0")
            connection.execute(
                "SELECT key, request, text, prompt_tokens, reply_tokens FROM replies"
            )
            yield ReplyCache(connection)
    except sqlite3.Error as error:
        raise ValueError(
            f"{path} can't be used as a cache of replies ({error}): choose another cache"
        ) from error
