"""What every command line shares: words to a config, errors to one line.

``revelio``, the scripts of ``llava_ext`` and ``eval/llava_bench.py`` all come in here.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

STOPPED = "stopped; what was written is whole, --resume continues"
# What launchers put in front of a script's own words.
LAUNCHERS = ("--local_rank=", "--local-rank=")


def run_module(
    module: ModuleType, arguments: Sequence[str], *, name: str, prog: str, stopped: str = STOPPED
) -> None:
    """Parse ``arguments`` into ``module.Config`` and give it to ``module.run``, with errors as one line.

    Args:
        module: a command: its docstring is the help page, its ``Config`` the flags.
        arguments: without the program's and the command's name.
        name: what errors begin with.
        prog: how the command is called, for its help.
        stopped: what Ctrl-C says.

    Raises:
        SystemExit: see :func:`one_line_errors`; after help; after a wrong flag (status 2).
    """
    with one_line_errors(name, f"{name}: {stopped}"):
        module.run(parse(module, arguments, prog))


@contextmanager
def one_line_errors(name: str, stopped: str = STOPPED) -> Iterator[None]:
    """A user's mistake becomes one line on stderr and status 2; Ctrl-C says ``stopped``, status 130.

    ``REVELIO_DEBUG=1`` lets a mistake through with its traceback.

    Raises:
        SystemExit: after either.
    """
    # Advice that transformers gives about packages Revelio does without.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{stopped}\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone; python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, KeyError, OSError) as error:
        if os.environ.get("REVELIO_DEBUG"):
            raise
        # str() of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        fail(name, str(message))


def fail(name: str, message: str) -> None:
    """Say one line and end with status 2.

    Raises:
        SystemExit: always.
    """
    sys.stderr.write(f"{name}: {' '.join(message.split())}\n")
    sys.exit(2)


def parse(module: ModuleType, arguments: Sequence[str], prog: str) -> Any:
    """A command's config: its defaults, then ``--config FILE``, then flags.

    Raises:
        ValueError: the config file is wrong.
        SystemExit: after printing help, or after a wrong flag (status 2).
    """
    import tyro

    from revelio.config import read_yaml, structure

    path, rest = take(own_words(arguments), "--config", "a file")
    default = tyro.MISSING_NONPROP
    if path is not None:
        try:
            default = structure(module.Config, read_yaml(Path(path)), missing=tyro.MISSING)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return tyro.cli(
        module.Config,
        args=rest,
        default=default,
        prog=prog,
        description=f"{module.__doc__}\n--config FILE fills any of these from a YAML file first.",
    )


def own_words(arguments: Sequence[str]) -> list[str]:
    """The arguments without the ``--local_rank=N`` that launchers put first."""
    return [word for word in arguments if not word.startswith(LAUNCHERS)]


def take(words: Sequence[str], flag: str, what: str = "a value") -> tuple[str | None, list[str]]:
    """Split ``flag VALUE`` or ``flag=VALUE`` off; the last one counts.

    Raises:
        ValueError: nothing follows the flag.
    """
    value, rest, left = None, [], list(words)
    while left:
        word = left.pop(0)
        if word == flag:
            if not left:
                raise ValueError(f"{flag} needs {what}")
            value = left.pop(0)
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
        else:
            rest.append(word)
    return value, rest
