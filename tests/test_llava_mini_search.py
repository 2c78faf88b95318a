"""The search for learning rates: real trainings of tiny models, the choice against a plain loop, going on."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from backbones_helpers import picture
from llava_train_helpers import tiny_project

from revelio.cli import main
from revelio.config import to_plain
from revelio.run_dir import read_json
from tools.llava_proof import proof
from tools.llava_proof.page import rates_part
from tools.llava_proof.proof import Places, Settings, Training
from tools.llava_proof.questions import Photos, held_out_questions
from tools.llava_proof.search import compared, parts, search

RATES = ((1e-3,), (3e-4, 0.5))  # of stage 1, of stage 2
CLASSES = ("ant", "bee")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """Two classes of four training photographs, and a row of one tiny tower."""
    caltech = tmp_path / "caltech101"
    for number, name in enumerate(CLASSES):
        (caltech / "images" / name).mkdir(parents=True)
        for index in range(5):
            picture(10 * number + index).save(caltech / "images" / name / f"{index}.png")
    names = [f"{name}/{index}.png\n" for name in CLASSES for index in range(4)]
    (caltech / "train.txt").write_text("".join(names))
    (caltech / "test.txt").write_text("ant/4.png\nbee/4.png\n")
    model = tiny_project(tmp_path / "models", records=1)
    stage = {"effective_batch": 2, "batch_size": 2, "zero": 0, "threads": 1, "save_steps": 9}
    rows = tmp_path / "configs" / "llava" / "mini"
    rows.mkdir(parents=True)
    values = {
        "model": to_plain(replace(model, towers=model.towers[:1])),
        "pretrain": {"stage": stage | {"learning_rate": 1e-2}},
        "finetune": {"stage": stage | {"learning_rate": 3e-4}},
    }
    (rows / "clip.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(proof, "CLASSES", CLASSES)
    settings = Settings(
        caltech, out=tmp_path / "out", rows=("clip",), train_images=4, captions=1, questions=2,
        pretrain_rates=RATES[0], finetune_rates=RATES[1], at_once=1,
    )  # fmt: skip
    return Places(settings, tmp_path)


def test_every_pair_is_trained_and_the_best_is_named(places, monkeypatch) -> None:
    typed: list[list[str]] = []
    logs: set[str] = set()

    def call(words: list[str], log: Path) -> None:
        typed.append(words[3:])
        logs.add(log.name)
        main(words[3:])

    monkeypatch.setattr(proof, "call", call)
    found = search(places)
    inside = replace(places, settings=replace(places.settings, out=places.settings.out / "search"))
    right = {}
    for first, second in ((a, b) for a in RATES[0] for b in RATES[1]):
        one = Training("clip", 0, (first, second))
        for stage, rate in (("pretrain", first), ("finetune", second)):
            used = yaml.safe_load((inside.run(one, stage) / "config.yaml").read_text())
            assert used["stage"]["learning_rate"] == rate
        answers = read_json(inside.run(one, "finetune") / "right-held-out.json")
        right[first, second] = sum(answers[f"{name}/3.png#open"] for name in CLASSES)
    best = next(pair for pair in right if right[pair] == max(right.values()))
    row = found["rows"]["clip"]
    assert row["best"] == {"pretrain": best[0], "finetune": best[1]}
    assert [round(2 * one["open"]["value"]) for one in row["pairs"]] == list(right.values())
    # Stage 1 once for both; no held-out photograph was looked at.
    assert [words[1] for words in typed] == ["cache", "pretrain", "finetune", "finetune"]
    assert found["photographs"] == {"learnt": 6, "asked": 2}
    assert not any("/4.png" in file.read_text() for file in inside.data("x").parent.iterdir())
    assert row["configured"] == {"pretrain": 1e-2, "finetune": 3e-4}
    assert found["command"].endswith(
        "--search --rows clip --pretrain-rates 0.001 --finetune-rates 0.0003 0.5"
    )
    assert logs - {"cache.log"} == {
        "pretrain-0.001.log",
        "finetune-0.001-0.0003.log",
        "finetune-0.001-0.5.log",
    }
    typed.clear()
    assert search(places) == found and [words[1] for words in typed] == ["cache"]


def test_pairs_are_compared_with_the_first_best_one() -> None:
    answers = {
        (1e-3, 1e-3): [True, False, False, True],
        (1e-3, 1e-2): [True, True, True, False],
        (1e-2, 1e-2): [True, True, True, False],
    }
    found = compared({pair: [own] for pair, own in answers.items()})
    used = {"configured": {"pretrain": 1e-3, "finetune": 1e-3}}
    assert found["best"] == {"pretrain": 1e-3, "finetune": 1e-2}
    said = {
        "command": "c", "photographs": {"learnt": 1200, "asked": 4}, "rows": {"clip": found | used}
    }  # fmt: skip
    page = rates_part({"c": said}, {"classes": CLASSES})
    assert "1,200 photographs to learn from, 4 to ask about, 2 classes" in page
    assert "| CLIP | 0.001 | 0.01 | 75.0 [30.1, 95.4] | the best |" in page
    assert "| CLIP | 0.001 | 0.001 | 50.0 [" in page and "| 25.0 [" in page
    assert "CLIP is trained with 0.001 and 0.001, not told apart from the best pair (25.0 [" in page
    for other, words in ((1e-2, ", the best pair."), (0.1, ", which was not tried.")):
        used = {"configured": {"pretrain": 1e-3, "finetune": other}}
        page = rates_part({"c": said | {"rows": {"clip": found | used}}}, {"classes": CLASSES})
        assert f"CLIP is trained with 0.001 and {other:g}{words}" in page
    assert "No search was measured" in rates_part(None, {"classes": CLASSES})
    assert [one["open"]["value"] for one in found["pairs"]] == [0.5, 0.75, 0.75]
    below = [one["below_best"]["value"] for one in found["pairs"] if "below_best" in one]
    assert below == [0.25, 0.0]


def test_a_quarter_of_each_class_is_asked_about() -> None:
    names = [(f"{label}/{index}", label) for index in range(9) for label in (0, 1)]
    train = Photos(tuple(one for one, _ in names), tuple(label for _, label in names), CLASSES)
    learnt, asked = parts(train)
    assert set(asked.files) == {"0/7", "0/8", "1/7", "1/8"}
    assert set(learnt.files) == set(train.files) - set(asked.files)
    for some in (learnt, asked):
        assert [int(name[0]) for name in some.files] == list(some.labels)
    assert {question.image for question in held_out_questions(asked)} == set(asked.files)
    with pytest.raises(ValueError, match=r"3 training photographs of 'ant' are too few .*give 4"):
        parts(Photos(("a", "b", "c"), (0, 0, 0), ("ant",)))
