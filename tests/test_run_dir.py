import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml
from files_helpers import contents

from revelio import lock
from revelio.disk import DiskFull
from revelio.run_dir import Run, read_json, sha256, write_json, write_whole, write_whole_by


def test_write_whole_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_whole(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"disk is full: no room for .*a\.txt"):
        write_whole_by(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_json_refuses_nan_and_names_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"no file at .*c\.json"):
        read_json(tmp_path / "c.json")


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"revelio" * 1000)
    assert sha256(path) == hashlib.sha256(b"revelio" * 1000).hexdigest()


def test_a_run_is_made_logged_and_finished(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", "train-ksae", "k: 32\n")
    run.log(step=1, loss=0.5)
    run.log(step=2, loss=0.25)
    run.add_input("store", "abc")
    run.finish(files=["final"])
    manifest = read_json(tmp_path / "run" / "manifest.json")
    assert manifest["status"] == "finished" and manifest["inputs"] == {"store": "abc"}
    assert manifest["files"] == ["final"] and manifest["seconds"] >= 0
    lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.5, 0.25]


def test_a_second_run_needs_resume_and_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "run"
    Run.open(path, "train-ksae", "k: 32\ndevice: cpu\nresume: false\n")
    with pytest.raises(ValueError, match="already holds a run: continue it with resume"):
        Run.open(path, "train-ksae", "k: 32\n")
    with pytest.raises(ValueError, match="started with `k: 32`, not `k: 16`"):
        Run.open(path, "train-ksae", "k: 16\ndevice: cpu\nresume: true\n", resume=True)
    again = Run.open(path, "train-ksae", "k: 32\ndevice: cuda\nresume: true\n", resume=True)
    assert not again.finished


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (
            {"layers": ["up_ft1"]},
            {"layers": ["up_ft9"]},
            "`layers: [up_ft1]`, not `layers: [up_ft9]`",
        ),
        ({"layers": ["a", "b"]}, {"layers": ["a"]}, "`layers: [a, b]`, not `layers: [a]`"),
        ({"sae": {"k": 4}}, {"sae": {"k": 8}}, "`sae.k: 4`, not `sae.k: 8`"),
        (
            {"to": [{"a": 1}, {"a": 2}]},
            {"to": [{"a": 1}, {"a": 3}]},
            "`to.1.a: 2`, not `to.1.a: 3`",
        ),
        ({"limit": None}, {"limit": 5}, "`limit: none`, not `limit: 5`"),
        ({"k": 4}, {"k": 4, "seed": 1}, "`seed: none`, not `seed: 1`"),
    ],
)
def test_a_setting_that_differs_is_named(tmp_path: Path, was: dict, now: dict, said: str) -> None:
    path = tmp_path / "run"
    Run.open(path, "demo", yaml.safe_dump(was)).close()
    with pytest.raises(ValueError, match=re.escape(f"{path} was started with {said}: resume with")):
        Run.open(path, "demo", yaml.safe_dump(now), resume=True)
    Run.open(path, "demo", yaml.safe_dump(was), resume=True).close()


def test_resume_refuses_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="no run to resume"):
        Run.open(tmp_path, "t", "a: 1\n", resume=True)


def test_checkpoints_keep_the_last_and_metrics_are_cut_back(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", "t", "a: 1\n")
    for step in (10, 20, 30):
        run.log(step=step)
        run.save_checkpoint(step, lambda folder, s=step: (folder / "state.json").write_text(str(s)))
    found = run.latest_checkpoint()
    assert found is not None and found[0] == 30 and (found[1] / "state.json").read_text() == "30"
    assert [p.name for p in sorted((run.path / "checkpoints").iterdir())] == [
        "step_00000020",
        "step_00000030",
    ]
    run.truncate_metrics(20)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [
        10,
        20,
    ]


def test_metrics_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(tmp_path / "run", "t", "a: 1\n")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"no room for .*metrics\.jsonl"):
        run.log(step=1)


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "lo', b"\0" * 40, b'{"a": "\xc3', b"\n\n"])
def test_a_torn_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    run = Run.open(tmp_path / "run", "t", "a: 1\n")
    for step in (1, 2):
        run.log(step=step, loss=float("nan"))
    whole = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(whole + tail)
    run = Run.open(tmp_path / "run", "t", "a: 1\n", resume=True)
    assert run.metrics_path.read_bytes() == whole
    run.truncate_metrics(1)
    assert run.metrics_path.read_bytes() == whole.splitlines(keepends=True)[0]


