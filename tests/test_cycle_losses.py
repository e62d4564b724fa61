"""The four losses against plain transcriptions of their equations, and whom each of them moves."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import PNDMScheduler
from PIL import Image

from dalleflamingo import cycle_losses
from dalleflamingo.bridge import Bridge
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle_losses import NAMES, Batch, Cycle, Losses, as_seen, total
from dalleflamingo.generator import Generator
from dalleflamingo.vocabulary import VocabularyMap

CAPTIONS = ["a red bird on the boat", "two blue cats", "a tree and a large house in the red boat"]


def make(folder: Path, captioner: str = "blip", prediction_type: str = "epsilon", **losses) -> tuple[Cycle, Batch]:
    """A cycle of tiny models, and a batch, in float64."""
    for name, model in (("captioner", getattr(tiny, captioner)), ("sd", tiny.stable_diffusion)):
        (folder / name).mkdir()
        model(folder / name)
    captioner = Captioner.from_pretrained(str(folder / "captioner"), dtype=torch.float64)
    generator = Generator.from_pretrained(str(folder / "sd"), dtype=torch.float64)
    scheduler = generator.pipeline.scheduler
    scheduler.register_to_config(prediction_type=prediction_type)
    source, target = captioner.processor.tokenizer, generator.pipeline.tokenizer
    learned = VocabularyMap.learn(source, target, CAPTIONS).widened(captioner.model.config.text_config.vocab_size)
    bridge = Bridge(learned, generator.pipeline.text_encoder)
    learns = cycle_losses.captioner_parameters(captioner), cycle_losses.generator_parameters(generator)
    for model, own in zip((captioner.model, generator.pipeline.unet), learns, strict=True):
        cycle_losses.freeze_all_but(model, own)
    for frozen in (generator.pipeline.text_encoder, generator.pipeline.vae):
        frozen.requires_grad_(False)
    pictures = tiny.pictures(3)
    with torch.no_grad():
        ids = target(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = generator.pipeline.text_encoder(ids).last_hidden_state
    pixels = captioner.processor(images=pictures, return_tensors="pt").pixel_values.double()
    pieces = captioner.count_tokens(CAPTIONS)
    batch = Batch(pixels, CAPTIONS, generator.latents(pictures, states), states, pieces)
    return Cycle(captioner, generator, bridge, *(own.values() for own in learns), Losses(**losses)), batch


def drawn(cycle: Cycle, batch: Batch, seed: int = 0) -> dict[str, torch.Tensor]:
    return cycle.from_image(batch, generator(seed)) | cycle.from_text(batch, generator(seed + 1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def said(cycle: Cycle, pixels: torch.Tensor, captions: list[str]) -> float:
    """−log p of each piece and of the end, a caption and a piece at a time, by BLIP's own decoder."""
    model, tokenizer, spent = cycle.captioner.model, cycle.captioner.processor.tokenizer, []
    for picture, caption in zip(pixels, captions, strict=True):
        seen = model.vision_model(picture[None]).last_hidden_state
        ids = [model.config.text_config.bos_token_id, *tokenizer(caption).input_ids[1:]]
        for t in range(1, len(ids)):
            logits = model.text_decoder(input_ids=torch.tensor([ids[:t]]), encoder_hidden_states=seen).logits[0, -1]
            spent.append(-logits.log_softmax(-1)[ids[t]])
    return torch.stack(spent).mean()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_each_loss_is_its_equation(tmp_path, prediction_type):
    cycle, batch = make(tmp_path, prediction_type=prediction_type, mode="soft")
    found = drawn(cycle, batch)
    pipeline, source = cycle.generator.pipeline, cycle.captioner.processor.tokenizer
    alphas = pipeline.scheduler.alphas_cumprod.double()

    def asked(seed: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = generator(seed)
        t = torch.randint(1000, (3,), generator=draw)
        noise = torch.randn(batch.latents.shape, generator=draw).double()
        a = alphas[t].view(3, 1, 1, 1)
        z_t = a**0.5 * batch.latents + (1 - a) ** 0.5 * noise
        answer = pipeline.unet(z_t, t, encoder_hidden_states=states).sample
        target = noise if prediction_type == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * batch.latents
        return a, z_t, answer, target

    with torch.no_grad():
        expected = {"caption": said(cycle, batch.pixel_values, CAPTIONS)}
        ids = source(CAPTIONS, padding=True, return_tensors="pt").input_ids[:, 1:]
        logits, _ = cycle.captioner.token_logits(batch.pixel_values, CAPTIONS)
        states = cycle.bridge(logits.softmax(-1), ids, CAPTIONS)
        _, _, answer, target = asked(0, states)
        expected["image_reconstruction"] = ((answer - target) ** 2).mean()
        a, z_t, answer, target = asked(1, batch.states)
        expected["generation"] = ((answer - target) ** 2).mean()
        if prediction_type == "epsilon":
            clean = (z_t - (1 - a) ** 0.5 * answer) / a**0.5
        else:
            clean = a**0.5 * z_t - (1 - a) ** 0.5 * answer
        pictures = pipeline.vae.decode(clean / pipeline.vae.config.scaling_factor).sample
        expected["caption_reconstruction"] = said(cycle, as_seen(cycle.captioner, pictures), CAPTIONS)
    assert tuple(found) == NAMES
    for name in NAMES:
        assert found[name].item() == pytest.approx(expected[name].item(), abs=1e-6), name


def test_the_whole_is_the_weighted_sum_and_what_has_no_weight_is_not_computed(tmp_path):
    cycle, batch = make(tmp_path, caption=0.5, generation=0.0, caption_reconstruction=2.0)
    found = drawn(cycle, batch)
    assert tuple(found) == ("caption", "image_reconstruction", "caption_reconstruction")
    expected = 0.5 * found["caption"] + found["image_reconstruction"] + 2 * found["caption_reconstruction"]
    torch.testing.assert_close(total(found, cycle.weights), expected)
    nothing = Losses(*[0.0] * 4)
    cycle.weights = nothing
    assert drawn(cycle, batch) == {}


@pytest.mark.parametrize("latest", [1.0, 0.6])
def test_the_mean_over_the_parts_of_a_batch_is_the_loss_of_the_whole(tmp_path, latest):
    cycle, batch = make(tmp_path, latest=latest)
    whole, parts = drawn(cycle, batch), []
    for i in range(3):
        own = slice(i, i + 1)
        part = Batch(batch.pixel_values[own], CAPTIONS[own], batch.latents[own], batch.states[own], batch.pieces, i)
        parts.append(drawn(cycle, part))
    for name in NAMES:
        torch.testing.assert_close(sum(part[name] for part in parts) / 3, whole[name], msg=name)


MOVES = {"caption": {"captioner"}, "generation": {"generator"}}
BOTH = {"captioner", "generator"}


@pytest.mark.parametrize("captioner", ["blip", "blip2"])
@pytest.mark.parametrize("moved", ["both", "captioner", "generator"])
def test_whom_each_loss_moves(tmp_path, captioner, moved):
    cycle, batch = make(tmp_path, captioner, image_updates=moved, caption_updates=moved)
    wanted = MOVES | dict.fromkeys(NAMES[1::2], BOTH if moved == "both" else {moved})
    for name in NAMES:
        cycle.weights = dataclasses.replace(cycle.weights, **{other: float(other == name) for other in NAMES})
        total(drawn(cycle, batch), cycle.weights).backward()
        reached = {who for who, own in cycle.learns.items() if all(p.grad is not None and p.grad.any() for p in own)}
        touched = {who for who, own in cycle.learns.items() if any(p.grad is not None for p in own)}
        assert reached == touched == wanted[name], name
        for who, model in (("captioner", cycle.captioner.model), ("generator", cycle.generator.pipeline.unet)):
            learning = {id(p) for p in cycle.learns[who]}
            assert all(p.grad is None for p in model.parameters() if id(p) not in learning)
            model.zero_grad(set_to_none=True)


def test_late_pictures_are_left_out_of_the_caption_reconstruction(tmp_path):
    cycle, batch = make(tmp_path)
    timesteps = torch.randint(1000, (3,), generator=generator(1))
    order = timesteps.sort().values
    share = (order[1].item() + 1) / 1000  # the latest of the three is too late
    cycle.weights = dataclasses.replace(cycle.weights, latest=share)
    found = cycle.from_text(batch, generator(1))["caption_reconstruction"]
    seen = []
    tell = cycle.captioner.token_logits
    cycle.captioner.token_logits = lambda images, captions: seen.append(captions) or tell(images, captions)
    cycle.from_text(batch, generator(1))
    assert seen == [[caption for caption, t in zip(CAPTIONS, timesteps, strict=True) if t <= order[1]]]
    cycle.weights = dataclasses.replace(cycle.weights, latest=1e-6)
    nothing = cycle.from_text(batch, generator(1))["caption_reconstruction"]
    assert found > 0 == nothing and nothing.requires_grad


def test_what_the_captioner_is_shown_is_what_its_processor_makes(tmp_path):
    cycle, _ = make(tmp_path)
    processor = cycle.captioner.processor.image_processor
    large = [picture.resize((50, 50), Image.Resampling.BICUBIC) for picture in tiny.pictures(3)]
    scaled = torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).double() / 127.5 - 1
    expected = processor(images=large, return_tensors="pt").pixel_values.double()
    found = as_seen(cycle.captioner, scaled)
    grey = 1 / 255 / min(processor.image_std)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1.6 * grey  # PIL rounds twice
    beyond = torch.full((1, 3, 32, 32), 7.0, dtype=torch.float64)
    torch.testing.assert_close(as_seen(cycle.captioner, beyond), as_seen(cycle.captioner, beyond / 7))


