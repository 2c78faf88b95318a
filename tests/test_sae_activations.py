"""Other activations and prefixes against dense autograd with PyTorch's Adam, and on planted data."""

import json

import pytest
import torch
from sae_helpers import planted
from sae_reference_kernel import ReferenceKernel
from torch import Tensor, nn

from revelio.sae.activations import ActivationOutput, BatchTopK, EncodeRequest, JumpReLU
from revelio.sae.checkpoint import load_checkpoint, save_checkpoint
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import Shuffled
from revelio.sae.kernels.base import Codes
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.optim import AdamStep, Moments
from revelio.sae.train import begin, train

N, K = 64, 3
SETTINGS = TrainConfig(steps=25, batch_size=32, warmup_steps=5, learning_rate=2e-3, bandwidth=0.5)


def rows() -> Tensor:
    return planted(200, 12, 20, 3, noise=0.1)[0] + 1


def fresh(**options) -> KSparseAutoencoder:
    return KSparseAutoencoder(12, N, K, **options)


class Step(torch.autograd.Function):
    """z = m + theta where m > 0; theta's gradient through a rectangle of the given width."""

    @staticmethod
    def forward(ctx, pre, theta, width):
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx, gradient):
        pre, theta = ctx.saved_tensors
        inside = ((pre - theta).abs() < ctx.width / 2).float()
        of_theta = -(theta / ctx.width) * inside * gradient
        return gradient * (pre > theta), of_theta.sum(0), None


class Count(torch.autograd.Function):
    """How many are above theta, with the same rectangle."""

    @staticmethod
    def forward(ctx, pre, theta, width):
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return (pre > theta).float()

    @staticmethod
    def backward(ctx, gradient):
        pre, theta = ctx.saved_tensors
        inside = ((pre - theta).abs() < ctx.width / 2).float()
        return None, (-inside / ctx.width * gradient).sum(0), None


class Dense(nn.Module):
    """Every activation by dense formulas."""

    def __init__(self, model: KSparseAutoencoder, variance: float, settings: TrainConfig) -> None:
        super().__init__()
        self.model, self.variance, self.settings = model, variance, settings
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            nn.Parameter(p.detach().clone())
            for p in (model.W_enc, model.b_enc, model.W_dec, model.b_dec)
        )
        start = torch.zeros(N) if model.threshold is None else model.threshold.clone()
        self.theta = nn.Parameter(start)
        self.width = settings.bandwidth * variance**0.5

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = (x - self.b_dec) @ self.W_enc.T + self.b_enc
        if self.model.activation == "jumprelu":
            l0 = Count.apply(pre, self.theta, self.width).sum(1).mean()
            code = Step.apply(pre, self.theta, self.width)
            return code, self.settings.sparsity * (l0 / K - 1) ** 2
        if self.model.activation == "batch-topk":
            cut = pre.flatten().topk(len(x) * K).values[-1]
            return torch.relu(pre * (pre >= cut)), torch.zeros(())
        cut = pre.topk(K, dim=1).values[:, -1:]
        return torch.relu(pre * (pre >= cut)), torch.zeros(())

    def train_on(self, batches: list[Tensor]) -> list[float]:
        adam = torch.optim.Adam(self.parameters(), lr=0.0)
        losses = []
        for t, x in enumerate(batches, start=1):
            adam.param_groups[0]["lr"] = self.settings.learning_rate * min(1.0, t / 5)
            code, penalty = self.code(x)
            found = []
            for prefix in (*self.model.prefixes, N):
                guess = code[:, :prefix] @ self.W_dec[:prefix] + self.b_dec
                found.append((guess - x).square().mean() / self.variance)
            loss = sum(found) / len(found)
            losses.append(loss.item())
            adam.zero_grad()
            (loss + penalty).backward()
            with torch.no_grad():
                self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec
            adam.step()
            with torch.no_grad():
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
                self.theta.clamp_(min=1e-6)
        return losses


