"""Each other definition against its closed form or the library's own, and the table that they end up in."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import tiny_cycle
import torch
from PIL import Image

from dalleflamingo import cycle, cycle_losses, profiles, reconstruct
from dalleflamingo.cycle_losses import caption_loss
from dalleflamingo.datasets import Dataset, Example, clean_caption
from dalleflamingo.evaluation import image_metrics
from dalleflamingo.evaluation.image_metrics import fid, inception_score
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.evaluation.text_encoders import ClipText
from dalleflamingo.evaluation.word_movers import FARTHEST, WordVectors
from dalleflamingo.generator import add_noise
from dalleflamingo.research import definition_effects as effects_of
from dalleflamingo.research import definitions, released
from dalleflamingo.research.definition_effects import PER_CAPTION, STOP_WORDS, Effect, Rendered, unprojected
from dalleflamingo.similarity import ClipImage, load_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_cycle.save_models(tmp_path_factory.mktemp("models"))


# ── CLIP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_projection_of_the_unprojected_embedding_is_the_embedding(tmp_path):
    model, preprocess, _ = load_clip(str(tiny.clip(tmp_path)))

    def tokenizer(texts: list[str]) -> torch.Tensor:  # open_clip reads a text at its highest id
        rows = [[1, *(len(word) for word in text.split()), 63] for text in texts]
        return torch.tensor([row + [0] * (16 - len(row)) for row in rows])

    image, text = ClipImage(model, preprocess), ClipText(model, tokenizer)
    for encoder, items, projection in (
        (image, tiny.pictures(3), model.visual.proj),
        (text, ["a bird", "two boats", "a"], model.text_projection),
    ):
        before = encoder.embed(items)
        found = unprojected(encoder).embed(items)
        assert found.shape == (3, projection.shape[0]) != before.shape
        torch.testing.assert_close(found @ projection, before)
        assert torch.equal(encoder.embed(items), before)  # the encoder itself is as it was
        assert unprojected(encoder).fingerprint() != encoder.fingerprint()
    with pytest.raises(ValueError, match="VisionTransformer has no proj"):
        unprojected(unprojected(image))


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────

VECTORS = {"red": [1.0, 0.0], "boat": [0.0, 1.0], "the": [-1.0, 0.0], "ship": [0.0, 2.0]}


def test_word_movers_distances_to_the_nearest_and_to_all_references():
    vectors = WordVectors("made up", lambda word: np.array(VECTORS[word]) if word in VECTORS else None)
    references = [["ship", "red", "the"], ["red boat"]]
    apart = 2**0.5  # of two orthogonal vectors of length 1
    nearest = effects_of.word_movers(vectors, ["boat", "the red boat"], references)
    assert nearest == pytest.approx([0, 2 / 6 + apart / 6], abs=1e-6)  # "the" goes to red (1/6), to boat (1/6)
    mean = effects_of.word_movers(vectors, ["boat", "the red boat"], references, mean=True)
    assert mean == pytest.approx([2 * apart / 3, nearest[1]], abs=1e-6)
    others = [["the ship", "red"], ["the red boat"]]
    without = effects_of.word_movers(vectors, ["the boat", "red boat"], others, leave_out=frozenset({"the"}))
    assert without == pytest.approx([0, 0], abs=1e-6)
    nothing = effects_of.word_movers(vectors, ["the"], [["boat"]], leave_out=frozenset({"the"}))
    assert nothing == pytest.approx([FARTHEST])


def test_stop_words_are_function_words():
    assert STOP_WORDS >= {"a", "the", "of", "to", "in", "on", "above", "below", "is", "and", "with", "there"}
    assert not STOP_WORDS & {"left", "right", "red", "boat", "large", "small", "next", "front", "picture"}
    assert all(re.fullmatch("[a-z]+", word) for word in STOP_WORDS)


def test_punctuation_as_cocos_is_what_cleaning_takes_away():
    for caption in ("a man riding slowly", "two cats, well-fed"):
        assert clean_caption(effects_of.punctuated_as_coco(caption)) == caption
        assert effects_of.punctuated_as_coco(caption) != caption


def test_losses_of_tokens_add_up_to_loss_1(folder):
    captioner, _ = tiny_cycle.models(folder)
    dataset = tiny_cycle.dataset(folder)
    captions = [example.references[0] for example in dataset]
    losses, counts = effects_of.token_losses(dataset, captioner, captions)
    logits, ids = captioner.token_logits([dataset.open(example) for example in dataset], captions)
    expected = caption_loss(logits, ids, captioner.pad_id, (ids != captioner.pad_id).sum())
    assert losses.sum() / counts.sum() == pytest.approx(expected.item(), rel=1e-5)
    [alone], [count] = effects_of.token_losses(dataset[:1], captioner, captions[:1])
    assert (alone, count) == (pytest.approx(losses[0], rel=1e-4), counts[0])


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_images_come_back_from_a_smaller_size_with_less_detail():
    grey = Image.new("RGB", (64, 64), (10, 20, 30))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    same, smooth = effects_of.through_size([grey, noise], 48)
    assert np.array_equal(same, grey) and smooth.size == (64, 64)
    assert np.asarray(smooth, float).std() < np.asarray(noise, float).std()
    assert np.array_equal(effects_of.through_size([noise], 64)[0], noise)


class _Extractor:
    """Features: an image's mean colour and its deviation. Logits: certain of the class that its red names."""

    def extract(self, images):
        arrays = torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float64)) for image in images])
        features = torch.cat([arrays.mean((1, 2)), arrays.std((1, 2))], dim=1)
        classes = (arrays[:, 0, 0, 0] / 26).long().clamp(max=9)
        return SimpleNamespace(features=features, logits=100.0 * torch.nn.functional.one_hot(classes, 10).double())


