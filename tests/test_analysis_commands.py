import json
from pathlib import Path

import pytest
import torch
from analysis_helpers import gallery_parts, write_pictures
from backbones_helpers import tiny_sd
from command_helpers import fails, run
from PIL import Image
from safetensors.torch import load_file

from revelio.activations.format import Cells
from revelio.activations.store import write_store
from revelio.analysis.top_images_files import load_top_images
from revelio.cli import gallery, pca_maps, purity, top_images
from revelio.cli.pictures import gallery_line
from revelio.config import load_config
from revelio.following import following

CONFIGS = Path(__file__).parent.parent / "configs" / "analysis"


@pytest.fixture
def inputs(tmp_path):
    """A store, a k-SAE and the pictures on disk, as a user has them."""
    model, *_ = gallery_parts(tmp_path / "store")
    model.save_pretrained(tmp_path / "ksae")
    write_pictures(tmp_path / "images")
    return tmp_path


def test_from_store_to_purity_and_gallery(inputs, capsys):
    store, ksae = inputs / "store", inputs / "ksae"
    run("top-images", "--store", store, "--ksae", ksae, "--out", inputs / "top", "--m", 12)
    assert capsys.readouterr().out.endswith(f" --ksae {ksae} --data.source FOLDER\n")
    top = load_top_images(inputs / "top")
    assert (top.m, top.source["codes"], top.source["layer"]) == (12, "sparse", "up_ft1")
    assert str(inputs) not in (inputs / "top" / "top_images.json").read_text()

    run("purity", "--top", inputs / "top", "--out", inputs / "p.json", "--latents", 20,
        "--similarity", "--store", store)  # fmt: skip
    found = json.loads((inputs / "p.json").read_text())
    assert (found["mode"], found["model"], found["dataset"], found["images"]) == (
        "fixed",
        "toy",
        "toys",
        60,
    )
    entry = found["entries"][0]
    assert (entry["layer"], entry["timestep"]) == ("up_ft1", 25)
    for key in (
        "sigma_label",
        "chance",
        "majority_share",
        "entropy",
        "null_z",
        "interval",
        "similarity",
    ):
        assert entry[key] is not None
    said = capsys.readouterr().out
    assert f"{entry['sigma_label']:.3f}" in said and said.endswith(" --data.source FOLDER\n")

    run("gallery", "--store", store, "--ksae", ksae, "--top", inputs / "top", "--out", inputs / "g",
        "--latents", 12, "--data.source", inputs / "images")  # fmt: skip
    out = capsys.readouterr().out
    assert "index.html" in out
    assert "no picture" not in out
    data = json.loads((inputs / "g" / "gallery.json").read_text())
    assert len(data["latents"]["id"]) == 12
    assert data["purity"]["sigma_label"] is not None


@pytest.mark.parametrize(("labelled", "leads_to"), [(True, "train-diffc"), (False, "pca-maps")])
def test_a_gallery_leads_to_a_classifier_only_with_labels(tmp_path, capsys, labelled, leads_to):
    model, *_ = gallery_parts(tmp_path / "store", labelled=labelled)
    model.save_pretrained(tmp_path / "ksae")
    write_pictures(tmp_path / "images")
    run("gallery", "--store", tmp_path / "store", "--ksae", tmp_path / "ksae", "--latents", 4,
        "--out", tmp_path / "g", "--data.source", tmp_path / "images")  # fmt: skip
    *_, served, last = capsys.readouterr().out.splitlines()
    ksae = ("--ksae", tmp_path / "ksae")  # of no run, and a model that is known by no name
    assert served == following("serve", tmp_path / "g", *ksae, "--backbone.name", "toy")
    assert last.startswith(f"next: revelio {leads_to} --data.source {tmp_path / 'images'} ")


def test_as_code_keeps_twenty_dense_codes(inputs):
    config = CONFIGS / "top-images-as-code.yaml"
    run("top-images", "--config", config, "--store", inputs / "store", "--ksae", inputs / "ksae",
        "--out", inputs / "top")  # fmt: skip
    top = load_top_images(inputs / "top")
    assert (top.m, top.source["codes"], top.source["mode"]) == (20, "dense", "as_code")
    # Pre-activations are positive for about half the images, sparse codes for 6 in 48.
    assert float(top.density.mean()) > 0.25


def test_mistakes_are_one_line(inputs, capsys):
    store, ksae = inputs / "store", inputs / "ksae"
    out = ["--out", inputs / "o"]
    assert "there is no such folder" in fails(
        capsys, "top-images", "--store", inputs / "x", "--ksae", ksae, *out
    )
    assert "no k-SAE" in fails(capsys, "top-images", "--store", store, "--ksae", inputs / "x", *out)
    assert "holds no k-SAE" in fails(capsys, "top-images", "--store", store, "--ksae", store, *out)
    assert "there is no such folder" in fails(capsys, "purity", "--top", inputs / "x")
    line = fails(capsys, "gallery", "--store", store, "--ksae", ksae, *out)
    assert "toys" in line and "data.source" in line
    run("top-images", "--store", store, "--ksae", ksae, "--out", inputs / "top")
    assert "give one store for each" in fails(
        capsys, "purity", "--top", inputs / "top", "--similarity"
    )
    assert not (inputs / "o").exists()


