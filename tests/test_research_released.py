"""How the released code samples and trains, against the stock library that it calls."""

import dataclasses

import pytest
import tiny
import tiny_cycle
import torch
from accelerate import Accelerator

from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import train_cycle
from dalleflamingo.cycle_losses import Losses
from dalleflamingo.generator import Generator
from dalleflamingo.research.released import (
    ANY_WORDS,
    DROPOUT,
    ReleasedSampling,
    build_released_cycle,
    dropping_out,
    sample_latents,
    text_dropout,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_cycle.save_models(tmp_path_factory.mktemp("models"))


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prompt", ["", "a bird"])
@pytest.mark.parametrize("limits", [{}, {"min_length": 9}, {"max_length": 6}, {"min_length": 5, "max_length": 7}])
@pytest.mark.parametrize("penalty", [1.0, 1.1, 2.0])
def test_the_likeliest_token_is_that_of_stock_decoding(folder, prompt, limits, penalty):
    """A nucleus of one token leaves nothing to chance."""
    captioner = Captioner.from_pretrained(str(folder / "blip"), prompt=prompt)
    images = tiny.pictures(4)
    strategy = ReleasedSampling(p=1e-9, repetition_penalty=penalty, end_id=captioner.end_id, **limits)
    found = captioner.sample(images, [[i] for i in range(4)], strategy, min_words=0, max_words=ANY_WORDS)
    model = captioner.model
    with torch.no_grad():
        pixels = captioner.processor(images=images, return_tensors="pt").pixel_values
        ids = model.text_decoder.generate(
            input_ids=captioner.prompt_ids.repeat(4, 1),
            encoder_hidden_states=model.vision_model(pixels).last_hidden_state,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=captioner.end_id,
            pad_token_id=captioner.pad_id,
            **{"max_length": 64} | limits,
        )
    new = ids[:, len(captioner.prompt_ids) :]
    expected = [text.strip() for text in captioner.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    assert [caption for [caption] in found] == expected


def test_a_penalty_of_1_is_plain_nucleus_sampling(folder):
    captioner = Captioner.from_pretrained(str(folder / "blip"))
    images, seeds = tiny.pictures(3), [[1, 2, 3]] * 3
    assert captioner.sample(images, seeds, ReleasedSampling(repetition_penalty=1.0)) == captioner.sample(images, seeds)
    assert captioner.sample(images, seeds, ReleasedSampling(repetition_penalty=5.0)) != captioner.sample(images, seeds)


def test_limits_in_tokens_need_the_token_that_ends_a_caption():
    with pytest.raises(ValueError, match="need end_id"):
        ReleasedSampling(max_length=20)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["blip", "blip2"])
def test_dropout_acts_in_the_text_model_and_only_inside_the_context(folder, name, tmp_path):
    path = folder / "blip" if name == "blip" else tiny.blip2(tmp_path)
    captioner = Captioner.from_pretrained(str(path))
    images, captions = tiny.pictures(2), ["a red bird", "two cats"]
    pixels = captioner.processor(images=images, return_tensors="pt").pixel_values
    modules = text_dropout(captioner.model)
    rates = [(module.p, module.training) for module in modules]

    @torch.no_grad()
    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return captioner.token_logits(pixels, captions)[0]

    plain = logits(0)
    with dropping_out(modules):
        assert {(module.p, module.training) for module in modules} == {(DROPOUT, True)}
        assert torch.equal(logits(1), logits(1)) and not logits(1).allclose(logits(2))
        vision = [one for key, one in captioner.model.named_modules() if key.startswith("vision_model")]
        assert not any(module.training for module in vision)
    assert [(module.p, module.training) for module in modules] == rates and torch.equal(logits(3), plain)


@pytest.mark.parametrize("half", ["image_losses", "text_losses"])
def test_train_mode_reaches_the_losses_of_either_half_and_ends_with_them(folder, half):
    config = dataclasses.replace(tiny_cycle.SMALL, losses=Losses())

    def loss(deviations: tuple[str, ...], seed: int) -> float:
        models, dataset = tiny_cycle.models(folder), tiny_cycle.dataset(folder)
        cycle, batches, _ = build_released_cycle(config, *models, dataset, deviations)
        batch, draw = batches.batch(0), torch.Generator().manual_seed(0)
        torch.manual_seed(seed)
        found = getattr(cycle, half)(batch, draw)
        assert not any(module.training for module in cycle.captioner.model.modules())
        return found["caption" if half == "image_losses" else "caption_reconstruction"].item()

    assert loss(("train-mode",), 1) == loss(("train-mode",), 1) != loss(("train-mode",), 2)
    assert loss((), 1) == loss((), 2) != loss(("train-mode",), 1)


def test_sampled_latents_are_the_stock_librarys(folder):
    generator = Generator.from_pretrained(str(folder / "sd"))
    vae, images = generator.pipeline.vae, tiny.pictures(3)
    like = next(generator.pipeline.unet.parameters())
    mean = generator.encode_images(images, like)
    pixels = generator.pipeline.image_processor.preprocess(
        [image.resize((generator.image_size,) * 2) for image in images]
    )
    handle = sample_latents(vae)
    torch.manual_seed(5)
    found = generator.encode_images([image.resize((generator.image_size,) * 2) for image in images], like)
    again = generator.encode_images(images, like)
    handle.remove()
    torch.manual_seed(5)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
    torch.testing.assert_close(found, expected)
    assert not found.allclose(again) and not found.allclose(mean)
    torch.testing.assert_close(generator.encode_images(images, like), mean)


def test_every_step_samples_its_latents_anew_and_a_run_repeats_them(folder, tmp_path):
    config, runs = dataclasses.replace(tiny_cycle.SMALL, steps=2), []
    for name in ("one", "two"):
        cycle, batches, trainable = build_released_cycle(
            config, *tiny_cycle.models(folder), tiny_cycle.dataset(folder), ["sampled-latents"]
        )
        assert not torch.equal(batches.batch(0).latents, batches.batch(0).latents)
        train_cycle(config, cycle, batches, trainable, tmp_path / name, Accelerator(cpu=True))
        runs.append(torch.cat([parameter.detach().flatten() for parameter in trainable.parameters()]))
    assert torch.equal(*runs)
