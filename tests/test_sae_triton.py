"""The CUDA kernel's programs in Triton's interpreter, on the CPU; skipped where Triton is not installed."""

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from test_sae_optim import D, Dense

from revelio.sae.kernels.base import Gradient, Weights
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.optim import AdamRows, AdamStep

if not find_spec("triton") or torch.cuda.is_available():
    pytest.skip("needs Triton and no CUDA device", allow_module_level=True)
if "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("Triton was imported to compile", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from revelio.sae.kernels import cuda, cuda_search, cuda_within
from revelio.sae.kernels.cuda_trial import tried

# Masked lanes compute what is never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

N, B, K = 12, 9, 4


@pytest.fixture(autouse=True)
def few_groups(monkeypatch) -> None:
    """The interpreter sorts by loops: groups of as many latents as the tests need."""
    monkeypatch.setattr(cuda_search, "GROUPS", 64)
    monkeypatch.setattr(cuda_within, "GROUPS", 16)


def start(seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    W_enc, W_dec = torch.randn(2, N, D, generator=draw)
    return Weights(W_enc, torch.zeros(N), W_dec / W_dec.norm(dim=1, keepdim=True), torch.zeros(D))


def terms(seed: int, hot: float) -> Gradient:
    """A batch's terms, of which a share is latent 7's and a tenth is zero."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randint(N, (B * K,), generator=draw)
    latents[torch.rand(B * K, generator=draw) < hot] = 7
    values, pulls = torch.randn(2, B * K, generator=draw)
    zero = torch.rand(B * K, generator=draw) < 0.1
    values[zero] = pulls[zero] = 0
    images = torch.arange(B).repeat_interleave(K)
    inputs, outputs = torch.randn(2, B, D, generator=draw)
    return Gradient(latents, images, images, values, pulls, inputs, outputs, outputs.sum(0))


@pytest.mark.parametrize("hot", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_an_update_in_blocks_of_terms_is_the_dense_one(monkeypatch, hot: float, block: int) -> None:
    monkeypatch.setattr(cuda, "TERMS", block)
    first = start(0)
    own = Weights(*(getattr(first, name).clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec")))
    moments = AdamRows.start(own.W_enc, own.W_dec, own.b_enc, own.b_dec)
    kernel, dense = cuda.CudaKernel(), Dense(first)
    for t in range(1, 9):
        step = AdamStep(t, 1e-3)
        kernel.update(own, moments, terms(t, hot), step)
        dense.update(terms(t, hot), step)
    for name in ("W_enc", "W_dec"):
        assert np.abs(getattr(own, name).double().numpy() - dense.W[name]).max() < 1e-5, name
    # Biases and the float16 copy.
    other, rows = start(0), SparseKernel()
    kept = AdamRows.start(other.W_enc, other.W_dec, other.b_enc, other.b_dec)
    for t in range(1, 9):
        rows.update(other, kept, terms(t, hot).by_latent(), AdamStep(t, 1e-3))
    assert torch.allclose(own.b_enc, other.b_enc, atol=1e-5)
    assert torch.allclose(own.b_dec, other.b_dec, atol=1e-5)
    assert torch.equal(kernel._copied(own.W_enc).half, own.W_enc.half())


def test_the_search_finds_the_best_latents_whatever_their_norms() -> None:
    draw = torch.Generator().manual_seed(1)
    n, k = 300, 5
    W_enc = torch.randn(n, D, generator=draw) * torch.exp(torch.randn(n, 1, generator=draw))
    weights = Weights(W_enc, 0.3 * torch.randn(n, generator=draw), W_enc, torch.zeros(D))
    x = torch.randn(2, D, generator=draw) * torch.exp(3 * torch.randn(2, 1, generator=draw))
    among = torch.rand(n, generator=draw) < 0.6
    best, others = cuda.CudaKernel().encode(x, weights, k, among, 3)
    scores = x.double() @ W_enc.double().T + weights.b_enc.double()
    assert torch.equal(best.indices, scores.topk(k).indices)
    assert others is not None
    wanted = scores.masked_fill(~among, float("-inf")).topk(3)
    assert torch.equal(others.indices, wanted.indices)
    assert torch.allclose(others.values.double(), wanted.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dead", [0, 2])
def test_fewer_latents_than_are_wanted_leave_places_without_a_score(monkeypatch, dead: int) -> None:
    """AuxK asks for as many as there may be, and no host waits to hear how many there are."""
    monkeypatch.setattr(cuda_search, "WIDE", 16)
    draw = torch.Generator().manual_seed(4)
    n, wanted = 200, 5
    W_enc, x = torch.randn(n, D, generator=draw), torch.randn(1, D, generator=draw)
    weights, among = Weights(W_enc, torch.zeros(n), W_enc, torch.zeros(D)), torch.zeros(n) > 0
    among[[7, 150][:dead]] = True
    _, others = cuda.CudaKernel().encode(x, weights, 2, among, wanted)
    assert others is not None and others.values.shape == (1, wanted)
    scores = (x.double() @ W_enc.double().T).masked_fill(~among, float("-inf")).topk(wanted)
    assert torch.allclose(others.values.double(), scores.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(others.indices[:, :dead], scores.indices[:, :dead])
    assert ((others.indices >= 0) & (others.indices < n)).all()


def test_terms_that_only_fill_up_rows_are_nobody_s(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "TERMS", 4)
    starts: list[torch.Tensor] = []
    update: Any = cuda.programs.update

    class Launch:
        def __getitem__(self, grid):
            def launch(*values, **options):
                starts.append(values[9].clone())
                return update[grid](*values, **options)

            return launch

    monkeypatch.setattr(cuda.programs, "update", Launch())
    found = []
    for fills in (0, 100):
        own, batch = start(0), terms(1, 0.3)
        zeros, none = torch.zeros(fills), torch.zeros(fills, dtype=torch.int64)
        more = {
            "latents": none,
            "images": none,
            "output_rows": none,
            "values": zeros,
            "gradients": zeros,
        }
        both = {name: torch.cat([getattr(batch, name), each]) for name, each in more.items()}
        moments = AdamRows.start(own.W_enc, own.W_dec, own.b_enc, own.b_dec)
        cuda.CudaKernel().update(own, moments, replace(batch, **both), AdamStep(1, 1e-3))
        found.append([own.W_enc, own.W_dec, own.b_enc, moments.last])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    batch = terms(1, 0.3)
    counts = batch.latents[(batch.values != 0) | (batch.gradients != 0)].bincount(minlength=N)
    assert all(torch.equal(each.diff(), counts.int()) for each in starts)


def test_more_candidates_than_fit_are_searched_anew(monkeypatch) -> None:
    """Scores that are small beside the norms, as of a k-SAE that has learned, and rows without a bound."""
    monkeypatch.setattr(cuda_search, "WIDE", 8)
    draw = torch.Generator().manual_seed(3)
    n, k, d = 150, 3, 64
    W_enc, x = torch.randn(n, d, generator=draw), torch.randn(2, d, generator=draw)
    W_enc[:, d // 2 :] *= 1e-3
    x[:, : d // 2] *= 1e-3
    huge = W_enc.clone()
    huge[5] *= 1e6  # float16 does not hold it
    for rows in (W_enc, huge):
        weights = Weights(rows, torch.zeros(n), rows, torch.zeros(d))
        best, _ = cuda.CudaKernel().encode(x, weights, k)
        scores = x.double() @ rows.double().T
        assert torch.equal(best.indices, scores.topk(k).indices)


def test_every_program_says_whether_it_fuses(monkeypatch) -> None:
    """Triton's default is to change, and 3.9 warns of that: none is launched without the option."""
    launched = []

    class Launch:
        def __init__(self, name: str, program) -> None:
            self.name, self.program = name, program

        def __getitem__(self, grid):
            def launch(*values, **options):
                launched.append((self.name, options.get("enable_fp_fusion")))
                return self.program[grid](*values, **options)

            return launch

    names = ("bounds_of", "halve", "select", "rescore", "pick", "rescue", "decode", "products")
    names += ("unit_norm", "sum_blocks", "update", "vector")
    for name in names:
        monkeypatch.setattr(cuda.programs, name, Launch(name, getattr(cuda.programs, name)))
    monkeypatch.setattr(cuda_search, "WIDE", 8)
    monkeypatch.setattr(cuda, "TERMS", 4)
    tried(cuda.CudaKernel(), "cpu", images=2)
    assert {name for name, _ in launched} == set(names)
    assert {fused for _, fused in launched} == {True}
