"""What every command line shares: words to a config, errors to one line.

``revelio``, ``llava_ext`` and ``eval/llava_bench.py`` all come in here.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from revelio.distributed import left_alone
from revelio.machine import beyond_memory
from revelio.trust import PrintableStream, printable
from revelio.wording import did_you_mean, meant_flag

T = TypeVar("T")

STOPPED = "stopped; what was written is whole, --resume continues"
AGAIN = "stopped; what was written is whole, run the same command again"
# Packages that Revelio does without until a command needs them, and the extra that brings each.
EXTRAS = {
    "deepspeed": "llava",
    "peft": "llava",
    "bitsandbytes": "qlora",
    "gguf": "demo",
    "onnx": "demo",
    "openai": "eval",
}
# What launchers put in front of a script's own words.
LAUNCHERS = ("--local_rank=", "--local-rank=")
# Of what coming versions of libraries change.
COMING = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
LONGEST = 2000  # characters of the line that an error becomes


def run_module(
    module: ModuleType, arguments: Sequence[str], *, name: str, prog: str, stopped: str = ""
) -> None:
    """Parse ``arguments`` into ``module.Config`` and give it to ``module.run``, with errors as one line.

    Args:
        module: a command: its docstring is the help page, its ``Config`` the flags.
        arguments: without the program's and the command's name.
        name: what errors begin with.
        prog: how the command is called, for its help.
        stopped: what Ctrl-C says; "": how this command goes on.

    Raises:
        SystemExit: see :func:`one_line_errors`; after help.
    """
    said = f"{name}: {stopped or stopped_line(module.Config)}"
    with one_line_errors(name, said, flags_of(module.Config)):
        config = parse(module, arguments, prog)
        if "torch" not in sys.modules and _speaks():
            # Libraries take seconds to load: say at once that the command is at work.
            sys.stderr.write(f"{prog}: loading\n")
        with redirect_stdout(PrintableStream(sys.stdout)):  # type: ignore[type-var]
            module.run(config)


def stopped_line(config: type) -> str:
    """What Ctrl-C says of a command with this config: how it goes on."""
    return STOPPED if any(field.name == "resume" for field in fields(config)) else AGAIN


def choose(words: Sequence[str], commands: Mapping[str, str], prog: str, summary: str) -> str:
    """The command that ``words`` begin with; "" once the page that lists all of them is printed.

    Raises:
        SystemExit: there is no such command.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage(commands, prog, summary))
        return ""
    if words[0] not in commands:
        hint = did_you_mean(words[0], commands)
        fail(prog, f"unknown command {words[0]!r}: {hint}choose from {', '.join(commands)}")
    return words[0]


def usage(commands: Mapping[str, str], prog: str, summary: str) -> str:
    """The page that lists a program's commands, a line each."""
    width = max(map(len, commands))
    rows = "\n".join(f"  {name:<{width}}  {about}" for name, about in commands.items())
    return (
        f"usage: {prog} <command> [--config FILE] [flags]\n\n{summary}\n\ncommands:\n{rows}\n\n"
        f"`{prog} <command> --help` explains a command; flags override the config file.\n"
    )


def require(package: str, purpose: str) -> None:
    """Refuse to begin what needs a package that is not installed.

    Raises:
        ValueError: one line that names the package and what to install.
    """
    if find_spec(package) is None:
        raise ValueError(f"{purpose} needs {lacking(package)}")


def lacking(package: str) -> str:
    """The package, and what to install to have it."""
    return f"{package}, which is not installed: pip install {package}, or the extra `{EXTRAS[package]}`"


