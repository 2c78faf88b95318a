"""The whole way of a real (tiny) LLaVA model: both stages, answers, judge, scores."""

import json
import shlex
from pathlib import Path

import pytest
from eval_helpers import Response, judge_server, make_bench, read_jsonl
from llava_train_helpers import WORDS, data_options, tiny_project

from eval.bench.files import made_of
from eval.llava_bench import main
from llava_ext.config import FinetuneConfig, PretrainConfig
from llava_ext.run import run
from llava_ext.stages import Finetune, Pretrain


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model: both stages on pictures whose answers are known."""
    folder = tmp_path_factory.mktemp("trained")
    model, data = tiny_project(folder, records=4), data_options(folder)
    shared = {"effective_batch": 4, "batch_size": 4, "zero": 0, "threads": 1}
    one = Pretrain(**shared, learning_rate=1e-2, epochs=20.0)  # type: ignore[arg-type]
    two = Finetune(**shared, learning_rate=5e-3, epochs=60.0)  # type: ignore[arg-type]
    run(PretrainConfig(out=folder / "pre", data=data, model=model, stage=one))
    run(
        FinetuneConfig(
            pretrained=folder / "pre", out=folder / "fine", data=data, model=model, stage=two
        )
    )
    return folder / "fine" / "final"


def test_answer_judge_score(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bench = make_bench(tmp_path / "bench")
    words = ["answer", "--bench", str(bench), "--model", str(trained)]
    words += ["--max-new-tokens", "5", "--device", "cpu"]
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    main([*words, "--out", str(alone), "--model-id", "tiny"])
    main([*words, "--out", str(together), "--model-id", "tiny", "--batch-size", "4"])
    assert alone.read_bytes() == together.read_bytes()
    # Other pictures and questions than it was taught, but its words are those that it was taught.
    known = {word for text in WORDS for word in text.split()}
    assert all(row["text"] and set(row["text"].split()) <= known for row in read_jsonl(alone))

    reviews, report = tmp_path / "reviews.jsonl", tmp_path / "scores.json"
    with judge_server(lambda body, number: Response("8 4")) as server:
        words = ["judge", "--bench", str(bench), "--answers", str(alone), "--judge", "j"]
        main([*words, "--base-url", server.base_url, "--mode", "as_paper", "--out", str(reviews)])
    main(["score", "--reviews", str(reviews), "--out", str(report)])
    entry = json.loads(report.read_text())["files"][0]["scores"]["all"]
    assert (entry["questions"], entry["relative"], entry["reference"]) == (6, 50, 80)
    assert "wrote" in capsys.readouterr().out


def test_next_lines_lead_from_answers_to_a_comparison_beside_them(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    bench, out = make_bench(tmp_path / "bench"), tmp_path / "runs" / "clip-answers.jsonl"

    def follow(words: list[str], *more: str, **filled: str) -> list[str]:
        """Run a command, with its capitals filled in; the next one that it names."""
        main([*(filled.get(word, word) for word in words), *more])
        *_, line = capsys.readouterr().out.splitlines()
        assert line.startswith("next: revelio llava-bench ")
        return shlex.split(line)[3:]

    words = ["answer", "--bench", str(bench), "--model", str(trained), "--out", str(out)]
    estimate = follow([*words, "--max-new-tokens", "2", "--device", "cpu"])
    assert estimate[-1] == "--estimate"
    with judge_server(lambda body, number: Response("8 4")) as server:
        own = ["--base-url", server.base_url, "--mode", "as_paper", "--no-send-temperature"]
        judge = follow(estimate, *own, JUDGE="j")
        assert not server.bodies
        score = follow(judge)
        assert len(server.bodies) == 6 and "temperature" not in server.bodies[0]
    compare = follow(score, "--out", str(made_of(out, "scores", ".json")), "--bootstrap", "20")
    main([{"REVIEWS": str(out.parent / "clip-reviews.jsonl")}.get(word, word) for word in compare])
    report = json.loads((out.parent / "clip-comparison.json").read_text())
    assert (report["mode"], report["resamples"]) == ("as_paper", 20)
    names = (
        "answers.jsonl",
        "comparison.json",
        "reviews.cache.sqlite",
        "reviews.jsonl",
        "scores.json",
    )
    assert sorted(file.name for file in out.parent.iterdir()) == [f"clip-{name}" for name in names]
    assert made_of(Path("a/b.jsonl"), "reviews") == Path("a/b-reviews.jsonl")
