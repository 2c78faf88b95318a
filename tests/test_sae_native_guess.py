"""A search that starts from a guess: whatever was searched before, the choice is that of the scores."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_search_helpers import assert_chosen, draw, instructions, many, scores_of, weights_of

from revelio.sae.kernels.native import NativeKernel

pytestmark = pytest.mark.usefixtures(instructions.__name__)


@many
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 20),
    decades=st.integers(0, 6),
    few=st.booleans(),
    among=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_guess_from_other_rows_changes_no_choice(n, k, decades, few, among, threads, seed):
    """One kernel for batches that score high, low, negative, all alike and zero beside their norms."""
    w, bias = draw(n, 24, seed=seed), 0.1 * draw(n, seed=seed + 2)
    w[: n // 2, 12:], w[n // 2 :, :12] = 0.01, 0  # the second half of the columns scores low
    if few:
        w, bias = w.round(), bias.round()
    base = draw(6, 24, seed=seed + 1)
    low = base * 10.0 ** (decades * (draw(6, 1, seed=seed) - 0.5).clamp(-2, 2))
    low[:, :12] = 0
    zero, alike = torch.zeros(6, 24), base[:1].repeat(6, 1)
    weights, kernel, k = weights_of(w, bias), NativeKernel(threads), min(k, n)
    some = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.3
    k_some = min(3, int(some.sum()))
    mixed, negative = torch.cat([base, low]), -w.sum(0).repeat(6, 1)
    for x in (base, low, base, mixed, negative, alike, alike, zero, base):
        best, others = kernel.encode(x, weights, k, some if among else None, k_some)
        scores = scores_of(x, weights)
        assert_chosen(best, scores, k)
        if others is not None:
            assert_chosen(others, np.where(some.numpy(), scores, -np.inf), k_some)


def test_equal_latents_that_score_what_was_guessed_are_taken_in_order():
    """Each score is the guess itself, beside rows that score less and rows that score more."""
    x, kernel = torch.ones(40, 64), NativeKernel()
    for rows in (draw(1, 64).abs(), -draw(1, 64).abs(), torch.zeros(1, 64), torch.ones(1, 64)):
        for factor in (1.0, 1 - 2.0**-24, 0.5, 2.0, 1.0):
            weights = weights_of(factor * rows.repeat(100, 1))
            assert_chosen(kernel.encode(x, weights, 7)[0], scores_of(x, weights), 7)


def test_what_a_guess_leaves_out_hides_no_number_that_is_not_finite():
    w, kernel = draw(100, 64).abs(), NativeKernel()
    kernel.encode(torch.ones(8, 64), weights_of(w), 4)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.ones(8, 64)
        x[5, 7] = bad
        with pytest.raises(ValueError, match="activations hold NaN or infinite"):
            kernel.encode(x, weights_of(w), 4)
    v = torch.tensor([[1e38, -1e38] * 32] * 12)
    with pytest.raises(ValueError, match="overflows to NaN"):
        kernel.encode(torch.full((2, 64), 1e38), weights_of(v), 4)
    x = -torch.ones(8, 64)
    assert_chosen(kernel.encode(x, weights_of(w), 4)[0], scores_of(x, weights_of(w)), 4)
