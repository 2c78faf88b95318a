import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from analysis_helpers import gallery_parts
from PIL import Image
from sae_helpers import random_model

from revelio.analysis.config import GalleryConfig
from revelio.analysis.gallery.records import image_records
from revelio.analysis.gallery.write import script_json, thumbnail_path, write_gallery
from revelio.analysis.latent_map import directions, label_profiles, layout, neighbours
from revelio.data.dataset import ImageDataset, ImageError

NASTY = '</script><img src=x onerror="document.title=1">'


def payload(path: Path) -> str:
    """The JSON inside a data script."""
    return re.fullmatch(r"[^{\[]*?(?:\(\d+, )?([{\[].*[}\]])\)?;\n", path.read_text(), re.S)[1]


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
    script = json.loads(payload(out / "data" / "gallery.js"))
    data = json.loads((out / "gallery.json").read_text())
    assert script.pop("chunk") == 500
    assert script == data
    assert data["title"] == NASTY
    assert data["classes"] == ["cat", NASTY, "dog_house"]


def test_latents_are_the_strongest_with_their_images(written):
    out, (_, store, top, _), _ = written
    data = json.loads((out / "gallery.json").read_text())
    assert [latent["id"] for latent in data["latents"]] == top.ranking(40).tolist()
    for latent in data["latents"]:
        j = latent["id"]
        assert latent["count"] == int(top.counts[j])
        assert [row for row, _ in latent["top"]] == [r for r in top.indices[j].tolist() if r >= 0]
        labels = [int(store.labels[row]) for row, _ in latent["top"][:10]]
        most = max(labels.count(label) for label in labels)
        assert latent["majority"] == pytest.approx(most / len(labels), rel=1e-3)
        if latent["class"] is None:
            assert most == 1
        else:
            assert labels.count(latent["class"]) == most


def test_active_latents_of_images_are_their_codes(written):
    out, (model, store, top, _), _ = written
    chosen = top.ranking(40)
    parts = [json.loads(payload(path)) for path in sorted((out / "data").glob("images-*.js"))]
    records = [record for part in parts for record in part]
    codes = model.encode(store.tensor())
    assert len(records) == len(store)
    for row, record in enumerate(records):
        pairs = zip(codes.indices[row].tolist(), codes.values[row].tolist(), strict=True)
        active = sorted(((v, j) for j, v in pairs if v > 0), reverse=True)
        expected = [(j, v) for v, j in active if j in chosen.tolist()]
        assert [int(chosen[place]) for place, _ in record["active"]] == [j for j, _ in expected]
        values = [v for _, v in record["active"]]
        assert values == pytest.approx([v for _, v in expected], rel=1e-3)
        assert record["more"] == len(active) - len(expected)
    few = image_records(model, store, chosen, 1, batch_size=7)
    assert [r["active"] for r in few] == [r["active"][:1] for r in records]


def test_thumbnails_are_the_centre_squares(written):
    out, (_, store, _, dataset), _ = written
    for row in (0, len(store) - 1):
        with Image.open(out / thumbnail_path(row)) as picture:
            assert picture.size == (24, 24)
            original = dataset.read(dataset.ids.index(store.ids[row]))
            centre = original.getpixel((original.width // 2, original.height // 2))
            ours = picture.getpixel((12, 12))
            assert all(abs(a - b) < 12 for a, b in zip(centre, ours, strict=True))


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
    assert not {"class", "majority"} & set(data["latents"][0])
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
    assert len(json.loads((tmp_path / "out" / "gallery.json").read_text())["latents"]) == 4


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
