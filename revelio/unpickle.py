"""Read a PyTorch ``.pt`` file without running anything in it, in time and memory that its size bounds.

A pickle is a program for a small machine. The machine here knows the operations that ``torch.save`` writes
and no others. What a pickle names stays a name (:class:`Name`); only tensors are rebuilt, and paths and
devices become text. An object of any class becomes an :class:`Inert` record of its fields, which can do
nothing (the released checkpoint pickles its config object); everything else to be called is refused.

Nothing grows beyond the file: members of the archive must be stored as they are and fit into it together,
tensors are views that are no larger than their storage, and nothing nested is ever hashed, joined or printed.
"""

import io
import math
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic

from revelio.trust import MIB, printable, regular_file
from revelio.wording import plural

T = TypeVar("T")

# The pickle itself, without the tensors: that of a k-SAE has some kB.
PICKLE_LIMIT = 8 * MIB
# What compressed arrays may take, by their file's size: weights of floats hardly shrink.
ARRAYS_GROWTH = 16
# Characters of a key, a path or a device.
TEXT_LIMIT = 4096

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4")
_VALUES = (
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
)
_SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(NamedTuple):
    """Something that a pickle refers to by name; it is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}"[:200])


class Inert:
    """What stands for an object of any class: its name and its fields, as plain values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[str, Any] = {}


def read_tensors(path: Path) -> Any:
    """The content of a ``.pt`` or ``.pth`` file: containers, numbers, tensors, names, inert records.

    Raises:
        ValueError: it is no such file, is damaged, takes more memory than its own size, or wants something
            called.
    """
    size = regular_file(path).stat().st_size
    where = printable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _Machine(_members(archive, size)).run()
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{where} is no zip archive, or a damaged one ({_first_line(error)}): if it is older than "
            "PyTorch 1.6, save it again"
        ) from error
    except (ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} cannot be read safely: {_first_line(error)}") from error
    except (OSError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{where} is damaged: {_first_line(error)}") from error


def modules_named(path: Path) -> set[str]:
    """The packages whose classes and functions a ``.pt`` file's pickle names; none where it can't be told."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickle = _members(archive, path.stat().st_size).pickle
        steps = pickletools.genops(pickle)
        named = [str(argument) for step, argument, _ in steps if step.name == "GLOBAL"]
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError, RuntimeError):
        return set()
    return {argument.partition(" ")[0].partition(".")[0] for argument in named}


def read_arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of numbers in an ``.npz`` file, in memory that its size bounds; pickled objects are refused.

    Raises:
        ValueError: it is no such file, is damaged, takes far more memory than its size, or holds others.
    """
    limit, where = ARRAYS_GROWTH * regular_file(path).stat().st_size + MIB, printable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if sum(info.file_size for info in infos) > limit:
                raise ValueError(f"it unpacks to more than {limit:,} bytes")
            return {
                info.filename.removesuffix(".npy"): _array(archive.read(info)) for info in infos
            }
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError) as error:
        raise ValueError(f"{where} can't be read as arrays: {_first_line(error)}") from error


def _array(content: bytes) -> torch.Tensor:
    """An array of numbers from the content of an ``.npy`` file."""
    file = io.BytesIO(content)
    header = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}.get(read_magic(file))
    if header is None:
        raise ValueError("an array is of an unknown version")
    shape, fortran, dtype = header(file)
    if dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"an array of {dtype} {shape} is not what it says, or holds no numbers")
    found = np.frombuffer(content, dtype, offset=file.tell()).reshape(
        shape, order="F" if fortran else "C"
    )
    return torch.from_numpy(found.astype(dtype.newbyteorder("="), order="C"))


def _first_line(error: Exception) -> str:
    return printable((str(error) or type(error).__name__).splitlines()[0][:300])


class _Members(NamedTuple):
    """A ``.pt`` file's pickle, and where its storages are."""

    archive: zipfile.ZipFile
    pickle: bytes
    folder: str


def _members(archive: zipfile.ZipFile, size: int) -> _Members:
    infos = archive.infolist()
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
    if packed or sum(max(info.file_size, info.compress_size) for info in infos) > size:
        raise ValueError("its parts are compressed or overlap, as torch.save never writes them")
    inside = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if len(inside) != 1:
        raise ValueError("it holds no PyTorch data")
    if archive.getinfo(inside[0]).file_size > PICKLE_LIMIT:
        raise ValueError(f"its pickle has more than the {PICKLE_LIMIT} bytes allowed")
    folder = inside[0].removesuffix("data.pkl")
    order = folder + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise ValueError("its numbers are big-endian: save it again on another machine")
    return _Members(archive, archive.read(inside[0]), folder)


