"""The four losses against plain transcriptions of their equations, and whom each of them moves."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler
from PIL import Image

from dalleflamingo import cycle_losses
from dalleflamingo.bridge import Bridge
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CycleConfig
from dalleflamingo.cycle_losses import LOSS_NAMES, Batch, Cycle, Losses, captioner_pixels, total_loss
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.generator import Generator
from dalleflamingo.research.released import DEVIATIONS, ReleasedBridge, ReleasedCycle, build_released_cycle
from dalleflamingo.vocabulary import VocabularyMap

CAPTIONS = ["a red bird on the boat", "two blue cats", "a tree and a large house in the red boat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, made once."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("blip", tiny.blip), ("blip2", tiny.blip2), ("sd", tiny.stable_diffusion)):
        (folder / name).mkdir()
        model(folder / name)
    return folder


def make(
    folder: Path, captioner: str = "blip", prediction_type: str = "epsilon", kind: type[Cycle] = Cycle, **losses
) -> tuple[Cycle, Batch]:
    """A cycle of tiny models, and a batch, in float64."""
    captioner = Captioner.from_pretrained(str(folder / captioner), dtype=torch.float64)
    generator = Generator.from_pretrained(str(folder / "sd"), dtype=torch.float64)
    pipeline = generator.pipeline
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    source, target = captioner.processor.tokenizer, pipeline.tokenizer
    learned = VocabularyMap.learn(source, target, CAPTIONS).resize(captioner.model.config.text_config.vocab_size)
    trainable = cycle_losses.captioner_parameters(captioner), cycle_losses.generator_parameters(generator)
    for model, own in zip((captioner.model, pipeline.unet), trainable, strict=True):
        cycle_losses.freeze_all_but(model, own)
    for module in (pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False)
    images = tiny.pictures(3)
    with torch.no_grad():
        ids = target(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        encoder_hidden_states = pipeline.text_encoder(ids).last_hidden_state
    batch = Batch(
        pixel_values=captioner.processor(images=images, return_tensors="pt").pixel_values.double(),
        captions=CAPTIONS,
        latents=generator.encode_images(images, encoder_hidden_states),
        encoder_hidden_states=encoder_hidden_states,
        token_counts=captioner.count_tokens(CAPTIONS),
    )
    bridge = Bridge(learned, pipeline.text_encoder)
    return kind(captioner, generator, bridge, *(own.values() for own in trainable), Losses(**losses)), batch


def computed(cycle: Cycle, batch: Batch, seed: int = 0) -> dict[str, torch.Tensor]:
    return cycle.image_losses(batch, generator(seed)) | cycle.text_losses(batch, generator(seed + 1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def negative_log_likelihood(cycle: Cycle, pixels: torch.Tensor, captions: list[str]) -> float:
    """−log p of each token and of the end, a caption and a token at a time, by BLIP's own decoder."""
    model, tokenizer, found = cycle.captioner.model, cycle.captioner.processor.tokenizer, []
    for image, caption in zip(pixels, captions, strict=True):
        encoded = model.vision_model(image[None]).last_hidden_state
        ids = [model.config.text_config.bos_token_id, *tokenizer(caption).input_ids[1:]]
        for t in range(1, len(ids)):
            logits = model.text_decoder(input_ids=torch.tensor([ids[:t]]), encoder_hidden_states=encoded).logits[0, -1]
            found.append(-logits.log_softmax(-1)[ids[t]])
    return torch.stack(found).mean()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_each_loss_is_its_equation(folder, prediction_type):
    cycle, batch = make(folder, prediction_type=prediction_type, mode="soft")
    found = computed(cycle, batch)
    pipeline, source = cycle.generator.pipeline, cycle.captioner.processor.tokenizer
    alphas = pipeline.scheduler.alphas_cumprod.double()

    def asked(
        seed: int, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = generator(seed)
        t = torch.randint(1000, (3,), generator=draw)
        noise = torch.randn(batch.latents.shape, generator=draw).double()
        a = alphas[t].view(3, 1, 1, 1)
        z_t = a**0.5 * batch.latents + (1 - a) ** 0.5 * noise
        answer = pipeline.unet(z_t, t, encoder_hidden_states=encoder_hidden_states).sample
        target = noise if prediction_type == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * batch.latents
        return a, z_t, answer, target

    with torch.no_grad():
        expected = {"caption": negative_log_likelihood(cycle, batch.pixel_values, CAPTIONS)}
        ids = source(CAPTIONS, padding=True, return_tensors="pt").input_ids[:, 1:]
        logits, _ = cycle.captioner.token_logits(batch.pixel_values, CAPTIONS)
        encoder_hidden_states = cycle.bridge(logits.softmax(-1), ids, CAPTIONS)
        _, _, answer, target = asked(0, encoder_hidden_states)
        expected["image_reconstruction"] = ((answer - target) ** 2).mean()
        a, z_t, answer, target = asked(1, batch.encoder_hidden_states)
        expected["generation"] = ((answer - target) ** 2).mean()
        if prediction_type == "epsilon":
            clean = (z_t - (1 - a) ** 0.5 * answer) / a**0.5
        else:
            clean = a**0.5 * z_t - (1 - a) ** 0.5 * answer
        pictures = pipeline.vae.decode(clean / pipeline.vae.config.scaling_factor).sample
        expected["caption_reconstruction"] = negative_log_likelihood(
            cycle, captioner_pixels(cycle.captioner, pictures), CAPTIONS
        )
    assert tuple(found) == LOSS_NAMES
    for name in LOSS_NAMES:
        assert found[name].item() == pytest.approx(expected[name].item(), abs=1e-6), name


def test_the_whole_is_the_weighted_sum_and_what_has_no_weight_is_not_computed(folder):
    cycle, batch = make(folder, caption=0.5, generation=0.0, caption_reconstruction=2.0)
    found = computed(cycle, batch)
    assert tuple(found) == ("caption", "image_reconstruction", "caption_reconstruction")
    expected = 0.5 * found["caption"] + found["image_reconstruction"] + 2 * found["caption_reconstruction"]
    torch.testing.assert_close(total_loss(found, cycle.losses), expected)
    nothing = Losses(*[0.0] * 4)
    cycle.losses = nothing
    assert computed(cycle, batch) == {}


@pytest.mark.parametrize(
    ("max_timestep", "mode"), [(1.0, "straight-through"), (0.6, "straight-through"), (1.0, "gumbel")]
)
def test_the_mean_over_the_parts_of_a_batch_is_the_loss_of_the_whole(folder, max_timestep, mode):
    cycle, batch = make(folder, max_timestep=max_timestep, mode=mode)
    whole, parts = computed(cycle, batch), []
    for i in range(3):
        own = slice(i, i + 1)
        part = Batch(
            batch.pixel_values[own],
            CAPTIONS[own],
            batch.latents[own],
            batch.encoder_hidden_states[own],
            batch.token_counts,
            i,
        )
        parts.append(computed(cycle, part))
    for name in LOSS_NAMES:
        torch.testing.assert_close(sum(part[name] for part in parts) / 3, whole[name], msg=name)


@pytest.mark.parametrize("captioner", ["blip", "blip2"])
def test_smoothed_labels_are_mixed_with_the_uniform_distribution(folder, captioner):
    """0.9 · (−log p of the token) + 0.1 · (mean of −log p over the vocabulary), of tokens that are no padding."""
    cycle, batch = make(folder, captioner)
    plain = computed(cycle, batch)
    cycle.losses = dataclasses.replace(cycle.losses, label_smoothing=0.1)
    seen, logits_of = [], cycle.captioner.token_logits
    cycle.captioner.token_logits = lambda *given: seen.append(logits_of(*given)) or seen[-1]
    smoothed = computed(cycle, batch)
    for name, (logits, ids) in zip(("caption", "caption_reconstruction"), seen, strict=True):
        log_p, real = logits.log_softmax(-1), ids != cycle.captioner.pad_id
        target = log_p.gather(-1, ids[..., None])[..., 0]
        expected = -(0.9 * target + 0.1 * log_p.mean(-1))[real].mean()
        torch.testing.assert_close(smoothed[name], expected)
        assert (smoothed[name] - plain[name]).abs() > 1e-3
    for name in ("image_reconstruction", "generation"):
        torch.testing.assert_close(smoothed[name], plain[name])


MOVES = {"caption": {"captioner"}, "generation": {"generator"}}
BOTH = {"captioner", "generator"}


@pytest.mark.parametrize("captioner", ["blip", "blip2"])
@pytest.mark.parametrize("moved", ["both", "captioner", "generator"])
def test_whom_each_loss_moves(folder, captioner, moved):
    cycle, batch = make(folder, captioner, image_updates=moved, caption_updates=moved)
    wanted = MOVES | dict.fromkeys(LOSS_NAMES[1::2], BOTH if moved == "both" else {moved})
    for name in LOSS_NAMES:
        cycle.losses = dataclasses.replace(cycle.losses, **{other: float(other == name) for other in LOSS_NAMES})
        total_loss(computed(cycle, batch), cycle.losses).backward()
        reached = {who for who, own in cycle.trainable.items() if all(p.grad is not None and p.grad.any() for p in own)}
        touched = {who for who, own in cycle.trainable.items() if any(p.grad is not None for p in own)}
        assert reached == touched == wanted[name], name
        for who, model in (("captioner", cycle.captioner.model), ("generator", cycle.generator.pipeline.unet)):
            learning = {id(p) for p in cycle.trainable[who]}
            assert all(p.grad is None for p in model.parameters() if id(p) not in learning)
            model.zero_grad(set_to_none=True)


def test_late_pictures_are_left_out_of_the_caption_reconstruction(folder):
    cycle, batch = make(folder)
    timesteps = torch.randint(1000, (3,), generator=generator(1))
    order = timesteps.sort().values
    share = (order[1].item() + 1) / 1000  # the max_timestep of the three is too late
    cycle.losses = dataclasses.replace(cycle.losses, max_timestep=share)
    found = cycle.text_losses(batch, generator(1))["caption_reconstruction"]
    seen = []
    tell = cycle.captioner.token_logits
    cycle.captioner.token_logits = lambda images, captions: seen.append(captions) or tell(images, captions)
    cycle.text_losses(batch, generator(1))
    assert seen == [[caption for caption, t in zip(CAPTIONS, timesteps, strict=True) if t <= order[1]]]
    cycle.losses = dataclasses.replace(cycle.losses, max_timestep=1e-3)
    nothing = cycle.text_losses(batch, generator(1))
    assert found > 0 and tuple(nothing) == ("generation",)  # no caption_reconstruction of 0


def test_what_the_captioner_is_shown_is_what_its_processor_makes(folder):
    cycle, _ = make(folder)
    processor = cycle.captioner.processor.image_processor
    large = [picture.resize((50, 50), Image.Resampling.BICUBIC) for picture in tiny.pictures(3)]
    scaled = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).double() / 127.5 - 1
    expected = processor(images=large, return_tensors="pt").pixel_values.double()
    found = captioner_pixels(cycle.captioner, scaled)
    grey = 1 / 255 / min(processor.image_std)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1.6 * grey  # PIL rounds twice
    beyond = torch.full((1, 3, 32, 32), 7.0, dtype=torch.float64)
    torch.testing.assert_close(captioner_pixels(cycle.captioner, beyond), captioner_pixels(cycle.captioner, beyond / 7))


