"""The proof's scores: greedy answers without generating, intervals, paired gains, and its page."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from llava_helpers import model_config, picture, tiny_llama, tower_configs

from llava_ext.dataset import Collator, ConversationDataset
from llava_ext.language import build_model
from llava_ext.llava_json import Record
from llava_ext.templates import Turn
from llava_ext.towers import load_towers
from revelio.stats import paired, trainings95
from tools.llava_proof.page import bench_part, render
from tools.llava_proof.proof import Places, Settings
from tools.llava_proof.questions import Photos, Question
from tools.llava_proof.report import bench_figures
from tools.llava_proof.score import (
    accuracy,
    by_kind,
    difference,
    probe,
    right_answers,
    wrong_tokens,
)

ANSWERS = ["a cat", "it is a dog", "green", "no"]


class Grids:
    """Grids of the towers as the cache would give them."""

    def __init__(self, towers) -> None:
        self.towers = towers

    def get(self, name: str) -> tuple[torch.Tensor, ...]:
        image = picture(len(name))
        return tuple(tower.grids(tower.pixels(image)[None], [name])[0] for tower in self.towers)

    def stack(self, images):
        return {"grids": tuple(torch.stack(column) for column in zip(*images, strict=True))}


@pytest.fixture
def asked(tmp_path: Path):
    towers = tower_configs(tmp_path)
    config = model_config(tiny_llama(tmp_path / "lm"), towers["clip"], template="tokenizer")
    loaded = load_towers(config)
    model, tokenizer = build_model(config, loaded)
    records = [
        Record(
            f"r{i}", ("x" * (i + 1),), (Turn("user", "<image>\nwhat is it?"), Turn("assistant", a))
        )
        for i, a in enumerate(ANSWERS)
    ]
    dataset = ConversationDataset(records, tokenizer, config, model.image_tokens, Grids(loaded))
    return model.eval(), dataset


def test_missed_tokens_are_counted_as_the_full_logits_say(asked) -> None:
    model, dataset = asked
    batch = Collator(model.image_tokens, 0, dataset.images.stack)(
        [dataset[i] for i in range(len(dataset))]
    )
    found = wrong_tokens(model, batch)
    for row in range(len(dataset)):
        one = Collator(model.image_tokens, 0, dataset.images.stack)([dataset[row]])
        with torch.no_grad():
            spliced = model.embed(
                one["input_ids"], one["attention_mask"], one["labels"], one["grids"]
            )
            logits = model.language_model(inputs_embeds=spliced.embeddings).logits[0]
        missed = 0
        for place, label in enumerate(spliced.labels[0].tolist()):
            if label >= 0 and int(logits[place - 1].argmax()) != label:
                missed += 1
        assert int(found[row]) == missed


def test_an_answer_is_right_once_it_is_learnt(asked) -> None:
    model, dataset = asked
    assert not any(
        {k: v for part in right_answers(model, dataset) for k, v in part.items()}.values()
    )
    model.requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = Collator(model.image_tokens, 0, dataset.images.stack)(
        [dataset[i] for i in range(len(dataset))]
    )
    for _ in range(80):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    right = {k: v for part in right_answers(model, dataset) for k, v in part.items()}
    assert right == {f"r{i}": True for i in range(len(ANSWERS))}


def test_accuracies_and_differences_are_over_trainings_and_questions() -> None:
    trainings = [[True, False, True, True], [True, True, True, False]]
    found = accuracy(trainings)
    assert (found["value"], found["of"], found["trainings"]) == (0.75, 4, [0.75, 0.75])
    assert found["low"] == pytest.approx(trainings95([0.75, 0.75], 4)[0], abs=1e-4)
    gap = difference(trainings, [[False, False, True, True]])
    wanted = paired(np.array(trainings), np.array([[False, False, True, True]]))
    assert (gap["value"], gap["trainings"]) == (0.25, 1)
    assert gap["high"] == pytest.approx(wanted.interval[1], abs=1e-4)


def test_the_probe_reads_the_tokens_that_the_projectors_get() -> None:
    """Separable where the classes differ in a token of the second tower, at chance where they don't."""
    photos = Photos(
        tuple(f"{i}.jpg" for i in range(40)), tuple(i % 2 for i in range(40)), ("a", "b")
    )

    class Tokens:
        def __init__(self, gap: float) -> None:
            self.gap = gap

        def get(self, name: str) -> tuple[torch.Tensor, ...]:
            number = int(name.split(".")[0])
            random = torch.Generator().manual_seed(number)
            grids = [torch.randn(3, 2, 2, generator=random) for _ in range(2)]
            grids[1][2, 1, 1] += self.gap * (number % 2)
            return tuple(grids)

    test = Photos(tuple(f"{i}.jpg" for i in range(40, 80)), photos.labels, photos.nouns)
    right, strength = probe(Tokens(30.0), photos, test)  # type: ignore[arg-type]
    assert sum(right) >= 30 and strength in (1e-3, 1e-2, 1e-1)
    blind, _ = probe(Tokens(0.0), photos, test)  # type: ignore[arg-type]
    assert 8 <= sum(blind) <= 28


