"""The k-SAE on CUDA: its search against float64, its steps against the CPU's, no waits, same bits twice."""

import warnings
from copy import deepcopy
from dataclasses import fields
from typing import Any

import pytest
import torch
from device_helpers import TRAININGS, check_training
from sae_helpers import planted
from test_sae_optim import D, Dense, gradient

from revelio.sae import feeding
from revelio.sae.checkpoint import load_checkpoint, save_checkpoint
from revelio.sae.config import TrainConfig
from revelio.sae.kernels.base import Gradient, Weights
from revelio.sae.kernels.select import choose_kernel
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.optim import AdamRows, AdamStep
from revelio.sae.train import train


def kernel():
    return choose_kernel("triton", "cuda").kernel


def weights(n: int, d: int, seed: int = 0, spread: float = 1.0) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(n, d, generator=draw) * torch.exp(
        spread * torch.randn(n, 1, generator=draw)
    )
    b_enc = 0.3 * torch.randn(n, generator=draw)
    W_dec, b_dec = torch.randn(n, d, generator=draw), torch.zeros(d)
    return Weights(*(w.cuda() for w in (W_enc, b_enc, W_dec, b_dec)))


def check_search(x: torch.Tensor, w: Weights, k: int, among=None, k_among: int = 0) -> None:
    """Values equal float64's best ones, and every latent chosen has the value that is claimed for it."""
    best, others = kernel().encode(x, w, k, among, k_among)
    scores = x.double() @ w.W_enc.double().T + w.b_enc.double()
    pairs = [(best, scores, k)]
    if others is not None:
        pairs.append((others, scores.masked_fill(~among, float("-inf")), k_among))
    for codes, wanted, count in pairs:
        size = 1e-5 * (x.norm(dim=1, keepdim=True) * w.W_enc.norm(dim=1).max()).double() + 1e-6
        found = codes.values.double()
        assert found.shape == (len(x), count)
        assert ((found - wanted.topk(count).values).abs() <= size).all()
        assert ((found - wanted.gather(1, codes.indices)).abs() <= size).all()
        assert (codes.indices.sort(1).values.diff(dim=1) > 0).all()  # each latent once


@pytest.mark.parametrize(
    ("b", "d", "n", "k"),
    [(1, 8, 8, 8), (7, 24, 300, 5), (130, 33, 5000, 32), (64, 1280, 8192, 32), (9, 384, 20000, 64)],
)
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_search_finds_the_best_latents(b, d, n, k, spread) -> None:
    x = torch.randn(b, d, generator=torch.Generator().manual_seed(1)).cuda()
    x *= torch.exp(3 * torch.randn(b, 1, generator=torch.Generator().manual_seed(2))).cuda()
    among = (torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.6).cuda()
    among[: min(k, n)] = True
    check_search(x, weights(n, d, spread=spread), k, among, min(4, k))


@pytest.mark.parametrize(
    ("b", "d", "n", "k", "spread"),
    [
        (1, 64, 2000, 3, 0.3),
        (300, 1280, 20_000, 32, 0.0),
        (4500, 384, 20_000, 64, 0.3),
        (130, 100, 5000, 8, 1.0),
    ],
)
def test_selection_within_the_product_gives_the_bits_of_that_after_it(b, d, n, k, spread) -> None:
    w, x = weights(n, d, spread=spread), torch.randn(b, d).cuda()
    after, within = (cuda_kernel(how).encode(x, w, k)[0] for how in ("after", "within"))
    assert torch.equal(after.indices, within.indices)
    assert torch.equal(after.values, within.values)


def test_the_faster_selection_is_chosen_at_the_third_batch() -> None:
    w, x, tried = (
        weights(1 << 14, 256, spread=0.0),
        torch.randn(256, 256).cuda(),
        cuda_kernel("auto"),
    )
    for batch in range(4):
        tried.encode(x, w, 32)
        assert bool(tried.nomination.milliseconds) == (batch >= 2)
    # Both ways were taken; one whose result differed would be missing.
    (times,) = tried.nomination.milliseconds.values()
    assert len(times) >= 2 and min(times.values()) > 0


def cuda_kernel(how: Any) -> Any:
    from revelio.sae.kernels.cuda import CudaKernel

    return CudaKernel(how)


def test_large_requests_take_whole_products() -> None:
    x = torch.randn(5, 16).cuda()
    check_search(x, weights(2000, 16), 400)


