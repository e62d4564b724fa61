"""Similarities of texts against their stock models, pycocoevalcap and an assignment problem."""

import re

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
from dalleflamingo.evaluation.similarities import CiderSimilarity, PairSimilarity, WordMoversSimilarity
from dalleflamingo.evaluation.text_encoders import ClipText, Sbert
from dalleflamingo.evaluation.word_movers import FARTHEST, WordVectors, read_glove

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
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.txt: have DALLEFLAMINGO_GLOVE .*or unset it"):
        WordVectors.glove(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        WordVectors.glove(tmp_path)
    monkeypatch.setenv("DALLEFLAMINGO_GLOVE", "~nobody-of-this-name/glove.txt")
    with pytest.raises(FileNotFoundError, match="~nobody-of-this-name/glove.txt"):
        WordVectors.at_hand()


READ = {
    "words with spaces": (
        b"a 1 0\n. . . 3 4\nat name@domain.com 0 2\n",
        {"a": (1, 0), ". . .": (3, 4), "at name@domain.com": (0, 2)},
    ),
    "a word with spaces first": (b". . 1 0\nat name@domain.com 0 2\n", {". .": (1, 0), "at name@domain.com": (0, 2)}),
    "numbers as words": (b"1 2 3\n2000 4 5\nnan 6 7\n", {"1": (2, 3), "2000": (4, 5), "nan": (6, 7)}),
    "odd spaces": (
        "\u00a0 1 2\n\u0085 3 4\n\u2028 5 6\nx\ry 7 8\n".encode(),
        {"\u00a0": (1, 2), "\u0085": (3, 4), "\u2028": (5, 6), "x\ry": (7, 8)},
    ),
    "a byte order mark": (b"\xef\xbb\xbfcat 1 2\n", {"cat": (1, 2)}),
    "CRLF and a space at the end": (b"cat 1 2 \r\ndog 3 4\r\n", {"cat": (1, 2), "dog": (3, 4)}),
    "word2vec's first line": (b"2 3\ncat 1 2 3\ndog 4 5 6\n", {"cat": (1, 2, 3), "dog": (4, 5, 6)}),
    "a word twice": (b"cat 1 2\ndog 3 4\ncat 5 6\n", {"cat": (1, 2), "dog": (3, 4)}),
    "exponents": (b"cat 1e-3 -2.5E1\n", {"cat": (0.001, -25)}),
}


@pytest.mark.parametrize(("content", "expected"), READ.values(), ids=READ)
def test_glove_is_read_whatever_its_words_are(tmp_path, content, expected):
    (tmp_path / "g.txt").write_bytes(content)
    table, _ = read_glove(tmp_path / "g.txt")
    assert table.keys() == expected.keys()
    for word, vector in expected.items():
        np.testing.assert_array_equal(table[word], np.array(vector, dtype=np.float32))


REFUSED = {
    "empty": (b"", "g.txt holds no word vectors, in 0 bytes"),
    "an empty line": (b"\n", "line 1: 0 numbers behind ''"),
    "only word2vec's first line": (b"2 3\n", "holds no word vectors"),
    "word2vec's, cut": (b"3 2\ncat 1 2\ndog 3 4\n", "holds 2 words of 2 numbers, but its first line says 3 words of 2"),
    "word2vec's, of another size": (
        b"1 3\ncat 1 2\n",
        "holds 1 words of 2 numbers, but its first line says 1 words of 3",
    ),
    "fewer numbers": (b"cat 1 0\ndog 0\n", "line 2: 1 numbers behind 'dog' where the first line has 2"),
    "more numbers": (b"cat 1 0\ndog 0 2 5\n", "line 2: 3 numbers behind 'dog' where the first line has 2"),
    "cut in a line": (b"cat 1 0\ndog 0 2\nkite 1", "line 3: 6 bytes without a line end"),
    "cut in a number": (b"cat 1.25 0.5\ndog 0.25 2.", "line 2: 11 bytes without a line end"),
    "words and counts": (b"the 1061396\nof 593677\n", "line 1: 1 numbers behind 'the 1061396'"),
    "captions": (b"a red bird on the boat\n", "line 1: 0 numbers behind 'a red bird"),
    "not a number": (b"cat 1 2\ndog nan 2\n", "line 2: 1 numbers behind 'dog'"),
    "too large": (b"cat 1 2\ndog 1e39 2\n", "line 2: 1 numbers behind 'dog'"),
    "zeros": (bytes(100), "line 1: 100 bytes without a line end"),
    "zeros behind": (b"cat 1 2\n\0\0\0\n", "line 2: NUL bytes"),
    "zip": (b"PK\x03\x04\x14\x00\n", "line 1: NUL bytes"),
    "gzip": (b"\x1f\x8b\x08\n", "line 1: byte 0x8b is not UTF-8"),
    "Latin-1": ("cat 1 2\nélève 1 2\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
    "UTF-16": ("cat 1 2\n".encode("utf-16"), "line 1: "),
    "JSON": (b'{"cat": [1, 2]}\n', "line 1: "),
    "a line of 3 MB": (b"a 1 2\n" + b"x" * 3_000_000, "line 2: 1,048,576 bytes without a line end"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_glove_or_not_whole_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "g.txt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        WordVectors.glove(tmp_path / "g.txt")
    assert "g.txt" in str(error.value) and "Unset DALLEFLAMINGO_GLOVE" in str(error.value)


@given(
    words=st.lists(
        st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]), min_size=1), max_size=5
    )
)
def test_whatever_words_are_written_are_read_again(tmp_path_factory, words):
    words = ["the", *(word for word in words if not is_a_number_at_the_end(word))]
    file = tmp_path_factory.getbasetemp() / "words.txt"
    file.write_bytes("".join(f"{word} {i}.5 -1 0.25\n" for i, word in enumerate(words)).encode())
    table, _ = read_glove(file)
    assert table.keys() == set(words)
    assert all(table[word].tolist() == [words.index(word) + 0.5, -1, 0.25] for word in words)


def is_a_number_at_the_end(word: str) -> bool:
    try:
        return float(word.rpartition(" ")[2]) is not None and " " in word
    except ValueError:
        return False


@given(content=st.binary(max_size=60), at=st.integers(0, 60))
def test_any_bytes_are_word_vectors_or_refused(tmp_path_factory, content, at):
    file, whole = tmp_path_factory.getbasetemp() / "bytes.txt", b"cat 1 2\n. . 3 4\nthe 0.5 -1\n"
    file.write_bytes(whole[:at] + content + whole[at:])
    try:
        table, _ = read_glove(file)
    except ValueError as error:
        assert str(error).startswith(str(file))
    else:
        assert len({vector.shape for vector in table.values()}) == 1
        assert all(np.isfinite(vector).all() for vector in table.values())


def test_scores_by_one_file_are_not_those_by_another_of_the_same_size(tmp_path):
    prints = []
    for content in (b"cat 1 0\n", b"cat 1 0\n", b"cat 0 1\n"):
        (tmp_path / "g.txt").write_bytes(content)
        prints.append(WordMoversSimilarity(WordVectors.glove(tmp_path / "g.txt")).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_sberts_words_stand_in_for_glove(monkeypatch):
    monkeypatch.delenv("DALLEFLAMINGO_GLOVE", raising=False)
    vectors = WordVectors.at_hand()
    assert "SBERT" in vectors.name
    assert vectors.distance("cat", "kitten") < vectors.distance("cat", "car") < FARTHEST
    assert vectors.distance("giraffe", "giraffes") < vectors.distance("giraffe", "kite")  # words of several pieces


def test_a_function_of_ones_own_is_a_similarity():
    similarity = PairSimilarity("letters", lambda source, other: len(set(source) & set(other)))
    assert similarity.compare(["abc", "xyz"], [["ab", "c"], ["q", "zx"]]).tolist() == [[2, 1], [0, 2]]
