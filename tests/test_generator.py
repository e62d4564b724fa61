import os

os.environ["HF_HUB_OFFLINE"] = "1"

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from dalleflamingo.generator import Generator, add_noise

CAPTIONS = ["a red bird", "", "a blue house on the tree", "a red bird", "two cats, small"]
SEEDS = [3, 4, 5, 6, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.stable_diffusion(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.from_pretrained(folder)


@pytest.fixture(scope="module")
def images(generator):
    return generator.render(CAPTIONS, SEEDS, steps=6)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    with ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == request.param
    torch.set_num_threads(before)


def assert_same(images, others):
    """No pixel differs by more than one of its 255 levels."""
    assert len(images) == len(others)
    for image, other in zip(images, others, strict=True):
        assert image.mode == other.mode == "RGB" and image.size == other.size
        assert difference(image, other) <= 1


def difference(image, other):
    return np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max()


def test_image_depends_on_its_caption_and_seed_alone(generator, images):
    for batch_size in (1, 2):
        assert_same(generator.render(CAPTIONS, SEEDS, steps=6, batch_size=batch_size), images)
    assert_same(generator.render(CAPTIONS[::-1], SEEDS[::-1], steps=6)[::-1], images)
    assert_same(generator.render(CAPTIONS[2:3], SEEDS[2:3], steps=6), images[2:3])


def test_hidden_states_in_one_tensor_are_rendered_each_from_the_same_noise(generator):
    texts = CAPTIONS[:3]
    states, _ = generator.pipeline.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)  # (3, T, D)
    images = generator.render(states.detach(), [7] * 3, steps=4)
    assert_same(images, generator.render(texts, [7] * 3, steps=4))
    assert len({image.tobytes() for image in images}) == 3


def test_caption_and_seed_both_matter(images):
    assert difference(images[0], images[3]) > 10, "same caption, other seed"
    assert difference(images[0], images[4]) > 10, "same seed, other caption"


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
def test_render_equals_the_stock_pipeline(folder, threads, name, kind, guidance_scale):
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pixels_of_successive_calls_are_the_stock_pipelines(folder, threads, guidance_scale, prediction_type):
    """What a call computes once for all steps must not reach the next call or the other prompts of a batch."""
    stock, ours = (
        StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32),
        Generator.from_pretrained(folder),
    )
    for pipeline in (stock, ours.pipeline):
        pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    for captions in (CAPTIONS, CAPTIONS[::-1], ["a dog on a car"] * 3):
        noise = [torch.Generator().manual_seed(seed) for seed, _ in enumerate(captions)]
        how = {"num_inference_steps": 5, "guidance_scale": guidance_scale}
        expected = stock(captions, generator=noise, output_type="pt", **how).images
        with decoded(ours) as images:
            ours.render(captions, range(len(captions)), 5, guidance_scale, batch_size=3)
        distance = torch.cdist(torch.cat(images).flatten(1), expected.flatten(1), p=float("inf"))
        assert distance.min(dim=0).values.max() < 1e-4, "threads may be ready in another order"
        assert (expected[0] - expected[1]).abs().max() > 1e-2


@contextmanager
def decoded(generator):
    """Collects the images that are generated meanwhile, (B, 3, H, W) in [0, 1], before they are rounded."""
    images = []
    hook = generator.pipeline.vae.decoder.register_forward_hook(
        lambda _, __, made: images.append((made / 2 + 0.5).clamp(0, 1))
    )
    try:
        yield images
    finally:
        hook.remove()


def test_text_is_projected_once_a_call_and_latents_of_both_halves_once(folder):
    generator, text, latents = Generator.from_pretrained(folder), [], []
    unet = generator.pipeline.unet
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2.to_k")]
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: text.append(len(out)))
    unet.conv_in.register_forward_hook(lambda _, args, out: latents.append(len(out)))
    generator.render(["a cat", "a bird"], [1, 2], steps=6)
    assert len(layers) > 1 and sum(text) == len(layers) * 2 * 2, "the keys of two captions and of two empty ones"
    assert sum(latents) == 6 * 2


