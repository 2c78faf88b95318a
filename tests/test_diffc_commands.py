import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_helpers import fails
from diffc_helpers import write_folders
from PIL import Image

from revelio import cli
from revelio.backbones.config import BackboneConfig
from revelio.cli import eval_diffc, train_diffc
from revelio.data.config import DataConfig
from revelio.diffc.config import EvalDiffCConfig, TrainDiffCConfig
from revelio.pipelines import Progress
from revelio.pipelines.eval_diffc import eval_diffc as eval_diffc_pipeline
from revelio.pipelines.train_diffc import train_diffc as train_diffc_pipeline

ROOT = Path(__file__).parents[1]
BRIEF = ["--epochs", "3", "--width", "8", "--learning-rate", "0.005", "--views", "1"]
PIXELS = ["--backbone.name", "pixels", "--layer", "pixels", "--timestep", "None"]


def train_flags(data: Path, out: Path) -> list[str]:
    source = ["--data.source", str(data), "--test.split", "None", "--out", str(out)]
    return ["train-diffc", *source, *PIXELS, *BRIEF]


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_train_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_folders(tmp_path / "data", 16), tmp_path / "run"
    longer = ["--epochs", "10", "--batch-size", "8", "--width", "32"]
    cli.main([*train_flags(data, out), "--seeds", "2", *longer])
    printed = capsys.readouterr().out
    assert "parameters" in printed
    report = report_of(out)
    assert report["top1"] == 1.0  # three colours
    assert report["interval_kind"] == "95 %, trainings and test images"
    assert report["images"] == {"train": 36, "validation": 3, "test": 9}
    assert report["grids"]["backbone"] == "pixels"
    assert report["mode"] == "fixed"
    assert {seed["best"]["epoch"] for seed in report["seeds"]} <= set(range(1, 11))
    with Image.open(out / "confusion.png") as image:
        assert image.format == "PNG"
    assert not (out / "checkpoints").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 20
    assert str(tmp_path) not in (out / "report.json").read_text()
    card = (out / "final" / "README.md").read_text()
    assert "| grids: backbone | pixels |" in card and "| training: learning rate | 0.005 |" in card
    assert "| last epoch, test images: top1 | 1 |" in card and "license" not in card

    fresh = write_folders(tmp_path / "fresh", 3, start=900)
    flags = ["--diffc", str(out / "final"), "--data.source", str(fresh), "--data.split", "None"]
    cli.main(["eval-diffc", *flags, "--out", str(tmp_path / "eval")])
    result = report_of(tmp_path / "eval")
    assert (result["top1"], result["images"]) == (1.0, 9)
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["predicted"] for line in lines] == ["blue"] * 3 + ["green"] * 3 + [
        "red"
    ] * 3


def test_eval_without_labels_and_with_unknown_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    cli.main(train_flags(write_folders(tmp_path / "data", 6), out))
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, name in enumerate(("red", "blue")):
        source = tmp_path / "data" / name / "0.png"
        (flat / f"{number}.png").write_bytes(source.read_bytes())
    flags = ["eval-diffc", "--diffc", str(out / "final"), "--data.split", "None"]
    cli.main([*flags, "--data.source", str(flat), "--out", str(tmp_path / "eval")])
    said = capsys.readouterr().out
    assert "no labels" in said and str(tmp_path / "eval" / "confusion.png") not in said
    assert "top1" not in report_of(tmp_path / "eval")
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "pink")
    line = fails(capsys, *flags, "--data.source", str(tmp_path / "data"))
    assert (
        "doesn't know pink: its 3 classes are blue, green, red: give pictures of those, or, for"
        in line
    )
    (tmp_path / "data" / "pink").rename(tmp_path / "data" / "red")
    known = [*flags, "--data.source", str(tmp_path / "data")]
    cli.main([*known, "--out", str(tmp_path / "labelled")])
    said = capsys.readouterr().out
    assert str(tmp_path / "labelled" / "confusion.png") in said
    assert "next: revelio train-diffc --data.source" in said  # of pixels there are no maps
    assert "trained on pixels: give `backbone` as that)" in fails(
        capsys, *known, "--backbone", "mini-clip", "--out", str(tmp_path / "other")
    )