def test_top_images_of_another_store_are_refused(inputs, capsys):
    run(
        "top-images",
        "--store",
        inputs / "store",
        "--ksae",
        inputs / "ksae",
        "--out",
        inputs / "top",
    )
    gallery_parts(inputs / "other", labelled=False)
    line = fails(capsys, "gallery", "--store", inputs / "other", "--ksae", inputs / "ksae",
                 "--top", inputs / "top", "--data.source", inputs / "images")  # fmt: skip
    assert "of store store, not of" in line


def test_pca_maps_of_a_tiny_stable_diffusion(inputs):
    model = tiny_sd(inputs / "sd")
    run("pca-maps", "--data.source", inputs / "images", "--data.limit", 5, "--backbone.name", model,
        "--backbone.image-size", 32, "--layers", "bottleneck", "up_ft1", "--timesteps", 25, 200,
        "--batch-size", 2, "--side", 48, "--out", inputs / "maps")  # fmt: skip
    tensors = load_file(inputs / "maps" / "maps.safetensors")
    names = [f"{layer} t={t}" for t in (25, 200) for layer in ("bottleneck", "up_ft1")]
    assert {key.split("/")[0] for key in tensors} == set(names)
    for name in names:
        rgb = tensors[f"{name}/rgb"]
        assert rgb.shape[:2] == (5, 3)
        assert float(rgb.min()) >= 0 and float(rgb.max()) <= 1
    assert tensors["up_ft1 t=25/rgb"].shape[-1] > tensors["bottleneck t=25/rgb"].shape[-1]
    with Image.open(inputs / "maps" / "sheet.png") as sheet:
        assert sheet.width > 5 * 48 and sheet.height > 5 * 48
    description = json.loads((inputs / "maps" / "maps.json").read_text())
    assert len(description["ids"]) == 5
    assert all(sum(shares) <= 1.001 for shares in description["explained"].values())


@pytest.mark.parametrize("command", ["top-images", "purity", "gallery", "pca-maps"])
def test_help_is_a_page(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    page = capsys.readouterr().out
    assert f"revelio {command}" in page
    assert "--out" in page


@pytest.mark.parametrize(
    ("module", "name", "given"),
    [
        (top_images, "top-images-as-code", {"store": "s", "ksae": "k"}),
        (purity, "purity-paper", {"top": ["t"]}),
        (gallery, "gallery", {"store": "s", "ksae": "k"}),
        (pca_maps, "pca-maps-sd15", {}),
    ],
)
def test_shipped_configs_load(module, name, given):
    config = load_config(module.Config, CONFIGS / f"{name}.yaml", given)
    assert config.out == module.Config.out


def test_a_store_of_some_cells_or_vectors_is_refused_with_what_the_command_needs(tmp_path, capsys):
    """`extract ... or cells` for a command that refuses cells sends the user round in a circle."""
    model, *_ = gallery_parts(tmp_path / "whole")
    model.save_pretrained(tmp_path / "ksae")
    places = Cells(torch.zeros(60, 2, dtype=torch.int16), (4, 4))
    ids = [f"{i}.png" for i in range(60)]
    for name, cells in (("cells", places), ("vectors", None)):
        write_store(
            tmp_path / name,
            torch.randn(60, 12),
            ids,
            [0] * 60,
            settings={"classes": ["a"]},
            cells=cells,
        )
    cells, ksae = tmp_path / "cells", ("--ksae", tmp_path / "ksae")
    out, grids = ("--out", tmp_path / "o"), "extract whole grids (pool none, without `cells`)"
    for words, remedy in (
        (("gallery", "--store", cells, *ksae, *out), grids),
        (("locality", "--store", cells, *ksae, *out), grids),
        (("locality", "--store", tmp_path / "vectors", *ksae, *out), grids),
        (("train-diffc", "--store", cells, "--test-store", cells, *out), grids),
        (
            ("probe", "--store", cells, "--test-store", cells, *out),
            "extract the images without `cells`",
        ),
        (
            ("concept", "--store", cells, "--class-name", "a", *out),
            "give a k-SAE of cells (ksae), or",
        ),
        (("train-ksae", "--store", cells, *out), "choose rows that are cells"),
    ):
        assert remedy in fails(capsys, *words), words


def test_a_store_of_some_cells_leads_to_no_gallery(inputs, capsys):
    cells, ksae = inputs / "cells", inputs / "ksae"
    rows, places = torch.randn(60, 12), torch.zeros(60, 2, dtype=torch.int16)
    settings = {"model": "toy", "dataset": "toys", "layer": "up_ft1", "timestep": 25}
    ids = [f"{i}.png" for i in range(60)]
    write_store(cells, rows, ids, settings=settings, cells=Cells(places, (4, 4)))
    told = gallery_line("toys", cells, "--ksae", ksae)
    assert told == "note: a gallery shows whole images: extract grids for it (--pool none)"
    both = ("--store", cells, "--ksae", ksae, "--out", inputs / "g")
    refused = fails(capsys, "gallery", *both)
    assert "takes one row an image: extract whole grids (pool none" in refused
    assert gallery_line("toys", inputs / "store", "--ksae", ksae).startswith(
        "next: revelio gallery"
    )
