"""Hostile inputs of what others say of results: names, measures, masks, captions, benches, judges."""

import http.client
import json
import sqlite3
import threading
from pathlib import Path
from random import Random
from typing import Any

import torch
from campaign.hostile import Case, case, copied, edit_file, edit_json, hostile_pt, plant, replaced
from campaign.hostile_data import png, spoil
from campaign.mutate import damaged, json_text, junk
from campaign.world import World


def told(rng: Random, world: World, folder: Path) -> Case:
    """A gallery with edited names or measures, a table with edited scores, or a gallery beside it."""
    kind = rng.randrange(3)
    if kind == 0:
        path = folder / "scores.json"
        entry = {"relative": 50.0, "relative_interval": [1.0, 2.0], "questions": 3}
        path.write_text(json.dumps({"files": [{"scores": {"all": entry, "conv": entry}}]}))
        edit_json(rng, world, path)
        words = ["reproduce", "table4", "--scale", "mini", "--scores", f"clip={path}"]
        return case([*words, "--out", str(folder / "out")])
    words = world.words("gallery", folder / "out")
    if kind == 1:
        beside = copied(world.made / "clean" / "gallery", folder / "b")
        edit_json(rng, world, beside / rng.choice(("gallery.json", ".revelio-files.json")))
        return case([*words, "--beside", str(beside)])
    names = world.made / "once" / "name-latents"
    flag, path = rng.choice((("--names", names), ("--locality", world.made / "locality.json")))
    value = json.loads(path.read_text()) | {"made_from": json.loads(names.read_text())["made_from"]}
    path = folder / "told.json"
    path.write_text(json.dumps(value))
    # Of the right k-SAE, so that the rest of it is read.
    own = value.pop("made_from")
    edited = json.loads(json_text_of(rng, value, world))
    path.write_text(json.dumps(edited | {"made_from": own} if isinstance(edited, dict) else edited))
    return case([*words, flag, str(path)])


def json_text_of(rng: Random, value: Any, world: World) -> str:
    """Well-formed JSON of an edited value."""
    while True:
        try:
            text = json_text(rng, value, world.outside).decode()
            json.loads(text)
        except (ValueError, RecursionError):
            continue
        return text


def pictures_told(rng: Random, world: World, folder: Path) -> Case:
    """A folder of masks with pipes, links and pictures out of proportion; or a file of captions with junk."""
    if rng.random() < 0.5:
        masks = folder / "set" / "masks"
        masks.mkdir(parents=True)
        for number in range(6):
            (masks / f"{number}.png").write_bytes(png(8, 8))
        victim = masks / f"{rng.randrange(6)}.png"
        victim.unlink()
        if rng.random() < 0.3:
            victim.symlink_to(rng.choice((world.outside / "images", Path("/dev/zero"))))
        elif rng.random() < 0.3:
            victim.write_bytes(png(rng.choice((0, 1, 2_000_000)), rng.choice((1, 2**31 - 1))))
        else:
            spoil(rng, world, folder / "set")
        return case(world.words("locality", folder / "out.json", "--masks", masks))
    images = world.made / "images"
    names = [path.relative_to(images).as_posix() for path in sorted(images.rglob("*.*"))]
    rows = [{"image": name, "caption": "a cat"} for name in names]
    row = rng.choice(rows)
    row[rng.choice(("image", "caption"))] = junk(rng, world.outside)
    text = "".join(json.dumps(one) + "\n" for one in rows).encode()
    if rng.random() < 0.3:
        text = "\n".join(["image,caption", *(f"{r['image']},{r['caption']}" for r in rows)]).encode(
            "utf-8", "surrogatepass"
        )
    path = folder / rng.choice(("c.jsonl", "c.jsonl", "c.csv", "c.txt"))
    path.write_bytes(damaged(rng, text) if rng.random() < 0.3 else text)
    return case(world.words("extract", folder / "out", "--prompts", f"captions:{path}"))


def benches(rng: Random, world: World, folder: Path) -> Case:
    """A bench with a file edited, or pictures elsewhere, answered or judged; or answers to go on with."""
    name = rng.choice(("llava-bench answer", "llava-bench judge", "mmvp"))
    source = world.made / ("mmvp" if name == "mmvp" else "bench")
    bench = copied(source, folder / "b")
    out = folder / ("out" if name == "mmvp" else "out.jsonl")
    files = sorted(path for path in bench.rglob("*") if path.suffix in (".json", ".jsonl", ".csv"))
    path = rng.choice(files)
    if path.suffix == ".json":
        edit_json(rng, world, path)
    elif path.suffix == ".csv":
        lines = path.read_text().splitlines()
        cells = lines[1].split(",")
        cells[rng.randrange(4)] = rng.choice(
            (str(junk(rng, world.outside)), "(a)" + " " * 120_000 + "x(b)", "²", "٣", "9" * 5000)
        )
        lines[1] = ",".join(cells)
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(damaged(rng, text) if rng.random() < 0.2 else text)
    else:
        path.write_bytes(_edited_lines(rng, world, path))
    if rng.random() < 0.2 and name != "llava-bench judge":
        answers = out / "answers.jsonl" if name == "mmvp" else out
        answers.parent.mkdir(exist_ok=True)
        answers.write_bytes(_edited_lines(rng, world, world.made / "bench" / "tiny.jsonl"))
    return case(replaced(replaced(world.words(name, out), source, bench), source / path.name, path))


def _edited_lines(rng: Random, world: World, path: Path) -> bytes:
    lines = [line.encode() for line in path.read_text().splitlines()]
    place = rng.randrange(len(lines))
    value = json.loads(lines[place])
    if "image" in value and rng.random() < 0.4:
        picture = sorted((world.outside / "images").rglob("*.png"))[0]
        value["image"] = rng.choice((f"../../outside/images/{picture.name}", str(picture), ".."))
        lines[place] = json.dumps(value).encode()
    else:
        lines[place] = json_text(rng, value, world.outside)
    return b"\n".join(lines)


