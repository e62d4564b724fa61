"""Captioners and generators beyond BLIP and Stable Diffusion: seeds, limits, pipelines that we did not write."""

from collections import Counter
from dataclasses import replace

import fakes
import numpy as np
import pytest
import tiny
import tiny_adapters
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionXLPipeline

from dalleflamingo import reconstruct
from dalleflamingo.adapters.captioners import ImageTextCaptioner, OneEnd
from dalleflamingo.adapters.generators import LatentConsistency, PipelineGenerator, SdxlTurbo
from dalleflamingo.adapters.safety import SafetyChecker
from dalleflamingo.decoding import Nucleus, count_words
from dalleflamingo.evaluation.similarities import similarities_among
from dalleflamingo.generator import Generator
from dalleflamingo.sources.models import class_of

CAPTIONERS = {
    "vit-gpt2": (tiny_adapters.vit_gpt2, ""),
    "git": (tiny_adapters.git, ""),
    "llava": (tiny_adapters.llava, tiny_adapters.PROMPT),
}
CAPTIONS = ["a red bird", "a blue boat", "two cats"]


@pytest.fixture(scope="module", params=CAPTIONERS)
def captioner(request, tmp_path_factory):
    make, prompt = CAPTIONERS[request.param]
    return ImageTextCaptioner.from_pretrained(make(tmp_path_factory.mktemp(request.param)), prompt=prompt)


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    return tiny_adapters.sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def consistency(tmp_path_factory):
    return tiny_adapters.latent_consistency(tmp_path_factory.mktemp("lcm"))


# ── captioners ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_caption_depends_on_its_image_and_seed_alone(captioner, monkeypatch):
    images, seeds = tiny.pictures(3), [[1, 2], [3], [4, 5, 1]]
    together = captioner.sample(images, seeds)
    for image, row, captions in zip(images, seeds, together, strict=True):
        assert [captioner.sample([image], [[seed]]) for seed in row] == [[[caption]] for caption in captions]
    monkeypatch.setattr("dalleflamingo.adapters.captioners.BATCH", 4)
    assert captioner.sample(images, seeds) == together
    assert len({caption for row in together for caption in row}) == 6
    with pytest.raises(ValueError, match="3 images but 1 rows of seeds"):
        captioner.sample(images, [[1]])


def test_captions_keep_the_limits_of_words(captioner):
    images = tiny.pictures(4)
    rows = captioner.sample(images, [[k, k + 9] for k in range(4)], max_words=7)
    captions = [caption for row in rows for caption in row]
    captions += captioner.describe(images, max_words=7)
    assert {5 <= count_words(caption) <= 7 for caption in captions} == {True}
    assert not any(word in caption for caption in captions for word in ("describe it describe", "<", "user user"))


def test_a_description_is_that_of_stock_beam_search(captioner):
    """With no more rules than the number of tokens, which every caption then has."""
    images = tiny.pictures(2)
    text = {"text": [captioner.prompt] * 2} if captioner.prompt else {}
    inputs = captioner.processor(images=images, return_tensors="pt", **text)
    stock = captioner.model.generate(**inputs, num_beams=4, max_new_tokens=6, do_sample=False)
    before = inputs.input_ids.shape[1] if text else 1
    expected = captioner.tokenizer.batch_decode(stock[:, before:], skip_special_tokens=True)
    found = captioner.describe(images, min_words=0, max_words=99, num_beams=4, max_new_tokens=6)
    assert found == [" ".join(text.split()) for text in expected]