def test_images_can_be_decoded_small(folder):
    cycle, batch = make(folder)
    decode, decoded = cycle.generator.decode, []
    cycle.generator.decode = lambda latents: decoded.append(latents.detach()) or decode(latents)
    for size in (None, 8):
        cycle.losses = dataclasses.replace(cycle.losses, decoded_size=size)
        cycle.text_losses(batch, generator(0))["caption_reconstruction"].backward()
    full, small = decoded
    assert full.shape[-2:] == (8, 8) and small.shape[-2:] == (4, 4)
    torch.testing.assert_close(small, F.interpolate(full, (4, 4), mode="bilinear", antialias=True))


def test_a_sampled_caption_is_the_images_own_and_follows_from_the_seed(folder):
    cycle, batch = make(folder, mode="gumbel")
    same = dataclasses.replace(
        batch,
        pixel_values=batch.pixel_values[[0, 0, 0]],
        captions=CAPTIONS[:1] * 3,
        token_counts=batch.token_counts[[0, 0, 0]],
    )
    bridge, sampled = cycle.bridge, []
    cycle.bridge = lambda distributions, *more: sampled.append(distributions.argmax(-1)) or bridge(distributions, *more)
    for seed in (4, 4, 5):
        cycle.image_losses(same, generator(seed))
    first, again, other = sampled
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 3  # of one image with one caption, thrice


