"""The two stages' learning rates, chosen on a part of the training photographs, none of the held-out ones.

Of each class the last quarter of the training photographs is asked about, and models of every pair of rates
are trained on the others. A pair's stage 1 is shared by all pairs with that rate; what is finished is kept.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

from revelio.run_dir import versions
from tools.llava_proof.proof import (
    Places,
    Settings,
    Training,
    check_rows,
    finetune,
    photos,
    pretrain,
    see,
    write_data,
)
from tools.llava_proof.questions import Photos, held_out_questions
from tools.llava_proof.report import Figures, scores
from tools.llava_proof.score import accuracy, by_kind, difference

ASKED = 4  # one photograph in so many


def search(places: Places) -> Figures:
    """Train and ask every pair of rates, for each row; a second call goes on where the first one stopped.

    Returns:
        ``llava_rates.json``: how often each pair answers an open question rightly, the best pair (the first
        of equals), and what each other one answers less (95 % intervals; one training a pair).

    Raises:
        ValueError: an unknown row, no rate to try, too few photographs, data of other settings, or a command
            that failed.
    """
    given = places.settings
    check_rows(given)
    if not (given.pretrain_rates and given.finetune_rates):
        raise ValueError("no learning rate to try: give `pretrain_rates` and `finetune_rates`")
    learnt, asked = parts(photos(given, "train", given.train_images))
    inside = replace(places, settings=replace(given, out=given.out / "search", seeds=1))
    write_data(inside, learnt, asked)
    rates = list(product(given.pretrain_rates, given.finetune_rates))
    trainings = [Training(row, 0, pair) for row in given.rows for pair in rates]
    for row in given.rows:
        see(inside, row)

    def each(work: Callable[[Places, Training], object], some: Sequence[Training]) -> None:
        with ThreadPoolExecutor(given.at_once) as pool:
            list(pool.map(lambda one: work(inside, one), some))

    each(pretrain, [one for one in trainings if one.rates and one.rates[1] == rates[0][1]])
    each(finetune, trainings)
    each(lambda where, one: scores(where, one, "held-out"), trainings)
    questions = held_out_questions(asked)

    def right(row: str, pair: tuple[float, float]) -> list[list[bool]]:
        return [by_kind(questions, scores(inside, Training(row, 0, pair), "held-out"))["open"]]

    return {
        "photographs": {"learnt": len(learnt.files), "asked": len(asked.files)},
        "rows": {
            row: compared({pair: right(row, pair) for pair in rates})
            | {"configured": dict(zip(("pretrain", "finetune"), places.rates(row), strict=True))}
            for row in given.rows
        },
        "made_with": versions(),
        "command": typed(given),
        "settings": {
            name: getattr(given, name)
            for name in ("rows", "train_images", "captions", "questions", "quick")
        },
    }


def typed(given: Settings) -> str:
    """What was typed, without the folders."""
    words = ["python -m tools.llava_mini --caltech101 FOLDER --search"]
    words += ["--quick"] if given.quick else []
    words += ["--rows", *given.rows]
    for name, rates in (("pretrain", given.pretrain_rates), ("finetune", given.finetune_rates)):
        words += [f"--{name}-rates", *(f"{rate:g}" for rate in rates)]
    return " ".join(words)


def compared(right: dict[tuple[float, float], list[list[bool]]]) -> Figures:
    """Pairs of rates by what they answer, beside the best one."""
    best = max(right, key=lambda pair: sum(map(sum, right[pair])))
    return {
        "best": {"pretrain": best[0], "finetune": best[1]},
        "pairs": [
            {
                "pretrain": pair[0],
                "finetune": pair[1],
                "open": accuracy(own),
                **({} if pair == best else {"below_best": difference(right[best], own)}),
            }
            for pair, own in right.items()
        ],
    }


def parts(train: Photos) -> tuple[Photos, Photos]:
    """Training photographs to learn from, and of each class the last quarter, to ask about.

    Raises:
        ValueError: a class has too few of them for both.
    """
    learnt: list[int] = []
    asked: list[int] = []
    for label, noun in enumerate(train.nouns):
        own = [place for place, other in enumerate(train.labels) if other == label]
        cut = len(own) - len(own) // ASKED
        if cut == len(own):
            raise ValueError(
                f"{len(own)} training photographs of {noun!r} are too few to ask about a quarter: "
                f"give {ASKED} or more (`train_images`)"
            )
        learnt += own[:cut]
        asked += own[cut:]
    some = [
        replace(
            train,
            files=tuple(train.files[place] for place in chosen),
            labels=tuple(train.labels[place] for place in chosen),
        )
        for chosen in (learnt, asked)
    ]
    return some[0], some[1]
