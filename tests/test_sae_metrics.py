import numpy as np
import pytest
import torch
from sae_helpers import loop_decode, loop_encode, random_model

from revelio.sae.metrics import ActivityCounts, evaluate, spread


def test_metrics_equal_numpy_on_dense_codes():
    model = random_model(6, 40, 3)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) + 5
    found = evaluate(model, x.split(7))
    code = loop_encode(model, x)
    rows = x.double().numpy()
    error = loop_decode(model, code) - rows
    active = code > 0
    assert found.rows == 50
    assert found.mse == pytest.approx((error**2).mean(), rel=1e-5)
    assert found.fvu == pytest.approx(
        (error**2).sum() / ((rows - rows.mean(0)) ** 2).sum(), rel=1e-5
    )
    assert found.l0 == pytest.approx(active.sum() / 50)
    assert found.dead_share == pytest.approx((~active.any(0)).mean())
    density = active.mean(0)
    wanted, _ = np.histogram(np.log10(density[density > 0]), bins=found.density["edges"])
    assert found.density["latents"] == wanted.tolist()
    assert sum(wanted) == active.any(0).sum()


def test_a_latent_always_active_is_in_the_last_bin():
    counts = ActivityCounts(3)
    counts.rows, counts.counts = 10, torch.tensor([10, 0, 1])
    assert counts.density_histogram()["latents"][-1] == 1
    assert sum(counts.density_histogram()["latents"]) == 2


def test_spread_keeps_its_digits_under_a_large_offset():
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = spread((x + 1e6).split(100))
    assert found.variance == pytest.approx(x.numpy().var(0).mean(), rel=1e-6)
    assert found.power == pytest.approx(((x + 1e6) ** 2).mean().item(), rel=1e-9)
    assert found.rows == 1000


def test_rows_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        spread([])
    with pytest.raises(ValueError, match="NaN"):
        spread([torch.tensor([[float("nan")]])])
    with pytest.raises(ValueError, match="the same"):
        evaluate(random_model(), [torch.ones(4, 6)])
