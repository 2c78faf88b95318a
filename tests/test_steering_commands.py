"""The steering commands, from prompts to pictures, on a tiny model's folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones_helpers import tiny_sd
from PIL import Image
from steering_helpers import ksae_of

from revelio.activations.store import ActivationStore, write_store
from revelio.cli import main
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import Concept

LAYER = "text_encoder.block1"
FEW = ("--steps", 2, "--guidance", 3, "--size", 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "tiny")


def run(*words: object) -> None:
    main([str(word) for word in words])


def fails(capsys, *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("revelio: ")
    return line


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
    words = ("steer", *where, *FEW, "--concept", tmp_path / "c", "--prompts", table)
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
    words = ("steer", "--backbone.name", model, *FEW, "--prompts", prompts)
    edit = ("--layer", "up_ft0", "--ksae", tmp_path / "ksae", "--operation", "add")
    run(*words, *edit, "--latent-values", "3:40", "--strength", 0, 1, "--out", tmp_path / "drawn")
    names = ("000000-0-+0.png", "000000-0-+1.png")
    plain, steered = (pixels(tmp_path / "drawn", name) for name in names)
    assert not np.array_equal(plain, steered)
    Image.new("L", (3, 3), 255).save(tmp_path / "mask.png")
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
    ):
        assert line in fails(capsys, *words, *more, *out)
        assert not (tmp_path / "no").exists()
    prompts.write_text("")
    assert "holds no prompts" in fails(capsys, *words, *edit, "--latent-values", "1", *out)


def test_tokens_to_a_k_sae_to_a_found_concept(model: Path, tmp_path: Path, capsys):
    cats, dogs = tmp_path / "cats.txt", tmp_path / "dogs.txt"
    cats.write_text("\n".join(f"cat {letter}" for letter in "abcdef"))
    dogs.write_text("\n".join(f"d {letter}" for letter in "abcdef"))
    where = ("--backbone.name", model)
    tokens = tmp_path / "tokens"
    run("extract-text", *where, "--prompts", cats, "--layers", LAYER, "--out", tokens)
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
        "--operation", "ablate", "--prompts", prompts, "--strength", 0, 8,
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


def see(pictures: list[Image.Image]) -> list[str]:
    return ["cat" if np.asarray(one).mean() < 128 else "dog" for one in pictures]


def test_steer_eval_writes_a_table_with_baselines(model: Path, tmp_path: Path, capsys):
    table = tmp_path / "prompts.csv"
    table.write_text("prompt,class\na cat,cat\nmy cat,cat\na dog,dog\ndogs,dog\n")
    where = ("--backbone.name", model)
    for name, more in (("c", ()), ("m", ("--against", "a dog"))):
        run(
            "concept", *where, "--texts", "a cat", *more, "--layer", LAYER, "--out", tmp_path / name
        )
    words = ("steer-eval", *where, *FEW, "--prompts", table, "--concept", tmp_path / "c",
             "--judge", f"{__name__}:see", "--images-per-prompt", 2)  # fmt: skip
    run(
        *words,
        "--means",
        tmp_path / "m",
        "--target",
        "cat",
        "--strength",
        -5,
        "--out",
        tmp_path / "e",
    )
    report = json.loads((tmp_path / "e" / "steering.json").read_text())
    methods = [one["method"] for one in report["methods"]]
    assert methods == [
        "plain",
        "steered",
        "negative prompt",
        "difference of means",
        "random direction",
    ]
    plain = report["methods"][0]
    assert plain["distance"]["value"] == 0.0
    assert plain["survival"] is None or plain["survival"]["value"] == 1.0
    assert report["methods"][1]["distance"]["value"] > 0
    assert "| steered | -5 |" in (tmp_path / "e" / "steering.md").read_text()
    out = ("--out", tmp_path / "no")
    assert "must be named" in fails(capsys, *words, "--target", "car", *out)
    assert "was made of tiny, not of" in fails(
        capsys, "steer", "--concept", tmp_path / "c", "--prompts", table, *out
    )
    assert not (tmp_path / "no").exists()


def test_the_presets_are_the_published_settings():
    from revelio.cli import extract_text, train_ksae
    from revelio.config import load_config
    from revelio.sae.config import TrainSAEConfig

    folder = Path(__file__).parent.parent / "configs" / "steering"
    settings = {"sd14": (4, 32), "sdxl": (32, 32), "flux": (16, 64)}
    for name, (expansion, k) in settings.items():
        tokens = load_config(extract_text.Config, folder / f"{name}.yaml")
        ksae: TrainSAEConfig = load_config(train_ksae.Config, folder / f"{name}-ksae.yaml")
        assert (ksae.expansion, ksae.k, ksae.samples) == (expansion, k, 400_000_000)
        assert ksae.store == (tokens.out / tokens.layers[0],)
        assert tokens.padding == "keep"
