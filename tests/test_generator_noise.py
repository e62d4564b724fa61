"""Noise in and out: closed forms, and parity with diffusers' own scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from dalleflamingo.generator import NoisyLatents, add_noise

LATENTS = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scheduler(prediction_type: str = "epsilon", **options) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear", **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_what_is_noised_and_asked_is_what_diffusers_says(prediction_type):
    own = scheduler(prediction_type)
    own.alphas_cumprod = own.alphas_cumprod.double()
    found = add_noise(LATENTS, own, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.latents, own.add_noise(LATENTS, found.noise, found.timesteps))
    target = found.noise if prediction_type == "epsilon" else own.get_velocity(LATENTS, found.noise, found.timesteps)
    torch.testing.assert_close(found.target, target)


@given(st.integers(0, 999), st.sampled_from(["epsilon", "v_prediction"]))
def test_a_right_answer_gives_the_clean_latents_back_at_every_timestep(timestep, asked):
    kept = scheduler().alphas_cumprod.double()[timestep].view(1, 1, 1, 1).expand(5, 1, 1, 1)
    noise = torch.randn_like(LATENTS)
    noised = NoisyLatents(LATENTS, noise, torch.full((5,), timestep), kept, asked, torch.full((5,), timestep))
    torch.testing.assert_close(noised.estimate(noised.target), LATENTS)
    moved = (noised.estimate(noised.target + 0.5) - LATENTS).abs()
    magnified = (1 - kept).sqrt() * (1 / kept.sqrt() if asked == "epsilon" else 1)
    torch.testing.assert_close(moved, (0.5 * magnified).expand_as(moved))


def test_stable_diffusions_last_timestep_magnifies_an_error_fifteenfold():
    kept = scheduler(beta_start=0.00085, beta_end=0.012).alphas_cumprod[-1]
    assert ((1 - kept) / kept).sqrt().item() == pytest.approx(14.6, abs=0.1)


def test_draws_are_the_generators_own_and_of_every_timestep():
    first, again, other = (add_noise(LATENTS, scheduler(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.latents, again.latents) and not torch.equal(first.noise, other.noise)
    many = add_noise(LATENTS[:1].expand(4000, -1, -1, -1), scheduler(), torch.Generator().manual_seed(0)).timesteps
    assert many.min() < 5 and many.max() > 994 and abs(many.double().mean() - 499.5) < 15


def test_parts_of_a_batch_have_the_noise_of_the_whole():
    whole = add_noise(LATENTS, scheduler(), torch.Generator().manual_seed(0))
    part = add_noise(LATENTS[2:4], scheduler(), torch.Generator().manual_seed(0), first=2, whole=5)
    torch.testing.assert_close(part.latents, whole.latents[2:4])


def test_some_of_a_batch_are_those_as_they_were():
    noised = add_noise(LATENTS, scheduler(), torch.Generator().manual_seed(0))
    some = noised.of(torch.tensor([False, True, False, True, False]))
    torch.testing.assert_close(some.latents, noised.latents[[1, 3]])
    assert some.timesteps.tolist() == noised.timesteps[[1, 3]].tolist() and some.asked == noised.asked


def test_a_model_that_predicts_the_picture_itself_is_refused():
    with pytest.raises(ValueError, match="predicts 'sample': expected one of epsilon, v_prediction"):
        add_noise(LATENTS, scheduler("sample"), torch.Generator())
