"""The ONNX reader against hand-made files, and the ViT out of it against the model that was exported."""

from pathlib import Path

import numpy as np
import packaged_helpers as made
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from revelio.backbones.packaged_onnx import read_onnx
from revelio.backbones.packaged_vit import convert, dinov2_from_onnx
from revelio.backbones.registry import load_backbone


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@settings(deadline=None)
@given(
    name=st.text(min_size=1, max_size=200),
    shape=st.lists(st.integers(0, 300), max_size=2).map(tuple),
    packed=st.booleans(),
    half=st.booleans(),
)
def test_reader_gives_back_what_was_written(tmp_path_factory, name, shape, packed, half) -> None:
    kind = np.float16 if half else np.float32
    array = np.random.default_rng(0).normal(size=shape).astype(kind)
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    made_node = made.node("/a/MatMul", "MatMul", ["x", name])
    graph = read_onnx(
        written(path, made.model([made_node], [made.tensor(name, array, packed=packed)]))
    )
    assert graph.nodes[0].name == "/a/MatMul"
    assert graph.nodes[0].kind == "MatMul"
    assert graph.nodes[0].inputs == ("x", name)
    np.testing.assert_array_equal(graph.weights[name], array)
    assert graph.weights[name].shape == shape


def test_reader_takes_float_data_and_leaves_integers_out(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = [made.tensor("typed", array, typed=True), made.tensor("shape", np.array([1, 2]))]
    graph = read_onnx(written(tmp_path / "m.onnx", made.model([], tensors)))
    assert list(graph.weights) == ["typed"]
    np.testing.assert_array_equal(graph.weights["typed"], array)


def test_reader_refuses_every_cut_file(tmp_path: Path) -> None:
    whole = made.model([made.node("n", "Add", ["a"])], [made.tensor("a", np.ones(2, np.float32))])
    for length in range(len(whole)):
        path = written(tmp_path / "cut.onnx", whole[:length])
        with pytest.raises(ValueError, match=r"cut\.onnx is no whole ONNX model"):
            read_onnx(path)


def test_reader_refuses_a_shape_that_does_not_fit(tmp_path: Path) -> None:
    right = made.tensor("w", np.ones(4, np.float32))
    wrong = right.replace(made.field(1, 4), made.field(1, 5), 1)
    with pytest.raises(ValueError, match="w holds 4 numbers, not 5"):
        read_onnx(written(tmp_path / "m.onnx", made.model([], [wrong])))


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
