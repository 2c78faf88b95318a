"""The table of Table 10, its intervals, comparison and drift, against plain loops."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from eval_helpers import review_row, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from eval.bench.reviews import read_scores
from eval.bench.score import compare, draws, drift, interval, permutation_p, positions, table
from eval.bench.table import llava_summary, score_table
from eval.llava_bench import main

SIZES = {"complex": 28, "conv": 17, "detail": 15}  # of the published 60 questions
HOW = {"resamples": 400, "confidence": 0.9, "seed": 3}


def synthetic(seed: int, lift: float = 0.0) -> list[dict]:
    """60 reviews of the published sizes, in a mixed order."""
    generator = np.random.default_rng(seed)
    names = generator.permutation([name for name, size in SIZES.items() for _ in range(size)])
    rows = []
    for number, name in enumerate(names):
        theirs, ours = generator.integers(4, 11), generator.integers(1, 8) + lift
        rows.append(review_row(number, str(name), (float(theirs), float(ours))))
    return rows


def by_category(rows: list[dict], name: str) -> list[list[float]]:
    return [row["tuple"] for row in rows if name == "all" or row["category"].endswith(name)]


def test_relative_scores_are_ratios_of_means_and_all_pools_the_questions(tmp_path: Path) -> None:
    rows = synthetic(0)
    entries = table(read_scores(write_jsonl(tmp_path / "r.jsonl", rows), "fixed"), **HOW)
    assert list(entries) == ["all", "complex", "conv", "detail"]
    for name, entry in entries.items():
        pairs = by_category(rows, name)
        theirs = sum(pair[0] for pair in pairs) / len(pairs)
        ours = sum(pair[1] for pair in pairs) / len(pairs)
        assert entry["questions"] == entry["reviews"] == len(pairs)
        assert entry["relative"] == pytest.approx(100 * ours / theirs)
        assert entry["reference"] == pytest.approx(10 * theirs)
        assert entry["model"] == pytest.approx(10 * ours)
    for column in ("reference", "model"):
        pooled = sum(entries[name][column] * size for name, size in SIZES.items()) / 60
        assert entries["all"][column] == pytest.approx(pooled)
    pooled = sum(entries[name]["model"] * size for name, size in SIZES.items())
    pooled /= sum(entries[name]["reference"] * size for name, size in SIZES.items())
    assert entries["all"]["relative"] == pytest.approx(100 * pooled)


def test_the_bootstrap_draws_questions_with_both_their_scores(tmp_path: Path) -> None:
    rows = synthetic(1)
    entries = table(read_scores(write_jsonl(tmp_path / "r.jsonl", rows), "fixed"), **HOW)
    for name, entry in entries.items():
        pairs = by_category(rows, name)
        ratios, theirs_means = [], []
        for drawn in draws(len(pairs), HOW["resamples"], HOW["seed"], "bootstrap", name):
            theirs = ours = 0.0
            for question in drawn:
                theirs += pairs[question][0]
                ours += pairs[question][1]
            ratios.append(100 * ours / theirs)
            theirs_means.append(10 * theirs / len(pairs))
        assert entry["relative_interval"] == pytest.approx(list(np.percentile(ratios, [5, 95])))
        assert entry["reference_interval"] == pytest.approx(
            list(np.percentile(theirs_means, [5, 95]))
        )
        low, high = entry["relative_interval"]
        assert low < entry["relative"] < high


def test_draws_are_uniform_keyed_and_with_replacement() -> None:
    drawn = draws(5, 4000, 0, "bootstrap", "all")
    assert drawn.shape == (4000, 5)
    assert np.bincount(drawn.ravel(), minlength=5) / drawn.size == pytest.approx(
        [0.2] * 5, abs=0.01
    )
    distinct = np.mean([len(set(row)) for row in drawn])
    assert distinct == pytest.approx(5 * (1 - 0.8**5), abs=0.05)
    assert (draws(5, 4000, 0, "bootstrap", "all") == drawn).all()
    assert (draws(5, 4000, 1, "bootstrap", "all") != drawn).any()


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        theirs = generator.normal(8, 1, 60)
        ours = theirs - 3 + generator.normal(0, 1, 60)
        drawn = draws(60, 300, trial, "bootstrap", "all")
        edges = interval(100 * ours[drawn].mean(1) / theirs[drawn].mean(1), 0.9)
        assert edges is not None
        covered += edges[0] <= 100 * 5 / 8 <= edges[1]
    assert 0.83 <= covered / 200 <= 0.96


@given(st.lists(st.tuples(*[st.integers(1, 10)] * 4), min_size=2, max_size=6))
def test_the_permutation_p_value_is_that_of_all_swaps(scores: list[tuple[int, ...]]) -> None:
    quads = np.array(scores, float).T

    def difference(rows: list[list[float]]) -> float:
        a, b, c, d = np.sum(rows, axis=0)
        return 100 * b / a - 100 * d / c

    seen = abs(difference(quads.T.tolist()))
    far = [
        abs(
            difference(
                [[*r[2:], *r[:2]] if s else [*r] for r, s in zip(quads.T, swaps, strict=True)]
            )
        )
        >= seen - 1e-9
        for swaps in product((0, 1), repeat=len(scores))
    ]
    p = permutation_p(quads, 4000, 0, "permutation", "all")
    assert p == pytest.approx(np.mean(far), abs=0.045)


def test_two_models_are_compared_on_the_same_questions(tmp_path: Path) -> None:
    rows = synthetic(2)
    better = [row | {"tuple": [row["tuple"][0], row["tuple"][1] + 1.5]} for row in rows][::-1]
    a = read_scores(write_jsonl(tmp_path / "a.jsonl", better), "fixed")
    b = read_scores(write_jsonl(tmp_path / "b.jsonl", rows), "fixed")
    found = compare(a, b, **HOW)
    for name, entry in found.items():
        theirs = np.mean([pair[0] for pair in by_category(rows, name)])
        assert entry["difference"] == pytest.approx(100 * 1.5 / theirs)
        low, high = entry["interval"]
        assert low < entry["difference"] < high
        # Each question is 1.5 better: pairing leaves nearly nothing to chance.
        assert high - low < 8 and entry["p"] == pytest.approx(1 / 401)
    same = compare(b, b, **HOW)["all"]
    assert same["difference"] == 0 and same["p"] == 1 and same["interval"] == [0, 0]
    there = compare(b, a, **HOW)["all"]
    assert there["difference"] == pytest.approx(-found["all"]["difference"])


def test_a_failure_in_one_file_leaves_the_question_out_of_the_comparison(tmp_path: Path) -> None:
    rows = synthetic(3)
    torn = [row | {"tuple": None} if row["question_id"] == 5 else row for row in rows]
    a = read_scores(write_jsonl(tmp_path / "a.jsonl", rows), "fixed")
    b = read_scores(write_jsonl(tmp_path / "b.jsonl", torn), "fixed")
    assert compare(a, b, **HOW)["all"] == {
        "questions": 59,
        "difference": 0,
        "interval": [0, 0],
        "p": 1,
    }
    c = read_scores(write_jsonl(tmp_path / "c.jsonl", rows[:-2]), "fixed")
    with pytest.raises(
        ValueError, match=r"c.jsonl does not match .*a.jsonl: it lacks questions 58, 59"
    ):
        compare(a, c, **HOW)


def test_both_orders_count_as_one_question_and_show_the_seat(tmp_path: Path) -> None:
    rows = []
    for number, (first, second) in enumerate([((9, 4), (7, 6)), ((8, 2), (8, 5)), ((6, 3), None)]):
        rows.append(review_row(number, "conv", first, order="reference_first"))
        rows.append(review_row(number, "conv", second, order="model_first"))
    scores = read_scores(write_jsonl(tmp_path / "r.jsonl", rows), "fixed")
    assert scores.reference.tolist() == [8, 8] and scores.model.tolist() == [5, 3.5]
    assert scores.half == ("2",)
    entry = table(scores, **HOW)["all"]
    assert (entry["questions"], entry["reviews"], entry["failures"]) == (2, 6, 1)
    assert entry["half_answered"] == 1
    assert positions(scores) == {
        "reference_first": {"reference": 85, "model": 30},
        "model_first": {"reference": 75, "model": 55},
    }


def test_failures_count_in_no_mean_unless_the_paper_s_way_is_asked_for(tmp_path: Path) -> None:
    rows = [
        review_row(0, "conv", (8, 4)),
        review_row(1, "conv", (-1, -1)),
        review_row(2, "detail", None),
        review_row(3, "conv", (10, 5)),
    ]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    fixed = table(read_scores(path, "fixed"), **HOW)
    assert (fixed["all"]["reference"], fixed["all"]["model"]) == (90, 45)
    assert fixed["all"]["failures"] == 2 and fixed["conv"]["failures"] == 1
    assert fixed["detail"]["questions"] == 0 and fixed["detail"]["relative"] is None
    assert score_table(fixed).splitlines()[3].split() == ["detail", "0", "1", "-", "-", "-", "-"]
    paper = table(read_scores(path, "as_paper"), **HOW)
    assert paper["conv"]["reference"] == pytest.approx(10 * 17 / 3)
    assert paper["conv"]["relative"] == pytest.approx(100 * 8 / 17)
    assert paper["all"]["model"] == pytest.approx(10 * 7 / 4)


def test_llava_s_summary(tmp_path: Path) -> None:
    rows = [
        review_row(0, "conv", (9, 4)),
        review_row(1, "detail", (8, 5)),
        review_row(2, "complex", (7, 6)),
        review_row(3, "conv", (9, 3)),
        review_row(4, "conv", (8.5, 1)),
        review_row(5, "conv", (-1, -1)),
    ]
    scores = read_scores(write_jsonl(tmp_path / "r.jsonl", rows), "fixed")
    assert llava_summary("tiny", scores.reviews, "as_paper").splitlines() == [
        "tiny",
        "all 44.4 67.5 30.0",  # 100 * 3.0 / 6.75
        "llava_bench_complex 85.7 70.0 60.0",
        "llava_bench_conv 27.5 63.8 17.5",  # 100 * 1.75 / 6.375
        "llava_bench_detail 62.5 80.0 50.0",
        "=" * 33,
    ]
    assert "llava_bench_conv 30.2 88.3 26.7" in llava_summary("tiny", scores.reviews, "fixed")


def test_half_answered_questions_are_in_no_summary(tmp_path: Path) -> None:
    orders = ("reference_first", "model_first")
    rows = [
        review_row(number, "conv", (8, 4 if order == orders[0] else 6)) | {"order": order}
        for number in range(6)
        for order in orders
    ]
    rows[1] |= {"tuple": None}
    rows[4] |= {"tuple": None, "category": None}
    rows[5] |= {"category": None}
    scores = read_scores(write_jsonl(tmp_path / "r.jsonl", rows), "fixed")
    shown = llava_summary("x", scores.counted, "fixed").splitlines()
    assert shown[1] == "all 62.5 80.0 50.0"  # of four questions in both orders
    table = {name: scores.rows(name) for name in scores.names()}
    assert len(table["all"]) == 4 and "None" not in table


def test_drift_of_the_reference(tmp_path: Path) -> None:
    rows = synthetic(4)
    generator = np.random.default_rng(9)
    moved = [generator.normal(0, 0.5, 60) for _ in range(2)]
    files = [write_jsonl(tmp_path / "0.jsonl", rows)]
    for number, shift in enumerate(moved, start=1):
        other = [
            row | {"tuple": [row["tuple"][0] + by, 1.0]}
            for row, by in zip(rows, shift, strict=True)
        ]
        files.append(write_jsonl(tmp_path / f"{number}.jsonl", other[::-1]))
    found = drift([read_scores(path, "fixed") for path in files])
    for name, entry in found.items():
        kept = [n for n, row in enumerate(rows) if name == "all" or row["category"].endswith(name)]
        runs = [[rows[n]["tuple"][0] + shift[n] for n in kept] for shift in ([0] * 60, *moved)]
        means = [10 * sum(run) / len(run) for run in runs]
        assert entry["reference"] == pytest.approx(means)
        assert entry["spread"] == pytest.approx(max(means) - min(means))
        sds = [np.std([run[n] for run in runs], ddof=1) for n in range(len(kept))]
        assert entry["question_sd"] == pytest.approx(10 * sum(sds) / len(sds))
        ours = 10 * np.mean([rows[n]["tuple"][1] for n in kept])
        shift = 100 * ours / min(means) - 100 * ours / max(means)
        assert entry["relative_shift"] == pytest.approx(shift)


def test_the_command_prints_the_table_and_writes_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = str(write_jsonl(tmp_path / "a.jsonl", synthetic(5)))
    b = str(write_jsonl(tmp_path / "b.jsonl", synthetic(6, 1.0)))
    out = tmp_path / "deep" / "scores.json"
    words = ["score", "--reviews", a, b, "--compare", b, "--out", str(out), "--bootstrap", "50"]
    main(words)
    text = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert text.count("relative  ") == 2 and "drift of the reference" in text
    entry = report["files"][0]["scores"]["complex"]
    row = next(line for line in text.splitlines() if line.startswith("complex"))
    low, high = entry["relative_interval"]
    assert row.split() == [
        *("complex", "28", "0", f"{entry['relative']:.1f}", f"[{low:.1f},", f"{high:.1f}]"),
        *(f"{entry['reference']:.1f}", f"{entry['model']:.1f}"),
    ]
    assert report["files"][1]["difference"]["all"]["p"] == 1 and report["mode"] == "fixed"
    main(words)
    assert json.loads(out.read_text()) == report
    capsys.readouterr()
    for other in (["--seed", "3"], ["--mode", "as_paper"], ["--reviews", a]):
        with pytest.raises(SystemExit):
            main([*words, *other])
        assert "is the result of another store, model or k-SAE" in capsys.readouterr().err
        assert json.loads(out.read_text()) == report


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "holds no reviews"),
        ('{"question_id": 1, "category": "llava_bench_conv"}', "review 1 lacks tuple"),
        ('{"question_id": 1, "category": "conv", "tuple": [1]}', "review 1: tuple must be"),
        ('{"question_id": 1, "category": "conv", "tuple": [1, NaN]}', "NaN is no JSON number"),
        ('{"category": "conv", "tuple": [1, 2]}', "review 1 lacks question_id"),
        ('{"question_id": 1, "category": "conv", "tuple": null}', "its 1 review is a failure"),
        (
            '{"question_id": 1, "category": "conv", "tuple": [3, 2]}\n' * 2,
            "question 1 .* more than",
        ),
        ("[1, 2]", "line 1 must be a JSON object"),
    ],
)
def test_a_broken_review_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_scores(path, "fixed")
    with pytest.raises(SystemExit) as caught:
        main(["score", "--reviews", str(path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("llava_bench: ") and error.count("\n") == 1


def llavas_own(rows: list[dict]) -> list[str]:
    """LLaVA's summarize_gpt_review, as published: which lines it prints for a file's reviews."""
    scores: dict[str, list] = {}
    for row in rows:
        if "category" in row:
            scores.setdefault(row["category"], []).append(row["tuple"])
            scores.setdefault("all", []).append(row["tuple"])
        elif "tuple" in row:
            scores.setdefault("all", []).append(row["tuple"])
        else:
            scores.setdefault("all", []).append(row["score"])
    lines = []
    for name, pairs in sorted(scores.items()):
        stats = np.asarray(pairs).mean(0).tolist()
        stats = [round(x, 3) for x in stats]
        lines.append(
            f"{name} {round(stats[1] / stats[0] * 100, 1)} "
            f"{round(stats[0] * 10, 1)} {round(stats[1] * 10, 1)}"
        )
    return lines


@pytest.mark.parametrize("form", ["tuple", "score", "no category"])
def test_the_table_shows_what_llavas_summary_prints(tmp_path: Path, form: str) -> None:
    for seed in range(15):
        rows = [dict(row) for row in synthetic(seed)]
        for row in rows:
            if form != "tuple":
                row.pop("category")
            if form == "score":
                row["score"] = row.pop("tuple")
        scores = read_scores(write_jsonl(tmp_path / f"{form}{seed}.jsonl", rows), "fixed")
        expected = llavas_own(rows)
        assert llava_summary("x", scores.reviews, "fixed").splitlines()[1:-1] == expected
        shown = score_table(table(scores, **HOW)).splitlines()[1:]
        for line in expected:
            name, *numbers = line.split()
            row = next(r for r in shown if r.split()[0] == name.removeprefix("llava_bench_"))
            assert [row.split()[3], *row.split()[-2:]] == numbers


def test_a_byte_order_mark_and_every_wrong_line_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", synthetic(0))
    marked = tmp_path / "b.jsonl"
    marked.write_text("\ufeff" + path.read_text())
    assert read_scores(marked, "fixed").ids == read_scores(path, "fixed").ids
    bad = ["{", "3", '{"question_id": {}, "tuple": [1, 2]}', "[" * 50_000]
    marked.write_text("\n".join(bad))
    with pytest.raises(ValueError) as caught:
        read_scores(marked, "fixed")
    said = str(caught.value)
    assert all(f"line {number}" in said for number in (1, 2, 3, 4)) and "\n" not in said
    assert "nested" in said
