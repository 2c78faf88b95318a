"""Top images, purity, galleries and PCA maps from Python: what is made is returned, nothing is printed."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_helpers import gallery_parts, write_pictures
from backbones_helpers import tiny_dinov2, tiny_dit, tiny_sd
from PIL import Image
from sae_helpers import random_model

from revelio.activations.format import Cells
from revelio.activations.store import ActivationStore, write_store
from revelio.analysis.config import (
    MakeGalleryConfig,
    MakePCAMapsConfig,
    MakeTopImagesConfig,
    MeasurePurityConfig,
    PurityConfig,
)
from revelio.analysis.controls import compare, strongest
from revelio.analysis.purity import table
from revelio.backbones.config import BackboneConfig
from revelio.cli import main
from revelio.data.config import DataConfig
from revelio.data.contents import combined
from revelio.data.open import open_dataset
from revelio.pipelines import Progress
from revelio.pipelines.gallery import make_gallery
from revelio.pipelines.inputs import open_sae, pictures_of, place_of
from revelio.pipelines.pca_maps import make_pca_maps
from revelio.pipelines.purity import measure_purity
from revelio.pipelines.top_images import make_top_images
from revelio.sae.model import KSparseAutoencoder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a finished run with its k-SAE, and the pictures."""
    root = tmp_path_factory.mktemp("made")
    model, *_ = gallery_parts(root / "store")
    model.save_pretrained(root / "run" / "final")
    write_pictures(root / "images")
    return root


def top_config(made: Path) -> MakeTopImagesConfig:
    return MakeTopImagesConfig(store=made / "store", ksae=str(made / "run"), m=12)


FEW = PurityConfig(m=10, random_sets=50, permutations=5, bootstrap=5)


def purity_config(made: Path, top: Path) -> MeasurePurityConfig:
    places = {"top": (top,), "store": (made / "store",), "ksae": (str(made / "run"),)}
    return MeasurePurityConfig(**vars(FEW), **places)


def test_results_go_to_the_runs_own_folder_and_come_back(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Progress] = []
    top = make_top_images(top_config(made), told.append)
    assert top.path == made / "run" / "top-images" and top.top.m == 12
    assert (told[0].done, told[-1].done, told[-1].total) == (0, 60, 60)
    found = measure_purity(purity_config(made, top.path))
    assert found.path == top.path / "purity.json"
    assert json.loads(found.path.read_text()) == found.result
    data = DataConfig(source=str(made / "images"))
    shown = make_gallery(
        MakeGalleryConfig(
            store=made / "store", ksae=str(made / "run"), data=data, latents=9, map_method="pca"
        )
    )
    assert shown.path == made / "run" / "gallery" and (shown.latents, shown.images) == (9, 60)
    assert capsys.readouterr().out == ""


def test_purity_over_more_images_than_there_are_is_refused(made: Path) -> None:
    top = make_top_images(replace(top_config(made), m=500, out=made / "wide"))
    with pytest.raises(ValueError, match=r"m=61 images, but .* are of 60:"):
        measure_purity(replace(purity_config(made, top.path), m=61))
    assert not (top.path / "purity.json").exists()


