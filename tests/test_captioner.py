import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from dalleflamingo.captioner import Captioner, without_unreadable
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.decoding import (
    GumbelNoise,
    Nucleus,
    Temperature,
    TopK,
    WordLimits,
    count_words,
    gumbel_noise,
)
from dalleflamingo.miniature.training.tokenizers import train_opt_bpe

PHOTOS = tiny.pictures(7)


@pytest.fixture(scope="module", params=[tiny.blip, tiny.blip2], ids=["blip", "blip2"])
def folder(request, tmp_path_factory):
    return str(request.param(tmp_path_factory.mktemp("captioner")))


@pytest.fixture(scope="module")
def captioner(folder):
    return Captioner.from_pretrained(folder)


@pytest.fixture(scope="module")
def stock(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


# A candidate is a function of (picture, seed)


def test_candidate_depends_on_its_picture_and_seed_alone(captioner):
    seeds = [[10 * b + k for k in range(3)] for b in range(7)]
    together = captioner.sample(PHOTOS, seeds)
    assert len({caption for row in together for caption in row}) > 15
    alone = [[captioner.sample([photo], [[s]])[0][0] for s in row] for photo, row in zip(PHOTOS, seeds, strict=True)]
    assert alone == together
    backwards = captioner.sample(PHOTOS[::-1], [row[::-1] for row in seeds[::-1]])
    assert [row[::-1] for row in backwards[::-1]] == together
    uneven = captioner.sample(PHOTOS, [row[: b % 4] for b, row in enumerate(seeds)])
    assert uneven == [row[: b % 4] for b, row in enumerate(together)]


def test_seed_and_picture_both_matter(captioner):
    (one, other, again), (elsewhere, *_) = captioner.sample(PHOTOS[:2], [[5, 6, 5], [5]])
    assert one == again
    assert len({one, other, elsewhere}) == 3


def test_each_picture_is_encoded_once_for_all_its_candidates(captioner):
    encoded = []
    hook = captioner.model.vision_model.register_forward_hook(lambda _, args, out: encoded.append(len(out[0])))
    try:
        captioner.sample(PHOTOS[:3], [list(range(10))] * 3)
    finally:
        hook.remove()
    assert sum(encoded) == 3


# The distribution is the strategy's

PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
KEPT = {
    Nucleus(0.8): [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0],  # 0.7 is not enough, the third token completes it
    TopK(2): [0.4 / 0.7, 0.3 / 0.7, 0, 0, 0],
    Temperature(0.5): list((PROBABILITIES**2 / (PROBABILITIES**2).sum()).numpy()),
}


@pytest.mark.parametrize(("strategy", "expected"), KEPT.items(), ids=[str(strategy) for strategy in KEPT])
def test_gumbel_max_draws_from_the_filtered_softmax(strategy, expected):
    draws = 20_000
    logits = PROBABILITIES.log().expand(draws, -1) + 3.0
    noisy = GumbelNoise(range(draws))(None, strategy.warper()(None, logits))
    assert _p_value(noisy.argmax(-1), expected) > 1e-3


def test_consecutive_words_are_independent_draws():
    draws = 20_000
    logits, noise = PROBABILITIES.log().expand(draws, -1), GumbelNoise(range(draws))
    first, second = noise(None, logits).argmax(-1), noise(None, logits).argmax(-1)
    assert _p_value(first * 5 + second, torch.outer(PROBABILITIES, PROBABILITIES).flatten().numpy()) > 1e-3


class FirstToken(LogitsProcessor):
    """A nucleus that notes the first sampled token of each row, then ends all captions. Its own strategy."""

    def __init__(self, p, prompt_length, end_id):
        self.nucleus, self.prompt_length, self.end_id = Nucleus(p).warper(), prompt_length, end_id

    def warper(self):
        return self

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.prompt_length:
            return self.nucleus(input_ids, scores)
        self.noted = input_ids[:, -1]
        ends = torch.arange(scores.shape[1]) == self.end_id
        return scores.masked_fill(~ends, -torch.inf)


def test_first_token_is_distributed_as_the_models_nucleus(captioner, stock):
    first = FirstToken(0.9, len(captioner.prompt_ids), captioner.end_id)
    captioner.sample(PHOTOS[:1], [range(4_000)], first, min_words=0)
    pixel_values = captioner.processor(images=PHOTOS[:1], return_tensors="pt").pixel_values
    with torch.no_grad():
        probability = stock(pixel_values, captioner.prompt_ids[None]).logits[0, -1].double().softmax(-1).numpy()
    order = np.argsort(-probability)
    nucleus = order[: np.searchsorted(np.cumsum(probability[order]), 0.9) + 1]
    expected = np.zeros_like(probability)
    expected[nucleus] = probability[nucleus] / probability[nucleus].sum()
    assert 5 < len(nucleus) < len(probability) - 5
    ended = torch.full([4_000 - len(first.noted)], captioner.end_id)  # at once; the others are asked for a second token
    assert _p_value(torch.cat([first.noted, ended]), expected) > 1e-3


@pytest.mark.parametrize("prompt", ["", "a bird of"])
@pytest.mark.parametrize("strategy", [Nucleus(0.9), TopK(10), Temperature(2.0)], ids=str)
def test_sampled_captions_are_those_of_stock_greedy_search_with_the_same_rules(folder, strategy, prompt):
    captioner, seeds = (
        Captioner.from_pretrained(folder, prompt=prompt),
        [[10 * b + k for k in range(4)] for b in range(7)],
    )
    features = captioner.encode_images(captioner._pixel_values(PHOTOS)).repeat_interleave(4, dim=0)
    rules = [captioner._word_limits(3, 9), strategy.warper(), GumbelNoise([seed for row in seeds for seed in row])]
    with torch.no_grad():
        expected = captioner._generate(features, LogitsProcessorList(rules))
    captions = [text for row in captioner.sample(PHOTOS, seeds, strategy, 3, 9) for text in row]
    assert captions == expected and len(set(captions)) > 20


def test_a_caption_that_has_ended_is_computed_no_further(captioner):
    rows, text_model = [], getattr(captioner.model, captioner._TEXT_MODEL)
    hook = text_model.register_forward_hook(lambda _, args, output: rows.append(len(output.logits)))
    try:
        captions = captioner.sample(PHOTOS, [range(10)] * 7, Temperature(2.0), 1, 12)
    finally:
        hook.remove()
    assert rows == sorted(rows, reverse=True) and rows[0] == 70 > 4 * rows[-1]
    tokens = sum(map(len, captioner._tokenize([text for row in captions for text in row]).tolist()))
    assert sum(rows) < tokens, "padding to the longest caption would be as many rows in every step"


def test_a_caption_ends_with_the_models_positions(captioner):
    lengths, end = [], captioner.end_id

    def never_ends(input_ids, scores):
        lengths.append(input_ids.shape[1])
        return scores.index_fill(1, torch.tensor(end), -1e9)

    captioner.sample(PHOTOS[:2], [[1], [2]], SimpleNamespace(warper=lambda: never_ends), max_words=10_000)
    assert lengths[-1] == captioner.model.config.text_config.max_position_embeddings - 1


def test_numbers_drawn_ahead_are_those_of_a_draw_a_step_for_the_rows_that_are_left():
    noise, steps = GumbelNoise([3, 4, 5]), 70
    for step in range(steps):
        if step == 40:
            noise.keep(torch.tensor([0, 2]))
        left = [3, 4, 5] if step < 40 else [3, 5]
        generators = [torch.Generator().manual_seed(seed) for seed in left]
        uniform = torch.stack([[torch.rand(203, generator=g) for _ in range(step + 1)][-1] for g in generators])
        assert torch.equal(noise(None, torch.zeros(len(left), 203)), gumbel_noise(uniform))


def _p_value(drawn, expected):
    """How probable so large a deviation is; nothing may be drawn that has no probability."""
    expected = np.asarray(expected, dtype=float)
    counts = np.bincount(drawn.numpy(), minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    expected = expected[possible] / expected[possible].sum()
    return chisquare(counts[possible], expected * counts.sum()).pvalue


# Words, not WordPieces


@pytest.mark.parametrize(
    ("text", "words"), [("", 0), ("a bird.", 2), (" , - ", 0), ("black-and-white", 3), ("it's 2 o_o", 5)]
)
def test_a_word_is_a_run_of_letters_and_digits(text, words):
    assert count_words(text) == words


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limits=st.tuples(st.integers(0, 8), st.integers(1, 8)).map(sorted), seed=st.integers(0, 2**31 - 1))
def test_captions_keep_their_word_limits(captioner, limits, seed):
    low, high = limits
    seeds = range(seed, seed + 12)
    (captions,) = captioner.sample(PHOTOS[:1], [seeds], Temperature(2.0), min_words=low, max_words=max(high, 1))
    assert all(low <= count_words(caption) <= max(high, 1) for caption in captions), captions


def test_both_word_limits_are_reached_but_not_forced(captioner):
    (captions,) = captioner.sample(PHOTOS[:1], [range(300)], Temperature(4.0), min_words=3, max_words=6)
    assert {count_words(caption) for caption in captions} == {3, 4, 5, 6}


def test_beam_search_keeps_the_word_limits(captioner):
    for words in (2, 5):
        captions = captioner.describe(PHOTOS, min_words=words, max_words=words)
        assert [count_words(caption) for caption in captions] == [words] * 7


def test_limits_count_words_and_pass_the_surplus_probability_to_the_end(captioner):
    tokenizer, size = captioner.processor.tokenizer, captioner.model.config.text_config.vocab_size
    id, end = tokenizer.get_vocab(), captioner.end_id
    if "##s" in id:
        bird, s, red, tree, t, pad = "bird", "##s", "red", "tree", "t", "[PAD]"
    else:
        bird, s, red, tree, t, pad = "Ġbird", "s", "Ġred", "Ġtree", "Ġt", "<pad>"
    rows = [[bird, s, s, s], [bird, red, tree, ","], [bird, red, tree, pad]]
    ids = torch.tensor([[captioner.prompt_ids[-1], *tokenizer.convert_tokens_to_ids(row)] for row in rows])
    scores = torch.linspace(-2, 2, size).repeat(3, 1)
    limited = WordLimits(tokenizer, size, prompt_length=1, end_id=end, min_words=2, max_words=3)(ids, scores)
    assert limited[0, end] == -torch.inf, "one word in four pieces is one word"
    kept = torch.arange(size) != end
    torch.testing.assert_close(limited[0, kept], scores[0, kept])
    assert (limited[1:, end] > -torch.inf).all()
    for row, allowed, forbidden in [(0, [red, s, ","], []), (1, [","], [red, s]), (2, [",", s], [red, t])]:
        assert all(limited[row, id[token]] > -torch.inf for token in allowed)
        assert all(limited[row, id[token]] == -torch.inf for token in forbidden)
    torch.testing.assert_close(limited[1:].logsumexp(-1), scores[1:].logsumexp(-1))
    torch.testing.assert_close(limited[1:, id[","]], scores[1:, id[","]])


def test_a_byte_of_a_letter_is_no_way_past_the_limit(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(train_opt_bpe(["a b"], 260, tmp_path))
    bytes_of_e = tokenizer.tokenize("é")
    ids = tokenizer("a a", add_special_tokens=False, return_tensors="pt").input_ids
    end = tokenizer.convert_tokens_to_ids("Ċ")
    limited = WordLimits(tokenizer, 260, prompt_length=0, end_id=end, min_words=0, max_words=2)(
        ids, torch.zeros(1, 260)
    )
    space_then_e = tokenizer("a a ", add_special_tokens=False, return_tensors="pt").input_ids
    begun = WordLimits(tokenizer, 260, prompt_length=0, end_id=end, min_words=0, max_words=2)(
        space_then_e, torch.zeros(1, 260)
    )
    first = tokenizer.convert_tokens_to_ids(bytes_of_e[0])
    assert len(bytes_of_e) == 2 and limited[0, first] > -torch.inf and begun[0, first] == -torch.inf


# Beam search is the stock model's


@pytest.mark.parametrize("prompt", ["", "a bird of"])
@pytest.mark.parametrize("beams", [1, 3])
def test_describe_equals_stock_generate_where_limits_do_not_bite(folder, stock, beams, prompt):
    captioner = Captioner.from_pretrained(folder, prompt=prompt)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = (
        processor(images=PHOTOS, text=[prompt] * 7, return_tensors="pt")
        if prompt
        else processor(images=PHOTOS, return_tensors="pt")
    )
    ids = stock.generate(**inputs, num_beams=beams, do_sample=False, max_length=64)
    expected = [text.removeprefix(prompt).strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert len(set(expected)) > 3
    assert captioner.describe(PHOTOS, num_beams=beams, min_words=0, max_words=64) == expected


@pytest.mark.parametrize("prompt", ["", "a bird of"])
def test_settings_of_decoding_are_those_of_stock_generate(folder, stock, prompt):
    """Numbers of beams and of new tokens, the prompt's not among them, as a checkpoint's publication states them."""
    decoding = {"num_beams": 5, "min_new_tokens": 6, "max_new_tokens": 9}
    captioner = Captioner.from_pretrained(folder, prompt=prompt, decoding=decoding)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=PHOTOS, **({"text": [prompt] * 7} if prompt else {}), return_tensors="pt")
    ids = stock.generate(**inputs, do_sample=False, **decoding)
    expected = [text.removeprefix(prompt).strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    limits = dict(min_words=0, max_words=64)
    assert captioner.describe(PHOTOS, **limits) == expected
    assert Captioner.from_pretrained(folder, prompt=prompt).describe(PHOTOS, **limits) != expected
    assert captioner.describe(PHOTOS, num_beams=3, min_new_tokens=0, max_new_tokens=40, **limits) == (
        Captioner.from_pretrained(folder, prompt=prompt).describe(PHOTOS, max_new_tokens=40, **limits)
    )


@pytest.mark.parametrize("prompt", ["", "a bird of"])
def test_a_blip2_from_before_the_image_token_writes_the_same(tmp_path, prompt):
    """The hub's COCO-finetuned BLIP-2 was saved before transformers had a token that stands for an image."""
    folder = tiny.blip2(tmp_path)
    now = Captioner.from_pretrained(str(folder), prompt=prompt)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("image_token_index")
    (folder / "config.json").write_text(json.dumps(config))
    before = Captioner.from_pretrained(str(folder), prompt=prompt)
    assert before.model.config.image_token_index is None
    assert before.describe(PHOTOS) == now.describe(PHOTOS)
    assert before.sample(PHOTOS[:2], [[1, 2], [3]]) == now.sample(PHOTOS[:2], [[1, 2], [3]])
    with torch.no_grad():
        captions = ["a bird", "a red bird"]
        for ours, theirs in zip(*(one.token_logits(PHOTOS[:2], captions) for one in (before, now)), strict=True):
            assert torch.equal(ours, theirs)


# Errors teach


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save({"weight": torch.ones(1)}))
    with pytest.raises(ValueError, match="model of type 'vit': expected one of blip, blip-2"):
        Captioner.from_pretrained(str(tmp_path))


def test_seeds_for_another_number_of_pictures_are_refused(captioner):
    with pytest.raises(ValueError, match="2 images but 1 rows of seeds"):
        captioner.sample(PHOTOS[:2], [[1]])


def test_impossible_word_limits_are_refused(captioner):
    with pytest.raises(ValueError, match="min_words=6, max_words=5"):
        captioner.sample(PHOTOS[:1], [[1]], min_words=6, max_words=5)


def test_no_pictures_and_no_seeds_give_no_captions(captioner):
    assert captioner.sample([], []) == captioner.describe([]) == []
    assert captioner.sample(PHOTOS[:2], [[], []]) == [[], []]


# Teacher forcing


def test_token_logits_are_the_models_own_without_the_prompt(captioner, stock):
    """One caption at a time through the stock model: what it says behind the prompt, place by place."""
    captions = ["a bird", "a red bird on the grass", "dog"]
    prompt = captioner.prompt_ids.flatten().tolist()
    with torch.no_grad():
        logits, ids = captioner.token_logits(PHOTOS[:3], captions)
        for b, caption in enumerate(captions):
            words = captioner.processor.tokenizer(caption, add_special_tokens=False).input_ids + [captioner.end_id]
            pixels = captioner.processor(images=PHOTOS[b], return_tensors="pt").pixel_values
            own = stock(pixel_values=pixels, input_ids=torch.tensor([prompt + words])).logits[0]
            assert ids[b, : len(words)].tolist() == words
            torch.testing.assert_close(logits[b, : len(words)], own[len(prompt) - 1 : -1], atol=1e-5, rtol=1e-5)


def test_token_logits_want_a_caption_for_each_picture(captioner):
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        captioner.token_logits(PHOTOS[:2], ["a bird"])


# What a run notes


def test_a_caption_of_as_many_tokens_as_the_model_has_positions_is_read_and_one_more_is_refused(captioner):
    image, prompt = tiny.pictures(1), len(captioner.prompt_ids)
    positions = captioner.model.config.text_config.max_position_embeddings
    words = positions - prompt  # each one token; the end's own logits are not computed
    full, longer = " ".join(["cat"] * words), " ".join(["cat"] * (words + 1))
    assert captioner.token_logits(image, [full])[1].shape[1] == words + 1
    with pytest.raises(ValueError, match=f"it has {positions + 1} tokens and the model reads {positions}: shorten"):
        captioner.token_logits(image, [longer])
    with pytest.raises(ValueError, match="character 5 is half of a surrogate pair"):
        captioner.token_logits(image, ["cat \ud83d"])


def test_captions_that_cannot_be_labels_are_left_out_by_name(captioner, capsys):
    long = "catsssssssss " * 30  # also as BLIP cleans it
    examples = (
        Example(1, Path("1.png"), ("a cat", "half \ud83d", long)),
        Example(2, Path("2.png"), ("\udc00",)),
        Example(3, Path("3.png")),
    )
    kept = without_unreadable(Dataset("odd", examples), captioner)
    assert [example.image_id for example in kept] == [1, 3]  # an image that never had a caption is another's matter
    assert kept[0].references == ("a cat",)
    out = capsys.readouterr().out
    assert out.encode() and r'Skipped the caption "half \ud83d" of image 1: character 6 is half' in out
    assert r'Skipped the caption "\udc00" of image 2' in out


def test_fingerprint_changes_with_weights_prompt_decoding_number_format_and_preprocessing(folder, captioner):
    before = captioner.fingerprint()
    assert Captioner.from_pretrained(folder).fingerprint() == before
    assert Captioner.from_pretrained(folder, prompt="a bird of").fingerprint() != before
    assert Captioner.from_pretrained(folder, dtype=torch.bfloat16).fingerprint() != before
    assert Captioner.from_pretrained(folder, decoding={"num_beams": 5}).fingerprint() != before
    other = Captioner.from_pretrained(folder)
    other.processor.image_processor.size = {"height": 16, "width": 16}
    assert other.fingerprint() != before
    trained = Captioner.from_pretrained(folder)
    with torch.no_grad():
        [*trained.model.parameters()][-1].flatten()[0] += 1e-3
    assert trained.fingerprint() != before


def test_fingerprint_does_not_change_with_use_training_flags_or_attributes(captioner):
    before = captioner.fingerprint()
    captioner.sample(PHOTOS[:2], [[1], [2]])
    captioner._seen_by_nobody = captioner.hook = "new"
    captioner.model.requires_grad_(False)
    assert captioner.fingerprint() == before
    captioner.model.requires_grad_(True)
