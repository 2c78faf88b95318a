"""What the race says: the result as plain values, in words, and as configs that are ready to run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from math import isqrt
from typing import Any

import yaml

from revelio.advisor.candidates import Candidate
from revelio.advisor.config import AdviseConfig
from revelio.advisor.halving import SPARED, Round, contenders, preferred, ranked, share_again
from revelio.advisor.heat_map import short
from revelio.advisor.measures import Measured
from revelio.backbones.layers import LayerSpec
from revelio.data.config import DataConfig
from revelio.stats import paired, percent, proportion, rounded
from revelio.trust import printable
from revelio.wording import plural

# Tokens that a LLaVA tower gives at most (paper, Table 11).
TOKENS = 256
UNLABELLED = (
    "there are no labels, so nothing ranks these layers: the effective rank (RankMe) grows with a layer's "
    "width, has no interval here and knows nothing of what you want to tell apart; label a few images of "
    "each class for advice by accuracy"
)


def result_of(
    rounds: Sequence[Round], by: str, seconds: Mapping[Candidate, float], config: AdviseConfig
) -> dict[str, Any]:
    """The race as plain values, fit for JSON.

    ``recommended`` is the cheapest of the ``contenders``, which are not told apart from the best;
    ``runner_up`` is the best of all others. Without labels these two are where to begin, and no advice.
    """
    last = rounds[-1]
    best = preferred(last.found, by, config.confidence)[0]
    others = [one for one in ranked(last.found, by) if one != best]
    labelled = by in last.found[best].right
    entries = [_entry(one, rounds, seconds[one]) for one in rounds[0].found]
    place = {_key(entry): entry for entry in entries}
    equals = contenders(last.found, by, config.confidence)
    return {
        "judged_by": by,
        "labelled": labelled,
        "recommended": place[best],
        "runner_up": place[others[0]] if others else None,
        "contenders": [asdict(one) for one in equals],
        "share_again": share_again(last.found, by, config.confidence, config.seed)
        if labelled
        else None,
        "difference": _difference(last.found, best, others, by, config.confidence),
        "rounds": [
            {"images": one.images, "candidates": len(one.found), "left": len(one.left)}
            for one in rounds
        ],
        "candidates": entries,
    }


def _key(entry: Mapping[str, Any]) -> Candidate:
    return Candidate(**{field.name: entry[field.name] for field in fields(Candidate)})


def _entry(one: Candidate, rounds: Sequence[Round], seconds: float) -> dict[str, Any]:
    """A candidate as it was last measured."""
    last = next(each for each in reversed(rounds) if one in each.found)
    found = last.found[one]
    shares = {name: proportion(int(right.sum()), len(right)) for name, right in found.right.items()}
    return {
        **asdict(one),
        **shares,
        **{name: round(value, 4) for name, value in found.numbers.items()},
        "seconds": seconds,
        "images": last.images,
        "left": last.left.get(one),
    }


def _difference(
    found: Mapping[Candidate, Measured],
    best: Candidate,
    others: Sequence[Candidate],
    by: str,
    confidence: float,
) -> dict[str, Any] | None:
    """The recommended one minus the runner-up, paired on the same images."""
    if not others or by not in found[best].right:
        return None
    # Whichever of the others had come second would stand here: the interval holds for all of them.
    gap = paired(
        found[best].right[by], found[others[0]].right[by], 1 - (1 - confidence) / len(others)
    )
    return rounded(gap.value, gap.interval)


def in_words(result: Mapping[str, Any]) -> list[str]:
    """What is recommended, how sure it is, and what the runner-up costs; without labels, where to begin."""
    best, second = result["recommended"], result["runner_up"]
    if not result["labelled"]:
        return [f"to begin with, as its activations spread most: {_said(best, result)}", UNLABELLED]
    lines = [f"recommended: {_said(best, result)}"]
    if (equal := len(result["contenders"])) > 1:
        lines.append(
            f"it is the cheapest of {equal} that {plural(best['images'], 'image')} do not tell apart from "
            "the best"
        )
    if second is not None:
        lines.append(f"runner-up: {_said(second, result)}; {_price(best, second)}")
    gap = result["difference"]
    if gap is not None:
        apart = "surely better" if gap["low"] > 0 else "not told apart"
        lines.append(
            f"difference on the same {plural(best['images'], 'image')}: {percent(gap)} points, {apart}; it "
            f"is recommended again in {result['share_again']:.0%} of resamplings of the images"
        )
    control = result["control"]
    lines.append(f"control: with shuffled labels the same probe reaches {percent(control)} %")
    return lines + _departed(result)


def _departed(result: Mapping[str, Any]) -> list[str]:
    """Which models left the race, after how many images and why; and how much else left to spare passes."""
    by, lines = result["judged_by"], []
    entries = result["candidates"]
    for model in dict.fromkeys(entry["model"] for entry in entries):
        own = [entry for entry in entries if entry["model"] == model]
        if any(entry["left"] is None for entry in own):
            continue
        last = max(own, key=lambda entry: (entry["images"], entry[by]["value"]))
        lines.append(
            f"{printable(short(model))} left after {plural(last['images'], 'image')}, {last['left']}: it "
            f"reached {percent(last[by])} % at best ({last['layer']})"
        )
    if spared := sum(entry["left"] == SPARED for entry in entries):
        lines.append(
            f"{plural(spared, 'candidate')} left to spare passes, without being surely worse; of every model "
            "one pass stays until it is"
        )
    return lines


def _said(entry: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    by = result["judged_by"]
    found = f"{percent(entry[by])} %" if result["labelled"] else f"{entry[by]:.1f}"
    return f"{_key(entry)}: {by} {found}, {entry['seconds']:.3g} s an image"


def _price(best: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    ratio = second["seconds"] / max(best["seconds"], 1e-12)
    return f"{ratio:.2f} times the recommended one's seconds"


def diffc_yaml(best: Candidate, config: AdviseConfig) -> str:
    """A config of `revelio train-diffc` for the recommended layer."""
    backbone = _changed(config.backbone) | {"name": best.model}
    backbone.pop("device", None)
    plain = {
        "out": str(config.out / "diffc"),
        "data": _data(config.data),
        "backbone": backbone,
        "layer": best.layer,
        "timestep": best.timestep,
        "prompts": best.prompt,
        "seeds": 3,
    }
    return "# revelio train-diffc --config THIS FILE\n" + _dumped(plain)


def tower_yaml(best: Candidate, spec: LayerSpec, side: int, config: AdviseConfig, text: str) -> str:
    """The model part of a config of `revelio llava`, with the recommended layer as a tower behind CLIP."""
    grid = max(1, side // spec.stride)
    tower = {
        "backbone": best.model,
        "layer": best.layer,
        "timestep": best.timestep,
        "prompt": text,
        "tokens": "pool",
        "budget": min(isqrt(TOKENS), grid) ** 2,
        "image_size": config.backbone.image_size,
        "dtype": config.backbone.dtype,
    }
    clip = {"backbone": "clip-vit-l-14", "layer": "block22", "tokens": "flatten", "budget": TOKENS}
    language = {"language_model": "smollm2-135m-instruct", "template": "tokenizer", "system": ""}
    head = "# For `revelio llava pretrain` and `finetune`; the data is yours to add: see `revelio configs`.\n"
    return head + _dumped({"model": language | {"towers": [clip, tower]}})


def _data(config: DataConfig) -> dict[str, Any]:
    """Where the images come from: all of them, not the few that were measured."""
    changed = _changed(config) | {"source": config.source}
    return {key: value for key, value in changed.items() if key not in ("limit", "per_class")}


def _changed(config: Any) -> dict[str, Any]:
    """A config's values that are not its class's defaults."""
    default = type(config)()
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
    }


def _dumped(plain: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(plain), sort_keys=False, allow_unicode=True, width=100)
