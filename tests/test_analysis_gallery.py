import json
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_helpers import gallery_parts
from PIL import Image
from sae_helpers import random_model

from revelio.activations.store import write_store
from revelio.analysis.config import GalleryConfig, TopImagesConfig
from revelio.analysis.gallery.firing import firing
from revelio.analysis.gallery.records import image_records
from revelio.analysis.gallery.write import CHUNKS, script_json, thumbnail_path, write_gallery
from revelio.analysis.latent_map import directions, label_profiles, layout, neighbours
from revelio.analysis.top_images import top_images
from revelio.analysis.top_images_files import with_source
from revelio.data.dataset import ImageDataset, ImageError

NASTY = '</script><img src=x onerror="document.title=1">'


def payload(path: Path) -> str:
    """The JSON inside a data script."""
    return re.fullmatch(r'[^{\[]*?(?:\("\w+", \d+, )?([{\[].*[}\]])\)?;\n', path.read_text(), re.S)[
        1
    ]


def records(out: Path, kind: str) -> list:
    """What the data scripts of a kind hold together, by the numbers in their names."""
    paths = sorted((out / "data").glob(f"{kind}-*.js"))
    assert [path.stem for path in paths] == [f"{kind}-{i:04d}" for i in range(len(paths))]
    return [record for path in paths for record in json.loads(payload(path))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    parts = gallery_parts(folder / "store", classes=("cat", NASTY, "dog_house"))
    summary = write_gallery(folder / "out", *parts, GalleryConfig(latents=40, title=NASTY))
    return folder / "out", parts, summary


def test_every_file_the_page_names_is_there_and_nothing_is_remote(written):
    out, _, _ = written
    named = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            named.extend(value for key, value in attrs if key in ("src", "href"))

    Reader().feed((out / "index.html").read_text())
    local = [name for name in named if not name.startswith(("#", "data:"))]
    assert "data/gallery.js" in local
    assert local.index("data/gallery.js") < local.index("assets/base.js")
    for name in local:
        assert (out / name).is_file(), name
    for path in out.rglob("*"):
        if path.suffix in (".html", ".js", ".css"):
            assert not re.search(
                r"https?://|fetch\(|XMLHttpRequest|innerHTML|@import", path.read_text()
            )


def test_scripts_never_take_names_as_html(written):
    out, _, _ = written
    page = (out / "index.html").read_text()
    assert NASTY not in page
    assert "&lt;/script&gt;" in page
    for path in (out / "data").glob("*.js"):
        assert "<" not in path.read_text()
    assert script_json({"a": "</script>\u2028&"}) == '{"a":"\\u003c/script\\u003e\\u2028\\u0026"}'


def test_script_and_json_hold_the_same_data(written):
    out, _, _ = written
    data = json.loads((out / "gallery.json").read_text())
    assert json.loads(payload(out / "data" / "gallery.js")) == data
    assert data["title"] == NASTY and data["classes"] == ["cat", NASTY, "dog_house"]
    lines = [json.loads(line) for line in (out / "latents.jsonl").read_text().splitlines()]
    assert records(out, "latents") == lines
    assert [line["id"] for line in lines] == data["latents"]["id"]
    cards = [[row for row, _ in line["top"][:10]] for line in lines]
    assert records(out, "cards") == cards


def test_data_comes_in_files_of_so_many(tmp_path, monkeypatch):
    parts = gallery_parts(tmp_path / "store")
    monkeypatch.setitem(CHUNKS, "latents", 7)
    monkeypatch.setitem(CHUNKS, "cards", 11)
    monkeypatch.setitem(CHUNKS, "images", 13)
    how = GalleryConfig(latents=30, map_method="pca")
    latents = write_gallery(tmp_path / "out", *parts, how)["latents"]
    assert latents > 14
    for kind, count in (("latents", latents), ("cards", latents), ("images", 60)):
        files = sorted((tmp_path / "out" / "data").glob(f"{kind}-*.js"))
        assert len(files) == -(-count // CHUNKS[kind])
        assert len(records(tmp_path / "out", kind)) == count


def test_latents_are_the_strongest_with_their_images(written):
    out, (_, store, top, _), _ = written
    columns = json.loads((out / "gallery.json").read_text())["latents"]
    assert columns["id"] == top.ranking(40).tolist()
    for place, record in enumerate(records(out, "latents")):
        j = columns["id"][place]
        assert (record["id"], columns["count"][place]) == (j, int(top.counts[j]))
        assert [row for row, _ in record["top"]] == [r for r in top.indices[j].tolist() if r >= 0]
        labels = [int(store.labels[row]) for row, _ in record["top"][:10]]
        most = max(labels.count(label) for label in labels)
        assert columns["majority"][place] == pytest.approx(most / len(labels), rel=1e-3)
        if columns["class"][place] is None:
            assert most == 1
        else:
            assert labels.count(columns["class"][place]) == most


def test_the_whole_range_of_a_latent_equals_loops_over_all_images(written):
    out, (model, store, *_), _ = written
    with torch.no_grad():
        codes = model.encode(store.tensor())
        pre = model.preactivations(store.tensor())
    for record in records(out, "latents"):
        j = record["id"]
        fires = {
            row: float(codes.values[row][codes.indices[row] == j][0])
            for row in range(60)
            if j in codes.indices[row].tolist()
            and float(codes.values[row][codes.indices[row] == j][0]) > 0
        }
        assert sum(record["bins"]) == len(fires)
        assert record["most"] == pytest.approx(max(fires.values()), rel=1e-3)
        edges = [record["most"] * i / len(record["bins"]) for i in range(len(record["bins"]) + 1)]
        below = sum(value < edges[12] - 1e-4 for value in fires.values())
        assert abs(sum(record["bins"][:12]) - below) <= 1
        counts = [sum(int(store.labels[row]) == c for row in fires) for c in range(3)]
        assert dict(record["classes"]) == {c: n for c, n in enumerate(counts) if n}
        for name in ("random", "middle"):
            assert len(record[name]) == min(6, len(fires))
            for row, value in record[name]:
                assert value == pytest.approx(fires[row], rel=1e-3)
        median = statistics.median(fires.values())
        distance = sorted(abs(value - median) for value in fires.values())[: len(record["middle"])]
        found = sorted(abs(fires[row] - median) for row, _ in record["middle"])
        assert found == pytest.approx(distance, rel=1e-3, abs=1e-4)
        gaps = {
            row: max(0.0, float(codes.values[row].clamp(min=0).min() - pre[row, j]))
            for row in range(60)
            if row not in fires
        }
        expected = sorted(gaps.values())[:6]
        assert [gap for _, gap in record["misses"]] == pytest.approx(expected, rel=1e-2, abs=1e-3)
        assert all(row in gaps for row, _ in record["misses"])


def test_latents_that_fire_together_equal_cosines_of_dense_codes(written):
    out, (model, store, top, _), _ = written
    chosen = top.ranking(40)
    with torch.no_grad():
        codes = model.encode(store.tensor())
    dense = torch.zeros(60, model.n).scatter_(1, codes.indices, codes.values.clamp(min=0))
    units = torch.nn.functional.normalize(dense[:, chosen].double(), dim=0)
    cosines = (units.T @ units).fill_diagonal_(-1)
    for place, record in enumerate(records(out, "latents")):
        best = cosines[place].sort(descending=True).values[:6]
        assert [cosine for _, cosine in record["alike"]] == pytest.approx(
            [float(one) for one in best if one > 0], abs=1e-3
        )
        for other, cosine in record["alike"]:
            assert float(cosines[place, other]) == pytest.approx(cosine, abs=1e-3)


def test_heat_maps_are_the_codes_of_single_cells(tmp_path):
    model, store, top, dataset = gallery_parts(tmp_path / "store")
    grids = store.tensor()[:, :, None, None] + 0.5 * torch.randn(60, 12, 3, 4)
    whole = write_store(tmp_path / "grids", grids, store.ids, store.labels.tolist())
    top = with_source(top_images(model, whole, TopImagesConfig(m=8)), model, whole)
    how = GalleryConfig(latents=12, map_method="pca", range_images=3)
    write_gallery(tmp_path / "out", model, whole, top, dataset, how)
    assert json.loads((tmp_path / "out" / "gallery.json").read_text())["meta"]["grid"] == [3, 4]
    for record in records(tmp_path / "out", "latents"):
        shown = {row for part in ("top", "middle", "random", "misses") for row, _ in record[part]}
        assert set(map(int, record["maps"])) == shown
        dense = {}
        for row in shown:
            with torch.no_grad():
                codes = model.encode(grids[row].flatten(1).T)
            hits = (codes.indices == record["id"]) & (codes.values > 0)
            dense[row] = (codes.values * hits).sum(1)
        most = max(float(one.max()) for one in dense.values())
        for row in shown:
            flat = record["maps"][str(row)]
            found = torch.zeros(12)
            found[flat[::2]] = torch.tensor(flat[1::2]).float() / 255 * most
            assert torch.allclose(found, dense[row], atol=most / 200)


def test_active_latents_of_images_are_their_codes(written):
    out, (model, store, top, _), _ = written
    chosen = top.ranking(40)
    with torch.no_grad():
        codes = model.encode(store.tensor())
    found = records(out, "images")
    assert len(found) == len(store)
    for row, record in enumerate(found):
        pairs = zip(codes.indices[row].tolist(), codes.values[row].tolist(), strict=True)
        active = sorted(((v, j) for j, v in pairs if v > 0), reverse=True)
        expected = [(j, v) for v, j in active if j in chosen.tolist()]
        assert [int(chosen[place]) for place, _ in record["active"]] == [j for j, _ in expected]
        values = [v for _, v in record["active"]]
        assert values == pytest.approx([v for _, v in expected], rel=1e-3)
        assert record["more"] == len(active) - len(expected)
    few = image_records(firing(model, store, chosen, batch_size=7), 1)
    assert [r["active"] for r in few] == [r["active"][:1] for r in found]


def test_thumbnails_are_the_centre_squares(written):
    out, (_, store, _, dataset), _ = written
    for row in (0, len(store) - 1):
        with Image.open(out / thumbnail_path(row)) as picture:
            assert picture.size == (24, 24)
            original = dataset.read(dataset.ids.index(store.ids[row]))
            centre = original.getpixel((original.width // 2, original.height // 2))
            ours = picture.getpixel((12, 12))
            assert all(abs(a - b) < 12 for a, b in zip(centre, ours, strict=True))


def test_thumbnails_are_what_the_model_saw(tmp_path):
    model, store, top, dataset = gallery_parts(tmp_path / "store")

    def framed(index: int) -> Image.Image:
        """A picture in a frame of 5 pixels, wide as it is: the model cuts the frame and the sides off."""
        page = Image.new("RGB", (90, 50), "white")
        page.paste(dataset.read(index).resize((40, 40)), (25, 5))
        return page

    for crop, side, white in (
        ({"size": 32, "resize": 40, "stretch": False, "offset": "even"}, 40, 0.0),
        ({"size": 32, "resize": 32, "stretch": True, "offset": "even"}, 50, 1 - 1600 / 4500),
        (None, 50, 1 - 1600 / 2500),
    ):
        store.manifest["crop"] = crop
        out = tmp_path / f"out{side}{white}"
        write_gallery(
            out, model, store, top, replace(dataset, read=framed), GalleryConfig(latents=5)
        )
        with Image.open(out / thumbnail_path(3)) as picture:
            assert picture.size == (side, side)
            share = (np.asarray(picture).min(2) > 170).mean()
        assert share == pytest.approx(white, abs=0.03)


def test_missing_and_broken_pictures_are_named_and_keep_their_place(tmp_path):
    model, store, top, dataset = gallery_parts(tmp_path / "store")

    def read(index: int) -> Image.Image:
        if index == 3:
            raise ImageError(dataset.ids[3], "it is cut")
        return dataset.read(index)

    fewer = ImageDataset(
        dataset.name, None, dataset.classes, [*dataset.ids[:-1], "other"], dataset.labels, read
    )
    summary = write_gallery(tmp_path / "out", model, store, top, fewer, GalleryConfig(latents=5))
    gone = store.ids.index(dataset.ids[-1])
    broken = store.ids.index(dataset.ids[3])
    assert set(summary["missing"]) == {str(gone), str(broken)}
    assert dataset.ids[-1] in summary["missing"][str(gone)]
    assert "it is cut" in summary["missing"][str(broken)]
    assert not (tmp_path / "out" / thumbnail_path(gone)).exists()
    data = json.loads((tmp_path / "out" / "gallery.json").read_text())
    assert data["images"]["missing"] == summary["missing"]


def test_without_labels_there_is_no_class_nor_purity(tmp_path):
    parts = gallery_parts(tmp_path / "store", labelled=False)
    write_gallery(tmp_path / "out", *parts, GalleryConfig(latents=9))
    data = json.loads((tmp_path / "out" / "gallery.json").read_text())
    assert data["labelled"] is False
    assert data["images"]["labels"] is None
    assert not {"class", "majority"} & set(data["latents"])
    assert all(record["classes"] == [] for record in records(tmp_path / "out", "latents"))
    with pytest.raises(ValueError, match="no labels"):
        label_profiles(parts[2], parts[2].ranking(3))


def test_wrong_parts_are_refused_and_nothing_is_overwritten(tmp_path):
    model, store, top, dataset = gallery_parts(tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="something else than a gallery"):
        write_gallery(tmp_path / "mine", model, store, top, dataset)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(ValueError, match="make the top images of these two"):
        write_gallery(tmp_path / "out", random_model(d=model.d, n=7), store, top, dataset)
    strangers = ImageDataset("x", None, (), ["a"], None, dataset.read)
    with pytest.raises(ValueError, match="none of the store's"):
        write_gallery(tmp_path / "out", model, store, top, strangers)
    assert not (tmp_path / "out").exists()


def test_a_gallery_is_replaced_by_a_new_one(tmp_path):
    parts = gallery_parts(tmp_path / "store")
    write_gallery(tmp_path / "out", *parts, GalleryConfig(latents=9))
    write_gallery(tmp_path / "out", *parts, GalleryConfig(latents=4))
    assert len((tmp_path / "out" / "latents.jsonl").read_text().splitlines()) == 4
    assert len(records(tmp_path / "out", "latents")) == 4


def test_neighbours_equal_loops():
    units = torch.nn.functional.normalize(torch.randn(700, 5), dim=1)
    found, cosines = neighbours(units, 3)
    for i in (0, 511, 512, 699):
        every = sorted(
            ((float(units[i] @ units[j]), j) for j in range(700) if j != i), reverse=True
        )
        assert found[i].tolist() == [j for _, j in every[:3]]
        assert cosines[i].tolist() == pytest.approx([c for c, _ in every[:3]], abs=1e-5)
    assert neighbours(units[:1], 3)[0].shape == (1, 0)


def test_directions_are_what_decoding_adds():
    model = random_model(d=6, n=20)
    x = torch.zeros(20, 6)
    codes = model.encode(x)
    one = type(codes)(torch.full((20, 1), 2.0), torch.arange(20)[:, None])
    none = type(codes)(torch.zeros(20, 1), torch.arange(20)[:, None])
    added = model.decode(one) - model.decode(none)
    expected = added / added.norm(dim=1, keepdim=True)
    assert torch.allclose(directions(model, torch.arange(20)), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_layout_keeps_groups_together_on_the_unit_square(method):
    groups = torch.arange(40) % 2
    vectors = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * 0.1
    vectors[:, 0] += 5 * groups
    at = layout(vectors, method=method)
    assert at.shape == (40, 2)
    assert float(at.min()) == 0 and float(at.max()) == 1
    centres = torch.stack([at[groups == g].mean(0) for g in (0, 1)])
    nearest = torch.cdist(at, centres).argmin(1)
    assert torch.equal(nearest, groups)
    assert torch.equal(at, layout(vectors, method=method))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_layout_of_a_few_points(count):
    at = layout(torch.randn(count, 4))
    assert at.shape == (count, 2)
    assert not at.isnan().any()


@pytest.mark.parametrize("over", ["max", "mean"])
def test_a_gallery_over_cells_shows_what_its_top_images_counted(tmp_path, over):
    model, store, _, dataset = gallery_parts(tmp_path / "store")
    grids = store.tensor()[:, :, None, None] + 0.5 * torch.randn(60, 12, 3, 4)
    whole = write_store(tmp_path / "grids", grids, store.ids, store.labels.tolist())
    how = TopImagesConfig(m=8, over=over)
    top = with_source(top_images(model, whole, how), model, whole)
    write_gallery(
        tmp_path / "out", model, whole, top, dataset, GalleryConfig(latents=12, map_method="pca")
    )
    images = records(tmp_path / "out", "images")
    for place, record in enumerate(records(tmp_path / "out", "latents")):
        fires = {
            row: dict(image["active"])[place]
            for row, image in enumerate(images)
            if place in dict(image["active"])
        }
        assert sum(record["bins"]) == int(top.counts[record["id"]]) >= len(fires)
        assert record["misses"] == []
        for row, value in record["top"] + record["random"]:
            if row in fires:
                assert fires[row] == pytest.approx(value, rel=1e-3)
