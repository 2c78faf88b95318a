"""Everything that comes from outside is read here: bounded in size and depth, typed, confined to its folder.

A manifest, a config, a checkpoint or a list may have been written by anybody. Each reader below checks
a file against its own size before it allocates anything, turns every error of a parser into one line that
names the file, and gives back plain values only: no class, function or import is ever taken from a file.
"""

import csv
import io
import json
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from revelio.wording import plural

T = TypeVar("T")

# What reading a value of another form than was expected ends in.
WRONG = (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError)

MIB = 1 << 20
# The largest text file that is parsed whole: a manifest of a million images stays below it.
TEXT_LIMIT = 512 * MIB
# Nesting of JSON and YAML; what Revelio writes has at most eight levels.
DEPTH_LIMIT = 64
# Nodes of a YAML document with every alias expanded.
NODE_LIMIT = 100_000


def regular_file(path: Path) -> Path:
    """``path``, if it is a regular file (a link to one counts); a pipe, a device or a folder does not.

    Raises:
        ValueError: it is missing or something else; the message names it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ValueError(f"no file at {printable(path)}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(path)} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{printable(path)} is not a regular file")
    return path


def read_text(path: Path, *, limit: int = TEXT_LIMIT, errors: str = "strict") -> str:
    """A text file in UTF-8, with or without a byte-order mark.

    Raises:
        ValueError: it is missing, no regular file, larger than ``limit`` bytes, or not UTF-8.
    """
    size = regular_file(path).stat().st_size
    if size > limit:
        raise ValueError(f"{printable(path)} has {size:,} bytes, more than the {limit:,} allowed")
    try:
        return path.read_bytes().decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)} is not UTF-8 text: {error}") from error


def read_json(path: Path, *, limit: int = TEXT_LIMIT, infinite: bool = False) -> Any:
    """A JSON file's value. NaN, which JSON lacks, is refused, and so is infinity unless ``infinite``.

    Raises:
        ValueError: see :func:`read_text`; or it is not JSON, or is nested deeper than 64 levels.
    """
    return parse_json(read_text(path, limit=limit), printable(path), infinite=infinite)


def parse_json(text: str, where: str, *, infinite: bool = False) -> Any:
    """The value of JSON text that stands in ``where``.

    Raises:
        ValueError: it is not JSON, or is nested deeper than 64 levels; the message names ``where``.
    """
    try:
        value = json.loads(text, parse_constant=_infinity if infinite else _no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where} is not valid JSON: {reason}") from error
    if _depth(value) > DEPTH_LIMIT:
        raise ValueError(f"{where} is nested deeper than {DEPTH_LIMIT} levels")
    return value


def read_object(path: Path, *, limit: int = TEXT_LIMIT, infinite: bool = False) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        ValueError: see :func:`read_json`; or it holds something else.
    """
    value = read_json(path, limit=limit, infinite=infinite)
    if not isinstance(value, dict):
        raise ValueError(f"{printable(path)} must hold a JSON object, not a {kind_of(value)}")
    return value


