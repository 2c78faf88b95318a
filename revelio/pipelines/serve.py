"""A gallery on a small web server of this machine, which also encodes pictures that are dropped in.

    server = open_server(ServeConfig(gallery=Path("runs/ksae/gallery")))
    server.serve_forever()

The pages are those of the folder, with one more script. A picture is posted as bytes and answered with the
latents that fire on it, the cells where they do, and the known images that are most like it. Nothing is kept.
"""

import json
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_matrix

from revelio.activations.encode import grids_as_stored
from revelio.analysis.cells import GridCodes, encode_grid, image_codes
from revelio.analysis.config import ServeConfig
from revelio.analysis.gallery.heat_maps import levels, sparse_maps
from revelio.analysis.gallery.records import short
from revelio.analysis.top_images_files import ksae_identity
from revelio.backbones.base import Backbone
from revelio.backbones.registry import load_backbone
from revelio.bounds import check_fields
from revelio.data.dataset import ImageError
from revelio.data.picture import read_picture
from revelio.data.transforms import crop_of, thumbnail
from revelio.hub import FINAL
from revelio.outputs import read_record
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.inputs import backbone_of, open_sae
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import path_in, printable, read_json_lines, read_object, regular_file

__all__ = ["Encoder", "ServeConfig", "open_server"]

