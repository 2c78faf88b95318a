"""The denoiser route once more with a larger k-SAE, judged on several seeds; and by blocks of a transformer.

The strength is chosen on pictures of the split `choose`, and judged on those of three other seeds; the k-SAE
and the latents are the same throughout.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from revelio.run_dir import versions
from revelio.steering.evaluate import Drawn, measured
from tools.steering.methods import Methods, Recipe
from tools.steering.report import chosen, pooled_rates
from tools.steering.setting import PLAIN, SPLITS, Method, Setting

SEEDS = (1, 2, 3)
LARGE = Recipe(expansion=8, k=8, steps=1500, batch=1024, learning_rate=3e-4, rows=60_000)
PICTURES = 24
STRENGTHS = (6.0, 8.0, 12.0)
SPLIT = "seeds"
# Of mini-dit's blocks: each alone, and some at once.
ALONE, SEVERAL = (2.0, 4.0, 8.0), (1.0, 2.0, 4.0)
BLOCKS = tuple(f"block{number}" for number in range(8))
TOGETHER = (BLOCKS[:3], BLOCKS[4:], BLOCKS[6:], BLOCKS)


def repeats(first: Setting) -> dict[str, Any]:
    """Draw what is missing, and measure all seeds together and each for itself.

    Args:
        first: where the k-SAE is made and its strength is chosen.
    """
    made, layers = Methods(first, LARGE), first.denoiser_layers
    name = f"latents of {'+'.join(layers)}"
    method = Method(name, "denoiser", lambda target, s: made.denoiser(layers, target, s), STRENGTHS)
    curve = {s: pooled_rates([first.drawn(method, s, "choose")]) for s in STRENGTHS}
    best = chosen(curve)
    settings = [replace(first, seed=seed) for seed in SEEDS]
    plain = [one.drawn(PLAIN, 1.0, SPLIT) for one in settings]
    own = [one.drawn(method, best, SPLIT) for one in settings]
    return {
        "model": first.model,
        "settings": asdict(LARGE) | {
            "layers": list(layers), "pictures": PICTURES, "seeds": list(SEEDS), "split": SPLITS[SPLIT],
        },
        "strength": best,
        "curve": {f"{s:g}": rates for s, rates in curve.items()},
        "together": {"plain": _measured(plain, plain), name: _measured(own, plain)},
        "seeds": [_measured([one], [base]) for one, base in zip(own, plain, strict=True)],
        "classes": {
            word: {
                "target": _mean([one[word].sees() for one in own]),
                "plain": _mean([one[word].sees() for one in plain]),
                "others": _mean([one[word].keeps() for one in own]),
            }
            for word in own[0]
        },
        "made_with": versions(),
    }  # fmt: skip


def blocks(first: Setting) -> dict[str, Any]:
    """Where in a transformer the class's latents are ablated: target and others by blocks and strength.

    Args:
        first: of all blocks; rates are those of the seeds that choose a strength.
    """
    made = Methods(first, LARGE)
    found = []
    for layers in (*((layer,) for layer in first.denoiser_layers), *TOGETHER):
        method = Method(
            f"latents of {'+'.join(layers)}",
            "denoiser",
            lambda target, strength, layers=layers: made.denoiser(layers, target, strength),
            ALONE if len(layers) == 1 else SEVERAL,
        )
        rates = {s: pooled_rates([first.drawn(method, s, "choose")]) for s in method.strengths}
        found.append({"layers": list(layers), "curve": {f"{s:g}": one for s, one in rates.items()}})
    plain = pooled_rates([first.drawn(PLAIN, 1.0, "choose")])
    return {"model": first.model, "settings": asdict(LARGE), "plain": plain, "blocks": found}


def _measured(own: Sequence[dict[str, Drawn]], plain: Sequence[dict[str, Drawn]]) -> dict[str, Any]:
    drawn, undrawn = ([one for seed in part for one in seed.values()] for part in (own, plain))
    return measured(drawn, undrawn)


def _mean(rates: Sequence[Any]) -> float:
    return float(sum(one.mean() for one in rates) / len(rates))
