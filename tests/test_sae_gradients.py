"""A k-SAE in one's own PyTorch loop, against dense autograd."""

import copy

import pytest
import torch
from sae_helpers import planted, random_model
from torch import Tensor

from revelio.sae.inputs import Input
from revelio.sae.kernels.base import Codes
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
KINDS = ["fixed", "as_paper", "as_code", "batch-topk", "jumprelu"]


def make(kind: str, d: int = 6, n: int = 20, k: int = 3) -> KSparseAutoencoder:
    """Random weights in double precision; the thresholds some that are not zero."""
    mode, activation = (kind, "topk") if kind in KINDS[:3] else ("fixed", kind)
    model = KSparseAutoencoder(d, n, k, mode, activation=activation).double()  # pyright: ignore
    model.load_state_dict(random_model(d, n, k).state_dict(), strict=False)
    if model.threshold is not None:
        model.threshold.copy_(torch.linspace(0.5, 1.5, len(model.threshold)))
    return model


def dense(model: KSparseAutoencoder, x: Tensor, batch: bool = False) -> tuple[Tensor, Tensor]:
    """Codes (b n) and reconstruction, by the formulas."""
    pre = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    if model.threshold is None:
        kept = torch.zeros_like(pre).scatter(1, pre.topk(model.k, dim=1).indices, 1.0)
    elif batch:
        kept = pre >= pre.flatten().topk(len(x) * model.k).values[-1]
    else:
        kept = pre > model.threshold
    code = pre * kept
    code = code.relu() if model.rectifies else code
    return code, code @ model.W_dec + model.b_dec


def spread(codes: Codes, n: int) -> Tensor:
    return codes.values.new_zeros(len(codes.values), n).scatter_add(1, *reversed(codes))


def gradients(loss: Tensor, model: KSparseAutoencoder, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*(getattr(model, name) for name in NAMES), x]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_codes_and_reconstruction_equal_a_dense_autoencoders(kind):
    model = make(kind).eval()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, model.d, generator=draw, dtype=torch.float64).requires_grad_()
    weigh = torch.randn(
        9, model.n, generator=draw, dtype=torch.float64
    )  # codes are in the loss too
    code, guess = dense(model, x)
    wanted = gradients((guess - x).pow(2).mean() + (code * weigh).mean(), model, x)
    codes = model.encode(x)
    torch.testing.assert_close(spread(codes, model.n), code)
    made = model.decode(codes)
    torch.testing.assert_close(made, guess)
    torch.testing.assert_close(model(x), guess)
    loss = (made - x).pow(2).mean() + (spread(codes, model.n) * weigh).mean()
    for got, want in zip(gradients(loss, model, x), wanted, strict=True):
        torch.testing.assert_close(got, want)
        assert want.abs().sum() > 0
    with torch.no_grad():
        fast = model.encode(x)
        assert torch.equal(fast.values, codes.values)
        torch.testing.assert_close(model(x), guess)
    assert not fast.values.requires_grad


def test_gradients_of_preactivations_and_of_normalized_rows_equal_the_formulas():
    about = {"store": "a", "layer": "up_ft1", "timestep": 25, "prompt_policy": "empty", "draw": 0}
    one = Input(about, "per-dimension", (0.5,) * 6, (2.0,) * 6)
    model = KSparseAutoencoder(6, 20, 3, inputs=[one])
    model.load_state_dict(random_model().state_dict())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    _, guess = dense(model, (x - 0.5) / 2)
    wanted = gradients((guess * 2 + 0.5 - x).pow(2).mean(), model, x)
    for got, want in zip(gradients((model(x) - x).pow(2).mean(), model, x), wanted, strict=True):
        torch.testing.assert_close(got, want)
    (got,) = torch.autograd.grad(model.preactivations(x)[:, 4].sum(), x)
    torch.testing.assert_close(got, (model.W_enc[4] / 2).expand(5, 6).detach())


@pytest.mark.parametrize("kind", KINDS[:4])
def test_an_own_loop_learns_as_with_a_dense_autoencoder(kind):
    model = make(kind, 12, 40, 4).train()
    other = copy.deepcopy(model)
    rows = planted(256, 12, 20, 3, noise=0.1)[0].double()
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-2) for one in (model, other)]
    losses = []
    for step in range(20):
        x = rows[step * 12 % 200 :][:32]
        ours, theirs = model(x), dense(other, x, batch=True)[1]
        torch.testing.assert_close(ours, theirs)
        for guess, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (guess - x).square().mean().backward()
            optimizer.step()
        losses.append((ours - x).square().mean().item())
    assert losses[-1] < losses[0] / 2
    for name in NAMES:
        torch.testing.assert_close(getattr(model, name), getattr(other, name))


def test_batch_topks_threshold_follows_an_own_loop_and_only_that():
    model = make("batch-topk")
    assert model.threshold is not None
    model.threshold.zero_()
    draw = torch.Generator().manual_seed(3)
    first, second = (torch.randn(8, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        model(first)
    model.eval()(first)
    assert not model.threshold
    model.train()(first)
    codes = [dense(model, x, batch=True)[0].detach() for x in (first, second)]
    least = [code[code > 0].min().item() for code in codes]
    assert float(model.threshold) == pytest.approx(least[0])
    model(second)
    assert float(model.threshold) == pytest.approx(0.99 * least[0] + 0.01 * least[1])


def test_jumprelu_says_that_its_thresholds_would_not_learn():
    model = make("jumprelu").train()
    loss = model(torch.ones(2, 6)).sum()
    with pytest.raises(ValueError, match=r"thresholds.*revelio\.train.*eval\(\)"):
        loss.backward()
    model.eval()(torch.ones(2, 6)).sum().backward()
    assert model.W_enc.grad is not None


def test_the_native_kernels_copy_follows_another_optimizer():
    model, x = random_model(8, 400, 5), torch.randn(64, 8)
    model.kernel = fastest_kernel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model(x), dense(model, x)[1])
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_frozen_parts_get_no_gradient_and_the_rest_does():
    model = random_model().requires_grad_(False)
    assert not model(torch.ones(2, 6)).requires_grad
    model.W_dec.requires_grad_()
    model(torch.ones(2, 6)).sum().backward()
    assert [name for name in NAMES if getattr(model, name).grad is not None] == ["W_dec"]


def test_latents_that_others_hold_have_no_gradient_here():
    model = random_model()
    model.held = range(10)
    with pytest.raises(ValueError, match=r"10 of the k-SAE's 20 latents.*no_grad"):
        model(torch.ones(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_a_module_like_any_other(dtype):
    model = random_model()
    assert [name for name, _ in model.named_parameters()] == list(NAMES)
    other = KSparseAutoencoder(6, 20, 3)
    other.load_state_dict(model.state_dict())
    moved = other.to(dtype)
    assert moved is other
    assert moved(torch.ones(2, 6)).dtype == dtype
    got, wanted = moved(torch.ones(2, 6)).float(), model(torch.ones(2, 6))
    torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.1)
    moved(torch.ones(2, 6)).float().sum().backward()
    assert all(one.grad is not None and one.grad.dtype == dtype for one in moved.parameters())


def test_training_leaves_eval_mode_so_that_what_follows_is_inference():
    from revelio.sae.config import TrainConfig
    from revelio.sae.train import train

    model = KSparseAutoencoder(12, 40, 4, activation="batch-topk")
    assert model.training
    for step in train(model, planted(64, 12, 20, 3)[0], TrainConfig(steps=2, batch_size=16)):
        assert step.loss > 0
    assert not model.training
