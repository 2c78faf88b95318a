"""The proof's figures, `llava_mini.json`, and the page rendered from them: no number is typed by hand."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llava_ext.checkpoint import load_model
from llava_ext.config import TowerConfig
from llava_ext.dataset import ConversationDataset
from llava_ext.llava_json import image_names, read_records
from llava_ext.tower_cache import CachedGrids
from llava_ext.towers import load_towers
from revelio.run_dir import read_json, sha256, versions, write_json
from tools.llava_proof.inside import carried, leaked
from tools.llava_proof.proof import CLASSES, Places, Training, answer_bench, photos
from tools.llava_proof.questions import KINDS, Question, held_out_questions
from tools.llava_proof.score import accuracy, by_kind, difference, probe, right_answers

Figures = dict[str, Any]
SHOWN = 6  # answers to LLaVA-Bench on the page
INSIDE = ("clip-sd-t25",)  # rows whose towers' latents are looked at
LEAKY = TowerConfig("mini-sd-photo", "up_ft1", timestep=25, tokens="pool", budget=16)
OF_PROBE, OF_VIT = 0.8, 0.7  # what was to be reached
NAMES = {
    "clip": "CLIP",
    "clip-dinov2": "CLIP + ViT-S/14 (DINOv2 layout)",
    "clip-sd-t25": "CLIP + SD up_ft1, t = 25",
    "clip-sd-t200": "CLIP + SD up_ft1, t = 200",
}


def measure(places: Places) -> Figures:
    """Score every finished training; what was scored before is read."""
    settings = places.settings
    questions = held_out_questions(photos(settings, "test", settings.test_images))
    with ThreadPoolExecutor(settings.at_once) as pool:
        wanted = [(one, data) for one in places.trainings for data in ("held-out", "blind")]
        list(pool.map(lambda each: scores(places, *each), wanted))
    right = {row: row_scores(places, row, questions) for row in settings.rows}
    found: Figures = {
        "data": data_figures(places, questions),
        "rows": {row: row_figures(places, row, right) for row in settings.rows},
        "made_with": versions(),
        "command": f"python -m tools.llava_mini --caltech101 FOLDER --seeds {settings.seeds}",
        "settings": {
            name: getattr(settings, name)
            for name in ("seeds", "train_images", "test_images", "captions", "questions", "quick")
        },
    }
    found["inside"] = inside_figures(places)
    if settings.bench:
        best = max(settings.rows, key=lambda row: found["rows"][row]["open"]["value"])
        answer_bench(places, best, settings.bench)
        found["bench"] = bench_figures(places, best)
        found["command"] += " --bench FOLDER"
    return found


def inside_figures(places: Places) -> Figures:
    """The tests inside the model, of the rows with two towers; kept beside the runs."""
    found: Figures = {"carried": {}}
    for row in [row for row in places.settings.rows if row in INSIDE]:
        kept = places.settings.out / row / "carried.json"
        if not kept.is_file():
            write_json(kept, carried(places, row))
        found["carried"][row] = read_json(kept)
    kept = places.settings.out / "leaked.json"
    if not kept.is_file():
        write_json(kept, leaked(places, LEAKY))
    return found | {"leaked": read_json(kept)}


def bench_figures(places: Places, row: str) -> Figures:
    """How many questions of LLaVA-Bench a row answered, and what it said to the first ones."""
    lines = places.bench_answers(row).read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    return {
        "row": row,
        "answers": len(answers),
        "different_answers": len({answer["text"] for answer in answers}),
        "words": round(sum(len(answer["text"].split()) for answer in answers) / len(answers), 1),
        "first": [
            {"question": answer["prompt"], "answer": answer["text"]} for answer in answers[:SHOWN]
        ],
    }


def data_figures(places: Places, questions: list[Question]) -> Figures:
    """What was trained on and asked, with the files' hashes."""
    names = ("pretrain", "finetune", "held-out", "blind")
    files = {name: places.data(name) for name in names}
    return {
        "classes": list(CLASSES),
        "records": {name: len(read_json(path)) for name, path in files.items()},
        "sha256": {name: sha256(path) for name, path in files.items()},
        "held_out_images": len({question.image for question in questions}),
    }


def row_scores(places: Places, row: str, questions: list[Question]) -> Figures:
    """By kind, and blind, a list of right and wrong a training; and of the row's linear probe."""
    trainings = [one for one in places.trainings if one.row == row]
    seeing = [by_kind(questions, scores(places, one, "held-out")) for one in trainings]
    blind = [by_kind(questions, scores(places, one, "blind"))["open"] for one in trainings]
    kept = places.settings.out / row / "probe.json"
    if not kept.is_file():
        write_json(kept, probe_row(places, row))
    return {kind: [one[kind] for one in seeing] for kind in KINDS} | {
        "blind": blind,
        "probe": [read_json(kept)["right"]],
    }


def probe_row(places: Places, row: str) -> Figures:
    """The linear probe on a row's tokens of the same photographs."""
    settings = places.settings
    train = photos(settings, "train", settings.train_images)
    test = photos(settings, "test", settings.test_images)
    model, _ = load_model(places.run(Training(row, 0), "finetune") / "final")
    towers = load_towers(model.settings)
    names = [*train.files, *test.files]
    right, strength = probe(
        CachedGrids.open(places.cache, towers, places.images, names), train, test
    )
    return {"right": right, "strength": strength}


def row_figures(places: Places, row: str, right: dict[str, Figures]) -> Figures:
    """Accuracies with their intervals, the share of the probe's, differences, and what training took."""
    own = right[row]
    found: Figures = {name: accuracy(own[name]) for name in (*KINDS, "blind", "probe")}
    found["of_probe"] = round(found["open"]["value"] / found["probe"]["value"], 4)
    goal = [[OF_PROBE * one for one in each] for each in own["probe"]]
    found["above_goal"] = difference(own["open"], goal)
    found["above_blind"] = difference(own["open"], own["blind"])
    if row != "clip" and "clip" in right:
        found["above_clip"] = difference(own["open"], right["clip"]["open"])
        found["probe_above_clip"] = difference(own["probe"], right["clip"]["probe"])
    found["stages"] = {
        stage: [
            read_json(places.run(one, stage) / "report.json")
            for one in places.trainings
            if one.row == row
        ]
        for stage in ("pretrain", "finetune")
    }
    return found


def scores(places: Places, training: Training, data: str) -> dict[str, bool]:
    """Which questions a trained model answers rightly; kept beside the run."""
    kept = places.run(training, "finetune") / f"right-{data}.json"
    if not kept.is_file():
        write_json(kept, score(places, training, data))
    return read_json(kept)


def score(places: Places, training: Training, data: str) -> dict[str, bool]:
    """Ask a model all questions of a file, its towers' grids read from the cache."""
    from tqdm import tqdm

    model, tokenizer = load_model(places.run(training, "finetune") / "final")
    records = read_records(places.data(data), places.images)
    towers = load_towers(model.settings)
    images = CachedGrids.open(places.cache, towers, places.images, image_names(records))
    dataset = ConversationDataset(records, tokenizer, model.settings, model.image_tokens, images)
    right: dict[str, bool] = {}
    name = f"{training.row} {training.seed} {training.folder('finetune')} {data}"
    with tqdm(total=len(dataset), desc=name, unit="question") as bar:
        for some in right_answers(model, dataset):
            right |= some
            bar.update(len(some))
    return right
