"""The gallery as a person uses it: opened from disk in headless Chromium, where there is one.

What a browser is not needed for is in test_analysis_gallery.py and is never skipped.
"""

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from analysis_helpers import gallery_parts
from browser_helpers import Page, needs_browser
from PIL import Image

from revelio.activations.store import write_store
from revelio.analysis.config import GalleryConfig, TopImagesConfig
from revelio.analysis.gallery.write import write_gallery
from revelio.analysis.top_images import top_images
from revelio.analysis.top_images_files import with_source

NASTY = "<img src=x onerror=\"document.body.id='broken'\">"
ENTRY = {
    "majority_share": 0.7,
    "latents": 1234,
    "chance_levels": {"majority_share": 0.4},
    "controls": {
        name: {"majority": {"value": value, "difference": {"value": gap, "interval": [gap, 0.1]}}}
        for name, value, gap in (("channels", 0.5, 0.2), ("data rows", 0.8, -0.1))
    },
    "verdict": {"majority": "not told apart from data rows"},
    "controls_method": "jackknife",
}

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Path:
    """A gallery of a store of whole grids, with classes of which one is markup."""
    folder = tmp_path_factory.mktemp("page")
    model, store, _, dataset = gallery_parts(folder / "store", classes=("tabby_cat", NASTY, "dog"))
    noise = torch.randn(60, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    grids = store.tensor()[:, :, None, None] + 0.3 * noise
    about = {"model": "toy", "layer": "up_ft1", "timestep": 25, "classes": list(store.classes)}
    whole = write_store(folder / "grids", grids, store.ids, store.labels.tolist(), settings=about)
    top = with_source(top_images(model, whole, TopImagesConfig(m=12)), model, whole)
    how = GalleryConfig(latents=30, map_method="pca")
    write_gallery(folder / "out", model, whole, top, dataset, how, purity=ENTRY)
    return folder / "out"


@pytest.fixture(scope="module")
def data(gallery) -> dict:
    """The gallery's data, a record a latent."""
    data = json.loads((gallery / "gallery.json").read_text())
    lines = (gallery / "latents.jsonl").read_text().splitlines()
    columns = data["latents"]
    records = [
        {name: values[place] for name, values in columns.items()} | json.loads(line)
        for place, line in enumerate(lines)
    ]
    return data | {"latents": records}


@pytest.fixture
def page(browser: Page, gallery: Path):
    """Opens a view of the gallery afresh and gives the browser."""

    def open_view(place: str, width: int = 1200, height: int = 900, touch: bool = False) -> Page:
        browser.screen(width, height, touch=touch)
        browser.open("about:blank")
        browser.open(f"{(gallery / 'index.html').as_uri()}?theme=light#/{place}")
        browser.until("!document.querySelector('[aria-busy=true]')")
        return browser

    yield open_view
    source = re.sub(r"<script.*?</script>", "", browser.run("document.body.outerHTML"), flags=re.S)
    assert "[object" not in source and "undefined" not in source and 'id="broken"' not in source


def cards(page: Page) -> list[int]:
    hrefs = page.run("[...document.querySelectorAll('.card')].map((a) => a.getAttribute('href'))")
    return [int(href.rpartition("/")[2]) for href in hrefs]


def text(page: Page, selector: str = "main") -> str:
    shown = page.run(f"document.querySelector({json.dumps(selector)}).textContent")
    return " ".join(unescape(shown).split())


def test_overview_shows_a_card_for_every_latent(page, data):
    shown = page("latents?all=1", height=6000)
    ids = [latent["id"] for latent in data["latents"]]
    assert cards(shown) == ids
    assert f"{len(ids)} latents" in text(shown) and "tabby cat" in text(shown)
    assert NASTY in text(shown)
    # The mean is of other latents than the ones shown: of those that purity was measured on.
    assert "of the 1,234 strongest latents; chance is 40" in text(shown)


def test_the_end_key_leads_to_the_last_card_and_home_to_the_first(page, data):
    shown = page("latents?all=1", 700, 500)
    ids = [latent["id"] for latent in data["latents"]]
    assert ids[-1] not in cards(shown)
    # In a field of text, where an earlier view may have left the focus, the key moves the cursor.
    shown.run("document.activeElement.blur()")
    shown.press("End")
    shown.until(f"!!document.querySelector('.card[href=\"#/latent/{ids[-1]}\"]')")
    shown.until("scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
    last = shown.run(
        "[...document.querySelectorAll('.card')].at(-1).getBoundingClientRect().bottom"
    )
    assert 0 < last <= 500 and ids[0] not in cards(shown)
    # While the way to the end is still animated, Chromium drops a key that leads elsewhere.
    shown.run("new Promise((done) => setTimeout(done, 500))")
    shown.press("Home")
    shown.until(f"!!document.querySelector('.card[href=\"#/latent/{ids[0]}\"]')")


def test_going_back_returns_to_the_place(page):
    shown = page("latents?sort=id&all=1", 700, 500)
    shown.run("scrollTo(0, 900)")
    shown.until("history.state?.scroll === 900")
    opened = cards(shown)[6]
    for way in ("history.back()", "document.querySelector('.crumbs a').click()"):
        shown.run(f"document.querySelector('.card[href=\"#/latent/{opened}\"]').click()")
        shown.until("document.body.dataset.view === 'latent' && scrollY === 0")
        shown.run(way)
        shown.until("document.body.dataset.view === 'latents' && scrollY === 900")
        focused = shown.run("document.activeElement.getAttribute('href')")
        assert focused == f"#/latent/{opened}"


def test_going_back_at_once_returns_to_the_place(page):
    shown = page("latents?sort=id&all=1", 700, 500)
    shown.run("scrollTo(0, 900)")
    shown.until("history.state?.scroll === 900")
    opened = cards(shown)[6]
    # About as long as the page waits before it remembers that the latent's view is at its top.
    for wait in range(40, 120, 4):
        shown.run(f"document.querySelector('.card[href=\"#/latent/{opened}\"]').click()")
        shown.until("document.body.dataset.view === 'latent' && scrollY === 0")
        shown.run(f"new Promise((done) => setTimeout(done, {wait})).then(() => history.back())")
        shown.until("document.body.dataset.view === 'latents' && scrollY === 900")


def test_search_finds_numbers_classes_and_images(page, data):
    shown = page("about")
    wanted = data["latents"][3]["id"]
    shown.press("/")
    shown.type(f"#{wanted}")
    found = shown.run(
        "[...document.querySelectorAll('#found a')].map((a) => a.getAttribute('href'))"
    )
    assert found[0] == f"#/latent/{wanted}"
    shown.press("Enter")
    shown.until(f"location.hash === '#/latent/{wanted}'")
    for words, href in (
        ("onerr", "#/latents?class=1"),
        ("two/17", "#/image/17"),
        ("18", "#/image/17"),
    ):
        shown.press("/")
        shown.type(words)
        hrefs = shown.run(
            "[...document.querySelectorAll('#found a')].map((a) => a.getAttribute('href'))"
        )
        assert href in hrefs
        shown.press("Escape")
    shown.press("/")
    shown.type("zzz")
    assert "Nothing of that name" in text(shown, "#found")
    shown.press("Escape")


def test_every_view_has_a_title_of_its_own(page, data):
    titles = []
    for place in (
        "latents",
        "map",
        "images",
        "about",
        "image/4",
        f"latent/{data['latents'][0]['id']}",
    ):
        titles.append(page(place).run("document.title"))
    assert len(set(titles)) == len(titles)
    assert f"#{data['latents'][0]['id']}" in titles[-1] and " 5 " in titles[-2]


def test_class_filter_and_sort_come_from_the_address(page, data):
    shown = page("latents?class=2&sort=purity&all=1", height=6000)
    found = cards(shown)
    of_class = [latent for latent in data["latents"] if latent["class"] == 2]
    assert sorted(found) == sorted(latent["id"] for latent in of_class)
    purity = {latent["id"]: (latent["count"] <= 10, -latent["majority"]) for latent in of_class}
    assert [purity[card] for card in found] == sorted(purity.values())


@pytest.mark.parametrize(("sort", "measure"), [("strength", "mean"), ("purity", "majority")])
def test_latents_of_a_few_images_come_last_and_that_is_said(page, data, sort, measure):
    shown = page(f"latents?sort={sort}&all=1", height=6000)
    found = {latent["id"]: latent for latent in data["latents"]}
    rare = [found[card]["count"] <= 10 for card in cards(shown)]
    assert rare == sorted(rare) and 0 < sum(rare) < len(rare)
    known = [found[card][measure] for card in cards(shown)][: rare.index(True)]
    assert known == sorted(known, reverse=True)
    assert text(shown, ".order") == f"Rare latents ({sum(rare)}) come last."
    assert page("latents?sort=sparse").run("document.querySelector('.order').hidden")


def test_a_latent_shows_its_range_classes_and_neighbours(page, data):
    latent = data["latents"][1]
    shown = page(f"latent/{latent['id']}")
    parts = ("top", "middle", "random", "misses")
    rows = [row for part in parts for row, _ in latent[part]]
    hrefs = shown.run(
        "[...document.querySelectorAll('.picture')].map((a) => a.getAttribute('href'))"
    )
    assert [int(href.rpartition("/")[2]) for href in hrefs] == rows
    mini = shown.run("document.querySelectorAll('.mini').length")
    assert mini == len(latent["near"]) + len(latent["alike"])
    assert f"{latent['count']} of 60 images" in text(shown)
    line = shown.run("document.querySelector('.command')?.textContent ?? ''")
    row = f"--latent-values {latent['id']}:{latent['top'][0][1]:g} --operation add "
    assert f"{row}--strength 0 1 2 4 --guidance 3 --texts" in line
    shares = shown.run(
        "[...document.querySelectorAll('.profile li b')].map((b) => parseFloat(b.textContent))"
    )
    counts = [100 * count / latent["count"] for _, count in latent["classes"]]
    assert shares == pytest.approx(counts, abs=0.51)
    ticks = shown.run("[...document.querySelectorAll('.profile .chance')].map((t) => t.style.left)")
    assert all(float(tick.rstrip("%")) == pytest.approx(100 / 3, abs=0.01) for tick in ticks)
    bars = shown.run("[...document.querySelectorAll('.bars.tall i')].map((i) => parseInt(i.title))")
    assert bars == latent["bins"]


def test_heat_maps_show_on_hover_as_a_toggle_and_by_address(page, data, tmp_path):
    latent = data["latents"][0]
    shown = page(f"latent/{latent['id']}")
    opacity = "getComputedStyle(document.querySelector('.picture .heat')).opacity"
    assert shown.run(opacity) == "0"
    box = shown.run("document.querySelector('.picture').getBoundingClientRect().toJSON()")
    shown.send("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + 20, y=box["y"] + 20)
    shown.until(f"{opacity} === '1'")
    shown.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    shown.until(f"{opacity} === '0'")
    assert text(shown, ".tools .scale") == "weakstrong"
    shown.press("h")
    shown.until(f"{opacity} === '1'")
    assert shown.run("location.hash") == f"#/latent/{latent['id']}?maps=1"
    row, flat = latent["top"][0][0], latent["maps"][str(latent["top"][0][0])]
    drawn = shown.run(
        "(() => { const c = document.querySelector('.picture .heat'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; "
        "return [...d].filter((_, i) => i % 4 === 3).map((a, i) => a ? i : -1).filter((i) => i >= 0); })()"
    )
    assert drawn == flat[::2] and row >= 0
    shown.click("#maps")
    shown.until(f"{opacity} === '0' && location.hash === '#/latent/{latent['id']}'")
    # A button by its look, its name and the keyboard.
    shown.run("document.querySelector('.pager a:last-of-type').focus()")
    while shown.run("document.activeElement.id") != "maps":
        shown.press("Tab")
    said = shown.send("Accessibility.getPartialAXTree", objectId=shown.handle("#maps"))["nodes"][0]
    assert (said["role"]["value"], said["name"]["value"]) == ("button", "Where it fires")
    assert shown.run("getComputedStyle(document.activeElement).borderTopWidth") == "1px"
    shown.press("Enter")
    shown.until(f"{opacity} === '1'")
    again = page(f"latent/{latent['id']}?maps=1")
    again.until(f"{opacity} === '1'")
    with Image.open(again.picture(tmp_path / "maps.png")) as picture:
        vivid = sum(
            count
            for count, (r, g, b) in picture.convert("RGB").getcolors(1 << 20)
            if r > 200 and g < 190 and b < 90
        )
    assert vivid > 2000


def test_an_image_shows_its_active_latents_from_a_file_loaded_on_demand(page, gallery, data):
    shown = page("image/7")
    script = (gallery / "data" / "images-0000.js").read_text()
    record = json.loads(script[script.index("[") : script.rindex("]") + 1])[7]
    ids = [data["latents"][place]["id"] for place, _ in record["active"]]
    hrefs = shown.run(
        "[...document.querySelectorAll('.active')].map((a) => a.getAttribute('href'))"
    )
    assert hrefs == [f"#/latent/{i}" for i in ids] and ids
    assert data["images"]["ids"][7] in text(shown)
    shown.click(".active.where")
    shown.until(f"location.hash === '#/latent/{ids[0]}'")


def test_what_is_shown_can_be_downloaded(page, data):
    shown = page("latents?class=2&all=1")
    catch = (
        "URL.createObjectURL = (blob) => "
        "{ blob.text().then((text) => { window.got = text; }); return '#'; }"
    )
    shown.run(catch)
    shown.press("d")
    lines = shown.until("window.got").splitlines()
    of_class = {latent["id"] for latent in data["latents"] if latent["class"] == 2}
    assert lines[0].startswith("id,mean,count,class,majority")
    assert {int(line.split(",")[0]) for line in lines[1:]} == of_class
    latent = data["latents"][0]
    shown = page(f"latent/{latent['id']}")
    shown.run(catch)
    shown.press("d")
    got = json.loads(shown.until("window.got"))
    assert got["top"] == latent["top"] and got["bins"] == latent["bins"]


def test_about_explains_the_words_and_shows_the_controls(page):
    words = text(page("about"))
    for word in ("latent", "activation", "density", "strength", "purity", "chance"):
        assert word in words
    assert "share of all images that switch the latent on" in words
    assert "it changes when the classes are put into another order" in words
    assert "The same measure for control dictionaries" in words
    assert "verdict: not told apart from data rows" in words
    assert words.index("data rows80") < words.index("channels50"), "the strongest control is first"


def test_a_phone_sees_latents_first_and_zooms_the_map_with_two_fingers(page, tmp_path):
    shown = page("latents", 390, 844, touch=True)
    assert shown.run("document.documentElement.scrollWidth") <= 390
    first = shown.run("document.querySelector('.card').getBoundingClientRect().top")
    assert first < 500, "filters are folded away"
    shown.picture(tmp_path / "phone.png")
    for place in ("images", "about", "image/3", "map"):
        assert page(place, 390, 844, touch=True).run("document.documentElement.scrollWidth") <= 390
    box = shown.run("document.querySelector('canvas').getBoundingClientRect().toJSON()")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    shown.touch("touchStart", (x - 30, y), (x + 30, y))
    for step in range(1, 7):
        shown.touch("touchMove", (x - 30 - 10 * step, y), (x + 30 + 10 * step, y))
    shown.touch("touchEnd")
    address = shown.run("location.hash")
    assert float(re.search(r"at=[^,]+,[^,]+,([\d.]+)", address)[1]) > 1.5
    shown.click("[aria-label='Zoom out']")
    shown.click("[aria-label='Zoom out']")
    shown.click("[aria-label='Zoom out']")
    assert "at=" not in shown.run("location.hash")


def test_the_map_opens_where_its_address_says(page):
    shown = page("map?by=density&at=0.3,0.6,4.000")
    assert shown.run("document.querySelector('select[aria-label=\"Color by\"]').value") == "density"
    shown.click("[aria-label='Zoom in']")
    assert float(re.search(r",([\d.]+)$", shown.run("location.hash"))[1]) == pytest.approx(6.4)


@pytest.mark.parametrize("place", ["latents", "map"])
def test_screenshots_show_pictures_and_dots(page, place, tmp_path):
    shown = page(place)
    shown.until("[...document.images].every((image) => image.complete)")
    with Image.open(shown.picture(tmp_path / "page.png")) as opened:
        picture = opened.convert("RGB")
    assert picture.size == (1200, 900)
    main = picture.crop((300, 140, 1180, 860))
    counts = sorted(main.getcolors(1 << 20), reverse=True)
    # Neither blank nor one flat colour: paper and cards, and many saturated pixels besides.
    assert len(counts) > 50
    vivid = sum(count for count, (r, g, b) in counts if max(r, g, b) - min(r, g, b) > 80)
    assert vivid > {"latents": 20_000, "map": 300}[place]
