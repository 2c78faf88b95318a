"""Top images + a vision-language judge -> names of latents, each checked on images the judge was not shown.

from revelio.pipelines.name_latents import NameLatentsConfig, name_latents

made = name_latents(NameLatentsConfig(top=..., store=..., ksae="runs/ksae", judge="gpt-4o"))
made.result["passed"], made.result["control"]

Every reply is kept in a cache at once: a stopped run goes on, and a second one sends nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from revelio.activations.store import ActivationStore
from revelio.analysis.gallery.firing import firing
from revelio.analysis.top_images import TopImages
from revelio.bounds import check_fields
from revelio.data.dataset import ImageDataset
from revelio.naming.config import NameLatentsConfig
from revelio.naming.questions import (
    Named,
    check_question,
    choices,
    name_question,
    read_name,
    read_picks,
    sheet,
)
from revelio.naming.verdicts import LEVEL, fleiss_kappa, tells_apart
from revelio.outputs import check_file, has_keys
from revelio.pipelines import Made, Progress, Report, silent
from revelio.pipelines.inputs import open_sae, pictures_of
from revelio.pipelines.top_images import read_top_images
from revelio.pipelines.vision_judge import VisionJudge
from revelio.reply_cache import open_cache
from revelio.run_dir import versions, write_json
from revelio.seeds import key_seed
from revelio.stats import proportion
from revelio.wording import plural

__all__ = ["NameLatentsConfig", "name_latents"]

# What OpenAI counts for a picture of about 1000 x 1000 pixels; other judges count otherwise.
SHEET_TOKENS, TEXT_TOKENS, REPLY_TOKENS = 765, 120, 40


@dataclass(frozen=True)
class Subject:
    """A latent to name: rows of the store that are shown, and those that its name is checked on."""

    latent: int
    shown: list[int]
    checked: list[int]
    fires: list[bool]


def name_latents(config: NameLatentsConfig, progress: Report = silent) -> Made:
    """Have the strongest latents named and the names checked, and write the result.

    Args:
        config: which latents, by which judge, from which pictures.
        progress: told how many replies there are, and the cost before anything is sent.

    Returns:
        The names; after an estimate there is no file. ``latents``: kind, agreement, name, confidence, ``p``
        and ``passed`` of each; ``passed``: the share of names by which the judge tells firing images from
        others; ``control``: the same share with the name of another latent; ``kappa``: agreement of the
        repeats beyond chance.

    Raises:
        ValueError: parts that do not belong together, no latent that fires on enough images, no key, or a
            judge that is down or answers nothing of use: what it answered is kept.
        ImageError: a picture can't be read.
    """
    check_fields(config)
    out = config.out or config.top / "names.json"
    check_file(out, has_keys("latents", "passed", "judge"), "a file of names")
    # Top images over cells may be of a store of cells; those of another store are refused below.
    store = ActivationStore.open(config.store, cells=True)
    model = open_sae(config.ksae, config.device, progress)
    top = read_top_images(config.top, store, model)
    subjects = _subjects(config, top, store, model)
    cost = _cost(config, len(subjects))
    progress(Progress(cost.pop("words")))
    if config.estimate:
        return Made(out, cost)
    pictures = _Pictures(store, pictures_of(config.data, store), config.side)
    with open_cache(config.reply_cache or out.with_suffix(".cache.sqlite")) as cache:
        judge = VisionJudge(config.judge, config.max_tokens, config, cache, progress)
        names = _named(config, judge, pictures, subjects)
        given = [best.name if (best := _best(all_of)) else None for all_of in names]
        checks = _checked(judge, pictures, subjects, given, "checking names")
        others, control = others_names(given), []
        if any(others):
            title = "control: another latent's name"
            control = _checked(judge, pictures, subjects, others, title)
    result = _result(config, subjects, names, checks, control)
    write_json(out, result | {"made_from": top.source, "versions": versions()})
    return Made(out, result)


def _subjects(
    config: NameLatentsConfig, top: TopImages, store: ActivationStore, model: Any
) -> list[Subject]:
    """The strongest latents that fire on enough images and leave enough others."""
    order = top.ranking()
    enough = (top.counts[order] >= config.shown + config.checked) & (
        top.images - top.counts[order] >= config.checked
    )
    chosen = order[enough][: config.latents]
    if config.shown > top.m:
        raise ValueError(
            f"shown is {config.shown}, and each latent has {plural(top.m, 'top image')}"
        )
    if not len(chosen):
        raise ValueError(
            f"no latent fires on {plural(config.shown + config.checked, 'image')} or more: show or check "
            "fewer, or extract more images"
        )
    # Firing is what the top images call it: of a k-SAE of cells, in any cell.
    codes = firing(model, store, chosen, top.source.get("cells", "pooled")).codes.tocsc()
    found = []
    for place, latent in enumerate(chosen.tolist()):
        fired = set(codes[:, [place]].nonzero()[0].tolist())
        shown = top.indices[latent, : config.shown].tolist()
        draw = np.random.default_rng(key_seed(config.seed, "checked", latent))
        parts = (sorted(fired - set(shown)), sorted(set(range(store.images)) - fired))
        if min(map(len, parts)) < config.checked:
            continue
        rows = [int(row) for part in parts for row in draw.choice(part, config.checked, False)]
        mixed = draw.permutation(len(rows)).tolist()
        found.append(
            Subject(latent, shown, [rows[i] for i in mixed], [i < config.checked for i in mixed])
        )
    return found


def _cost(config: NameLatentsConfig, latents: int) -> dict[str, Any]:
    calls = latents * (config.repeats + 1 + (latents > 1))
    sent, back = calls * (SHEET_TOKENS + TEXT_TOKENS), calls * REPLY_TOKENS
    price = (sent * config.price_in + back * config.price_out) / 1e6
    said = f"about {price:.2f}" if price else "unknown; give price_in and price_out"
    words = (
        f"{plural(latents, 'latent')}, {plural(calls, 'call')} less those in the cache: "
        f"about {sent:,} tokens sent, {back:,} back, price {said}"
    )
    return {
        "calls": calls,
        "tokens_sent": sent,
        "tokens_back": back,
        "price": price,
        "words": words,
    }


class _Pictures:
    """Sheets of rows of a store."""

    def __init__(self, store: ActivationStore, dataset: ImageDataset, side: int) -> None:
        self._ids, self._dataset, self._side = store.ids, dataset, side
        self._places = {name: place for place, name in enumerate(dataset.ids)}

    def sheet(self, rows: Sequence[int], *, numbered: bool = False) -> bytes:
        """The JPEG of some rows' pictures."""
        return sheet([self._read(row) for row in rows], self._side, numbered=numbered)

    def _read(self, row: int) -> Image.Image:
        if self._ids[row] not in self._places:
            raise ValueError(
                f"{self._dataset.name} has no image {self._ids[row]}: give the data set that was extracted "
                "(data.source)"
            )
        return self._dataset.read(self._places[self._ids[row]])


