import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_helpers import loop_decode, loop_encode, random_model
from sae_reference_kernel import ReferenceKernel

from revelio.sae.kernels.base import Codes
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder

MODES = ["fixed", "as_paper", "as_code"]


def dense(codes: Codes, n: int) -> np.ndarray:
    return torch.zeros(len(codes.values), n).scatter(1, codes.indices, codes.values).numpy()


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_codes_and_reconstruction_equal_numpy_loops(mode):
    model = random_model(mode=mode)
    x = torch.randn(7, model.d, generator=torch.Generator().manual_seed(1))
    codes = model.encode(x)
    wanted = loop_encode(model, x)
    assert codes.values.shape == codes.indices.shape == (7, model.k)
    np.testing.assert_allclose(dense(codes, model.n), wanted, atol=1e-5)
    np.testing.assert_allclose(model.decode(codes), loop_decode(model, wanted), atol=1e-5)
    np.testing.assert_allclose(model(x), loop_decode(model, wanted), atol=1e-5)


def test_only_the_fixed_mode_rectifies():
    # k = n: all pre-activations are kept, negative ones too.
    kept = {}
    for mode in MODES:
        model = random_model(k=20, mode=mode)
        x = torch.randn(5, model.d, generator=torch.Generator().manual_seed(2))
        kept[mode] = model.encode(x).values.min()
    assert kept["fixed"] == 0
    assert kept["as_paper"] < 0
    assert kept["as_code"] < 0


def test_preactivations_of_a_slice_are_a_slice_of_all():
    model = random_model()
    x = torch.randn(4, model.d, generator=torch.Generator().manual_seed(3))
    whole = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    torch.testing.assert_close(model.preactivations(x), whole.detach())
    torch.testing.assert_close(model.preactivations(x, slice(5, 9)), whole[:, 5:9].detach())


@settings(deadline=None, max_examples=25)
@given(
    b=st.integers(1, 9),
    n=st.integers(4, 700),
    k=st.integers(1, 4),
    buffer=st.integers(1, 4000),
    masked=st.booleans(),
)
def test_encoding_in_chunks_keeps_what_a_dense_topk_keeps(b, n, k, buffer, masked):
    model = random_model(5, n, k, seed=n)
    x = torch.randn(b, 5, generator=torch.Generator().manual_seed(b))
    among = torch.arange(n) % 3 == 0 if masked else None
    width = min(3, int(among.sum())) if among is not None else 0
    got, others = SparseKernel(buffer).encode(x, model.weights, k, among, width)
    wanted, wanted_others = ReferenceKernel().encode(x, model.weights, k, among, width)
    assert torch.equal(got.indices, wanted.indices)
    torch.testing.assert_close(got.values, wanted.values)
    if others is None or wanted_others is None:
        assert others is wanted_others
    else:
        assert torch.equal(others.indices, wanted_others.indices)


def test_gradients_of_kept_values_equal_autograd():
    model = random_model()
    x = torch.randn(6, model.d, generator=torch.Generator().manual_seed(4))
    codes = model.encode(x)
    outputs = torch.randn(6, model.d, generator=torch.Generator().manual_seed(5))
    values = codes.values.clone().requires_grad_()
    code = torch.zeros(6, model.n).scatter(1, codes.indices, values)
    (wanted,) = torch.autograd.grad((code @ model.W_dec.detach() * outputs).sum(), values)
    for kernel in (SparseKernel(), ReferenceKernel()):
        torch.testing.assert_close(kernel.code_gradients(codes, outputs, model.W_dec.data), wanted)


def test_save_and_load_keep_every_bit_and_what_it_was_trained_on(tmp_path):
    model = random_model()
    model.trained_on.update(layer="up_ft1", timestep=25, variance=0.5)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in tmp_path.iterdir()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 1
    assert config["mode"] == "fixed"
    assert config["trained_on"]["timestep"] == 25
    loaded = KSparseAutoencoder.from_pretrained(tmp_path)
    assert loaded.settings() == model.settings()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_newer_format_is_refused(tmp_path):
    random_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 4}))
    with pytest.raises(ValueError, match="format 4"):
        KSparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((4, 8, 9), "k=9"), ((0, 8, 1), "d=0"), ((4, 8, 0), "k=0"), ((4, 8, 2, "paper"), "'paper'")],
)
def test_impossible_models_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        KSparseAutoencoder(*arguments)


def test_activations_of_another_width_are_refused():
    with pytest.raises(ValueError, match="width 6"):
        random_model().encode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="pooled"):
        random_model().encode(torch.zeros(2, 6, 4, 4))
