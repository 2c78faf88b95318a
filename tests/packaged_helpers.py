"""Small ONNX files in the layout of PyTorch's exporter, written with the `onnx` package (extra `demo`)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

onnx: Any = pytest.importorskip("onnx")
WIDTH = 128


def tensor(name: str, array: np.ndarray) -> Any:
    return onnx.numpy_helper.from_array(array, name)


def node(name: str, kind: str, inputs: Iterable[str]) -> Any:
    return onnx.helper.make_node(kind, inputs, [f"{name}_output_0"], name)


def model(nodes: Sequence[Any], tensors: Sequence[Any]) -> bytes:
    graph = onnx.helper.make_graph(nodes, "main_graph", [], [], tensors)
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


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