def test_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folders(tmp_path / "data", 8)
    whole = [*train_flags(data, tmp_path / "whole"), "--seeds", "2"]
    cli.main(whole)

    from revelio.pipelines import train_diffc as pipeline

    saved = 0

    def save_then_die(training, folder) -> None:
        nonlocal saved
        saved += 1
        if saved == 5:  # the second epoch of the second seed is lost
            raise KeyboardInterrupt
        real(training, folder)

    real = pipeline.save_training
    monkeypatch.setattr(pipeline, "save_training", save_then_die)
    cut = [*train_flags(data, tmp_path / "cut"), "--seeds", "2"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(cut)
    assert stopped.value.code == 130
    monkeypatch.setattr(pipeline, "save_training", real)
    assert "already holds a run" in fails(capsys, *cut)
    cli.main([*cut, "--resume"])
    for name in ("final/model.safetensors", "confusion.png"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, two = (report_of(tmp_path / name) for name in ("whole", "cut"))
    for seed in (*one["seeds"], *two["seeds"]):
        for entry in seed["history"]:
            entry.pop("seconds")
    assert one["seeds"] == two["seeds"]
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 6
    capsys.readouterr()
    cli.main([*cut, "--resume"])
    assert "finished" in capsys.readouterr().out


def test_on_line_and_stored_in_files(tmp_path: Path) -> None:
    data = write_folders(tmp_path / "data", 6)
    cli.main([*train_flags(data, tmp_path / "a"), "--mode", "as_code", "--views", "-1"])
    report = report_of(tmp_path / "a")
    assert (report["views"], report["selected"]) == (None, "last")
    assert report["settings"]["period"] == 90
    cli.main([*train_flags(data, tmp_path / "b"), "--cache-gb", "0"])
    cli.main([*train_flags(data, tmp_path / "c")])
    assert not (tmp_path / "b" / "cache").exists()
    files = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in "bc"]
    assert files[0] == files[1]


def test_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from revelio.activations.store import write_store

    made = {"classes": ["a", "b"], "layer": "mix", "timestep": 25, "prompt_policy": "empty"}
    labels = [n % 2 for n in range(24)]
    grids = torch.randn(24, 4, 3, 3) + torch.tensor(labels).view(-1, 1, 1, 1) * 3.0
    for name in ("d0", "d1", "test"):
        write_store(tmp_path / name, grids, [f"i{n}" for n in range(24)], labels, settings=made)
    out = tmp_path / "run"
    flags = ["train-diffc", "--store", str(tmp_path / "d0"), str(tmp_path / "d1"), *BRIEF]
    assert "test_store" in fails(capsys, *flags)
    cli.main([*flags, "--test-store", str(tmp_path / "test"), "--out", str(out)])
    assert report_of(out)["views"] == 2
    flags = ["eval-diffc", "--diffc", str(out / "final"), "--out", str(tmp_path / "eval")]
    cli.main([*flags, "--store", str(tmp_path / "test")])
    selected = report_of(out)["seeds"][0][report_of(out)["selected"]]
    assert report_of(tmp_path / "eval")["top1"] == selected["test"]["top1"]
    assert "trained on stored grids" in fails(capsys, *flags)
    other = made | {"timestep": 200}
    write_store(tmp_path / "t200", grids, [f"i{n}" for n in range(24)], labels, settings=other)
    assert "timestep 200" in fails(capsys, *flags, "--store", str(tmp_path / "t200"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--layer", "up_ft1"], "unknown layer 'up_ft1' of pixels"),
        (["--timestep", "25"], "no timestep"),
        (["--data.source", "nowhere/at/all"], "nowhere/at/all"),
        (["--test.split", "train"], "test.split None cuts some off"),
        (["--random-weights", "0"], "no weights"),
        (["--views", "-2"], "--views is -2"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--epochs", "0"], "--epochs is 0"),
    ],
)
def test_mistakes(
    tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folders(tmp_path / "data", 4)
    assert message in fails(capsys, *train_flags(data, tmp_path / "run"), *change)
    assert not (tmp_path / "run").exists()


def evaluated(model: Path, out: Path, *source: str) -> dict:
    cli.main(["eval-diffc", "--diffc", str(model), "--out", str(out), *source])
    return report_of(out)


def test_plain_class_folders_hold_a_fifth_out_which_eval_finds_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_folders(tmp_path / "data", 10), tmp_path / "run"
    cli.main(["train-diffc", "--data.source", str(data), "--out", str(run), *PIXELS, *BRIEF])
    assert "6 of 30 images (20% of every class) are held out" in capsys.readouterr().out
    images = report_of(run)["images"]
    assert images["train"] + images["validation"] == 24 and images["test"] == 6
    chosen = report_of(run)["seeds"][0][report_of(run)["selected"]]["test"]

    # The same folder: what was trained on is left out, so that the held-out fifth is measured.
    found = evaluated(run / "final", tmp_path / "a", "--data.source", str(data))
    said = capsys.readouterr().out
    assert "data has no splits: all 30 images are taken" in said
    assert "24 images are left out: the classifier was trained on them" in said
    assert found["trained_on"] == {"images": 24, "left_out": True}
    assert (found["images"], found["top1"]) == (6, chosen["top1"])
    lines = [json.loads(x) for x in (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and sum("trained_on" in line for line in lines) == 24

    # The same pictures under other names, in another folder, in another format.
    moved = tmp_path / "moved"
    for number, line in enumerate(lines):
        target = moved / line["label"] / f"x{number}.bmp"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(data / line["id"]) as image:
            image.save(target)
    again = evaluated(run / "final", tmp_path / "b", "--data.source", str(moved))
    assert (again["images"], again["top1"]) == (6, found["top1"])

    # Other pictures under the same names are other pictures.
    fresh = write_folders(tmp_path / "fresh" / "data", 10, start=500)
    for path in sorted(fresh.rglob("*.png")):
        path.rename(path.with_name(f"{int(path.stem) - 500}.png"))
    other = evaluated(run / "final", tmp_path / "c", "--data.source", str(fresh))
    assert (other["images"], other["trained_on"]["images"]) == (30, 0)

    # Nothing but what was trained on: measured, and said to be no test.
    for line in lines:
        if "trained_on" not in line:
            (data / line["id"]).unlink()
    capsys.readouterr()
    none = evaluated(run / "final", tmp_path / "d", "--data.source", str(data))
    assert "this is no test" in capsys.readouterr().out
    assert none["trained_on"] == {"images": 24, "left_out": False} and none["images"] == 24

    # A classifier of before, which does not say; and one whose list is broken.
    hashes = run / "final" / "trained_on.json"
    assert "red" not in hashes.read_text() and "0.png" not in hashes.read_text()
    hashes.write_text('{"format": 1, "pictures": [3], "ids": []}')
    flags = ["eval-diffc", "--diffc", str(run / "final"), "--data.source", str(data)]
    assert "trained_on.json is no list" in fails(capsys, *flags)
    hashes.unlink()
    assert (
        evaluated(run / "final", tmp_path / "e", "--data.source", str(data))["trained_on"] is None
    )


def test_stores_that_were_trained_on_are_left_out(tmp_path: Path) -> None:
    import torch

    from revelio.activations.store import write_store

    made = {"classes": ["a", "b"], "layer": "mix", "timestep": 25, "dataset": "toys"}
    labels = [n % 2 for n in range(24)]
    grids = torch.randn(24, 4, 3, 3) + torch.tensor(labels).view(-1, 1, 1, 1) * 3.0
    names = [f"i{n}" for n in range(24)]
    parts = {"train": slice(0, 16), "test": slice(16, 24), "both": slice(8, 24)}
    for name, part in parts.items():
        write_store(tmp_path / name, grids[part], names[part], labels[part], settings=made)
    write_store(tmp_path / "x", grids, names, labels, settings=made | {"dataset": "others"})
    out = tmp_path / "run"
    stores = ["--store", str(tmp_path / "train"), "--test-store", str(tmp_path / "test")]
    cli.main(["train-diffc", *stores, *BRIEF, "--out", str(out)])
    for name, left_out, images in (("test", 0, 8), ("both", 8, 8), ("x", 0, 24)):
        found = evaluated(out / "final", tmp_path / "e" / name, "--store", str(tmp_path / name))
        assert (found["trained_on"]["images"], found["images"]) == (left_out, images)


def test_unlabelled_images_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folders(tmp_path / "data", 4)
    assert "no labels" in fails(capsys, *train_flags(data / "red", tmp_path / "run"))


def test_eval_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "eval-diffc", "--diffc", str(tmp_path / "none"))
    assert "the folder that train-diffc names" in line


def test_defaults_are_the_papers() -> None:
    config = train_diffc.Config()
    assert (config.epochs, config.batch_size, config.learning_rate) == (30, 16, 1e-4)
    assert (config.width, config.dropout, config.weight_decay) == (1024, 0.0, 0.01)
    assert eval_diffc.Config().data.split == "test"


def test_no_escape_sequence_of_a_name_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder, a class and a picture may be called anything that the system allows."""
    data = write_folders(tmp_path / "\x1b[31mdata", 5)
    (data / "red").rename(data / "\x1b]0;red\x07")
    (data / "\x1b]0;red\x07" / "broken\x1b[2J.png").write_bytes(b"no picture")
    flags = ["--data.source", str(data), "--data.on-error", "skip", *PIXELS, *BRIEF]
    cli.main(["train-diffc", *flags, "--out", str(tmp_path / "run")])
    evaluated(tmp_path / "run" / "final", tmp_path / "e", *flags[:4])
    captured = capsys.readouterr()
    assert "\\x1b[31mdata has no splits" in captured.out
    assert "\x1b" not in captured.out and "\x07" not in captured.out
    line = fails(capsys, "train-diffc", *flags[:2], *flags[4:], "--out", str(tmp_path / "r"))
    assert "broken\\x1b[2J.png" in line and line.isprintable()


@pytest.mark.parametrize("free", [10**5, 10**9])
def test_views_that_memory_cannot_hold_are_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free: int
) -> None:
    """36 and 12 pictures of 3 x 32 x 32 numbers in float16, plain and in one view: 0.44 MB for train."""
    flags = train_flags(write_folders(tmp_path / "data", 16), tmp_path / "run")
    monkeypatch.setattr("revelio.pipelines.diffc_views.available_memory", lambda: free)
    if free < 4e5:
        line = fails(capsys, *flags)
        assert "the views need 119.8 kB of memory, of which 100.0 kB are available" in line
        assert "smaller cache_gb, which keeps them in files" in line
        assert not list((tmp_path / "run").rglob("*.bin"))
        # What the line advises works: files take no memory.
        cli.main([*flags, "--cache-gb", "0", "--resume"])
    else:
        cli.main(flags)
    assert report_of(tmp_path / "run")["images"]["test"] == 9


def test_no_word_on_memory_where_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revelio.pipelines.diffc_views.available_memory", lambda: None)
    cli.main(train_flags(write_folders(tmp_path / "data", 4), tmp_path / "run"))
    assert report_of(tmp_path / "run")["images"]["test"] == 3


def test_from_python_it_returns_what_it_made_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pixels = {"backbone": BackboneConfig(name="pixels"), "layer": "pixels", "timestep": None}
    data = DataConfig(source=str(write_folders(tmp_path / "data", 8)))
    config = TrainDiffCConfig(
        out=tmp_path / "run", data=data, width=8, epochs=2, views=0, seeds=2, **pixels
    )
    told: list[Progress] = []
    made = train_diffc_pipeline(config, told.append)
    assert made.report == report_of(tmp_path / "run")
    stages = {one.title: (one.done, one.total) for one in told if one.total}
    images = made.report["images"]["train"]
    assert stages == {
        "reading 18 pictures": (18, 18),
        "reading 6 pictures": (6, 6),
        "train grids": (18, 18),
        "test grids": (6, 6),
        "training, seed 0": (2 * images, 2 * images),
        "training, seed 1": (2 * images, 2 * images),
    }
    model = made.model()
    again = EvalDiffCConfig(
        diffc=str(made.path / "final"), data=replace(data, split="test"), out=tmp_path / "eval"
    )
    found = eval_diffc_pipeline(again)
    assert found == report_of(tmp_path / "eval") and found["classes"] == list(model.class_names)
    assert eval_diffc_pipeline(replace(again, diffc=str(made.path))) | {"model": "final"} == found
    before = {path: path.read_bytes() for path in (tmp_path / "eval").iterdir()}
    (tmp_path / "other").mkdir()
    model.head.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    for other in (
        replace(again, data=replace(data, split="test", limit=6)),
        replace(again, diffc=str(tmp_path / "other")),
    ):
        with pytest.raises(ValueError, match=r"report\.json.* other settings.*another place"):
            eval_diffc_pipeline(other)
        assert (
            before == {path: path.read_bytes() for path in (tmp_path / "eval").iterdir()} | before
        )
    with pytest.raises(ValueError, match="seeds=0: give 1 or more"):
        train_diffc_pipeline(replace(config, seeds=0))
    assert capfd.readouterr() == ("", "")


def test_kept_views_that_are_there_need_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a run goes on after a kill: what is free by then is less than all views take."""
    data, kept = write_folders(tmp_path / "data", 4), ["--cache-gb", "0", "--cache-dir"]
    cli.main([*train_flags(data, tmp_path / "one"), *kept, str(tmp_path / "views")])
    monkeypatch.setattr("revelio.pipelines.diffc_views.free_disk", lambda path: 100)
    line = fails(capsys, *train_flags(data, tmp_path / "two"), *kept, str(tmp_path / "other"))
    assert "other, where 0.1 kB are free" in line
    cli.main([*train_flags(data, tmp_path / "three"), *kept, str(tmp_path / "views")])
    assert report_of(tmp_path / "one")["top1"] == report_of(tmp_path / "three")["top1"]
