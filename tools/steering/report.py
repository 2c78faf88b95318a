"""From pictures to figures: the strength of each method, chosen on one split and judged on the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from revelio.run_dir import versions
from revelio.steering.evaluate import Drawn, difference_interval, mean_interval, measured
from tools.steering.methods import (
    EXPANSION,
    LEARNING_RATE,
    SPECIFICITY,
    TEXT_LAYER,
    TRAIN_STEPS,
    K,
    Methods,
)  # fmt: skip
from tools.steering.setting import GUIDANCE, JUDGE_EPOCHS, SPLITS, STEPS, WORDS, Method, Setting

# The baselines that the others are compared with, of mini-sd's and of mini-dit's.
COMPARED = (
    "difference of means",
    "conditional difference of means",
    "negative prompt",
    "means of block2+block4+block6",
)


def report(setting: Setting, methods: Methods, *, draw: bool = True) -> dict[str, Any]:
    """Draw what is missing (where ``draw``), and measure all that is there."""
    plain, *others = methods.all()
    if not draw and not setting.stored(plain, 1.0, "judge"):
        return {"methods": []}
    entries: list[dict[str, Any]] = []
    judged: dict[str, dict[str, Drawn]] = {}
    for method in (plain, *others):
        curve = {}
        for strength in method.strengths if len(method.strengths) > 1 else ():
            if draw or setting.stored(method, strength, "choose"):
                curve[strength] = pooled_rates([setting.drawn(method, strength, "choose")])
        best = chosen(curve) if curve else next(iter(method.strengths))
        if not draw and not setting.stored(method, best, "judge"):
            continue
        judged[method.name] = setting.drawn(method, best, "judge")
        entry = _entry(method, best, curve, judged[method.name], judged[plain.name])
        entry["confidence"] = mean_interval(setting.confidence(method, best))
        entries.append(entry)
    for entry in entries:
        entry["better_than"] = _compared(entry["method"], judged)
    return {
        "model": setting.model,
        "settings": {
            "steps": STEPS, "guidance": GUIDANCE, "numbers": "bfloat16 autocast", "splits": SPLITS,
            "text_layer": TEXT_LAYER, "denoiser_layers": setting.denoiser_layers, "expansion": EXPANSION,
            "k": K, "ksae_steps": TRAIN_STEPS, "learning_rate": LEARNING_RATE,
            "specificity": SPECIFICITY, "judge_epochs": JUDGE_EPOCHS,
        },
        "ksaes": _ksaes(setting, methods),
        "methods": entries,
        "made_with": versions(),
    }  # fmt: skip


def chosen(curve: Mapping[float, Mapping[str, float]]) -> float:
    """The strength at which the other classes' rate lies highest above the target's."""
    return max(curve, key=lambda strength: curve[strength]["others"] - curve[strength]["target"])


def pooled_rates(seeds: Sequence[Mapping[str, Drawn]]) -> dict[str, float]:
    """The target's and the others' rates over all targets, of one seed or several."""
    every = [one for drawn in seeds for one in drawn.values()]
    return {
        "target": float(np.mean([one.sees().mean() for one in every])),
        "others": float(np.mean([one.keeps().mean() for one in every])),
    }


def _entry(
    method: Method,
    strength: float,
    curve: Mapping[float, Mapping[str, float]],
    drawn: Mapping[str, Drawn],
    base: Mapping[str, Drawn],
) -> dict[str, Any]:
    found = measured(list(drawn.values()), list(base.values()))
    entry: dict[str, Any] = {"method": method.name, "route": method.route, "strength": strength}
    entry |= {"curve": {f"{s:g}": rates for s, rates in curve.items()}, **found}
    entry["classes"] = {
        name: {
            "target": float(one.sees().mean()),
            "plain": float(base[name].sees().mean()),
            "others": float(one.keeps().mean()),
        }
        for name, one in drawn.items()
    }
    return entry


def _compared(name: str, judged: Mapping[str, Mapping[str, Drawn]]) -> dict[str, Any]:
    """A method's rates less those of the baselines, on the same captions and noise."""
    return {
        other: {
            what: difference_interval(
                [getattr(judged[name][word], how)() for word in WORDS],
                [getattr(judged[other][word], how)() for word in WORDS],
            )
            for what, how in (("target", "sees"), ("others", "keeps"))
        }
        for other in COMPARED
        if other in judged and other != name
    }


def _ksaes(setting: Setting, methods: Methods) -> dict[str, Any]:
    """What each k-SAE explains, and how specific the latents found are on the half that did not choose."""
    found: dict[str, Any] = {}
    for layer in (TEXT_LAYER, *setting.denoiser_layers):
        if not (setting.work / f"ksae-{layer}-x{EXPANSION}-k{K}").exists():
            continue
        text = layer == TEXT_LAYER
        ksae = methods.text_ksae() if text else methods.denoiser_ksae(layer)
        of = {
            name: methods.text_found(name) if text else methods.denoiser_found(layer, name)
            for name in WORDS
        }
        found[layer] = {
            **ksae.trained_on,
            "n": ksae.n,
            "k": ksae.k,
            "latents": {name: len(one.latents) for name, one in of.items()},
            "held_out_auc": {name: one.auc for name, one in of.items()},
            "held_out_specificity": {
                name: float(np.mean([row["specificity"] for row in one.held_out]))
                for name, one in of.items()
            },
            "most_by_lot": max(max(one.shuffled) for one in of.values()),
        }
    return found
