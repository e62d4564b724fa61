"""A caption aligned between two tokenizers: positions of tokens against the characters that they hold."""

import json

import hypothesis.strategies as st
import pytest
import tiny
from hypothesis import given

from dalleflamingo.evaluation.vocabulary_report import clip_tokenizer, wordpiece_tokenizer
from dalleflamingo.tokens import align_texts, align_token_ids

WORDPIECE, CLIP, BYTES = wordpiece_tokenizer(), clip_tokenizer(), tiny.byte_level_bpe()
PAIRS = [(WORDPIECE, CLIP), (BYTES, CLIP), (CLIP, WORDPIECE), (CLIP, BYTES)]


def tokens_of(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


def test_tokens_belong_to_their_word_whichever_side_splits_it():
    [alignment] = align_texts(WORDPIECE, CLIP, ["a giraffe's computer"])
    assert tokens_of(WORDPIECE, alignment.source) == ["a", "gi", "##raf", "##fe", "'", "s", "computer"]
    assert tokens_of(CLIP, alignment.target) == ["a</w>", "giraffe</w>", "'s</w>", "compu", "ter</w>"]
    assert alignment.target_positions == (0, 1, 1, 1, 2, 2, 3)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@given(st.text(st.sampled_from("ab gi.'s1é😀字-"), max_size=25))
def test_both_sides_of_a_text_are_the_tokenizers_own_ids(source, target, text):
    [alignment] = align_texts(source, target, [text])
    assert list(alignment.source) == source(text, add_special_tokens=False).input_ids
    assert list(alignment.target) == target(text, add_special_tokens=False).input_ids
    assert len(alignment.target_positions) == len(alignment.source)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@given(st.text(st.sampled_from("ab gi.'s1é😀字-"), max_size=25))
def test_target_positions_never_go_back_and_lie_inside(source, target, text):
    [alignment] = align_texts(source, target, [text])
    positions = [position for position in alignment.target_positions if position >= 0]
    assert positions == sorted(positions)
    assert all(position < len(alignment.target) for position in positions)


@pytest.mark.parametrize(
    "text", ["a dog's ball isn't red.", "two giraffes, 10 computers", "is it? yes! it's 3.5 miles..."]
)
def test_token_ids_alone_are_aligned_as_their_text(text):
    for source in (WORDPIECE, BYTES):
        [known] = align_texts(source, CLIP, [text])
        assert align_token_ids(source, CLIP, [known.source]) == [known]


@pytest.mark.parametrize("text", ["a dog sits on the grass", "giraffe"])
def test_spaces_that_tokens_add_are_not_the_captions(text):
    """Byte-level BPE has "a" and " a" as different tokens; CLIP's tokens end, WordPiece's begin with a space."""
    for source in (CLIP, WORDPIECE):
        [known] = align_texts(source, BYTES, [text])
        assert align_token_ids(source, BYTES, [known.source]) == [known]


def test_of_tokens_with_a_characters_bytes_the_first_is_aligned():
    [alignment] = align_texts(WORDPIECE, CLIP, ["a ෴ cat"])
    assert len(alignment.target) > 3 and alignment.target_positions == (0, 1, len(alignment.target) - 1)


def test_a_token_that_spells_nothing_becomes_unknown():
    ids = [*WORDPIECE("a red", add_special_tokens=False).input_ids, WORDPIECE.unk_token_id]
    [alignment] = align_token_ids(WORDPIECE, CLIP, [ids])
    assert tokens_of(CLIP, alignment.target) == ["a</w>", "red</w>", "<|endoftext|>"]
    assert alignment.target_positions == (0, 1, 2)


def test_a_token_that_spells_nothing_adds_no_space():
    ids = CLIP("a red cat", add_special_tokens=False).input_ids
    [alignment] = align_token_ids(CLIP, BYTES, [[ids[0], CLIP.unk_token_id, ids[2]]])
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
    assert tokens_of(BYTES, alignment.target)[-1] == f"{space}cat"
    assert BYTES.unk_token_id in alignment.target and space not in tokens_of(BYTES, alignment.target)


def test_half_a_character_and_an_empty_row_are_defined():
    half = BYTES("字", add_special_tokens=False).input_ids[:1]
    [broken, empty] = align_token_ids(BYTES, CLIP, [half, []])
    assert broken.target == (CLIP.unk_token_id,) and broken.target_positions == (0,)
    assert empty == ((), (), ())


def test_published_captions_keep_their_tokens(real_data):
    """25,010 captions: all from their texts; 99.94 % from their tokens, as the paper's fact sheet measured."""
    file = real_data / "coco-karpathy" / "coco_karpathy_test_gt.json"
    captions = [entry["caption"] for entry in json.loads(file.read_text())["annotations"]]
    known = align_texts(WORDPIECE, CLIP, captions)
    assert [list(alignment.target) for alignment in known] == CLIP(captions, add_special_tokens=False).input_ids
    spelled = align_token_ids(WORDPIECE, CLIP, [alignment.source for alignment in known])
    same = sum(a.target == b.target for a, b in zip(known, spelled, strict=True))
    assert same / len(captions) == pytest.approx(0.9994, abs=5e-5)
