"""The gallery: one static folder that opens from disk, without a server or a network.

    index.html  assets/*.js, *.css   thumbs/000/000000.jpg
    data/gallery.js                  what every page needs: names, and numbers of all latents and images
    data/cards-0000.js, latents-0000.js, images-0000.js, ...   the rest, loaded when a page shows it
    beside/0/  beside/1/             galleries that it is compared with, whole
    gallery.json                     the same data for programs
    latents.jsonl  images.jsonl      ... a latent, an image a line

Pages opened from disk may not fetch files, so data comes as scripts. All text reaches the page as text,
never as HTML.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from torch import Tensor

from revelio.activations.writer import CONTENTS
from revelio.analysis.config import GalleryConfig
from revelio.analysis.gallery.beside import opened
from revelio.analysis.gallery.firing import firing
from revelio.analysis.gallery.heat_maps import heat_maps, image_maps
from revelio.analysis.gallery.records import (
    class_sizes,
    describe,
    image_records,
    latent_columns,
    latent_records,
    similar_latents,
)
from revelio.analysis.gallery.told import Told
from revelio.analysis.purity import eligible
from revelio.analysis.top_images import TopImages, check_fits
from revelio.bounds import check_fields
from revelio.data.contents import combined, digests
from revelio.data.dataset import ImageDataset, ImageError
from revelio.data.transforms import Crop, thumbnail
from revelio.lock import NAME as LOCK
from revelio.outputs import Older, check_replaceable, read_record, replace_files
from revelio.wording import plural

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

FORMAT = 2
MAKER = "gallery"
# How many of each a file of data holds: so many that few files are loaded, so few that each comes at once.
CHUNKS = {"images": 500, "cards": 1024, "latents": 64}
# The images on a latent's card.
TILES = 10
FIRST = ("base", "filters", "latents", "latent", "images", "map", "app")
FIRST_SCRIPTS = tuple(f"{name}.js" for name in FIRST)
SCRIPTS = (*FIRST_SCRIPTS[:1], "grid.js", *FIRST_SCRIPTS[1:-1], "compare.js", "search.js", "app.js")


def write_gallery(
    out: str | Path,
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    top: TopImages,
    dataset: ImageDataset,
    config: GalleryConfig | None = None,
    *,
    purity: dict[str, Any] | None = None,
    known: Told | None = None,
    beside: Sequence[str | Path] = (),
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Write the gallery folder ``out``; when it is whole, it replaces the files of an older one.

    Args:
        out: the folder.
        model: the k-SAE.
        store: the activations that ``top`` was made from.
        top: its top images.
        dataset: the pictures; matched to the store's rows by id.
        config: how much to show.
        purity: an entry of `purity.json`, to show the means, their chance level and the controls.
        known: names of the latents, and how local and stable they are.
        beside: galleries of the same images, copied into `beside/0`, `beside/1`, ... to be compared with it.
        progress: told 1 after each image.

    Returns:
        A summary: latents, images, and the ids and reasons of images without a picture.

    Raises:
        ValueError: a file that no gallery wrote is in the way, the parts do not belong together, no latent
            is active, or the data set has none of the images.
    """
    out, config, known = Path(out), config or GalleryConfig(), known or Told()
    check_fields(config)
    others = [opened(Path(path), store.ids) for path in beside]
    _check(out, model, store, top)
    chosen = top.ranking(config.latents)
    if not len(chosen):
        raise ValueError("no latent is active on any image: train the k-SAE on this store first")
    indices = _matched(store, dataset)
    shared, records, seen = _contents(model, store, top, chosen, config, known)
    shared |= {"purity": purity, "measures": known.measures}
    shared["beside"] = [other.about for other in others]

    def fill(folder: Path) -> None:
        missing = _write_thumbnails(folder, store, indices, dataset, config.thumbnail, progress)
        labels = None if top.labels is None else top.labels.tolist()
        shared["images"] = {"ids": list(store.ids), "labels": labels, "missing": missing}
        _write_data(folder, shared, records, seen)
        _write_pages(folder, shared)
        for number, other in enumerate(others):
            other.copy(folder / "beside" / str(number))

    replace_files(out, MAKER, fill, older=OLDER)
    missing = shared["images"]["missing"]
    return {"latents": len(chosen), "images": store.images, "missing": missing}


