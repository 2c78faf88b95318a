import math
import re
from itertools import pairwise

import pytest
import torch
from sae_helpers import DenseKSAE, differences, planted
from sae_reference_kernel import ReferenceKernel

from revelio.sae import optim
from revelio.sae.config import RunConfig, TrainConfig
from revelio.sae.dataloader import Shuffled
from revelio.sae.kernels.base import Codes
from revelio.sae.kernels.native import NativeKernel
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder, best_scale, geometric_median, initialise
from revelio.sae.train import begin, train

MODES = ["fixed", "as_paper", "as_code"]


def rows() -> torch.Tensor:
    return planted(300, 16, 24, 3, noise=0.05)[0] + 2


def trained(mode: str, x: torch.Tensor, settings: TrainConfig, kernel=None, n: int = 128):
    model = KSparseAutoencoder(x.shape[1], n, 4, mode)
    return model, list(train(model, x, settings, kernel=kernel))


def batches_of(x: torch.Tensor, settings: TrainConfig) -> list[torch.Tensor]:
    source, found, epoch = Shuffled(x, settings.batch_size, settings.seed), [], 0
    while len(found) < settings.steps:
        found += list(source.epoch(epoch))
        epoch += 1
    return found[: settings.steps]


def started(mode: str, x: torch.Tensor, settings: TrainConfig, n: int = 128):
    """The same start as a model about to be trained, by training it for no step."""
    model = KSparseAutoencoder(x.shape[1], n, 4, mode)
    begin(model, Shuffled(x, settings.batch_size, settings.seed), settings)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_parameters_and_losses_equal_dense_autograd_with_torch_adam(mode):
    x = rows()
    settings = TrainConfig(steps=60, batch_size=32, warmup_steps=20, learning_rate=1e-3)
    variance = float((x - x.mean(0)).square().mean())
    dense = DenseKSAE(started(mode, x, settings), variance)
    wanted = list(dense.train_on(batches_of(x, settings), 1e-3, 20))
    model, steps = trained(mode, x, settings)
    assert [step.loss for step in steps] == pytest.approx(wanted, rel=2e-6)
    assert max(differences(model, dense).values()) < 1e-6


def test_as_code_loss_curve_equals_the_dense_released_step_to_six_decimals():
    x = planted(256, 32, 40, 4, noise=0.1)[0]
    settings = TrainConfig(steps=200, batch_size=256, warmup_steps=500)
    dense = DenseKSAE(started("as_code", x, settings, n=512), 1.0)
    wanted = list(dense.train_on(batches_of(x, settings), 4e-4, 500))
    _, steps = trained("as_code", x, settings, kernel=SparseKernel(), n=512)
    assert [round(s.loss - w, 6) for s, w in zip(steps, wanted, strict=True)] == [0.0] * 200
    assert wanted[-1] < 0.9 * wanted[0]


def test_the_dense_reference_kernel_gives_the_same_model():
    x, settings = rows(), TrainConfig(steps=40, batch_size=32, warmup_steps=10, auxk=8)
    fast, _ = trained("fixed", x, settings)
    plain, _ = trained("fixed", x, settings, kernel=ReferenceKernel())
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        assert float((a - b).detach().abs().max()) < 1e-6, name


@pytest.mark.parametrize("mode", ["fixed", "as_paper"])
def test_auxk_equals_autograd_of_its_formula(mode):
    x, rectify = rows(), torch.relu if mode == "fixed" else torch.Tensor.clone
    settings = TrainConfig(
        steps=12, batch_size=32, warmup_steps=5, auxk=6, auxk_coefficient=0.5, dead_after=64
    )
    variance = float((x - x.mean(0)).square().mean())
    # In mode as_paper half of the latents are born with negative codes, which AuxK must not keep.
    dense = DenseKSAE(started(mode, x, settings), variance)
    fired, seen = torch.zeros(128), 0

    def aux(own: DenseKSAE, batch: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        dead = seen - fired >= 64
        pre = (batch - own.b_dec) @ own.W_enc + own.b_enc
        kept = pre.topk(4, dim=1)
        code = torch.zeros_like(pre).scatter(1, kept.indices, rectify(kept.values))
        residual = (batch - code @ own.W_dec - own.b_dec).detach()
        seen += len(batch)
        fired[kept.indices[rectify(kept.values) != 0]] = seen
        if not dead.any():
            return torch.zeros(())
        best = pre.masked_fill(~dead, -math.inf).topk(min(6, int(dead.sum())), dim=1)
        guess = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu()) @ own.W_dec
        squared = (guess - residual).square()
        if mode == "as_paper":
            return 0.5 * squared.sum(1).mean()
        return 0.5 * squared.mean() / variance

    list(dense.train_on(batches_of(x, settings), 4e-4, 5, aux))
    model, steps = trained(mode, x, settings)
    assert max(differences(model, dense).values()) < 1e-6
    assert steps[0].auxk_loss == 0
    assert steps[-1].auxk_loss > 0


