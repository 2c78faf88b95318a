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
from types import NoneType
from typing import Any

from revelio.files import make_folder
from revelio.trust import printable, regular_file

_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, request TEXT NOT NULL, text TEXT NOT NULL,
    prompt_tokens INTEGER, reply_tokens INTEGER)"""
_FAILURES = "CREATE TABLE IF NOT EXISTS failures (key TEXT PRIMARY KEY)"
_OURS = {("table", "replies"), ("table", "failures")}
_OURS |= {("index", f"sqlite_autoindex_{name}_1") for _, name in _OURS}
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
        if row is None:
            return None
        text, *tokens, cut_off = row
        if type(text) is not str or any(type(one) not in (int, NoneType) for one in tokens):
            raise sqlite3.DataError("a reply in it is no text")
        return Reply(text, *tokens, cut_off=bool(cut_off))

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
        ValueError: the file is no such cache, and stays as it is; or it can't be written.
    """
    if write:
        make_folder(path.parent)
    there = path.exists()
    place = str(path) if write or there else ":memory:"
    try:
        # A killed process may have left the file without a table in it.
        filled = there and regular_file(path).stat().st_size
        with closing(sqlite3.connect(place, timeout=_WAIT)) as connection:
            if filled:
                _check(connection)
            connection.execute(_TABLE)
            connection.execute(_FAILURES)
            if not _has_cut_off(connection):  # a cache of the first version
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    if not _has_cut_off(connection):  # nor has another process been faster
                        connection.execute(
                            "ALTER TABLE replies ADD COLUMN cut_off INTEGER DEFAULT 0"
                        )
            yield ReplyCache(connection)
    except sqlite3.Error as error:
        raise ValueError(
            f"{printable(path)} can't be used as a cache of replies ({error}): choose another cache"
        ) from error


def _has_cut_off(connection: sqlite3.Connection) -> bool:
    return "cut_off" in [row[1] for row in connection.execute("PRAGMA table_info(replies)")]


def _check(connection: sqlite3.Connection) -> None:
    """Refuse another program's database, and one with views or triggers, which would run by themselves."""
    found = set(connection.execute("SELECT type, name FROM sqlite_master"))
    if not {("table", "replies")} <= found <= _OURS:
        raise sqlite3.DatabaseError("it is another database")
    columns = "key, request, text, prompt_tokens, reply_tokens"
    connection.execute(f"SELECT {columns} FROM replies LIMIT 1")
