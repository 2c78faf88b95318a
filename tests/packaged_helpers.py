"""Hand-made protobuf: the smallest ONNX files, written byte by byte, in the layout of PyTorch's exporter."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

NUMBERS = {np.dtype(np.float32): 1, np.dtype(np.int64): 7, np.dtype(np.float16): 10}

WIDTH = 128


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([128 | value % 128])
        value //= 128
    return out + bytes([value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number * 8 + 2) + varint(len(data)) + data


def tensor(name: str, array: np.ndarray, *, packed: bool = False, typed: bool = False) -> bytes:
    """A TensorProto: dims packed or one by one, numbers in raw_data or in float_data."""
    dims = [varint(side) for side in array.shape]
    head = field(1, b"".join(dims)) if packed else b"".join(field(1, s) for s in array.shape)
    head += field(2, NUMBERS[array.dtype]) + field(8, name)
    return head + field(4 if typed else 9, array.tobytes())


def node(name: str, kind: str, inputs: Iterable[str]) -> bytes:
    text = b"".join(field(1, word) for word in inputs)
    return text + field(2, f"{name}_output_0") + field(3, name) + field(4, kind)


def model(nodes: Iterable[bytes], tensors: Iterable[bytes]) -> bytes:
    graph = b"".join(field(1, item) for item in nodes) + field(2, "main_graph")
    graph += b"".join(field(5, item) for item in tensors)
    return field(1, 7) + field(2, "pytorch") + field(7, graph)


def tiny_dinov2_model() -> Dinov2Model:
    """Two blocks of two heads of 64, every weight, bias and scale away from its initial value."""
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        use_mask_token=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        built = Dinov2Model(config).eval()
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return built


LINEAR = tuple(
    f"{name}.weight" for name in ("query", "key", "value", "output.dense", "mlp.fc1", "mlp.fc2")
)
OLD_NAMES = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}


def export(source: Dinov2Model, path: Path, *, without: str = "?", extra: str = "") -> Path:
    """Write the model as PyTorch's exporter does: linear weights transposed and without their names."""
    nodes, tensors = [], []
    for key, value in source.state_dict().items():
        array = value.numpy()
        for new, old in OLD_NAMES.items():
            key = key.replace(new, old)
        key = "backbone." + key.replace("o_proj", "output.dense")
        if without in key:
            continue
        if key.endswith("position_embeddings"):
            tensors += [
                tensor("onnx::Concat_1", array[:, :1]),
                tensor("onnx::Reshape_2", array[:, 1:]),
            ]
            nodes.append(
                node("/backbone/embeddings/Reshape_1", "Reshape", ["onnx::Reshape_2", "shape"])
            )
            nodes.append(
                node("/backbone/embeddings/Concat_6", "Concat", ["onnx::Concat_1", "resized"])
            )
        elif key.endswith(LINEAR):
            anonymous = f"onnx::MatMul_{len(tensors)}"
            tensors.append(tensor(anonymous, np.ascontiguousarray(array.T)))
            path_of = "/" + key.removesuffix(".weight").replace(".", "/").replace(
                "layer/", "layer."
            )
            nodes.append(node(f"{path_of}/MatMul", "MatMul", ["activations", anonymous]))
        else:
            tensors.append(tensor(key, array))
    tensors.append(tensor("decoder.final_conv.weight", np.ones((1, 4, 1, 1), np.float32)))
    nodes.append(node("/backbone/encoder/layer.0/attention/attention/MatMul", "MatMul", ["q", "k"]))
    if extra:
        tensors.append(tensor(extra, np.ones(3, np.float32)))
    path.write_bytes(model(nodes, tensors))
    return path
