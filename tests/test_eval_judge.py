"""The judge's path against a server in a thread that counts, limits, dawdles and talks nonsense."""

import json
import re
import socket
from collections import Counter
from pathlib import Path

import pytest
from eval_helpers import (
    Response,
    answer_rows,
    completion,
    judge_server,
    make_bench,
    read_jsonl,
    write_jsonl,
)

from eval.bench.commands import judge as command
from eval.llava_bench import main
from revelio.reply_cache import Reply, open_cache


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return make_bench(tmp_path / "bench")


def run_judge(bench: Path, base_url: str | None, **more) -> Path:
    out = bench.parent / "reviews.jsonl"
    settings = {"out": out, "tries": 1, "concurrency": 3, "timeout": 20.0} | more
    command.run(
        command.Config(
            bench=bench, answers=bench / "tiny.jsonl", judge="j", base_url=base_url, **settings
        )
    )
    return out


def gold_gets_nine(body: dict, number: int) -> Response:
    """9 for the reference and the question's number for the model, wherever they sit."""
    text = body["messages"][1]["content"]
    model = text.split("tiny says ")[1].split("\n")[0]
    first = text.index("gold says") < text.index("tiny says")
    return Response(f"9 {model}" if first else f"{model} 9")


def test_swapped_answers_are_put_back(bench: Path) -> None:
    with judge_server(gold_gets_nine) as server:
        rows = read_jsonl(run_judge(bench, server.base_url))
    assert [row["question_id"] for row in rows] == [n for n in range(6) for _ in range(2)]
    assert [row["order"] for row in rows] == ["reference_first", "model_first"] * 6
    assert [row["tuple"] for row in rows] == [[9, n] for n in range(6) for _ in range(2)]
    assert [row["content"] for row in rows[4:6]] == ["9 2", "2 9"]
    assert {row["answer1_id"] for row in rows} == {f"gold-{n}" for n in range(6)}
    assert rows[2]["category"] == "llava_bench_detail"
    assert rows[0]["failure"] is None and rows[0]["model_id"] == "tiny"


def test_what_the_judge_reads(bench: Path) -> None:
    with judge_server(gold_gets_nine) as server:
        run_judge(bench, server.base_url, mode="as_paper")
    assert len(server.bodies) == 6 and server.keys == ["Bearer none"] * 6
    body = next(body for body in server.bodies if "picture 3?" in body["messages"][1]["content"])
    assert body["temperature"] == 0.2 and body["max_tokens"] == 1024 and body["model"] == "j"
    assert body["messages"][0]["role"] == "system"
    assert body["messages"][1]["content"] == (
        "[Context]\nA plain 2.\n\n[Question]\nWhat is in picture 3?\n\n"
        "[Assistant 1]\ngold says 3\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\ntiny says 3\n\n[End of Assistant 2]\n\n"
        "[System]\nTwo scores for conv.\n\n"
    )


def test_captions_in_a_list_are_lines_and_a_folder_without_rules_gets_ours(bench: Path) -> None:
    contexts = read_jsonl(bench / "context.jsonl")
    contexts[1]["caption"] = ["One.", "Two."]
    write_jsonl(bench / "context.jsonl", contexts)
    (bench / "rule.json").unlink()
    with judge_server(gold_gets_nine) as server:
        run_judge(
            bench, server.base_url, send_temperature=False, limit_field="max_completion_tokens"
        )
    text = next(t for b in server.bodies if "picture 2?" in (t := b["messages"][1]["content"]))
    assert text.startswith("[Context]\nOne.\nTwo.\n\n[Question]")
    assert "separated by a space" in text.split("[System]")[1]
    assert set(server.bodies[0]) == {"model", "messages", "max_completion_tokens"}


