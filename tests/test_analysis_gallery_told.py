"""What other commands found of latents, shown in the gallery; and galleries side by side."""

import json
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from analysis_helpers import gallery_parts, write_pictures
from browser_helpers import Page, needs_browser

from revelio.activations.store import write_store
from revelio.analysis.config import LocalityConfig, MakeGalleryConfig
from revelio.analysis.top_images_files import ksae_identity
from revelio.data.config import DataConfig
from revelio.pipelines.gallery import make_gallery
from revelio.pipelines.locality import measure_locality
from revelio.trust import read_json_lines, read_object

NASTY = "<img src=x onerror=\"document.body.id='broken'\">"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Stores of two timesteps and two draws, names and locality, and a gallery of each timestep."""
    root = tmp_path_factory.mktemp("told")
    model, rows, _, _ = gallery_parts(root / "rows")
    with (
        torch.no_grad()
    ):  # latents that fire where others do, and one that also writes what another does
        model.W_enc[:6] = model.W_enc[6:12]
        model.b_enc[:6] = model.b_enc[6:12]
        model.W_dec[0] = model.W_dec[6]
    model.save_pretrained(root / "run" / "final")
    noise = torch.randn(3, 60, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    about = {"model": "toy", "layer": "up_ft1", "dataset_sha256": "x", "prompt_policy": "empty"}
    for place, (name, t, draw) in enumerate((("a", 25, 0), ("b", 200, 0), ("c", 25, 1))):
        grids = rows.tensor()[:, :, None, None] + (0.3 + t / 100) * noise[place]
        settings = about | {"classes": list("abc"), "timestep": t, "draw": draw}
        write_store(root / name, grids, rows.ids, rows.labels.tolist(), settings=settings)
    config = LocalityConfig(
        store=(root / "a", root / "b", root / "c"), ksae=str(root / "run"), device="cpu",
        other=str(root / "run"), latents=20,
    )  # fmt: skip
    found = measure_locality(config).result
    names = [
        {"latent": found["latents"][place], "name": name, "passed": ok}
        for place, (name, ok) in enumerate(((NASTY, True), ("Round hats", False)))
    ]
    source = {"ksae": ksae_identity(model)}
    (root / "names.json").write_text(json.dumps({"latents": names, "made_from": source}))
    gallery = of(root, "b", "later")
    make_gallery(gallery)
    make_gallery(
        replace(
            of(root, "a", "gallery"),
            names=root / "names.json",
            locality=root / "run" / "locality.json",
            beside=(gallery.out,),
        )
    )
    return root


def of(root: Path, store: str, out: str) -> MakeGalleryConfig:
    if not (root / "images").is_dir():
        write_pictures(root / "images")
    return MakeGalleryConfig(
        store=root / store, ksae=str(root / "run"), out=root / out, over="max", m=12, device="cpu",
        data=DataConfig(source=str(root / "images")), map_method="pca", beside_controls=False,
    )  # fmt: skip


def test_the_data_holds_names_measures_and_the_other_gallery(made):
    data, found = (
        read_object(made / "gallery" / "gallery.json"),
        read_object(made / "run/locality.json"),
    )
    columns = data["latents"]
    place = columns["id"].index(found["latents"][0])
    assert columns["name"][place] == NASTY and columns["checked"][place] is True
    record = read_json_lines(made / "gallery" / "latents.jsonl")[place]
    entropy = found["locality"]["spatial_entropy"]
    assert record["measured"][0] == entropy["of_latents"][0] == columns["spread"][place]
    profile = found["timesteps"][0]
    for t, share, low, high in record["timesteps"]:
        entry = profile[str(int(t))]
        assert [share, low, high] == [entry["value"], entry["low"], entry["high"]]
    shown = {one["name"]: one for one in data["measures"]}
    assert shown["Agreement with noise draw 1"]["of"][0] == found["draws"][0]["value"]
    assert shown["Spatial entropy"]["chance"][0] == entropy["chance"]["value"]
    assert shown["Partner of cosine above 0.7 in another run"]["of"][0] == 1.0
    [other] = data["beside"]
    assert "t = 200" in other["title"] and "rows" not in other
    beside = made / "gallery" / "beside" / "0"
    assert (beside / "gallery.json").read_bytes() == (made / "later/gallery.json").read_bytes()


def test_maps_of_an_images_strongest_latents_are_its_cells_codes(made):
    from revelio.activations.store import ActivationStore
    from revelio.analysis.cells import encode_grid
    from revelio.pipelines.inputs import open_sae

    ids = read_object(made / "gallery" / "gallery.json")["latents"]["id"]
    image = read_json_lines(made / "gallery" / "images.jsonl")[7]
    store = ActivationStore.open(made / "a")
    codes = encode_grid(open_sae(str(made / "run"), "cpu"), store.rows(7, 8), store.manifest)
    assert 1 <= len(image["maps"]) <= 8
    for (place, _), flat in zip(image["active"], image["maps"], strict=False):
        map_ = codes.maps(torch.tensor([ids[place]]))[0, 0].flatten()
        strong = (map_ >= 0.1 * map_.max()).nonzero()[:, 0].tolist()
        assert flat[::2] == strong and max(flat[1::2]) == 255


def test_repeated_latents_name_the_first_of_their_kind(made):
    from revelio.activations.store import ActivationStore
    from revelio.analysis.cells import encode_grid
    from revelio.pipelines.inputs import open_sae

    data = read_object(made / "gallery" / "gallery.json")["latents"]
    repeats = data["repeats"]
    firsts = {one for one in repeats if one is not None}
    assert firsts and all(repeats[first] is None for first in firsts)
    records = read_json_lines(made / "gallery/latents.jsonl")
    store = ActivationStore.open(made / "a")
    codes = encode_grid(
        open_sae(str(made / "run"), "cpu"), store.rows(0, len(store)), store.manifest
    )
    # Parts of one thing share images: what counts is the cell, the first of the strongest.
    tops = []
    for record in records:
        cells = codes.maps(torch.tensor([record["id"]]))[:, 0].flatten(1).argmax(1)
        tops.append({(row, int(cells[row])) for row, _ in record["top"]})
    for place, record in enumerate(records):
        near = {other for other, cosine in record["near"] if cosine > 0.9}
        for other, _ in (*record["near"], *record["alike"]):
            if len(tops[place] & tops[other]) > 0.5 * len(tops[place] | tops[other]):
                near.add(other)
        earlier = [other for other in near if other < place]
        assert (repeats[place] is None) == (not earlier)
        assert repeats[place] is None or repeats[place] <= min(earlier)


@pytest.mark.parametrize("name", ["names", "locality"])
def test_results_of_another_ksae_and_other_files_are_refused(made, tmp_path, name):
    own = made / "names.json" if name == "names" else made / "run" / "locality.json"
    other = read_object(own)
    other["made_from"]["ksae"]["sha256"] = "0"
    (tmp_path / "x.json").write_text(json.dumps(other))
    config = replace(of(made, "a", "no"), **{name: tmp_path / "x.json"})
    with pytest.raises(ValueError, match=r"x\.json is of another k-SAE: measure"):
        make_gallery(config)
    honest = read_object(own)
    wrong = [
        {"made_from": []},
        *({**honest, "latents": one} for one in (["x"], [{"latent": "x"}], 3)),
    ]
    for value in wrong:
        (tmp_path / "x.json").write_text(json.dumps(value))
        with pytest.raises(
            ValueError, match=r"x\.json is no result that names or measures latents"
        ):
            make_gallery(config)
    assert not (made / "no").exists()


def test_galleries_of_other_images_or_versions_are_refused(made, tmp_path, monkeypatch):
    # Before the work.
    monkeypatch.setattr("revelio.pipelines.gallery.compute", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match="no gallery of this version: write it again"):
        make_gallery(replace(of(made, "a", "no"), beside=(made / "run",)))
    store = write_store(
        tmp_path / "s", torch.rand(60, 12, 2, 2), [f"x{i}" for i in range(60)], settings={}
    )
    assert store.images == 60
    write_pictures(tmp_path / "images")
    for path in (tmp_path / "images").rglob("*.png"):
        path.rename(tmp_path / "images" / f"x{int(path.stem)}.png")
    ids = [path.name for path in sorted((tmp_path / "images").glob("*.png"))]
    write_store(tmp_path / "t", torch.rand(60, 12, 2, 2), ids, settings={"layer": "up_ft1"})
    config = replace(
        of(made, "a", "no"),
        store=tmp_path / "t",
        data=DataConfig(source=str(tmp_path / "images")),
        beside=(made / "later",),
    )
    with pytest.raises(ValueError, match="has none of the images: compare galleries of the same"):
        make_gallery(config)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def view(browser, made):
    """Opens a view of the gallery from disk; a name that is markup must not have become any."""

    def open_view(place: str, **screen) -> Page:
        browser.screen(screen.get("width", 1280), screen.get("height", 900))
        browser.open("about:blank")
        uri = (made / "gallery" / "index.html").as_uri()
        browser.open(f"{uri}?theme=light#/{place}")
        browser.until("!document.querySelector('[aria-busy=true]')")
        return browser

    yield open_view
    assert browser.run("document.body.id") == ""


def words(page: Page, selector: str = "main") -> str:
    return " ".join(page.run(f"document.querySelector({json.dumps(selector)}).textContent").split())


@needs_browser
def test_names_are_shown_as_text_and_found(view, made):
    latents = read_object(made / "run/locality.json")["latents"]
    shown = view(f"latent/{latents[0]}")
    assert words(shown, "h1") == f"{NASTY} #{latents[0]}"
    assert "could not tell" not in words(shown)
    shown.press("/")
    shown.type("round h")
    shown.press("Enter")
    shown.until(f"location.hash === '#/latent/{latents[1]}'")
    assert "A judge that was given this name could not tell the images" in words(shown)
    assert NASTY in words(view("latents?all=1", height=5000))


@needs_browser
def test_a_latent_shows_its_timesteps_and_measures_beside_chance(view, made):
    found = read_object(made / "run" / "locality.json")
    shown = view(f"latent/{found['latents'][0]}")
    shares = shown.run(
        "[...document.querySelectorAll('.timesteps li')].map((li) => [li.firstChild.textContent, "
        "parseFloat(li.querySelector('b').textContent)])"
    )
    profile = found["timesteps"][0]
    assert [name for name, _ in shares] == ["t = 25", "t = 200"]
    for name, percent in shares:
        assert percent == pytest.approx(100 * profile[name[4:]]["value"], abs=0.51)
    rows = shown.run(
        "[...document.querySelectorAll('.measured tr')].slice(1).map((tr) => [...tr.children]"
        ".map((cell) => cell.textContent))"
    )
    entropy = found["locality"]["spatial_entropy"]
    assert rows[0][0] == "Spatial entropy"
    numbers = [entropy["of_latents"][0], entropy["value"], entropy["chance"]["value"]]
    assert [float(cell) for cell in rows[0][1:]] == pytest.approx(numbers, rel=0.01)
    about = words(view("about"))
    assert "Locality and stability" in about and "Agreement with noise draw 1" in about
    assert "the maximum of its codes over the cells" in about and "kept per cell (k)" in about


@needs_browser
def test_a_latent_of_cells_shows_at_once_where_it_fires(view, made):
    latent = read_object(made / "run" / "locality.json")["latents"][0]
    shown = view(f"latent/{latent}")
    opacity = "getComputedStyle(document.querySelector('.picture .heat')).opacity"
    shown.until(f"{opacity} === '1'")
    assert shown.run("document.querySelector('#maps').getAttribute('aria-pressed')") == "true"
    shown.press("h")
    shown.until(f"{opacity} === '0' && location.hash === '#/latent/{latent}?maps=0'")
    assert shown.run("document.querySelector('#next, #previous').href").endswith("?maps=0")
    shown.press("h")
    shown.until(f"{opacity} === '1' && location.hash === '#/latent/{latent}'")
    assert "--strength 0 0.25 0.5 1" in words(shown)


@needs_browser
def test_repeated_latents_are_folded_until_asked_for(view, made):
    columns = read_object(made / "gallery" / "gallery.json")["latents"]
    alone = [i for i, one in zip(columns["id"], columns["repeats"], strict=True) if one is None]
    cards = "[...document.querySelectorAll('.card')].map((a) => +a.getAttribute('href').slice(9))"
    shown = view("latents", height=6000)
    assert shown.run(cards) == alone
    shown.run("document.getElementById('all').click()")
    assert shown.run(cards) == columns["id"]
    assert shown.run("location.hash") == "#/latents?all=1"
    place = next(place for place, one in enumerate(columns["repeats"]) if one is not None)
    first = columns["id"][columns["repeats"][place]]
    page = view(f"latent/{columns['id'][place]}")
    assert "Nearly repeats" in words(page, ".repeats") and f"#{first}" in words(page, ".repeats")
    again = view(f"latent/{first}")
    assert f"#{columns['id'][place]}" in words(again, ".repeats")


@needs_browser
def test_the_most_local_latents_come_first(view, made):
    columns = read_object(made / "gallery" / "gallery.json")["latents"]
    known = {i: s for i, s in zip(columns["id"], columns["spread"], strict=True) if s is not None}
    shown = view("latents?sort=local&all=1", height=9000)
    cards = shown.run(
        "[...document.querySelectorAll('.card')].map((a) => +a.getAttribute('href').slice(9))"
    )
    assert cards[: len(known)] == sorted(known, key=lambda i: (known[i], columns["id"].index(i)))


@needs_browser
@pytest.mark.parametrize("width", [620, 180])
def test_a_latent_without_a_heat_map_keeps_room_for_its_name_beside_another_gallery(
    browser, made, width
):
    """620 pixels are half a screen, 180 half a phone; the column of a heat map would hold 56 and 40."""
    browser.screen(width, 900)
    browser.open("about:blank")
    browser.open(f"{(made / 'gallery' / 'index.html').as_uri()}?embed=1#/image/7")
    browser.until("!document.querySelector('[aria-busy=true]')")
    rooms = browser.run(
        "[...document.querySelectorAll('.active:not(.where) .what')]"
        ".map((what) => what.getBoundingClientRect().width)"
    )
    assert rooms and min(rooms) >= 100


@needs_browser
def test_latents_with_and_without_a_heat_map_stand_in_the_same_columns(view):
    shown = view("image/7")
    for part in (".what", ".level", "b", ".tiles"):
        edges = [
            set(shown.run(f"[...document.querySelectorAll('{rows} > {part}')]"
                          ".map((one) => Math.round(one.getBoundingClientRect().left))"))
            for rows in (".active.where", ".active:not(.where)")
        ]  # fmt: skip
        assert len(edges[0]) == 1 and edges[0] == edges[1], part


@needs_browser
def test_two_galleries_show_the_same_image_side_by_side(browser, made, tmp_path):
    """Over a server, where the frames may be looked into; from disk the screenshot is of the same."""
    handler = partial(Quiet, directory=str(made / "gallery"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.screen(1280, 900)
        base = f"http://127.0.0.1:{server.server_address[1]}/index.html?theme=light"
        browser.open(f"{base}#/image/7")
        browser.until("!document.querySelector('[aria-busy=true]')")
        browser.press("c")
        browser.until("location.hash === '#/compare/7'")
        ids = read_object(made / "gallery" / "gallery.json")["images"]["ids"]
        for number, where in ((7, None), (8, "ArrowRight")):
            if where:
                browser.press(where)
            for side, folder in enumerate(("gallery", "later")):
                record = read_json_lines(made / folder / "images.jsonl")[number]
                latents = read_object(made / folder / "gallery.json")["latents"]["id"]
                inside = f"document.querySelectorAll('iframe')[{side}].contentDocument"
                browser.until(
                    f"{inside}.querySelector('figcaption .id')?.textContent === '{ids[number]}'"
                )
                wanted = [f"#/latent/{latents[place]}" for place, _ in record["active"]]
                hrefs = (
                    f"[...{inside}.querySelectorAll('.active')].map((a) => a.getAttribute('href'))"
                )
                browser.until(
                    f"JSON.stringify({hrefs}) === '{json.dumps(wanted, separators=(',', ':'))}'"
                )
                assert (
                    browser.run(f"getComputedStyle({inside}.querySelector('.bar')).display")
                    == "none"
                )
        # On a phone, too, both are seen at once, and nothing is cut off.
        browser.screen(390, 844, touch=True)
        boxes = browser.run(
            "[...document.querySelectorAll('iframe')].map((f) => f.getBoundingClientRect().toJSON())"
        )
        assert boxes[0]["top"] == boxes[1]["top"] and all(box["bottom"] <= 844 for box in boxes)
        assert boxes[0]["right"] <= boxes[1]["left"] and boxes[1]["right"] <= 390
        # The search gives way to five views, and covers neither of its neighbours.
        browser.screen(360, 740, touch=True)
        bar = browser.run(
            "['nav', '.find input', '.icon'].map((name) => document.querySelector(`.bar ${name}`)"
            ".getBoundingClientRect().toJSON())"
        )
        assert bar[0]["right"] <= bar[1]["left"] and bar[1]["right"] <= bar[2]["left"]
        assert bar[2]["right"] <= 360
        for side in (0, 1):
            inside = f"document.querySelectorAll('iframe')[{side}].contentDocument"
            page = f"{inside}.documentElement"
            browser.until(f"{page}.scrollWidth <= {page}.clientWidth")
            line = f"{inside}.querySelector('.active').getBoundingClientRect().right"
            assert browser.run(line) <= boxes[side]["width"]
        browser.press("Escape")
        browser.until("location.hash === '#/latents'")
    finally:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    """Says nothing of what it gives."""

    def log_message(self, format, *args):
        """Say nothing."""
