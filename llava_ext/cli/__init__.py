"""``revelio llava <command>``: the table of subcommands; the scripts of the same names come in here, too."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from llava_ext.cli.command import run_module
from revelio.command_line import choose

SUMMARY = "a language model that sees through a backbone's layers: cache, train, chat"
COMMANDS = {
    "cache": "images -> the frozen towers' grids, so that training runs no vision tower",
    "pretrain": "stage 1: images and captions -> projectors",
    "finetune": "stage 2: projectors and conversations -> a model to chat with",
    "chat": "a finished model + a picture -> answers",
    "export": "a finished model -> its adapter folded in, or the names that LLaVA or transformers read",
    "tokens": "a finished model + conversations -> its inner tokens as a store, to train a k-SAE on",
    "explain": "a finished model + a picture + k-SAEs -> a page of the latents that carried the answer",
    "show": "print a training sample with the learnt tokens marked",
}


def find_module(name: str) -> ModuleType:
    """The module of a command: its docstring is the help page, its ``Config`` the flags."""
    return import_module(f"llava_ext.cli.{name}")


def main(arguments: list[str] | None = None, prog: str = "revelio llava") -> None:
    """Run one command; exit 2 with one line on a user's mistake, 130 on Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    if name := choose(words, COMMANDS, prog, SUMMARY):
        run_module(find_module(name), words[1:], name="revelio", prog=f"{prog} {name}")


def run_script(name: str) -> None:
    """Run a command as a script of its own, with the words that follow the script's name."""
    script = Path(sys.argv[0]).name
    run_module(find_module(name), sys.argv[1:], name=script, prog=script)