def replies(rng: Random, world: World, folder: Path) -> Case:
    """What a judge says: junk, brackets without an end, spaces, numbers beyond all bounds."""
    name, file = rng.choice((("name-latents", "names"), ("llava-bench judge", "judge")))
    source = world.made / "replies" / f"{file}.sqlite"
    cache = copied(source, folder / "c.sqlite")
    texts = ["{" * 200_000, "[" * 200_000, "scores" + " " * 100_000 + "x", "<think>" * 50_000]
    texts += [
        "score " * 50_000,
        "." * 100_000,
        "9" * 5000 + " 1",
        "-1 11",
        "8 7 6",
        "\x1b[2J8 7",
        "",
    ]
    texts += [
        f"Assistant 1: {'9' * 400}, Assistant 2: 1",
        "1e999 1",
        "nan nan",
        "\ud800".encode("utf-8", "replace").decode(),
    ]
    honest = {"choice": "A", "name": "red", "confidence": 9, "images": [1, 2]}
    texts.append(json_text(rng, honest, world.outside).decode("utf-8", "replace"))
    with sqlite3.connect(cache) as connection:
        for (key,) in connection.execute("SELECT key FROM replies").fetchall():
            if rng.random() < 0.7:
                values = (rng.choice(texts), key)
                connection.execute("UPDATE replies SET text = ? WHERE key = ?", values)
    return case(replaced(world.words(name, folder / "out"), source, cache))


def projectors(rng: Random, world: World, folder: Path) -> Case:
    """Projectors of others or of our own for a second stage; or a stopped first stage with a file edited."""
    plant(folder)
    pretrained = world.made / "chat" / "pretrain" / "final"
    words = world.words("llava finetune", folder / "out")
    kind = rng.random()
    if kind < 0.6:
        path = folder / "mm_projector.bin"
        weights = {"model.mm_projector.0.weight": torch.ones(32, 32)}
        weights |= {"model.mm_projector.0.bias": torch.ones(32)}
        torch.save(weights, path)
        hostile_pt(rng, world, path, path.read_bytes())
        return case(replaced(words, pretrained, path))
    if kind < 0.75:
        place = copied(pretrained, folder / "final")
        path = rng.choice(
            sorted(p for p in place.iterdir() if p.suffix in (".json", ".safetensors"))
        )
        edit_file(rng, world, path)
        return case(replaced(words, pretrained, place))
    stage = world.made / "chat" / "pretrain"
    out = copied(stage, folder / "out")
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(f"out: {stage}", f"out: {out}"))
    (out / "report.json").unlink()
    path = rng.choice(sorted(path for path in out.rglob("*") if path.is_file()))
    if path.suffix == ".json" and rng.random() < 0.6:
        edit_json(rng, world, path)
    elif path.suffix in (".pt", ".pth"):
        hostile_pt(rng, world, path, path.read_bytes())
        _rehash(path)
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))
    return case(world.words("llava pretrain", out, "--resume"))


def _rehash(path: Path) -> None:
    """Let a checkpoint's own list of hashes hold the file's."""
    from revelio.run_dir import sha256

    listed = path.parent / "files.json"
    listed.write_text(json.dumps(json.loads(listed.read_text()) | {path.name: sha256(path)}))


def uploads(rng: Random, world: World, folder: Path) -> Case:
    """Requests that a gallery's server may get: pictures, names of files, headers."""
    picture = (world.made / "folders" / "red" / "0.png").read_bytes()
    bodies = [damaged(rng, picture), png(2_000_000, 1), png(30_000, 30_000), b"\0" * 9, picture]
    paths = [
        "/encode",
        "/encode",
        "/../../outside/precious.txt",
        "/%2e%2e/x",
        "//etc/passwd",
        "/\x01",
    ]
    hosts = ["localhost", "127.0.0.1", "evil.example", "[::1", "\x01", ""]
    asked = [
        (rng.choice(("POST", "POST", "GET", "HEAD", "PUT")), rng.choice(paths), rng.choice(hosts),
         rng.choice(bodies), rng.choice((None, "-1", "9" * 30, "1e3", "0")))
        for _ in range(6)
    ]  # fmt: skip

    gallery = copied(world.made / "served", folder / "g")
    if rng.random() < 0.5:
        edit_json(rng, world, gallery / rng.choice(("gallery.json", ".revelio-files.json")))

    def action() -> None:
        from revelio.backbones.config import BackboneConfig
        from revelio.command_line import one_line_errors
        from revelio.pipelines.serve import ServeConfig, open_server

        backbone = BackboneConfig(name=str(world.made / "sd"), image_size=32)
        ksae = str(world.made / "wide")
        with one_line_errors("serve"):
            server = open_server(
                ServeConfig(gallery=gallery, ksae=ksae, backbone=backbone, port=0, host="127.0.0.1")
            )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for method, path, host, body, length in asked:
            said = _answer(server.server_address[1], method, path, host, body, length)
            if b"precious" in said or b"root:" in said:
                open(world.outside / "precious.txt").close()  # seen as a file outside that was read
        server.server_close()

    return Case(action, f"serve {gallery} {asked!r}"[:3000])


def _answer(port: int, method: str, path: str, host: str, body: bytes, length: str | None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.putrequest(method, path.replace("\x01", "%01"), skip_host=True)
        connection.putheader("Host", host.replace("\x01", "?"))
        connection.putheader("X-Revelio", "1")
        connection.putheader("Content-Length", length or str(len(body)))
        connection.endheaders(body)
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()
