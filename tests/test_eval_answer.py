"""A model's answers: their form, going on after a stop, and the command line of the script."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from eval_helpers import make_bench, read_jsonl, write_jsonl
from PIL import Image

from eval.bench.answers import Asking, answer_all, check_images, read_finished, weights_of
from eval.bench.files import read_answers, read_questions
from eval.llava_bench import main

ASKING = Asking(model_id="tiny", max_new_tokens=16, temperature=0.0, seed=0)


class FakeAssistant:
    """Answers with the question and the colour of the picture; stops after so many batches."""

    def __init__(self, batches: int = 100) -> None:
        self.batches = batches
        self.asked: list[list[str]] = []

    def answer(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        if len(self.asked) == self.batches:
            raise KeyboardInterrupt
        self.asked.append(list(prompts))
        assert (max_new_tokens, temperature, seed) == (16, 0.0, 0)
        return [
            f" {prompt} {image.getpixel((0, 0))}\n"
            for prompt, (image,) in zip(prompts, images, strict=True)
        ]


def answer(bench: Path, out: Path, model: FakeAssistant, asking: Asking = ASKING, batch: int = 1):
    questions = read_questions(bench)
    return sum(answer_all(model, questions, bench / "images", asking, out, batch=batch))


def test_the_form_is_llava_s_and_the_judge_reads_it(tmp_path: Path) -> None:
    bench, out = make_bench(tmp_path / "bench"), tmp_path / "runs" / "a.jsonl"
    assert answer(bench, out, FakeAssistant()) == 6
    rows = read_jsonl(out)
    assert list(rows[0]) == ["question_id", "prompt", "answer_id", "model_id", "text", "metadata"]
    with Image.open(bench / "images" / "001.jpg") as image:
        pixel = image.convert("RGB").getpixel((0, 0))
    assert rows[3]["text"] == f"What is in picture 3? {pixel}"
    assert rows[3]["metadata"] == {"max_new_tokens": 16, "temperature": 0.0, "seed": 0}
    assert len({row["answer_id"] for row in rows}) == 6 and len(rows[0]["answer_id"]) == 22
    read = read_answers(out, read_questions(bench))
    assert [one.text for one in read] == [row["text"] for row in rows]


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "bench")
    answer(bench, tmp_path / "whole.jsonl", FakeAssistant(), batch=4)
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(bench, out, FakeAssistant(batches=2), batch=2)
    assert len(read_jsonl(out)) == 4
    model = FakeAssistant()
    assert answer(bench, out, model) == 2
    assert model.asked == [["What is in picture 4?"], ["What is in picture 5?"]]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    idle = FakeAssistant(batches=0)
    assert answer(bench, out, idle) == 0


def test_a_gap_in_the_file_is_filled_in_the_questions_order(tmp_path: Path) -> None:
    bench, out = make_bench(tmp_path / "bench"), tmp_path / "a.jsonl"
    answer(bench, out, FakeAssistant())
    whole = out.read_bytes()
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2] + lines[4:]))
    assert answer(bench, out, FakeAssistant()) == 2
    assert out.read_bytes() == whole


def test_other_answers_in_the_file_are_refused(tmp_path: Path) -> None:
    bench, out = make_bench(tmp_path / "bench"), tmp_path / "a.jsonl"
    answer(bench, out, FakeAssistant())
    questions = read_questions(bench)
    other = replace(ASKING, model_id="big")
    with pytest.raises(ValueError, match=r"question 0 with model_id 'tiny', not 'big'"):
        read_finished(out, questions, other)
    with pytest.raises(ValueError, match=r"question 0 with metadata .*choose another output file"):
        read_finished(out, questions, replace(ASKING, temperature=0.2))
    with pytest.raises(ValueError, match=r"answers question 5, unknown to the bench"):
        read_finished(out, questions[:5], ASKING)


def test_answers_of_other_weights_in_the_same_place_are_refused(tmp_path: Path) -> None:
    bench, out, model = make_bench(tmp_path / "bench"), tmp_path / "out.jsonl", tmp_path / "model"
    (model / "language_model").mkdir(parents=True)
    (model / "language_model" / "model.safetensors").write_bytes(b"1")
    questions = read_questions(bench)

    def asked() -> Asking:
        return replace(ASKING, weights=weights_of(str(model)))

    list(answer_all(FakeAssistant(), questions, bench / "images", asked(), out, batch=6))
    assert len(read_finished(out, questions, asked())) == len(questions)
    (model / "language_model" / "model.safetensors").write_bytes(b"2")
    with pytest.raises(ValueError, match=r"with metadata .*choose another output file"):
        read_finished(out, questions, asked())
    # Those of an earlier version say nothing of weights.
    rows = [row | {"metadata": ASKING.decoding()} for row in read_jsonl(out)]
    write_jsonl(out, rows)
    assert len(read_finished(out, questions, asked())) == len(questions)
    assert weights_of("nobody/on-a-hub") is None


@pytest.mark.parametrize("image", ["../other/000.jpg", "/etc/000.jpg", "a/../../000.jpg", ""])
def test_a_bench_names_no_picture_outside_its_images(tmp_path: Path, image: str) -> None:
    bench = make_bench(tmp_path / "bench")
    rows = read_jsonl(bench / "questions.jsonl")
    write_jsonl(bench / "questions.jsonl", [*rows[:-1], rows[-1] | {"image": image}])
    with pytest.raises(
        ValueError, match=r"questions\.jsonl: the image of question 5 is .* no file"
    ):
        read_questions(bench)


def test_what_the_model_refuses_is_named_by_the_bench_s_ids(tmp_path: Path) -> None:
    class Refuses(FakeAssistant):
        def answer(self, prompts: Sequence[str], images, **settings) -> list[str]:
            if "picture 4" in prompts[0]:
                raise ValueError("question 1 takes too many tokens")
            return super().answer(prompts, images, **settings)

    bench, out = make_bench(tmp_path / "bench"), tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match=r"^asked questions 4, 5: question 1 takes too many"):
        answer(bench, out, Refuses(), batch=2)
    assert len(read_jsonl(out)) == 4


def test_a_missing_or_broken_image_names_the_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = make_bench(tmp_path / "bench")
    (bench / "images" / "001.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"question 2: .*001.jpg"):
        answer(bench, tmp_path / "a.jsonl", FakeAssistant())
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 2
    (bench / "images" / "001.jpg").unlink()
    with pytest.raises(ValueError, match=r"no image .*001.jpg, which questions 2, 3 need"):
        check_images(read_questions(bench), bench / "images")
    with pytest.raises(SystemExit) as caught:
        main(["answer", "--bench", str(bench), "--model", "runs/none"])
    assert caught.value.code == 2 and "001.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["answer", "judge", "score"])
def test_help_reads_like_a_page_and_needs_nothing_heavy(tmp_path: Path, command: str) -> None:
    script = Path(__file__).parents[1] / "eval" / "llava_bench.py"
    program = (
        "import atexit, runpy, sys\n"
        f"sys.argv = ['llava_bench.py', {command!r}, '--help']\n"
        "heavy = {'torch', 'openai', 'transformers'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"revelio llava-bench {command}" in done.stdout and "--config FILE" in done.stdout
    assert done.stdout.endswith("heavy: []\n")


def test_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "answer" in capsys.readouterr().out
    for words, message in (
        (["juge"], "unknown command 'juge': did you mean judge? choose from answer, judge, score"),
        (["score", "--config"], "--config needs a file"),
        (["score", "--config", str(tmp_path / "c.yaml")], "no config file at"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and message in error and error.count("\n") == 1
    (tmp_path / "c.yaml").write_text("reviews: [a.jsonl]\nbootstrp: 3\n")
    with pytest.raises(SystemExit):
        main(["score", "--config", str(tmp_path / "c.yaml")])
    assert "unknown key `bootstrp`: did you mean `bootstrap`?" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(f"reviews: [{tmp_path / 'a.jsonl'}]\nbootstrap: 3\n")
    with pytest.raises(SystemExit):
        main(["score", f"--config={tmp_path / 'c.yaml'}", "--mode", "as_paper"])
    assert "there is no such file" in capsys.readouterr().err