UPLOAD_LIMIT = 64 * 2**20
UPLOADS = 8  # pictures that are received at once
ALIKE = 12
SEEN = 512  # of the picture as the model saw it, in pixels at most
SCRIPT = "assets/drop.js"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Encoder:
    """Encodes a picture as the images of a gallery were.

    Args:
        data: what `gallery.json` holds.
        images: the active latents of every image, as `images.jsonl` has them.
        backbone: the model, with the gallery's layer.
        model: the k-SAE.

    Raises:
        ValueError: the k-SAE is not the gallery's, or the images were seen with prompts, which a new picture
            has none of.
    """

    def __init__(
        self,
        data: dict[str, Any],
        images: Sequence[dict[str, Any]],
        backbone: Backbone,
        model: KSparseAutoencoder,
    ) -> None:
        meta = data["meta"]
        if data["made_from"].get("ksae", {}).get("sha256") != ksae_identity(model)["sha256"]:
            raise ValueError("the gallery is of another k-SAE: give the one it was made with")
        if meta.get("prompt_policy", "empty") != "empty":
            raise ValueError(
                f"the gallery's images were seen with prompts ({printable(meta['prompt_policy'])}), which a "
                "picture that is dropped in has none of"
            )
        self.meta, self.backbone, self.model = meta, backbone, model
        self.latents = torch.tensor(data["latents"]["id"], dtype=torch.int64)
        self._units = _unit_rows(images, len(self.latents))
        self._one_at_a_time = Lock()

    def __call__(self, picture: Image.Image, name: str) -> dict[str, Any]:
        """What fires on a picture.

        Args:
            picture: of any size.
            name: keys the noise, so that the same name gives the same answer.

        Returns:
            ``grid``: height and width of the layer's grid; ``active``: [place in the gallery, code, cells],
            strongest first, cells as a gallery's heat maps have them; ``more``: how many latents outside the
            gallery fire; ``alike``: [row, cosine of the codes] of known images; ``seen``: the part of the
            picture that the model saw, as the address of a JPEG.
        """
        with self._one_at_a_time, torch.inference_mode():
            grid = self._grid(picture, name)
            device = next(self.model.parameters()).device
            cells = encode_grid(self.model, grid[None].to(device), self.meta)
            values, latents = self._codes(grid.to(device), cells)
            place_of = {latent: place for place, latent in enumerate(self.latents.tolist())}
            kept = torch.tensor(
                [latent in place_of for latent in latents.tolist()], dtype=torch.bool
            )
            maps = levels(dict(enumerate(sparse_maps(cells, 0, latents))))
        shown = [
            [place_of[latent], short(value), maps[number]]
            for number, (latent, value) in enumerate(
                zip(latents.tolist(), values.tolist(), strict=True)
            )
            if latent in place_of
        ]
        return {
            "grid": list(grid.shape[1:]),
            "active": shown,
            "more": int((~kept).sum()),
            "seen": self._seen(picture),
            "alike": self._alike(
                [place for place, _, _ in shown], [value for _, value, _ in shown]
            ),
        }

    def _codes(self, grid: torch.Tensor, cells: GridCodes) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes above 0 of the whole picture, strongest first, and their latents."""
        over = self.meta.get("cells", "pooled")
        if over == "pooled":
            codes = self.model.encode(grid.mean((1, 2))[None], self.meta)
            values, latents = codes.values[0].float().cpu(), codes.indices[0].cpu()
            values, latents = values[values > 0], latents[values > 0]
        else:
            values, indices = (part.flatten(1, 2).cpu() for part in (cells.values, cells.indices))
            found = image_codes(values, indices, self.model.n, over)
            values, latents = found.values, found.latents
        order = values.argsort(descending=True, stable=True)
        return values[order], latents[order]

    def _grid(self, picture: Image.Image, name: str) -> torch.Tensor:
        encoded = self.backbone.encode(self.backbone.transform(picture)[None])
        return grids_as_stored(self.backbone, encoded, [name], self.meta)[0].cpu()

    def _seen(self, picture: Image.Image) -> str:
        stream = BytesIO()
        small = thumbnail(picture, SEEN, crop_of(self.backbone.transform))
        small.save(stream, "JPEG", quality=90)
        return "data:image/jpeg;base64," + b64encode(stream.getvalue()).decode()

    def _alike(self, places: list[int], values: list[float]) -> list[list[float]]:
        if not places:
            return []
        row = np.zeros(len(self.latents))
        row[places] = values
        cosines = self._units @ (row / np.linalg.norm(row))
        order = np.argsort(-cosines, kind="stable")[:ALIKE]
        return [[int(one), short(float(cosines[one]))] for one in order if cosines[one] > 0]


def _unit_rows(images: Sequence[dict[str, Any]], latents: int) -> Any:
    """The codes of the known images, a row each, at length 1."""
    pairs = [
        (row, place, value) for row, image in enumerate(images) for place, value in image["active"]
    ]
    for _, place, value in pairs:
        if type(place) is not int or type(value) not in (int, float) or not 0 <= place < latents:
            raise TypeError("an active latent is none of the gallery's")
    rows, places, values = np.array(pairs, dtype=float).reshape(-1, 3).T
    codes: Any = csr_matrix(
        (values, (rows.astype(int), places.astype(int))), (len(images), latents)
    )
    lengths = np.sqrt(codes.multiply(codes).sum(1)).A1
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return csr_matrix(codes.multiply(scale[:, None]))


def open_server(config: ServeConfig, progress: Report = silent) -> ThreadingHTTPServer:
    """A server of a gallery; call ``serve_forever`` on it, and ``server_close`` in the end.

    Raises:
        ValueError: the folder holds no gallery of this version, its model or k-SAE can't be opened, or the
            port is taken.
    """
    check_fields(config)
    folder = config.gallery
    if not (folder / "gallery.json").exists():
        raise ValueError(
            f"{printable(folder)} holds no gallery (it has no gallery.json): give a folder that `revelio "
            "gallery` wrote"
        )
    data = read_object(folder / "gallery.json")
    names = frozenset(read_record(folder).get("gallery", ()))
    meta = data.get("meta")
    known = data.get("format") == 2 and "index.html" in names
    if not known or not isinstance(meta, dict) or not isinstance(meta.get("layer"), str):
        raise _no_gallery(folder)
    with _as_written(folder):
        ksae = config.ksae or _own_ksae(folder, data)
        asked = backbone_of(config.backbone, meta, f"the gallery at {printable(folder)}")
    server = _listening(config)  # or it says that it can't, before a model is loaded
    try:
        progress(Progress(f"loading {asked.name} and the k-SAE at {ksae}"))
        backbone = load_backbone(asked, layers=(meta["layer"],))
        images = read_json_lines(folder / "images.jsonl")
        model = open_sae(ksae, progress=progress)
        with _as_written(folder):
            encoder = Encoder(data, images, backbone, model)
    except BaseException:
        server.server_close()
        raise
    shown = {"folder": folder, "names": names, "encoder": encoder}
    server.RequestHandlerClass = type("Handler", (_Handler,), shown)
    return server


def _listening(config: ServeConfig) -> "_Server":
    try:
        return _Server((config.host, config.port), _Handler)
    except OSError as error:
        raise ValueError(
            f"no server at {printable(config.host)}, port {config.port} ({error.strerror or error}): give "
            "another port, such as 0 for a free one, or this machine's own address as host"
        ) from error


@contextmanager
def _as_written(folder: Path) -> Iterator[None]:
    """Turn what is missing in a gallery's data, or of another type, into one line."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise _no_gallery(folder) from error