def test_rows_never_active_are_untouched_and_rows_at_rest_stay_put():
    x = rows()
    model = KSparseAutoencoder(16, 2048, 2, "fixed")
    loop = train(model, x, TrainConfig(steps=450, batch_size=300, warmup_steps=10))
    state = next(loop).state
    before = model.W_enc.detach().clone(), model.W_dec.detach().clone()
    for step in loop:
        if step.step == 350:
            seen = step.samples
            resting = (state.moments.last < 0).nonzero()[:, 0]
            held = model.W_enc[resting].detach().clone()
    never = state.moments.last == 0
    assert 0 < int(never.sum()) < 2048
    assert torch.equal(model.W_enc[never], before[0][never])
    assert torch.equal(model.W_dec[never], before[1][never])
    still = state.fired_at[resting] <= seen
    assert int(still.sum()) > 0
    assert bool((state.moments.last[resting][still] < 0).all())
    assert torch.equal(model.W_enc[resting][still], held[still])


def test_resting_and_waking_rows_follow_the_dense_update():
    """Long idle gaps: the first half of training sees one cluster of rows, then the other, then both."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=draw)
    x[:32, :4] += 6
    x[32:, 4:] += 6
    order = [x[:32]] * 330 + [x[32:]] * 30 + [x] * 30
    settings = TrainConfig(steps=390, warmup_steps=10, learning_rate=1e-3)
    results = []
    for kernel in (SparseKernel(block=8), ReferenceKernel()):
        model = KSparseAutoencoder(8, 64, 2, "fixed")
        rested = False
        for step in train(model, order, settings, kernel=kernel):
            rested |= bool((step.state.moments.last < 0).any())
        results.append((model, rested))
    (fast, rested), (plain, never) = results
    assert rested and not never
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        assert float((a - b).detach().abs().max()) < 2e-6, name


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_in_place_and_rows_picked_are_updated_alike(share, monkeypatch):
    x, settings = rows(), TrainConfig(steps=30, batch_size=32, warmup_steps=10)
    usual, _ = trained("fixed", x, settings, kernel=SparseKernel())
    monkeypatch.setattr(optim, "IN_PLACE_SHARE", share)
    other, _ = trained("fixed", x, settings, kernel=SparseKernel(block=16))
    for a, b in zip(usual.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["fixed", "as_paper"])
def test_decoder_rows_have_unit_length_after_every_step(mode):
    x, settings = rows(), TrainConfig(steps=5, batch_size=64)
    model = KSparseAutoencoder(16, 128, 4, mode)
    for _ in train(model, x, settings):
        torch.testing.assert_close(model.W_dec.detach().norm(dim=1), torch.ones(128))


def test_as_code_does_not_normalise_after_the_last_update():
    model, _ = trained("as_code", rows(), TrainConfig(steps=5, batch_size=64, warmup_steps=0))
    assert float((model.W_dec.detach().norm(dim=1) - 1).abs().max()) > 1e-7


def test_learning_rates_warm_up_as_each_mode_says():
    settings = TrainConfig(steps=3, batch_size=64)
    for mode, first in {"fixed": 1, "as_paper": 1, "as_code": 2}.items():
        _, steps = trained(mode, rows(), settings)
        wanted = [4e-4 * (first + t) / 500 for t in range(3)]
        assert [step.learning_rate for step in steps] == pytest.approx(wanted)


def test_the_learning_rate_falls_to_zero_over_the_last_share_of_the_steps():
    settings = TrainConfig(steps=10, batch_size=64, warmup_steps=2, decay=0.4, learning_rate=1e-3)
    _, steps = trained("fixed", rows(), settings)
    shares = [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [step.learning_rate for step in steps] == pytest.approx([1e-3 * s for s in shares])


def test_a_planted_dictionary_is_found_again():
    x, dictionary = planted(4000, 24, 32, 3)
    model = KSparseAutoencoder(24, 64, 3, "fixed")
    settings = TrainConfig(steps=800, batch_size=256, learning_rate=5e-3, warmup_steps=50)
    last = list(train(model, x, settings))[-1]
    similar = (dictionary @ model.W_dec.detach().T).max(dim=1).values
    assert float((similar > 0.95).float().mean()) > 0.9
    assert last.fvu < 0.05


def test_a_start_is_tied_scaled_and_centred_on_the_mean_or_the_median():
    x = rows()
    model = KSparseAutoencoder(16, 128, 4, "fixed")
    initialise(model, x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.b_dec.detach(), x.mean(0))
    ratio = model.W_enc.detach().norm(dim=1)
    torch.testing.assert_close(ratio, ratio[0].expand(128))
    torch.testing.assert_close(model.W_enc / ratio[0], model.W_dec)
    assert best_scale(model, x) == pytest.approx(1, abs=1e-4)
    # No other factor on the codes reconstructs better.
    with torch.no_grad():
        codes = model.encode(x)
        errors = [
            float((model.decode(Codes(codes.values * factor, codes.indices)) - x).square().sum())
            for factor in (0.9, 1.0, 1.1)
        ]
    assert errors[1] == min(errors)


def test_a_start_as_code_has_the_released_bounds():
    model = KSparseAutoencoder(16, 1024, 4, "as_code")
    initialise(model, rows(), torch.Generator().manual_seed(0), "geometric_median")
    bound = math.sqrt(6 / 1024)
    assert 0.98 * bound < float(model.W_enc.detach().abs().max()) <= bound
    torch.testing.assert_close(model.b_dec.detach(), rows().mean(0))
    assert float((model.W_enc * model.W_dec).detach().sum(1).abs().mean()) < bound


def test_the_geometric_median_has_the_least_sum_of_distances():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=draw)
    x[:5] += 100
    middle = geometric_median(x)
    best = (x - middle).norm(dim=1).sum()
    for _ in range(20):
        other = middle + 0.05 * torch.randn(3, generator=draw)
        assert best <= (x - other).norm(dim=1).sum()


def test_early_stopping_stops_on_a_plateau():
    settings = TrainConfig(
        steps=5000, batch_size=300, early_stop=0.05, early_stop_window=20, warmup_steps=0
    )
    _, steps = trained("fixed", rows(), settings)
    assert len(steps) < 5000
    assert steps[-1].state.stopped
    means = [sum(s.loss for s in steps[i : i + 20]) / 20 for i in range(0, len(steps), 20)]
    assert means[-1] > 0.95 * min(means[:-1])
    assert all(later <= 0.95 * earlier for earlier, later in pairwise(means[:-1]))


def test_a_loss_that_is_not_finite_stops_before_anything_changes():
    x = rows()
    model = KSparseAutoencoder(16, 128, 4, "as_code")
    loop = train(model, [x[:100], x[100:200] * float("nan")], TrainConfig(steps=5))
    next(loop)
    before = model.W_enc.detach().clone()
    with pytest.raises(ValueError, match=r"(?i)nan"):
        next(loop)
    assert torch.equal(before, model.W_enc)


@pytest.mark.parametrize("kernel", [SparseKernel, ReferenceKernel, NativeKernel])
@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("rate", [1e12, 1e18, 1e25, 1e30, 1e300])
def test_a_learning_rate_that_is_too_large_ends_in_its_step_and_remedy_or_in_finite_numbers(
    kernel, steps, rate
):
    for mode, activation, auxk in [
        ("fixed", "topk", 0),
        ("fixed", "topk", 8),
        ("fixed", "batch-topk", 0),
        ("fixed", "jumprelu", 0),
        ("as_paper", "topk", 8),
        ("as_code", "topk", 0),
    ]:
        model = KSparseAutoencoder(16, 64, 4, mode, activation=activation)
        # Of a kind that takes any rate: the loop itself is to notice.
        settings = RunConfig(
            steps=steps, batch_size=32, learning_rate=rate, warmup_steps=0, auxk=auxk, dead_after=32
        )
        try:
            for step in train(model, rows(), settings, kernel=kernel()):
                assert math.isfinite(step.loss) and math.isfinite(step.auxk_loss)
            found = evaluate(model, [rows()])
        except ValueError as error:
            said = str(error)
            named = re.search(r"step \d+", said) and "lower learning_rate" in said
            assert named, said
        else:
            assert math.isfinite(found.fvu)


def test_as_code_takes_a_batch_without_variance_as_no_loss():
    same = torch.ones(4, 16)
    model = KSparseAutoencoder(16, 128, 4, "as_code")
    assert next(train(model, same, TrainConfig(batch_size=4))).loss == 0


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1"),
        ({"auxk": -1}, "auxk=-1"),
        ({"early_stop": 1.0}, "early_stop=1"),
    ],
)
def test_impossible_settings_are_refused(bad, named):
    with pytest.raises(ValueError, match=named):
        TrainConfig(**bad)


def test_auxk_as_code_and_rows_that_run_out_are_refused():
    model = KSparseAutoencoder(16, 128, 4, "as_code")
    with pytest.raises(ValueError, match="no AuxK"):
        next(train(model, rows(), TrainConfig(auxk=2)))
    with pytest.raises(ValueError, match="no rows"):
        next(train(model, [], TrainConfig()))
    with pytest.raises(ValueError, match="same"):
        next(train(KSparseAutoencoder(16, 32, 4), torch.ones(8, 16), TrainConfig()))