def _contents(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    top: TopImages,
    chosen: Tensor,
    config: GalleryConfig,
    known: Told,
) -> tuple[dict[str, Any], Iterable[dict[str, Any]], Iterable[dict[str, Any]]]:
    """What all pages share, the records of the chosen latents, and those of the images."""
    fired = firing(model, store, chosen, top.source.get("cells", "pooled"))
    similar = similar_latents(model, top, chosen, fired, config)
    shared = _shared(model, top, chosen, config)
    shared["latents"] |= {"repeats": similar.repeats, **known.columns(chosen.tolist())}
    records = latent_records(model, store, top, chosen, fired, similar, config)
    records = (record | known.details(record["id"]) for record in records)
    seen = image_records(fired, config.image_latents)
    if len(store.row_shape) == 3:
        shared["meta"]["grid"] = list(store.row_shape[1:])
        records = _with_maps(list(records), model, store, chosen)
        seen = image_maps(model, store, chosen, seen)
    return shared, records, seen


def _shared(
    model: "KSparseAutoencoder", top: TopImages, chosen: Tensor, config: GalleryConfig
) -> dict[str, Any]:
    """What all pages share."""
    return {
        "format": FORMAT,
        "title": config.title or _title(top),
        "meta": describe(top, chosen, config) | {"eligible": len(eligible(top, 2))},
        "made_from": {key: top.source[key] for key in ("ksae", "store") if key in top.source},
        "labelled": top.labels is not None,
        "classes": list(top.classes),
        "class_sizes": class_sizes(top),
        "chunks": CHUNKS,
        "latents": latent_columns(model, top, chosen, config),
    }


def _with_maps(
    records: list[dict[str, Any]],
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    chosen: Tensor,
) -> list[dict[str, Any]]:
    """The records with the heat map of each latent over each image that is shown of it."""
    parts = ("top", "middle", "random", "misses")
    shown = [sorted({row for part in parts for row, _ in record[part]}) for record in records]
    maps = heat_maps(model, store, chosen, shown)
    return [record | {"maps": found} for record, found in zip(records, maps, strict=True)]


def _matched(store: "ActivationStore", dataset: ImageDataset) -> list[int | None]:
    """For every row of the store the index of its picture, where the data set has it.

    Raises:
        ValueError: it has none of them.
    """
    index_of = {image_id: index for index, image_id in enumerate(dataset.ids)}
    indices = [index_of.get(image_id) for image_id in store.ids]
    if indices.count(None) == len(indices):
        raise ValueError(
            f"{dataset.name} has none of the store's {plural(len(indices), 'image')} (first {store.ids[0]}): "
            "give the data set that was extracted (data.source)"
        )
    known, digest = store.manifest.get(CONTENTS), dataset.digest
    places = [index for index in indices if index is not None]
    if (
        known is None
        or digest is None
        or len(places) < len(indices)
        or store.manifest.get("skipped")
    ):
        return indices
    if combined(digests(lambda place: digest(places[place]), len(places))) != known:
        warnings.warn(
            f"the pictures of {dataset.name} are not the files that the store was made of, though names "
            "agree: what is shown may be other pictures",
            stacklevel=4,
        )
    return indices


def check_place(out: Path) -> None:
    """See before the work whether a gallery may be written to ``out``.

    Raises:
        ValueError: it can't be written, or holds something else than a gallery.
    """
    check_replaceable(out, MAKER, ("index.html", "gallery.json", "data/gallery.js"), OLDER)
    if not out.is_dir() or MAKER in read_record(out) or OLDER.files(out):
        return
    if any(path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"{out} holds something else than a gallery: choose another folder")


def _check(out: Path, model: Any, store: Any, top: TopImages) -> None:
    check_place(out)
    check_fits(model, store)
    if len(top.counts) != model.n or top.images != store.images:
        raise ValueError(
            f"the top images are of {plural(len(top.counts), 'latent')} and {plural(top.images, 'image')}, "
            f"the k-SAE has {plural(model.n, 'latent')} and the store {plural(store.images, 'image')}: make "
            "the top images of these two"
        )