def test_near_ties_and_equal_latents_go_to_the_lower_index() -> None:
    base = weights(40, 64)
    W_enc = base.W_enc.repeat_interleave(100, 0).contiguous()  # every latent a hundred times
    w = Weights(W_enc, torch.zeros(4000).cuda(), W_enc, base.b_dec)
    x = torch.randn(6, 64).cuda()
    best, _ = kernel().encode(x, w, 150)
    scores = (x @ base.W_enc.T).argsort(1, descending=True)
    for row, order in zip(best.indices.tolist(), scores.tolist(), strict=True):
        wanted = [100 * order[0] + i for i in range(100)] + [100 * order[1] + i for i in range(50)]
        assert row == wanted
    W_enc = base.W_enc[:1] + 1e-5 * torch.randn(4000, 64).cuda()
    check_search(x, Weights(W_enc.contiguous(), w.b_enc, W_enc, base.b_dec), 32)


def test_rows_of_zeros_and_huge_or_tiny_ones() -> None:
    x = torch.randn(4, 32).cuda()
    x[0] = 0
    x[1] *= 1e15
    x[2] *= 1e-30
    check_search(x[:1], weights(3000, 32), 8)
    check_search(x[2:], weights(3000, 32), 8)
    best, _ = kernel().encode(x, weights(3000, 32), 8)
    assert best.values.isfinite().all()


def test_encoder_rows_that_float16_does_not_hold() -> None:
    w = weights(3000, 32)
    w.W_enc[7] *= 1e6
    w.W_enc[9] = 1e8
    x = torch.randn(5, 32).cuda()
    x[0] = 0
    for k in (1, 8):
        best, _ = kernel().encode(x, w, k)
        scores = x.double() @ w.W_enc.double().T + w.b_enc.double()
        assert torch.equal(best.indices, scores.topk(k).indices)


def test_no_rows_and_settings_that_would_round_the_sums() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = matmul.allow_fp16_reduced_precision_reduction = True
    check_search(torch.randn(3, 1280).cuda(), weights(5000, 1280), 300)  # whole products
    check_search(torch.randn(3, 1280).cuda(), weights(5000, 1280), 32)
    assert matmul.allow_tf32 and matmul.allow_fp16_reduced_precision_reduction
    best, _ = kernel().encode(torch.randn(0, 16).cuda(), weights(40, 16), 4)
    assert best.values.shape == (0, 4)


def test_a_model_that_moves_in_training_is_recorded_anew() -> None:
    x, _ = planted(512, 32, 60, 4, noise=0.1)
    settings, models, blocks = TrainConfig(steps=30, batch_size=128), [], []
    for moves in (False, True):
        model = KSparseAutoencoder(32, 2048, 8).cuda()
        for step in train(model, x.cuda(), settings, kernel=kernel()):
            if moves and step.step == 15:
                model.cpu()
                torch.cuda.empty_cache()
                blocks = [torch.ones(2048, 32, device="cuda") for _ in range(8)]
                model.cuda()
        models.append(model)
    assert all(bool((block == 1).all()) for block in blocks)  # what now lies at the old addresses
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one() -> None:
    x, _ = planted(256, 32, 60, 4, noise=0.1)
    models = []
    for device in ("cuda:0", "cuda:1"):
        model = KSparseAutoencoder(32, 512, 8).to(device)
        for _step in train(model, x.to(device), TrainConfig(steps=20, batch_size=64)):
            pass
        models.append(model.cpu())
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert float((a - b).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("changes", TRAININGS, ids=str)
def test_training_equals_the_dense_kernels_on_the_cpu(changes) -> None:
    check_training(changes, "cuda", kernel())


def test_the_same_seed_gives_the_same_bits() -> None:
    x, _ = planted(512, 32, 60, 4, noise=0.1)
    runs = []
    for _ in range(2):
        model = KSparseAutoencoder(32, 2048, 8).cuda()
        for _step in train(model, x.cuda(), TrainConfig(steps=50, batch_size=128), kernel=kernel()):
            pass
        runs.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(run.parameters() for run in runs), strict=True))