OPTIONS = [
    {"activation": "batch-topk"},
    {"activation": "jumprelu"},
    {"prefixes": (8, 24)},
    {"activation": "batch-topk", "prefixes": (5,)},
    {"activation": "jumprelu", "prefixes": (8, 24)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_equals_dense_autograd(options):
    x = rows()
    batches = Shuffled(x, 32)
    start = fresh(**options)
    variance = begin(start, batches, SETTINGS).variance
    dense = Dense(start, variance, SETTINGS)
    order = [batch for epoch in range(4) for batch in batches.epoch(epoch)][:25]
    wanted = dense.train_on(order)
    model = fresh(**options)
    steps = list(train(model, batches, SETTINGS))
    assert [step.loss for step in steps] == pytest.approx(wanted, rel=1e-5)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        difference = (getattr(model, name) - getattr(dense, name)).detach().abs().max()
        assert float(difference) < 3e-6, name
    if model.activation == "jumprelu":
        assert float((model.threshold - dense.theta).detach().abs().max()) < 3e-6
        assert float((model.threshold - start.threshold).abs().max()) > 1e-3
    assert wanted[-1] < wanted[0]


def learnt(activation: str, device: str, go: bool | None, steps: int = 3) -> Tensor:
    """Thresholds after some steps on drawn codes: equal latents, near margins, -inf that fills up."""
    draw = torch.Generator().manual_seed(2)
    margins = 0.2 * torch.randn(33, 7, generator=draw)
    margins[torch.rand(33, 7, generator=draw) < 0.3] = -float("inf")
    margins, pulls = margins.to(device), torch.randn(33, 7, generator=draw).to(device)
    indices = torch.randint(N, (33, 7), generator=draw).to(device)
    output = ActivationOutput(Codes(margins.clamp(min=0), indices), None, margins)
    threshold = torch.full((N if activation == "jumprelu" else 1,), 0.3, device=device)
    rule = BatchTopK(K, N, threshold)
    if activation == "jumprelu":
        rule = JumpReLU(K, N, threshold, range(N), Moments.like(threshold), 0.31, 0.7)
    flag = None if go is None else torch.tensor(go).to(device)
    for t in range(1, steps + 1):
        rule.learn(output, pulls, AdamStep(t, 1e-2, go=flag))
    return threshold


@pytest.mark.parametrize("activation", ["batch-topk", "jumprelu"])
def test_thresholds_learn_without_a_wait_and_stay_where_a_step_is_left_out(activation):
    moved = learnt(activation, "cpu", None)
    assert torch.equal(learnt(activation, "cpu", True), moved)
    still = learnt(activation, "cpu", False)
    assert bool((still == 0.3).all()) and float((moved - 0.3).abs().max()) > 1e-2
    # A tensor without values gives none to the host: whatever asks for one raises.
    assert learnt(activation, "meta", False).is_meta


def test_a_threshold_s_first_step_is_the_loops():
    """Adam's first step goes by the gradient's sign, which loops over codes give; so does the least value."""
    draw = torch.Generator().manual_seed(2)
    margins = 0.2 * torch.randn(33, 7, generator=draw).double()
    margins[torch.rand(33, 7, generator=draw) < 0.3] = -float("inf")
    pulls = torch.randn(33, 7, generator=draw)
    indices = torch.randint(N, (33, 7), generator=draw)
    total, active = [0.0] * N, int((margins > 0).sum())
    for i in range(33):
        for j in range(7):
            if abs(float(margins[i, j])) < 0.31 / 2:
                of_count = -0.7 * 2 * (active / 33 / K - 1) / (K * 33)
                total[indices[i, j]] += (-0.3 * float(pulls[i, j]) + of_count) / 0.31
    wanted = [0.3 - 1e-2 * g / (abs(g) + 1e-8) for g in total]
    assert learnt("jumprelu", "cpu", None, 1).tolist() == pytest.approx(wanted, abs=1e-6)
    least = min(float(m) for m in margins.flatten() if m > 0)
    assert float(learnt("batch-topk", "cpu", None, 1)) == pytest.approx(least)


def test_inference_is_all_above_the_threshold():
    x, model = rows(), fresh(activation="batch-topk")
    list(train(model, x, SETTINGS))
    pre = model.preactivations(x)
    codes = model.encode(x)
    dense = torch.zeros(len(x), N).scatter_add(1, codes.indices, codes.values)
    torch.testing.assert_close(dense, pre * (pre > model.threshold))
    jump = fresh(activation="jumprelu")
    list(train(jump, x, SETTINGS))
    jump.threshold[:7] = 1e-6  # some rows far fuller than 2 k
    pre, codes = jump.preactivations(x), jump.encode(x)
    dense = torch.zeros(len(x), N).scatter_add(1, codes.indices, codes.values)
    torch.testing.assert_close(dense, pre * (pre > jump.threshold))


KERNELS = {"sparse": SparseKernel, "reference": ReferenceKernel, "fastest": None}


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_rows_have_no_codes(options, kernel):
    model = fresh(**options)
    made = KERNELS[kernel]
    model.kernel = made() if made else fastest_kernel(model)
    none, latents = rows()[:0], torch.tensor([1, 5])
    # As PyTorch's own top k of no rows: no rows of at least one code.
    for codes in (model.encode(none), model.encode(none, latents=latents)):
        assert codes.values.shape == codes.indices.shape and len(codes.values) == 0
        assert codes.values.shape[1] >= 1 and model.decode(codes).shape == none.shape
    request = EncodeRequest(model.kernel, model.centre(none), model.weights)
    kept = model.rule(bandwidth=0.5).keep(request)
    assert len(kept.codes.values) == 0 and kept.dead is None


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_l0_stays_near_k_and_the_error_falls(options):
    x, _ = planted(2000, 24, 32, 3)
    settings = TrainConfig(steps=300, batch_size=256, learning_rate=5e-3, warmup_steps=20)
    model = KSparseAutoencoder(24, 64, 3, **options)
    steps = list(train(model, x, settings))
    found = evaluate(model, x.split(512))
    assert found.l0 == pytest.approx(3, rel=0.25)
    assert found.fvu < 0.5 * steps[0].fvu
    assert found.fvu < 0.25


def test_the_first_latents_alone_reconstruct_with_prefixes():
    x, _ = planted(2000, 24, 32, 3)
    settings = TrainConfig(steps=300, batch_size=256, learning_rate=5e-3, warmup_steps=20)
    errors = []
    for prefixes in ((), (8,)):
        model = KSparseAutoencoder(24, 64, 3, prefixes=prefixes)
        list(train(model, x, settings))
        with torch.no_grad():
            codes = model.encode(x)
            dense = torch.zeros(len(x), 64).scatter(1, codes.indices, codes.values)
            guess = dense[:, :8] @ model.W_dec[:8] + model.b_dec
            errors.append(float((guess - x).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_auxk_reaches_dead_latents_with_every_activation():
    settings = TrainConfig(steps=20, batch_size=32, auxk=4, dead_after=64)
    for options in OPTIONS[:3]:
        fast, plain = fresh(**options), fresh(**options)
        steps = list(train(fast, rows(), settings))
        list(train(plain, rows(), settings, kernel=ReferenceKernel()))
        assert steps[-1].auxk_loss > 0
        for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
            assert float((a - b).detach().abs().max()) < 3e-6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_loaded_and_resumed_bit_equal(options, tmp_path):
    whole = fresh(**options)
    list(train(whole, rows(), SETTINGS))
    stopped = fresh(**options)
    for step in train(stopped, rows(), SETTINGS):
        if step.step == 11:
            save_checkpoint(tmp_path, stopped, step.state)
            break
    resumed = fresh(**options)
    state = load_checkpoint(tmp_path, resumed)
    list(train(resumed, rows(), SETTINGS, state))
    whole.save_pretrained(tmp_path / "final")
    config = json.loads((tmp_path / "final/config.json").read_text())
    assert config["format"] == 2
    loaded = KSparseAutoencoder.from_pretrained(tmp_path / "final")
    assert loaded.settings() == whole.settings()
    for other in (resumed, loaded):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_plain_topk_is_saved_as_before(tmp_path):
    fresh().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 1
    assert "activation" not in config and "prefixes" not in config


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"activation": "relu"}, "'relu'"),
        ({"activation": "jumprelu", "mode": "as_code"}, "mode as_code"),
        ({"prefixes": (8,), "mode": "as_paper"}, "mode as_paper"),
        ({"prefixes": (8, 4)}, "ascending"),
        ({"prefixes": (64,)}, "from 1 to 63"),
    ],
)
def test_impossible_choices_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        fresh(**options)
