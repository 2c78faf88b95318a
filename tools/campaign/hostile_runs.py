"""Hostile inputs of steering, of the runs that classify, advise and reproduce, and of a judge's replies."""

import csv
import io
import os
from pathlib import Path
from random import Random

from campaign.hostile import Case, case, copied, edit_file, edit_json, replaced
from campaign.mutate import damaged, junk
from campaign.world import World


def concepts(rng: Random, world: World, folder: Path) -> Case:
    """An edited concept, used or added to another; or a mask that is no such picture."""
    place = copied(world.made / "concept", folder / "c")
    kind = rng.random()
    if kind < 0.25:
        return _masked(rng, world, folder)
    path = place / rng.choice(("concept.json", "concept.json", "concept.safetensors"))
    edit_file(rng, world, path)
    if kind < 0.5:
        words = world.words("steer", folder / "out")
        return case(replaced(words, world.made / "concept", place))
    words = ["concept", "--concepts", str(place), str(world.made / "concept")]
    return case([*words, "--out", str(folder / "out")])


def _masked(rng: Random, world: World, folder: Path) -> Case:
    path = folder / "mask.png"
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(rng.choice(("/dev/zero", "/etc", str(world.outside / "none"))))
    elif kind == 2:
        path.write_bytes(damaged(rng, (world.made / "folders" / "red" / "0.png").read_bytes()))
    else:
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 3\nshowpage\n")
    words = world.words("steer", folder / "out")
    return case([*words, "--mask", str(path)])


def prompts(rng: Random, world: World, folder: Path) -> Case:
    """A table of prompts with junk in its cells, its header or its bytes."""
    rows = [["prompt", "class", "seed", "guidance"], ["a dog", "dog", "1", "2.0"]]
    rows.append(["a cat", "cat", "2", "0.5"])
    for _ in range(rng.choice((1, 1, 2, 3))):
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = str(junk(rng, world.outside))
    if rng.random() < 0.15:
        rng.choice(rows).append("x")
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=rng.choice(",,,\t;")).writerows(rows)
    text = buffer.getvalue().encode("utf-8", "surrogatepass")
    path = folder / rng.choice(("p.csv", "p.csv", "p.tsv", "p.txt"))
    path.write_bytes(damaged(rng, text) if rng.random() < 0.2 else text)
    name = rng.choice(("extract-text", "extract-text", "steer", "steer-eval"))
    words = replaced(world.words(name, folder / "out"), world.made / "prompts.csv", path)
    return case([*words, "--limit", "3"])


def runs(rng: Random, world: World, folder: Path) -> Case:
    """A finished run with a file edited or gone, resumed or made again; or other pictures under its names."""
    name = rng.choice(("zero-shot", "advise", "reproduce"))
    clean = world.made / "clean" / name
    out = copied(clean, folder / "out")
    for config in out.rglob("config.yaml"):
        config.write_text(config.read_text().replace(str(clean), str(out)))
    kept = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".png"]
    path = rng.choice(sorted(kept))
    kind = rng.random()
    if kind < 0.2:
        path.unlink()
    elif path.suffix == ".json" and kind < 0.85:
        edit_json(rng, world, path)
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))
    words = world.words(name, out, *(() if name == "reproduce" else ("--resume",)))
    if rng.random() < 0.15:
        used, other = ("folders", "pets") if name == "zero-shot" else ("pets", "folders")
        words = replaced(words, world.made / used, world.made / other)
    return case(words)


def caches(rng: Random, world: World, folder: Path) -> Case:
    """A cache of replies that was damaged, read and added to."""
    path = copied(world.made / "replies.sqlite", folder / "c.sqlite")
    path.write_bytes(damaged(rng, path.read_bytes()))

    def action() -> None:
        from revelio.command_line import one_line_errors
        from revelio.reply_cache import Reply, open_cache

        with one_line_errors("open_cache"), open_cache(path) as cache:
            for number in range(30):
                cache.get({"number": number})
            cache.put({"number": 99}, Reply("more"))

    return Case(action, f"open_cache {path}")