class _Machine:
    """Runs a pickle's operations on a stack, without importing or calling what it names."""

    def __init__(self, members: _Members) -> None:
        self.members = members
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, torch.Tensor] = {}

    def run(self) -> Any:
        for operation, argument, _ in pickletools.genops(self.members.pickle):
            if operation.name == "STOP":
                return self.stack.pop()
            self.step(operation.name, argument)
        raise ValueError("its pickle is cut")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _INTEGERS:
            if not -(1 << 63) <= argument < 1 << 64:
                raise ValueError("it holds a number of more than 64 bits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in _SHORT_TUPLES:
            stack.append(tuple(self.pop(_SHORT_TUPLES[name])))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME"):
            getattr(self, f"on_{name.lower()}", self.refuse(name))(argument)

    def refuse(self, name: str) -> Any:
        def on_any(_: Any) -> None:
            raise ValueError(
                f"its pickle has the operation {name}, which torch.save does not write"
            )

        return on_any

    def pop(self, count: int) -> list[Any]:
        if not 0 <= count <= len(self.stack):
            raise ValueError("its pickle takes what it did not put")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def on_mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def pop_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def on_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def on_append(self, _: Any) -> None:
        self.extend(self.pop(1))

    def on_appends(self, _: Any) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        _of(list, self.stack[-1]).extend(items)

    def on_setitem(self, _: Any) -> None:
        self.update(self.pop(2))

    def on_setitems(self, _: Any) -> None:
        self.update(self.pop_mark())

    def update(self, items: list[Any]) -> None:
        target = _of(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (key is None or isinstance(key, int) or _is_text(key)):
                raise ValueError("a dict has keys other than numbers and short text")
            target[key] = value

    def on_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Name(module, name))

    def on_stack_global(self, _: Any) -> None:
        module, name = self.pop(2)
        self.stack.append(Name(_of(str, module), _of(str, name)))

    def on_newobj(self, _: Any) -> None:
        # `object.__new__(cls)` is what unpickling a dataclass amounts to: no constructor runs.
        name, arguments = self.pop(2)
        if arguments != ():
            raise ValueError(f"it wants {_of(Name, name)} called, which is refused")
        self.stack.append(Inert(str(_of(Name, name))))

    def on_build(self, _: Any) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.fields = state if isinstance(state, dict) else {"state": state}
        elif not isinstance(
            target, dict
        ):  # of an OrderedDict: its `_metadata`, which nothing needs
            raise ValueError("its pickle sets the state of what has none")

    def on_reduce(self, _: Any) -> None:
        name, arguments = self.pop(2)
        self.stack.append(_called(_of(Name, name), _of(tuple, arguments)))

    def on_binpersid(self, _: Any) -> None:
        (reference,) = self.pop(1)
        kind, dtype, key, _, count = _of(tuple, reference)
        if kind != "storage" or not isinstance(dtype, Name) or not _is_text(key):
            raise ValueError("it refers to something other than a storage")
        if dtype.module != "torch" or dtype.name not in _DTYPES:
            raise ValueError(f"it has a storage of unknown type {dtype}")
        if key not in self.storages:
            self.storages[key] = self.storage(key, _DTYPES[dtype.name])
        found = self.storages[key]
        if found.dtype != _DTYPES[dtype.name] or len(found) != count:
            raise ValueError(
                f"storage {printable(key)} holds {len(found)} {found.dtype}, not what it says"
            )
        self.stack.append(found)

    def storage(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        info = self.members.archive.getinfo(f"{self.members.folder}data/{key}")
        held = bytearray(self.members.archive.read(info))
        return torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)


def _called(name: Name, arguments: tuple[Any, ...]) -> Any:
    """What a call amounts to, for the few that are known; nothing is called."""
    if name == Name("torch._utils", "_rebuild_tensor_v2"):
        return _rebuild_tensor(*arguments[:4])
    if name == Name("torch._utils", "_rebuild_parameter"):
        return _of(torch.Tensor, arguments[0])
    if name == Name("collections", "OrderedDict") and not arguments:
        return {}
    path = name.module.split(".")[0] == "pathlib" and name.name in ("PosixPath", "WindowsPath")
    if path or name == Name("torch", "device"):
        return _joined("/" if path else ":", arguments)
    raise ValueError(f"it wants {name} called, which is refused")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    whole, sides = _of(torch.Tensor, storage), (*_of(tuple, size), *_of(tuple, stride), offset)
    if whole.ndim != 1 or len(size) != len(stride) or len(size) > 8:
        raise ValueError("a tensor is not made of a storage")
    if not all(type(side) is int and 0 <= side < 1 << 62 for side in sides):
        raise ValueError("a tensor's sizes are not whole numbers")
    if math.prod(size) > len(whole):
        raise ValueError(
            f"a tensor of {plural(math.prod(size), 'number')} has a storage of {len(whole)}"
        )
    # Checked by PyTorch: a view beyond the storage is an error.
    return whole.as_strided(size, stride, offset)


def _joined(mark: str, parts: tuple[Any, ...]) -> str:
    texts = list(_texts(parts))
    if sum(map(len, texts)) + len(texts) > TEXT_LIMIT:
        raise ValueError(f"a path or device has more than {TEXT_LIMIT} characters")
    return mark.join(texts)


def _texts(parts: tuple[Any, ...]) -> Iterator[str]:
    for part in parts:
        if not isinstance(part, str | int):
            raise ValueError("a path or device is made of something other than text")
        yield str(part)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= TEXT_LIMIT


def _of(kind: type[T], value: Any) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
