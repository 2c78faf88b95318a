"""The steering commands, from prompts to pictures, on a tiny model's folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones_helpers import tiny_sd
from command_helpers import fails, run
from PIL import Image
from steering_helpers import ksae_of

from revelio.activations.store import ActivationStore, write_store
from revelio.pipelines.steer_parts import reading_of
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import Concept

LAYER = "text_encoder.block1"
FEW = ("--steps", 2, "--guidance", 3, "--size", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "tiny")


def released(folder: Path, ksae: KSparseAutoencoder) -> Path:
    """A checkpoint in the layout of the published concept steerers."""
    folder.mkdir()
    config = {"n_dirs_local": ksae.n, "d_model": ksae.d, "k": ksae.k, "auxk": 32}
    (folder / "config.json").write_text(json.dumps(config | {"dead_steps_threshold": 10}))
    state = {
        "encoder.weight": ksae.W_enc.data,
        "latent_bias": ksae.b_enc.data,
        "decoder.weight": ksae.W_dec.data.T.contiguous(),
        "pre_bias": ksae.b_dec.data,
        "stats_last_nonzero": torch.zeros(ksae.n, dtype=torch.long),
    }
    torch.save({"state_dict": state}, folder / "state_dict.pth")
    return folder


def pixels(folder: Path, name: str) -> np.ndarray:
    with Image.open(folder / "pictures" / name) as picture:
        return np.asarray(picture)


def test_a_released_checkpoint_steers(model: Path, tmp_path: Path, capsys):
    ksae = released(tmp_path / "sae", ksae_of(16))
    where = ("--backbone.name", model)
    run(
        "concept",
        *where,
        "--texts",
        "a dog",
        "--layer",
        LAYER,
        "--ksae",
        ksae,
        "--out",
        tmp_path / "c",
    )
    concept = Concept.load(tmp_path / "c")
    assert concept.vector.shape == (16, 16)
    table = tmp_path / "i2p.csv"
    table.write_text("prompt,sd_seed,sd_guidance_scale\na cat,3,4.0\nb,4,1.0\n")
    words = ("steer", *where, *FEW, "--concept", tmp_path / "c", "--prompts-file", table)
    run(*words, "--strength", 0, 20, "--out", tmp_path / "drawn")
    report = json.loads((tmp_path / "drawn" / "report.json").read_text())
    assert [one["seed"] for one in report["prompts"]] == [3, 4]
    assert set(report["seconds_a_picture"]) == {"0", "20"}
    plain, steered = (pixels(tmp_path / "drawn", f"000000-0-{s}.png") for s in ("+0", "+20"))
    assert plain.shape == (32, 32, 3) and not np.array_equal(plain, steered)
    with Image.open(tmp_path / "drawn" / "sheet.png") as sheet:
        assert sheet.size[0] == 2 * 96
    # Alone, a prompt gives the same picture as in a batch, but for rounding.
    run(*words, "--strength", 20, "--limit", 1, "--out", tmp_path / "alone")
    apart = pixels(tmp_path / "alone", "000000-0-+20.png").astype(int) - steered
    assert np.abs(apart).max() <= 1


def test_latents_of_a_denoisers_layer_from_the_command_line(model: Path, tmp_path: Path, capsys):
    ksae = ksae_of(16)
    ksae.save_pretrained(tmp_path / "ksae")
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    words = ("steer", "--backbone.name", model, *FEW, "--prompts-file", prompts)
    edit = ("--layer", "up_ft0", "--ksae", tmp_path / "ksae", "--operation", "add")
    value = ("--latent-values", "1")
    run(*words, *edit, "--latent-values", "3:40", "--strength", 0, 1, "--out", tmp_path / "drawn")
    names = ("000000-0-+0.png", "000000-0-+1.png")
    plain, steered = (pixels(tmp_path / "drawn", name) for name in names)
    assert not np.array_equal(plain, steered)
    Image.new("L", (3, 3), 255).save(tmp_path / "mask.png")
    (tmp_path / "t.csv").write_text("prompt\na cat\n")
    out = ("--out", tmp_path / "no")
    for more, line in (
        ((*edit, "--latent-values", "99:1"), "latent 99 is out of range: the k-SAE has 0 to 31"),
        ((*edit, "--latent-values", "x"), "'x' is no latent"),
        ((*edit, "--latent-values", "1:big"), "the value of latent 1 is 'big'"),
        ((*edit, "--latent-values", "1", "--mask", tmp_path / "mask.png"), "a mask of 3x3"),
        (
            ("--layer", "up_ft3", *edit[2:], "--latent-values", "1"),
            "the k-SAE is 16 wide, layer up_ft3",
        ),
        (("--layer", "up_ft7", *edit[2:], "--latent-values", "1"), "unknown layer 'up_ft7'"),
        (("--layer", "up_ft0"), "nothing to steer by"),
        (
            (*edit, "--latent-values", "1", "--strength", "nan"),
            "--strength is nan: give a finite number",
        ),
        (
            (*edit, "--latent-values", "1", "--texts", "a"),
            "which prompts? give either texts, or a file",
        ),
        (
            (*edit, *value, "--column", "text", "--prompts-file", tmp_path / "t.csv"),
            "no text in column 'text': it has prompt",
        ),
        ((*edit, "--latent-values", "1", "--backbone.name", "mini-clip"), "does not draw pictures"),
        (
            ("--layer", *edit[1:2], "--ksae", tmp_path / "none", "--latent-values", "1"),
            "no k-SAE at",
        ),
    ):
        assert line in fails(capsys, *words, *more, *out)
        assert not (tmp_path / "no").exists()
    prompts.write_text("")
    assert "holds no prompts" in fails(capsys, *words, *edit, "--latent-values", "1", *out)


def test_pictures_of_other_settings_are_not_replaced(model: Path, tmp_path: Path, capsys):
    ksae_of(16).save_pretrained(tmp_path / "ksae")
    (tmp_path / "p.csv").write_text("prompt,class\na cat,cat\na dog,dog\n")
    words = (
        "--backbone.name",
        model,
        *FEW,
        "--prompts-file",
        tmp_path / "p.csv",
        "--layer",
        "up_ft0",
    )
    words += ("--ksae", tmp_path / "ksae", "--latent-values", 3)
    judged = ("--target", "cat", "--judge", "cli_helpers:see", "--bootstrap", 9)
    for command, more, changed in (
        ("steer", (), ("--guidance", 4)),
        ("steer-eval", judged, ("--bootstrap", 8)),
    ):
        call = (command, *words, *more, "--strength", 1, "--out", tmp_path / command)
        run(*call)
        first = {
            one: one.stat().st_mtime_ns for one in (tmp_path / command).rglob("*") if one.is_file()
        }
        name = changed[0].strip("-")
        assert f"holds a result of `{name}: " in fails(capsys, *call, *changed)
        assert "`strength: [1.0]`, not `strength: [2.0]`" in fails(capsys, *call, "--strength", 2)
        assert first == {one: one.stat().st_mtime_ns for one in first}
        run(*call)  # the same again is what a stopped command is given


def test_tokens_to_a_k_sae_to_a_found_concept(model: Path, tmp_path: Path, capsys):
    cats, dogs = tmp_path / "cats.txt", tmp_path / "dogs.txt"
    cats.write_text("\n".join(f"cat {letter}" for letter in "abcdef"))
    dogs.write_text("\n".join(f"d {letter}" for letter in "abcdef"))
    where = ("--backbone.name", model)
    tokens = tmp_path / "tokens"
    run("extract-text", *where, "--prompts-file", cats, "--layers", LAYER, "--out", tokens)
    store = ActivationStore.open(tokens / LAYER)
    assert len(store) == 6 * 6
    run("train-ksae", "--store", tokens / LAYER, "--out", tmp_path / "ksae", "--expansion", 2,
        "--k", 3, "--steps", 5, "--batch-size", 16)  # fmt: skip
    words = ("concept", *where, "--layer", LAYER, "--ksae", tmp_path / "ksae", "--texts-file", cats)
    run(
        *words, "--against-file", dogs, "--find", 4, "--specificity", 0.5, "--out", tmp_path / "cat"
    )
    found = Concept.load(tmp_path / "cat")
    assert found.latents and 1 <= len(found.latents) <= 4
    assert 0 <= found.made["found"]["auc"] <= 1
    # The found latents are taken out of the tokens, instead of the vector being added.
    prompts = tmp_path / "p.txt"
    prompts.write_text("cat a\n")
    run("steer", *where, *FEW, "--concept", tmp_path / "cat", "--ksae", tmp_path / "ksae",
        "--operation", "ablate", "--prompts-file", prompts, "--strength", 0, 8,
        "--out", tmp_path / "d")  # fmt: skip
    drawn = [pixels(tmp_path / "d", f"000000-0-{s}.png") for s in ("+0", "+8")]
    assert not np.array_equal(*drawn)


def test_concepts_of_stores_and_their_sums(tmp_path: Path, capsys):
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    settings = {"model": "m", "layer": "up_ft0", "classes": ["bag", "dress"]}
    names = [str(index) for index in range(8)]
    write_store(tmp_path / "s", rows, names, [0, 1] * 4, settings=settings)
    run("concept", "--store", tmp_path / "s", "--class-name", "dress", "--out", tmp_path / "one")
    one = Concept.load(tmp_path / "one")
    torch.testing.assert_close(one.vector[0], rows[1::2].mean(0) - rows[::2].mean(0))
    assert (one.model, one.layer) == ("m", "up_ft0")
    run("concept", "--concepts", tmp_path / "one", tmp_path / "one", "--weights", 1, -0.5,
        "--out", tmp_path / "sum")  # fmt: skip
    torch.testing.assert_close(Concept.load(tmp_path / "sum").vector, 0.5 * one.vector)
    out = ("--out", tmp_path / "no")
    write_store(tmp_path / "t", rows, names, settings={"model": "m", "layer": LAYER, "prompts": 8})
    for words, line in (
        ((), "a concept of nothing: give one of"),
        (("--texts", "a", "--latent-values", 1), "a concept of texts and latent_values"),
        (("--store", tmp_path / "s", "--class-name", "shoe"), "has no class 'shoe': it has bag"),
        (
            ("--store", tmp_path / "s", "--class-name", "bag", "--layer", LAYER),
            "holds pictures' activations of layer up_ft0, not of text_encoder.block1",
        ),
        (("--store", tmp_path / "t", "--class-name", "a"), "holds tokens of prompts"),
        (("--store", tmp_path / "s", "--class-name", "bag", "--find", 3), "give ksae"),
    ):
        assert line in fails(capsys, "concept", *words, *out)
        assert not (tmp_path / "no").exists()


def test_a_contrast_is_of_stores_and_a_k_sae_of_one_layer(model: Path, tmp_path: Path, capsys):
    draw = torch.Generator().manual_seed(0)
    made = {"model": "m", "layer": "up_ft0", "timestep": 25, "prompt_policy": "empty"}
    rows = {}

    def written(name: str, other: dict | None = None, d: int = 16) -> Path:
        rows[name] = torch.randn(8, d, generator=draw)
        ids = [f"{name}{index}" for index in range(8)]
        return write_store(tmp_path / name, rows[name], ids, settings=made | (other or {})).path

    def saved(name: str, **told) -> Path:
        ksae = ksae_of(16)
        ksae.trained_on = told
        ksae.save_pretrained(tmp_path / name)
        return tmp_path / name

    words = ("concept", "--store", written("s"))
    run(*words, "--against-store", written("t", {"draw": 3}), "--out", tmp_path / "c")
    found = Concept.load(tmp_path / "c")
    torch.testing.assert_close(found.vector[0], rows["s"].mean(0) - rows["t"].mean(0))
    out = ("--out", tmp_path / "no")
    for name, other in (
        ("model", "n"), ("layer", "up_ft1"), ("timestep", 900), ("prompt_policy", "generic"),
    ):  # fmt: skip
        against = written(f"other_{name}", {name: other})
        said = fails(capsys, *words, "--against-store", against, *out)
        assert f"other_{name} differ in `{name}` ({made[name]} and {other})" in said
    narrow = written("narrow", d=12)
    assert "of the same layer" in fails(capsys, *words, "--against-store", narrow, *out)
    against = ("--against-store", tmp_path / "t")
    run(*words, *against, "--ksae", saved("k", model="m", layer="up_ft0"), "--out", tmp_path / "d")
    several = [{"model": "m", "layer": layer} for layer in ("up_ft1", "up_ft2")]
    other = saved("several", model="m", stores=several)
    foreign = saved("n", model="n", layer="up_ft0")
    for line, ksae in (("layer up_ft1, up_ft2, not up_ft0", other), ("model n, not m", foreign)):
        for find in ((), ("--find", 3)):
            assert line in fails(capsys, *words, *against, "--ksae", ksae, *find, *out)
    elsewhere = ("concept", "--layer", LAYER, "--ksae", other, *out)
    assert "not text_encoder.block1" in fails(capsys, *elsewhere, "--latent-values", 1)
    texts = ("--backbone.name", model, "--texts", "a cat")
    assert "trained on model m, not tiny" in fails(capsys, *elsewhere, *texts)
    assert not (tmp_path / "no").exists()


def test_the_k_sae_says_layer_and_reading_and_its_scale_is_the_activations(
    model: Path, tmp_path: Path
):
    ksae = ksae_of(16)
    ksae.trained_on = {"model": "tiny", "layer": "up_ft0", "pool": "mean"}
    ksae.save_pretrained(tmp_path / "k")
    words = ("steer", "--backbone.name", model, *FEW, "--texts", "a cat", "dogs", "--latent-values", "3:5",
             "--operation", "add", "--ksae", tmp_path / "k")  # fmt: skip
    run(*words, "--strength", 1, "--out", tmp_path / "told")
    run(
        *words, "--layer", "up_ft0", "--read", "pooled", "--strength", 1, "--out", tmp_path / "said"
    )
    assert np.array_equal(*(pixels(tmp_path / n, "000001-0-+1.png") for n in ("told", "said")))
    assert reading_of(ksae_of(16)) == "cells"
    ksae.trained_on["rows_are"] = "cells"
    assert reading_of(ksae) == "cells"


def test_a_k_sae_of_stores_that_are_pooled_differently_reads_means(tmp_path: Path):
    grids = torch.randn(8, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    ids = [str(index) for index in range(8)]
    for name, rows in (("none", grids), ("mean", grids.mean((2, 3)))):
        write_store(tmp_path / name, rows, ids, settings={"layer": "up_ft0", "pool": name})
    words = ("train-ksae", "--store", tmp_path / "none", tmp_path / "mean", "--expansion", 2, "--k", 3,
             "--steps", 2, "--batch-size", 4, "--out", tmp_path / "k")  # fmt: skip
    run(*words)
    ksae = KSparseAutoencoder.from_pretrained(tmp_path / "k" / "final")
    assert "pool" not in ksae.trained_on and reading_of(ksae) == "pooled"


def see(pictures: list[Image.Image]) -> list[str]:
    return ["cat" if np.asarray(one).mean() < 128 else "dog" for one in pictures]


def score(pictures: list[Image.Image]) -> list[float]:
    return [np.asarray(one).mean() / 255 for one in pictures]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    path.write_text("prompt,class\na cat,cat\nit says meow,cat\na dog,dog\ndogs,dog\n")
    return path


def test_steer_eval_writes_a_table_with_baselines(model: Path, table: Path, tmp_path: Path, capsys):
    where = ("--backbone.name", model)
    for name, more in (("c", ()), ("m", ("--against", "a dog"))):
        run(
            "concept", *where, "--texts", "a cat", *more, "--layer", LAYER, "--out", tmp_path / name
        )
    words = ("steer-eval", *where, *FEW, "--prompts-file", table, "--concept", tmp_path / "c",
             "--judge", f"{__name__}:see", "--images-per-prompt", 2)  # fmt: skip
    capsys.readouterr()
    run(*words, "--means", tmp_path / "m", "--target", "cat", "--strength", -5, -0.5,
        "--features", "mini-clip", "--out", tmp_path / "e")  # fmt: skip
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "e" / "steering.json").read_text())
    methods = [(one["method"], one["strength"]) for one in report["methods"]]
    assert methods == [
        ("plain", 0), ("steered", -5), ("steered", -0.5), ("negative prompt", 0),
        ("difference of means", -5), ("difference of means", -0.5),
        ("random direction", -5), ("random direction", -0.5),
    ]  # fmt: skip
    plain, steered = report["methods"][:2]
    assert plain["distance"]["value"] == 0.0
    assert abs(plain["features_distance"]["value"]) < 1e-6 < steered["features_distance"]["value"]
    assert plain["survival"] is None or plain["survival"]["value"] == 1.0
    # What was judged are the pictures that are kept: the judge's rate of the target's by hand.
    drawn = [pixels(tmp_path / "e", f"00000{p}-{i}-1.png") for p in (0, 1) for i in (0, 1)]
    assert steered["target"]["value"] == np.mean([one.mean() < 128 for one in drawn])
    groups = {"named": drawn[:2], "not named": drawn[2:]}
    assert {name: one["value"] for name, one in steered["groups"].items()} == {
        name: np.mean([one.mean() < 128 for one in part]) for name, part in groups.items()
    }
    other = [[pixels(tmp_path / "e", f"00000{p}-{i}-{m}.png") / 255 for m in (0, 1)]
             for p in (2, 3) for i in (0, 1)]  # fmt: skip
    apart = np.mean([np.abs(one - two).mean() for one, two in other])
    assert steered["distance"]["value"] == pytest.approx(apart, rel=1e-5)
    assert "| steered | -5 |" in said and "| not named |" in said
    html = (tmp_path / "e" / "steering.html").read_text()
    assert "<svg" in html and "not named" in html and "{{" not in html
    with Image.open(tmp_path / "e" / "sheet.png") as sheet:
        assert sheet.size == (
            8 * 96,
            18 + 3 * (96 + 18),
        )  # two that name the cat, one that does not
    out = ("--out", tmp_path / "no")
    assert "must be named" in fails(capsys, *words, "--target", "car", *out)
    assert "no text in column 'kind': it has prompt, class" in fails(
        capsys, *words, "--target", "cat", "--target-column", "kind", *out
    )
    assert "was made of tiny, not of" in fails(
        capsys, "steer", "--concept", tmp_path / "c", "--prompts-file", table, *out
    )
    assert "is of layer text_encoder.block1, not of up_ft0" in fails(
        capsys, "steer", *where, "--concept", tmp_path / "c", "--layer", "up_ft0", "--texts", "a",
        *out,
    )  # fmt: skip
    assert not (tmp_path / "no").exists()


def test_a_study_measures_concepts_one_by_one_and_several_targets_are_steered_at_once(
    model: Path, table: Path, tmp_path: Path
):
    where = ("--backbone.name", model)
    ksae_of(16, n=24).save_pretrained(tmp_path / "k")
    for name, more in (("one", ()), ("two", ("--ksae", tmp_path / "k"))):
        run("concept", *where, "--texts", name, "--layer", LAYER, *more, "--out", tmp_path / name)
    with table.open("a") as more:
        more.write("a car,car\n")
    words = ("steer-eval", *where, *FEW, "--prompts-file", table, "--concept", tmp_path / "one",
             tmp_path / "two", "--judge", f"{__name__}:see", "--detector", f"{__name__}:score",
             "--strength", 3, "--baselines", "negative-prompt")  # fmt: skip
    run(*words, "--target", "cat", "--each", "--out", tmp_path / "study")
    report = json.loads((tmp_path / "study" / "steering.json").read_text())
    named = [(Path(one["method"]).name, one["about"]) for one in report["methods"][1:3]]
    assert named == [("one", LAYER), ("two", f"{LAYER}, n = 24, k = 4")]
    weights = ("--weights", 1, -0.5)
    run(*words, "--target", "cat", "dog", *weights, "--out", tmp_path / "both")
    report = json.loads((tmp_path / "both" / "steering.json").read_text())
    steered = report["methods"][1]
    drawn = [pixels(tmp_path / "both", f"00000{p}-0-1.png").mean() / 255 for p in range(4)]
    assert steered["target"]["value"] == np.mean([one >= 0.45 for one in drawn])
    # The same by one concept that is their weighted sum.
    run("concept", "--concepts", tmp_path / "one", tmp_path / "two", *weights, "--out",
        tmp_path / "sum")  # fmt: skip
    run("steer", *where, *FEW, "--prompts-file", table, "--concept", tmp_path / "sum", "--strength", 3,
        "--out", tmp_path / "drawn")  # fmt: skip
    apart = pixels(tmp_path / "drawn", "000000-0-+3.png").astype(int)
    assert np.abs(apart - pixels(tmp_path / "both", "000000-0-1.png")).max() <= 1
