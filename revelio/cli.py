"""``revelio <command>``: the table of subcommands. Nothing heavy is imported before one is chosen.

A command is one module of :mod:`revelio.commands` with a frozen dataclass ``Config``, whose field
docstrings are the help page, and ``run(config)``.
"""

import sys
from importlib import import_module
from types import ModuleType

from revelio import door

COMMANDS = {
    "backbones": "list the known models and their layers (channels, stride)",
    "models": "list the shipped models; prepare those that come in packages",
    "extract": "images -> activation stores (several layers, timesteps, prompts in one run)",
    "plan-ksae": "what training a k-SAE would cost: memory, time, disk",
    "train-ksae": "store -> k-sparse autoencoder",
    "convert-ksae": "k-SAEs of the released form, steerers, SAELens, sparsify -> ours, and back",
    "top-images": "k-SAE + store -> the top images of every latent",
    "purity": "top images + labels -> label purity, with chance and intervals",
    "gallery": "k-SAE + store -> a folder of pages to browse the latents",
    "pca-maps": "grids -> the top three principal components as RGB pictures",
    "train-diffc": "images or stored grids -> Diff-C classifier",
    "eval-diffc": "Diff-C classifier -> accuracy, confusion",
    "demo": "all of it on the shipped model and real images",
}


def usage() -> str:
    """The help page of ``revelio`` itself."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: revelio <command> [--config FILE] [flags]\n\n"
        f"See inside diffusion models.\n\ncommands:\n{rows}\n\n"
        "`revelio <command> --help` explains a command; flags override the config file.\n"
        "`revelio --version` prints the version.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit 2 with one line on a user's mistake, 130 on Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if words[0] in ("-V", "--version"):
        from revelio import __version__

        print(f"revelio {__version__}")
        return
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        door.fail("revelio", f"unknown command {name!r}: choose from {', '.join(COMMANDS)}")
    run_module(import_module(f"revelio.commands.{name.replace('-', '_')}"), rest, name)


def run_module(module: ModuleType, arguments: list[str], name: str) -> None:
    """Run the command ``name``; see :func:`revelio.door.run_module`."""
    door.run_module(module, arguments, name="revelio", prog=f"revelio {name}")


if __name__ == "__main__":
    main()
