"""Noise on latents: closed forms, and parity with diffusers' own schedulers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from dalleflamingo.generator import NoisyLatents, add_noise

LATENTS = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scheduler(prediction_type: str = "epsilon", **options) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear", **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_latents_and_target_equal_diffusers_to_the_bit(kind, prediction_type, dtype):
    own, latents = kind.from_config(scheduler(prediction_type).config), LATENTS.to(dtype)
    noisy = add_noise(latents, own, torch.Generator().manual_seed(3))
    assert torch.equal(noisy.latents, own.add_noise(latents, noisy.noise, noisy.timesteps))
    if prediction_type == "epsilon":
        assert torch.equal(noisy.target, noisy.noise)
    elif kind is not PNDMScheduler:
        assert torch.equal(noisy.target, own.get_velocity(latents, noisy.noise, noisy.timesteps))


SCHEDULES = {  # of Stable Diffusion v1-4 and of the miniature
    "SD v1-4": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "miniature": dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_half_precision_of_the_latents_does_not_touch_the_schedule(monkeypatch, schedule, dtype, prediction_type):
    """At every timestep z_t, the target and ẑ_0 are those of float64; in bfloat16 σ_t was 0 at t ≤ 1 in v1-4."""
    own = DDPMScheduler(prediction_type=prediction_type, **SCHEDULES[schedule])
    clean = LATENTS[:1, :, :1, :1].expand(1000, -1, -1, -1).to(dtype)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.arange(1000))
    noisy = add_noise(clean, own, torch.Generator().manual_seed(3))
    assert {part.dtype for part in (noisy.latents, noisy.target, noisy.alphas_cumprod)} == {torch.float32}
    a = own.alphas_cumprod.double().view(-1, 1, 1, 1)
    z, noise = clean.double(), torch.randn(clean.shape, generator=torch.Generator().manual_seed(3)).double()
    z_t, velocity = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
    near = dict(atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(noisy.latents.double(), z_t, **near)
    torch.testing.assert_close(noisy.target.double(), noise if prediction_type == "epsilon" else velocity, **near)
    output = noisy.target.to(dtype)  # as a U-Net in half precision gives it
    exact = (z_t - (1 - a).sqrt() * output.double()) / a.sqrt()
    exact = exact if prediction_type == "epsilon" else a.sqrt() * z_t - (1 - a).sqrt() * output.double()
    torch.testing.assert_close(noisy.original_sample(output).double(), exact, atol=3e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_would_add_other_noise_after_a_run(kind):
    """Why the package has its own: Euler does not scale z, and after a run both know its few timesteps only."""
    own = kind.from_config(scheduler().config)
    expected = add_noise(LATENTS, scheduler(), torch.Generator().manual_seed(3))
    own.set_timesteps(4)
    noisy = add_noise(LATENTS, own, torch.Generator().manual_seed(3))
    assert torch.equal(noisy.latents, expected.latents)
    with pytest.raises((IndexError, AssertionError)):  # a timestep that the run skipped, or another z_t
        torch.testing.assert_close(own.add_noise(LATENTS, noisy.noise, noisy.timesteps), expected.latents)


@given(st.integers(0, 999), st.sampled_from(["epsilon", "v_prediction"]))
def test_a_right_answer_gives_the_clean_latents_back_at_every_timestep(timestep, prediction_type):
    alphas_cumprod = scheduler().alphas_cumprod.double()[timestep].view(1, 1, 1, 1).expand(5, 1, 1, 1)
    noise = torch.randn_like(LATENTS)
    noisy = NoisyLatents(
        LATENTS, noise, torch.full((5,), timestep), alphas_cumprod, prediction_type, torch.full((5,), timestep)
    )
    torch.testing.assert_close(noisy.original_sample(noisy.target), LATENTS)
    moved = (noisy.original_sample(noisy.target + 0.5) - LATENTS).abs()
    magnified = (1 - alphas_cumprod).sqrt() * (1 / alphas_cumprod.sqrt() if prediction_type == "epsilon" else 1)
    torch.testing.assert_close(moved, (0.5 * magnified).expand_as(moved))


def test_stable_diffusions_last_timestep_magnifies_an_error_fifteenfold():
    alphas_cumprod = scheduler(beta_start=0.00085, beta_end=0.012).alphas_cumprod[-1]
    assert ((1 - alphas_cumprod) / alphas_cumprod).sqrt().item() == pytest.approx(14.6, abs=0.1)


def test_draws_are_the_generators_own_and_of_every_timestep():
    first, again, other = (add_noise(LATENTS, scheduler(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.latents, again.latents) and not torch.equal(first.noise, other.noise)
    many = add_noise(LATENTS[:1].expand(4000, -1, -1, -1), scheduler(), torch.Generator().manual_seed(0)).timesteps
    assert many.min() < 5 and many.max() > 994 and abs(many.double().mean() - 499.5) < 15


def test_parts_of_a_batch_have_the_noise_of_the_whole():
    whole = add_noise(LATENTS, scheduler(), torch.Generator().manual_seed(0))
    part = add_noise(LATENTS[2:4], scheduler(), torch.Generator().manual_seed(0), first=2, whole=5)
    torch.testing.assert_close(part.latents, whole.latents[2:4])


def test_selected_latents_are_those_of_the_batch():
    noisy = add_noise(LATENTS, scheduler(), torch.Generator().manual_seed(0))
    some = noisy.select(torch.tensor([False, True, False, True, False]))
    torch.testing.assert_close(some.latents, noisy.latents[[1, 3]])
    assert some.timesteps.tolist() == noisy.timesteps[[1, 3]].tolist()
    assert some.prediction_type == noisy.prediction_type


def test_a_model_that_predicts_the_image_itself_is_refused():
    with pytest.raises(ValueError, match="predicts 'sample': expected one of epsilon, v_prediction"):
        add_noise(LATENTS, scheduler("sample"), torch.Generator())
