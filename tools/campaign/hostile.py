"""Hostile inputs for the real command line: stores, runs, results, k-SAEs, classifiers, models.

Each kind writes one input into a case's folder and gives the words to run, with the clean result that a
case which ends well must equal in its tensors.
"""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from campaign.mutate import damaged, edited, json_text, tensors_file
from campaign.world import SENTINEL, World, answer_words, call
from safetensors.torch import load_file, save_file
from test_sae_unpickle import BOMBS, archive


@dataclass(frozen=True)
class Case:
    """What to run, and what it must give if it runs.

    Attributes:
        action: the command line.
        shown: its words, for the report.
        same: (result, clean result): where the case ends well, tensors and pictures are equal.
    """

    action: Callable[[], object]
    shown: str
    same: tuple[Path, Path] | None = None


MODEL_FILES = (".json", ".safetensors", ".jinja")
# Chat templates are programs, in a sandbox of transformers' own.
TEMPLATES = (
    b"{{ 1 / 0 }}",
    b"{% for m in messages %}{{ m['content'] }}",
    b"{{ ().__class__.__base__.__subclasses__() }}",
    b"{{ cycler.__init__.__globals__.os.system('true') }}",
    b"{% include '/etc/passwd' %}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    b"{{ raise_exception('\x1b[2J') }}",
    b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    b"{{ 'a' * 10000000000 }}",
    b"{{ 'a' * 300000000 }}",
)
STORES = ("store", "rows", "grids", "whole", "text")
Kind = Callable[[Random, World, Path], Case]


def case(words: list[str], same: tuple[Path, Path] | None = None) -> Case:
    """A case of the command line."""
    return Case(call(words), " ".join(words), same)