def test_the_page_says_first_what_was_not_reached() -> None:
    questions = [
        Question(f"{i}#{kind}", f"{i}.jpg", kind, "?", "!", 0.5)
        for i in range(10)
        for kind in ("open", "yes-no" if i % 2 else "choice")
    ]
    right = {q.question_id: q.category == "open" and q.image >= "4" for q in questions}
    kinds = by_kind(questions, right)
    assert [sum(kinds[kind]) for kind in ("open", "yes-no", "choice")] == [6, 0, 0]
    assert "yes-no" not in by_kind(questions, {f"{i}#open": True for i in range(10)})
    report = {"first_loss": 5.0, "last_loss": 0.5, "steps": 9}
    row = {name: accuracy([kinds[name]]) for name in ("open", "yes-no", "choice")}
    row |= {"blind": accuracy([[False] * 10]), "probe": accuracy([[True] * 10])}
    row |= {"of_probe": 0.6, "stages": {"pretrain": [report], "finetune": [report]}}
    over = difference([kinds["open"]], [[False] * 10])
    near = difference([[True] * 8 + [False] * 2], [[0.8] * 9 + [0.0]])
    assert (near["value"], near["low"] > 0) == (0.08, False)
    page = render(
        {
            "data": {
                "classes": ["a"] * 20,
                "records": {"pretrain": 800, "finetune": 1600, "held-out": 20},
                "held_out_images": 10,
            },
            "rows": {
                "clip": row,
                "clip-sd-t25": row | {"above_clip": over, "probe_above_clip": over},
                "clip-dinov2": row | {"of_probe": 0.85, "above_goal": near},
                "clip-sd-t200": row | {"of_probe": 0.95, "above_goal": over},
            },
            "settings": {"seeds": 1, "questions": 2},
            "command": "python x",
        }
    )
    assert page.index("**Not reached:** CLIP reaches 60 % of its probe") < page.index("| row |")
    assert "Above 80 % of the probe: CLIP + ViT-S/14 (DINOv2 layout), by 8.0 [" in page
    assert "points, not told apart from it; CLIP + SD up_ft1, t = 200, by 60.0 [23.1, 96.9]" in page
    assert "| CLIP | 60.0 [31.3, 83.2] | 100.0 [72.2, 100.0] | 60 % | 0.0 [0.0, 27.8] |" in page
    assert "t = 25 answers more than CLIP alone by 60.0 [23.1, 96.9] points (one training" in page
    assert "CLIP: stage 1 5.00 to 0.50 in 9 steps, stage 2 5.00 to 0.50 in 9 steps" in page


def test_the_page_shows_answers_to_the_bench(tmp_path: Path) -> None:
    places = Places(Settings(tmp_path, out=tmp_path), tmp_path)
    answers = ["a cat", "a dog on the grass"]
    lines = [
        {"prompt": f"What is\nin picture {number}?", "text": answers[number % 2]}
        for number in range(9)
    ]
    places.bench_answers("clip").parent.mkdir()
    places.bench_answers("clip").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = bench_figures(places, "clip")
    assert (found["answers"], found["different_answers"], found["words"]) == (9, 2, 3.3)
    part = bench_part(found)
    assert "| What is in picture 1? | a dog on the grass |" in part
    assert "picture 8" not in part


def test_quick_is_smaller_and_lies_elsewhere() -> None:
    whole = Settings(Path("c"))
    assert whole.sized() == whole
    quick = Settings(Path("c"), quick=True).sized()
    assert (quick.seeds, quick.out) == (1, whole.out / "quick")
    assert quick.train_images < whole.train_images
    trainings = Places(whole, Path()).trainings
    assert [one.row for one in trainings[:4]] == list(whole.rows)
    assert [one.seed for one in trainings[::4]] == [0, 1, 2]