# ── as the authors released it ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_previous_sample_is_what_the_scheduler_makes_of_clean_latents(folder, prediction_type):
    """DDPM's mean (Ho et al. 2020, Eq. 7) with z in the place of z_t, and the variance's noise at t > 0."""
    cycle, batch = make(folder, prediction_type=prediction_type, kind=ReleasedCycle)
    scheduler = cycle.generator.pipeline.scheduler
    noisy = cycle.noisy_latents(batch, generator(1))
    noisy = dataclasses.replace(noisy, timesteps=torch.tensor([0, 400, 900]))
    alphas, output = scheduler.alphas_cumprod.double(), torch.randn(batch.latents.shape, dtype=torch.float64)
    torch.manual_seed(3)
    found = cycle.one_step_latents(noisy, output)
    torch.manual_seed(3)
    for i, t in enumerate((0, 400, 900)):
        z, a, before = batch.latents[i], alphas[t], alphas[t - 1] if t else torch.tensor(1.0).double()
        step = a / before
        if prediction_type == "epsilon":
            clean = (z - (1 - a) ** 0.5 * output[i]) / a**0.5
        else:
            clean = a**0.5 * z - (1 - a) ** 0.5 * output[i]
        clean = clean.clamp(-1, 1) if scheduler.config.clip_sample else clean
        mean = before**0.5 * (1 - step) / (1 - a) * clean + step**0.5 * (1 - before) / (1 - a) * z
        variance = ((1 - before) / (1 - a) * (1 - step)).clamp(min=1e-20)
        noise = torch.randn(z.shape, dtype=torch.float64) if t else 0
        torch.testing.assert_close(found[i], mean + variance**0.5 * noise, atol=1e-5, rtol=1e-5)
    cycle.generator.pipeline.scheduler = PNDMScheduler.from_config(scheduler.config)  # Stable Diffusion's, no DDPM
    torch.manual_seed(3)
    torch.testing.assert_close(cycle.one_step_latents(noisy, output), found)