def rendered(n: int = 12) -> Rendered:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(n * (1 + PER_CAPTION))]
    dataset = Dataset("some", [Example(i, Path("none"), ("a",)) for i in range(n)])
    return Rendered(dataset, pd.DataFrame(), images[:n], images[n:])


def test_inception_effects_are_of_the_images_that_they_name(monkeypatch):
    monkeypatch.setattr(effects_of, "RESAMPLES_OF_SETS", 20)
    given, extractor = rendered(), _Extractor()
    splits, size, five = effects_of.inception_effects(given, extractor)
    everything = extractor.extract(given.generated)
    assert splits.ours.value == pytest.approx(inception_score(everything.logits))
    assert splits.theirs.value == pytest.approx(inception_score(everything.logits, splits=10))
    assert splits.difference.value < 0 and splits.difference.high < 0
    real, first = extractor.extract(given.real).features, everything.features[::PER_CAPTION]
    assert five.ours.value == size.ours.value == pytest.approx(fid(real, first))
    assert five.theirs.value == pytest.approx(fid(real, everything.features))
    small = [extractor.extract(effects_of.through_size(part, 12)).features for part in (given.real, given.generated)]
    assert size.theirs.value == pytest.approx(fid(small[0], small[1][::PER_CAPTION]))
    assert "12 pixels and back to 16" in size.what


