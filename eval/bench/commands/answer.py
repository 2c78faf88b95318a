"""Have a finished LLaVA model answer the bench's questions about the bench's images.

    revelio llava-bench answer --bench llava_bench_in_the_wild --model runs/llava/final \\
        --out runs/bench/answers.jsonl

Writes LLaVA's answers.jsonl form: question_id, prompt, answer_id, model_id, text, metadata. The file is
written after every batch: a run that was stopped goes on with the questions that are left. The published runs
sampled at temperature 0.2; by default the likeliest token is taken, so that answers never change.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llava_ext.config import AnswerConfig
from revelio.bounds import Count, Folder, OutFile
from revelio.wording import plural


@dataclass(frozen=True, kw_only=True)
class Config(AnswerConfig):
    """Which model answers, and how."""

    bench: Folder
    """A folder of LLaVA-Bench's layout: questions.jsonl and images/."""

    out: OutFile = Path("runs/bench/answers.jsonl")
    """The answers file to write, or to go on with."""

    model_id: str | None = None
    """What the answers call the model; without it, what --model says."""

    images: Folder | None = None
    """The folder of images; without it, images/ of the bench folder."""

    max_new_tokens: Count = 512

    renamed: ClassVar[dict[str, str]] = {"batch": "batch-size"}

    batch_size: Count = 1
    """Questions answered at once; the answers do not depend on it at temperature 0."""


def run(config: Config) -> None:
    """Check the files, load the model, answer what is left."""
    from eval.bench.answers import Asking, answer_all, check_images, read_finished, weights_of
    from eval.bench.files import made_of, read_questions
    from revelio.files import check_folder, check_place
    from revelio.following import following

    check_place(config.out)
    check_folder(config.out.parent)
    questions = read_questions(config.bench)
    images = config.images or config.bench / "images"
    check_images(questions, images)
    asking = Asking(
        model_id=config.model_id or config.model.rstrip("/"),
        weights=weights_of(config.model),
        **config.decoding(),
    )
    left = len(questions) - len(read_finished(config.out, questions, asking))
    if left:
        from tqdm import tqdm

        from llava_ext.generate import Assistant

        assistant = Assistant.load(
            config.model, device=config.device, dtype=config.dtype, allow=config.allow
        )
        steps = answer_all(
            assistant, questions, images, asking, config.out, batch=config.batch_size
        )
        with tqdm(total=left, desc="answer", unit="question") as bar:
            for count in steps:
                bar.update(count)
    print(f"wrote {config.out}: {plural(len(questions), 'answer')}, {left} of them new")
    files = [
        "--bench",
        config.bench,
        "--answers",
        config.out,
        "--out",
        made_of(config.out, "reviews"),
    ]
    print(following("llava-bench", "judge", *files, "--judge", "JUDGE", "--estimate"))
