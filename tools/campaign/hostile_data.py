"""Hostile data sets, config files and flags for the real command line."""

import json
import os
import struct
import zlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from campaign.hostile import Case, case, copied, plant
from campaign.mutate import damaged, edited, junk
from campaign.world import World
from cli_helpers import WRITERS, module_of
from test_data_trust import NASTY
from test_inputs_flags import BOMBS


def extract_words(world: World, source: Path, folder: Path, rng: Random) -> list[str]:
    """An extraction of a small CLIP from these pictures."""
    words = ["extract", "--backbone.name", str(world.made / "clip"), "--layers", "block1"]
    words += ["--data.source", str(source), "--out", str(folder / "out"), "--timesteps"]
    return [*words, "--data.on-error", "skip"] if rng.random() < 0.5 else words


def pictures(rng: Random, world: World, folder: Path) -> Case:
    """A folder of pictures with pipes, devices, links, names of any bytes, and pictures out of proportion."""
    root = copied(world.made / "folders", folder / "set")
    for _ in range(rng.choice((1, 1, 2))):
        spoil(rng, world, root)
    return case(extract_words(world, root, folder, rng))


def spoil(rng: Random, world: World, root: Path) -> None:
    """Put one hostile thing into a folder of class folders."""
    inner = rng.choice(
        sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    )
    honest = (world.made / "folders" / "red" / "0.png").read_bytes()
    kind = rng.randrange(12)
    place = inner / f"x{rng.randrange(1000)}.png"
    if kind == 0:
        os.mkfifo(place)
    elif kind == 1:
        place.symlink_to(rng.choice(("/dev/zero", "/dev/stdin", "/proc/self/mem")))
    elif kind == 2:
        # Links to pictures elsewhere are the user's own; this one is of no picture.
        place.symlink_to(root.parent / "helpers.txt")
    elif kind == 3:
        link = inner / "up"
        if not link.is_symlink():
            link.symlink_to(root)
    elif kind == 4:
        name = os.fsencode(inner) + b"/" + rng.choice(NASTY)
        with open(name, "wb") as file:
            file.write(honest)
    elif kind in (5, 6):
        sides = [1, 2, 2_000_000, 30_000, 2**31 - 1, 0, 65_535]
        place.write_bytes(png(rng.choice(sides), rng.choice(sides)))
    elif kind == 7:
        (inner / "x").mkdir(exist_ok=True)
        (inner / "x" / "y.png").write_bytes(honest)
    elif kind == 8:
        place.with_suffix(
            rng.choice((".jpg", ".tif", ".gif", ".webp", ".svg", ".bmp"))
        ).write_bytes(honest)
    elif kind == 9:
        place.mkdir(exist_ok=True)
    elif kind == 10:
        write_parquet(rng, world, root / "train.parquet")
    else:
        place.write_bytes(damaged(rng, honest))


def png(width: int, height: int) -> bytes:
    """A PNG that says it has these sides, with a few lines of one grey."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes((1 + min(width, 10**6) // 8) * min(height, 64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def parquets(rng: Random, world: World, folder: Path) -> Case:
    """A parquet file whose rows name files, whose labels are no classes, whose schema lies."""
    plant(folder)
    path = folder / "set.parquet"
    write_parquet(rng, world, path)
    if rng.random() < 0.25:
        path.write_bytes(damaged(rng, path.read_bytes()))
    return case(extract_words(world, path, folder, rng))


def foreign_picture(rng: Random, world: World) -> Path:
    """A picture that no data set of a case may read."""
    return rng.choice(sorted((world.outside / "images").rglob("*.png")))


def write_parquet(rng: Random, world: World, path: Path) -> None:
    """Rows of which some are honest."""
    honest = (world.made / "folders" / "red" / "0.png").read_bytes()
    foreign = foreign_picture(rng, world)
    images: list[Any] = [{"bytes": honest, "path": f"{i}.png"} for i in range(3)]
    names = [
        str(foreign),
        f"../../outside/{foreign.relative_to(world.outside)}",
        "/dev/zero",
        "\0",
        "http://x.invalid/a.png",
    ]
    kind = rng.randrange(5)
    if kind == 0:
        images[1] = {"bytes": None, "path": rng.choice(names)}
    elif kind == 1:
        images[1] = {"bytes": damaged(rng, honest), "path": rng.choice(names)}
    elif kind == 2:
        images[1] = {"bytes": png(2_000_000, 1), "path": None}
    elif kind == 3:
        images[1] = None
    labels = rng.choice(
        (
            [0, 1, 2],
            [0, -1, 5],
            [None, 0, 1],
            ["a", "b", "c"],
            [0.5, 1.0, 2.0],
            [2**40, 0, 1],
            [[0], [1], [2]],
        )
    )
    column = rng.choice(
        ("label", "label", "label", "image.path", "labels", "fine_label", "\x1b[2J")
    )
    table = pyarrow.table({"image": pyarrow.array(images), column: pyarrow.array(labels)})
    if rng.random() < 0.6:
        features = {
            "image": {"_type": "Image"},
            column: {"_type": "ClassLabel", "names": ["a", "b", "c"]},
        }
        about = json.dumps({"info": {"features": edited(rng, features, world.outside)}})
        table = table.replace_schema_metadata({"huggingface": about})
    pyarrow.parquet.write_table(table, path)


def datasets_on_disk(rng: Random, world: World, folder: Path) -> Case:
    """A folder as ``Dataset.save_to_disk`` leaves it, edited; scripts lie beside it."""
    from datasets import Dataset, Features, Image, Value, disable_progress_bars

    plant(folder)
    place = folder / "set"
    rows = {"image": [{"bytes": png(8, 8), "path": None}] * 3, "label": [0, 1, 0]}
    features = Features({"image": Image(), "label": Value("int64")})
    disable_progress_bars()
    Dataset.from_dict(rows, features=features).save_to_disk(str(place))
    (place / "set.py").write_text((folder / "helpers.py").read_text())
    path = rng.choice(sorted(path for path in place.iterdir() if path.is_file()))
    if path.name == "state.json" and rng.random() < 0.5:
        value = json.loads(path.read_text())
        value["_data_files"] = [{"filename": "../../../outside/precious.txt"}]
        path.write_text(json.dumps(value))
    elif path.suffix == ".json":
        path.write_text(json.dumps(edited(rng, json.loads(path.read_text()), world.outside)))
    elif path.suffix == ".arrow":
        path.write_bytes(damaged(rng, path.read_bytes()))
    return case(extract_words(world, place, folder, rng))


def lists(rng: Random, world: World, folder: Path) -> Case:
    """A known data set's local copy: its lists damaged, or naming pictures elsewhere."""
    root = folder / "set"
    honest = (world.made / "folders" / "red" / "0.png").read_bytes()
    lines, foreign = [], foreign_picture(rng, world)
    for name in ("accordion", "airplanes", "anchor"):
        (root / "images" / name).mkdir(parents=True)
        (root / "images" / name / "image_0001.jpg").write_bytes(honest)
        lines.append(f"images/{name}/image_0001.jpg {len(lines)}")
    for name in ("train.txt", "test.txt"):
        kind = rng.randrange(5)
        lines[1] = rng.choice(
            (
                f"../../outside/{foreign.relative_to(world.outside)} 1",
                f"{foreign} 1",
                "images/airplanes/image_0001.jpg " + str(junk(rng, world.outside)),
                "\x1b[2J",
                "images/airplanes/image_0001.jpg 1",
            )
        )
        text = "\n".join(lines).encode("utf-8", "replace")
        (root / name).write_bytes(
            (text, b"\xef\xbb\xbf" + text, damaged(rng, text), text, text)[kind]
        )
    words = extract_words(world, Path("caltech101"), folder, rng)
    return case([*words, "--data.root", str(root)])


