"""``revelio <command>``: the table of subcommands. Nothing heavy is imported before one is chosen.

A command is one module of :mod:`revelio.commands` with a frozen dataclass ``Config``, whose field
docstrings are the help page, and ``run(config)``.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

COMMANDS = {
    "backbones": "list the known models and their layers (channels, stride)",
    "models": "list the shipped models; prepare those that come in packages",
    "extract": "images -> activation stores (several layers, timesteps, prompts in one run)",
    "plan-ksae": "what training a k-SAE would cost: memory, time, disk",
    "train-ksae": "store -> k-sparse autoencoder",
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


def parse(module: ModuleType, arguments: list[str], name: str) -> Any:
    """The command's config: its defaults, then ``--config FILE``, then flags.

    Raises:
        ValueError: the config file is wrong.
        SystemExit: after printing help, or after a wrong flag (status 2).
    """
    import tyro

    from revelio.config import read_yaml, structure

    path, rest = _take_config(arguments)
    if path is None:
        default = tyro.MISSING_NONPROP
    else:
        try:
            default = structure(module.Config, read_yaml(path), missing=tyro.MISSING)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return tyro.cli(
        module.Config,
        args=rest,
        default=default,
        prog=f"revelio {name}",
        description=f"{module.__doc__}\n--config FILE fills any of these from a YAML file first.",
    )


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Split ``--config FILE`` off; drop the ``--local_rank=N`` that launchers put first."""
    path, rest, left = None, [], list(arguments)
    while left:
        word = left.pop(0)
        if word == "--config":
            if not left:
                raise ValueError("--config needs a file")
            path = Path(left.pop(0))
        elif word.startswith("--config="):
            path = Path(word.removeprefix("--config="))
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            rest.append(word)
    return path, rest


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
        _fail(f"unknown command {name!r}: choose from {', '.join(COMMANDS)}")
    run_module(import_module(f"revelio.commands.{name.replace('-', '_')}"), rest, name)


def run_module(module: ModuleType, arguments: list[str], name: str) -> None:
    """Parse ``arguments`` into ``module.Config`` and run it, with errors as one line.

    Raises:
        SystemExit: status 2 on a user's mistake, 130 on Ctrl-C.
    """
    # Advice that transformers gives about packages Revelio does without.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        module.run(parse(module, arguments, name))
    except KeyboardInterrupt:
        print("\nrevelio: stopped; what was written is whole, --resume continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone; python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, KeyError, OSError) as error:
        if os.environ.get("REVELIO_DEBUG"):
            raise
        # str() of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        _fail(str(message))


def _fail(message: str) -> None:
    print(f"revelio: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
