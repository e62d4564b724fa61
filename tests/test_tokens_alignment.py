"""How captions cross: landing places against the letters they stand for."""

import json

import hypothesis.strategies as st
import pytest
import tiny
from hypothesis import given

from dalleflamingo.tokens import align_texts, align_token_ids, clip_tokenizer, wordpiece_tokenizer

WORDPIECE, CLIP, BYTES = wordpiece_tokenizer(), clip_tokenizer(), tiny.byte_level_bpe()
PAIRS = [(WORDPIECE, CLIP), (BYTES, CLIP), (CLIP, WORDPIECE), (CLIP, BYTES)]


def read(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


def test_a_word_lands_in_its_pieces_whichever_side_splits_it():
    [path] = align_texts(WORDPIECE, CLIP, ["a giraffe's computer"])
    assert read(WORDPIECE, path.source) == ["a", "gi", "##raf", "##fe", "'", "s", "computer"]
    assert read(CLIP, path.target) == ["a</w>", "giraffe</w>", "'s</w>", "compu", "ter</w>"]
    assert path.lands == (0, 1, 1, 1, 2, 2, 3)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@given(st.text(st.sampled_from("ab gi.'s1é😀字-"), max_size=25))
def test_target_side_of_a_text_is_the_targets_own_reading(source, target, text):
    [path] = align_texts(source, target, [text])
    assert list(path.source) == source(text, add_special_tokens=False).input_ids
    assert list(path.target) == target(text, add_special_tokens=False).input_ids
    assert len(path.lands) == len(path.source)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@given(st.text(st.sampled_from("ab gi.'s1é😀字-"), max_size=25))
def test_landing_places_never_go_back_and_lie_inside(source, target, text):
    [path] = align_texts(source, target, [text])
    landed = [place for place in path.lands if place >= 0]
    assert landed == sorted(landed)
    assert all(place < len(path.target) for place in landed)


@pytest.mark.parametrize(
    "text", ["a dog's ball isn't red.", "two giraffes, 10 computers", "is it? yes! it's 3.5 miles..."]
)
def test_pieces_alone_tell_what_the_text_told(text):
    for source in (WORDPIECE, BYTES):
        [known] = align_texts(source, CLIP, [text])
        assert align_token_ids(source, CLIP, [known.source]) == [known]


@pytest.mark.parametrize("text", ["a dog sits on the grass", "giraffe"])
def test_spaces_that_pieces_bring_along_are_not_the_captions(text):
    """Bytes with their spaces read "a" and " a" differently, and CLIP's pieces end, WordPiece's begin with a space."""
    for source in (CLIP, WORDPIECE):
        [known] = align_texts(source, BYTES, [text])
        assert align_token_ids(source, BYTES, [known.source]) == [known]


def test_a_letter_that_is_cut_into_bytes_is_landed_in_at_its_first():
    [path] = align_texts(WORDPIECE, CLIP, ["a ෴ cat"])
    assert len(path.target) > 3 and path.lands == (0, 1, len(path.target) - 1)


def test_a_piece_that_spells_nothing_crosses_as_unknown():
    ids = [*WORDPIECE("a red", add_special_tokens=False).input_ids, WORDPIECE.unk_token_id]
    [path] = align_token_ids(WORDPIECE, CLIP, [ids])
    assert read(CLIP, path.target) == ["a</w>", "red</w>", "<|endoftext|>"]
    assert path.lands == (0, 1, 2)


def test_a_piece_that_spells_nothing_brings_no_space_along():
    ids = CLIP("a red cat", add_special_tokens=False).input_ids
    [path] = align_token_ids(CLIP, BYTES, [[ids[0], CLIP.unk_token_id, ids[2]]])
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
    assert read(BYTES, path.target)[-1] == f"{space}cat"
    assert BYTES.unk_token_id in path.target and space not in read(BYTES, path.target)


def test_half_a_letter_and_an_empty_row_are_defined():
    half = BYTES("字", add_special_tokens=False).input_ids[:1]
    [broken, empty] = align_token_ids(BYTES, CLIP, [half, []])
    assert broken.target == (CLIP.unk_token_id,) and broken.lands == (0,)
    assert empty == ((), (), ())


def test_published_captions_cross_whole(real_data):
    """25,010 captions: all from their texts; 99.94 % from their pieces, as the paper's fact sheet measured."""
    file = real_data / "coco-karpathy" / "coco_karpathy_test_gt.json"
    captions = [entry["caption"] for entry in json.loads(file.read_text())["annotations"]]
    known = align_texts(WORDPIECE, CLIP, captions)
    assert [list(path.target) for path in known] == CLIP(captions, add_special_tokens=False).input_ids
    told = align_token_ids(WORDPIECE, CLIP, [path.source for path in known])
    same = sum(a.target == b.target for a, b in zip(known, told, strict=True))
    assert same / len(captions) == pytest.approx(0.9994, abs=5e-5)
