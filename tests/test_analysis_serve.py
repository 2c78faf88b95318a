"""A gallery behind its server: whose files it gives, whose pictures it takes, and what it says of them."""

import http.client
import io
import json
import os
import shutil
import socket
import struct
import threading
from base64 import b64decode
from dataclasses import replace
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_helpers import write_pictures
from backbones_helpers import tiny_sd
from browser_helpers import Page, needs_browser
from PIL import Image
from sae_helpers import random_model

from revelio.activations.store import ActivationStore
from revelio.analysis.config import FROM_GALLERY, MakeGalleryConfig, ServeConfig
from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import load_backbone
from revelio.cli import main
from revelio.data.config import DataConfig
from revelio.data.transforms import SquareTransform
from revelio.pipelines import serve
from revelio.pipelines.gallery import make_gallery
from revelio.pipelines.inputs import backbone_of, open_sae
from revelio.pipelines.serve import UPLOAD_LIMIT, UPLOADS, Encoder, open_server

LAYER = "up_ft1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of a tiny Stable Diffusion on pictures, in the run folder of its k-SAE."""
    root = tmp_path_factory.mktemp("serve")
    sd, images = tiny_sd(root / "sd"), write_pictures(root / "images")
    main(["extract", "--backbone.name", str(sd), "--backbone.image-size", "32", "--layers", LAYER,
          "--data.source", str(images), "--pool", "none", "--out", str(root / "stores")])  # fmt: skip
    (store,) = [path.parent for path in (root / "stores").glob("*/manifest.json")]
    width = ActivationStore.open(store).row_shape[0]
    random_model(d=width, n=4 * width, k=6, seed=0).save_pretrained(root / "run" / "final")
    data = DataConfig(source=str(images))
    make_gallery(
        MakeGalleryConfig(
            store=store, ksae=str(root / "run"), data=data, map_method="pca", beside_controls=False
        )
    )
    return root


@pytest.fixture(scope="module")
def address(made: Path):
    """Host and port of a server of it."""
    server = open_server(config(made))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[:2]
    server.shutdown()
    server.server_close()


def config(made: Path) -> ServeConfig:
    backbone = BackboneConfig(name=str(made / "sd"), image_size=32)
    return ServeConfig(gallery=made / "run" / "gallery", backbone=backbone, port=0)