@contextmanager
def one_line_errors(name: str, stopped: str = STOPPED, flags: Iterable[str] = ()) -> Iterator[None]:
    """A user's mistake becomes one line on stderr and status 2; Ctrl-C says ``stopped``, status 130.

    ``REVELIO_DEBUG=1`` lets a mistake through with its traceback. Of the command's ``flags`` those are named
    that make smaller what went beyond memory.

    Raises:
        SystemExit: after either.
    """
    # Advice that transformers gives about packages Revelio does without.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    shown = warnings.formatwarning
    warnings.formatwarning = partial(_warning_line, name, shown)
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{stopped}\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has gone; python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if os.environ.get("REVELIO_DEBUG") or package not in EXTRAS:
            raise
        fail(name, f"this needs {lacking(package)}")
    except (ValueError, KeyError, OSError) as error:
        # The key of a dict that no one looked up for the user, such as in a backbone of their own.
        bare = isinstance(error, KeyError) and not isinstance(
            error.args[0] if error.args else 0, str
        )
        if os.environ.get("REVELIO_DEBUG") or bare:
            raise
        # str() of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) else error
        fail(name, str(message))
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not os.environ.get("REVELIO_DEBUG") and left_alone(error):
            number = os.environ.get("RANK", "?")
            fail(name, f"process {number} ends, because another one has: what that one says is why")
        said = beyond_memory(error, flags)
        if os.environ.get("REVELIO_DEBUG") or said is None:
            raise
        fail(name, said)
    finally:
        warnings.formatwarning = shown


def _speaks() -> bool:
    """Whether this is the one of a launcher's processes that says what all of them could."""
    return os.environ.get("RANK", "0") == "0"


def _warning_line(name: str, other: Callable[..., str], message: Any, *about: Any) -> str:
    """A warning of the library as one line, as an error is; that of another library as Python has it.

    What libraries say of each other's coming versions (peft of transformers) is for their authors; it
    is left out unless ``REVELIO_DEBUG=1``. The same of a user's own file, as of a backbone, is shown.
    """
    category, file = about[:2]
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    if issubclass(category, COMING) and installed and not os.environ.get("REVELIO_DEBUG"):
        return ""
    if category is not UserWarning:
        return other(message, *about)
    if not _speaks():
        return ""
    return f"{name}: warning: {printable(' '.join(str(message).split()))}\n"


def fail(name: str, message: str) -> None:
    """Say one line and end with status 2.

    Raises:
        SystemExit: always.
    """
    line = printable(" ".join(message.split()))
    if len(line) > LONGEST:
        # A foreign file's value may be of any length; what to do stands at the end.
        line = f"{line[: LONGEST * 2 // 3]} [...] {line[-LONGEST // 3 :]}"
    sys.stderr.write(f"{name}: {line}\n")
    sys.exit(2)


def parse(module: ModuleType, arguments: Sequence[str], prog: str) -> Any:
    """A command's config: its defaults, then ``--config FILE``, then flags.

    Raises:
        ValueError: the config file or a flag is wrong.
        SystemExit: after printing help.
    """
    import tyro

    from revelio.config import named, read_yaml, structure

    path, rest = take(own_words(arguments), "--config", "a file")
    default = tyro.MISSING_NONPROP
    if path is not None:
        try:
            default = structure(module.Config, read_yaml(Path(path)), missing=tyro.MISSING)
        except ValueError as error:
            raise ValueError(named(Path(path), error)) from error
    page = f"{module.__doc__}\n--config FILE fills any of these from a YAML file first."
    return parse_flags(module.Config, rest, default, page, prog)


def parse_flags(
    cls: type[T], words: Sequence[str], default: Any, page: str, prog: str | None = None
) -> T:
    """Flags on top of a default config, all within their bounds.

    Args:
        cls: the config's dataclass.
        words: the flags.
        default: the config that flags override.
        page: the help page.
        prog: how the command is called; none: as it was.

    Raises:
        ValueError: a flag is unknown, or its value is not allowed.
        SystemExit: after printing help.
    """
    import tyro

    from revelio.bounds import check
    from revelio.help_pages import ALL, SHORT, has_more, pages, reflowed, stray

    _check_renamed(cls, words)
    said, short = StringIO(), ALL not in words and any(word in SHORT for word in words)
    if short and has_more(cls):
        page += f"\nShown are the settings that are set most often; {ALL} explains the others, too."
    words, asked = [SHORT[1] if word == ALL else word for word in words], short or ALL in words
    try:
        with (
            redirect_stderr(said),
            _wide_terminal(asked),
            pages(short=short) if asked else nullcontext(),
        ):
            config = tyro.cli(
                cls, args=list(words), default=default, prog=prog, description=reflowed(page)
            )
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
        _check_known(cls, words)
        reason = _one_line(said.getvalue())
        _, unknown, rest = reason.partition("Unrecognized options: ")  # how tyro begins
        reason = stray(words, rest.split()[0], set(flags_of(cls))) if unknown else reason
        raise ValueError(reason) from None
    _check_no_empty_path(words, config)
    check(config)
    return config