def copied(source: Path, target: Path) -> Path:
    """A copy that may be damaged."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


def edit_json(rng: Random, world: World, path: Path) -> None:
    """Edit a JSON file in place."""
    path.write_bytes(json_text(rng, json.loads(path.read_text()), world.outside))


def edit_file(rng: Random, world: World, path: Path) -> None:
    """Edit a JSON file, or one of tensors, in place."""
    if path.suffix == ".json":
        edit_json(rng, world, path)
    else:
        path.write_bytes(tensors_file(rng, path.read_bytes(), world.outside))


def replaced(words: list[str], old: Path, new: Path) -> list[str]:
    """The words with one path for another."""
    return [str(new) if word == str(old) else word for word in words]


def reader(rng: Random, world: World, store: str, place: Path, folder: Path) -> Case:
    """A command that reads the store at ``place`` in the stead of ``store``, drawn at random."""
    names = {
        "store": ("top-images", "gallery"),
        "rows": ("train-ksae", "plan-ksae"),
        "grids": ("train-diffc", "eval-diffc", "probe"),
        "whole": ("locality",),
        "text": ("train-ksae",),
    }
    name, out = rng.choice(names[store]), folder / "out"
    if name == "plan-ksae":
        return case(["plan-ksae", "--store", str(place)])
    used = "rows" if store == "text" else store
    words = replaced(world.words(name, out), world.made / used, place)
    if store == "text":  # of a text encoder's tokens, a row each
        return case([*words, "--rows", "cells"])
    return case(words, (out, world.made / "clean" / name))


def manifests(rng: Random, world: World, folder: Path) -> Case:
    """A store whose manifest was edited, read or resumed."""
    if rng.random() < 0.3:
        return extractions(rng, world, folder)
    store = rng.choice(STORES)
    place = copied(world.made / store, folder / "s")
    edit_json(rng, world, place / "manifest.json")
    return reader(rng, world, store, place, folder)


def extractions(rng: Random, world: World, folder: Path) -> Case:
    """A finished or half extraction, its files edited, resumed."""
    clean = world.made / "clean" / "extract"
    out = copied(clean, folder / "out")
    store = next(path for path in out.iterdir() if path.is_dir())
    if rng.random() < 0.3:
        (store / "manifest.json").unlink()
        shard = store / "shard-00000.safetensors"
        shard.write_bytes(tensors_file(rng, shard.read_bytes(), world.outside))
    elif rng.random() < 0.2:
        (store / "shard-00000.safetensors").unlink()
        (store / "shard-00000.safetensors").symlink_to(world.outside / "shard-00000.safetensors")
    else:
        edit_json(rng, world, store / "manifest.json")
    return case(world.words("extract", out, "--resume"), (out, clean))


def shards(rng: Random, world: World, folder: Path) -> Case:
    """A store with a damaged shard; half of them with the hash of the damage in the manifest."""
    store = rng.choice(STORES)
    place = copied(world.made / store, folder / "s")
    shard = place / "shard-00000.safetensors"
    shard.write_bytes(tensors_file(rng, shard.read_bytes(), world.outside))
    rehashed = rng.random() < 0.5
    if rehashed:
        manifest = json.loads((place / "manifest.json").read_text())
        entry = manifest["shards"][0]
        entry["bytes"] = shard.stat().st_size
        entry["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
        (place / "manifest.json").write_text(json.dumps(manifest))
    found = reader(rng, world, store, place, folder)
    return Case(found.action, found.shown, None if rehashed else found.same)


def runs(rng: Random, world: World, folder: Path) -> Case:
    """A run folder, stopped or finished, with one file edited, resumed."""
    source, name = rng.choice(
        ((world.made / "half", "train-ksae"), (world.made / "clean" / "train-diffc", "train-diffc"))
    )
    out = copied(source, folder / "out")
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(f"out: {source}", f"out: {out}"))
    path = rng.choice(
        sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".png")
    )
    kind = rng.random()
    if kind < 0.15:
        path.unlink()
    elif path.suffix == ".json" and kind < 0.7:
        edit_json(rng, world, path)
    elif path.suffix == ".safetensors" and kind < 0.7:
        path.write_bytes(tensors_file(rng, path.read_bytes(), world.outside))
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))
    # A finished run's own files are the user's to edit: only a run that goes on must be the same.
    same = (out, world.made / "clean" / name) if name == "train-ksae" else None
    return case(world.words(name, out, "--resume"), same)


def results(rng: Random, world: World, folder: Path) -> Case:
    """Top images, galleries and records of outputs that were edited, used or written over."""
    kind = rng.randrange(3)
    if kind == 0:
        top = copied(world.made / "top", folder / "top")
        path = top / rng.choice(("top_images.json", "top_images.safetensors"))
        edit_file(rng, world, path)
        name = rng.choice(("purity", "gallery"))
        return case(replaced(world.words(name, folder / "out"), world.made / "top", top))
    if kind == 1:
        path = copied(world.made / "reviews.jsonl", folder / "reviews.jsonl")
        lines = path.read_text().splitlines()
        lines[0] = json_text(rng, json.loads(lines[0]), world.outside).decode(errors="replace")
        path.write_text("\n".join(lines))
        words = world.words("llava-bench score", folder / "out.json")
        return case(replaced(words, world.made / "reviews.jsonl", path))
    name = rng.choice(("top-images", "gallery", "pca-maps", "eval-diffc"))
    out = copied(world.made / "clean" / name, folder / "out")
    record = out / ".revelio-files.json"
    value = json.loads(record.read_text())
    names = value["files"][name]
    names.append(
        rng.choice(("../../outside/precious.txt", str(world.outside / "precious.txt"), "..", ""))
    )
    if rng.random() < 0.7:
        record.write_bytes(json_text(rng, value, world.outside))
    else:
        record.write_text(json.dumps(value))
    if rng.random() < 0.2:
        victim = next(path for path in sorted(out.iterdir()) if path.is_file())
        victim.unlink()
        victim.symlink_to(world.outside / "precious.txt")
    return case(world.words(name, out))


def ksaes(rng: Random, world: World, folder: Path) -> Case:
    """A k-SAE folder of ours that was edited."""
    place = copied(world.made / "ksae", folder / "k")
    kind = rng.random()
    tensors = load_file(place / "model.safetensors")
    name = rng.choice(sorted(tensors))
    path = place / "model.safetensors"
    if kind < 0.4:
        edit_json(rng, world, place / "config.json")
    elif kind < 0.7:
        path.write_bytes(tensors_file(rng, path.read_bytes(), world.outside))
    else:
        change = rng.randrange(5)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors["extra"] = torch.zeros(2)
        elif change == 2:
            tensors[name].view(-1)[0] = rng.choice((float("nan"), float("inf")))
        elif change == 3:
            tensors[name] = tensors[name][:1].clone()
        else:
            tensors = {f"module.{key}": value for key, value in tensors.items()}
        save_file(tensors, path)
    words = replaced(world.words("top-images", folder / "out"), world.made / "ksae", place)
    return case(words)


class Touch:
    """Unpickled by Python, it runs a program and leaves the sentinel."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        """Open the sentinel's file."""
        return (exec, (f"import os; os.system('true'); open({str(self.path)!r}, 'w').close()",))


def hostile_pt(rng: Random, world: World, path: Path, honest: bytes) -> None:
    """A ``.pt`` file: a pickle that runs something, a bomb, or an honest one damaged."""
    kind = rng.random()
    if kind < 0.3:
        buffer = io.BytesIO()
        how = {
            "_use_new_zipfile_serialization": rng.random() < 0.7,
            "pickle_protocol": rng.randrange(2, 6),
        }
        torch.save(
            {"state_dict": {"a": torch.ones(2)}, "cfg": Touch(world.sentinel)}, buffer, **how
        )
        path.write_bytes(buffer.getvalue())
    elif kind < 0.4:
        path.write_bytes(pickle.dumps(Touch(world.sentinel), rng.randrange(6)))
    elif kind < 0.75:
        program = BOMBS[rng.choice(sorted(BOMBS))]
        archive(path, b"\x80\x02" + program + rng.choice((b".", b"0.", b"")))
    else:
        path.write_bytes(damaged(rng, honest))


