"""How soon a gallery of many latents and images is there, and how it moves: in headless Chromium, from disk.

    python benchmarks/gallery_open.py --latents 81920 --images 10000 --json gallery_open.json

The gallery is generated: a random k-SAE, activations around random class centers, flat pictures. Times are
wall time until what was asked for is on the page, the median of several, beside the thread time that the page
itself takes to open, which the load of other programs does not change; memory is of the page's scripts.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser_helpers import Page

from revelio.activations.store import write_store
from revelio.analysis.config import GalleryConfig, TopImagesConfig
from revelio.analysis.gallery.write import write_gallery
from revelio.analysis.top_images import top_images
from revelio.analysis.top_images_files import with_source
from revelio.data.dataset import ImageDataset
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder

WIDTH, CLASSES = 32, 100

# Pixels a frame: a quick turn of the wheel, and half a screen.
SCROLLED = (60, 400)


def generate(folder: Path, latents: int, images: int) -> Path:
    """Write a gallery of so many latents and images; its folder."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (images,), generator=draw)
    centers = torch.randn(CLASSES, WIDTH, generator=draw)
    rows = centers[labels] + 0.7 * torch.randn(images, WIDTH, generator=draw)
    ids = [f"class_{int(label)}/{number:06d}.jpg" for number, label in enumerate(labels)]
    classes = tuple(f"class_{number}" for number in range(CLASSES))
    about = {"model": "generated", "layer": "up_ft1", "timestep": 25, "classes": list(classes)}
    store = write_store(folder / "store", rows, ids, labels.tolist(), settings=about)
    # More than are shown, as those that fire on no image are left out.
    model = KSparseAutoencoder(WIDTH, latents * 7 // 4, 32, seed=0)
    model.kernel = fastest_kernel(model)
    top = with_source(top_images(model, store, TopImagesConfig(m=20)), model, store)

    def read(index: int) -> Image.Image:
        hue = int(labels[index]) * 360 // CLASSES
        return Image.new("HSV", (48, 48), (hue * 255 // 360, 180, 120 + index % 100)).convert("RGB")

    dataset = ImageDataset("generated", None, classes, ids, labels.tolist(), read)
    how = GalleryConfig(latents=latents, map_method="pca")
    made = write_gallery(folder / "gallery", model, store, top, dataset, how)
    print(f"{made['latents']:,} latents, {made['images']:,} images")
    return folder / "gallery"


def timed(page: Page, do: Callable[[], object], until: str) -> float:
    """Seconds from an action until an expression holds."""
    start = time.perf_counter()
    do()
    page.until(until)
    return time.perf_counter() - start


def own_thread(page: Page) -> float:
    """Seconds of processor time of the page's main thread so far."""
    numbers = page.send("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in numbers if one["name"] == "ThreadTime")


def scrolled(page: Page, pixels: int) -> tuple[float, float]:
    """Seconds a frame of 60 that each scroll by so many pixels: on the clock, and of the page's own thread.

    On the clock, frames are painted by software here, on a screen by the graphics card.
    """
    begun = own_thread(page)
    frame = page.run(
        "new Promise((done) => { let n = 0; const start = performance.now(); const step = () => { "
        f"scrollBy(0, {pixels}); if (++n === 60) done((performance.now() - start) / 60000); "
        "else requestAnimationFrame(step); }; requestAnimationFrame(step); })"
    )
    return frame, (own_thread(page) - begun) / 60


def measure(gallery: Path, rounds: int) -> dict[str, Any]:
    """Seconds to open, to the end of the list, to a latent, to an image, to a filtered list, to the map."""
    shown = "[...document.querySelectorAll('.card img')]"
    cards = f"{shown}.some((image) => image.complete && image.naturalWidth)"
    latent = "latent/' + REVELIO.latents.id.at(-9) + '"
    url = f"{(gallery / 'index.html').as_uri()}?theme=light"
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        page = Page(Path(profile))
        for _ in range(rounds):
            page.open("about:blank")
            page.send("Performance.enable", timeDomain="threadTicks")
            times = {"open": timed(page, lambda: page.send("Page.navigate", url=url), cards)}
            times["open, the page's own thread"] = own_thread(page)
            bottom = (
                "scrollY > 0 && scrollY + innerHeight >= document.documentElement.scrollHeight - 2"
            )
            times["end of the list"] = timed(
                page, lambda: page.run("scrollTo(0, 1e9)"), f"{bottom} && {cards}"
            )
            for name, place, there in (
                ("a latent", latent, "!!document.querySelector('.profile')"),
                ("an image", "image/77", "!!document.querySelector('.active img')"),
                ("a class, by purity", "latents?class=3&sort=purity", cards),
                ("the map", "map", "!!document.querySelector('canvas')"),
            ):  # fmt: skip
                go = f"location.hash = '#/{place}'"
                times[name] = timed(page, lambda go=go: page.run(go), there)
            page.run("location.hash = '#/latents'")
            page.until(cards)
            for pixels in SCROLLED:
                frame, own = scrolled(page, pixels)
                times[f"a frame, scrolling {pixels} px in each"] = frame
                times[f"a frame, scrolling {pixels} px in each, the page's own thread"] = own
            for name, seconds in times.items():
                found.setdefault(name, []).append(seconds)
        memory = page.run("performance.memory.usedJSHeapSize") / 2**20
        page.close()
    seconds = {name: round(statistics.median(values), 3) for name, values in found.items()}
    return {
        "seconds": seconds,
        "script_memory_mib": round(memory, 1),
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Generate where asked, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=81_920)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gallery", type=Path, help="one that is there; none: generated")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gallery = flags.gallery or generate(Path(folder), flags.latents, flags.images)
        size = sum(path.stat().st_size for path in gallery.rglob("*") if path.is_file())
        first = (gallery / "data" / "gallery.js").stat().st_size
        found = {
            "latents": flags.latents,
            "images": flags.images,
            "folder_mib": round(size / 2**20, 1),
        }
        found |= {"first_file_mib": round(first / 2**20, 2)} | measure(gallery, flags.rounds)
    print(json.dumps(found, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