def _no_gallery(folder: Path) -> ValueError:
    return ValueError(f"{printable(folder)} holds no gallery of this version: write it again")


def _own_ksae(folder: Path, data: dict[str, Any]) -> str:
    """The k-SAE whose run a gallery lies in, or the one of its store among those of a demo's run."""
    run = folder.resolve().parent
    store = data["made_from"].get("store", {}).get("name")
    # Looked for among what is there: the name is a file's.
    of_demo = [path for path in (run / "ksae").glob("*") if path.name == store]
    run = next((path for path in (run, *of_demo) if (path / FINAL).is_dir()), None)
    if run is None:
        raise ValueError(
            f"{printable(folder)} lies in no run of a k-SAE: say which k-SAE it is of (ksae)"
        )
    return str(run)


class _Server(ThreadingHTTPServer):
    """Answers every request in a thread of its own; one that fails says so in a line, and ends alone."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.uploads = BoundedSemaphore(UPLOADS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what failed; a browser that has gone is no news."""
        error = sys.exception()
        if not isinstance(error, OSError):
            sys.stderr.write(f"revelio: a request failed: {printable(repr(error))}\n")


class _Handler(BaseHTTPRequestHandler):
    """Serves the files of one gallery, and nothing else, to pages of its own."""

    server: _Server
    folder: Path
    names: frozenset[str]
    encoder: Encoder
    timeout = 60
    server_version = "revelio"

    def do_GET(self) -> None:
        """A file of the gallery; index.html with the script that takes pictures."""
        name = self.path.partition("?")[0].lstrip("/") or "index.html"
        if not self._known_host():
            self._say(HTTPStatus.FORBIDDEN, "this server answers to its own address only")
        elif name == SCRIPT:
            source = files("revelio.analysis.gallery") / "static" / "drop.js"
            self._send(source.read_bytes(), "text/javascript")
        elif (content := self._file(name)) is None:
            self._say(HTTPStatus.NOT_FOUND, "there is no such page")
        elif name == "index.html":
            more = f'<script src="{SCRIPT}" data-most="{UPLOAD_LIMIT}"></script>\n</body>'
            self._send(content.replace(b"</body>", more.encode()), "text/html; charset=utf-8")
        else:
            kinds = {
                ".js": "text/javascript",
                ".css": "text/css",
                ".jpg": "image/jpeg",
                ".html": "text/html",
            }
            kind = kinds.get(Path(name).suffix, "application/json")
            self._send(content, f"{kind}; charset=utf-8")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Encode the picture that the body holds; a broken one is said to be in the answer."""
        length = self.headers.get("Content-Length", "")
        # Only this server's own pages send this header: others would have to ask first, and are not answered.
        if self.path != "/encode" or not self._known_host() or self.headers.get("X-Revelio") != "1":
            self._say(HTTPStatus.FORBIDDEN, "this server takes pictures from its own pages only")
        elif not length.isdecimal() or len(length) > 12 or not 0 < int(length) <= UPLOAD_LIMIT:
            self.close_connection = True
            limit = UPLOAD_LIMIT // 2**20
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a picture has at most {limit} MiB")
        elif not self.server.uploads.acquire(blocking=False):
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, "too many pictures at once: try again")
        else:
            try:
                self._encode(self.rfile.read(int(length)))
            finally:
                self.server.uploads.release()

    def _file(self, name: str) -> bytes | None:
        """The content of a file of the gallery; None for what is none of its own."""
        if name not in self.names:
            return None
        try:
            return regular_file(path_in(self.folder, name)).read_bytes()
        except (ValueError, OSError):  # gone since, or another thing in its place
            return None

    def _encode(self, content: bytes) -> None:
        name = sha256(content).hexdigest()
        try:
            found = self.encoder(read_picture(content, "dropped in"), name)
            body = json.dumps(found, allow_nan=False).encode()
        except ImageError as error:
            reason = f"the picture can't be read: {error.reason}"
            self._say(HTTPStatus.UNPROCESSABLE_ENTITY, reason)
        except ValueError as error:
            self._say(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except (MemoryError, RuntimeError, TypeError) as error:
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, str(error).partition("\n")[0])
        else:
            self._send(body, "application/json")

    def _known_host(self) -> bool:
        """Whether the page that asks was reached by an address, not by a name that someone points here."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            return host == "localhost" or bool(ip_address(host))
        except ValueError:
            return False

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(json.dumps({"error": printable(text)}).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {
            **HEADERS,
            "Content-Type": kind,
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what a page loads is no news."""
