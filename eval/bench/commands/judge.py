"""Have a judge compare a model's answers with the reference's, question by question.

The judge is any OpenAI-compatible endpoint: a hosted model (its key in OPENAI_API_KEY) or a server of your
own (--base-url). It reads the image's description, the question and both answers, and gives each a score
of 1 to 10.

    revelio llava-bench judge --bench llava_bench_in_the_wild --answers runs/bench/answers.jsonl \\
        --judge gpt-4o --estimate
    revelio llava-bench judge --bench llava_bench_in_the_wild --answers runs/bench/answers.jsonl \\
        --judge my-model --base-url http://localhost:8000/v1 --out runs/bench/reviews.jsonl

By default the judge is asked in both orders of the two answers, because judges favour one position; --mode
as_paper asks with the reference first only, at temperature 0.2. Every reply is kept in a cache at once: a
second run sends nothing, a run that was stopped goes on. A reply without two scores is a failure: counted,
left out of every mean.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from eval.bench.files import REFERENCE_FILE, name_ids
from eval.bench.prompts import SYSTEM, Mode
from revelio.bounds import AnyText, Count, File, Folder, NotNegative, OutFile, Seed
from revelio.endpoint import AskingConfig
from revelio.wording import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.bench.judge import Judge
    from eval.bench.prompts import Request
    from revelio.endpoint import Outcome
    from revelio.reply_cache import Reply, ReplyCache

TEMPERATURES = {"fixed": 0.0, "as_paper": 0.2}


@dataclass(frozen=True, kw_only=True)
class Config(AskingConfig):
    """What is judged, by whom, and how it is asked."""

    bench: Folder
    """A folder of LLaVA-Bench's layout: questions.jsonl, context.jsonl, answers_gpt4.jsonl, rule.json."""

    answers: File
    """The model's answers, in LLaVA's answers.jsonl form."""

    judge: str
    """The judge's name at the endpoint."""

    out: OutFile = Path("runs/bench/reviews.jsonl")
    """The reviews file to write."""

    reference: File | None = None
    """The reference's answers; without it, answers_gpt4.jsonl of the bench folder."""

    mode: Mode = "fixed"
    """fixed: both answer orders, temperature 0. as_paper: the reference first only, temperature 0.2."""

    temperature: NotNegative | None = None
    """The judge's temperature; without it, the mode's."""

    send_temperature: bool = True
    """Off for a judge that refuses to be given a temperature."""

    max_tokens: Count = 1024
    """Longest reply (paper: 1024)."""

    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls the longest reply."""

    system: AnyText = SYSTEM
    """The judge's system line."""

    run: Seed = 0
    """Another number asks everything anew: two runs show how far the judge agrees with itself."""

    ask_again: bool = False
    """Ask again where the cached reply has no two scores."""

    renamed: ClassVar[dict[str, str]] = {"cache": "reply-cache"}

    reply_cache: OutFile | None = None
    """The file of replies; without it, beside --out (reviews.jsonl -> reviews.cache.sqlite)."""


def run(config: Config) -> None:
    """Ask what the cache lacks, write the reviews, say what came of it."""
    from eval.bench.estimate import Rates, estimate_text, spent_text
    from eval.bench.judge import cache_entries, missing
    from eval.bench.prompts import read_requests
    from revelio.following import flags, following
    from revelio.outputs import check_file
    from revelio.reply_cache import open_cache

    if not config.estimate:
        check_file(config.out, _are_reviews, "a file of reviews")
    judge, address = _judge(config), config.base_url or os.environ.get("OPENAI_BASE_URL")
    reference = config.reference or config.bench / REFERENCE_FILE
    requests = read_requests(config.bench, config.answers, reference, config.mode)
    entries = cache_entries(judge, requests, address)
    path = config.reply_cache or config.out.with_suffix(".cache.sqlite")
    rates = Rates(config.price_in, config.price_out)
    with open_cache(path, write=not config.estimate) as cache:
        to_send = missing(cache, entries, ask_again=config.ask_again)
        cached = len(requests) - len(to_send)
        if config.estimate:
            print(estimate_text(judge, [requests[index] for index in to_send], cached, rates))
            if not rates.known():
                print("its price: give --price-in and --price-out (per million tokens)")
            print(following("llava-bench", "judge", *flags(replace(config, estimate=False), "")))
            return
        outcome = _ask(config, address, cache, entries, to_send)
        replies = [cache.get(entry) for entry in entries]
    _stop_if_down(outcome, requests, address, path)
    _write(config, judge, requests, entries, replies)
    print(f"sent {outcome.sent}, taken from {path}: {cached}")
    if spent := spent_text([replies[index] for index in to_send], rates):
        print(spent)
    _stop_if_unanswered(outcome, requests, config.out)
    print(following("llava-bench", "score", "--reviews", config.out, "--mode", config.mode))


