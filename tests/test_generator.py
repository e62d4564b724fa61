import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import logging
import shutil
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
from PIL import Image

from dalleflamingo import profiles
from dalleflamingo.commands.reconstruct import require_steps
from dalleflamingo.denoising import SCHEDULERS
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
        ("UniPCMultistep", "UniPCMultistepScheduler"),
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


def test_text_is_projected_once_a_call(folder):
    generator, text = Generator.from_pretrained(folder), []
    unet = generator.pipeline.unet
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2.to_k")]
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: text.append(len(out)))
    generator.render(["a cat", "a bird"], [1, 2], steps=6)
    assert len(layers) > 1 and sum(text) == len(layers) * 2 * 2, "the keys of two captions and of two empty ones"


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


@pytest.mark.parametrize(
    ("name", "steps", "remedy"),
    [
        ("DDIM", 600, "take 500 or fewer, or all 1000"),  # would begin at timestep 600, where half the signal is left
        ("DDPM", 700, "take 500 or fewer, or all 1000"),
        (None, 350, "take 333 or fewer, or all 1000"),
        ("DPMSolverMultistep", 1000, "take 500 or fewer$"),  # NaN
        ("UniPCMultistep", 1000, "take 500 or fewer$"),
    ],
)
def test_steps_that_cannot_be_spread_over_the_noise_are_refused(as_sd_v1_4, name, steps, remedy):
    generator = Generator.from_pretrained(as_sd_v1_4, scheduler=name)
    with pytest.raises(ValueError, match=f"steps = {steps}: {name or 'PNDM'} cannot spread.*: {remedy}"):
        generator.render(["a cat"], [0], steps=steps)


def test_seed_stands_for_the_latents_that_its_generator_draws(folder):
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    ours = Generator.from_pretrained(folder, scheduler="DDIM")
    expected = ours.pipeline(CAPTIONS, latents=latents, num_inference_steps=6, guidance_scale=7.5).images
    assert_same(ours.render(CAPTIONS, SEEDS, steps=6), expected)


def test_scheduler_by_name_keeps_the_shipped_noise_schedule(folder):
    scheduler = Generator.from_pretrained(folder, scheduler="DDIM").pipeline.scheduler
    assert type(scheduler) is diffusers.DDIMScheduler
    assert (scheduler.config.beta_end, scheduler.config.clip_sample, scheduler.config.steps_offset) == (0.02, False, 1)


@pytest.mark.parametrize("name", ["Sampler2000", "EDMEuler", "DPMSolverSDEScheduler", "LCM", "ddim"])
def test_a_scheduler_that_is_not_offered_is_answered_with_those_that_are(folder, name):
    with pytest.raises(
        ValueError,
        match=rf"the scheduler '{name}' is not offered for a model with DDPMScheduler: choose DDPM, DDIM, .*Euler",
    ):
        Generator.from_pretrained(folder, scheduler=name)


