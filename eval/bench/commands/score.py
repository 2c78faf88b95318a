"""The table of the paper's Table 10 from finished reviews: relative score, reference's, model's.

    relative = 100 * mean(model) / mean(reference)      reference, model: mean scores times ten

    revelio llava-bench score --reviews runs/bench/reviews.jsonl
    revelio llava-bench score --reviews a.jsonl --compare b.jsonl --out runs/bench/scores.json
    revelio llava-bench score --reviews run0.jsonl run1.jsonl run2.jsonl

Each question counts once (both answer orders are averaged first). Intervals are paired bootstraps by
question. --compare gives the difference of two models' relative scores with a permutation p-value. Several
files also show the drift: how far the reference's own score moves from run to run, which is the judge's
noise. Review files that LLaVA wrote are read as they are.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from eval.bench.prompts import Mode
from revelio.bounds import Count, File, NotEmpty, OpenShare, OutFile, PathFields, Seed

if TYPE_CHECKING:
    from eval.bench.reviews import Scores

HOW = ("mode", "bootstrap", "confidence", "seed")  # what one comparison shares with the next


@dataclass(frozen=True)
class Config(PathFields):
    """Which reviews, and how their scores are summed up."""

    reviews: Annotated[tuple[File, ...], NotEmpty()]
    """Review files; each gives one table, several also give the drift between them."""

    compare: File | None = None
    """Another model's reviews of the same questions; each of --reviews is compared with it."""

    mode: Mode = "fixed"
    """fixed: failures are left out. as_paper: they count as -1, as in LLaVA's summary."""

    format: Literal["table", "llava"] = "table"
    """table: with intervals. llava: the lines of LLaVA's published summary, and nothing else."""

    renamed: ClassVar[dict[str, str]] = {"json": "out", "resamples": "bootstrap"}

    out: OutFile | None = None
    """Also write everything to this JSON file."""

    bootstrap: Count = 10_000
    """Resamples of the bootstrap, shuffles of the permutation test."""

    confidence: OpenShare = 0.95
    """The confidence level of the intervals."""

    seed: Seed = 0
    """Seed of the bootstrap and of the permutations."""


def run(config: Config) -> None:
    """Read, score, print, write the JSON."""
    from eval.bench.files import made_of
    from eval.bench.reviews import read_scores
    from eval.bench.table import llava_summary
    from revelio.following import flags, following
    from revelio.outputs import check_file, has_keys
    from revelio.pipelines.inputs import check_same_source
    from revelio.run_dir import write_json

    if config.out is not None:
        check_file(config.out, has_keys("format", "mode", "files"), "a table of scores")
    files = [read_scores(path, config.mode) for path in config.reviews]
    report = make_report(config, files)
    if config.out is not None:
        check_same_source(config.out, _made_as, _made_as(report))
    if config.format == "llava":
        for file in files:
            print(llava_summary(file.path.stem, file.counted, config.mode))
    else:
        print(report_text(report))
    if config.out is not None:
        write_json(config.out, report)
        if config.format == "table":
            print(f"\nwrote {config.out}")
    if config.format == "table" and config.compare is None:
        # Beside the reviews, and not in the place of their own scores.
        out = made_of(config.reviews[0], "comparison", ".json")
        words = ["--reviews", *config.reviews, "--compare", "REVIEWS", *flags(config, "", *HOW)]
        print(f"\n{following('llava-bench', 'score', *words, '--out', out)}")


def _made_as(report: dict[str, Any]) -> Any:
    """Which reviews are scored and how, to be compared: the reviews themselves may have grown."""
    how = [report.get(key) for key in ("mode", "resamples", "confidence", "seed")]
    compared = [(one.get("compared_with") or {}).get("reviews") for one in report["files"]]
    return [how, [one["reviews"] for one in report["files"]], compared]


def make_report(config: Config, files: "list[Scores]") -> dict[str, Any]:
    """Everything `score` knows, as plain values, with what made it."""
    from eval.bench.reviews import read_scores
    from eval.bench.score import compare, drift, positions, table
    from revelio.run_dir import sha256

    other = read_scores(config.compare, config.mode) if config.compare else None
    chosen = {"resamples": config.bootstrap, "confidence": config.confidence, "seed": config.seed}
    report: dict[str, Any] = {"format": 1, "mode": config.mode, **chosen, "files": []}
    for file in files:
        entry = {
            "reviews": str(file.path),
            "sha256": sha256(file.path),
            "scores": table(file, **chosen),
        }
        if seats := positions(file):
            entry["positions"] = seats
        if other is not None:
            entry["compared_with"] = {"reviews": str(other.path), "sha256": sha256(other.path)}
            entry["difference"] = compare(file, other, **chosen)
        report["files"].append(entry)
    if len(files) > 1:
        report["drift"] = drift(files)
    return report


def report_text(report: dict[str, Any]) -> str:
    """The report as plain tables."""
    from eval.bench.table import compare_table, drift_table, position_text, score_table

    percent = f"{100 * report['confidence']:g} % intervals, paired bootstrap by question"
    blocks = []
    for entry in report["files"]:
        blocks.append(f"{entry['reviews']} (mode {report['mode']}; {percent})")
        blocks.append(score_table(entry["scores"]))
        if half := entry["scores"]["all"]["half_answered"]:
            blocks.append(f"{half} with a score in one order only: left out")
        if "positions" in entry:
            blocks.append(position_text(entry["positions"]))
        if "difference" in entry:
            blocks.append(f"\nrelative score minus that of {entry['compared_with']['reviews']}")
            blocks.append(compare_table(entry["difference"]))
        blocks.append("")
    if "drift" in report:
        blocks.append("drift of the reference's own score (the judge's noise)")
        blocks.append(drift_table(report["drift"]))
    return "\n".join(blocks).rstrip()
