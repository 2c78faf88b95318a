"""What the cases start from: small inputs of every kind, finished results, and files of somebody else."""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2] / "tests"), str(Path(__file__).parents[2])]

from backbones_helpers import tiny_clip, tiny_dinov2
from cli_helpers import commands, run_words, write_inputs
from llava_helpers import model_config, tiny_llama
from sae_helpers import random_model

from llava_ext.checkpoint import save_model
from llava_ext.config import TowerConfig
from llava_ext.language import assemble, load_language_model, load_tokenizer
from llava_ext.model_config import TowerShape
from revelio.activations.store import ActivationStore, write_store
from revelio.cli import main
from revelio.reply_cache import Reply, open_cache
from revelio.sae.io.peers import export_saelens, export_sparsify
from revelio.sae.io.released import export_released

# A module that nobody may import: it would leave this file.
SENTINEL = """import os, pathlib
pathlib.Path(os.environ["REVELIO_SENTINEL"]).touch()
def load(*a, **k):
    pass
"""


# Finished results that cases edit.
CLEAN = ("extract", "train-ksae", "train-diffc", "eval-diffc", "top-images", "gallery", "pca-maps")
CLEAN += ("zero-shot", "advise", "reproduce")


@dataclass(frozen=True)
class World:
    """Where everything lies.

    Attributes:
        root: the campaign's folder.
        made: inputs of the commands.
        outside: somebody else's files.
        sentinel: is there once foreign code has run.
    """

    root: Path
    made: Path
    outside: Path
    sentinel: Path

    def words(self, name: str, out: Path, *more: object) -> list[str]:
        """A short call of a command."""
        return [*map(str, commands(self.made)[name](out)), *map(str, more)]


def call(words: list[str]) -> Callable[[], None]:
    """The command line with these words."""
    return lambda: run_words(words)


def build(root: Path) -> World:
    """Write all of it, and import with it whatever the commands need."""
    world = World(root, root / "made", root / "outside", root / "EXECUTED")
    os.environ["REVELIO_SENTINEL"] = str(world.sentinel)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ["HF_HOME"] = str(root / "cache" / "huggingface")
    (root / "cases").mkdir(parents=True)
    (root / "cache").mkdir()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        _write(world)
    return world


def _write(world: World) -> None:
    made = world.made
    write_inputs(made)
    shutil.copytree(made / "images", world.outside / "images")
    (world.outside / "precious.txt").write_text("precious")
    (world.outside / "shard-00000.safetensors").write_text("precious")
    for name in ("helpers.py", "modeling_evil.py"):
        (world.outside / name).write_text(SENTINEL)
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    write_store(made / "rows6", rows, [str(i) for i in range(20)])
    tiny_clip(made / "clip")
    tiny_dinov2(made / "dinov2")
    _write_llava(made / "llava")
    model = random_model()
    export_saelens(model, made / "saelens")
    export_sparsify(model, made / "sparsify")
    export_released(random_model(mode="as_code"), made / "released.pt")
    clean = made / "clean"
    for name in CLEAN:
        run_words(world.words(name, clean / name))
    run_words(world.words("purity", clean / "purity.json"))
    run_words(world.words("locality", made / "locality.json"))
    run_words(world.words("extract-text", made / "texts"))
    store = next(path.parent for path in (made / "texts").glob("*/manifest.json"))
    store.rename(made / "text")
    _write_served(made)
    with open_cache(made / "replies.sqlite") as cache:
        for number in range(20):
            cache.put({"number": number}, Reply(f"reply {number}", 1, 2))
    main(["plan-ksae", "--store", str(made / "rows")])
    # A run that was stopped after its first checkpoint.
    words = world.words("train-ksae", made / "half")
    _stop_after_checkpoint(words)
    run_words(answer_words(world, made / "llava", made / "answers.jsonl"))


def _write_served(made: Path) -> None:
    """A gallery that a server shows: of a model whose pictures it can encode."""
    sd = [
        "--backbone.name",
        made / "sd",
        "--backbone.image-size",
        32,
        "--data.source",
        made / "images",
    ]
    run_words(["extract", *sd, "--layers", "up_ft1", "--pool", "none", "--out", made / "grids-sd"])
    store = next(path.parent for path in (made / "grids-sd").glob("*/manifest.json"))
    width = ActivationStore.open(store).row_shape[0]
    random_model(d=width, n=4 * width, k=6).save_pretrained(made / "wide")
    words = ["gallery", "--store", store, "--ksae", made / "wide", "--data.source", made / "images"]
    run_words([*words, "--map-method", "pca", "--latents", 5, "--out", made / "served"])


def _stop_after_checkpoint(words: list[str]) -> None:
    from revelio.run_dir import Run

    real = Run.save_checkpoint

    def stop(self: Run, *arguments: object, **named: object) -> None:
        real(self, *arguments, **named)  # type: ignore[arg-type]
        self.close()
        raise KeyboardInterrupt

    Run.save_checkpoint = stop  # type: ignore[assignment,method-assign]
    try:
        main(words)
    except SystemExit:
        pass
    finally:
        Run.save_checkpoint = real  # type: ignore[method-assign]


def _write_llava(folder: Path) -> None:
    language = tiny_llama(folder.with_name("llama"))
    tower = TowerConfig(str(folder.with_name("clip")), "block1", budget=16)
    tokenizer = load_tokenizer(str(language))
    model = assemble(
        model_config(language, tower),
        load_language_model(str(language)),
        tokenizer,
        [TowerShape(16, (4, 4))],
    )
    save_model(model, tokenizer, folder, language="whole")


def answer_words(world: World, model: Path, out: Path) -> list[str]:
    """A short call of the bench's ``answer``."""
    words = [
        "llava-bench",
        "answer",
        "--bench",
        world.made / "bench",
        "--model",
        model,
        "--out",
        out,
    ]
    return [*map(str, words), "--max-new-tokens", "2", "--batch-size", "6"]