def _title(top: TopImages) -> str:
    parts = [top.source.get("dataset"), top.source.get("layer")]
    if top.source.get("timestep") is not None:
        parts.append(f"t = {top.source['timestep']}")
    return " · ".join(str(part) for part in parts if part) or "Latents"


def _write_thumbnails(
    folder: Path,
    store: "ActivationStore",
    indices: Sequence[int | None],
    dataset: ImageDataset,
    side: int,
    progress: Callable[[int], object] | None,
) -> dict[str, str]:
    """Write what the model saw of every image; returns row -> reason of those that have no picture."""
    missing: dict[str, str] = {}
    crop = Crop.of(store.manifest)
    for row, index in enumerate(indices):
        path = folder / thumbnail_path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        if index is None:
            missing[str(row)] = f"{dataset.name} has no image {store.ids[row]}"
        else:
            try:
                small = thumbnail(dataset.read(index), side, crop)
                small.save(path, quality=82, optimize=True)
            except ImageError as error:
                missing[str(row)] = str(error)
        if progress is not None:
            progress(1)
    return missing


def _names(data: dict[str, Any]) -> list[str]:
    """The files of a gallery of the first version whose `gallery.json` holds ``data``."""
    rows = range(len(data["images"]["ids"]))
    parts = range(-(-len(rows) // 500))
    return [
        *("index.html", "gallery.json", "data/gallery.js"),
        *(f"data/images-{number:04d}.js" for number in parts),
        *(f"assets/{name}" for name in ("gallery.css", *FIRST_SCRIPTS)),
        *map(thumbnail_path, rows),
    ]


def _is_gallery(data: dict[str, Any]) -> bool:
    keys = {"format", "title", "meta", "labelled", "classes", "class_sizes", "purity", "latents"}
    return keys <= set(data) and isinstance(data["images"]["ids"], list)


OLDER = Older("gallery.json", _is_gallery, _names)


def thumbnail_path(row: int) -> str:
    """Where the thumbnail of a row lies in the gallery; a thousand a folder."""
    return f"thumbs/{row // 1000:03d}/{row:06d}.jpg"


def _write_data(
    folder: Path,
    shared: dict[str, Any],
    records: Iterable[dict[str, Any]],
    images: Iterable[dict[str, Any]],
) -> None:
    """Write the data for pages and for programs, and hold no more of it than a file's."""
    data = folder / "data"
    data.mkdir()
    _write(folder / "gallery.json", f"{_json(shared)}\n")
    _write(data / "gallery.js", f"window.REVELIO = {script_json(shared)};\n")
    cards: list[list[int]] = []

    def seen(record: dict[str, Any]) -> dict[str, Any]:
        cards.append([row for row, _ in record["top"][:TILES]])
        return record

    for kind, items in (("latents", map(seen, records)), ("images", images)):
        with (folder / f"{kind}.jsonl").open("w", encoding="ascii") as lines:
            _write_chunks(data, kind, items, lambda part, to=lines: to.write(_lines(part)))
    _write_chunks(data, "cards", cards, lambda part: None)


def _lines(part: Iterable[Any]) -> str:
    return "".join(f"{json.dumps(record, allow_nan=False)}\n" for record in part)


def _write_chunks(
    data: Path, kind: str, items: Iterable[Any], also: Callable[[list[Any]], object]
) -> None:
    """Write items as scripts of so many each; ``also`` gets each part, too."""
    for number, part in enumerate(_batched(items, CHUNKS[kind])):
        path = data / f"{kind}-{number:04d}.js"
        _write(path, f'window.REVELIO.add("{kind}", {number}, {script_json(part)});\n')
        also(part)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


def _write_pages(folder: Path, shared: dict[str, Any]) -> None:
    (folder / "assets").mkdir()
    source = files("revelio.analysis.gallery")
    for name in ("gallery.css", *SCRIPTS):
        (folder / "assets" / name).write_bytes((source / "static" / name).read_bytes())
    text = (source / "templates" / "gallery.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    page = template.render(title=shared["title"], meta=shared["meta"], scripts=SCRIPTS)
    _write(folder / "index.html", page)


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode(errors="backslashreplace"))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def script_json(value: Any) -> str:
    """JSON that is safe inside a script: no `</script>`, no line separators that end a string."""
    text = _json(value)
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