def read_json_lines(path: Path, *, torn: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; empty lines are passed over.

    Args:
        path: the file.
        torn: leave out a last line that a kill or a power cut left unfinished.

    Raises:
        ValueError: a line is no JSON object; the message names file and line.
    """
    # What a cut leaves of a last line need not be UTF-8.
    lines = read_text(path, errors="replace" if torn else "strict").split("\n")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, f"{printable(path)}, line {number}")
            if not isinstance(value, dict):
                raise ValueError(
                    f"{printable(path)}, line {number} holds no object but a {kind_of(value)}"
                )
        except ValueError:
            if torn and not any(rest.strip("\0 \r") for rest in lines[number:]):
                break
            raise
        found.append(value)
    return found


def read_csv(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a CSV file with a header line, by column; empty lines are passed over.

    Raises:
        ValueError: it has no header, or one with a column twice, or a row has more or fewer cells; the
            message names file and line.
    """
    text = io.StringIO(read_text(path), newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    found: list[dict[str, str]] = []
    try:
        header = next(rows, [])
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{printable(path)}, line {rows.line_num} has {plural(len(row), 'cell')}, its header "
                    f"{len(header)}"
                )
            if row:
                found.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise ValueError(
            f"{printable(path)}, line {rows.line_num} is not valid CSV: {error}"
        ) from error
    if not any(header):
        raise ValueError(f"{printable(path)} has no header line that names its columns")
    if twice := sorted(name for name in set(header) if header.count(name) > 1):
        raise ValueError(f"{printable(path)} has the column {printable(twice[0])!r} twice")
    return found


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document that stands in ``where``: plain values, each key once.

    Raises:
        ValueError: it is not YAML, has a tag, repeats a key, is nested too deeply, or aliases blow it up.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return None
        _check_nodes(root, where)
        return yaml.SafeLoader("").construct_document(root)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        reason = " ".join(str(error).split())
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        raise ValueError(f"{where} is not valid YAML: {reason}") from error


def _check_nodes(root: Any, where: str) -> None:
    """Refuse repeated keys, deep nesting, and documents that aliases blow up; time linear in the text."""
    import yaml

    sizes: dict[int, int] = {}

    def size(node: Any, above: tuple[int, ...]) -> int:
        if id(node) in above:
            raise ValueError(f"{where}: an alias refers to what it stands in")
        if len(above) > DEPTH_LIMIT:
            raise ValueError(f"{where} is nested deeper than {DEPTH_LIMIT} levels")
        if id(node) in sizes:
            return sizes[id(node)]
        inner = (*above, id(node))
        total = 1
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else None
                if name is None:
                    raise ValueError(f"{where}: a key must be a word")
                if name in keys:
                    line = key.start_mark.line + 1
                    raise ValueError(f"{where}, line {line}: the key `{name}` stands twice")
                keys.add(name)
                total += 1 + size(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(value, inner) for value in node.value)
        sizes[id(node)] = total
        if total > NODE_LIMIT:
            raise ValueError(f"{where}: aliases make it more than {NODE_LIMIT} values")
        return total

    size(root, ())


def file_in(folder: Path, name: Any, *, what: str = "a file") -> Path:
    """The file called ``name`` directly inside ``folder``.

    Args:
        folder: where it must be.
        name: as a manifest or an index gives it.
        what: for messages.

    Raises:
        ValueError: the name is not text, leads out of the folder, or is a link.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..")
    if not plain or any(mark in name for mark in ("/", "\\", "\0")):
        raise ValueError(
            f"{printable(folder)} names {printable(repr(name))} as {what}: "
            "only a file of this folder is allowed"
        )
    path = folder / name
    if path.is_symlink():
        raise ValueError(f"{printable(path)} is a link: {what} must be a file of its own")
    return path


def path_in(folder: Path, name: Any, *, what: str = "a file") -> Path:
    """The path ``name`` below ``folder``, subfolders allowed; links may not lead out.

    Raises:
        ValueError: it is not relative, or it leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{printable(folder)} names {printable(repr(name))} as {what}")
    root = folder.resolve()
    path = (folder / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(root):
        raise ValueError(f"{printable(name)} is outside {printable(folder)}, so it is not read")
    return folder / name


def leads_out(name: Any) -> bool:
    """Whether a file's name, as a list gives it, is no name or leads out of the folder it is looked for in.

    The folder's own links are the user's: data sets in a hub's cache are links.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return True
    return ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute()


def printable(text: object) -> str:
    """``text`` with control and undecodable characters escaped, safe for a terminal, a log and JSON."""
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape", "surrogatepass").decode()
        for mark in str(text)
    )


class PrintableStream:
    """A stream that shows what is foreign as :func:`printable` does: no control sequence reaches a terminal.

    Names of files, classes and models come from anywhere, and stand in what commands print.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; line ends and tabs stay."""
        self._stream.write(re.sub(r"[^\n\r\t]+", lambda line: printable(line[0]), text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def markdown(text: object) -> str:
    """``text`` for a Markdown page or a cell of its tables: shown as it is, never markup or a second line."""
    return re.sub(r"[<>&|\[\]`*\\]", lambda mark: f"&#{ord(mark[0])};", printable(text))


def kind_of(value: object) -> str:
    """What a parsed value is, in JSON's words."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _infinity(word: str) -> float:
    return _no_constant(word) if word == "NaN" else float(word)


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, level = stack.pop()
        deepest = max(deepest, level)
        if level > DEPTH_LIMIT:
            return level
        if isinstance(item, dict):
            stack.extend((inner, level + 1) for inner in item.values())
        elif isinstance(item, list):
            stack.extend((inner, level + 1) for inner in item)
    return deepest