def test_purity_stands_beside_its_controls(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = make_top_images(top_config(made)).path
    (entry,) = measure_purity(purity_config(made, top)).entries
    expected = compare(open_sae(str(made / "run")), ActivationStore.open(made / "store"), FEW)
    assert entry["controls"] == expected["controls"] and entry["verdict"] == expected["verdict"]
    main(["purity", "--top", str(top), "--store", str(made / "store"), "--ksae", str(made / "run"),
          "--random-sets", "50", "--permutations", "5"])  # fmt: skip
    name, value = strongest(entry)
    assert (
        f"the strongest control dictionary, {name}, reaches {value:.0%}" in capsys.readouterr().out
    )
    without = replace(purity_config(made, top), store=(), ksae=())
    (entry,) = measure_purity(without).entries
    assert "controls" not in entry and any("no controls" in note for note in entry["notes"])


@pytest.mark.parametrize(
    ("cells", "how"),
    [
        (None, {"mode": "as_code"}),
        (None, {"codes": "dense"}),
        (None, {"mode": "as_paper"}),
        (16, {"over": "mean"}),
        (16, {"over": "max"}),
        (16, {"over": "pooled"}),
        (5, {"over": "mean"}),
    ],
)
def test_a_value_its_interval_and_its_controls_are_of_the_same_codes(
    tmp_path: Path, cells: int | None, how: dict[str, Any]
) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    shape = (200, 12) if cells is None else (200, 12, 4, 4)
    means = torch.randn(4, 12, generator=draw)[labels]
    rows = torch.randn(shape, generator=draw) + 2 * means.view(200, 12, *[1] * (len(shape) - 2))
    ids, settings = [f"i{i}" for i in range(200)], {"classes": list("abcd")}
    if cells == 5:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        picked = torch.stack([torch.randperm(16, generator=draw)[:5].sort().values for _ in ids])
        taken = rows.flatten(2).mT.gather(1, picked[..., None].expand(-1, -1, 12))
        lie = Cells(places[picked].flatten(0, 1).to(torch.int16), (4, 4))
        write_store(
            tmp_path / "store",
            taken.flatten(0, 1),
            ids,
            labels.tolist(),
            settings=settings,
            cells=lie,
        )
    else:
        write_store(tmp_path / "store", rows, ids, labels.tolist(), settings=settings)
    model = KSparseAutoencoder(12, 48, 3, seed=1)
    model.trained_on = {"rows_are": "cells"} if cells else {}
    model.save_pretrained(tmp_path / "run" / "final")
    config = MakeTopImagesConfig(store=tmp_path / "store", ksae=str(tmp_path / "run"), m=12, **how)
    top = make_top_images(config)
    (entry,) = measure_purity(purity_config(tmp_path, top.path)).entries
    names = {"sigma": "sigma_label", "majority": "majority_share", "pairs": "same_class_pairs"}
    for measure, name in (names | {"entropy": "entropy"}).items():
        low, high = entry["intervals"][name]
        if low > 0 and high != 1:  # else it is cut where the measure ends
            assert (low + high) / 2 == pytest.approx(entry[name])
        assert low <= entry[name] <= high
        for control in entry["controls"].values():
            gap = entry[name] - control[measure]["value"]
            assert control[measure]["difference"]["value"] == pytest.approx(gap)


def test_a_gallery_warns_of_other_pictures_of_the_same_names(made: Path, tmp_path: Path) -> None:
    store = ActivationStore.open(made / "store")
    images = open_dataset(DataConfig(source=str(made / "images")))
    kept = {key: store.manifest[key] for key in ("layer", "classes") if key in store.manifest}
    place = {name: number for number, name in enumerate(images.ids)}
    read = images.digests()
    assert read is not None
    contents = combined([read[place[name]] for name in store.ids])
    labels = None if store.labels is None else store.labels.tolist()
    settings = kept | {"contents_sha256": contents}
    write_store(tmp_path / "store", store.tensor(), store.ids, labels, settings=settings)
    shutil.copytree(made / "images", tmp_path / "images")
    config = MakeGalleryConfig(
        store=tmp_path / "store", ksae=str(made / "run"), out=tmp_path / "gallery", latents=4,
        data=DataConfig(source=str(tmp_path / "images")), map_method="pca", beside_controls=False,
    )  # fmt: skip
    make_gallery(config)  # warnings are errors here
    victim = next((tmp_path / "images").rglob("*.png"))
    Image.new("RGB", (30, 20), (1, 2, 3)).save(victim)
    with pytest.warns(UserWarning, match="what is shown may be other pictures"):
        make_gallery(config)


def test_labels_that_are_not_the_stores_are_refused_and_its_own_are_not(
    made: Path, tmp_path: Path
) -> None:
    images, table = made / "images", tmp_path / "labels.csv"
    ids = [str(path.relative_to(images)) for path in sorted(images.rglob("*.png"))]
    own = {id: ("even", "odd")[place % 2] for place, id in enumerate(ids)}
    labels = [("odd", "even").index(own[id]) for id in ids]  # other numbers, the same classes
    data = DataConfig(source=str(images), labels=table)
    labelled = write_store(
        tmp_path / "s", torch.ones(len(ids), 2), ids, labels, settings={"classes": ["odd", "even"]}
    )
    bare = write_store(tmp_path / "bare", torch.ones(len(ids), 2), ids)
    for changed, store, message in (
        ({}, labelled, None),
        ({ids[5]: "even"}, labelled, rf"{ids[5]} is even, and in .*/s, .* it is odd: extract"),
        ({}, bare, r"is even, and in .*/bare, .* it has no label: .* or leave data.labels out"),
    ):
        rows = (f"{id},{label}" for id, label in (own | changed).items())
        table.write_text("\n".join(("file,label", *rows)))
        with pytest.warns(UserWarning, match="labels are read from"):
            if message is None:
                assert list(pictures_of(data, store).ids) == ids
            else:
                with pytest.raises(ValueError, match=message):
                    pictures_of(data, store)


def test_a_result_of_another_store_is_not_overwritten(made: Path, tmp_path: Path) -> None:
    first = make_top_images(top_config(made)).path
    make_top_images(top_config(made))  # the same again
    measure_purity(purity_config(made, first))
    before = {path: path.read_bytes() for path in first.iterdir()}
    write_store(tmp_path / "other", torch.randn(60, 12), [f"{i}" for i in range(60)], [0] * 60)
    for changed in ({"m": 7}, {"codes": "dense"}):
        with pytest.raises(ValueError, match=r"or of other settings: give another place"):
            make_top_images(replace(top_config(made), **changed))
    make_top_images(replace(top_config(made), batch_size=7))  # gives the same
    other = replace(top_config(made), store=tmp_path / "other")
    with pytest.raises(ValueError, match="another store, model or k-SAE"):
        make_top_images(other)
    elsewhere = make_top_images(replace(other, out=tmp_path / "top")).path
    with pytest.raises(ValueError, match="another store, model or k-SAE"):
        measure_purity(
            replace(
                purity_config(made, elsewhere),
                store=(tmp_path / "other",),
                out=first / "purity.json",
            )
        )
    gallery = MakeGalleryConfig(
        store=made / "store", ksae=str(made / "run"), latents=4, map_method="pca", beside_controls=False,
        data=DataConfig(source=str(made / "images")), out=tmp_path / "gallery",
    )  # fmt: skip
    make_gallery(gallery)
    make_gallery(replace(gallery, latents=3))
    random_model(d=12, n=48, k=6, seed=4).save_pretrained(tmp_path / "sae")
    with pytest.raises(ValueError, match="another store, model or k-SAE"):
        make_gallery(replace(gallery, ksae=str(tmp_path / "sae")))
    assert {path: path.read_bytes() for path in first.iterdir()} == before


def test_purity_of_k_saes_of_one_name_tells_them_apart(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tops = [make_top_images(replace(top_config(made), out=tmp_path / one / "top")) for one in "ab"]
    config = replace(
        purity_config(made, tops[0].path), top=tuple(one.path for one in tops), store=(), ksae=(),
        out=tmp_path / "purity.json",
    )  # fmt: skip
    found = measure_purity(config)
    assert [entry["name"] for entry in found.entries] == ["a/top", "b/top"]
    lines = table(found.entries).splitlines()
    assert lines[0].split()[0] == "name" and [one.split()[0] for one in lines[1:]] == [
        "a/top",
        "b/top",
    ]
    again = [
        e["name"]
        for e in measure_purity(
            replace(config, top=(tops[0].path,) * 2, out=tmp_path / "t")
        ).entries
    ]
    assert len(set(again)) == 2


def test_a_run_stands_for_its_final_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (made / "run", made / "run" / "final"):
        assert isinstance(open_sae(str(place)), KSparseAutoencoder)
        assert place_of(str(place), "x") == made / "run" / "x"
    (tmp_path / "bare").mkdir()
    assert place_of(str(tmp_path / "bare"), "x") == tmp_path / "bare-x"
    assert place_of("some/hub-id", "x") == Path("runs/hub-id-x")
    # From the folders themselves: never into `final`, which holds the k-SAE and nothing else.
    for here, named in (("run/final", "."), ("run", "."), ("run/final", ".."), ("run", "final/..")):
        monkeypatch.chdir(made / here)
        assert place_of(named, "x") == (made / "run" / "x").resolve()
    with pytest.raises(ValueError, match="give a run that has finished"):
        open_sae(str(tmp_path / "bare"))


def test_pca_maps_go_to_a_folder_of_model_and_data(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = BackboneConfig(name=str(tiny_sd(tmp_path / "sd")), image_size=32)
    config = MakePCAMapsConfig(
        data=DataConfig(source=str(made / "images"), limit=3),
        backbone=backbone,
        layers=("bottleneck",),
    )
    found = make_pca_maps(config)
    assert found.path == Path("runs/pca-maps/sd-images") and (found.path / "sheet.png").is_file()
    assert list(found.maps) == ["bottleneck t=25"] and len(found.ids) == 3
    make_pca_maps(replace(config, batch_size=2))  # is the same but for rounding
    before = (found.path / "maps.json").read_bytes()
    for changed in (
        replace(config, timesteps=(50,)),
        replace(config, layers=("bottleneck", "up_ft0")),
        replace(config, seed=1),
        replace(config, data=replace(config.data, limit=2)),
    ):
        with pytest.raises(ValueError, match=r"or of other settings: give another place"):
            make_pca_maps(changed)
    assert (found.path / "maps.json").read_bytes() == before
    other = replace(config, backbone=replace(backbone, name=str(tiny_sd(tmp_path / "two"))))
    with pytest.raises(ValueError, match="another store, model or k-SAE"):
        make_pca_maps(replace(other, out=found.path))


def test_a_unet_a_dit_and_a_vit_are_on_one_sheet(made: Path, tmp_path: Path) -> None:
    names = [str(build(tmp_path / name)) for name, build in
             (("sd", tiny_sd), ("dit", tiny_dit), ("dino", tiny_dinov2))]  # fmt: skip
    config = MakePCAMapsConfig(
        data=DataConfig(source=str(made / "images"), limit=3),
        backbone=BackboneConfig(name=names[0]),
        others=tuple(names[1:]),
        layers=("bottleneck", "up_ft1", "block1"),
        out=tmp_path / "together",
    )
    together = make_pca_maps(config)
    columns = ["sd bottleneck t=25", "sd up_ft1 t=25", "dit block1 t=25", "dino block1"]
    assert list(together.maps) == columns
    alone = make_pca_maps(
        replace(config, backbone=BackboneConfig(name=names[1]), others=(), layers=("block1",),
                out=tmp_path / "alone")
    )  # fmt: skip
    same = together.maps["dit block1 t=25"].rgb, alone.maps["block1 t=25"].rgb
    assert torch.equal(*same)
    with Image.open(together.path / "sheet.png") as sheet:
        assert sheet.width == 5 * (160 + 5) + 5
    # A model that sees another square gets a column of its own with it.
    processor = Path(names[2]) / "preprocessor_config.json"
    entries = json.loads(processor.read_text())
    entries |= {"size": {"shortest_edge": 2 * entries["crop_size"]["height"]}}
    processor.write_text(json.dumps(entries))
    make_pca_maps(replace(config, out=tmp_path / "apart"))
    with Image.open(tmp_path / "apart" / "sheet.png") as sheet:
        assert sheet.width == 4 * (160 + 5) + 5 + 2 * (160 + 5) + 5
    for layers, error, said in (
        (("bottleneck",), ValueError, "has none of the layers"),
        (("bottleneck", "block1", "block77"), KeyError, "unknown layer 'block77'"),
    ):
        with pytest.raises(error, match=said):
            make_pca_maps(replace(config, layers=layers, out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_command_says_at_once_that_it_works(tmp_path: Path) -> None:
    """Libraries take seconds to load; whoever runs a command sees before that what runs."""
    words = [sys.executable, "-m", "revelio", "top-images", "--store", tmp_path, "--ksae", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ)
    first, *_, last = done.stderr.splitlines()
    assert first == "revelio top-images: loading" and last.startswith("revelio: ")