def test_pictures_can_be_decoded_small(tmp_path):
    cycle, batch = make(tmp_path)
    cycle.weights = dataclasses.replace(cycle.weights, decoded_size=8)
    decode, sizes = cycle.generator.decode, []
    cycle.generator.decode = lambda latents: sizes.append(latents.shape[-2:]) or decode(latents)
    cycle.from_text(batch, generator(0))["caption_reconstruction"].backward()
    assert sizes == [(4, 4)]
    flat = torch.full((1, 4, 8, 8), 0.3, dtype=torch.float64)
    torch.testing.assert_close(cycle._reduced(flat), flat[..., :4, :4])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_previous_sample_is_what_the_scheduler_makes_of_clean_latents(tmp_path, prediction_type):
    """DDPM's mean (Ho et al. 2020, Eq. 7) with z in the place of z_t, and the variance's noise at t > 0."""
    cycle, batch = make(tmp_path, prediction_type=prediction_type, previous_sample=True)
    scheduler = cycle.generator.pipeline.scheduler
    noised = cycle.noised(batch, generator(1))
    noised = dataclasses.replace(noised, timesteps=torch.tensor([0, 400, 900]))
    alphas, answer = scheduler.alphas_cumprod.double(), torch.randn(batch.latents.shape, dtype=torch.float64)
    torch.manual_seed(3)
    found = cycle._one_step(noised, answer)
    torch.manual_seed(3)
    for i, t in enumerate((0, 400, 900)):
        z, a, before = batch.latents[i], alphas[t], alphas[t - 1] if t else torch.tensor(1.0).double()
        step = a / before
        if prediction_type == "epsilon":
            clean = (z - (1 - a) ** 0.5 * answer[i]) / a**0.5
        else:
            clean = a**0.5 * z - (1 - a) ** 0.5 * answer[i]
        clean = clean.clamp(-1, 1) if scheduler.config.clip_sample else clean
        mean = before**0.5 * (1 - step) / (1 - a) * clean + step**0.5 * (1 - before) / (1 - a) * z
        variance = ((1 - before) / (1 - a) * (1 - step)).clamp(min=1e-20)
        noise = torch.randn(z.shape, dtype=torch.float64) if t else 0
        torch.testing.assert_close(found[i], mean + variance**0.5 * noise, atol=1e-5, rtol=1e-5)
    cycle.generator.pipeline.scheduler = PNDMScheduler.from_config(scheduler.config)  # Stable Diffusion's, no DDPM
    torch.manual_seed(3)
    torch.testing.assert_close(cycle._one_step(noised, answer), found)


