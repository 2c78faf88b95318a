"""An evaluation as text: a line a measure, with its strongest control and the verdict.

In a model card it is a section of its own, between two marks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from revelio.analysis.paired import strongest
from revelio.evaluation.measures import STRONGEST
from revelio.text_tables import markdown_table
from revelio.trust import markdown, printable
from revelio.wording import plural

HEAD = ("measure", "k-SAE", "strongest control", "difference", "verdict")
# Below so many latents a mean over them is said to say little.
FEW = 20
# What several trainings say together, by its heading.
TOGETHER = {
    "stability": "Stability over trainings",
    "distinct_stability": "Stability of distinct latents: near-duplicates above the cosine counted once",
    "planted": "Planted directions",
}
START, END = "<!-- revelio eval-ksae -->", "<!-- /revelio eval-ksae -->"


def page(result: Mapping[str, Any]) -> str:
    """The whole result in Markdown."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield "# k-SAEs beside their controls"
    yield ""
    over = result.get("over", "pooled")  # of before, all were
    of = "" if over == "pooled" else f" Codes of an image: the {over} over its cells."
    yield f"{plural(result['images'], 'held-out image')} of {markdown(result['store'])}.{of}"
    yield f"Intervals of differences: {result['interval_method']}."
    for name, entry in result["ksaes"].items():
        yield from ("", f"## {markdown(name)}", "", table(entry["measures"]))
        yield from ("", *latents(entry.get("latents", {})))
        if left := entry["not_measured"]:
            yield from ("", f"Too few images, classes or live latents for: {', '.join(left)}.")
    if "over_trainings" in result:
        yield from ("", "## All trainings together", "")
        together = result["over_trainings"].items()
        means = [(name, f"{one['value']:.3f}", one["verdict"]) for name, one in together]
        yield markdown_table([("measure", "mean", "verdict"), *means], "lrl")
    for what, title in TOGETHER.items():
        if what in result:
            yield from ("", f"## {title}", "", _levels(result[what]))
        for level, entry in result.get(f"{what}_verdict", {}).items():
            yield from ("", f"Above {level}: {entry['verdict']}.")
    yield from ("", *(f"- {markdown(note)}" for note in result["notes"]))


def table(measures: Mapping[str, Any]) -> str:
    """The table of one k-SAE."""
    rows: list[Sequence[str]] = [HEAD]
    for measure, entry in measures.items():
        found = strongest(entry)
        if found is None:
            rows.append((measure, f"{entry['value']:.3f}", "", "", entry["verdict"]))
            continue
        best, control = found
        low, high = control["difference"]["interval"]
        beside = f"{control['value']:.3f} ({best})"
        gap = f"{control['difference']['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append((measure, f"{entry['value']:.3f}", beside, gap, entry["verdict"]))
    return markdown_table(rows, "lrrrl")


def latents(firing: Mapping[str, Any]) -> Iterator[str]:
    """Of how many latents the measures of purity are means, by model; a warning where they are few."""
    counts = {name: min(one["more_than_10_images"], STRONGEST) for name, one in firing.items()}
    if not counts:
        return
    said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    yield f"Latents that measures of purity are means over (active on more than 10 images): {said}."
    ours = next(iter(counts.values()))
    if ours < FEW:
        yield f"**Few: with {plural(ours, 'latent')} of the k-SAE these measures say little of the whole.**"


def _levels(found: Mapping[str, Any]) -> str:
    rows = [("", "cosine above 0.7", "above 0.9")]
    for name, entry in found.items():
        if isinstance(entry, Mapping) and "0.7" in entry:
            shares = [entry[level] for level in ("0.7", "0.9")]
            values = [one["value"] if isinstance(one, Mapping) else one for one in shares]
            rows.append((name, f"{values[0]:.1%}", f"{values[1]:.1%}"))
    return markdown_table(rows, "lr")


def section(result: Mapping[str, Any], ksae: str) -> str:
    """The measures of one k-SAE of an evaluation, each with its strongest control and the verdict."""
    lines = [
        START,
        "## Beside its controls",
        "",
        f"{plural(result['images'], 'held-out image')} of {printable(result['store'])}. Intervals of "
        f"differences: {result['interval_method']}.",
        "",
        table(result["ksaes"][ksae]["measures"]),
        "",
        *latents(result["ksaes"][ksae].get("latents", {})),
    ]
    notes = [f"- {note}" for note in result["notes"]]
    return "\n".join([*lines, *(["", *notes] if notes else []), END])


def with_section(card: str, made: str) -> str:
    """A card with this section in the place of an earlier one, or at its end; the rest stays as it is."""
    earlier = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if earlier.search(card):
        return earlier.sub(lambda _: made, card, count=1)
    return f"{card.rstrip()}\n\n{made}\n"
