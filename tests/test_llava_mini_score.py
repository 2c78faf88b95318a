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
from tools.llava_proof.proof import Places, Settings
from tools.llava_proof.questions import Question
from tools.llava_proof.report import bench_figures, bench_part, render
from tools.llava_proof.score import accuracies, gain, interval, right_answers, wrong_tokens

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


def test_the_interval_is_wilsons() -> None:
    found = interval(30, 40)
    share, count, z = 0.75, 40, 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = share * (1 - share) / count + z**2 / (4 * count**2)
    half = z * np.sqrt(spread) / (1 + z**2 / count)
    assert found["value"] == share
    assert found["low"] == pytest.approx(middle - half, abs=1e-4)
    assert found["high"] == pytest.approx(middle + half, abs=1e-4)


def test_gains_are_paired_and_other_questions_refused() -> None:
    first = {str(i): i % 4 != 0 for i in range(40)}
    second = {str(i): i % 2 == 0 for i in range(40)}
    differences = np.array([float(first[k]) - float(second[k]) for k in first])
    half = 2.022691 * differences.std(ddof=1) / np.sqrt(40)  # Student's t, 39 degrees
    found = gain(first, second)
    assert found["value"] == pytest.approx(differences.mean(), abs=1e-4)
    assert found["high"] == pytest.approx(differences.mean() + half, abs=1e-4)
    with pytest.raises(ValueError, match="different questions"):
        gain(first, {"0": True})


def questions() -> list[Question]:
    kinds = (("open", 0.05), ("yes-no", 0.5), ("choice", 0.25))
    return [
        Question(f"{i}#{kind}", f"{i}.jpg", kind, "?", "!", chance)
        for i in range(10)
        for kind, chance in kinds
    ]


def test_the_page_shows_what_was_measured() -> None:
    asked = questions()
    right = {q.question_id: q.category == "yes-no" for q in asked}
    blind = dict.fromkeys(right, False)
    row = {
        "accuracy": accuracies(asked, right),
        "blind": accuracies(asked, blind),
        "gain_over_blind": gain(right, blind),
        "gain_over_clip": None,
    }
    assert row["accuracy"]["all"]["chance"] == pytest.approx(0.8 / 3, abs=1e-4)
    page = render(
        {
            "data": {
                "classes": ["a"] * 20,
                "records": {"pretrain": 800, "finetune": 1600, "held-out": 30},
                "held_out_images": 10,
            },
            "rows": {"clip": row},
            "growth": {"row": "clip", "points": [{"samples": 400} | interval(5, 10)]},
            "command": "python x",
            "seed": 0,
        }
    )
    assert "| CLIP | 33.3 [" in page
    assert "| 100.0 [72.2, 100.0] |" in page
    assert "| chance | 26.7 | 5.0 | 50.0 | 25.0 |" in page
    assert "| 400 | 50.0 [" in page


def test_the_page_shows_answers_to_the_bench(tmp_path: Path) -> None:
    places = Places(Settings(tmp_path, out=tmp_path), tmp_path)
    asked = [f"What is\nin picture {number}?" for number in range(9)]
    rows = {}
    for row, answers in (("clip", ["a cat", "a dog"]), ("clip-dinov2", ["yes"])):
        lines = [
            {"prompt": question, "text": answers[number % len(answers)]}
            for number, question in enumerate(asked)
        ]
        places.bench_answers(row).parent.mkdir()
        places.bench_answers(row).write_text("".join(json.dumps(line) + "\n" for line in lines))
        rows[row] = bench_figures(places, row)
    assert (rows["clip"]["answers"], rows["clip"]["different_answers"]) == (9, 2)
    part = bench_part({"bench": rows})
    assert "CLIP + DINOv2 layout: 9 answers, 1 different ones" in part
    assert "| What is in picture 1? | a dog | yes |" in part
    assert "picture 8" not in part