def test_a_sampled_caption_is_the_same_in_every_part_of_a_batch(tmp_path):
    cycle, batch = make(tmp_path, mode="gumbel")
    logits = torch.randn(3, 7, 40, dtype=torch.float64)
    whole = cycle._relaxed(logits, batch, generator(4))
    part = dataclasses.replace(batch, first=1)
    torch.testing.assert_close(cycle._relaxed(logits[1:, :5], part, generator(4)), whole[1:, :5])
    assert (whole.argmax(-1) != cycle._relaxed(logits, batch, generator(5)).argmax(-1)).any()
    assert (cycle._relaxed(logits[:1].expand(3, -1, -1), batch, generator(4)).argmax(-1).unique(dim=0)).shape[0] == 3


def test_the_normalisation_can_be_left_out(tmp_path):
    cycle, batch = make(tmp_path, unnormalised=True)
    black = -torch.ones(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(as_seen(cycle.captioner, black, normalised=False), torch.zeros_like(black))
    shown, look = [], cycle.captioner.token_logits
    cycle.captioner.token_logits = lambda images, captions: shown.append(images) or look(images, captions)
    cycle.from_text(batch, generator(0))
    assert 0 <= shown[0].min() and shown[0].max() <= 1


@pytest.mark.parametrize(("wrong", "message"), [
    ({"image_updates": "nobody"}, "image_updates = 'nobody': choose one of both, captioner, generator"),
    ({"latest": 0.0}, "latest = 0.0: it is a share"),
    ({"generation": -1.0}, "none may be below 0"),
])  # fmt: skip
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Losses(**wrong)
