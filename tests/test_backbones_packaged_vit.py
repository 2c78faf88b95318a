"""Weights read from ONNX files that `onnx` wrote, and the ViT out of one against what was exported."""

from pathlib import Path

import numpy as np
import packaged_helpers as made
import pytest
import torch
from packaged_helpers import onnx
from PIL import Image

from revelio.backbones.packaged_vit import convert, dinov2_from_onnx, float_weights, read_onnx
from revelio.backbones.registry import load_backbone


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 300)])
def test_weights_are_what_was_written(tmp_path: Path, shape, kind) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(kind)
    typed = onnx.helper.make_tensor("typed", onnx.TensorProto.FLOAT, [2, 3], range(6))
    tensors = [made.tensor("w", array), made.tensor("shape", np.array([1, 2])), typed]
    nodes = [made.node("/a/MatMul", "MatMul", ["x", "w"])]
    graph = read_onnx(written(tmp_path / "m.onnx", made.model(nodes, tensors)))
    [found] = graph.node
    assert (found.name, found.op_type, list(found.input)) == ("/a/MatMul", "MatMul", ["x", "w"])
    weights = float_weights(graph)
    assert list(weights) == ["w", "typed"] and weights["w"].dtype == kind
    np.testing.assert_array_equal(weights["w"], array)
    np.testing.assert_array_equal(weights["typed"], np.arange(6).reshape(2, 3))


def test_every_cut_file_is_refused(tmp_path: Path) -> None:
    whole = made.model([made.node("n", "Add", ["a"])], [made.tensor("a", np.ones(2, np.float32))])
    # What stands behind the graph, in a field of its own, is the version of the operations.
    end = whole.index(onnx.load_from_string(whole).graph.SerializeToString())
    end += onnx.load_from_string(whole).graph.ByteSize()
    for length in range(end):
        path = written(tmp_path / "cut.onnx", whole[:length])
        with pytest.raises(ValueError, match=r"cut\.onnx is no whole ONNX model"):
            read_onnx(path)


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    wrong = made.tensor("w", np.ones(4, np.float32))
    wrong.dims[0] = 5
    graph = read_onnx(written(tmp_path / "m.onnx", made.model([], [wrong])))
    with pytest.raises(ValueError, match="w does not hold 5 numbers"):
        float_weights(graph)


@pytest.mark.parametrize("place", ["weights.bin", "../secret.bin", "/etc/hostname"])
def test_weights_in_other_files_are_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "model").mkdir()
    for folder in (tmp_path, tmp_path / "model"):
        (folder / Path(place).name).write_bytes(bytes(16))
    away = made.tensor("w", np.ones(4, np.float32))
    onnx.external_data_helper.set_external_data(away, place)
    graph = read_onnx(written(tmp_path / "model" / "m.onnx", made.model([], [away])))
    with pytest.raises(ValueError, match="w is kept in another file"):
        float_weights(graph)


def test_converted_vit_is_the_exported_model(tmp_path: Path) -> None:
    source = made.tiny_dinov2_model()
    path = made.export(source, tmp_path / "m.onnx")
    state = torch.get_rng_state()
    found = dinov2_from_onnx(read_onnx(path))
    assert torch.equal(torch.get_rng_state(), state)
    pixels = torch.randn(2, 3, 42, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = source(pixels, output_hidden_states=True)
        given_ = found(pixels, output_hidden_states=True)
    for one, other in zip(wanted.hidden_states, given_.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(wanted.last_hidden_state, given_.last_hidden_state)
    assert found.config.image_size == 28


@pytest.mark.parametrize(
    ("without", "extra", "named"),
    [
        ("layer.1.attention.attention.key.bias", "", r"layer\.1\.attention"),
        ("embeddings.position_embeddings", "", "position_embeddings"),
        ("?", "backbone.encoder.layer.0.odd.bias", r"layer\.0\.odd\.bias"),
    ],
)
def test_conversion_names_what_does_not_fit(tmp_path: Path, without, extra, named) -> None:
    source = made.tiny_dinov2_model()
    path = made.export(source, tmp_path / "m.onnx", without=without, extra=extra)
    with pytest.raises(ValueError, match=named):
        dinov2_from_onnx(read_onnx(path))


def test_conversion_writes_the_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(made.export(made.tiny_dinov2_model(), tmp_path / "m.onnx"), tmp_path / "out")
    backbone = load_backbone(str(tmp_path / "out"), layers=["block0"], device="cpu")
    white = backbone.transform(Image.new("RGB", (300, 200), (255, 255, 255)))
    assert white.shape == (3, 224, 224)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white.mean((1, 2)), expected, atol=1e-5, rtol=1e-5)
