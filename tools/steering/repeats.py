"""The routes once more with larger k-SAEs of the denoiser, each of several seeds for itself.

A seed is of everything: the noise of all pictures, the weights and the order of the k-SAEs' rows, and the
halves that latents are found on. A strength is chosen on the pictures of the split `choose`, of all seeds
together, and judged on others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revelio.run_dir import versions
from revelio.steering.evaluate import difference_interval, measured
from tools.steering.methods import STUDY_STRENGTH, Methods, Recipe
from tools.steering.report import chosen, pooled_rates
from tools.steering.setting import PLAIN, DiTSetting, Method, Setting

SEEDS = (1, 2, 3)
LARGE = Recipe(expansion=8, k=8, steps=1500, batch=1024, learning_rate=3e-4, rows=60_000)
PICTURES = 24
DENOISER_STRENGTHS = (4.0, 6.0, 8.0)
# Those whose rates the routes are compared with.
BASELINES = ("difference of means", "negative prompt")


def methods_of(setting: Setting) -> list[Method]:
    """The unsteered model, the routes, and the baselines they have to beat."""
    made = Methods(setting, LARGE)
    layers = setting.denoiser_layers
    found = [PLAIN]
    if setting.layers.encoders:
        found += [
            Method("text latents", "text", made.text_latents, (STUDY_STRENGTH,)),
            Method("difference of means", "baseline", made.means, (1.0,)),
            Method("negative prompt", "baseline", PLAIN.steer, negative=True),
        ]
    name = f"latents of {'+'.join(layers)}"
    return [
        *found,
        Method(
            name,
            "denoiser",
            lambda target, strength: made.denoiser(layers, target, strength),
            DENOISER_STRENGTHS,
        ),
    ]


def repeats(settings: Sequence[Setting]) -> dict[str, Any]:
    """Draw what is missing, and measure all seeds together and each for itself."""
    each = [methods_of(setting) for setting in settings]
    plain = _judged(settings, [PLAIN] * len(settings), 1.0)
    entries: list[dict[str, Any]] = []
    drawn: dict[str, list[Any]] = {}
    for alike in zip(*each, strict=True):
        first = alike[0]
        curve = {
            strength: pooled_rates(
                [
                    setting.drawn(one, strength, "choose")
                    for setting, one in zip(settings, alike, strict=True)
                ]
            )
            for strength in (first.strengths if len(first.strengths) > 1 else ())
        }
        best = chosen(curve) if curve else first.strengths[0]
        drawn[first.name] = own = _judged(settings, alike, best)
        size = len(own) // len(settings)
        parts = [slice(place * size, (place + 1) * size) for place in range(len(settings))]
        entries.append(
            {"method": first.name, "route": first.route, "strength": best}
            | {"curve": {f"{s:g}": rates for s, rates in curve.items()}}
            | measured(own, plain)
            | {"seeds": [_seed(own[part], plain[part]) for part in parts]}
        )
    for entry in entries:
        entry["better_than"] = _compared(drawn[entry["method"]], drawn)
    settings_said = {
        "seeds": [one.seed for one in settings],
        "layers": list(settings[0].denoiser_layers),
        "expansion": LARGE.expansion,
        "k": LARGE.k,
        "steps": LARGE.steps,
        "pictures": PICTURES,
    }
    return {
        "model": settings[0].model,
        "settings": settings_said,
        "methods": entries,
        "made_with": versions(),
    }


def of_text_model(work: Path, fashion: Path, layers: tuple[str, ...]) -> list[Setting]:
    """mini-sd, a setting a seed; the judge is one."""
    return [
        Setting(work / f"seed{seed}", fashion, "mini-sd", layers, seed, PICTURES) for seed in SEEDS
    ]


def of_transformer(work: Path, fashion: Path, layers: tuple[str, ...]) -> list[Setting]:
    """mini-dit likewise."""
    return [
        DiTSetting(work / f"dit{seed}", fashion, "mini-dit", layers, seed, PICTURES)
        for seed in SEEDS
    ]


def _judged(settings: Sequence[Setting], methods: Sequence[Method], strength: float) -> list[Any]:
    return [
        drawn
        for setting, method in zip(settings, methods, strict=True)
        for drawn in setting.drawn(method, strength, "judge").values()
    ]


def _seed(own: Sequence[Any], plain: Sequence[Any]) -> dict[str, Any]:
    found = measured(own, plain)
    return {name: found[name] for name in ("target_relative", "survival")}


def _compared(own: Sequence[Any], drawn: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {
        other: {
            what: difference_interval(
                [getattr(one, how)() for one in own], [getattr(one, how)() for one in drawn[other]]
            )
            for what, how in (("target", "sees"), ("others", "keeps"))
        }
        for other in BASELINES
        if other in drawn and drawn[other] is not own
    }