@pytest.mark.parametrize("left", ["", "\0\0\0", "a: 1\n", None])
def test_a_run_that_was_hardly_begun_goes_on(tmp_path: Path, left: str | None) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / ".lock").write_text(json.dumps({**lock._self(), "pid": 2**22 + 9}))
    if left is not None:
        (path / "config.yaml").write_text(left)
    (path / "log.txt").write_text("mine")
    (path / ".step_00000010.77.partial").mkdir()
    run = Run.open(path, "t", "a: 1\n", resume=True)
    assert not run.finished and (path / "config.yaml").read_text() == "a: 1\n"
    assert sorted(p.name for p in path.iterdir()) == [
        ".lock",
        "config.yaml",
        "log.txt",
        "manifest.json",
    ]


def test_half_written_checkpoints_are_swept_and_others_stay(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", "t", "a: 1\n")
    run.save_checkpoint(10, lambda folder: (folder / "a.safetensors").write_text(""))
    folder = run.path / "checkpoints"
    for name in (".step_00000020.77.partial", ".step_00000020.77-0123abcd.partial"):
        (folder / name).mkdir()
        (folder / name / "a.safetensors").write_text("")
    (folder / "step_best").mkdir()
    (folder / "step_best" / "mine").write_text("mine")
    (folder / "step_00000010" / "notes").write_text("mine")
    (folder / ".notes.partial").write_text("mine")
    run = Run.open(tmp_path / "run", "t", "a: 1\n", resume=True)
    for step in (20, 30, 40):
        run.save_checkpoint(step, lambda folder: (folder / "a.safetensors").write_text(""))
    assert sorted(contents(folder)) == [
        ".notes.partial",
        "step_00000010/notes",
        "step_00000030/a.safetensors",
        "step_00000040/a.safetensors",
        "step_best/mine",
    ]
    assert run.latest_checkpoint() == (40, folder / "step_00000040")
    run.drop_checkpoints(keep=0)
    assert sorted(contents(folder)) == [".notes.partial", "step_00000010/notes", "step_best/mine"]


def test_a_finished_run_that_lost_a_result_is_unfinished(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", "t", "a: 1\n", results=["report.json"])
    run.finish()
    again = Run.open(tmp_path / "run", "t", "a: 1\n", resume=True, results=["report.json"])
    assert not again.finished
    (tmp_path / "run" / "report.json").write_text("{}")
    again.finish()
    again = Run.open(tmp_path / "run", "t", "a: 1\n", resume=True, results=["report.json"])
    assert again.finished
    with pytest.raises(ValueError, match="holds a run of t, not of train-ksae"):
        Run.open(tmp_path / "run", "train-ksae", "a: 1\n", resume=True)


def test_a_store_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 1, "shards": []}')
    with pytest.raises(ValueError, match="no run's manifest"):
        Run.open(tmp_path, "t", "a: 1\n", resume=True)


@pytest.mark.parametrize("name", ["seconds", "inputs"])
@pytest.mark.parametrize("value", [None, [], "much", True])
def test_a_manifest_of_another_form_is_one_line(tmp_path: Path, name: str, value: object) -> None:
    Run.open(tmp_path / "run", "t", "a: 1\n").add_input("x", {"a": 1})
    path = tmp_path / "run" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    lock.take_lock(tmp_path / "run").release()
    with pytest.raises(ValueError, match=rf"manifest\.json has {name} ") as caught:
        Run.open(tmp_path / "run", "t", "a: 1\n", resume=True)
    assert "\n" not in str(caught.value)
