"""Read a PyTorch ``.pt`` file without running anything that is in it.

A pickle may name any function to call. Here the only names that resolve are PyTorch's tensor rebuilder
and storages, OrderedDict, and paths and devices (as text). Every other class (the released checkpoint
pickles its config object) becomes an :class:`Inert` record of its fields, which can do nothing, and any
other function to be called is refused.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

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


class Inert:
    """What stands for an object of an unknown class: its name and its fields, as plain values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fields: dict[str, Any] = {}


def read_tensors(path: Path) -> Any:
    """The content of a ``.pt`` or ``.pth`` file: containers, numbers, tensors, inert records.

    Raises:
        ValueError: it is no such file, is damaged, or wants something called.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(inside) != 1:
                raise ValueError(f"{path} holds no PyTorch data")
            return _Reader(archive, inside[0]).load()
    except FileNotFoundError as error:
        raise ValueError(f"no file at {path}") from error
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is no zip archive: save it again with PyTorch 1.6 or later, or it is damaged"
        ) from error
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} cannot be read safely: {error}") from error
    except (AttributeError, OverflowError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, inside: str) -> None:
        super().__init__(io.BytesIO(archive.read(inside)))
        self.archive = archive
        self.folder = inside.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # A function of its own each time: a pickle may also set attributes of what it names.
            return lambda *arguments: _rebuild_tensor(*arguments)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch", "device"):
            return _device
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return lambda *parts: "/".join(map(str, parts))
        return _inert_class(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        data = self.archive.read(f"{self.folder}data/{key}")
        flat = torch.frombuffer(bytearray(data), dtype=dtype)
        if len(flat) != count:
            raise pickle.UnpicklingError(f"storage {key} holds {len(flat)} numbers, not {count}")
        return flat


def _inert_class(name: str) -> Any:
    """A class whose instances can be filled with fields and do nothing; calling it is refused."""

    class Record(Inert):
        # `object.__new__(cls)` is what unpickling a dataclass amounts to: no constructor runs.
        def __new__(cls, *arguments: Any) -> "Record":
            if arguments:
                raise pickle.UnpicklingError(f"it wants {name} called, which is refused")
            record = super().__new__(cls)
            Inert.__init__(record, name)
            return record

        def __init__(self) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            self.fields = dict(state) if isinstance(state, dict) else {"state": state}

    return Record


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    if not isinstance(storage, torch.Tensor):
        raise pickle.UnpicklingError("a tensor without a storage")
    # Checked by PyTorch: a view beyond the storage is an error.
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


def _device(*arguments: Any) -> str:
    return ":".join(map(str, arguments))
