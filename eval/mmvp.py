"""MMVP: can a finished LLaVA model tell apart 150 pairs of pictures that CLIP takes for alike?

    python -m eval.mmvp --bench MMVP --model runs/llava/clip-sd-t25/finetune/final
    python -m eval.mmvp --bench MMVP --model DIR --judge my-model --base-url http://localhost:8000/v1

A pair counts where both of its questions are answered rightly. An answer that is a choice and nothing else is
compared with the key; a judge grades the others, without one they are wrong and counted. Writes answers.jsonl
(LLaVA's form), scores.json and the judge's replies into --out; a run that was stopped goes on.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if __name__ == "__main__":  # so that it runs from any folder, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import revelio.cli  # noqa: F401  first, so that a help page needs no torch
from llava_ext.config import AnswerConfig
from revelio.bounds import Count, Folder, OutFolder
from revelio.command_line import run_module
from revelio.endpoint import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.bench.mmvp import Item


@dataclass(frozen=True, kw_only=True)
class Config(AnswerConfig, Settings):
    """Which model answers, and who judges."""

    bench: Folder
    """MMVP's folder: Questions.csv and MMVP Images/."""

    out: OutFolder = Path("runs/mmvp")
    """The folder of answers and scores to write, or to go on with."""

    judge: str | None = None
    """The judge's name at the endpoint; none: what is no plain choice is wrong."""

    max_new_tokens: Count = 64

    renamed: ClassVar[dict[str, str]] = {"batch": "batch-size"}

    batch_size: Count = 1
    """Questions answered at once; the answers do not depend on it at temperature 0."""


def run(config: Config) -> None:
    """Answer, judge what has to be judged, score."""
    from eval.bench.mmvp import parse_choice, read_items, score
    from revelio.files import check_folder
    from revelio.outputs import check_file, has_keys
    from revelio.run_dir import write_json
    from revelio.stats import percent

    check_folder(config.out)
    check_file(config.out / "scores.json", has_keys("model", "pairs", "chance"), "MMVP's scores")
    items = read_items(config.bench)
    answers = _answers(config, items)
    pairs = list(zip(items, answers, strict=True))
    choices = [parse_choice(answer, item.options) for item, answer in pairs]
    unread = [place for place, choice in enumerate(choices) if choice is None]
    scores = score(items, choices, _judged(config, pairs, unread))
    write_json(config.out / "scores.json", {"model": config.model, "judge": config.judge} | scores)
    for name in ("pairs", "questions", "one choice for both pictures"):
        print(f"{name:<28} {percent(scores[name])} %")
    print(f"{'chance of a pair':<28} {100 * scores['chance']:.1f} %")
    unjudged = scores["neither a choice nor judged"]
    print(f"{'judged':<28} {scores['judged']}, {unjudged} neither a choice nor judged")
    print(config.out / "scores.json")


def _answers(config: Config, items: "Sequence[Item]") -> list[str]:
    from tqdm import tqdm

    from eval.bench.answers import Asking, answer_all, check_images, read_finished, weights_of
    from llava_ext.generate import Assistant

    questions, path = [item.question for item in items], config.out / "answers.jsonl"
    check_images(questions, config.bench)
    weights = weights_of(config.model)
    asking = Asking(model_id=config.model.rstrip("/"), weights=weights, **config.decoding())
    left = len(questions) - len(read_finished(path, questions, asking))
    if left:
        assistant = Assistant.load(
            config.model, device=config.device, dtype=config.dtype, allow=config.allow
        )
        steps = answer_all(
            assistant, questions, config.bench, asking, path, batch=config.batch_size
        )
        with tqdm(total=left, desc="answer", unit="question") as bar:
            for count in steps:
                bar.update(count)
    finished = read_finished(path, questions, asking)
    return [finished[str(question.id)]["text"] for question in questions]


def _judged(
    config: Config, pairs: "Sequence[tuple[Item, str]]", unread: "Sequence[int]"
) -> dict[int, bool | None]:
    """The judge's verdicts of what is no plain choice, by place."""
    import os

    from eval.bench.mmvp import judge_all, judge_body, judge_entry, read_verdict
    from revelio.reply_cache import open_cache

    if config.judge is None or not unread:
        return {}
    settings = replace(config, base_url=config.base_url or os.environ.get("OPENAI_BASE_URL"))
    bodies = [judge_body(*pairs[place], config.judge) for place in unread]
    with open_cache(config.out / "replies.cache.sqlite", write=True) as cache:
        judge_all(bodies, settings, cache)
        replies = [cache.get(judge_entry(body, settings)) for body in bodies]
    return {
        place: reply and read_verdict(reply.text)
        for place, reply in zip(unread, replies, strict=True)
    }


def main(arguments: list[str] | None = None) -> None:
    """Run it; exit 2 with one line on a user's mistake, 130 on Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    run_module(sys.modules[__name__], words, name="mmvp", prog="mmvp")


if __name__ == "__main__":
    main()
