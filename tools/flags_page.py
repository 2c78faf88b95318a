"""docs/flags.md: every flag of every command with its help, made from the configs that declare them."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional

from revelio.cli import COMMANDS, GROUPS, find_module
from revelio.config import renamed

HEAD = """# Flags

Made by `python -m tools.render_docs` from the configs; not to be edited. A flag means one thing wherever it
appears, and the same thing is called the same; a word in capitals is given by its place. Every flag is a key
of `--config FILE` (YAML), too: `--sae.batch-size 9` is `sae: {batch_size: 9}`.
"""

# Flags that several commands explain in their own words: the one idea behind each.
IDEAS = {
    "ACTION": "what the command does to what it lists",
    "NAME": "one entry of the command's list",
    "--bench": "the folder of a benchmark's questions; commands need other files of it",
    "--batch-size": "how many go through a model or a training step at a time",
    "--bootstrap": "resamples for intervals",
    "--cache": "what the towers of a LLaVA made of the pictures",
    "--clip": "the CLIP that classifies without training",
    "--codes": "which of a k-SAE's outputs count as its codes",
    "--confidence": "of all intervals",
    "--device": "where the command's model runs",
    "--dtype": "the number format that a model runs in",
    "--epochs": "passes over the training data",
    "--image": "a picture",
    "--judge": "who judges pictures or answers",
    "--k": "latents that stay active",
    "--ksae": "the k-SAE, or one each layer",
    "--latent-values": "latents, each with a number: how much of a concept it is, or what it is set to",
    "--latents": "how many latents, the strongest first",
    "--layer": "the one layer of a model that is read or edited",
    "--layers": "the layers of a model that are read",
    "--learning-rate": "of the optimizer",
    "--limit": "only the first so many of what is read",
    "--m": "top images of a latent",
    "--max-tokens": "the longest reply",
    "--mode": "`fixed`, `as_paper` or `as_code`, wherever the paper and its released code differ",
    "--others": "further models beside `backbone`",
    "--out": "where the result goes",
    "--over": "what an image's code is taken over",
    "--plan": "say what it would cost, and end",
    "--prompts": "prompt policies: which text an image gets",
    "--question": "what a LLaVA is asked",
    "--random-weights": "the baseline of a model that was not trained",
    "--reply-cache": "the file of an endpoint's replies",
    "--resume": "go on with what is begun in the same place",
    "--seed": "of whatever the command draws at random",
    "--seeds": "trainings, from `seed` on",
    "--side": "of a picture on a sheet",
    "--steps": "of the command's loop: updates of a training, steps of a drawing",
    "--store": "the activations that the command is about",
    "--store-dtype": "the number format of stored activations",
    "--strength": "multiples of an edit",
    "--temperature": "of a language model's answers",
    "--test-store": "the activations that a classifier is tested on",
    "--texts": "texts themselves, on the command line",
    "--timesteps": "training timesteps at which a model with noise is read",
    "--top": "what `revelio top-images` wrote",
    "--weights": "of several concepts or texts, 1 each where not said",
    "--width": "of Diff-C's convolutions",
    "--workers": "processes or threads that read ahead",
}


@dataclass(frozen=True)
class Flag:
    """One flag of one command.

    Attributes:
        name: with its dashes; in capitals what is given by its place.
        command: whose it is.
        kind: what it takes: path, number, text or switch.
        help: its help text, on one line.
    """

    name: str
    command: str
    kind: str
    help: str


def all_commands() -> Iterator[tuple[str, type]]:
    """Every command of the wheel with its config."""
    for name in COMMANDS:
        yield name, find_module(name).Config
    for group, package in GROUPS.items():
        module = import_module(package)
        for name in module.COMMANDS:
            yield f"{group} {name}", module.find_module(name).Config


def flags_of(command: str, cls: type, above: str = "") -> Iterator[Flag]:
    """The flags of a config and of those inside it."""
    hints, helps = get_type_hints(cls), _helps(cls)
    marks = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        kind = hints[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from flags_of(command, kind, f"{above}{field.name}.")
        else:
            name = f"--{above}{field.name}".replace("_", "-")
            if Positional in getattr(marks[field.name], "__metadata__", ()):
                name = field.name.upper()
            yield Flag(name, command, kind_of(kind), helps.get(field.name, ""))


def kind_of(hint: Any) -> str:
    """What a flag of this type takes; a number or a word (`auto`) is a number."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "text"
    if origin is not None:
        kinds = {kind_of(one) for one in (inside[:1] if origin is Annotated else inside)}
        return next(kind for kind in ("path", "number", "text", "switch", "") if kind in kinds)
    plain = {bool: "switch", int: "number", float: "number", str: "text", Path: "path"}
    return plain.get(hint, "")


def _helps(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those it inherits, or in its docstring's list."""
    found: dict[str, str] = {}
    for base in (one for one in reversed(cls.__mro__) if is_dataclass(one)):
        listed = re.findall(
            r"^    (\w+): (.*(?:\n      .*)*)", inspect.getdoc(base) or "", re.MULTILINE
        )
        found |= {name: " ".join(text.split()) for name, text in listed}
        (made,) = ast.parse(dedent(inspect.getsource(base))).body
        assert isinstance(made, ast.ClassDef)
        for field, text in pairwise(made.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def flags_page() -> str:
    """The page."""
    flags = [flag for name, cls in all_commands() for flag in flags_of(name, cls)]
    meanings: dict[tuple[str, str], list[str]] = {}
    for flag in flags:
        meanings.setdefault((flag.name, flag.help), []).append(flag.command)
    rows = [
        f"| `{name}` | {text.replace('|', chr(92) + '|')} | {', '.join(commands)} |"
        for (name, text), commands in sorted(meanings.items())
    ]
    old = [
        f"| {name} | `--{before}` | `--{now}` |"
        for name, cls in all_commands()
        for before, now in renamed(cls).items()
    ]
    table = ["| flag | what it is | commands |", "|---|---|---|", *rows]
    ideas = [f"| `{name}` | {idea} |" for name, idea in IDEAS.items()]
    ideas = ["| flag | the idea |", "|---|---|", *ideas]
    names = ["| command | before | now |", "|---|---|---|", *old]
    parts = [
        "\n".join(table),
        "## One idea, said in several ways",
        "Flags whose help texts differ from command to command, and what they have in common.",
        "\n".join(ideas),
        "## Old names",
        "Refused by a line with the new one.",
        "\n".join(names),
    ]
    text = "\n\n".join(parts)
    return f"{HEAD}\n{text}\n"
