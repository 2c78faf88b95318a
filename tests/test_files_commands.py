"""Every command's output beside a user's files and another run's: all found again byte for byte."""

import os
import shutil
from pathlib import Path

import pytest
from cli_helpers import FILES, READERS, WRITERS, all_commands, commands, run_words, write_inputs
from files_helpers import before_operations, bury, bury_partials, contents, killed_at, results

from revelio.outputs import RECORD

# Names of what commands write, of what a user may have, and of another run's.
FOREIGN = (
    *("config.yaml", "metrics.jsonl", "report.json", "report.html", "confusion.png"),
    *("manifest.json", "predictions.jsonl", "top_images.json", "top_images.safetensors"),
    *("sheet.png", "maps.json", "maps.safetensors", "index.html", "gallery.json", "purity.json"),
    *("final/model.safetensors", "final/config.json", "checkpoints/step_00000001/state.json"),
    *("cache/0123456789abcdef-v0.bin", "seeds/seed-0.json", "stages/purity.json", "thumbs/a.jpg"),
    *("evaluation.json", "evaluation.md", "steering.json", "steering.html", "concept.json"),
    *("zero_shot.jsonl", "zero_shot.json", "images.jsonl", "heat_map.png"),
    *("mini-fixed/figure10.json", "mini-fixed/figure10.md"),
    *("concept.safetensors", "text_encoder.block1/manifest.json", "pictures/000-0.png"),
    *("quick.yaml", "answers.jsonl", "scores.json", "explanation.json", "README.md"),
    *("clip-block1-pool2/manifest.json", "pictures.json", "weights.json"),
    *("data/gallery.js", "assets/base.js", "gallery/index.html", "holiday/0.jpg", ".hidden"),
)


