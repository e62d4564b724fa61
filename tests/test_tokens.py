"""Both real vocabularies against the paper's figure, open_clip's own tokenizer and the laws of tokenizing text."""

import hypothesis.strategies as st
import pytest
import tiny
from hypothesis import example, given
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dalleflamingo.course import checks
from dalleflamingo.evaluation.vocabulary_report import (
    align_words,
    caption_tokens,
    clip_tokenizer,
    same_tokens,
    spell,
    wordpiece_tokenizer,
    words_tokenized_differently,
)
from dalleflamingo.sources import annotations
from dalleflamingo.tokens import END_OF_WORD, token_bytes, tokenizer_style

WORDPIECE, CLIP = wordpiece_tokenizer(), clip_tokenizer()
CAPTIONS = [
    "A giraffe eats leaves from a tree.",
    "The boy's dog caught the frisbee, didn't it?",
    "a red bird to the left of two snowboarders",
    "A Frisbee... at 10:30pm -- café “sign” №5",
    "",
]


@pytest.fixture(scope="module")
def karpathy(real_data):
    folder = real_data / "coco-karpathy"
    examples = annotations.read_coco(folder / "coco_karpathy_test_gt.json", folder)
    return [caption for example in examples for caption in example.references]


@pytest.fixture(scope="module")
def pairs():
    """The real vocabularies, and the miniature's, two small ones of the same kinds."""
    return (WORDPIECE, CLIP), tiny.shipped_tokenizers()


# ── known words ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_vocabularies_have_their_published_sizes():
    assert (len(WORDPIECE), len(CLIP)) == (30_522, 49_408)
    assert CLIP.convert_tokens_to_ids(["a</w>", "<|startoftext|>", "<|endoftext|>"]) == [320, 49_406, 49_407]


