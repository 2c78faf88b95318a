"""Noise keyed by image, the closed form and predictions against diffusers' schedulers, equal noise."""

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from revelio.backbones.diffusion.schedule import (
    Schedule,
    check_timestep,
    keyed_noise,
    reference_schedule,
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
    schedule = Schedule.ddpm(scheduler.alphas_cumprod)
    torch.testing.assert_close(schedule.add_noise(clean, drawn, timestep), expected)
    mixed = torch.tensor([timestep, 7])
    expected = scheduler.add_noise(clean, drawn, mixed)
    torch.testing.assert_close(schedule.add_noise(clean, drawn, mixed), expected)


def test_add_noise_starts_from_half_precision_in_float32():
    clean = torch.randn(1, *SHAPE).half()
    ours = reference_schedule("scaled_linear").add_noise(clean, noise(["a"]), 25)
    assert ours.dtype == torch.float32
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = float((1 - betas).cumprod(0)[25])
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
    kept = DDPMScheduler(beta_schedule=theirs, **betas).alphas_cumprod.double()
    ours = reference_schedule(name)
    torch.testing.assert_close(ours.alphas.double() ** 2, kept, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.sigmas.double() ** 2, 1 - kept, atol=1e-6, rtol=1e-4)


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
    found = reference_schedule(name)
    assert float(found.sigmas[timestep]) == pytest.approx(deviation, abs=6e-4)
    assert float(found.snr(timestep)) == pytest.approx(ratio, rel=0.01)
    assert float(found.snr(torch.tensor([3, timestep]))[1]) == float(found.snr(timestep))


@pytest.mark.parametrize(
    ("timestep", "schedule", "expected"),
    [(25, "linear", 43), (25, "cosine", 90), (200, "linear", 163), (200, "cosine", 324)],
)
def test_matched_timesteps_of_the_specification(timestep, schedule, expected):
    own = reference_schedule(schedule)
    assert own.match(reference_schedule("scaled_linear"), timestep) == expected


@settings(deadline=None)
@given(st.integers(0, 999))
def test_a_schedule_matches_itself(timestep):
    own = reference_schedule("scaled_linear")
    assert own.match(own, timestep) == timestep


@pytest.mark.parametrize(
    ("timestep", "words"),
    [(None, "give a timestep"), (1000, "outside"), (-1, "outside"), (True, "no")],
)
def test_wrong_timesteps_are_named(timestep, words):
    with pytest.raises(ValueError, match=words) as error:
        check_timestep(timestep, 1000, "sd-1.5")
    assert "sd-1.5" in str(error.value) and "999" in str(error.value)
    assert check_timestep(999, 1000, "sd-1.5") == 999


def test_an_unknown_schedule_lists_the_known():
    with pytest.raises(ValueError, match="scaled_linear, linear, cosine"):
        reference_schedule("sigmoid")


FLOW = Schedule.rectified_flow(1000, 3.0)
NEARLY = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_rectified_flow_is_the_flow_matching_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = Schedule.rectified_flow(1000, shift)
    torch.testing.assert_close(ours.sigmas, scheduler.sigmas[:1000].flip(0))
    torch.testing.assert_close(ours.times, scheduler.timesteps.flip(0))
    clean, drawn = torch.randn(2, *SHAPE), noise(["a", "b"])
    times = ours.times[torch.tensor([200, 800])]
    expected = scheduler.scale_noise(clean, times, drawn)
    torch.testing.assert_close(ours.add_noise(clean, drawn, torch.tensor([200, 800])), expected)


def zero_terminal() -> DDPMScheduler:
    return DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        zero_terminal(),
        DDPMScheduler(trained_betas=np.linspace(0.0005, 0.01, 1000)),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_predictions_are_turned_round_as_diffusers_does(scheduler, prediction):
    """The scheduler's own formula for x_0 with another number format; the noise by substitution."""
    schedule = Schedule.ddpm(scheduler.alphas_cumprod, prediction)
    clean, drawn = torch.randn(3, *SHAPE), noise(["a", "b", "c"])
    steps = torch.tensor([5, 400, 990])
    x_t = schedule.add_noise(clean, drawn, steps)
    output = {
        "epsilon": drawn,
        "sample": clean,
        "v_prediction": scheduler.get_velocity(clean, drawn, steps),
    }[prediction]
    loose = {"atol": 2e-3, "rtol": 1e-3} if prediction != "v_prediction" else NEARLY
    torch.testing.assert_close(schedule.x0(output, x_t, steps), clean, **loose)
    torch.testing.assert_close(schedule.epsilon(output, x_t, steps), drawn, **loose)
    for image, step in enumerate(steps.tolist()):
        part = slice(image, image + 1)
        one = schedule.x0(output[part], x_t[part], step)
        torch.testing.assert_close(one, clean[part], **loose)


@settings(deadline=None)
@given(st.integers(0, 999))
def test_a_flow_gives_back_image_and_noise(timestep):
    clean, drawn = torch.randn(1, *SHAPE), noise(["a"])
    x_t = FLOW.add_noise(clean, drawn, timestep)
    torch.testing.assert_close(FLOW.x0(drawn - clean, x_t, timestep), clean, **NEARLY)
    torch.testing.assert_close(FLOW.epsilon(drawn - clean, x_t, timestep), drawn, **NEARLY)


def test_the_last_step_of_a_zero_terminal_schedule_is_all_noise():
    schedule = Schedule.ddpm(zero_terminal().alphas_cumprod)
    clean, drawn = torch.randn(1, *SHAPE), noise(["a"])
    assert torch.equal(schedule.add_noise(clean, drawn, 999), drawn)
    assert float(schedule.snr(999)) < 1e-30
    with pytest.raises(ValueError, match="at timestep 999, where only one is left"):
        schedule.x0(drawn, drawn, 999)
    velocity = Schedule.ddpm(zero_terminal().alphas_cumprod, "v_prediction")
    torch.testing.assert_close(velocity.x0(-clean, drawn, 999), clean)
    assert velocity.match(schedule, 999) == 999 and FLOW.match(schedule, 999) == 999


def test_equal_noise_of_a_flow_and_a_ddpm():
    """With sigma = 0.5 a flow's ratio is 1, which DDPM has where half the variance is noise."""
    half = int((FLOW.sigmas - 0.5).abs().argmin())
    own = reference_schedule("scaled_linear")
    assert abs(float(own.alphas[own.match(FLOW, half)]) ** 2 - 0.5) < 2e-3


@pytest.mark.parametrize(
    ("alphas", "sigmas"),
    [([], []), ([1.0], [1.0, 2.0]), ([-1.0], [1.0]), ([0.0], [0.0]), ([math.nan], [1.0])],
)
def test_what_is_no_forward_process_is_refused(alphas, sigmas):
    with pytest.raises(ValueError, match="alphas"):
        Schedule(torch.tensor(alphas), torch.tensor(sigmas))


def test_an_unknown_prediction_lists_the_known():
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample, flow"):
        Schedule(torch.ones(2), torch.ones(2), "score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from 0 to 1"):
        Schedule.ddpm(torch.tensor([0.9, 1.1]))
