"""Captioners behind a prompt: captioner and bridge read the same text, whatever the prompt, the map and the mode."""

from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

from dalleflamingo import cycle_losses, registry
from dalleflamingo.bridge import BRIDGE_MODES, Bridge
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle_losses import LOSS_NAMES, Batch, Cycle, Losses
from dalleflamingo.generator import Generator
from dalleflamingo.research.released import released_map
from dalleflamingo.vocabulary import MAP_KINDS, VocabularyMap

CAPTIONS = ["a red bird on the boat", "two blue cats", "a tree and a large house"]
UNTIDY = [" a red bird  on the boat", "two blue\ncats", "a tree and a large house \n"]  # as published captions are
REGISTERED = sorted({entry.prompt for entry in registry.ENTRIES.values() if entry.kind == "captioner"})
PROMPTS = [*REGISTERED, "a red bird of ", " "]
MAPS = {"blip": [*MAP_KINDS, "released"], "blip2": MAP_KINDS}  # the released rule is for WordPiece only


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("blip", tiny.blip), ("blip2", tiny.blip2), ("sd", tiny.stable_diffusion)):
        (folder / name).mkdir()
        model(folder / name)
    return folder


@cache
def models(folder: Path, name: str) -> tuple[Captioner, Generator]:
    captioner, generator = Captioner.from_pretrained(str(folder / name)), Generator.from_pretrained(str(folder / "sd"))
    cycle_losses.freeze_all_but(captioner.model, cycle_losses.captioner_parameters(captioner))
    cycle_losses.freeze_all_but(generator.pipeline.unet, cycle_losses.generator_parameters(generator))
    return captioner, generator


@cache
def make(folder: Path, name: str, prompt: str, kind: str = "word-aligned") -> tuple[Cycle, Batch]:
    captioner, generator = models(folder, name)
    captioner = type(captioner)(captioner.model, captioner.processor, prompt)
    source, target = captioner.processor.tokenizer, generator.pipeline.tokenizer
    if kind == "released":
        learned = released_map(source, target)
    else:
        learned = VocabularyMap.learn(source, target, captioner.behind_prompt(CAPTIONS), kind)
    learned = learned.resize(captioner.model.config.text_config.vocab_size)
    images = tiny.pictures(3)
    with torch.no_grad():
        hidden, _ = generator.pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)
        latents, pixels = generator.encode_images(images, hidden), captioner.processor(images=images).pixel_values
    pixels = torch.stack([torch.as_tensor(image) for image in pixels])
    batch = Batch(pixels, CAPTIONS, latents, hidden, captioner.count_tokens(CAPTIONS))
    trainable = cycle_losses.captioner_parameters(captioner), cycle_losses.generator_parameters(generator)
    bridge = Bridge(learned, generator.pipeline.text_encoder)
    return Cycle(captioner, generator, bridge, *(own.values() for own in trainable)), batch


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_registry_has_captioners_with_and_without_a_prompt():
    assert {"", "a photo of", "a picture of"} <= set(REGISTERED)


@pytest.mark.parametrize("mode", BRIDGE_MODES)
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in MAPS.items() for kind in kinds])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_losses_move_both_models_behind_every_prompt(folder, name, kind, prompt, mode):
    cycle, batch = make(folder, name, prompt, kind)
    cycle.losses = Losses(mode=mode)
    found = cycle.image_losses(batch, noise()) | cycle.text_losses(batch, noise())
    assert tuple(found) == LOSS_NAMES
    for name, loss in found.items():
        gradients = torch.autograd.grad(
            loss, [*cycle.trainable["captioner"], *cycle.trainable["generator"]], retain_graph=True, allow_unused=True
        )
        count = len(cycle.trainable["captioner"])
        moved = [any(g is not None and g.any() for g in part) for part in (gradients[:count], gradients[count:])]
        assert moved == [name != "generation", name != "caption"], name


@pytest.mark.parametrize("captions", [CAPTIONS, UNTIDY], ids=["tidy", "untidy"])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_certain_captioner_makes_loss_2_loss_3_behind_every_prompt(folder, name, prompt, captions):
    """If P is one-hot along the caption, τ(P M E) is τ(w), so Eq. 2 is Eq. 3 from the same noise."""
    cycle, batch = make(folder, name, prompt)
    batch = Batch(batch.pixel_values, captions, batch.latents, batch.encoder_hidden_states, batch.token_counts)
    cycle.losses = Losses(mode="straight-through")
    with torch.no_grad():
        logits, ids = cycle.captioner.token_logits(batch.pixel_values, captions)
        certain = F.one_hot(ids, logits.shape[-1]).float()
        through = cycle.image_reconstruction(certain, ids, batch, noise())
        labelled = cycle.text_losses(batch, noise())["generation"]
    torch.testing.assert_close(through, labelled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("captions", [CAPTIONS, UNTIDY], ids=["tidy", "untidy"])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_and_caption_have_the_tokens_of_the_text_that_they_are_together(folder, name, prompt, captions):
    captioner = make(folder, name, prompt)[0].captioner
    tokenizer, special = captioner.processor.tokenizer, {captioner.pad_id, captioner.end_id}
    _, ids = captioner.token_logits(tiny.pictures(3), captions)
    begun = captioner.prompt_ids.tolist()
    for row, caption in zip(ids.tolist(), CAPTIONS, strict=True):
        words = [id for id in row if id not in special]
        together = tokenizer(f"{prompt.strip()} {caption}".strip(), add_special_tokens=False).input_ids
        assert [*begun, *words][-len(together) :] == together
        assert captioner.count_tokens([caption]).item() == len(words) + 1


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_map_aligns_captions_as_a_user_has_them(folder, name, prompt):
    """Without `behind_prompt`: the tokens tell whether a space precedes the caption."""
    cycle, batch = make(folder, name, prompt)
    _, ids = cycle.captioner.token_logits(batch.pixel_values, CAPTIONS)
    rows, align = cycle.bridge.caption_ids(ids), cycle.bridge.vocabulary_map.align
    expected = align(rows, cycle.captioner.behind_prompt(CAPTIONS))
    for texts in (CAPTIONS, [f" {caption}" for caption in CAPTIONS]):
        assert align(rows, texts) == expected == align(rows)
    with pytest.raises(ValueError, match="give each row its own text"):
        align(rows, CAPTIONS[::-1])


@pytest.mark.parametrize("name", MAPS)
def test_an_empty_caption_is_nothing_but_its_end_behind_a_prompt(folder, name):
    assert make(folder, name, "a photo of")[0].captioner.count_tokens(["", " ", "\n"]).tolist() == [1, 1, 1]