def test_clips_first_ids_are_the_bytes_visible_ones_first():
    """GPT-2's order: what Latin-1 prints, then the rest; the second time as ends of words."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = visible + sorted(set(range(256)) - set(visible))
    style, tokens = tokenizer_style(CLIP), CLIP.convert_ids_to_tokens(list(range(512)))
    assert [token_bytes(token, style) for token in tokens[:256]] == [bytes([byte]) for byte in order]
    assert [token_bytes(token, style) for token in tokens[256:]] == [bytes([byte]) + b" " for byte in order]


@pytest.mark.parametrize(
    ("tokenizer", "token", "expected"),
    [
        (WORDPIECE, "gi", b" gi"),
        (WORDPIECE, "##raf", b"raf"),
        (CLIP, "compu", b"compu"),
        (CLIP, "\xe2\u0122\u0135</w>", "– ".encode()),
        (tiny.byte_level_bpe(), "\u0120gir", b" gir"),
    ],
)
def test_a_token_adds_its_bytes_and_spaces(tokenizer, token, expected):
    assert token_bytes(token, tokenizer_style(tokenizer)) == expected


@pytest.mark.parametrize(
    ("word", "wordpiece", "clip"),
    [
        ("giraffe", ("gi", "raf", "fe</w>"), ("giraffe</w>",)),
        ("frisbee", ("fr", "is", "bee</w>"), ("frisbee</w>",)),
        ("'s", ("'</w>", "s</w>"), ("'s</w>",)),
        ("Dog", ("dog</w>",), ("dog</w>",)),
        ("10", ("10</w>",), ("1</w>", "0</w>")),
        ("–", ("–</w>",), ("–</w>",)),  # three bytes in CLIP's vocabulary
    ],
)
def test_known_words_have_known_tokens(word, wordpiece, clip):
    assert caption_tokens(WORDPIECE, [word]) == [wordpiece]
    assert caption_tokens(CLIP, [word]) == [clip]


def test_part_of_a_character_shows_its_bytes():
    assert caption_tokens(CLIP, ["ß", "è"]) == [("\\xc3", "\\x9f</w>"), ("è</w>",)]


def test_clip_vocabulary_equals_that_of_open_clip():
    stock = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    captions = [*CAPTIONS[:3], "snowboarder's 3rd jump!! :-) w/ [brackets] {and} #tags @ 50% (approx.)", "naïve café ½"]
    assert CLIP(captions, add_special_tokens=False).input_ids == [stock.encode(caption) for caption in captions]


def test_tokens_are_neither_truncated_nor_padded():
    long = "dog " * 300
    for tokenizer in (WORDPIECE, CLIP):  # SBERT's is set to truncate and to pad at 128
        assert caption_tokens(tokenizer, [long, "dog"]) == [("dog</w>",) * 300, ("dog</w>",)]


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.one_of(
    st.lists(st.sampled_from(" ".join(CAPTIONS).split()), max_size=8).map(" ".join),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Co", "Cn", "Zl", "Zp")), max_size=30),
)


@given(captions=st.lists(TEXTS, max_size=4))
def test_a_batch_is_tokenized_as_its_captions_one_by_one(pairs, captions):
    for tokenizer in (tokenizer for pair in pairs for tokenizer in pair):
        assert caption_tokens(tokenizer, captions) == [caption_tokens(tokenizer, [caption])[0] for caption in captions]


@given(caption=TEXTS)
def test_aligned_words_hold_every_token_once_and_in_order(pairs, caption):
    for source, target in pairs:
        [words] = align_words(source, target, [caption])
        assert tuple(token for word in words for token in word.source) == caption_tokens(source, [caption])[0]
        assert tuple(token for word in words for token in word.target) == caption_tokens(target, [caption])[0]


@given(caption=TEXTS)
def test_a_caption_has_the_same_tokens_exactly_if_all_its_words_have(pairs, caption):
    for source, target in pairs:
        [words] = align_words(source, target, [caption])
        alike = caption_tokens(source, [caption]) == caption_tokens(target, [caption])
        assert alike == all(word.alike for word in words)


@given(caption=TEXTS)
@example(caption="İ:")  # one character, of which CLIP makes a word and the beginning of the next
def test_a_word_ends_where_both_sides_end_one_and_not_earlier(pairs, caption):
    for source, target in pairs:
        for word in align_words(source, target, [caption])[0]:
            assert all(side[-1].endswith(END_OF_WORD) for side in (word.source, word.target) if side)
            assert not word.alike or sum(token.endswith(END_OF_WORD) for token in word.source) == 1


@given(words=st.lists(st.sampled_from("a giraffe frisbee snowboarder the dog tree kite".split()), min_size=1))
def test_tokens_of_plain_words_spell_the_caption(words):
    for tokenizer in (WORDPIECE, CLIP):
        assert spell(caption_tokens(tokenizer, [" ".join(words)])[0]) == " ".join(words)


# ── what differs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_words_are_named_where_both_sides_end_one():
    [words] = align_words(WORDPIECE, CLIP, ["The boy's frisbee, isn't it?"])
    assert [word.text for word in words] == ["The", "boy", "'s", "frisbee", ",", "isn", "'t", "it", "?"]
    assert [word.text for word in words if not word.alike] == ["'s", "frisbee", "'t"]


def test_what_one_side_drops_at_the_end_stays_the_other_sides_word():
    [words] = align_words(WORDPIECE, CLIP, ["dog \u0301"])  # WordPiece strips accents, so nothing is left of this one
    assert [(word.source, word.alike) for word in words] == [(("dog</w>",), True), ((), False)]
    assert words[1].target == caption_tokens(CLIP, ["\u0301"])[0] != ()


def test_words_that_differ_are_counted_by_occurrence_and_by_caption():
    captions = ["A frisbee, a Frisbee and a giraffe", "a frisbee", "a dog"]
    found = words_tokenized_differently(align_words(WORDPIECE, CLIP, captions))
    assert found.to_dict("list") == {
        "word": ["frisbee", "giraffe"],
        "source": [("fr", "is", "bee</w>"), ("gi", "raf", "fe</w>")],
        "target": [("frisbee</w>",), ("giraffe</w>",)],
        "count": [3, 1],
        "captions": [2, 1],
    }
    assert same_tokens(caption_tokens(WORDPIECE, captions), caption_tokens(CLIP, captions)).value == 1 / 3


def test_no_difference_is_an_empty_table():
    for captions in (["a dog"], []):
        found = words_tokenized_differently(align_words(WORDPIECE, CLIP, captions))
        assert found.empty and list(found.columns) == ["word", "source", "target", "count", "captions"]
    assert caption_tokens(CLIP, []) == []


# ── the paper's figure ───────────────────────────────────────────────────────────────────────────────────────────────


def test_68_percent_of_karpathy_test_has_the_same_tokens(karpathy):
    """App. G: more than 60 %. The other two: words joined and tokenized by CLIP, without and with the clean-up."""
    target = caption_tokens(CLIP, karpathy)
    source = caption_tokens(WORDPIECE, karpathy)
    share = same_tokens(source, target)
    assert share.n == 25_010 and round(100 * share.value, 1) == 68.2
    assert share.low > 0.6, "claim 13"

    rejoined = caption_tokens(CLIP, [spell(tokens) for tokens in source])
    assert round(100 * same_tokens(rejoined, target).value, 1) == 98.6

    ids = WORDPIECE(karpathy, add_special_tokens=False, padding=False, truncation=False).input_ids
    cleaned = caption_tokens(CLIP, WORDPIECE.batch_decode(ids, clean_up_tokenization_spaces=True))
    assert round(100 * same_tokens(cleaned, target).value, 2) == 99.94


# ── wrong input ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_string_is_not_a_list_of_captions():
    with pytest.raises(TypeError, match="put it into a list"):
        caption_tokens(CLIP, "a dog")


def test_a_tokenizer_of_another_kind_is_named():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"dog": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ValueError, match="WordLevel.*expected WordPiece"):
        caption_tokens(words, ["dog"])


def test_shares_of_different_captions_are_refused():
    with pytest.raises(ValueError, match="2 captions against 1"):
        same_tokens([("a</w>",), ("b</w>",)], [("a</w>",)])
    with pytest.raises(ValueError, match="n > 0"):
        same_tokens([], [])


# ── the exercises of notebook 02 ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("exercise", ["with_word_ends", "differing_words"])
def test_printed_solution_is_right_and_agrees_with_the_package(exercise, capsys):
    solution = tiny.printed_solution("02_tokenizer_mapping", exercise)
    getattr(checks, exercise)(solution)
    assert capsys.readouterr().out.startswith("Right. ")

    for caption in CAPTIONS[:3]:
        [source], [target] = caption_tokens(WORDPIECE, [caption]), caption_tokens(CLIP, [caption])
        if exercise == "with_word_ends":
            assert solution(WORDPIECE.tokenize(caption)) == list(source)
        else:
            words = align_words(WORDPIECE, CLIP, [caption])[0]
            expected = [(list(word.source), list(word.target)) for word in words if not word.alike]
            assert solution(source, target) == expected


def test_printed_walk_ends_where_the_sides_spell_different_letters():
    walk = tiny.printed_solution("02_tokenizer_mapping", "differing_words")
    assert walk(["ab</w>", "c</w>"], ["a</w>"]) == [(["ab</w>", "c</w>"], ["a</w>"])]
    unknown = caption_tokens(WORDPIECE, ["a 🦓"])[0], caption_tokens(CLIP, ["a 🦓"])[0]
    assert walk(*map(list, unknown)) == [(list(unknown[0][1:]), list(unknown[1][1:]))]


def position_by_position(source, target):
    return [([a], [b]) for a, b in zip(source, target, strict=False) if a != b]


def forgets_the_last(wordpieces):
    following = [*wordpieces[1:], "##"]
    marked = zip(wordpieces, following, strict=True)
    return [token.removeprefix("##") + "</w>" * (not after.startswith("##")) for token, after in marked]


@pytest.mark.parametrize(
    ("exercise", "attempt", "answer"),
    [
        ("with_word_ends", lambda p: [x.removeprefix("##") + "</w>" for x in p], "only a token that no ## follows"),
        ("with_word_ends", forgets_the_last, "nothing follows the last token"),
        ("with_word_ends", lambda p: p[99], "IndexError"),
        ("with_word_ends", lambda p: None, "does it end in `return …`?"),
        ("with_word_ends", lambda p: {"a": {1}}, "yours gives {'a': {1}}"),
        ("differing_words", position_by_position, "count letters"),
        ("differing_words", lambda s, t: [(s, t)] if s != t else [], "only the giraffe differs"),
        ("differing_words", lambda s, t: [(["x"], ["y"])], "nothing differs, so []"),
    ],
)
def test_wrong_answer_is_told_in_what_way(exercise, attempt, answer, capsys):
    getattr(checks, exercise)(attempt)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("Not yet: ") and answer in line


def test_exercise_not_done_is_one_calm_line(capsys):
    def not_done(*tokens):
        raise NotImplementedError

    for check in (checks.with_word_ends, checks.differing_words):
        check(not_done)
        assert capsys.readouterr().out == "Not done yet, and nothing below waits for it.\n"
