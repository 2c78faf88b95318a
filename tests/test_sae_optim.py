"""Adam over rows that rest, wake and share blocks, against the dense update in double precision."""

from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_reference_kernel import ReferenceKernel

from revelio.sae import optim
from revelio.sae.kernels.base import Gradient, Kernel, Weights
from revelio.sae.kernels.native import NativeKernel
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.optim import AdamRows, AdamStep

B, D = 4, 5
# A phase: for how many steps, and which rows are active in them.
Phase = tuple[int, frozenset[int]]


def gradient(t: int, active: Sequence[int]) -> Gradient:
    """Two terms for every active row, the same for the same step."""
    draw = torch.Generator().manual_seed(t)
    latents = torch.tensor([*active, *active], dtype=torch.int64)
    inputs, outputs = torch.randn(2, B, D, generator=draw)
    values, pulls = torch.rand(2, len(latents), generator=draw) + 0.1
    images = torch.randint(B, latents.shape, generator=draw)
    return Gradient(latents, images, images, values, pulls, inputs, outputs, outputs.sum(0))


class Dense:
    """The textbook: every row at every step, in float64."""

    def __init__(self, weights: Weights) -> None:
        self.W = {name: getattr(weights, name).double().numpy() for name in ("W_enc", "W_dec")}
        self.mean = {name: np.zeros_like(w) for name, w in self.W.items()}
        self.square = {name: np.zeros_like(w) for name, w in self.W.items()}
        self.active = np.zeros(len(weights.b_enc), dtype=bool)

    def update(self, g: Gradient, step: AdamStep) -> None:
        d = {name: np.zeros_like(w) for name, w in self.W.items()}
        inputs, outputs = g.inputs.double().numpy(), g.outputs.double().numpy()
        for e, j in enumerate(g.latents.tolist()):
            d["W_enc"][j] += float(g.gradients[e]) * inputs[g.images[e]]
            d["W_dec"][j] += float(g.values[e]) * outputs[g.output_rows[e]]
            self.active[j] = True
        w = self.W["W_dec"]
        d["W_dec"] -= (d["W_dec"] * w).sum(1, keepdims=True) * w
        for name, w in self.W.items():
            self.mean[name] = 0.9 * self.mean[name] + 0.1 * d[name]
            self.square[name] = 0.999 * self.square[name] + 0.001 * d[name] ** 2
            mean = self.mean[name] / (1 - 0.9**step.t)
            square = self.square[name] / (1 - 0.999**step.t)
            w -= step.learning_rate * mean / (np.sqrt(square) + 1e-8)
        if step.unit_norm:
            w = self.W["W_dec"]
            w[self.active] /= np.linalg.norm(w[self.active], axis=1, keepdims=True)


class Run:
    """A kernel and the dense update, fed the same gradients."""

    def __init__(self, kernel: Kernel, n: int, phases: list[Phase], rate: float, unit: bool):
        draw = torch.Generator().manual_seed(n)
        W_enc, W_dec = torch.randn(2, n, D, generator=draw)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.weights = Weights(W_enc, torch.zeros(n), W_dec, torch.zeros(D))
        self.moments = AdamRows.start(W_enc, W_dec, self.weights.b_enc, self.weights.b_dec)
        self.dense = Dense(self.weights)
        self.rested = self.woken = 0
        self.t = 0
        for active in chain.from_iterable(repeat(rows, steps) for steps, rows in phases):
            self.t += 1
            before = self.moments.last.clone()
            step = AdamStep(self.t, rate * min(1, self.t / 50), unit_norm=unit)
            terms = gradient(self.t, sorted(active))
            kernel.update(self.weights, self.moments, terms, step)
            self.dense.update(terms, step)
            self.rested += int(((before > 0) & (self.moments.last < 0)).sum())
            self.woken += int(((before < 0) & (self.moments.last > 0)).sum())

    def check(self, weights: float, moments: float) -> None:
        """Weights within ``weights``, moments within this share, those of resting rows caught up."""
        last = self.moments.last.numpy()
        missed = np.where(last < 0, self.t + last, 0)[:, None]
        for name in ("W_enc", "W_dec"):
            found = getattr(self.weights, name).numpy()
            np.testing.assert_allclose(found, self.dense.W[name], rtol=0, atol=weights)
            kept = getattr(self.moments, name)
            mean, square = kept.mean.double().numpy(), kept.square.double().numpy()
            np.testing.assert_allclose(
                mean * 0.9**missed, self.dense.mean[name], rtol=moments, atol=1e-5
            )
            np.testing.assert_allclose(
                square * 0.999**missed, self.dense.square[name], rtol=moments, atol=1e-7
            )


