"""What LLaVA-Bench said of the vision-language models of Tables 4 and 10, beside the paper's numbers.

The models are trained and judged by the LLaVA extension; here its tables of scores are read. A file may hold
several trainings' reviews. What the choice of questions changes is taken from the file's interval, as if each
model had been asked other questions: of differences that says too little rather than too much.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from revelio.analysis.paired import SUBSETS
from revelio.pipelines.reproduce_rows import Found, over_trainings
from revelio.reproduce.row import Row
from revelio.reproduce.rows import pairs
from revelio.seeds import key_seed
from revelio.trust import read_object

# What LLaVA-Bench's file calls what the paper's table has, and its models by their configs.
_KEYS = {"relative": "relative", "judge_ref_x10": "reference", "judge_model_x10": "model"}
_MODELS = {
    "clip": "mpt-7b-chat + clip",
    "clip-dinov2": "mpt-7b-chat + clip+dinov2",
    "clip-sd-t25": "mpt-7b-chat + clip+sd1.5 t=25",
    "clip-sd-t200": "mpt-7b-chat + clip+sd1.5 t=200",
}
LARGEST = 1e6  # of scores, which are from 0 to 10, or shares of the reference's in percent
NOT_GIVEN = "made by its own commands: give what LLaVA-Bench said of it in scores"


def scored(rows: Iterable[Row], given: Iterable[str], seed: int) -> dict[Row, Found]:
    """Every row's score, or that there is none.

    Args:
        rows: of a table of vision-language models.
        given: ``NAME=FILE``.
        seed: of the order of what questions change.

    Raises:
        ValueError: a name that is none of the four models', or a file that holds no scores.
    """
    files = pairs(given, "")
    if unknown := files.keys() - _MODELS:
        raise ValueError(
            f"scores of {min(unknown)!r}, which is no model of the table: {', '.join(_MODELS)}"
        )
    by_model = {_MODELS[name]: _entries(Path(path)) for name, path in files.items()}
    return {row: _found(row, by_model.get(row.model, []), seed) for row in rows}


def _entries(path: Path) -> list[dict[str, Any]]:
    found = read_object(path).get("files")
    parts = found if isinstance(found, list) else []
    scores = [one["scores"] for one in parts if isinstance(one, dict) and "scores" in one]
    if not scores or not all(isinstance(one, dict) for one in scores):
        raise ValueError(
            f"{path} holds no scores: give the JSON that `revelio llava-bench score` wrote"
        )
    return scores


def _found(row: Row, trainings: list[dict[str, Any]], seed: int) -> Found:
    category, key = row.dataset.partition(":")[2], _KEYS.get(row.metric, "")
    parts = [_category(one, category) for one in trainings]
    known = [one for one in parts if _is_number(one.get(key)) and _interval(one, key)]
    if not known:
        return {"missing": NOT_GIVEN}
    draw = np.random.default_rng(key_seed(seed, row.name, row.metric))
    # Normal deviates that stand for the subsets of the questions.
    deviates = draw.permutation(norm.ppf((np.arange(SUBSETS) + 0.5) / SUBSETS))
    widths = [np.ptp(one[f"{key}_interval"]) / (2 * norm.ppf(0.975)) for one in known]
    found = over_trainings([one[key] for one in known], [(w * deviates).tolist() for w in widths])
    if len(known) == 1:
        interval = {"interval": known[0][f"{key}_interval"], "interval_kind": "over questions"}
        found |= interval
    return found | {"chance": None, "images": {"questions": known[0].get("questions")}}


def _interval(entry: Mapping[str, Any], key: str) -> bool:
    """Whether a score has an interval of two numbers."""
    found = entry.get(f"{key}_interval")
    return isinstance(found, list) and len(found) == 2 and all(map(_is_number, found))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


def _category(scores: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A category's entry; the reviews of LLaVA's own files call it by a longer name."""
    found = next(
        (one for key, one in scores.items() if key.removeprefix("llava_bench_") == name), {}
    )
    return found if isinstance(found, dict) else {}
