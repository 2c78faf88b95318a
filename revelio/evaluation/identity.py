"""Are the latents the data's, or the seed's? Stability over trainings, and recovery of planted directions.

Both compare decoder directions. Two sets of unit vectors are matched one to one so that the sum of cosines
is largest (the assignment problem); a latent has a partner above c if its match has a cosine above c.

Directions that repeat each other within one training find partners whatever the seed: of k-means' centroids
of anisotropic activations nearly all have another of the same run above 0.7 (docs/evidence.md). So stability
is also taken of distinct directions, near-duplicates counted once.

Channels and principal axes are the same whichever the seed: their stability is 1 without having found
anything, so that stability is told apart only from controls that chance has a part in.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from revelio.analysis.paired import verdict
from revelio.evaluation.controls import control_dictionaries
from revelio.evaluation.encoded import encoded, first_of_each
from revelio.sae.config import RunConfig
from revelio.sae.dataloader import batches_of
from revelio.sae.inputs import Source
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train
from revelio.seeds import generator
from revelio.stats import t_quantile

LEVELS = (0.7, 0.9)
# The assignment takes the cube of it.
MOST = 2000
STABLE_SEEDS = 3
# Rows on which the latents of controls are seen to fire.
SEEN = 2**15
# Controls without a seed.
NO_CHANCE = ("channels", "principal axes")


def matched_cosines(a: Float[Tensor, "m d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " m"]:
    """The cosine of each direction of ``a`` with its partner in ``b``; -1 for one that is left without."""
    from scipy.optimize import linear_sum_assignment

    cosines = (normalize(a.float(), dim=1) @ normalize(b.float(), dim=1).T).double()
    mine, others = linear_sum_assignment(cosines.numpy(), maximize=True)
    found = torch.full((len(a),), -1.0, dtype=torch.float64)
    found[torch.from_numpy(mine)] = cosines[torch.from_numpy(mine), torch.from_numpy(others)]
    return found


def distinct_directions(directions: Float[Tensor, "m d"], level: float) -> Float[Tensor, "n d"]:
    """Those directions, in their order, whose cosine with every one kept before them is at most ``level``."""
    unit = normalize(directions.float(), dim=1)
    return directions[first_of_each(unit @ unit.T > level)]


def stability(
    directions: Sequence[Float[Tensor, "m d"]], *, distinct_only: bool = False
) -> dict[str, Any]:
    """The share of latents with a partner in another training, over all pairs of trainings.

    Args:
        directions: the decoder rows of the live latents of each training, the strongest first; at most
            :data:`MOST` of the first of a pair are matched with twice as many of the second.
        distinct_only: of those of a training that repeat a stronger one above the level, none is matched.

    Returns:
        By level: the mean over ordered pairs, each pair's share, and ``latents``: the least that were
        matched.
    """
    entry: dict[str, Any] = {}
    for level in LEVELS:
        own = (
            [distinct_directions(one, level) for one in directions] if distinct_only else directions
        )
        pairs = [pair for one in combinations(own, 2) for pair in (one, one[::-1])]
        cosines = [matched_cosines(a[:MOST], b[: 2 * MOST]) for a, b in pairs]
        # A training without a live latent has found nothing.
        shares = [float((found > level).double().sum()) / max(len(found), 1) for found in cosines]
        entry[str(level)] = {
            "value": sum(shares) / max(len(shares), 1),
            "pairs": shares,
            "latents": min((len(found) for found in cosines), default=0),
        }
    return entry


def stability_verdicts(
    found: Mapping[str, Mapping[str, Any]], confidence: float = 0.95
) -> dict[str, Any]:
    """By level: the k-SAE's stability minus each control's, and the verdict.

    All pairs of a training share it, so the error is the jackknife's over trainings. Intervals hold jointly.

    Args:
        found: :func:`stability` of the k-SAE, which comes first, and of each control, three trainings up.
        confidence: of all intervals of a level together.
    """
    ours, *controls = found
    names = [name for name in controls if name not in NO_CHANCE]
    entries = {}
    for level in map(str, LEVELS):
        errors = {name: _jackknife(found[name][level]["pairs"]) for name in (ours, *names)}
        gaps = {
            name: (
                found[ours][level]["value"] - found[name][level]["value"],
                *_welch(errors[ours], errors[name]),
            )
            for name in names
        }
        entries[level] = _compared(gaps, confidence)
    return entries


def planted_together(
    found: Sequence[Mapping[str, Any]], confidence: float = 0.95
) -> dict[str, Any]:
    """What several :func:`planted_recovery` say together.

    Returns:
        ``planted``: the sizes and, by name and level, the mean and each training's share;
        ``planted_verdict`` of two trainings up.
    """
    names = [name for name, value in found[0].items() if isinstance(value, Mapping)]
    means = {
        name: {
            level: {
                "value": sum(one[name][level] for one in found) / len(found),
                "trainings": [one[name][level] for one in found],
            }
            for level in found[0][name]
        }
        for name in names
    }
    entry = {"planted": {key: found[0][key] for key in found[0] if key not in names} | means}
    if len(found) > 1:
        entry["planted_verdict"] = planted_verdicts(means, confidence)
    return entry


def planted_verdicts(
    found: Mapping[str, Mapping[str, Any]], confidence: float = 0.95
) -> dict[str, Any]:
    """By level: the share of planted directions that the k-SAE finds minus each control's, and the verdict.

    Args:
        found: by name, the k-SAE first: by level, ``trainings``: the shares found in the same sets of
            synthetic activations, two or more.
        confidence: of all intervals of a level together.
    """
    ours, *controls = found
    entries = {}
    for level in map(str, LEVELS):
        gaps = {}
        for name in controls:
            pairs = zip(
                found[ours][level]["trainings"], found[name][level]["trainings"], strict=True
            )
            each = torch.tensor([one - other for one, other in pairs], dtype=torch.float64)
            gaps[name] = (float(each.mean()), float(each.var()) / len(each), len(each) - 1)
        entries[level] = _compared(gaps, confidence)
    return entries


def _jackknife(pairs: Sequence[float]) -> tuple[float, int]:
    """Squared error and degrees of freedom of the mean share, from both orders of each pair of trainings."""
    shares = torch.tensor(pairs, dtype=torch.float64).view(-1, 2).mean(1)
    count = round((1 + (1 + 8 * len(shares)) ** 0.5) / 2)
    of = torch.tensor(list(combinations(range(count), 2)))
    left = torch.stack([shares[(of != one).all(1)].mean() for one in range(count)])
    return float((count - 1) / count * (left - left.mean()).square().sum()), count - 1


def _welch(one: tuple[float, int], other: tuple[float, int]) -> tuple[float, float]:
    """Squared error and degrees of freedom (Welch and Satterthwaite's) of a difference."""
    error2 = one[0] + other[0]
    if error2 == 0:
        return 0.0, min(one[1], other[1])
    return error2, error2**2 / (one[0] ** 2 / one[1] + other[0] ** 2 / other[1])


def _compared(gaps: Mapping[str, tuple[float, float, float]], confidence: float) -> dict[str, Any]:
    """Differences (value, squared error, degrees of freedom) by control as intervals, and the verdict."""
    each = 1 - (1 - confidence) / max(len(gaps), 1)
    differences = {}
    for name, (value, error2, freedom) in gaps.items():
        half = t_quantile(freedom, each) * error2**0.5
        differences[name] = {"value": value, "interval": [value - half, value + half]}
    said = verdict({name: one["interval"] for name, one in differences.items()}, 1)
    return {"differences": differences, "verdict": said}


def live_directions(
    model: KSparseAutoencoder,
    rows: Float[Tensor, "images d"] | Float[Tensor, "images c d"],
    source: Source = None,
    over: Literal["max", "mean"] = "max",
) -> Float[Tensor, "m d"]:
    """Decoder rows of the latents that fire on more than 10 images, the strongest first."""
    return model.W_dec.data[encoded(model, rows, source, over).strongest(2 * MOST, 11)]


def directions_of_controls(
    model: KSparseAutoencoder,
    rows: Float[Tensor, "images d"],
    seeds: Sequence[int],
    source: Source = None,
) -> dict[str, list[Float[Tensor, "m d"]]]:
    """The same for each control dictionary, drawn or computed anew with each seed."""
    drawn = [control_dictionaries(model, rows, seed, source) for seed in seeds]
    seen = rows[:: -(-len(rows) // SEEN)]
    return {name: [live_directions(one[name], seen, source) for one in drawn] for name in drawn[0]}


def stabilities(
    directions: Mapping[str, Sequence[Float[Tensor, "m d"]]], confidence: float = 0.95
) -> dict[str, Any]:
    """Stability of the k-SAE, which comes first, and of each control.

    Returns:
        ``stability``, and ``distinct_stability`` of near-duplicates counted once; beside each the verdict
        (``stability_verdict``, ...) of :data:`STABLE_SEEDS` trainings up.
    """
    entry: dict[str, Any] = {}
    for name, once in (("stability", False), ("distinct_stability", True)):
        found = {one: stability(each, distinct_only=once) for one, each in directions.items()}
        entry[name] = found
        if len(next(iter(directions.values()))) >= STABLE_SEEDS:
            entry[f"{name}_verdict"] = stability_verdicts(found, confidence)
    return entry


def planted_rows(
    d: int, directions: int, active: int, rows: int, seed: int, noise: float = 0.05
) -> tuple[Float[Tensor, "rows d"], Float[Tensor, "directions d"]]:
    """Synthetic activations: sums of ``active`` of some random unit directions, and the directions.

    Coefficients are uniform from 0.5 to 1.5, a direction's frequency falls as 1 / sqrt(rank), and Gaussian
    noise is added of ``noise`` times the signal's standard deviation.
    """
    draw = generator(seed, "planted directions")
    truth = normalize(torch.randn(directions, d, generator=draw), dim=1)
    weights = torch.arange(1, directions + 1).double().rsqrt().expand(rows, directions)
    chosen = torch.multinomial(weights, active, generator=draw)
    amounts = 0.5 + torch.rand(rows, active, generator=draw)
    made = torch.nn.functional.embedding_bag(chosen, truth, per_sample_weights=amounts, mode="sum")
    return made + noise * made.std() * torch.randn(rows, d, generator=draw), truth


def planted_recovery(
    config: RunConfig,
    d: int,
    rows: int,
    *,
    directions: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Train with a recipe on synthetic activations; the share of planted directions that it finds.

    Args:
        config: the recipe: k, expansion, steps, batch, learning rate, ...
        d: width of the activations.
        rows: how many there are; as many as the real training had, to be told what it could find.
        directions: how many are planted; None: half as many as there are latents, at most :data:`MOST`.
        seed: of the activations.
        progress: told the steps done and in all.

    Returns:
        ``k-SAE`` and each control dictionary: by level, the share of planted directions with a partner among
        the latents.
    """
    n = config.expansion * d
    directions = min(n // 2, MOST) if directions is None else directions
    made, truth = planted_rows(d, directions, min(config.k, directions), rows, seed)
    model = KSparseAutoencoder(**config.sizes(d))
    settings = config.for_rows(rows)
    steps = train(model, batches_of(made, settings, d), settings, kernel=fastest_kernel(model))
    for done, _ in enumerate(steps, 1):
        if progress is not None:
            progress(done, settings.steps)
    models = {"k-SAE": model} | control_dictionaries(model, made, seed)
    found = {name: _recovered(one, made, truth) for name, one in models.items()}
    return {"directions": directions, "rows": rows, "d": d, "n": n, "k": config.k} | found


def _recovered(model: KSparseAutoencoder, rows: Tensor, truth: Tensor) -> Mapping[str, float]:
    # All that fire at all: a planted direction may be rare.
    live = encoded(model, rows).strongest(3 * len(truth), 1)
    found = matched_cosines(truth, model.W_dec.data[live])
    return {str(level): float((found > level).double().mean()) for level in LEVELS}