def _check_renamed(cls: type, words: Sequence[str]) -> None:
    from revelio.config import renamed

    old = renamed(cls)
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag[2:] in old:
            raise ValueError(f"{flag} is called --{old[flag[2:]]} now")


def _check_known(cls: type, words: Sequence[str]) -> None:
    """Name the first flag that there is none of: tyro tells only what lacks where something does.

    Raises:
        ValueError: there is one.
    """
    known = {"--config", "--help", "--help-all", *flags_of(cls)}
    for word in words:
        given = word.partition("=")[0]
        flag = re.sub(r"\.\d+\.", ".0.", given.replace("_", "-"))
        if not flag.startswith("--") or flag in known:
            continue
        raise ValueError(f"unknown flag {given}: {meant_flag(flag, known)}--help-all lists all")


def flags_of(cls: type, above: str = "") -> Iterator[str]:
    """The flags of a config and of those inside it; those of a list of configs as its first has them."""
    from tyro.conf import Positional

    for name, kind in get_type_hints(cls, include_extras=True).items():
        if Positional in getattr(kind, "__metadata__", ()) or get_origin(kind) is ClassVar:
            continue
        flag = f"{above}{name}".replace("_", "-")
        kinds = (one for one in (kind, *get_args(kind)) if isinstance(one, type))
        inner = next((one for one in kinds if is_dataclass(one)), None)
        if inner is not None:
            yield from flags_of(inner, f"{flag}." if inner is kind else f"{flag}.0.")
        else:
            yield f"--{flag}"
            if kind is bool:
                yield f"--{above}no-{name}".replace("_", "-")


@contextmanager
def _wide_terminal(as_it_is: bool) -> Iterator[None]:
    """Keep tyro from wrapping its messages; help pages are wrapped as usual."""
    before = os.environ.get("COLUMNS")
    if not as_it_is:
        os.environ["COLUMNS"] = "2000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def _one_line(box: str) -> str:
    """What tyro's box of several lines says, as one."""
    lines = [line.strip("│| ") for line in box.splitlines() if line and line[0] in "│|"]
    if not lines:  # where the output is not UTF-8: a title, a rule, then what the box would hold
        lines = [line.strip() for line in box.splitlines()[2:] if line.strip()]
    rules = [number for number, line in enumerate(lines) if line.startswith(("──", "---"))]
    said = lines[: rules[0]] if rules else lines
    if not said:
        return " ".join(box.split())
    if said[0].startswith("Missing from"):
        lacking = [line for line in said if line.startswith("--")]
        # What has no flag is told by its help text.
        return f"needs {', '.join(lacking)}" if lacking else f"needs {': '.join(said[1:3])}"
    wrong = re.match(r"Error parsing (\S+): .*?(\[?'.*)$", said[0])
    if wrong is None:
        return " ".join(said)
    flag, given = wrong.groups()
    usage = next((line for line in lines if line.startswith(f"{flag} ")), flag)
    return f"{flag} is {given}: give {usage}"


def _check_no_empty_path(words: Sequence[str], config: Any) -> None:
    """``--out ''`` would be the working folder.

    Raises:
        ValueError: a path is given as an empty word.
    """
    from revelio.bounds import settings

    flag, empty = "", set()
    for word in words:
        name, _, value = word.partition("=")
        flag = name.replace("_", "-") if word.startswith("--") else flag
        if not word or (word.startswith("--") and "=" in word and not value):
            empty.add(flag)
    for setting in settings(config):
        values = setting.value if isinstance(setting.value, tuple) else (setting.value,)
        if setting.flag in empty and any(isinstance(value, Path) for value in values):
            raise ValueError(f"{setting.flag} is empty: give a path")


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