def test_five_images_of_a_caption_are_averaged():
    given = rendered(3)
    given.generated[::PER_CAPTION] = given.real  # the first is the real image itself

    class Pixels:
        def embed(self, images):
            return torch.stack([torch.from_numpy(np.asarray(image, dtype=np.float32)).flatten() for image in images])

    effect = effects_of.five_images_effect(given, Pixels())
    assert effect.ours.value == pytest.approx(0, abs=1e-3)
    others = torch.cat(
        [
            1 - torch.nn.functional.cosine_similarity(*map(Pixels().embed, pair))
            for pair in (([given.real[i // PER_CAPTION] for i in range(15)], given.generated),)
        ]
    )
    assert effect.theirs.value == pytest.approx(100 * others.mean().item(), rel=1e-4) and effect.difference.low > 0


def test_latents_are_sampled_for_the_measurement_only_and_timesteps_are_shared(folder):
    _, generator = tiny_cycle.models(folder)
    dataset = tiny_cycle.dataset(folder)
    images = [dataset.open(example) for example in dataset]
    like = next(generator.pipeline.unet.parameters())
    before = generator.encode_images(images, like)
    [effect] = effects_of.latent_effects(dataset, generator)
    torch.testing.assert_close(generator.encode_images(images, like), before)
    captions = [example.sample_reference(seed=0) for example in dataset]
    hidden, _ = generator.pipeline.encode_prompt(captions, "cpu", 1, False)
    losses = []
    for number in range(effects_of.NOISES):
        noisy = add_noise(before, generator.pipeline.scheduler, torch.Generator().manual_seed(number))
        losses.append(noisy.loss(generator.predict(noisy, hidden)).item())
    assert effect.ours.value == pytest.approx(np.mean(losses), rel=1e-4)
    assert effect.theirs.value != effect.ours.value and effect.difference.n == len(dataset)


# ── rankings and training ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_gain_of_ranking_is_taken_under_both_noises(tmp_path, monkeypatch):
    profile = profiles.PROFILES["smoke"]
    monkeypatch.setenv(profiles.VARIABLE, "smoke")
    dataset = definitions.development_sets(profile)["nocaps"].subset(8)

    def journey(dataset, captioner, generator, similarities, folder, settings, shared_noise):
        assert [one.name for one in similarities] == ["clip"] and settings.candidates == PER_CAPTION
        rows = []
        for example in dataset:
            for k in range(PER_CAPTION):  # one candidate is right; only shared noise lets CLIP see which
                caption = example.references[0] if k == 3 else "a red hat"
                rows.append({"image_id": example.image_id, "candidate": k, "caption": caption})
                rows[-1]["clip"] = float(k == (3 if shared_noise else 0))
        return pd.DataFrame(rows)

    monkeypatch.setattr(effects_of, "image_text_image", journey)
    models = SimpleNamespace(
        captioner=None, generator=None, similarities=[SimpleNamespace(name=n) for n in ("clip", "dino")]
    )
    settings = effects_of.settings_of(profiles.PROFILES["smoke"])
    for effect in effects_of.noise_effects(models, dataset, tmp_path, settings):
        assert effect.ours.value > 0 > effect.theirs.value and effect.difference.high < 0
        assert effect.ours.value == pytest.approx(-4 * effect.theirs.value)  # 1 − 1/5 against 0 − 1/5 of the same


def test_training_changes_one_definition_at_a_time(tmp_path, monkeypatch):
    profile, asked = profiles.PROFILES["smoke"], {}
    dataset = definitions.development_sets(profile)["nocaps"].subset(6)

    def train(run, config, folder, datasets, generated, profile):  # all begin alike: none brings its own models
        asked[run.arm, run.seed] = config, run.kind
        wrong = run.arm == "train-mode"
        captions = {e.image_id: "a" if wrong else e.references[0] for e in datasets["nocaps"]}
        return {"captions": {"nocaps": captions}}

    monkeypatch.setattr(effects_of, "train_and_evaluate", train)
    effects = effects_of.training_effects(profile, dataset, tmp_path, steps=3, seeds=2)
    assert [effect.definition for effect in effects] == ["label-smoothing", "train-mode", "sampled-latents"]
    assert [effect.difference.value < 0 for effect in effects] == [False, True, False]
    for (arm, seed), (config, kind) in asked.items():
        assert (config.steps, config.seed) == (3, seed)
        assert config.losses.label_smoothing == (0.1 if arm == "label-smoothing" else 0.0)
        assert kind.deviations == ({arm} if arm in ("train-mode", "sampled-latents") else set())


# ── intervals and the table ──────────────────────────────────────────────────────────────────────────────────────────


def test_effects_are_paired():
    ours = np.random.default_rng(0).normal(0, 100, 50)
    effect = effects_of.paired_means("clip-image", "it", 2, ours, ours + 1)
    assert effect.difference == Interval(pytest.approx(1), pytest.approx(1), pytest.approx(1), 50, 0)
    assert effect.ours.high - effect.ours.low > 20 and effect.theirs.value == pytest.approx(ours.mean() + 1)


def test_every_definition_is_in_the_table_with_what_was_measured(tmp_path):
    value = Interval(1.0, 0.5, 1.5, 7, 0)
    effects = [
        Effect(key, f"of {key}", 2, value, value, value)
        for key in definitions.DEFINITIONS
        if key not in definitions.NOT_MEASURED
    ]
    (tmp_path / "results").mkdir()
    definitions.write(tmp_path, effects, profiles.PROFILES["smoke"], {"images": 7})
    page = (tmp_path / "definitions.md").read_text(encoding="utf-8")
    for key, one in definitions.DEFINITIONS.items():
        [line] = [line for line in page.splitlines() if line.startswith(f"| {one.name} |")]
        assert one.switch in line and one.theirs in line and one.ours in line
        expected = definitions.NOT_MEASURED.get(
            key, "1.00 [0.50, 1.50] | 1.00 [0.50, 1.50] | +1.00 [+0.50, +1.50] | 7 |"
        )
        assert expected in line
    kept = json.loads((tmp_path / "results/definitions.json").read_text(encoding="utf-8"))
    assert len(kept["effects"]) == len(effects) and kept["images"] == 7 and kept["effects"][0]["difference"]["n"] == 7


def test_what_the_switches_call_exists():
    modules = (effects_of, image_metrics, released, cycle, cycle_losses, reconstruct)
    called = {name for one in definitions.DEFINITIONS.values() for name in re.findall(r"`[^`]*?(\w+)\(", one.switch)}
    assert {"unprojected", "word_movers", "ReleasedSampling", "CycleConfig", "build_released_cycle"} <= called
    for name in called - {"extract", "sample"}:  # of a FeatureExtractor, of a Captioner
        assert any(hasattr(module, name) for module in modules), name