def ask(
    address: tuple[str, int], method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    return answer.status, answer.read()


def png(picture: Image.Image) -> bytes:
    picture.save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def test_a_picture_is_answered_with_its_codes_cells_and_similar_images(
    made: Path, address: tuple[str, int]
) -> None:
    content = (made / "images" / "one" / "08.png").read_bytes()
    status, body = ask(address, "POST", "/encode", content, X_Revelio="1")
    assert status == 200
    found = json.loads(body)
    ids = json.loads((made / "run" / "gallery" / "gallery.json").read_text())["latents"]["id"]
    # By hand: the grid of the model, its mean and its cells through the k-SAE.
    backbone = load_backbone(str(made / "sd"), layers=[LAYER], image_size=32)
    with Image.open(made / "images" / "one" / "08.png") as picture:
        pixels = backbone.transform(picture.convert("RGB"))[None]
    name = sha256(content).hexdigest()
    grid = backbone.activations(backbone.encode(pixels), [name], [LAYER], timestep=25)[LAYER][0]
    model = open_sae(str(made / "run"))
    codes = model.encode(grid.mean((1, 2))[None])
    pairs = zip(codes.indices[0].tolist(), codes.values[0].tolist(), strict=True)
    expected = {latent: value for latent, value in pairs if value > 0}
    shown = {ids[place]: value for place, value, _ in found["active"]}
    assert shown == pytest.approx(
        {one: value for one, value in expected.items() if one in ids}, rel=1e-3
    )
    assert found["more"] == len(expected) - len(shown) and found["grid"] == list(grid.shape[1:])
    cells = model.encode(grid.flatten(1).T)
    for place, _, flat in found["active"]:
        hits = ((cells.indices == ids[place]) & (cells.values > 0)).any(1)
        assert flat[::2] == hits.nonzero()[:, 0].tolist()
    images = [
        dict(json.loads(line)["active"])
        for line in (made / "run" / "gallery" / "images.jsonl").read_text().splitlines()
    ]
    row, cosine = found["alike"][0]
    ours = {place: value for place, value, _ in found["active"]}
    lengths = [np.linalg.norm(list(one.values())) for one in (ours, images[row])]
    product = sum(value * images[row].get(place, 0.0) for place, value in ours.items())
    assert cosine == pytest.approx(product / (lengths[0] * lengths[1]), rel=1e-2)


def test_a_picture_is_seen_with_all_draws_that_the_gallerys_images_are_means_of(
    made: Path,
) -> None:
    folder, size = made / "averaged", ["--backbone.image-size", "32"]
    main(["extract", "--backbone.name", str(made / "sd"), *size, "--layers", LAYER, "--pool", "2",
          "--data.source", str(made / "images"), "--draws", "2", "--average-draws",
          "--out", str(folder)])  # fmt: skip
    (store,) = [path.parent for path in folder.glob("*/manifest.json")]
    gallery = MakeGalleryConfig(
        store=store, ksae=str(made / "run"), data=DataConfig(source=str(made / "images")),
        map_method="pca", beside_controls=False, out=folder / "gallery",
    )  # fmt: skip
    make_gallery(gallery)
    data = json.loads((folder / "gallery" / "gallery.json").read_text())
    backbone = load_backbone(str(made / "sd"), layers=[LAYER], image_size=32)
    model = open_sae(str(made / "run"))
    found = Encoder(data, [], backbone, model)(picture := Image.new("RGB", (40, 40), "teal"), "x")
    encoded = backbone.encode(backbone.transform(picture)[None])
    drawn = [
        backbone.activations(encoded, ["x"], [LAYER], timestep=25, draw=draw)[LAYER][0]
        for draw in (0, 1)
    ]
    mean = (drawn[0] + drawn[1]) / 2
    codes = model.encode(mean.mean((1, 2))[None])
    expected = dict(zip(codes.indices[0].tolist(), codes.values[0].tolist(), strict=True))
    shown = {data["latents"]["id"][place]: value for place, value, _ in found["active"]}
    assert shown == pytest.approx({one: expected[one] for one in shown}, rel=1e-3) and shown
    half = mean.shape[1] // 2
    corners = [
        mean[:, y : y + half, x : x + half].mean((1, 2)) for y in (0, half) for x in (0, half)
    ]
    cells = model.encode(torch.stack(corners))
    assert found["grid"] == [2, 2] and mean.shape[1] > 2
    for place, _, flat in found["active"]:
        hits = ((cells.indices == data["latents"]["id"][place]) & (cells.values > 0)).any(1)
        assert flat[::2] == hits.nonzero()[:, 0].tolist()


def test_the_answer_shows_what_the_model_saw(
    made: Path, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blue with a red frame that the model's square has none of.
    picture = Image.new("RGB", (90, 50), "red")
    picture.paste(Image.new("RGB", (40, 40), "blue"), (25, 5))
    server = open_server(config(made))
    encoder = server.RequestHandlerClass.encoder  # type: ignore[attr-defined]
    server.server_close()
    for transform, red in ((SquareTransform(32, resize=40), 0.0),
                           (SquareTransform(32, stretch=True), 1 - 1600 / 4500)):  # fmt: skip
        monkeypatch.setattr(encoder.backbone, "transform", transform)
        kind, _, content = encoder(picture, "x")["seen"].partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(b64decode(content))) as seen:
            assert seen.width == seen.height >= 40
            share = (np.asarray(seen)[..., 0] > 128).mean()
        assert share == pytest.approx(red, abs=0.03)


def test_only_the_gallerys_own_files_are_given(made: Path, address: tuple[str, int]) -> None:
    status, body = ask(address, "GET", "/")
    assert status == 200 and b"assets/drop.js" in body
    assert ask(address, "GET", "/assets/drop.js")[0] == 200
    assert ask(address, "GET", "/gallery.json?x=1")[0] == 200
    (made / "run" / "gallery" / "secret.txt").write_text("mine")
    for path in ("/secret.txt", "/../final/config.json", "/%2e%2e/final/config.json", "/data", "//etc/passwd",
                 "/.revelio-files.json"):  # fmt: skip
        assert ask(address, "GET", path)[0] == 404, path


def test_other_sites_and_other_names_are_refused(address: tuple[str, int]) -> None:
    content = png(Image.new("RGB", (40, 40)))
    assert ask(address, "POST", "/encode", content)[0] == 403
    assert ask(address, "POST", "/encode", content, X_Revelio="1", Host="evil.example:80")[0] == 403
    assert ask(address, "GET", "/", Host="evil.example")[0] == 403
    assert ask(address, "GET", "/", Host="localhost:1")[0] == 200


def test_broken_and_huge_pictures_are_a_friendly_note(address: tuple[str, int]) -> None:
    whole = png(Image.new("RGB", (64, 64)))
    for content in (b"no picture", whole[:60], b"\0" * 2000):
        status, body = ask(address, "POST", "/encode", content, X_Revelio="1")
        assert status == 422 and json.loads(body)["error"].startswith("the picture can't be read: ")
    status, body = ask(
        address, "POST", "/encode", b"x", X_Revelio="1", Content_Length=str(UPLOAD_LIMIT + 1)
    )
    assert status == 413 and "at most" in json.loads(body)["error"]
    assert ask(address, "POST", "/encode", b"", X_Revelio="1")[0] == 413
    assert ask(address, "POST", "/encode", whole, X_Revelio="1")[0] == 200


def test_addresses_may_be_told_from_names_in_any_form(address: tuple[str, int]) -> None:
    names = ("127.0.0.1.evil.example", "evil.example:x:80", "[::1", "0x7f.1", "localhost.evil.example",
             "127.0.0.1@evil.example", "", "localhost.")  # fmt: skip
    for host in names:
        assert ask(address, "GET", "/", Host=host)[0] == 403, host
    for host in ("127.0.0.1:5", "[::1]:80", "localhost"):
        assert ask(address, "GET", "/", Host=host)[0] == 200, host


def test_clients_that_break_off_leave_the_server_silent_and_at_work(
    address: tuple[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    begin = b"POST /encode HTTP/1.1\r\nHost: localhost\r\nX-Revelio: 1\r\nContent-Length: "
    requests = (b"", b"\0\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", begin + b"5000\r\n\r\nxy",
                begin + b"9" * 5000 + b"\r\n\r\n", begin + b"-1\r\n\r\n", 
                b"GET /gallery.json HTTP/1.1\r\nHost: [::1]\r\n\r\n",
                b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")  # fmt: skip
    for request in requests:
        with socket.create_connection(address) as client:
            # Closed with a reset, so that the answer has nowhere to go.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(request)
    content = png(Image.new("RGB", (40, 40)))
    assert ask(address, "POST", "/encode", content, X_Revelio="1")[0] == 200
    assert capfd.readouterr().err == ""


def test_uploads_are_bounded_in_number(address: tuple[str, int]) -> None:
    begin = (
        b"POST /encode HTTP/1.1\r\nHost: localhost\r\nX-Revelio: 1\r\nContent-Length: 9\r\n\r\nx"
    )
    slow = [socket.create_connection(address) for _ in range(UPLOADS)]
    for client in slow:
        client.sendall(begin)
    content = png(Image.new("RGB", (40, 40)))
    for _ in range(200):
        status, body = ask(address, "POST", "/encode", content, X_Revelio="1")
        if status == 503:
            break
    assert status == 503 and "at once" in json.loads(body)["error"]
    assert ask(address, "GET", "/")[0] == 200
    for client in slow:
        client.close()
    while ask(address, "POST", "/encode", content, X_Revelio="1")[0] != 200:
        pass


def test_what_took_a_files_place_is_not_given(made: Path, address: tuple[str, int]) -> None:
    path = made / "run" / "gallery" / "assets" / "gallery.css"
    content = path.read_bytes()
    for number in range(4):
        path.unlink()
        if number == 0:
            path.symlink_to(made / "run" / "final" / "config.json")
        elif number == 1:
            os.mkfifo(path)
        elif number == 2:
            path.mkdir()
        try:
            assert ask(address, "GET", "/assets/gallery.css")[0] == 404, number
        finally:
            path.rmdir() if number == 2 else path.unlink(missing_ok=True)
            path.write_bytes(content)
    assert ask(address, "GET", "/assets/gallery.css")[0] == 200


def test_an_edited_gallery_is_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, model = made / "run" / "gallery", open_sae(str(made / "run"))
    monkeypatch.setattr(serve, "open_sae", lambda *a, **k: model)
    monkeypatch.setattr(serve, "load_backbone", lambda *a, **k: None)
    data, rows = (gallery / "gallery.json").read_text(), (gallery / "images.jsonl").read_text()
    odd = (None, 3, "x", [], {}, [1], {"a": 1}, -1, 10**30, ["x"], 0.5)
    asked = (config(made), replace(config(made), backbone=BackboneConfig(name=FROM_GALLERY)))

    def refused(one: ServeConfig, name: str, content: str) -> None:
        kept = (gallery / name).read_text()
        (gallery / name).write_text(content)
        try:
            with pytest.raises((ValueError, KeyError)):
                open_server(one).server_close()
        finally:
            (gallery / name).write_text(kept)

    for field, value in product(("meta", "latents", "made_from", "format"), odd):
        refused(asked[0], "gallery.json", json.dumps(json.loads(data) | {field: value}))
    for field, value in product(("layer", "image_size", "model"), odd):
        meta = json.loads(data)["meta"] | {field: value}
        refused(asked[1], "gallery.json", json.dumps(json.loads(data) | {"meta": meta}))
    for value in set(map(json.dumps, odd)) - {"[]", "{}"}:
        for active in (
            value,
            f"[{value}]",
            f"[[{value}, {value}]]",
            f"[[0, {value}], [10000, 1.0]]",
        ):
            if active != "[[3, 3]]":
                refused(asked[0], "images.jsonl", f'{{"active": {active}}}\n{rows}')


def test_what_does_not_belong_together_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gallery\.json"):
        open_server(replace(config(made), gallery=tmp_path))
    with pytest.raises(ValueError, match="no known one: give it"):
        open_server(replace(config(made), backbone=BackboneConfig(name="from-gallery")))
    width = open_sae(str(made / "run")).d
    random_model(d=width, n=4 * width, k=6, seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="of another k-SAE"):
        open_server(replace(config(made), ksae=str(tmp_path / "other")))


def test_a_demos_gallery_finds_its_k_sae(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run" / "gallery", tmp_path / "gallery")
    data = json.loads((made / "run" / "gallery" / "gallery.json").read_text())
    name = data["made_from"]["store"]["name"]
    with pytest.raises(ValueError, match="lies in no run of a k-SAE"):
        open_server(replace(config(made), gallery=tmp_path / "gallery"))
    random_model(seed=1).save_pretrained(tmp_path / "ksae" / "another" / "final")
    shutil.copytree(made / "run" / "final", tmp_path / "ksae" / name / "final")
    open_server(replace(config(made), gallery=tmp_path / "gallery")).server_close()


def test_a_gallery_of_a_known_model_needs_no_model_named(made: Path) -> None:
    data = json.loads((made / "run" / "gallery" / "gallery.json").read_text())
    assert data["meta"]["image_size"] == [32, 32]
    data["meta"]["model"] = "mini-sd"
    unnamed, meta = ServeConfig(gallery=made).backbone, data["meta"]
    assert backbone_of(unnamed, meta, "it") == BackboneConfig(name="mini-sd", image_size=32)
    larger = replace(unnamed, image_size=64)
    assert backbone_of(larger, meta, "it") == BackboneConfig(name="mini-sd", image_size=64)


@needs_browser
def test_a_picture_chosen_in_the_browser_shows_what_fires_and_where(
    made: Path, address: tuple[str, int], tmp_path: Path
) -> None:
    page = Page(tmp_path / "profile")
    page.open(f"http://{address[0]}:{address[1]}/#/latents")
    page.until("!!document.querySelector('.card')")
    root = page.send("DOM.getDocument")["root"]["nodeId"]
    chooser = page.send("DOM.querySelector", nodeId=root, selector="#picture")["nodeId"]
    picture = str(made / "images" / "two" / "09.png")
    page.send("DOM.setFileInputFiles", files=[picture], nodeId=chooser)
    page.until("!!document.querySelector('.active')")
    ids = page.run("[...document.querySelectorAll('.active')].map((a) => a.getAttribute('href'))")
    assert ids and "Your picture" in page.run("document.querySelector('main').textContent")
    page.run("document.querySelector('.active').dispatchEvent(new Event('mouseenter'))")
    assert page.run("getComputedStyle(document.querySelector('.on .heat')).opacity") == "1"
    page.close()


@needs_browser
def test_a_picture_is_dropped_and_broken_or_huge_ones_are_a_note(
    made: Path, address: tuple[str, int], tmp_path: Path
) -> None:
    files = {"broken.png": b"no picture", "wide.png": png(Image.new("1", (12_000, 12_000)))}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(UPLOAD_LIMIT + 1)
    page = Page(tmp_path / "profile")
    page.open(f"http://{address[0]}:{address[1]}/#/about")

    def drop(path: Path) -> None:
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            page.send("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    drop(made / "images" / "one" / "02.png")
    page.until("!!document.querySelector('.active')")
    assert "Your picture" in page.run("document.querySelector('main').textContent")
    for name, why in (
        ("broken.png", "no known picture"),
        ("wide.png", "12000 x 12000 pixels, more than"),
        ("large.png", "at most 64 MiB"),
    ):
        drop(tmp_path / name)
        page.until(
            f"document.querySelector('[role=alert]')?.textContent.startsWith('{name}: ') && "
            f"document.querySelector('[role=alert]').textContent.includes('{why}')"
        )
    page.close()
