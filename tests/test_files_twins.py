"""Two processes in one folder: the second is refused by one line that names the first."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from activations_helpers import SETTINGS, FakeBackbone, memory_dataset
from command_helpers import fails
from files_helpers import contents
from sae_helpers import planted, random_model

from revelio.activations.config import ExtractConfig
from revelio.activations.extract import extract
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.store import write_store
from revelio.distributed import Processes
from revelio.lock import NAME, take_lock
from revelio.outputs import claimed, replace_files


@pytest.fixture(scope="module")
def other() -> Iterator[int]:
    """The id of another process that lives."""
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1
    ) as process:
        yield process.pid
        process.kill()


def hold(folder: Path, pid: int) -> None:
    """A lock as that process would have taken it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder)
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    lock.release()
    (folder / NAME).write_text(json.dumps(lock.owner | {"pid": pid, "started": started}))


def words_of(root: Path) -> dict[str, list[str]]:
    rows, _ = planted(20, 6, 6, 2, noise=0.1)
    grids = rows.reshape(20, 6, 1, 1)
    settings = {"pool": "none", "layer": "mix", "classes": ["a", "b"]}
    write_store(root / "store", rows, [str(i) for i in range(20)])
    (root / "prompts.csv").write_text("prompt\na dog\n")
    write_store(root / "grids", grids, [str(i) for i in range(20)], [0, 1] * 10, settings=settings)
    random_model(d=6).save_pretrained(root / "ksae")
    parts = ["--store", str(root / "store"), "--ksae", str(root / "ksae")]
    return {
        "top-images": ["top-images", *parts],
        "gallery": ["gallery", *parts, "--data.source", str(root / "none")],
        "eval-diffc": ["eval-diffc", "--diffc", "x/y", "--store", str(root / "grids")],
        "pca-maps": ["pca-maps", "--data.source", str(root / "none")],
        "steer": ["steer", "--prompts-file", str(root / "prompts.csv"), "--backbone.name", "none"],
        "steer-eval": ["steer-eval", "--target", "dog", "--backbone.name", "none"],
        "concept": ["concept", "--texts", "a dog", "--layer", "text_encoder.block1",
                    "--backbone.name", "none"],
        "train-ksae": ["train-ksae", "--store", str(root / "store"), "--resume"],
        "train-diffc": ["train-diffc", "--store", str(root / "grids"), "--test-store",
                        str(root / "grids"), "--resume"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "command",
    ["top-images", "gallery", "eval-diffc", "pca-maps", "steer", "steer-eval", "concept", "train-ksae",
     "train-diffc"],
)  # fmt: skip
def test_a_second_process_is_refused_before_the_work(
    tmp_path: Path, command: str, other: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tmp_path)[command]
    hold(tmp_path / "out", other)
    before = contents(tmp_path / "out")
    line = fails(capsys, *words, "--out", tmp_path / "out")
    assert f"is in use by process {other} on " in line and "wait until it has ended" in line
    assert contents(tmp_path / "out") == before


def test_the_table_of_a_run_that_ended_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from revelio.pipelines import probe as pipeline

    pair = tmp_path / "train", tmp_path / "test"
    for path in pair:
        rows, ids = planted(8, 6, 6, 2)[0], [f"{path.name}-{i}" for i in range(8)]
        write_store(path, rows, ids, [0, 1] * 4, settings={"classes": ["a", "b"]})
    asked = pipeline.ProbeConfig(
        store=pair[:1], test_store=pair[1:], probes=("knn",), out=tmp_path / "probe.json"
    )

    def ended() -> dict[str, str]:
        monkeypatch.undo()
        pipeline.probe(replace(asked, seed=1))
        return {}

    monkeypatch.setattr(pipeline, "versions", ended)
    with pytest.raises(ValueError, match="holds a result of"):
        pipeline.probe(asked)
    assert json.loads(asked.out.read_text())["config"]["seed"] == 1


def test_a_second_extraction_of_a_store_is_refused(tmp_path: Path, other: int) -> None:
    dataset, settings = memory_dataset(11), SETTINGS | {"timesteps": (25,)}
    stores = extract(
        dataset, FakeBackbone(), tmp_path / "whole", vae_cache=tmp_path / "z0", **settings
    )
    assert not list(tmp_path.rglob(NAME))
    for name in (stores[0].name, "z0"):
        here = tmp_path / name
        cut, cache = here / "run", here / "z0"
        held = cache if name == "z0" else cut / name
        hold(held, other)
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"{held} is in use by process {other}"):
                extract(dataset, FakeBackbone(), cut, vae_cache=cache, resume=resume, **settings)
        assert [path.name for path in held.iterdir()] == [NAME]
        (held / NAME).unlink()
        extract(dataset, FakeBackbone(), cut, vae_cache=cache, resume=True, **settings)
        assert contents(cut) == contents(tmp_path / "whole")


def test_the_store_is_held_while_it_is_filled_and_read_without(tmp_path: Path, other: int) -> None:
    held: list[set[str]] = []

    class Watching(FakeBackbone):
        def encode(self, pixels):
            held.append({path.parent.name for path in tmp_path.rglob(NAME)})
            return super().encode(pixels)

    dataset, settings = memory_dataset(11), SETTINGS | {"timesteps": (25,)}
    stores = extract(dataset, Watching(), tmp_path / "run", **settings)
    assert held and all(names == {store.name for store in stores} for names in held)
    # A finished store is only read: others may do so at the same time.
    hold(stores[0], other)
    extract(dataset, FakeBackbone(), tmp_path / "run", resume=True, **settings)


def test_other_processes_of_the_same_run_take_no_lock(tmp_path: Path) -> None:
    from revelio.activations.extract import run

    config = ExtractConfig(layers=("deep",), batch_size=2, shard_rows=2)
    job = ExtractionPlan(memory_dataset(4), FakeBackbone(), tmp_path / "run", config)
    with claimed_store(job):
        for _ in run(replace(job, processes=Processes(1, 2))):
            pass


class claimed_store:
    """The first process of a run, between begin and finish."""

    def __init__(self, job: ExtractionPlan) -> None:
        self.job = job

    def __enter__(self) -> None:
        self.locks = self.job.begin()

    def __exit__(self, *_: object) -> None:
        assert self.locks
        for lock in self.locks:
            lock.release()


def test_a_claim_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        with pytest.raises(KeyError), claimed(folder):
            assert (folder / NAME).is_file()
            raise KeyError
    assert sorted(os.listdir(tmp_path)) == ["empty"] and not os.listdir(tmp_path / "empty")
    with claimed(tmp_path / "out"):
        replace_files(tmp_path / "out", "m", lambda folder: (folder / "a").write_text("1"))
        assert (tmp_path / "out" / NAME).is_file()
    assert (tmp_path / "out" / "a").read_text() == "1" and not (tmp_path / "out" / NAME).exists()
