"""The native kernel against a same-order numpy step, a dense autograd step, and interrupted runs."""

import pytest
import torch
from sae_helpers import DenseKSAE, planted
from sae_reference_kernel import ReferenceKernel
from sae_same_order import SameOrderKernel

from revelio.sae.checkpoint import load_checkpoint, save_checkpoint
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import Shuffled
from revelio.sae.kernels.build import INSTRUCTION_SETS
from revelio.sae.kernels.native import NativeKernel
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import begin, train

MODES = ["fixed", "as_paper", "as_code"]


def rows(d: int = 20) -> torch.Tensor:
    return planted(300, d, 24, 3, noise=0.05)[0] + 2


def trained(kernel, mode: str, settings: TrainConfig, x: torch.Tensor, n: int = 96, k: int = 4):
    model = KSparseAutoencoder(x.shape[1], n, k, mode)
    return model, list(train(model, x, settings, kernel=kernel))


def same(a: KSparseAutoencoder, b: KSparseAutoencoder) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_steps_equal_the_dense_same_order_step_bit_for_bit(mode):
    settings = TrainConfig(steps=200, batch_size=12, warmup_steps=20, learning_rate=1e-3)
    native, steps = trained(NativeKernel(1), mode, settings, rows())
    plain, wanted = trained(SameOrderKernel(), mode, settings, rows())
    assert [step.loss for step in steps] == [step.loss for step in wanted]
    assert same(native, plain)


def test_auxk_equals_the_dense_same_order_step_bit_for_bit():
    settings = TrainConfig(steps=40, batch_size=20, warmup_steps=5, auxk=8, dead_after=60)
    native, steps = trained(NativeKernel(2), "fixed", settings, rows())
    plain, _ = trained(SameOrderKernel(), "fixed", settings, rows())
    assert steps[-1].auxk_loss > 0
    assert same(native, plain)


def test_rows_that_rest_and_wake_equal_the_dense_step_bit_for_bit():
    """One cluster of rows, for long the other, then the first again: its latents rest, then wake."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=draw)
    x[:8, :4] += 6
    x[8:, 4:] += 6
    order = [x] * 5 + [x[:8]] * 330 + [x[8:]] * 15 + [x] * 15
    settings = TrainConfig(steps=365, warmup_steps=10, learning_rate=1e-3)
    models, rested, woken = [], False, False
    for kernel in (NativeKernel(1), SameOrderKernel()):
        model, before = KSparseAutoencoder(8, 32, 2, "fixed"), None
        for step in train(model, order, settings, kernel=kernel):
            last = step.state.moments.last.clone()
            rested |= bool((last < 0).any())
            woken |= before is not None and bool(((before < 0) & (last > 0)).any())
            before = last
        models.append(model)
    assert rested and woken
    assert same(*models)


@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_threads_changes_no_bit(mode):
    x = rows(33)
    settings = TrainConfig(steps=40, batch_size=50, warmup_steps=5, auxk=0)
    one, _ = trained(NativeKernel(1), mode, settings, x, n=700)
    for threads in (2, 5):
        assert same(one, trained(NativeKernel(threads), mode, settings, x, n=700)[0])


@pytest.mark.parametrize("mode", MODES)
def test_the_instruction_set_changes_no_bit(mode, monkeypatch):
    x, models, used = rows(33), [], set()
    auxk = 0 if mode == "as_code" else 8
    settings = TrainConfig(steps=40, batch_size=50, warmup_steps=5, auxk=auxk, dead_after=200)
    for name in INSTRUCTION_SETS:
        monkeypatch.setenv("REVELIO_NATIVE", name)
        kernel = NativeKernel(2)
        used.add(kernel.instructions)
        models.append(trained(kernel, mode, settings, x, n=700)[0])
    assert "avx2" in used
    assert all(same(models[0], other) for other in models[1:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", [ReferenceKernel, SparseKernel])
def test_the_model_is_that_of_the_other_kernels(mode, other):
    settings = TrainConfig(steps=40, batch_size=32, warmup_steps=10, learning_rate=1e-3)
    native, _ = trained(NativeKernel(), mode, settings, rows())
    plain, _ = trained(other(), mode, settings, rows())
    for a, b in zip(native.parameters(), plain.parameters(), strict=True):
        assert float((a - b).detach().abs().max()) < 1e-6


def test_as_code_loss_curve_equals_the_dense_released_step_to_six_decimals():
    # Few choices, so that none is so near a tie (1e-7) that another order of sums would choose otherwise.
    x = planted(48, 32, 40, 4, noise=0.1)[0]
    settings = TrainConfig(steps=200, batch_size=48, warmup_steps=500)
    model = KSparseAutoencoder(32, 128, 4, "as_code")
    begin(model, Shuffled(x, 48, 0), settings)
    dense = DenseKSAE(model, 1.0)
    source = Shuffled(x, 48, 0)
    batches = [batch for epoch in range(200) for batch in source.epoch(epoch)]
    wanted = list(dense.train_on(batches, 4e-4, 500))
    _, steps = trained(NativeKernel(), "as_code", settings, x, n=128)
    assert [round(s.loss - w, 6) for s, w in zip(steps, wanted, strict=True)] == [0.0] * 200
    assert wanted[-1] < 0.9 * wanted[0]


def test_a_resumed_run_is_bit_equal(tmp_path):
    x = rows()
    settings = TrainConfig(steps=60, batch_size=32, warmup_steps=10, auxk=4, dead_after=200)
    whole, _ = trained(NativeKernel(), "fixed", settings, x)
    model = KSparseAutoencoder(20, 96, 4, "fixed")
    for step in train(model, x, settings, kernel=NativeKernel()):
        if step.step == 37:
            save_checkpoint(tmp_path, model, step.state)
            break
    again = KSparseAutoencoder(20, 96, 4, "fixed")
    state = load_checkpoint(tmp_path, again)
    list(train(again, x, settings, state, kernel=NativeKernel()))
    assert same(whole, again)


def test_training_is_native_by_default_and_encoding_stays_plain(monkeypatch):
    made = []
    start = NativeKernel.__init__
    monkeypatch.setattr(NativeKernel, "__init__", lambda self: made.append(self) or start(self))
    model = KSparseAutoencoder(20, 96, 4)
    list(train(model, rows(), TrainConfig(steps=2, batch_size=32)))
    assert len(made) == 1
    assert isinstance(model.kernel, SparseKernel)