WRONG = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1.5",
    "",
    "x",
    "1e400",
    str(10**30),
    str(-(10**30)),
    "\0",
    "é🐈",
]
WRONG += [
    "../../outside",
    "helpers:load",
    "[1]",
    "None",
    "true",
    "-",
    "--",
    "\x1b[2J",
    "a" * 5000,
    "/dev/null",
]


def flags_of(config: Any, above: str = "") -> list[str]:
    """Every flag of a config class."""
    found = []
    for one in fields(config):
        inner = one.default_factory() if callable(one.default_factory) else None  # type: ignore[misc]
        if is_dataclass(inner):
            found += flags_of(inner, f"{above}{one.name}.")
        else:
            found.append(f"--{above}{one.name}".replace("_", "-"))
    return found


OWN = ("--out", "--cache", "--vae-cache", "--device", "--base-url")
# Commands with a short call in the table of writers, but the longest.
SHORT = sorted(set(WRITERS) - {"demo"})


def base_words(rng: Random, world: World, folder: Path) -> tuple[str, list[str]]:
    """A command drawn at random with a short call of it."""
    name = rng.choice(["backbones", "plan-ksae", *SHORT])
    if name == "backbones":
        return name, [name]
    if name == "plan-ksae":
        return name, [name, "--store", str(world.made / "rows")]
    return name, world.words(name, folder / "out")


def flags(rng: Random, world: World, folder: Path) -> Case:
    """One to three wrong values for flags of a command, or flags that it has not."""
    plant(folder)
    name, words = base_words(rng, world, folder)
    # Where it writes stays inside the case; what an honest large number asks for is done.
    known = [flag for flag in flags_of(module_of(name).Config) if flag not in OWN] or ["--x"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        flag = rng.choice(known) if rng.random() < 0.93 else f"--{junk(rng, world.outside)}"
        value = rng.choice(WRONG)
        words += [f"{flag}={value}"] if rng.random() < 0.7 else [flag, value]
    return case([word.replace("\0", "\\0") if rng.random() < 0.5 else word for word in words])


def configs(rng: Random, world: World, folder: Path) -> Case:
    """A YAML or JSON file for ``--config``: a bomb, a tag, an edited config, damaged text."""
    plant(folder)
    name, words = base_words(rng, world, folder)
    path = folder / "hostile.yaml"
    kind = rng.random()
    small = {"seed": 3, "batch_size": 4, "data": {"limit": 2}, "backbone": {"name": "helpers:loat"}}
    if kind < 0.3:
        text = BOMBS[rng.choice(sorted(BOMBS))].encode("utf-8", "surrogateescape")
    elif kind < 0.45:
        tag = rng.choice(("os.system", "helpers.load", "builtins.exec", "subprocess.call"))
        form = rng.choice(("object/apply", "object/new", "name", "module", "object"))
        text = f"seed: !!python/{form}:{tag} ['touch {world.sentinel}']\n".encode()
    elif kind < 0.8:
        value = edited(rng, small, world.outside)
        text = (json.dumps(value) if rng.random() < 0.5 else yaml.safe_dump(value)).encode()
    else:
        text = damaged(rng, yaml.safe_dump(small).encode())
    path.write_bytes(text)
    first = len(name.split())
    return case([*words[:first], f"--config={path}", *words[first:]])