def _named(
    config: NameLatentsConfig, judge: VisionJudge, pictures: _Pictures, subjects: Sequence[Subject]
) -> list[list[Named]]:
    """The replies on each latent that could be read."""
    orders = [
        choices(one.latent, repeat, config.seed)
        for one in subjects
        for repeat in range(config.repeats)
    ]
    sheets = [pictures.sheet(one.shown) for one in subjects]
    asked = [
        (name_question(order), sheets[place // config.repeats])
        for place, order in enumerate(orders)
    ]
    found = judge.ask("names", asked, lambda index, text: read_name(text, orders[index]))
    return [
        [one for one in found[place : place + config.repeats] if one is not None]
        for place in range(0, len(found), config.repeats)
    ]


def _best(replies: Sequence[Named]) -> Named | None:
    """The surest name of the commonest kind; the first where there are several."""
    if not replies:
        return None
    kind = Counter(one.kind for one in replies).most_common(1)[0][0]
    return max((one for one in replies if one.kind == kind), key=lambda one: one.confidence)


def _checked(
    judge: VisionJudge,
    pictures: _Pictures,
    subjects: Sequence[Subject],
    given: Sequence[str | None],
    title: str,
) -> list[float | None]:
    """Fisher's p of each latent's images with the name given for it."""
    known = [(place, name) for place, name in enumerate(given) if name is not None]
    count = len(subjects[0].checked)
    asked = [
        (check_question(name, count), pictures.sheet(subjects[place].checked, numbered=True))
        for place, name in known
    ]
    picks = judge.ask(title, asked, lambda _, text: read_picks(text, count))
    found: list[float | None] = [None] * len(subjects)
    for (place, _), picked in zip(known, picks, strict=True):
        # A reply that can't be read tells nothing apart.
        found[place] = 1.0 if picked is None else tells_apart(picked, subjects[place].fires)
    return found


def others_names(names: Sequence[str | None]) -> list[str | None]:
    """For each named latent the next one's name that is not its own; none where all are called alike."""
    known = [(place, name) for place, name in enumerate(names) if name is not None]
    found: list[str | None] = [None] * len(names)
    for number, (place, name) in enumerate(known):
        following = (other for _, other in known[number + 1 :] + known[:number])
        found[place] = next((o for o in following if o.casefold() != name.casefold()), None)
    return found


def _result(
    config: NameLatentsConfig,
    subjects: Sequence[Subject],
    names: Sequence[Sequence[Named]],
    checks: Sequence[float | None],
    control: Sequence[float | None],
) -> dict[str, Any]:
    latents = []
    for one, replies, p in zip(subjects, names, checks, strict=True):
        best = _best(replies)
        kinds = Counter(reply.kind for reply in replies)
        entry: dict[str, Any] = {"latent": one.latent, "kinds": dict(kinds), "p": p}
        entry |= asdict(best) if best else {"kind": None, "name": None, "confidence": None}
        entry["agreement"] = max(kinds.values()) / len(replies) if replies else None
        entry["passed"] = p is not None and p < LEVEL
        latents.append(entry)
    whole = [[one.kind for one in all_of] for all_of in names if len(all_of) == config.repeats]
    return {
        "judge": config.judge,
        "latents": latents,
        "passed": _share(checks),
        "control": _share(control) if control else None,
        "by_chance_at_most": LEVEL,
        "kappa": fleiss_kappa(whole),
        "granularity": dict(Counter(entry["kind"] for entry in latents if entry["kind"])),
        "repeats": config.repeats,
        "unread": config.repeats * len(names) - sum(map(len, names)),
    }


def _share(checks: Sequence[float | None]) -> dict[str, float]:
    return proportion(sum(p is not None and p < LEVEL for p in checks), len(checks))
