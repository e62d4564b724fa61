"""Similarities of texts against their stock models, pycocoevalcap and an assignment problem."""

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from dalleflamingo import registry
from dalleflamingo.evaluation import caption_tokenizer
from dalleflamingo.evaluation.ngrams import Cider
from dalleflamingo.evaluation.similarities import CiderSimilarity, WordMoversSimilarity
from dalleflamingo.evaluation.word_movers import FARTHEST, WordVectors
from dalleflamingo.similarity import ClipText, PairSimilarity, Sbert

TEXTS = [f"a red cat number {i} " + "sits " * (i % 5) for i in range(37)]


@pytest.fixture(scope="module")
def sbert():
    return Sbert.from_pretrained(registry.locate("sbert"))


def test_clip_text_equals_open_clips_own():
    folder = registry.locate("miniature/clip")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.no_grad():
        expected = model.eval().encode_text(tokens)
    encoder = ClipText.from_pretrained(folder)
    torch.testing.assert_close(encoder.embed(TEXTS), expected, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in encoder.model.parameters()) < sum(p.numel() for p in model.parameters())


def test_sbert_is_the_mean_over_words_whatever_the_batch(sbert):
    together = sbert.embed(TEXTS)
    assert together.shape == (37, 384)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(37))
    alone = torch.cat([sbert.embed([text]) for text in TEXTS[::6]])  # without padding; the last is of another batch
    torch.testing.assert_close(together[::6], alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        states = sbert.model(**sbert.tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(alone[0], torch.nn.functional.normalize(states.mean(0), dim=0))


def test_sbert_knows_what_means_the_same(sbert):
    alike, unlike = sbert.compare(["a cat sits on a mat"], [["a kitten lies on a rug", "a car drives on a road"]])[0]
    assert alike > 0.5 > 0.3 > unlike


def test_fingerprints_tell_corpora_and_vectors_apart():
    captions = {0: ["a red cat"], 1: ["a blue boat"]}
    first, same, other = (
        CiderSimilarity(Cider(corpus)) for corpus in (captions, dict(captions), captions | {1: ["a tree"]})
    )
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    named = [WordMoversSimilarity(WordVectors(name, {}.get)).fingerprint() for name in ("GloVe-50", "GloVe-200")]
    assert named[0] != named[1]


def test_cider_overlap_is_cider_with_the_source_as_the_only_reference():
    corpus = Cider({0: ["a red cat"], 1: ["a blue boat on water"], 2: ["a tree"]})
    sources, candidates = ["a red cat", "a blue boat"], [["a red cat", "a tree"], ["a boat", "a blue boat"]]
    found = CiderSimilarity(corpus).compare(sources, candidates)
    own = Cider({0: ["a red cat"], 1: ["a blue boat"]}, idf_of=corpus)
    expected = own.score([0, 0, 1, 1], candidates[0] + candidates[1]).reshape(2, 2)
    np.testing.assert_allclose(found, expected)
    assert found[0, 0] > 5 and found[0, 1] < 1 and found[1, 1] > found[1, 0]


def _random_vectors(width: int = 5) -> WordVectors:
    table = {word: np.random.default_rng(i).standard_normal(width) for i, word in enumerate("abcdefgh")}
    return WordVectors("random", table.get)


@given(st.data())
def test_wmd_of_texts_of_one_length_is_the_cheapest_assignment(data):
    vectors, n = _random_vectors(), data.draw(st.integers(1, 6))
    first, second = (data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=n, max_size=n)) for _ in range(2))
    unit = [np.stack([vectors._vector(word) for word in text]) for text in (first, second)]
    costs = np.linalg.norm(unit[0][:, None] - unit[1][None], axis=-1)
    expected = costs[linear_sum_assignment(costs)].mean()
    assert vectors.distance(" ".join(first), " ".join(second)) == pytest.approx(expected, abs=1e-6)
    assert vectors.distance(" ".join(second), " ".join(first)) == pytest.approx(expected, abs=1e-6)


def test_words_without_a_vector_are_passed_over():
    vectors = _random_vectors()
    assert vectors.distance("a b", "b zzz a") == pytest.approx(0, abs=1e-9)
    assert vectors.distance("a", "zzz") == vectors.distance("a", "") == FARTHEST
    assert vectors.distance("", "") == 0
    assert FARTHEST >= max(vectors.distance(a, b) for a in "abcdefgh" for b in "abcdefgh")


def test_word_movers_negates_the_distance_and_splits_as_the_metrics_do():
    found = WordMoversSimilarity(_random_vectors()).compare(["B, a!"], [["b a", "c"]])
    assert found[0, 0] == pytest.approx(0, abs=1e-9)
    assert found[0, 1] == pytest.approx(
        -_random_vectors().distance(caption_tokenizer.tokenize({0: ["B, a!"]})[0][0], "c")
    )


def test_glove_files_are_read_and_broken_ones_named(tmp_path, monkeypatch):
    file = tmp_path / "glove.txt"
    file.write_text("cat 1 0\ndog 0 2\n", encoding="utf-8")
    monkeypatch.setenv("DALLEFLAMINGO_GLOVE", str(file))
    vectors = WordVectors.at_hand()
    assert vectors.name == "GloVe-2" and vectors.distance("cat", "dog") == pytest.approx(2**0.5)
    file.write_text("cat 1 0\ndog 0\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="there is no .*gone.txt: have DALLEFLAMINGO_GLOVE name .*or unset it"):
        WordVectors.glove(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="glove.txt, line 2: 1 numbers behind 'dog' where the first line has 2"):
        WordVectors.at_hand()


def test_sberts_words_stand_in_for_glove(monkeypatch):
    monkeypatch.delenv("DALLEFLAMINGO_GLOVE", raising=False)
    vectors = WordVectors.at_hand()
    assert "SBERT" in vectors.name
    assert vectors.distance("cat", "kitten") < vectors.distance("cat", "car") < FARTHEST
    assert vectors.distance("giraffe", "giraffes") < vectors.distance("giraffe", "kite")  # words of several pieces


def test_a_function_of_ones_own_is_a_similarity():
    similarity = PairSimilarity("letters", lambda source, other: len(set(source) & set(other)))
    assert similarity.compare(["abc", "xyz"], [["ab", "c"], ["q", "zx"]]).tolist() == [[2, 1], [0, 2]]