def interrupt(_):
    raise InterruptedError


def test_rendering_leaves_the_unet_as_it_was_even_where_it_fails(folder, threads, tmp_path):
    generator = Generator.from_pretrained(folder)
    unet, states = generator.pipeline.unet, torch.randn(2, 16, 16)
    noisy = add_noise(torch.randn(2, 4, 8, 8), generator.pipeline.scheduler, torch.Generator().manual_seed(0))
    strides = {name: weight.stride() for name, weight in unet.named_parameters()}
    processors, expected = unet.attn_processors, generator.predict(noisy, states)
    with pytest.raises(InterruptedError):
        generator.render(CAPTIONS, SEEDS, steps=2, progress=interrupt)
    assert unet.attn_processors == processors and torch.equal(generator.predict(noisy, states), expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unet.modules())
    assert {name: weight.stride() for name, weight in unet.named_parameters()} == strides
    generator.pipeline.save_pretrained(tmp_path)  # safetensors takes no other layout
    assert (generator.predict(noisy, 2 * states) - expected).abs().max() > 1e-4, "other text, nothing kept of the first"


def test_gradients_are_the_same_before_and_after_rendering(folder):
    generator, images, gradients = Generator.from_pretrained(folder), tiny.pictures(2), []
    for _ in range(2):
        states = torch.ones(2, 16, 16).cumsum(1).sin().requires_grad_()
        denoising_loss(generator, images, states, seed=0).backward()
        key = next(module for name, module in generator.pipeline.unet.named_modules() if name.endswith("attn2.to_k"))
        gradients.append((states.grad, key.weight.grad.clone()))
        generator.pipeline.unet.zero_grad()
        generator.render(CAPTIONS, SEEDS, steps=2)
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
        assert first.abs().max() > 0


def test_attention_processors_of_ones_own_are_called(folder, images):
    class Counting(AttnProcessor2_0):
        called = 0

        def __call__(self, *args, **options):
            Counting.called += 1
            return super().__call__(*args, **options)

    generator = Generator.from_pretrained(folder)
    generator.pipeline.unet.set_attn_processor(Counting())
    assert_same(generator.render(CAPTIONS, SEEDS, steps=6), images)
    assert Counting.called


def test_images_of_another_size_equal_those_of_the_stock_pipeline(folder):
    stock = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = stock(CAPTIONS, generator=noise, num_inference_steps=2, height=48, width=48).images
    larger = Generator.from_pretrained(folder, image_size=48)
    assert_same(larger.render(CAPTIONS, SEEDS, steps=2, batch_size=2), expected)
    assert {image.size for image in expected} == {(48, 48)}
    assert larger.encode_images(expected, like=torch.zeros(1)).shape[-1] == 48 // larger.pipeline.vae_scale_factor
    assert larger.fingerprint() != Generator.from_pretrained(folder).fingerprint()


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


