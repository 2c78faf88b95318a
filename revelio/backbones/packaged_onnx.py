"""Reads the weights out of an ONNX file: float initialisers, and which node takes which.

An ONNX file is one protobuf message. Weights need few of its fields (onnx.proto3, IR version 7):
ModelProto.graph = 7; GraphProto.node = 1, initializer = 5; NodeProto.input = 1, name = 3, op_type = 4;
TensorProto.dims = 1, data_type = 2, float_data = 4, name = 8, raw_data = 9. Reading them here spares
users the ``onnx`` package with its protobuf runtime for what is done once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

# TensorProto.DataType -> the little-endian numbers of raw_data.
FLOAT_TYPES = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}


@dataclass(frozen=True)
class Node:
    """One operation: its name (the path of the exported module), kind and input names."""

    name: str
    kind: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxGraph:
    """What :func:`read_onnx` finds: nodes in order, float weights (read-only arrays) by name."""

    nodes: tuple[Node, ...]
    weights: dict[str, np.ndarray]


def read_onnx(path: Path) -> OnnxGraph:
    """Read the nodes and the float weights of an ONNX file.

    Initialisers of other types (shapes, indices) are left out.

    Raises:
        ValueError: the file is cut short or is no ONNX model; the message names it.
    """
    try:
        return _graph(_only(memoryview(path.read_bytes()), 7))
    except (IndexError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no whole ONNX model: {error}") from error


def _graph(message: memoryview) -> OnnxGraph:
    nodes, weights = [], {}
    for number, value in fields(message):
        if number == 1 and isinstance(value, memoryview):
            nodes.append(_node(value))
        elif number == 5 and isinstance(value, memoryview):
            name, array = _tensor(value)
            if array is not None:
                weights[name] = array
    return OnnxGraph(tuple(nodes), weights)


def _node(message: memoryview) -> Node:
    name, kind, inputs = "", "", []
    for number, value in fields(message):
        if isinstance(value, memoryview) and number in (1, 3, 4):
            text = str(value, "utf-8")
            if number == 1:
                inputs.append(text)
            elif number == 3:
                name = text
            else:
                kind = text
    return Node(name, kind, tuple(inputs))


def _tensor(message: memoryview) -> tuple[str, np.ndarray | None]:
    name, kind, shape, raw = "", 0, [], memoryview(b"")
    for number, value in fields(message):
        if isinstance(value, int):
            if number == 1:
                shape.append(value)
            elif number == 2:
                kind = value
        elif number == 1:  # packed dims
            shape.extend(_varints(value))
        elif number == 8:
            name = str(value, "utf-8")
        elif number in (4, 9):  # float_data is packed float32: the same bytes as raw_data
            raw = value
    if kind not in FLOAT_TYPES:
        return name, None
    flat = np.frombuffer(raw, FLOAT_TYPES[kind])
    if flat.size != prod(shape):
        raise ValueError(f"{name} holds {flat.size} numbers, not {'x'.join(map(str, shape))}")
    return name, flat.reshape(shape)


def _only(message: memoryview, wanted: int) -> memoryview:
    for number, value in fields(message):
        if number == wanted and isinstance(value, memoryview):
            return value
    raise ValueError(f"field {wanted} is missing")


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: number and value (integer, or bytes without a copy).

    Raises:
        ValueError: the message ends inside a field, or its wire type is none of protobuf's.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes ends beyond the message")
        yield key >> 3, message[at : at + size]
        at += size


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A base-128 number, low groups first: 7 bits a byte, the eighth says that more follow."""
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("a number is cut off at the end")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
