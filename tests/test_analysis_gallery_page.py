"""The gallery as a person sees it: opened from disk in headless Chromium, where there is one.

What a browser is not needed for is in test_analysis_gallery.py and is never skipped.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from analysis_helpers import gallery_parts
from PIL import Image

from revelio.analysis.config import GalleryConfig
from revelio.analysis.gallery.write import write_gallery

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
NASTY = "<img src=x onerror=\"document.body.id='broken'\">"
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--virtual-time-budget=5000"),
]

needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    parts = gallery_parts(folder / "store", classes=("tabby_cat", NASTY, "dog"))
    write_gallery(folder / "out", *parts, GalleryConfig(latents=30))
    return folder / "out"


@pytest.fixture(scope="module")
def data(gallery) -> dict:
    return json.loads((gallery / "gallery.json").read_text())


def browse(gallery: Path, place: str, tmp_path: Path, *flags: str) -> str:
    url = f"{(gallery / 'index.html').as_uri()}?theme=light#/{place}"
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, url]
    done = subprocess.run(command, capture_output=True, timeout=240, check=True)
    return done.stdout.decode()


def dom(gallery: Path, place: str, tmp_path: Path) -> str:
    page = browse(gallery, place, tmp_path, "--dump-dom")
    assert "[object" not in page
    assert "undefined" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert 'id="broken"' not in page
    return page


def text(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page.split("<main", 1)[1])).split())


@needs_browser
def test_overview_shows_a_card_for_every_latent(gallery, data, tmp_path):
    page = dom(gallery, "latents", tmp_path)
    cards = re.findall(r'<a class="card" href="#/latent/(\d+)"', page)
    assert [int(card) for card in cards] == [latent["id"] for latent in data["latents"]]
    words = text(page)
    assert f"{len(cards)} latents" in words
    assert "tabby cat" in words
    assert NASTY in unescape(page)


@needs_browser
def test_class_filter_and_sort_come_from_the_address(gallery, data, tmp_path):
    page = dom(gallery, "latents?class=2&sort=purity", tmp_path)
    cards = [int(card) for card in re.findall(r'<a class="card" href="#/latent/(\d+)"', page)]
    of_class = [latent for latent in data["latents"] if latent["class"] == 2]
    assert sorted(cards) == sorted(latent["id"] for latent in of_class)
    purity = {latent["id"]: latent["majority"] for latent in of_class}
    assert [purity[card] for card in cards] == sorted(purity.values(), reverse=True)


@needs_browser
def test_a_latent_shows_its_images_numbers_and_neighbours(gallery, data, tmp_path):
    latent = data["latents"][1]
    page = dom(gallery, f"latent/{latent['id']}", tmp_path)
    pictures = re.findall(r'<a class="picture" href="#/image/(\d+)"', page)
    assert [int(row) for row in pictures] == [row for row, _ in latent["top"]]
    assert page.count('class="mini"') == len(latent["near"])
    assert f"{latent['count']} of 60 images" in text(page)


@needs_browser
def test_an_image_shows_its_active_latents_from_a_file_loaded_on_demand(gallery, data, tmp_path):
    page = dom(gallery, "image/7", tmp_path)
    script = (gallery / "data" / "images-0000.js").read_text()
    record = json.loads(script[script.index("[") : script.rindex("]") + 1])[7]
    ids = [data["latents"][place]["id"] for place, _ in record["active"]]
    assert re.findall(r'class="active" href="#/latent/(\d+)"', page) == [str(i) for i in ids]
    assert ids
    assert data["images"]["ids"][7] in text(page)


@needs_browser
def test_about_explains_the_words(gallery, tmp_path):
    words = text(dom(gallery, "about", tmp_path))
    for word in ("latent", "activation", "density", "strength", "purity"):
        assert f"{word} " in words
    assert "up_ft1" in words
    assert "share of all images that switch the latent on" in words


@needs_browser
@pytest.mark.parametrize("place", ["latents", "map"])
def test_screenshots_show_pictures_and_dots(gallery, place, tmp_path):
    target = tmp_path / "page.png"
    browse(gallery, place, tmp_path, f"--screenshot={target}", "--window-size=1200,900")
    with Image.open(target) as opened:
        picture = opened.convert("RGB")
    assert picture.size == (1200, 900)
    main = picture.crop((300, 140, 1180, 860))
    counts = sorted(main.getcolors(1 << 20), reverse=True)
    # Neither blank nor one flat colour: paper and cards, and many saturated pixels besides.
    assert len(counts) > 50
    vivid = sum(count for count, (r, g, b) in counts if max(r, g, b) - min(r, g, b) > 80)
    assert vivid > {"latents": 20_000, "map": 300}[place]