# Commands that read no weights here, and one that notes which rows could not run.
NO_WEIGHTS = {"configs copy", "llava-bench score", "llava-bench judge", "reproduce"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revelio.sae.cost.measured_speed", lambda job, kernel: None)


def call(made: Path, name: str, out: Path, *more: str) -> int:
    """The exit status of a command."""
    words = [*map(str, commands(made)[name](out)), *more]
    try:
        run_words(words)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def put(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"precious {name}".encode())
    return contents(folder)


def test_the_table_has_every_command_that_writes(made: Path) -> None:
    """What these tests and the long campaign stop, fill up and run twice: all of it, from one table."""
    assert all_commands() - READERS == set(WRITERS) == set(commands(made))


@pytest.mark.parametrize("name", WRITERS)
def test_names_that_are_taken_are_left_alone(
    made: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = put(tmp_path / "out", FOREIGN)
    for more in ([], ["--resume"]) if WRITERS[name].resumes else ([],):
        assert call(made, name, tmp_path / "out", *more) == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 400
        assert contents(tmp_path / "out") == before


def pictures_of(made: Path, name: str) -> Path | None:
    """The folder of pictures that a command's short call reads; None where it reads none."""
    words = [str(word) for word in commands(made)[name](made / "out")]
    for flag in ("--data.source", "--data.images"):
        if flag in words:
            return Path(words[words.index(flag) + 1])
    return made / "chat" / "images" if {"--image", "--config"} & set(words) else None


@pytest.mark.parametrize("name", sorted({*WRITERS} - {*FILES}))
def test_no_output_goes_among_the_pictures_that_are_read(
    made: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = pictures_of(made, name)
    if pictures is None:
        return
    before = contents(pictures)
    # One picture is read: its folder is refused, as is any other that holds pictures.
    one = name == "llava explain"
    inside = () if one else (pictures / "runs", pictures / "." / "deep" / "runs")
    why = f"among the pictures of {pictures}: choose a folder outside"
    for out in (pictures, *inside):
        assert call(made, name, out) == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert (f"{pictures} is a folder of pictures (" if one else why) in line
        assert contents(pictures) == before and not (pictures / "deep").exists()


@pytest.mark.parametrize("name", sorted({*WRITERS} - {*FILES}))
def test_each_name_that_it_writes_is_left_alone_where_it_is_taken(
    made: Path, tmp_path: Path, name: str
) -> None:
    """A user's file in the place of one of a command's: it is refused, or leaves that file as it is."""
    assert call(made, name, tmp_path / "whole") == 0
    written = {Path(one) for one in contents(tmp_path / "whole")}
    # All at the top, and one of each folder below: a folder's others are written the same way.
    inside = {one.parent: one for one in sorted(written) if one.parent != Path()}
    tried = sorted({one for one in written if one.parent == Path()} | set(inside.values()))
    for number, one in enumerate(tried[:: 1 if name != "demo" else 4]):
        out = tmp_path / str(number)
        before = put(out, (str(one),))
        call(made, name, out)
        assert contents(out)[one.as_posix()] == before[one.as_posix()], one


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {*FILES, "gallery", "demo"}))
def test_a_users_other_files_stay_and_a_second_run_replaces_only_its_own(
    made: Path, tmp_path: Path, name: str
) -> None:
    out, how = tmp_path / "out", WRITERS[name]
    mine = put(out, ("log.txt", "holiday/0.jpg"))
    begun = call(made, name, out)
    if how.once and begun == 2:  # it takes an empty folder only
        assert contents(out) == mine
        return
    assert begun == 0
    written = set(contents(out)) - set(mine)
    assert written
    mine |= {"later.txt": b"x"}
    (out / "later.txt").write_bytes(b"x")
    again = call(made, name, out, *(["--resume"] if how.resumes else []))
    assert again == (2 if how.once else 0)
    after = contents(out)
    assert {key: after[key] for key in mine} == mine
    assert set(after) == written | set(mine)


@pytest.fixture(scope="module")
def damaged(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same inputs, with all weights cut short."""
    copy = tmp_path_factory.mktemp("damaged") / "made"
    shutil.copytree(made, copy)
    config = copy / "chat" / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(copy)))
    for path in copy.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    return copy


@pytest.mark.parametrize("name", sorted({*WRITERS} - NO_WEIGHTS))
def test_what_can_not_be_loaded_leaves_no_folder(damaged: Path, tmp_path: Path, name: str) -> None:
    """Else the right call would have to go elsewhere, or be given as a continuation of the wrong one."""
    assert call(damaged, name, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_a_gallery_is_replaced_around_a_users_files(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(made, "gallery", out) == 0
    first = contents(out)
    mine = put(out / "thumbs" / "mine", ("0.jpg",))
    (out / "gallery.txt").write_text("mine")
    assert call(made, "gallery", out) == 0
    after = contents(out)
    assert after.pop("thumbs/mine/0.jpg") == mine["0.jpg"] and after.pop("gallery.txt") == b"mine"
    assert after == first
    # A folder that holds somebody's gallery.json is no gallery of ours.
    before = put(tmp_path / "theirs", ("gallery.json", "thesis.tex"))
    assert call(made, "gallery", tmp_path / "theirs") == 2
    assert contents(tmp_path / "theirs") == before


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_replaced_only_by_its_own_kind(made: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "deep" / WRITERS[name].place
    assert call(made, name, out) == 0
    first = results(out.parent)
    assert call(made, name, out) == 0
    assert results(out.parent) == first
    for text in ("", "my thesis", "[]", '{"entries": 1}', "\0"):
        out.write_text(text)
        assert call(made, name, out) == 2
        assert out.read_text() == text


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_of_the_wrong_kind_is_refused_before_the_work(
    made: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("precious")
    places = [tmp_path / "file" / "below", tmp_path / "file"]

    def began(*arguments: object, **named: object) -> None:
        pytest.fail("the work began")

    monkeypatch.setattr("revelio.activations.store.ActivationStore.open", began)
    monkeypatch.setattr("revelio.data.open.open_dataset", began)
    for place in places:
        assert call(made, name, place) == 2
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_runs_folder_takes_no_other_commands_report(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(made, "train-ksae", run) == 0
    before = contents(run)
    others = ("extract", "eval-diffc", "train-diffc", "demo", "purity", "llava-bench score")
    for name in others:
        assert call(made, name, run) == 2, name
        assert contents(run) == before, name
    assert call(made, "train-ksae", run, "--resume") == 0
    assert contents(run) == before
    # What takes none of its names may lie beside.
    assert call(made, "top-images", run) == 0
    after = contents(run)
    assert set(after) - set(before) == {"top_images.json", "top_images.safetensors", RECORD}
    assert {key: after[key] for key in before} == before


# Before so many of its file operations each; the long campaign (tools/reliability.py) stops every command of
# the same table before all of them, and tests/test_files_kills.py the trainings.
POINTS = int(os.environ.get("REVELIO_POINTS", "2"))
SLOW = {"demo", "gallery", "eval-ksae", "llava pretrain", "llava finetune"}
TRIED = sorted(set(WRITERS) - SLOW - {"train-ksae", "train-diffc", "top-images"})


@pytest.mark.parametrize("name", TRIED)
def test_a_command_that_is_killed_gives_the_same_when_it_is_given_again(
    made: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    how, counted = WRITERS[name], 0

    def count() -> None:
        nonlocal counted
        counted += 1

    with monkeypatch.context() as patch:
        before_operations(count, patch)
        assert call(made, name, tmp_path / "whole" / how.place) == 0
    expected = results(tmp_path / "whole")
    for number in {round(counted * (part + 0.5) / POINTS) for part in range(POINTS)} - {0}:
        out = tmp_path / str(number) / how.place
        out.parent.mkdir()
        assert killed_at(number, lambda out=out: call(made, name, out), monkeypatch), number
        for lock in out.parent.rglob(".lock"):
            bury(lock)
        bury_partials(out.parent)
        again = call(made, name, out, *(["--resume"] if how.resumes else []))
        assert again == 0 or (how.once and out.exists()), number
        assert results(out.parent) == expected, number
