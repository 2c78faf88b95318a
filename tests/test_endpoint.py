"""Whatever a server answers is a reply or a reason in one line; a cache of replies is ours, or refused."""

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from eval_helpers import Response, completion, judge_server

from revelio import endpoint
from revelio.endpoint import Settings, ask_all
from revelio.reply_cache import Reply, open_cache


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(completion("hello")) | fields).encode()


def message(value: Any, **fields: Any) -> bytes:
    return changed(choices=[{"index": 0, "finish_reason": "stop", "message": value} | fields])


def usage(sent: Any, back: Any) -> bytes:
    return changed(usage={"prompt_tokens": sent, "completion_tokens": back, "total_tokens": 1})


DEEP = b"[" * 200_000
# What is sent, and what is kept of it; None: a reason instead.
ANSWERS: dict[str, tuple[bytes, Reply | None]] = {
    "honest": (completion("hello"), Reply("hello", 100, 10)),
    "empty": (b"", None),
    "null": (b"null", None),
    "a list": (b"[]", None),
    "a number": (b"3", None),
    "no JSON": (b"<html>\x1b[31m", None),
    "half": (completion("hello")[:60], None),
    "deep": (DEEP, None),
    "deep inside": (b'{"choices": ' + DEEP + b"]" * len(DEEP) + b"}", None),
    "no UTF-8": (b'{"choices": "\xff\xfe"}', None),
    "no choices": (changed(choices=[]), None),
    "choices null": (changed(choices=None), None),
    "choices of text": (changed(choices=["x"]), None),
    "choices that are text": (changed(choices="x"), None),
    "a choice without message": (changed(choices=[{"index": 0}]), None),
    "a message that is text": (message("x"), None),
    "a message that is null": (message(None), None),
    "a message of parts": (message({"role": "assistant", "content": [{"text": "x"}]}), None),
    "a message of numbers": (message({"role": "assistant", "content": 3}), None),
    "a refusal": (message({"role": "assistant", "content": None}), Reply("", 100, 10)),
    "half a surrogate": (completion("a\ud800b"), Reply("a?b", 100, 10)),
    "a NUL": (completion("a\0b"), Reply("a\0b", 100, 10)),
    "escapes": (completion("\x1b[31m"), Reply("\x1b[31m", 100, 10)),
    "usage null": (changed(usage=None), Reply("hello")),
    "usage of text": (changed(usage="x"), Reply("hello")),
    "tokens of text": (usage("x", [1]), Reply("hello")),
    "tokens beyond": (usage(10**30, -1), Reply("hello")),
    "tokens that are true": (usage(True, 1.5), Reply("hello")),
    "cut off": (message({"role": "assistant", "content": "he"}, finish_reason="length"),
                Reply("he", 100, 10, True)),
    "long": (completion("x" * (3 << 20)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_is_kept_or_has_a_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "ANSWER_LIMIT", 2 << 20)
    raw, expected = ANSWERS[name]
    request = {"model": "j", "messages": [{"role": "user", "content": "x"}]}
    with judge_server(lambda body, number: Response(raw=raw)) as server:
        settings = Settings(base_url=server.base_url, tries=1, timeout=20.0)
        with open_cache(tmp_path / "c.sqlite") as cache:
            outcome = ask_all([request], settings, lambda index, reply: cache.put(request, reply))
            assert cache.get(request) == expected
    assert (0 in outcome.unanswered) == (expected is None)
    reason = outcome.unanswered.get(0, "x")
    assert reason and "\n" not in reason and len(reason) <= 300


@pytest.mark.parametrize("kind", ["packed", "slow"])
def test_an_answer_is_read_only_so_long_and_never_unpacked(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    headers = (("Content-Encoding", "gzip"),) if kind == "packed" else ()
    clock = iter(range(0, 10**6, 100))
    if kind == "slow":
        monkeypatch.setattr(endpoint, "monotonic", lambda: next(clock))
    with judge_server(lambda body, number: Response(headers=headers)) as server:
        settings = Settings(base_url=server.base_url, tries=1, timeout=20.0)
        request = {"model": "j", "messages": []}
        outcome = ask_all([request], settings, lambda index, reply: pytest.fail("a reply"))
    said = {"packed": "is packed", "slow": "has not ended"}[kind]
    assert said in outcome.unanswered[0].lower()


def foreign(path: Path, kind: str) -> None:
    """Something in a cache's place that is no cache."""
    if kind == "text":
        path.write_text("my thesis")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with sqlite3.connect(path) as database:
            database.executescript(FOREIGN[kind])


COLUMNS = "key, request, text, prompt_tokens, reply_tokens, cut_off"
TABLE = f"CREATE TABLE replies ({COLUMNS});"
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n)"
FOREIGN = {
    "another program's": "CREATE TABLE precious (x); INSERT INTO precious VALUES (1);",
    "a cache beside other tables": f"{TABLE} CREATE TABLE precious (x);",
    "a view without an end": f"CREATE VIEW replies AS {ENDLESS} SELECT x AS key, x AS request, x AS text, "
    "x AS prompt_tokens, x AS reply_tokens, 0 AS cut_off FROM n;",
    "a trigger": f"{TABLE} CREATE TRIGGER t AFTER INSERT ON replies BEGIN DELETE FROM replies; END;",
    "other columns": "CREATE TABLE replies (key, value);",
}


@pytest.mark.parametrize("kind", ["text", "folder", "pipe", "device", *FOREIGN])
def test_what_is_no_cache_is_refused_and_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    foreign(path, kind)
    before = path.read_bytes() if kind in ("text", *FOREIGN) else None
    for write in (True, False):
        with pytest.raises(ValueError, match=r"c\.sqlite"), open_cache(path, write=write):
            pytest.fail("it opened")
    assert before is None or path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["c.sqlite"]


@pytest.mark.parametrize("row", ["x'00', 1, 1, 0", "'a', 'x', 1, 0", "NULL, 1, 1, 0"])
def test_an_edited_reply_is_one_line(row: str, tmp_path: Path) -> None:
    request = {"body": {"model": "j"}}
    with open_cache(tmp_path / "c.sqlite") as cache:
        cache.put(request, Reply("hello", 1, 2))
    with sqlite3.connect(tmp_path / "c.sqlite") as database:
        text, sent, back, cut = row.split(", ")
        database.execute("PRAGMA writable_schema=ON")
        database.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '')")
        database.execute("PRAGMA writable_schema=RESET")
        changes = f"text = {text}, prompt_tokens = {sent}, reply_tokens = {back}, cut_off = {cut}"
        database.execute(f"UPDATE replies SET {changes}")
    with (
        pytest.raises(ValueError, match=r"c\.sqlite can't be used"),
        open_cache(tmp_path / "c.sqlite") as cache,
    ):
        cache.get(request)


def test_a_cache_that_a_kill_left_without_a_table_goes_on(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").touch()
    with open_cache(tmp_path / "c.sqlite") as cache:
        cache.put({}, Reply("x"))
    with open_cache(tmp_path / "c.sqlite") as cache:
        assert cache.get({}) == Reply("x")


def test_two_processes_that_begin_a_cache_at_once_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, looks = tmp_path / "c.sqlite", 0

    class Slow(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> Any:
            nonlocal looks
            found = super().execute(sql, *values)
            if not sql.startswith("PRAGMA table_info"):
                return found
            rows, looks = found.fetchall(), looks + 1
            if looks == 1:  # the other process comes after this one's look
                with open_cache(path):
                    pass
            return rows

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Slow, **k))
    with open_cache(path) as cache:
        cache.put({"body": 1}, Reply("hello"))
        assert looks > 1 and cache.get({"body": 1}) == Reply("hello")
