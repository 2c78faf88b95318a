"""The whole way with a real (tiny) LLaVA model: answer, judge, score, by the script's own door."""

import json
from pathlib import Path

import pytest
from eval_helpers import Response, judge_server, make_bench, read_jsonl
from llava_helpers import model_config, tiny_llama, tower_configs

from eval.llava_bench import main
from llava_ext.language import build_model
from llava_ext.towers import load_towers


def test_answer_judge_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    towers = tower_configs(tmp_path / "towers")
    config = model_config(tiny_llama(tmp_path / "llama"), towers["clip"], towers["sd"])
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    model.save_pretrained(tmp_path / "model", tokenizer)
    bench = make_bench(tmp_path / "bench")
    words = ["answer", "--bench", str(bench), "--model", str(tmp_path / "model")]
    words += ["--max-new-tokens", "5", "--device", "cpu"]
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    main([*words, "--out", str(alone), "--model-id", "tiny"])
    main([*words, "--out", str(together), "--model-id", "tiny", "--batch", "4"])
    assert alone.read_bytes() == together.read_bytes()
    assert any(row["text"] for row in read_jsonl(alone))

    reviews, report = tmp_path / "reviews.jsonl", tmp_path / "scores.json"
    with judge_server(lambda body, number: Response("8 4")) as server:
        words = ["judge", "--bench", str(bench), "--answers", str(alone), "--judge", "j"]
        main([*words, "--base-url", server.base_url, "--mode", "as_paper", "--out", str(reviews)])
    main(["score", "--reviews", str(reviews), "--json", str(report)])
    entry = json.loads(report.read_text())["files"][0]["scores"]["all"]
    assert (entry["questions"], entry["relative"], entry["reference"]) == (6, 50, 80)
    assert "wrote" in capsys.readouterr().out