def test_a_second_run_sends_nothing_and_another_run_number_everything(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(gold_gets_nine) as server:
        first = run_judge(bench, server.base_url).read_bytes()
        assert len(server.bodies) == 12
        assert run_judge(bench, server.base_url).read_bytes() == first
        assert len(server.bodies) == 12
        assert "sent 0" in capsys.readouterr().out
        run_judge(bench, server.base_url, run=1)
        assert len(server.bodies) == 24
        run_judge(bench, server.base_url, max_tokens=7)
        assert len(server.bodies) == 36


def test_one_new_answer_asks_for_its_question_only(bench: Path) -> None:
    with judge_server(gold_gets_nine) as server:
        run_judge(bench, server.base_url)
        rows = answer_rows("tiny")
        rows[4]["text"] = "tiny says 1"
        write_jsonl(bench / "tiny.jsonl", rows)
        rows = read_jsonl(run_judge(bench, server.base_url))
    assert len(server.bodies) == 14
    assert [row["tuple"][1] for row in rows[8:]] == [1, 1, 5, 5]


def test_rate_limits_and_server_errors_are_tried_again(bench: Path) -> None:
    seen: Counter[str] = Counter()

    def limited(body: dict, number: int) -> Response:
        text = body["messages"][1]["content"]
        seen[text] += 1
        if seen[text] < 3:
            status = 429 if seen[text] == 1 else 503
            headers = (("retry-after-ms", "5"),)
            return Response(
                raw=b'{"error": {"message": "slow down"}}', status=status, headers=headers
            )
        return gold_gets_nine(body, number)

    with judge_server(limited) as server:
        rows = read_jsonl(run_judge(bench, server.base_url, tries=3))
    assert all(row["tuple"] for row in rows) and len(server.bodies) == 36


def test_requests_are_on_their_way_together_but_no_more_than_allowed(bench: Path) -> None:
    def slow(body: dict, number: int) -> Response:
        return Response("5 5", seconds=0.15)

    with judge_server(slow) as server:
        run_judge(bench, server.base_url, concurrency=3)
    assert server.busiest == 3


def test_nonsense_is_counted_kept_and_asked_again_on_demand(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def moody(body: dict, number: int) -> Response:
        bad = "picture 4?" in body["messages"][1]["content"]
        return Response("I'd rather not.") if bad else gold_gets_nine(body, number)

    with judge_server(moody) as server:
        out = run_judge(bench, server.base_url)
        text = capsys.readouterr().out
        assert "10 reviews, 2 failures" in text
        assert "question 4 (model first): the first line holds no two scores: \"I'd rather" in text
        assert [row["tuple"] for row in read_jsonl(out)[8:10]] == [None, None]
        run_judge(bench, server.base_url)
        assert len(server.bodies) == 12
        run_judge(bench, server.base_url, ask_again=True)
        assert len(server.bodies) == 14
    report = bench.parent / "scores.json"
    main(["score", "--reviews", str(out), "--out", str(report)])
    entry = json.loads(report.read_text())["files"][0]["scores"]["all"]
    assert entry["failures"] == 2 and entry["questions"] == 5
    assert entry["model"] == pytest.approx(10 * (0 + 1 + 2 + 3 + 5) / 5)


def test_a_record_without_a_reply_is_named_and_the_next_run_gets_it(bench: Path) -> None:
    broken = [True]

    def sometimes(body: dict, number: int) -> Response:
        if broken[0] and "picture 1?" in body["messages"][1]["content"]:
            return Response(raw=b'{"error": {"message": "too long"}}', status=400)
        return gold_gets_nine(body, number)

    with judge_server(sometimes) as server:
        with pytest.raises(ValueError, match=r"2 of 12 reviews, of question 1 .*too long.*again"):
            run_judge(bench, server.base_url)
        rows = read_jsonl(bench.parent / "reviews.jsonl")
        assert [row["failure"] for row in rows[1:5]] == [None, "no reply", "no reply", None]
        broken[0] = False
        assert all(row["tuple"] for row in read_jsonl(run_judge(bench, server.base_url)))
        assert len(server.bodies) == 14


def test_a_slow_judge_times_out_and_what_came_in_is_kept(bench: Path) -> None:
    slow = [True]

    def slows_down(body: dict, number: int) -> Response:
        late = slow[0] and number > 4
        return Response("5 5", seconds=1.5) if late else gold_gets_nine(body, number)

    with judge_server(slows_down) as server:
        with pytest.raises(
            ValueError, match=r"question \d .*no reply from http.*timed out.*stopped"
        ):
            # Long enough for an answer that is not late on a machine that is busy.
            run_judge(bench, server.base_url, timeout=1.0, concurrency=2)
        assert not (bench.parent / "reviews.jsonl").exists()
        slow[0], before = False, len(server.bodies)
        run_judge(bench, server.base_url, concurrency=2)
        assert len(server.bodies) == before + 8


def test_a_server_that_speaks_no_openai_is_named(bench: Path) -> None:
    for content in (b"<html>hello</html>", b'{"hello": 1}', b'{"choices": [{}]}', b"[]"):
        with (
            judge_server(lambda body, number, content=content: Response(raw=content)) as server,
            pytest.raises(ValueError, match=r"^question 0 \(reference first\): no reply") as caught,
        ):
            # One at a time: of several on their way, any may be the first to fail.
            run_judge(bench, server.base_url, concurrency=1)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [404, 405])
def test_an_address_without_the_version_is_told_what_it_lacks(bench: Path, status: int) -> None:
    def nothing_here(body: dict, number: int) -> Response:
        return Response(raw=b"", status=status)

    with judge_server(nothing_here) as server:
        root = server.base_url.removesuffix("/v1")
        # What may be a secret is not repeated.
        secret = root.replace("//", "//me:pass@") + "?key=word"
        for url, ending in (
            (root, f"{root}/chat/completions; most servers want a base_url that ends in /v1"),
            (server.base_url, f"{server.base_url}/chat/completions"),
            (secret, "most servers want a base_url that ends in /v1"),
        ):
            with pytest.raises(ValueError, match=re.escape(f"{ending})")) as caught:
                run_judge(bench, url, concurrency=1)
            reason = str(caught.value).partition("(POST ")[2]
            assert "pass" not in reason and "word" not in reason
    assert len(server.bodies) == 3  # no other request can fare better


def test_an_endpoint_that_is_down_or_refuses_the_key_ends_it_at_once(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    words = ["judge", "--bench", str(bench), "--answers", str(bench / "tiny.jsonl"), "--judge", "j"]
    words += ["--out", str(bench.parent / "r.jsonl"), "--tries", "1", "--base-url", url]
    words += ["--concurrency", "1"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2
    assert error.startswith(
        "llava_bench: question 0 (reference first): no reply from http://127.0.0.1"
    )
    assert "run the same command again" in error

    def refuse(body: dict, number: int) -> Response:
        return Response(raw=b'{"error": {"message": "wrong key"}}', status=401)

    with judge_server(refuse) as server, pytest.raises(ValueError, match=r"wrong key"):
        run_judge(bench, server.base_url, concurrency=1, tries=4)
    assert len(server.bodies) == 1


def test_the_estimate_sends_nothing_and_leaves_nothing(
    bench: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(gold_gets_nine) as server:
        run_judge(bench, server.base_url, estimate=True, price_in=10.0, price_out=30.0)
        assert server.bodies == [] and sorted(bench.parent.iterdir()) == [bench]
        text = capsys.readouterr().out
        size = sum(
            round(len((m[0]["content"] + m[1]["content"]).encode()) / 4) + 10
            for m in (body["messages"] for body in _bodies(bench, server))
        )
    assert "calls:       12 (0 of 12" in text and f"about {size:,} (" in text
    cost = (10 * size + 30 * 12 * 1024) / 1e6
    assert f"at most {12 * 1024:,}" in text and f"at most {cost:.2f}" in text
    capsys.readouterr()
    run_judge(bench, server.base_url, estimate=True)
    assert "calls:       0 (12 of 12" in capsys.readouterr().out


def _bodies(bench: Path, server) -> list[dict]:
    run_judge(bench, server.base_url)
    return server.bodies


def test_files_that_do_not_match_are_named_by_id(bench: Path) -> None:
    rows = answer_rows("tiny", 8)
    write_jsonl(bench / "tiny.jsonl", [rows[7], *rows[:2], *rows[3:6]])
    message = r"tiny.jsonl does not match the questions: it lacks question 2; it has question 7"
    with pytest.raises(ValueError, match=message):
        run_judge(bench, "http://127.0.0.1:1/v1")
    write_jsonl(bench / "tiny.jsonl", [*rows[:6], rows[3]])
    with pytest.raises(ValueError, match="holds question 3 more than once"):
        run_judge(bench, "http://127.0.0.1:1/v1")
    write_jsonl(bench / "tiny.jsonl", [{"question_id": 0}])
    with pytest.raises(ValueError, match=r"tiny.jsonl line 1 lacks text"):
        run_judge(bench, "http://127.0.0.1:1/v1")
    (bench / "tiny.jsonl").write_text('{"question_id": 0, "text": "a"}\n{"quest')
    with pytest.raises(ValueError, match=r"tiny.jsonl line 2 is not valid JSON"):
        run_judge(bench, "http://127.0.0.1:1/v1")


def test_answers_in_another_order_are_matched_by_id(bench: Path) -> None:
    write_jsonl(bench / "tiny.jsonl", answer_rows("tiny")[::-1])
    with judge_server(gold_gets_nine) as server:
        rows = read_jsonl(run_judge(bench, server.base_url, mode="as_paper"))
    assert [row["tuple"] for row in rows] == [[9, n] for n in range(6)]


def test_a_context_rule_or_key_that_is_missing_is_named(bench: Path) -> None:
    with pytest.raises(ValueError, match=r"no API key: set OPENAI_API_KEY, or .*base_url"):
        run_judge(bench, None)
    rules = json.loads((bench / "rule.json").read_text())
    rules.pop("llava_bench_complex")
    (bench / "rule.json").write_text(json.dumps(rules))
    with pytest.raises(ValueError, match=r"no `llava_bench_complex`.*question 2"):
        run_judge(bench, "http://127.0.0.1:1/v1")
    write_jsonl(bench / "context.jsonl", read_jsonl(bench / "context.jsonl")[:1])
    with pytest.raises(ValueError, match=r"context.jsonl has no 001.jpg, of question 2"):
        run_judge(bench, "http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match=r"holds no questions.jsonl: give"):
        run_judge(bench / "images", "http://127.0.0.1:1/v1")


def test_the_cache_keeps_replies_over_a_reopening_and_refuses_another_file(tmp_path: Path) -> None:
    request = {"body": {"model": "j", "messages": ["ä"]}, "run": 0}
    with open_cache(tmp_path / "c.sqlite") as cache:
        assert cache.get(request) is None
        cache.put(request, Reply("one"))
        cache.put(request, Reply("8 7", 3, 4))
    with open_cache(tmp_path / "c.sqlite") as cache:
        assert cache.get({"run": 0, "body": {"messages": ["ä"], "model": "j"}}) == Reply(
            "8 7", 3, 4
        )
        assert cache.get(request | {"run": 1}) is None
    (tmp_path / "text").write_text("no database, but long enough to be taken for one" * 50)
    with (
        pytest.raises(ValueError, match=r"can't be used as a cache"),
        open_cache(tmp_path / "text"),
    ):
        pass


@pytest.mark.parametrize("status", [400, 500])
def test_records_that_cannot_be_answered_do_not_keep_the_others_from_it(
    bench: Path, status: int
) -> None:
    """Whether they are the server's to refuse or bring it to its knees: the others get their review."""

    def some(body: dict, number: int) -> Response:
        text = body["messages"][1]["content"]
        if any(f"picture {n}?" in text for n in (0, 1, 2)):
            return Response(raw=b'{"error": {"message": "no"}}', status=status)
        return gold_gets_nine(body, number)

    with judge_server(some) as server:
        for _ in range(2):
            with pytest.raises(ValueError, match="again"):
                run_judge(bench, server.base_url, concurrency=1)
        rows = read_jsonl(bench.parent / "reviews.jsonl")
        assert [bool(row["tuple"]) for row in rows] == [False] * 6 + [True] * 6
        answered = len(server.bodies)
        with pytest.raises(ValueError, match="6 of 12 reviews"):
            run_judge(bench, server.base_url, concurrency=1)
        assert len(server.bodies) == answered + 6


def test_equal_requests_are_sent_once(bench: Path) -> None:
    gold = read_jsonl(bench / "answers_gpt4.jsonl")
    write_jsonl(bench / "tiny.jsonl", [row | {"model_id": "tiny"} for row in gold])
    with judge_server(lambda body, number: Response("5 5")) as server:
        rows = read_jsonl(run_judge(bench, server.base_url))
    assert len(server.bodies) == 6 and all(row["tuple"] for row in rows)


def test_a_judge_that_never_gives_scores_is_stopped_early(bench: Path) -> None:
    make_bench(bench.parent / "b", 12)
    with (
        judge_server(lambda body, number: Response("as I said, both are fine")) as server,
        pytest.raises(ValueError, match="not one of the first 8 replies holds two scores"),
    ):
        run_judge(bench.parent / "b", server.base_url, concurrency=1)
    assert len(server.bodies) == 8


def test_a_reply_that_was_cut_off_says_so(bench: Path) -> None:
    def cut(body: dict, number: int) -> Response:
        if "picture 4?" not in body["messages"][1]["content"]:
            return gold_gets_nine(body, number)
        whole = completion("Let me look at both answers")
        return Response(raw=whole.replace(b'"stop"', b'"length"'))

    with judge_server(cut) as server:
        rows = read_jsonl(run_judge(bench, server.base_url))
    assert "cut off before its scores: raise max_tokens" in rows[8]["failure"]