def test_the_normalisation_can_be_left_out(folder):
    cycle, batch = make(folder, kind=ReleasedCycle)
    black = -torch.ones(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(cycle.captioner_pixels(black), torch.zeros_like(black))
    shown, logits_of = [], cycle.captioner.token_logits
    cycle.captioner.token_logits = lambda images, captions: shown.append(images) or logits_of(images, captions)
    cycle.text_losses(batch, generator(0))
    assert 0 <= shown[0].min() and shown[0].max() <= 1


def test_a_cycle_is_built_with_the_deviations_that_are_named(folder):
    captioner, sd = Captioner.from_pretrained(str(folder / "blip")), Generator.from_pretrained(str(folder / "sd"))
    images = Dataset("some", [Example(i, folder / "none.png", (caption,)) for i, caption in enumerate(CAPTIONS)])

    config = CycleConfig("miniature/blip", "miniature/sd", "miniature/coco", batch_size=3)

    def build(*deviations):
        return build_released_cycle(config, captioner, sd, images, deviations)[0]

    plain, ours = build(), build("unnormalised")
    noisy = plain.noisy_latents(
        Batch(None, CAPTIONS, torch.zeros(3, 4, 8, 8), None, captioner.count_tokens(CAPTIONS)), generator(0)
    )
    output, grey = torch.ones(3, 4, 8, 8), torch.zeros(1, 3, 32, 32)
    for cycle in (plain, ours):
        torch.testing.assert_close(cycle.one_step_latents(noisy, output), noisy.original_sample(output))
    torch.testing.assert_close(plain.captioner_pixels(grey), captioner_pixels(captioner, grey))
    torch.testing.assert_close(ours.captioner_pixels(grey), torch.full_like(grey, 0.5))
    assert not build("previous-sample").one_step_latents(noisy, output).allclose(noisy.original_sample(output))
    bridges = [cycle.bridge for cycle in (plain, build("released-map"), build(*DEVIATIONS))]
    assert [type(bridge) for bridge in bridges] == [Bridge, Bridge, ReleasedBridge]
    assert [bridge.vocabulary_map.kind for bridge in bridges] == ["word-aligned", "released", "released"]
    with pytest.raises(ValueError, match="no deviation is called odd: choose among released-map"):
        build("odd")
    with pytest.raises(ValueError, match="add released-map"):
        build("ends-kept")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_updates": "nobody"}, "image_updates = 'nobody': it should be 'both', 'captioner' or 'generator'"),
        ({"mode": "hard"}, "mode = 'hard': it should be 'soft', 'straight-through' or 'gumbel'"),
        ({"max_timestep": 0.0}, "max_timestep = 0.0: it should be greater than or equal to 0.001"),
        ({"generation": -1.0}, "generation = -1.0: it should be greater than or equal to 0"),
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0: it should be less than 1"),
        ({"label_smoothing": -0.1}, "label_smoothing = -0.1: it should be greater than or equal to 0"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Losses(**wrong)
