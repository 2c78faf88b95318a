"""The certified search: its choice is that of the float32 scores, whatever the numbers look like."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_search_helpers import assert_chosen, draw, instructions, many, scores_of, weights_of

from revelio.sae.kernels.native import NativeKernel

pytestmark = pytest.mark.usefixtures(instructions.__name__)

# Of wide bounds: what is multiplied where they leave many in.
CLOSER = {"avx2-int8": "avx2", "avx-vnni-int8": "avx2", "avx512-int8": "avx512", "amx": "avx512"}


@many
@given(
    b=st.integers(1, 40),
    d=st.integers(1, 70),
    n=st.integers(1, 300),
    k=st.integers(1, 40),
    decades=st.integers(0, 12),
    few=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_choices_are_those_of_the_scores(b, d, n, k, decades, few, threads, seed):
    """Rows of all sizes, and numbers of few values, which tie."""
    w, x, bias = draw(n, d, seed=seed), draw(b, d, seed=seed + 1), draw(n, seed=seed + 2)
    if few:
        w, x, bias = w.round(), x.round(), bias.round()
    w *= 10.0 ** (decades * (torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) - 0.5))
    weights = weights_of(w, bias)
    codes, _ = NativeKernel(threads).encode(x, weights, min(k, n))
    assert_chosen(codes, scores_of(x, weights), min(k, n))


def test_choices_are_those_of_exact_arithmetic():
    """Brute force in float64, where its k-th and next scores differ by more than float32 can confuse."""
    w, x = draw(2000, 96), draw(64, 96, seed=1)
    exact = x.double() @ w.double().T
    best = exact.topk(17, dim=1)
    clear = (best.values[:, 15] - best.values[:, 16]) > 1e-4
    assert int(clear.sum()) > 50
    codes, _ = NativeKernel().encode(x, weights_of(w), 16)
    for row in clear.nonzero()[:, 0]:
        assert set(codes.indices[row].tolist()) == set(best.indices[row, :16].tolist())


@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-30, 1e-20, 1e-6, 1e6, 1e17, 1e30])
@pytest.mark.parametrize("of", ["weights", "inputs"])
def test_tiny_and_huge_numbers_are_scored_like_others(scale, of):
    w, x = draw(200, 40), draw(9, 40, seed=1)
    (w if of == "weights" else x).mul_(scale)
    assert_chosen(NativeKernel().encode(x, weights_of(w), 8)[0], scores_of(x, weights_of(w)), 8)


def test_a_few_of_the_least_float_beside_huge_numbers_stay_within_their_bound():
    """A bound of so few units is itself rounded to whole ones."""
    w = 1.4e-45 * torch.arange(1.0, 41)[:, None].repeat(1, 2)
    x = 1e24 * torch.tensor([[1.0, 1.0], [0.5, 0.5], [1.0, 0.9]])
    assert_chosen(NativeKernel().encode(x, weights_of(w), 8)[0], scores_of(x, weights_of(w)), 8)


def test_near_duplicates_and_equal_latents_are_told_apart_or_taken_in_order():
    base, x = draw(1, 64), draw(16, 64, seed=1)
    w = base.repeat(120, 1)
    w[40:80] *= 1 + 1e-7 * torch.arange(40)[:, None]
    w[80:] += 1e-6 * draw(40, 64, seed=2)
    for k in (1, 5, 50):
        assert_chosen(NativeKernel().encode(x, weights_of(w), k)[0], scores_of(x, weights_of(w)), k)


def awkward(rows: int, d: int, seed: int, spread: int) -> torch.Tensor:
    """Rows that 16 bits hold worst: all numbers half-way between two bfloat16, or a bit beside that.

    A whole row is rounded up, or a whole row down, so that errors add up instead of cancelling.
    """
    draw_ = torch.Generator().manual_seed(seed)
    odd = 2 * torch.randint(0, 64, (rows, d), generator=draw_) + 1
    beside = torch.randint(-spread, spread + 1, (rows, 1), generator=draw_)
    powers = torch.randint(-2, 3, (rows, 1), generator=draw_)
    return (1 + odd / 256 + beside * 2.0**-22) * 2.0**powers


@many
@given(
    d=st.integers(1, 200),
    n=st.integers(2, 200),
    share=st.floats(0, 1),
    spread=st.integers(0, 3),
    alike=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_near_ties_that_rounding_turns_round_are_settled_by_the_scores(
    d, n, share, spread, alike, seed
):
    """Errors as large as the bound allows, parallel to the input, among scores some ulps apart."""
    w, x = awkward(n, d, seed, spread), awkward(5, d, seed + 1, spread)
    if alike:
        w = w[:1] + awkward(n, 1, seed, spread) * 2.0**-21
    weights, k = weights_of(w), max(1, round(share * n))
    assert_chosen(NativeKernel(2).encode(x, weights, k)[0], scores_of(x, weights), k)


@pytest.mark.parametrize("d", [5, 33, 320, 1280])
@pytest.mark.parametrize("of", ["weights", "inputs"])
def test_what_int8_turns_round_as_far_as_it_can_is_settled_by_the_scores(d, of):
    """Errors parallel to the other factor reach the bound; the best come last, with the worst guesses.

    In units of a row's 127th, all other numbers lie half-way between integers, and are rounded down or up.
    """
    down, up = 2.5 - 2.0**-8, 2.5 + 2.0**-8
    others, best = torch.full((60, d), up), torch.full((4, d), down)
    x = torch.ones(7, d)
    if of == "inputs":
        x[:, ::2], x[:, 1::2] = down, up
        best = torch.ones(4, d)
        best[:, 1::2] = -1
        others = -best[:1].repeat(60, 1)
    w = torch.cat([others, best])
    exact = w if of == "inputs" else x
    exact[:, 0], (x if of == "inputs" else w)[:, 0] = 0, 127
    bias = torch.zeros(64)
    bias[60:] = (w[0] - w[60]) @ x[0] + 2.0**-8 * (1 + torch.arange(4))
    weights = weights_of(w, bias)
    codes, _ = NativeKernel(1).encode(x, weights, 4)
    assert codes.indices.tolist() == [[63, 62, 61, 60]] * 7
    assert_chosen(codes, scores_of(x, weights), 4)


@pytest.mark.parametrize("columns", [1, 2, 4, 32, 64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_that_int8_has_neither_saturate_nor_wrap(columns, sign):
    """The best comes last: a sum that is cut or wraps leaves it below those before."""
    x, w = torch.zeros(20, 64), torch.empty(60, 64)
    x[:, :columns] = sign
    w[:] = sign * (0.9 + 0.001 * torch.arange(60))[:, None]
    w[:, columns:] = 0
    codes, _ = NativeKernel(1).encode(x, weights_of(w), 3)
    assert codes.indices.tolist() == [[59, 58, 57]] * 20
    assert_chosen(codes, scores_of(x, weights_of(w)), 3)


@pytest.mark.parametrize("d", [64, 1280, 4128])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_long_rows_fit(d, sign):
    """All pieces of a row as large as they may be, and as large as one another; or one of them larger."""
    x, w = torch.full((20, d), float(sign)), torch.full((60, d), float(sign))
    x[10:, :64] *= 10
    w *= (0.9 + 0.001 * torch.arange(60))[:, None]
    kernel = NativeKernel(1)
    assert_chosen(kernel.encode(x, weights_of(w), 60)[0], scores_of(x, weights_of(w)), 60)
    assert kernel.scored == 60 * 20


@pytest.mark.parametrize("sign", [1, -1])
def test_what_rounding_leaves_of_an_image_does_not_saturate_beside_the_largest_weights(sign):
    """Two neighbours alone in a row are as large as int8 can be; a guess out of its bound is told."""
    w, x, kernel = torch.zeros(64, 128), draw(20, 128), NativeKernel(1)
    w.view(64, 64, 2)[torch.arange(64), torch.arange(64)] = sign
    assert_chosen(kernel.encode(x, weights_of(w), 64)[0], scores_of(x, weights_of(w)), 64)
    assert kernel.scored == 64 * 20


@many
@given(
    d=st.integers(1, 300),
    decades=st.integers(0, 12),
    k=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_small_numbers_beside_large_ones_count(d, decades, k, seed):
    """Columns of very different sizes, some of them large in the images alone, or in the weights alone."""
    w, x = draw(90, d, seed=seed), draw(6, d, seed=seed + 1)
    where = torch.rand(2, d, generator=torch.Generator().manual_seed(seed)) - 0.5
    x *= 10.0 ** (decades * where[0])
    w *= 10.0 ** (-decades * where[seed % 2])
    weights = weights_of(w, draw(90, seed=seed))
    assert_chosen(NativeKernel(2).encode(x, weights, k)[0], scores_of(x, weights), k)


@many
@given(
    d=st.integers(1, 300),
    decades=st.integers(0, 60),
    worst=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_guess_is_within_its_bound(d, decades, worst, seed):
    """With k = n every score is taken, and one outside its bound would be reported as stale."""
    w, x = draw(40, d, seed=seed), draw(6, d, seed=seed + 1)
    if worst:
        w, x = awkward(40, d, seed, 1), awkward(6, d, seed + 1, 1)
    where = torch.rand(40, d, generator=torch.Generator().manual_seed(seed)) - 0.5
    w *= 10.0 ** (decades * where).clamp(-30, 18)
    weights = weights_of(w, draw(40, seed=seed))
    kernel = NativeKernel()
    assert_chosen(kernel.encode(x, weights, 40)[0], scores_of(x, weights), 40)
    assert kernel.scored == 40 * 6


def test_ten_thousand_roundings_in_one_sum_stay_within_the_bound():
    w, x = awkward(100, 10_000, 0, 2), awkward(33, 10_000, 1, 2)
    w[::2] *= -1
    assert_chosen(NativeKernel().encode(x, weights_of(w), 100)[0], scores_of(x, weights_of(w)), 100)


def test_tiles_are_left_as_they_were():
    """PyTorch multiplies bfloat16 with the same tile registers."""
    a, x = draw(64, 64).bfloat16(), draw(40, 96)
    wanted, weights = a @ a, weights_of(draw(500, 96, seed=1))
    for _ in range(3):
        NativeKernel(2).encode(x, weights, 5)
        assert torch.equal(a @ a, wanted)


def test_one_outlying_channel_changes_nothing():
    w, x = draw(500, 64), draw(32, 64, seed=1)
    x[:, 3] *= 1e4
    w[:, 3] *= 1e-4
    w[::7, 5] *= 1e5
    assert_chosen(NativeKernel().encode(x, weights_of(w), 12)[0], scores_of(x, weights_of(w)), 12)


def test_zero_rows_score_their_bias_and_ties_go_to_the_lower_index():
    weights = weights_of(torch.zeros(50, 12), torch.tensor([0.5, 1.0] * 25))
    codes, _ = NativeKernel().encode(torch.cat([torch.zeros(1, 12), draw(3, 12)]), weights, 4)
    assert codes.indices.tolist() == [[1, 3, 5, 7]] * 4
    assert codes.values.tolist() == [[1.0] * 4] * 4


@pytest.mark.parametrize("k_among", [1, 7, 30])
def test_the_best_among_some_latents_are_those_of_the_scores(k_among):
    weights, x = weights_of(draw(300, 33), draw(300, seed=3)), draw(20, 33, seed=1)
    among = torch.rand(300, generator=torch.Generator().manual_seed(5)) < 0.1
    k_among = min(k_among, int(among.sum()))
    codes, others = NativeKernel(2).encode(x, weights, 9, among, k_among)
    scores = scores_of(x, weights)
    assert_chosen(codes, scores, 9)
    assert others is not None
    assert_chosen(others, np.where(among.numpy(), scores, -np.inf), k_among)


def test_few_latents_are_scored_twice(instructions):
    """The bound is tight: hardly more than the k that are chosen need a float32 score."""
    share = {"avx2": 1.1, "avx512": 1.1, "amx": 1.6}.get(instructions, 2.5)
    kernel = NativeKernel()
    kernel.encode(draw(64, 128, seed=1), weights_of(draw(4000, 128)), 32)
    assert 32 * 64 <= kernel.scored < share * 32 * 64


def test_wide_bounds_give_way_where_they_leave_many_in(instructions):
    """Scores that are small beside the norms, as of a trained k-SAE: a search later int16 is multiplied."""
    wide = instructions in CLOSER
    w, x = draw(4000, 128), draw(64, 128, seed=1)
    w[:, 64:], x[:, :64] = 0.02 * w[:, 64:], 0.05 * x[:, :64]
    weights, kernel, left = weights_of(w), NativeKernel(), []
    for _ in range(2):
        assert_chosen(kernel.encode(x, weights, 8)[0], scores_of(x, weights), 8)
        left.append(kernel.scored / 64)
    assert kernel.instructions == CLOSER.get(instructions, instructions)
    assert left[1] < 2 * 8 + 4000 / 200
    assert (left[0] > 2 * 8 + 4000 / 200) == wide


def test_int8_gives_way_where_its_sums_could_overflow_and_where_ranks_are_asked_for(instructions):
    given = CLOSER[instructions] if instructions.endswith("int8") else instructions
    w, x = (0.5 * draw(rows, 2**17 + 1, seed=rows).sign() for rows in (5, 3))
    x[0] = w[1]  # the largest sum that there is
    for columns in (2**17 + 1, 2**17):  # exact in float32
        kernel, weights = NativeKernel(), weights_of(w[:, :columns].contiguous())
        scores = x[:, :columns].double() @ weights.W_enc.double().T
        assert_chosen(kernel.encode(x[:, :columns], weights, 3)[0], scores.float().numpy(), 3)
        assert kernel.instructions == (given if columns > 2**17 else instructions)
    ranking = NativeKernel()
    ranking.encode_some(x[:, :9], weights_of(w[:, :9].contiguous()), 3, torch.ones(5).bool(), 0)
    assert ranking.instructions == given


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 8, 19])
def test_numbers_that_are_not_finite_are_refused(bad, place):
    w, x = draw(30, 20), draw(4, 20, seed=1)
    x[2, place] = bad
    with pytest.raises(ValueError, match="activations hold NaN or infinite"):
        NativeKernel().encode(x, weights_of(w), 3)
    w[7, place] = bad
    with pytest.raises(ValueError, match="W_enc holds NaN or infinite"):
        NativeKernel().encode(draw(4, 20), weights_of(w), 3)


def test_a_score_that_overflows_to_nan_is_refused():
    w = torch.tensor([[1e38, -1e38] * 32] * 12)
    with pytest.raises(ValueError, match="overflows to NaN"):
        NativeKernel().encode(torch.full((2, 64), 1e38), weights_of(w), 3)


def test_weights_changed_behind_the_kernel_are_noticed():
    w, x, kernel = draw(100, 16), draw(8, 16, seed=1), NativeKernel()
    kernel.encode(x, weights_of(w), 4)
    w *= -1  # PyTorch counts this write, so the kernel copies anew
    assert_chosen(kernel.encode(x, weights_of(w), 4)[0], scores_of(x, weights_of(w)), 4)
    w.numpy()[:] *= -1
    with pytest.raises(ValueError, match="make a new NativeKernel"):
        kernel.encode(x, weights_of(w), 4)


def test_another_models_weights_get_a_copy_of_their_own():
    kernel, x = NativeKernel(), draw(8, 16, seed=1)
    for seed in (2, 3, 2):
        weights = weights_of(draw(100, 16, seed=seed))
        assert_chosen(kernel.encode(x, weights, 4)[0], scores_of(x, weights), 4)


@pytest.mark.parametrize("d", [12, 64, 320])
def test_rows_of_any_memory_layout_are_read_as_they_are(d):
    """The cells of a grid are a transposed view; the copy that is read must outlive the call."""
    x, weights = draw(d, 96).T, weights_of(draw(200, d, seed=1))
    assert not x.is_contiguous()
    assert_chosen(NativeKernel().encode(x, weights, 5)[0], scores_of(x.contiguous(), weights), 5)


@many
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.01, 0.05, 0.5, 1.0]),
    spread=st.integers(0, 3),
    threads=st.integers(1, 3),
    least=st.sampled_from([-np.inf, 0.0, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_of_some_latents_those_among_the_best_of_all_are_given(
    n, k, share, spread, threads, least, seed
):
    """Near ties too: rows that differ by little are told apart by their scores."""
    x, w = awkward(15, 24, seed, spread), awkward(n, 24, seed + 1, spread)
    weights, k = weights_of(w), min(k, n)
    only = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share
    codes = NativeKernel(threads).encode_some(x, weights, k, only, least)
    scores = scores_of(x, weights)
    for row, (values, indices) in enumerate(zip(codes.values, codes.indices, strict=True)):
        best = np.argsort(-scores[row], kind="stable")[:k]
        wanted = best[only.numpy()[best]]
        above = wanted[scores[row][wanted] > least]
        assert indices[: len(above)].tolist() == above.tolist()
        assert np.array_equal(values[: len(above)].numpy(), scores[row][above])
        rest = values[len(above) :].numpy()
        assert set(rest[rest != 0]) <= set(scores[row][wanted[len(above) :]])


@pytest.mark.parametrize("spread", [0, 2, 3])
@pytest.mark.parametrize("least", [-np.inf, 0.0])
def test_of_a_few_latents_ranks_are_counted(spread, least):
    """Where bounds tell, no other latent is scored; where rows differ by little, they are."""
    x, w = awkward(70, 128, 3, spread), awkward(900, 128, 4, spread)
    weights, kernel = weights_of(w), NativeKernel(2)
    only = torch.zeros(900, dtype=torch.bool)
    only[::80] = True
    codes, scores = kernel.encode_some(x, weights, 300, only, least), scores_of(x, weights)
    for row, (values, indices) in enumerate(zip(codes.values, codes.indices, strict=True)):
        best = np.argsort(-scores[row], kind="stable")[:300]
        wanted = best[only.numpy()[best] & (scores[row][best] > least)]
        assert indices[: len(wanted)].tolist() == wanted.tolist()
        assert np.array_equal(values[: len(wanted)].numpy(), scores[row][wanted])
    if spread == 0:
        assert kernel.scored < 2 * int(only.sum()) * len(x)


def test_of_some_latents_few_others_are_scored():
    kernel, only = NativeKernel(), torch.zeros(4000, dtype=torch.bool)
    only[::40] = True
    kernel.encode_some(draw(64, 128, seed=1), weights_of(draw(4000, 128)), 32, only, -np.inf)
    assert kernel.scored < 0.5 * 32 * 64