def test_a_models_own_scheduler_must_be_offered_too(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"scheduler": ["diffusers", "EDMEulerScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    diffusers.EDMEulerScheduler().save_pretrained(tmp_path / "scheduler")
    for name in (None, "DDIM"):  # a noise schedule of DDIM's cannot be made of its settings
        with pytest.raises(ValueError, match="is not offered for a model with EDMEulerScheduler: choose another model"):
            Generator.from_pretrained(str(tmp_path), scheduler=name)


def test_every_offered_scheduler_refuses_fewer_steps_than_it_needs(folder):
    def check(generator: Generator, steps: int) -> None:
        require_steps(generator, steps, chosen=True)

    for name, least in SCHEDULERS.items():
        generator = Generator.from_pretrained(folder, scheduler=name)
        check(generator, least)
        check(generator, 500)
        if name in ("DPMSolverMultistep", "UniPCMultistep"):  # which `render` would refuse after the captions
            with pytest.raises(ValueError, match="cannot spread them over 1000 timesteps"):
                check(generator, 1000)
        else:
            check(generator, 1000)
        with pytest.raises(ValueError, match=rf"steps = {least - 1}: {name} needs {least} or more; take {least}"):
            check(generator, least - 1)
        require_steps(generator, least - 1, chosen=False)
    quick = min(SCHEDULERS, key=SCHEDULERS.get)
    slow = Generator.from_pretrained(folder, scheduler=max(SCHEDULERS, key=SCHEDULERS.get))
    with pytest.raises(ValueError, match=f"or another scheduler: .*{quick}"):
        check(slow, SCHEDULERS[quick])
    with pytest.raises(ValueError, match="no scheduler works with so few"):
        check(slow, 2)


def test_every_profile_but_smoke_takes_enough_steps():
    for profile in profiles.PROFILES.values():
        enough = profile.steps >= SCHEDULERS[profile.scheduler or "DDPM"]  # the miniature's own
        assert enough == (profile.name != "smoke"), profile.name


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
@pytest.mark.parametrize("limit", ["clip_sample", "thresholding"])
def test_latents_are_never_clipped_whatever_the_models_file_says(folder, tmp_path, name, limit):
    """Both limit the clean sample to [-1, 1] or less, as for pixels; latents are larger."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {limit: True}))
    generator, expected = (Generator.from_pretrained(str(path), scheduler=name) for path in (tmp_path, folder))
    assert not any(generator.pipeline.scheduler.config.get(one) for one in ("clip_sample", "thresholding"))
    assert not diffusers.DDPMScheduler.from_config(generator.pipeline.scheduler.config).config.get(limit)
    assert_same(generator.render(CAPTIONS[:2], SEEDS[:2], steps=4), expected.render(CAPTIONS[:2], SEEDS[:2], steps=4))


SD_V1_4 = {  # CompVis/stable-diffusion-v1-4, scheduler/scheduler_config.json
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture(scope="module")
def as_sd_v1_4(folder, tmp_path_factory):
    """The tiny model with the scheduler of Stable Diffusion v1-4."""
    copy = tmp_path_factory.mktemp("as_sd_v1_4")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(SD_V1_4))
    index = json.loads((copy / "model_index.json").read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}
    (copy / "model_index.json").write_text(json.dumps(index))
    return str(copy)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_a_perfect_u_net_gives_its_image_in_few_steps_and_in_many(as_sd_v1_4, monkeypatch, name, prediction_type):
    """On SD v1-4's settings. Whatever the noise, if every answer points to the latents z, the result is z."""
    generator = Generator.from_pretrained(as_sd_v1_4, scheduler=name)
    pipeline, clean = generator.pipeline, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    sigmas = ((1 - pipeline.scheduler.alphas_cumprod) / pipeline.scheduler.alphas_cumprod).sqrt()
    asked, latents, before = [], [], pipeline.scheduler

    def answer(sample, timestep, *_, **__):
        asked.append(float(timestep))
        sigma = torch.tensor(np.interp(float(timestep), np.arange(1000), sigmas), dtype=torch.float32)
        a = 1 / (1 + sigma**2)
        noise = (sample - a.sqrt() * clean) / (1 - a).sqrt()
        return (noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean,)

    monkeypatch.setattr(pipeline.unet, "forward", answer)
    pipeline.vae.post_quant_conv.register_forward_pre_hook(
        lambda _, given: latents.append(given[0] * pipeline.vae.config.scaling_factor)
    )
    most = 500 if name in ("DPMSolverMultistep", "UniPCMultistep") else 1000
    for steps in (SCHEDULERS[name or "PNDM"], 50, most):
        asked.clear()
        generator.render(["a cat"], [3], steps=steps, guidance_scale=1.0)
        assert 0 <= min(asked) and 900 <= max(asked) <= 999
        # DDIM and PNDM end at ᾱ_0 rather than at 1: a share √(1−ᾱ_0) = 0.03 of the noise is left
        torch.testing.assert_close(latents.pop(), clean, atol=0.15, rtol=0)
        assert pipeline.scheduler is before and before.config.steps_offset == 1


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


def test_a_caption_that_would_be_read_in_part_is_refused_on_request(generator):
    fits = "a " * (generator.pipeline.tokenizer.model_max_length - 2)
    generator.check_caption(fits)
    with pytest.raises(ValueError, match="it has 17 tokens and the model reads 16: shorten"):
        generator.check_caption(fits + "a")
    with pytest.raises(ValueError, match="character 1 is half of a surrogate pair"):
        generator.check_caption("\udc00 a")


def test_progress_counts_every_image(generator):
    done = []
    generator.render(CAPTIONS, SEEDS, steps=1, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]


def test_another_number_of_seeds_than_captions_is_refused(generator):
    with pytest.raises(ValueError, match="2 captions but 1 seeds"):
        generator.render(["a cat", "a bird"], [1])


def test_no_captions_give_no_images(generator):
    assert generator.render([], []) == []


# What the generator sees of an image


def halves(width: int, height: int) -> Image.Image:
    """Black, but for a white half: the right one, or of a portrait the lower one."""
    pixels = np.zeros((height, width, 3), np.uint8)
    (pixels[:, width // 2 :] if width >= height else pixels[height // 2 :])[:] = 255
    return Image.fromarray(pixels)


def seen(generator: Generator, image: Image.Image, **how) -> np.ndarray:
    """(H, W) grey values in [0, 1] that the image's latents are made of."""
    pixels = []
    hook = generator.pipeline.vae.encoder.register_forward_pre_hook(lambda _, args: pixels.append(args[0]))
    try:
        generator.encode_images([image], torch.zeros(1), **how)
    finally:
        hook.remove()
    return (pixels[0][0].mean(0).numpy() + 1) / 2


@pytest.mark.parametrize("size", [(64, 48), (96, 16), (16, 96), (30, 40), (16, 12), (33, 32)])
def test_a_resized_image_is_seen_whole_and_a_cropped_one_in_its_middle(generator, size):
    width, height = size
    image, long, short = halves(*size), max(size), min(size)
    marked = np.asarray(image).copy()
    margin = max(1, (long - short) // 2)
    (marked[:, :margin] if width >= height else marked[:margin])[:] = 255  # what a crop leaves out, on one side
    marked = Image.fromarray(marked)
    whole, middle = seen(generator, image), seen(generator, image, fit="crop")
    assert whole.shape == middle.shape == (generator.image_size,) * 2
    for grey in (whole, middle):  # the border between the halves stays in the middle
        along = grey.mean(0 if width >= height else 1)
        assert along[:6].max() < 0.1 and along[-6:].min() > 0.9
    assert seen(generator, marked).mean() - whole.mean() == pytest.approx(margin / long, abs=0.05)
    assert seen(generator, marked, fit="crop").mean() - middle.mean() < 0.05
    assert np.array_equal(seen(generator, image), seen(generator, image, fit="resize"))


@pytest.mark.parametrize("side", [16, 32, 100])
def test_of_a_square_image_both_see_the_same(generator, side):
    image = tiny.pictures(1)[0].resize((side, side))
    assert np.array_equal(seen(generator, image, fit="resize"), seen(generator, image, fit="crop"))


def test_another_way_to_make_an_image_square_is_refused(generator):
    with pytest.raises(ValueError, match="fit = 'pad': choose one of resize, crop"):
        generator.encode_images([halves(40, 30)], torch.zeros(1), fit="pad")


def test_a_centre_crop_would_lose_27_percent_of_nocaps(real_data):
    records = json.loads((real_data / "nocaps/nocaps_val_image_info.json").read_text())["images"]
    sizes = np.array([(record["width"], record["height"]) for record in records])
    assert len(sizes) == 4500 and (1 - sizes.min(1) / sizes.max(1)).mean() == pytest.approx(0.27, abs=0.005)


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
    square = wide.resize((16, 16), Image.Resampling.BICUBIC)  # the whole image, whichever comes first
    whole = denoising_loss(generator, [square, small[0]], states, seed=0)
    assert denoising_loss(generator, [wide, small[0]], states, seed=0).item() == pytest.approx(whole.item(), rel=1e-5)


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