@st.composite
def patterns(draw: st.DrawFn) -> tuple[int, list[Phase]]:
    """Rows that are active for a while, rest for a while, and come back; some never are."""
    n = draw(st.integers(1, 14))
    rows = st.frozensets(st.integers(0, n - 1), max_size=n)
    phases = st.lists(st.tuples(st.integers(1, 110), rows), min_size=2, max_size=5)
    return n, draw(phases)


KERNELS = {
    "sparse": lambda block: SparseKernel(block=block),
    "native": lambda _: NativeKernel(1),
    "reference": lambda _: ReferenceKernel(),
}


@pytest.mark.parametrize("name", KERNELS)
@settings(deadline=None, max_examples=15)
@given(
    pattern=patterns(),
    block=st.integers(1, 15),
    share=st.sampled_from([-1.0, 0.0, 0.25, 1.0]),
    unit=st.booleans(),
)
def test_any_pattern_of_activity_follows_the_dense_update(name, pattern, block, share, unit):
    n, phases = pattern
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "IN_PLACE_SHARE", share)
        Run(KERNELS[name](block), n, phases, 1e-5, unit).check(1e-5, 2e-3)


@pytest.mark.parametrize("name", KERNELS)
def test_thousands_of_steps_with_rows_that_rest_and_wake_follow_the_dense_update(name):
    # Blocks of four: rows 0 to 5 keep moving, the others rest beside them, each for another while.
    moving = frozenset(range(6))
    phases = [(60, frozenset(range(12)))]
    for round_ in range(9):
        phases += [(150 + 40 * round_, moving), (5, moving | {6 + round_ % 6, 11})]
    run = Run(KERNELS[name](4), 14, phases, 1e-4, True)
    assert run.t > 2500
    if name != "reference":
        assert run.rested > 10 and run.woken > 10
    run.check(2e-5, 5e-3)


def test_a_row_at_rest_in_a_block_that_is_updated_in_place_is_left_untouched():
    phases = [(30, frozenset(range(8))), (200, frozenset(range(7)))]
    kernel = SparseKernel(block=8)
    run = Run(kernel, 8, phases, 1e-5, True)
    assert int(run.moments.last[7]) < -30
    blocks = list(run.moments.blocks(8))
    assert [(block.start, block.resting.tolist()) for block in blocks] == [(0, [7])]
    held = [run.weights.W_enc, run.weights.W_dec]
    held += [run.moments.W_enc.mean, run.moments.W_enc.square, run.moments.W_dec.square]
    before, last = [tensor[7].clone() for tensor in held], int(run.moments.last[7])
    kernel.update(run.weights, run.moments, gradient(231, range(7)), AdamStep(231, 1e-5))
    assert int(run.moments.last[7]) == last
    assert all(torch.equal(a, tensor[7]) for a, tensor in zip(before, held, strict=True))


def test_pytorch_s_kernel_leaves_a_step_out_that_is_not_to_be_taken() -> None:
    """As on a CUDA device without Triton, where a loss that is not finite raises only when it is read."""
    draw = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 6, D, generator=draw)
    weights = Weights(matrices[0], torch.zeros(6), matrices[1], torch.zeros(D))
    moments = AdamRows.start(weights.W_enc, weights.W_dec, weights.b_enc, weights.b_dec)
    kernel = SparseKernel()
    kernel.update(weights, moments, gradient(1, [0, 3]), AdamStep(1, 1e-2, go=torch.tensor(True)))
    held = [*vars(weights).values(), moments.W_enc.mean, moments.b_dec.square, moments.last]
    before = [tensor.clone() for tensor in held]
    assert float(weights.b_dec.abs().max()) > 1e-3
    kernel.update(weights, moments, gradient(2, [1, 3]), AdamStep(2, 1e-2, go=torch.tensor(False)))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
