"""What :mod:`tools.evidence_proof` measured of a case, gathered for the page and its JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revelio.analysis.paired import strongest
from revelio.config import read_yaml
from revelio.evaluation.controls import TRAINED
from revelio.evaluation.identity import planted_together, stability_verdicts
from revelio.evaluation.judge import over_trainings
from revelio.trust import read_json

RECIPE = ("k", "expansion", "steps", "batch_size", "learning_rate", "decay")
# Stages of several trainings.
TOGETHER = ("trained", "batch-topk", "matryoshka", "more")


def gathered(work: Path) -> dict[str, Any]:
    """The results of all stages, without the single trainings' differences."""
    judged = read_json(work / "recipe" / "evaluation.json")
    entries = list(judged["ksaes"].values())
    measures = over_trainings([one["measures"] for one in entries])
    recipe = read_yaml(next((work / "ksae" / "recipe").glob("*/config.yaml")))
    found: dict[str, Any] = {
        "recipe": {name: recipe[name] for name in RECIPE},
        "images": judged["images"],
        "trainings": len(entries),
        "interval_method": judged["interval_method"],
        "latents": [one["latents"]["k-SAE"] for one in entries],
        "controls": _values(entries[0]["measures"]),
        "stability": judged["stability"],
        "stability_verdict": stability_verdicts(judged["stability"]),
        "versions": judged["versions"],
    }
    if inside := [one["in_model"] for one in entries if "in_model" in one]:
        found |= {"loss_images": inside[0]["images"], "loss": inside[0]["loss"]}
    planted = _stage(work / "planted.json")
    if planted:
        found |= planted_together(planted)
    found |= distinct(work)
    if loss := _stage(work / "loss.json"):
        inside = [one["measures"] for one in loss]
        measures |= over_trainings(inside) if len(inside) > 1 else {}
        found["controls"] |= _values(inside[0])
        found["loss_images"] = loss[0]["images"]
        # Of the trainings their folders' names: where they lay is nobody's matter.
        found["loss"] = {Path(name).name: value for name, value in loss[0]["loss"].items()}
    found["measures"] = measures
    if where := _stage(work / "where.json"):
        found["what_the_mean_does"] = where
    for name in TOGETHER:
        path = work / name / "evaluation.json"
        if path.is_file():
            entries = list(read_json(path)["ksaes"].values())
            found[name] = _beside([one["measures"] for one in entries], name == "trained")
    for name in ("by-k", "before"):
        path = work / name / "evaluation.json"
        if path.is_file():
            found[name] = {
                Path(run).name.split("-")[0]: {
                    measure: _short(each) for measure, each in entry["measures"].items()
                }
                for run, entry in read_json(path)["ksaes"].items()
            }  # fmt: skip
    return found


def distinct(work: Path) -> dict[str, Any]:
    """What the fresh trainings said of stability, without the single pairs; nothing where there are none."""
    path = work / "distinct.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    pairs = len(found["stability"]["k-SAE"]["0.7"]["pairs"])  # both orders of each
    for kind in ("stability", "distinct_stability"):
        for entry in found[kind].values():
            for level in entry.values():
                del level["pairs"]
    return {"distinct": found | {"trainings": round((1 + (1 + 4 * pairs) ** 0.5) / 2)}}


def _beside(entries: Sequence[Mapping[str, Any]], trained: bool) -> dict[str, Any]:
    """Several trainings beside the controls that were trained, or the others."""
    own = [
        {
            measure: one | {"controls": kept}
            for measure, one in entry.items()
            if (kept := {n: c for n, c in one["controls"].items() if (n in TRAINED) == trained})
        }
        for entry in entries
    ]
    values = {
        measure: {
            name: sum(entry[measure]["controls"][name]["value"] for entry in own) / len(own)
            for name in one["controls"]
        }
        for measure, one in own[0].items()
    }
    return {"measures": over_trainings(own), "controls": values, "trainings": len(own)}


def _stage(path: Path) -> list[Any]:
    return read_json(path) if path.is_file() else []


def _values(measures: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The controls' values by measure; they are the same for all trainings of a recipe."""
    return {
        measure: {name: one["value"] for name, one in entry["controls"].items()}
        for measure, entry in measures.items()
    }


def _short(entry: Mapping[str, Any]) -> dict[str, Any]:
    found = strongest(entry)
    assert found is not None, "every measure has controls"
    name, control = found
    return {
        "value": entry["value"], "verdict": entry["verdict"],
        "control": name, "control_value": control["value"], "difference": control["difference"],
    }  # fmt: skip