@pytest.mark.parametrize(
    ("prefixes", "auxk", "waits"), [((), 0, 0), ((64, 256, 1024), 0, 1), ((), 16, 0)]
)
def test_a_step_does_not_wait_for_the_device(prefixes, auxk, waits) -> None:
    x, _ = planted(512, 32, 60, 4, noise=0.1)
    model = KSparseAutoencoder(32, 2048, 8, prefixes=prefixes).cuda()
    steps = train(model, x.cuda(), TrainConfig(steps=50, batch_size=128, auxk=auxk, dead_after=256))
    for _ in range(5):
        next(steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step = next(steps)  # within an epoch: its beginning copies the order
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    places = [place for place in places if "cuda/__init__" not in place]
    assert len(places) == waits, places
    assert 0 < step.loss < 10


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["copied", "moved"])
def test_rows_on_the_host_give_the_bits_of_rows_on_the_device(share, monkeypatch) -> None:
    monkeypatch.setattr(feeding, "SHARE", share)
    x, _ = planted(500, 32, 60, 4, noise=0.1)
    models = []
    for rows in (x, x.cuda()):
        model = KSparseAutoencoder(32, 512, 8).cuda()
        model.mode = (
            "as_paper"  # no variance of the set, whose sums the two devices round differently
        )
        for _step in train(model, rows, TrainConfig(steps=30, batch_size=64), kernel=kernel()):
            pass
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_a_loss_that_is_not_finite_changes_no_weight_and_is_said() -> None:
    x, _ = planted(64, 16, 30, 4)

    class Batches:
        def epoch(self, index: int):
            """Five good batches, then an epoch whose first row is damaged."""
            damaged = x.clone()
            damaged[3, 2] = float("nan")
            yield from [x.cuda()] * 5 if index == 0 else [damaged.cuda(), x.cuda(), x.cuda()]

    model = KSparseAutoencoder(16, 64, 4).cuda()
    steps = train(model, Batches(), TrainConfig(steps=9, batch_size=64), kernel=kernel())
    for _ in range(5):
        next(steps)
    before = deepcopy(model)
    sixth = next(steps)
    with pytest.raises(ValueError, match="step 6 is not finite"):
        print(sixth.loss)
    next(steps)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )


def test_a_checkpoint_goes_on_with_the_same_bits_and_on_the_cpu(tmp_path) -> None:
    x, _ = planted(256, 16, 30, 4, noise=0.05)
    settings = TrainConfig(steps=40, batch_size=64, warmup_steps=5)
    whole = KSparseAutoencoder(16, 256, 4).cuda()
    for step in train(whole, x.cuda(), settings, kernel=kernel()):
        if step.step == 17:
            (tmp_path / "kept").mkdir()
            save_checkpoint(tmp_path / "kept", whole, step.state)
    for device in ("cuda", "cpu"):
        model = KSparseAutoencoder(16, 256, 4).to(device)
        state = load_checkpoint(tmp_path / "kept", model)
        used = kernel() if device == "cuda" else SparseKernel()
        for _step in train(model, x.to(device), settings, state, used):
            pass
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            if device == "cuda":
                assert torch.equal(a, b)
            assert float((a.cpu() - b.cpu()).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("unit", [True, False])
def test_rows_rest_and_wake_as_in_the_dense_update(unit: bool) -> None:
    """Prescribed gradients over 900 steps against the textbook in float64; rows rest, wake and share."""
    n, rate = 40, 1e-3
    draw = torch.Generator().manual_seed(n)
    start = torch.randn(2, n, D, generator=draw)
    start[1] /= start[1].norm(dim=1, keepdim=True)
    host = Weights(start[0].clone(), torch.zeros(n), start[1].clone(), torch.zeros(D))
    own = Weights(*(w.cuda() for w in (host.W_enc, host.b_enc, host.W_dec, host.b_dec)))
    moments = AdamRows.start(own.W_enc, own.W_dec, own.b_enc, own.b_dec)
    dense, used = Dense(host), kernel()
    phases = [(range(20), 60), (range(10, 12), 500), (range(15, 30), 40), (range(3), 300)]
    t, rested = 0, 0
    for active, steps in phases:
        for _ in range(steps):
            t += 1
            step = AdamStep(t, rate * min(1, t / 50), unit_norm=unit)
            terms = gradient(t, list(active))
            on = {f.name: getattr(terms, f.name).cuda() for f in fields(terms)}
            used.update(own, moments, Gradient(**on), step)
            dense.update(terms, step)
        rested = max(rested, int((moments.last < 0).sum()))
    assert rested > 0
    for name in ("W_enc", "W_dec"):
        found = getattr(own, name).cpu().double().numpy()
        assert abs(found - dense.W[name]).max() < 2e-5, name
