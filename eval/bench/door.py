"""From the words of a command line to a command's config, and from its errors to one line."""

import os
import sys
from types import ModuleType
from typing import Any


def enter(module: ModuleType, arguments: list[str], name: str) -> None:
    """Parse ``arguments`` into ``module.Config`` and run it.

    Raises:
        SystemExit: status 2 on a user's mistake, 130 on Ctrl-C.
    """
    try:
        module.run(parse(module, arguments, name))
    except KeyboardInterrupt:
        print("\nllava_bench: stopped; nothing is lost, a re-run continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone; python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, KeyError, OSError) as error:
        if os.environ.get("REVELIO_DEBUG"):
            raise
        # str() of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"llava_bench: {' '.join(str(message).split())}", file=sys.stderr)
        sys.exit(2)


def parse(module: ModuleType, arguments: list[str], name: str) -> Any:
    """The command's config: its defaults, then ``--config FILE``, then flags.

    Raises:
        ValueError: the config file is wrong.
        SystemExit: after printing help, or after a wrong flag (status 2).
    """
    import tyro

    path, rest = _take_config(arguments)
    return tyro.cli(
        module.Config,
        args=rest,
        default=tyro.MISSING_NONPROP if path is None else _from_file(module, path),
        prog=f"llava_bench.py {name}",
        description=f"{module.__doc__}\n--config FILE fills any of these from a YAML file first.",
    )


def _from_file(module: ModuleType, path: str) -> Any:
    from pathlib import Path

    import tyro

    from revelio.config import read_yaml, structure

    try:
        return structure(module.Config, read_yaml(Path(path)), missing=tyro.MISSING)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split ``--config FILE`` or ``--config=FILE`` off."""
    path, rest, left = None, [], list(arguments)
    while left:
        word = left.pop(0)
        if word == "--config":
            if not left:
                raise ValueError("--config needs a file")
            path = left.pop(0)
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        else:
            rest.append(word)
    return path, rest