def foreign_ksaes(rng: Random, world: World, folder: Path) -> Case:
    """k-SAEs of other projects, for :func:`revelio.sae.io.released.import_ksae`."""
    kind = rng.choice(("released.pt", "saelens", "sparsify"))
    place = copied(world.made / kind, folder / kind)
    if kind == "released.pt":
        hostile_pt(rng, world, place, place.read_bytes())
    else:
        path = rng.choice(sorted(place.iterdir()))
        edit_file(rng, world, path)

    def action() -> None:
        from revelio.command_line import one_line_errors
        from revelio.sae.io.released import import_ksae

        with one_line_errors("import_ksae"):
            import_ksae(place)

    return Case(action, f"import_ksae {place}")


def classifiers(rng: Random, world: World, folder: Path) -> Case:
    """A Diff-C folder that was edited, or that asks for a module of the working folder."""
    plant(folder)
    place = copied(world.made / "diffc", folder / "d")
    path = place / "config.json"
    if rng.random() < 0.35:
        config = json.loads(path.read_text())
        grids = {"backbone": "helpers:load", "layer": "mix", "timestep": 25}
        grids["backbone"] = rng.choice(
            ("helpers:load", "helpers", "modeling_evil:load", "./helpers.py:load")
        )
        config["grids"] = grids if rng.random() < 0.7 else edited(rng, grids, world.outside)
        path.write_text(json.dumps(config))
    elif rng.random() < 0.6:
        edit_json(rng, world, path)
    else:
        weights = place / "model.safetensors"
        weights.write_bytes(tensors_file(rng, weights.read_bytes(), world.outside))
    words = ["eval-diffc", "--diffc", str(place), "--out", str(folder / "out")]
    if rng.random() < 0.5:
        return case([*words, "--store", str(world.made / "grids")])
    return case([*words, "--data.source", str(world.made / "folders"), "--data.split", "train"])


def plant(folder: Path) -> None:
    """Modules in the working folder that nobody may import."""
    for name in ("helpers.py", "modeling_evil.py", "pipeline.py"):
        (folder / name).write_text(SENTINEL)


def llavas(rng: Random, world: World, folder: Path) -> Case:
    """A saved LLaVA model with one file edited, its towers or classes those of the working folder."""
    plant(folder)
    place = copied(world.made / "llava", folder / "m")
    for name in ("helpers.py", "modeling_evil.py"):
        (place / name).write_text(SENTINEL)
    files = sorted(path for path in place.rglob("*") if path.suffix in MODEL_FILES)
    if rng.random() < 0.3:
        _ask_for_code(rng, rng.choice([path for path in files if path.suffix == ".json"]))
    else:
        edit_model_file(rng, world, rng.choice(files))
    return case(answer_words(world, place, folder / "out.jsonl"))


def _ask_for_code(rng: Random, path: Path) -> None:
    """Let a config ask for a class, a tower or a backbone of a module beside it."""
    value = json.loads(path.read_text())
    target = rng.choice(("modeling_evil.load", "helpers--modeling_evil.load", "helpers:load"))
    if isinstance(value, dict):
        value["auto_map"] = {
            "AutoModelForCausalLM": target,
            "AutoConfig": target,
            "AutoTokenizer": [target, target],
        }
        value["trust_remote_code"] = True
        if "towers" in value:
            value["towers"][0]["backbone"] = "helpers:load"
            value["towers"][0]["name"] = "helpers:load"
        if "_class_name" in value:
            value["_class_name"] = ["helpers", "load"]
    path.write_text(json.dumps(value))


def edit_model_file(rng: Random, world: World, path: Path) -> None:
    """Edit a config, or the weights; some are swapped for a hostile pickle."""
    if path.suffix == ".json":
        edit_json(rng, world, path)
    elif path.suffix == ".jinja":
        path.write_bytes(rng.choice((damaged(rng, path.read_bytes()), *TEMPLATES)))
    elif rng.random() < 0.6:
        path.write_bytes(tensors_file(rng, path.read_bytes(), world.outside))
    else:
        path.unlink()
        names = {
            "model": "pytorch_model.bin",
            "diffusion_pytorch_model": "diffusion_pytorch_model.bin",
        }
        hostile_pt(
            rng, world, path.with_name(names.get(path.stem, f"{path.stem}.bin")), b"PK" * 200
        )


def models(rng: Random, world: World, folder: Path) -> Case:
    """A backbone's folder (Stable Diffusion, CLIP, DINOv2) with one file edited."""
    plant(folder)
    name, layer, timesteps = rng.choice(
        (("sd", "bottleneck", ["25"]), ("clip", "block1", []), ("dinov2", "block1", []))
    )
    place = copied(world.made / name, folder / "m")
    for module in ("helpers.py", "modeling_evil.py", "pipeline.py"):
        (place / module).write_text(SENTINEL)
    files = sorted(path for path in place.rglob("*") if path.suffix in (".json", ".safetensors"))
    path = rng.choice(files)
    if path.suffix == ".json" and rng.random() < 0.35:
        _ask_for_code(rng, path)
    else:
        edit_model_file(rng, world, path)
    words = ["extract", "--backbone.name", str(place), "--data.source", str(world.made / "images")]
    words += ["--data.limit", "2", "--layers", layer, "--out", str(folder / "out")]
    return case([*words, "--timesteps", *timesteps])