def test_what_is_not_read_of_a_long_caption_is_named_in_a_warning(generator, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    fits = "a " * (generator.pipeline.tokenizer.model_max_length - 2)
    generator.render([fits], [1], steps=1)
    assert not [record for record in caplog.records if "truncated" in record.message]
    generator.render(["a cat", "the red bird" + " and a cat" * 4 + " on a boat in a tree"] * 2, [1, 2, 3, 4], steps=1)
    [message] = {record.message for record in caplog.records if "truncated" in record.message}
    assert "up to 16 tokens" in message and message.count("tree") == 1 and "bird" not in message


def test_progress_counts_every_image(generator):
    done = []
    generator.render(CAPTIONS, SEEDS, steps=1, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]


def test_another_number_of_seeds_than_captions_is_refused(generator):
    with pytest.raises(ValueError, match="2 captions but 1 seeds"):
        generator.render(["a cat", "a bird"], [1])


def test_no_captions_give_no_images(generator):
    assert generator.render([], []) == []


# The denoising loss (Eqs. 2 and 3)


def denoising_loss(generator, images, states, seed):
    latents = generator.encode_images(images, states)
    noisy = add_noise(latents, generator.pipeline.scheduler, torch.Generator().manual_seed(seed))
    return noisy.loss(generator.predict(noisy, states))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_zero_for_the_right_answer_and_one_for_no_noise_at_all(folder, monkeypatch, prediction_type):
    """From z_t = √ᾱ z + √(1−ᾱ) ε and a known z the noise follows, and from it v = √ᾱ ε − √(1−ᾱ) z."""
    generator = Generator.from_pretrained(folder)
    pipeline, images = generator.pipeline, [image.resize((16, 16)) for image in tiny.pictures(64)]
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    pixels = torch.stack([torch.tensor(np.asarray(image)) for image in images]).movedim(3, 1) / 127.5 - 1
    with torch.no_grad():
        clean = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    seen = []

    def answer(noisy, timesteps, encoder_hidden_states):
        seen.append(timesteps)
        alphas_cumprod = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - alphas_cumprod.sqrt() * clean) / (1 - alphas_cumprod).sqrt()
        velocity = alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * clean
        return SimpleNamespace(sample=noise if prediction_type == "epsilon" else velocity)

    states = torch.zeros(64, 16, 16)
    monkeypatch.setattr(pipeline.unet, "forward", answer)
    assert denoising_loss(generator, images, states, seed=0) < 1e-6
    assert denoising_loss(generator, images, states, seed=0) < 1e-6 and torch.equal(*seen)
    assert seen[0].min() < 100 and seen[0].max() > 900 and len(seen[0].unique()) > 50
    if prediction_type == "epsilon":
        monkeypatch.setattr(pipeline.unet, "forward", lambda noisy, *_, **__: SimpleNamespace(sample=0 * noisy))
        assert denoising_loss(generator, images, states, seed=0) == pytest.approx(1, abs=0.1)


def test_gradient_of_the_loss_reaches_the_hidden_states_of_the_text(generator):
    states = torch.randn(2, 16, 16, requires_grad=True)
    denoising_loss(generator, tiny.pictures(2), states, seed=0).backward()
    assert (states.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_loss_is_the_same_for_every_scheduler_and_image_size(folder):
    states = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    small = [image.resize((16, 16)) for image in tiny.pictures(2)]
    wide = tiny.pictures(1, seed=1)[0].resize((32, 16))
    losses = []
    for scheduler in (None, "Euler", "DPMSolverMultistep"):
        generator = Generator.from_pretrained(folder, scheduler=scheduler)
        generator.render(["a cat"], [0], steps=2)
        losses.append(denoising_loss(generator, small, states, seed=0).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    square = wide.crop((8, 0, 24, 16))  # the middle, whichever image comes first
    cropped = denoising_loss(generator, [square, small[0]], states, seed=0)
    assert denoising_loss(generator, [wide, small[0]], states, seed=0).item() == pytest.approx(cropped.item(), rel=1e-5)


# What a run notes


def test_fingerprint_changes_with_weights_scheduler_and_number_format(folder, generator):
    before = generator.fingerprint()
    assert Generator.from_pretrained(folder).fingerprint() == before
    assert Generator.from_pretrained(folder, scheduler="DDIM").fingerprint() != before
    assert Generator.from_pretrained(folder, dtype=torch.bfloat16).fingerprint() != before
    for change in (
        lambda parts: parts.scheduler.register_to_config(timestep_spacing="trailing"),
        lambda parts: parts.vae.register_to_config(scaling_factor=0.5),
        *(lambda parts, name=name: retrain(getattr(parts, name)) for name in ("unet", "vae", "text_encoder")),
    ):
        other = Generator.from_pretrained(folder)
        change(other.pipeline)
        assert other.fingerprint() != before


def retrain(model):
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1e-3


def test_fingerprint_does_not_change_with_use_or_attributes(generator):
    before = generator.fingerprint()
    generator.render(["a cat"], [0], steps=2, batch_size=1)
    generator._private = generator.pipeline.note = "new"
    generator.pipeline.vae.disable_slicing()
    generator.pipeline.unet.requires_grad_(False)
    assert generator.fingerprint() == before
    generator.pipeline.unet.requires_grad_(True)
