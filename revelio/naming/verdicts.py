"""What the replies support: agreement between repeats, and whether a name tells images apart."""

from collections import Counter
from collections.abc import Sequence

from revelio.naming.questions import KINDS

LEVEL = 0.05


def fleiss_kappa(answers: Sequence[Sequence[str]]) -> float | None:
    """Fleiss' (1971) kappa of latents asked equally often: 1 agreement, 0 what chance gives.

    None where it is not defined: no latent asked twice, or all answers the same kind.
    """
    if not answers or len(answers[0]) < 2:
        return None
    n = len(answers[0])
    counts = [Counter(each) for each in answers]
    agreed = sum(sum(c * (c - 1) for c in each.values()) / (n * (n - 1)) for each in counts) / len(
        answers
    )
    shares = [sum(each[kind] for each in counts) / (n * len(answers)) for kind in KINDS]
    chance = sum(share**2 for share in shares)
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def tells_apart(picked: Sequence[int], fires: Sequence[bool]) -> float:
    """Fisher's one-sided p that picks have nothing to do with firing.

    Args:
        picked: places of the images that the judge picked.
        fires: of every image, whether the latent fires on it.
    """
    from scipy.stats import fisher_exact

    hits = sum(fires[place] for place in picked)
    false = len(picked) - hits
    firing = sum(fires)
    table = [[hits, false], [firing - hits, len(fires) - firing - false]]
    _, p = fisher_exact(table, alternative="greater")
    return float(p)  # pyright: ignore[reportArgumentType]
