"""Noise keyed by image, the closed form against diffusers' schedulers, timesteps of equal noise."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from revelio.backbones.noise import (
    add_noise,
    check_timestep,
    keyed_noise,
    match_timestep,
    reference_schedule,
    signal_to_noise,
)

SHAPE = (4, 6, 6)


def noise(ids, **changes):
    key = {"seed": 0, "timestep": 25, "draw": 0} | changes
    return keyed_noise(SHAPE, ids, **key)


def test_noise_of_an_image_is_bit_equal_in_any_batch_and_order():
    alone = noise(["b"])[0]
    assert torch.equal(noise(["a", "b", "c"])[1], alone)
    assert torch.equal(noise(["c", "a", "b"])[2], alone)
    assert not torch.equal(noise(["a"])[0], alone)


@pytest.mark.parametrize("change", [{"seed": 1}, {"timestep": 26}, {"draw": 1}])
def test_noise_changes_with_every_part_of_its_key(change):
    one, other = noise(["a"]), noise(["a"], **change)
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.4


def test_noise_is_standard_gaussian():
    values = keyed_noise((4, 32, 32), [str(i) for i in range(32)], seed=3, timestep=1, draw=0)
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    assert values.dtype == torch.float32 and values.shape == (32, 4, 32, 32)
    assert noise([]).shape == (0, *SHAPE)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("timestep", [0, 25, 500, 999])
def test_add_noise_is_the_schedulers_own(schedule, timestep):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=schedule)
    clean, drawn = torch.randn(2, *SHAPE), noise(["a", "b"])
    expected = scheduler.add_noise(clean, drawn, torch.tensor([timestep] * 2))
    ours = add_noise(clean, drawn, scheduler.alphas_cumprod, timestep)
    torch.testing.assert_close(ours, expected)


def test_add_noise_starts_from_half_precision_in_float32():
    clean = torch.randn(1, *SHAPE).half()
    ours = add_noise(clean, noise(["a"]), reference_schedule("scaled_linear"), 25)
    assert ours.dtype == torch.float32
    kept = float(reference_schedule("scaled_linear")[25])
    expected = math.sqrt(kept) * clean.double() + math.sqrt(1 - kept) * noise(["a"]).double()
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        ("linear", {"beta_start": 0.0001, "beta_end": 0.02}),
        ("cosine", {}),
    ],
)
def test_reference_schedules_are_diffusers_own(name, betas):
    theirs = "squaredcos_cap_v2" if name == "cosine" else name
    expected = DDPMScheduler(beta_schedule=theirs, **betas).alphas_cumprod.double()
    torch.testing.assert_close(reference_schedule(name), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "timestep", "deviation", "ratio"),
    [
        ("scaled_linear", 0, 0.029, 1175),
        ("scaled_linear", 25, 0.153, 41.8),
        ("scaled_linear", 200, 0.496, 3.06),
        ("linear", 25, 0.095, 110),
        ("linear", 200, 0.586, 1.91),
        ("cosine", 25, 0.051, 376),
        ("cosine", 200, 0.320, 8.8),
    ],
)
def test_noise_levels_of_the_specification(name, timestep, deviation, ratio):
    kept = reference_schedule(name)
    assert float((1 - kept[timestep]).sqrt()) == pytest.approx(deviation, abs=6e-4)
    assert float(signal_to_noise(kept)[timestep]) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(
    ("timestep", "schedule", "expected"),
    [(25, "linear", 43), (25, "cosine", 90), (200, "linear", 163), (200, "cosine", 324)],
)
def test_matched_timesteps_of_the_specification(timestep, schedule, expected):
    own = reference_schedule(schedule)
    assert match_timestep(timestep, reference_schedule("scaled_linear"), own) == expected


@settings(deadline=None)
@given(st.integers(0, 999))
def test_a_schedule_matches_itself(timestep):
    own = reference_schedule("scaled_linear")
    assert match_timestep(timestep, own, own) == timestep


@pytest.mark.parametrize(
    ("timestep", "words"),
    [
        (None, "give a timestep"),
        (1000, "outside"),
        (-1, "outside"),
        (True, "no"),
    ],
)
def test_wrong_timesteps_are_named(timestep, words):
    with pytest.raises(ValueError, match=words) as error:
        check_timestep(timestep, 1000, "sd-1.5")
    assert "sd-1.5" in str(error.value) and "999" in str(error.value)
    assert check_timestep(999, 1000, "sd-1.5") == 999


def test_an_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="scaled_linear, linear, cosine"):
        reference_schedule("sigmoid")