def test_samples_have_the_models_probabilities(tmp_path):
    """First tokens of many seeds against the softmax of the model's first logits."""
    captioner = ImageTextCaptioner.from_pretrained(tiny_adapters.git(tmp_path))
    [image], n = tiny.pictures(1), 1500
    inputs = captioner.processor(images=[image], return_tensors="pt")
    start = torch.tensor([[captioner.tokenizer.cls_token_id]])
    with torch.no_grad():
        probabilities = captioner.model(input_ids=start, **inputs).logits[0, -1].softmax(-1)
    [captions] = captioner.sample([image], [list(range(n))], Nucleus(1.0), min_words=0, max_words=1)
    first = Counter(captioner.tokenizer(caption).input_ids[1] for caption in captions)
    words = [id for token, id in captioner.tokenizer.get_vocab().items() if token.isalpha()]
    for id in sorted(words, key=lambda id: -probabilities[id])[:3]:
        p = float(probabilities[id])
        assert p > 0.05 and abs(first[id] / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_all_tokens_that_end_a_text_count_as_one():
    scores = torch.tensor([[0.5, 1.0, -1.0, 2.0]]).log_softmax(-1)
    found = OneEnd([1, 3])(None, scores.clone())
    torch.testing.assert_close(found[0, 1].exp(), scores[0, [1, 3]].exp().sum())
    assert found[0, 3] == -torch.inf and found[0, 0] == scores[0, 0]


def test_a_captioner_has_a_fingerprint_of_its_own(captioner, tmp_path):
    known = captioner.fingerprint()
    assert known == captioner.fingerprint()
    other = ImageTextCaptioner(captioner.model, captioner.processor, "another prompt")
    assert other.fingerprint() != known


# ── generators ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "folder"), [(SdxlTurbo, "turbo"), (LatentConsistency, "consistency")])
def test_an_image_depends_on_its_caption_and_seed_alone(kind, folder, request):
    generator = kind.from_pretrained(request.getfixturevalue(folder))
    together = generator.render(CAPTIONS, [1, 2, 1], batch_size=3)
    one_by_one = generator.render(CAPTIONS, [1, 2, 1], batch_size=1)
    first, other = generator.render(CAPTIONS[:1] * 2, [1, 7])
    for image, alone in zip([*together, first], [*one_by_one, one_by_one[0]], strict=True):
        assert np.abs(np.subtract(image, alone, dtype=float)).max() <= 1  # a batch may be summed in another order
    assert np.abs(np.subtract(first, other, dtype=float)).max() > 1


@pytest.mark.parametrize(
    ("kind", "folder", "pipeline", "steps", "guidance"),
    [
        (SdxlTurbo, "turbo", StableDiffusionXLPipeline, 1, 0.0),
        (PipelineGenerator, "turbo", StableDiffusionXLPipeline, 3, 5.0),
        (LatentConsistency, "consistency", LatentConsistencyModelPipeline, 4, 8.0),
    ],
)
def test_images_are_those_of_the_stock_pipeline(kind, folder, pipeline, steps, guidance, request):
    folder = request.getfixturevalue(folder)
    stock = pipeline.from_pretrained(folder)
    if hasattr(stock, "safety_checker"):
        stock.safety_checker = None
    draw = torch.Generator().manual_seed(3)
    [expected] = stock(CAPTIONS[0], generator=draw, num_inference_steps=steps, guidance_scale=guidance).images
    [found] = kind.from_pretrained(folder).render(CAPTIONS[:1], [3], steps=3, guidance_scale=5.0)
    assert found.tobytes() == expected.tobytes()


def test_a_caption_that_a_text_encoder_would_cut_is_refused(turbo):
    generator = SdxlTurbo.from_pretrained(turbo)
    generator.check_caption("a red bird")
    with pytest.raises(ValueError, match="the model reads 16"):
        generator.check_caption("a red bird on a blue boat " * 3)


def test_fingerprints_tell_pipelines_and_steps_apart(turbo, consistency):
    kinds = (SdxlTurbo, turbo), (PipelineGenerator, turbo), (LatentConsistency, consistency)
    assert len({kind.from_pretrained(folder).fingerprint() for kind, folder in kinds}) == 3


def test_the_registry_opens_them():
    assert class_of("git-base-coco") is ImageTextCaptioner
    assert (class_of("sdxl-turbo"), class_of("lcm-dreamshaper-v7")) == (SdxlTurbo, LatentConsistency)
    assert class_of("sd-v1-4-safety-checker") is SafetyChecker


# ── the safety checker ───────────────────────────────────────────────────────────────────────────────────────────────


def test_no_pipeline_blackens_images(consistency):
    assert LatentConsistency.from_pretrained(consistency).pipeline.safety_checker is None
    stock = LatentConsistencyModelPipeline.from_pretrained(consistency)
    for kind in (PipelineGenerator, Generator):
        with pytest.raises(ValueError, match="black images, which would be ranked"):
            kind(stock)


def test_the_verdict_is_the_stock_checkers_and_leaves_the_images_alone(consistency):
    checker = SafetyChecker.from_pretrained(consistency)
    images = tiny.pictures(6)
    before = [image.tobytes() for image in images]
    pixels = checker.processor(images, return_tensors="pt").pixel_values
    _, expected = checker.checker(clip_input=pixels, images=np.ones((6, 4, 4, 3)))
    found = checker.compare(["a", "b"], [images[:3], images[3:]])
    assert found.shape == (2, 3) and found.flatten().bool().tolist() == expected
    assert set(expected) == {False, True}
    assert [image.tobytes() for image in images] == before


class TooRed:
    """In place of the checker."""

    name, of_images = SafetyChecker.name, True

    def compare(self, sources, candidates):
        return torch.tensor([[float(np.asarray(image)[..., 0].mean() > 128) for image in row] for row in candidates])

    def fingerprint(self):
        return self.name


@pytest.mark.parametrize("way", ["images", "texts"])
def test_the_verdict_on_each_image_is_a_column_in_both_directions(way, tmp_path):
    models, data = (fakes.Captioner(), fakes.Generator()), fakes.dataset(tmp_path / "mine", 4)
    if way == "images":
        table = fakes.image_text_image(data, *models, [fakes.MeanColour(), TooRed()], tmp_path / "run")
    else:
        colours = [replace(one, references=(f"a {name}",)) for one, name in zip(data, fakes.COLOURS, strict=True)]
        similarities = [fakes.PairSimilarity("letters", fakes.common_letters), TooRed()]
        data = replace(data, examples=tuple(colours))
        table = reconstruct.text_image_text(data, *models, similarities, tmp_path / "run", fakes.SETTINGS)
    images = [reconstruct.open_image(tmp_path / "run" / name) for name in table["image"]]
    assert table["unsafe"].tolist() == TooRed().compare(["any"], [images]).flatten().tolist()
    assert set(table["unsafe"]) == {0, 1}
    assert similarities_among(table) == ["colour" if way == "images" else "letters"]