def _are_reviews(path: Path) -> bool:
    from revelio.trust import read_json_lines

    rows = read_json_lines(path)
    return bool(rows) and all({"question_id", "answer1_id", "order"} <= set(row) for row in rows)


def _judge(config: Config) -> "Judge":
    from eval.bench.judge import Judge

    temperature = TEMPERATURES[config.mode] if config.temperature is None else config.temperature
    return Judge(
        model=config.judge,
        system=config.system,
        temperature=temperature if config.send_temperature else None,
        max_tokens=config.max_tokens,
        limit_field=config.limit_field,
        run=config.run,
    )


def _ask(
    config: Config,
    address: str | None,
    cache: "ReplyCache",
    entries: "Sequence[dict[str, Any]]",
    to_send: list[int],
) -> "Outcome":
    from tqdm import tqdm

    from eval.bench.judge import ask_missing
    from revelio.endpoint import Outcome

    if not to_send:
        return Outcome()
    settings = replace(config, base_url=address)
    with tqdm(total=len(to_send), desc="judge", unit="review") as bar:
        return ask_missing(cache, entries, to_send, settings, bar.update)


def _stop_if_down(
    outcome: "Outcome", requests: "Sequence[Request]", address: str | None, cache_path: Path
) -> None:
    if outcome.down is None:
        return
    if not outcome.unanswered:
        raise ValueError(
            f"{outcome.down}; stopped, the replies are in {cache_path}: choose another --judge"
        )
    index = next(iter(outcome.unanswered))
    raise ValueError(
        f"{requests[index].name}: no reply from {address or 'the endpoint'} ({outcome.down}); "
        f"stopped, the replies so far are in {cache_path}: run the same command again to go on"
    )


def _write(
    config: Config,
    judge: "Judge",
    requests: "Sequence[Request]",
    entries: "Sequence[dict[str, Any]]",
    replies: "Sequence[Reply | None]",
) -> None:
    from eval.bench.judge import review, write_lines

    rows = [
        review(number, request, judge, config.mode, entry, reply)
        for number, (request, entry, reply) in enumerate(
            zip(requests, entries, replies, strict=True), start=1
        )
    ]
    write_lines(config.out, rows)
    failed = [row for row in rows if row["failure"]]
    found = plural(len(rows) - len(failed), "review")
    print(f"wrote {config.out}: {found}, {plural(len(failed), 'failure')}")
    for row in failed:
        print(
            f"  question {row['question_id']} ({row['order'].replace('_', ' ')}): {row['failure']}"
        )
    if any(row["content"] is not None for row in failed):
        print("  a failure counts in no mean; --ask-again asks the judge for it once more")
    if len(failed) == len(rows) and all(row["content"] is not None for row in failed):
        raise ValueError(
            f"not one of {plural(len(rows), 'reply', 'replies')} holds two scores ({failed[0]['failure']}): "
            "choose another --judge, or --ask-again"
        )


def _stop_if_unanswered(outcome: "Outcome", requests: "Sequence[Request]", out: Path) -> None:
    if not outcome.unanswered:
        return
    index, why = next(iter(outcome.unanswered.items()))
    ids = list(dict.fromkeys(requests[one].question.id for one in sorted(outcome.unanswered)))
    raise ValueError(
        f"no reply for {len(outcome.unanswered)} of {plural(len(requests), 'review')}, of {name_ids(ids)} "
        f"({requests[index].name}: {why}); {out} marks them as failures: "
        "run the same command again to ask for them"
    )
