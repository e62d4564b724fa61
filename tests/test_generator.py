import os

os.environ["HF_HUB_OFFLINE"] = "1"

import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from dalleflamingo.generator import Generator

CAPTIONS = ["a red bird", "", "a blue house on the tree", "a red bird", "two cats, small"]
SEEDS = [3, 4, 5, 6, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.stable_diffusion(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.from_pretrained(folder)


@pytest.fixture(scope="module")
def pictures(generator):
    return generator.render(CAPTIONS, SEEDS, steps=6)


def assert_same(pictures, others):
    """No pixel differs by more than one of its 255 levels."""
    assert len(pictures) == len(others)
    for picture, other in zip(pictures, others, strict=True):
        assert picture.mode == other.mode == "RGB" and picture.size == other.size
        assert _difference(picture, other) <= 1


def _difference(picture, other):
    return np.abs(np.asarray(picture, dtype=int) - np.asarray(other, dtype=int)).max()


def test_picture_depends_on_its_caption_and_seed_alone(generator, pictures):
    for batch_size in (1, 2):
        assert_same(generator.render(CAPTIONS, SEEDS, steps=6, batch_size=batch_size), pictures)
    assert_same(generator.render(CAPTIONS[::-1], SEEDS[::-1], steps=6)[::-1], pictures)
    assert_same(generator.render(CAPTIONS[2:3], SEEDS[2:3], steps=6), pictures[2:3])


def test_states_in_one_tensor_are_drawn_each_from_the_same_noise(generator):
    states = torch.stack(list(generator._encode(dict.fromkeys(CAPTIONS[:3]), 3).values()))  # (3, T, D)
    texts = list(dict.fromkeys(CAPTIONS[:3]))
    drawn = generator.render(states, [7] * len(states), steps=4)
    assert_same(drawn, generator.render(texts, [7] * len(texts), steps=4))
    assert len({picture.tobytes() for picture in drawn}) == len(texts) > 1


def test_caption_and_seed_both_matter(pictures):
    assert _difference(pictures[0], pictures[3]) > 10, "same caption, other seed"
    assert _difference(pictures[0], pictures[4]) > 10, "same seed, other caption"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, "DDPMScheduler"),
        ("DDIM", "DDIMScheduler"),
        ("PNDMScheduler", "PNDMScheduler"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("Euler", "EulerDiscreteScheduler"),
        ("EulerAncestral", "EulerAncestralDiscreteScheduler"),
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_render_equals_the_stock_pipeline(folder, name, kind, guidance_scale):
    stock = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    stock.scheduler = getattr(diffusers, kind).from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        CAPTIONS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=6,
        guidance_scale=guidance_scale,
    ).images
    generator = Generator.from_pretrained(folder, scheduler=name)
    assert_same(generator.render(CAPTIONS, SEEDS, steps=6, guidance_scale=guidance_scale, batch_size=2), expected)


def test_seed_stands_for_the_latents_that_its_generator_draws(folder):
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    ours = Generator.from_pretrained(folder, scheduler="DDIM")
    expected = ours.pipeline(CAPTIONS, latents=latents, num_inference_steps=6, guidance_scale=7.5).images
    assert_same(ours.render(CAPTIONS, SEEDS, steps=6), expected)


def test_scheduler_by_name_keeps_the_shipped_noise_schedule(folder):
    scheduler = Generator.from_pretrained(folder, scheduler="DDIM").pipeline.scheduler
    assert type(scheduler) is diffusers.DDIMScheduler
    assert (scheduler.config.beta_end, scheduler.config.clip_sample, scheduler.config.steps_offset) == (0.02, False, 1)


def test_unknown_scheduler_is_answered_with_the_known_ones(folder):
    with pytest.raises(ValueError, match=r"'Sampler2000'.*DDIMScheduler, DDPMScheduler"):
        Generator.from_pretrained(folder, scheduler="Sampler2000")


def test_each_distinct_caption_is_encoded_once(generator):
    encoded = []
    hook = generator.pipeline.text_encoder.register_forward_hook(lambda _, args, out: encoded.append(len(out[0])))
    try:
        generator.render(["a cat", "a bird", "a cat", "a cat"], [1, 2, 3, 4], steps=1, batch_size=2)
    finally:
        hook.remove()
    assert sum(encoded) == 3, "two captions and the empty one that guidance leads away from"


def test_caption_past_the_tokenizers_limit_is_named_in_a_warning(generator):
    fits = "a " * (generator.pipeline.tokenizer.model_max_length - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.render([fits], [1], steps=1)
    long = "the red bird" + " and a cat" * 9
    with pytest.warns(UserWarning) as caught:
        generator.render(["a cat", long, long], [1, 2, 3], steps=1)
    (message,) = [str(warning.message) for warning in caught if "drawn as" in str(warning.message)]
    assert repr(long) in message and "reads 16" in message
    assert "drawn as 'the red bird and" in message and not message.endswith(f"{long!r}")


def test_progress_counts_every_picture(generator):
    done = []
    generator.render(CAPTIONS, SEEDS, steps=1, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]


def test_another_number_of_seeds_than_captions_is_refused(generator):
    with pytest.raises(ValueError, match="2 captions but 1 seeds"):
        generator.render(["a cat", "a bird"], [1])


def test_no_captions_give_no_pictures(generator):
    assert generator.render([], []) == []


# The denoising loss


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_loss_is_zero_for_who_knows_the_answer_and_one_for_who_says_nothing(folder, monkeypatch, prediction_type):
    """From z_t = √ᾱ z + √(1−ᾱ) ε and a known z the noise follows, and from it v = √ᾱ ε − √(1−ᾱ) z."""
    generator = Generator.from_pretrained(folder)
    pipeline, images = generator.pipeline, [image.resize((16, 16)) for image in tiny.pictures(64)]
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    pixels = torch.stack([torch.tensor(np.asarray(image)) for image in images]).movedim(3, 1) / 127.5 - 1
    with torch.no_grad():
        clean = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    asked = []

    def answer(noised, timesteps, encoder_hidden_states):
        asked.append(timesteps)
        kept = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noised - kept.sqrt() * clean) / (1 - kept).sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        return SimpleNamespace(sample=noise if prediction_type == "epsilon" else velocity)

    states = torch.zeros(64, 77, pipeline.text_encoder.config.hidden_size)
    monkeypatch.setattr(pipeline.unet, "forward", answer)
    assert generator.noise_loss(images, states, seed=0) < 1e-6
    assert generator.noise_loss(images, states, seed=0) < 1e-6 and torch.equal(*asked)
    assert asked[0].min() < 100 and asked[0].max() > 900 and len(asked[0].unique()) > 50
    if prediction_type == "epsilon":
        monkeypatch.setattr(pipeline.unet, "forward", lambda noised, *_, **__: SimpleNamespace(sample=0 * noised))
        assert generator.noise_loss(images, states, seed=0) == pytest.approx(1, abs=0.1)


def test_gradient_of_the_noise_loss_reaches_the_text_states(generator):
    states = torch.randn(2, 77, generator.pipeline.text_encoder.config.hidden_size, requires_grad=True)
    generator.noise_loss(tiny.pictures(2), states, seed=0).backward()
    assert (states.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_noise_loss_is_the_same_for_every_scheduler_and_picture_size(folder):
    states = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(0))
    small = [image.resize((16, 16)) for image in tiny.pictures(2)]
    wide = tiny.pictures(1, seed=1)[0].resize((32, 16))
    losses = []
    for scheduler in (None, "Euler", "DPMSolverMultistep"):
        generator = Generator.from_pretrained(folder, scheduler=scheduler)
        generator.render(["a cat"], [0], steps=2)
        losses.append(generator.noise_loss(small, states, seed=0).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    square = wide.crop((8, 0, 24, 16))  # the middle, whichever picture comes first
    cropped = generator.noise_loss([square, small[0]], states, seed=0)
    assert generator.noise_loss([wide, small[0]], states, seed=0).item() == pytest.approx(cropped.item(), rel=1e-5)


def test_noise_loss_refuses_a_generator_that_predicts_the_picture(folder):
    generator = Generator.from_pretrained(folder)
    generator.pipeline.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'sample': expected one of epsilon, v_prediction"):
        generator.noise_loss(tiny.pictures(1), torch.zeros(1, 77, 16), seed=0)
