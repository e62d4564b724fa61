"""The maps: known tokens, conserved mass, the equation written plainly, and what they do to real captions."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings

from dalleflamingo.evaluation.map_files import load_map, save_map
from dalleflamingo.evaluation.vocabulary_report import clip_tokenizer, report, wordpiece_tokenizer
from dalleflamingo.research.released import released_map
from dalleflamingo.vocabulary import MAP_KINDS, VocabularyMap

WORDPIECE, CLIP, BYTES = wordpiece_tokenizer(), clip_tokenizer(), tiny.byte_level_bpe()
CAPTIONS = [
    "a giraffe eats leaves from a tree",
    "the boy's dog caught the frisbee",
    "surf the web with 10 computers",
    "two snowboarders surf on a surf board",
]


@pytest.fixture(scope="module")
def maps():
    """kind -> the map from WordPiece to CLIP; "bytes" -> word-aligned from byte-level BPE."""
    learned = {kind: VocabularyMap.learn(WORDPIECE, CLIP, CAPTIONS, kind) for kind in MAP_KINDS}
    return learned | {"released": released_map(WORDPIECE, CLIP), "bytes": VocabularyMap.learn(BYTES, CLIP, CAPTIONS)}


def id_of(tokenizer, token: str) -> int:
    id = tokenizer.convert_tokens_to_ids(token)
    assert tokenizer.convert_ids_to_tokens(id) == token
    return id


def row(vocabulary_map, token: str) -> dict[str, float]:
    """The row of M of one token, by target token."""
    rows, columns = vocabulary_map.matrix.indices()
    mine = rows == id_of(vocabulary_map.source, token)
    names = vocabulary_map.target.convert_ids_to_tokens(columns[mine].tolist())
    return dict(zip(names, vocabulary_map.matrix.values()[mine].tolist(), strict=True))


def certain(ids, size: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([ids], dtype=torch.long), size).float()


def soft(generator: np.random.Generator, length: int, size: int, peak: float) -> torch.Tensor:
    """(1, length, size) distributions, between even and all but certain."""
    logits = torch.from_numpy(generator.normal(size=(1, length, size))) * peak
    return logits.softmax(-1).float()


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_m_count_where_tokens_belong(maps):
    aligned = maps["word-aligned"]
    assert row(aligned, "gi") == row(aligned, "##raf") == {"giraffe</w>": 1}
    assert row(aligned, "10") == {"1</w>": 1}  # the position of its first digit
    assert row(aligned, "surf") == pytest.approx({"surf</w>": 1})
    assert row(aligned, "dog") == {"dog</w>": 1}


def test_unseen_tokens_become_their_text_and_special_ones_unknown(maps):
    for kind in ("one-to-one", "word-aligned"):
        assert row(maps[kind], "umbrella") == {"umbrella</w>": 1}
        assert row(maps[kind], "[MASK]") == {"<|endoftext|>": 1}  # CLIP's [UNK]
    assert row(maps["word-aligned"], "[SEP]") == {"<|endoftext|>": 1}


def test_one_to_one_takes_the_most_frequent():
    counted = ["a surf board"] * 2 + ["a surfboard"] * 3  # CLIP: surf</w> board</w>, and surf board</w>
    assert row(VocabularyMap.learn(WORDPIECE, CLIP, counted, "one-to-one"), "surf") == {"surf": 1}
    assert row(VocabularyMap.learn(WORDPIECE, CLIP, counted), "surf") == pytest.approx({"surf": 0.6, "surf</w>": 0.4})


def test_released_rule_copies_one_token_to_many(maps):
    assert row(maps["released"], "surf") == {"surf</w>": 1, "surf": 1}
    assert row(maps["released"], "##ffi") == {"ffi": 1}  # no whole word, so CLIP's token inside a word reads off the ##
    assert len(row(maps["released"], "[UNK]")) > 20_000


@pytest.mark.parametrize("kind", ["one-to-one", "word-aligned", "bytes"])
def test_rows_of_m_sum_to_one(maps, kind):
    sums = maps[kind].matrix.sum(1).to_dense()
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)


# ── mapping ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["word-aligned", "bytes"])
@pytest.mark.parametrize("text", [*CAPTIONS, "a café's 😀 …", "x" * 30, ""])
def test_a_certain_caption_becomes_the_targets_own_tokens(maps, kind, text):
    source = maps[kind].source
    ids = source(text, add_special_tokens=False).input_ids
    Q = maps[kind].target_distributions(certain(ids, len(source)), maps[kind].align([ids], [text]))
    expected = CLIP(text, add_special_tokens=False).input_ids
    assert Q[0, : len(expected)].argmax(-1).tolist() == expected
    assert Q.sum().item() == pytest.approx(len(expected), abs=1e-6)
    assert (Q <= 1).all()


@pytest.mark.parametrize("kind", ["word-aligned", "bytes"])
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([*CAPTIONS, "10 giraffes' café isn't..."]), st.integers(0, 99), st.sampled_from([0.1, 3.0, 30.0])
)
def test_no_probability_is_lost_or_made(maps, kind, text, seed, peak):
    source = maps[kind].source
    ids = source(text, add_special_tokens=False).input_ids
    P = soft(np.random.default_rng(seed), len(ids), len(source), peak)
    Q = maps[kind].target_distributions(P, maps[kind].align([ids]))
    torch.testing.assert_close(Q.sum(-1), torch.ones(Q.shape[:2]), atol=1e-6, rtol=0)
    assert Q.min() >= 0


def test_target_distributions_are_the_equation_written_with_loops(maps):
    aligned, text = maps["word-aligned"], "a giraffe's 10 computers surf"
    ids = WORDPIECE(text, add_special_tokens=False).input_ids
    [alignment] = aligned.align([ids], [text])
    P = soft(np.random.default_rng(0), len(ids), len(WORDPIECE), 4.0)
    P[0, torch.arange(len(ids)), ids] += 1  # the caption is likely, but not certain
    P /= P.sum(-1, keepdim=True)
    (rows, columns), values = aligned.matrix.indices(), aligned.matrix.values()
    expected = torch.zeros(len(alignment.target), len(CLIP))
    for j, u in enumerate(alignment.target):
        followed = 1.0
        for t in (t for t, position in enumerate(alignment.target_positions) if position == j):
            departure = P[0, t].clone()
            departure[ids[t]] = 0
            expected[j].index_add_(0, columns, followed * departure[rows] * values)  # Σ_v P_t(v) M_v
            followed *= P[0, t, ids[t]].item()
        expected[j, u] += followed
    assert 0 < followed < 1
    torch.testing.assert_close(aligned.target_distributions(P, [alignment])[0], expected, atol=1e-6, rtol=1e-5)


def test_an_alternative_keeps_its_mass_inside_a_split_word(maps):
    """The captioner predicts "gi" with 0.7 and "dog" with 0.3, then is sure of giraffe: 0.3 of the position is dog."""
    aligned = maps["word-aligned"]
    ids = WORDPIECE("giraffe", add_special_tokens=False).input_ids
    P = certain(ids, len(WORDPIECE))
    P[0, 0, id_of(WORDPIECE, "gi")], P[0, 0, id_of(WORDPIECE, "dog")] = 0.7, 0.3
    Q = aligned.target_distributions(P, aligned.align([ids]))[0, 0]
    assert Q[id_of(CLIP, "giraffe</w>")].item() == pytest.approx(0.7)
    assert Q[id_of(CLIP, "dog</w>")].item() == pytest.approx(0.3)


@pytest.mark.parametrize("kind", [*MAP_KINDS, "released"])
def test_expected_embeddings_are_target_distributions_times_embeddings(maps, kind):
    ids = [WORDPIECE(text, add_special_tokens=False).input_ids for text in CAPTIONS[:2]]
    longest = max(map(len, ids))
    P = torch.cat([soft(np.random.default_rng(seed), longest, len(WORDPIECE), 2.0) for seed in (1, 2)])
    alignments = maps[kind].align(ids)
    E = torch.randn(len(CLIP), 5, generator=torch.Generator().manual_seed(0))
    expected = maps[kind].expected_embeddings(P, alignments, torch.sparse.mm(maps[kind].matrix, E), E)
    torch.testing.assert_close(expected, maps[kind].target_distributions(P, alignments) @ E, atol=2e-4, rtol=1e-4)
    for b, alignment in enumerate(alignments):  # behind a caption all is 0
        length = len(alignment.target if kind == "word-aligned" else alignment.source)
        assert expected[b, length:].abs().sum() == 0


def test_released_rule_makes_mass(maps):
    ids = WORDPIECE("surf", add_special_tokens=False).input_ids
    assert maps["released"].target_distributions(certain(ids, len(WORDPIECE)), maps["released"].align([ids])).sum() == 2


def test_more_outputs_than_tokens_become_unknown(maps):
    wide = maps["word-aligned"].resize(len(WORDPIECE) + 2)
    ids = WORDPIECE("dog", add_special_tokens=False).input_ids
    P = certain(ids, len(WORDPIECE) + 2) * 0.75
    P[0, 0, -1] = 0.25
    Q = wide.target_distributions(P, wide.align([ids]))[0, 0]
    assert (Q[id_of(CLIP, "dog</w>")], Q[CLIP.unk_token_id]) == (0.75, 0.25)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*MAP_KINDS, "released", "bytes"])
def test_a_saved_map_is_loaded_identical(maps, kind, tmp_path):
    for saved in (maps[kind], maps[kind].resize(len(maps[kind].source) + 2)):
        save_map(saved, tmp_path / "map")
        loaded = load_map(tmp_path / "map", saved.source, CLIP)
        assert (loaded.kind, loaded.captions, loaded.matrix.shape) == (saved.kind, saved.captions, saved.matrix.shape)
        assert torch.equal(loaded.matrix.indices(), saved.matrix.indices())
        assert torch.equal(loaded.matrix.values(), saved.matrix.values())


def test_a_map_for_other_vocabularies_is_refused(maps, tmp_path):
    save_map(maps["bytes"], tmp_path / "map")
    with pytest.raises(ValueError, match=r"learned for another source vocabulary \(330 tokens\).*\(30522\)"):
        load_map(tmp_path / "map", WORDPIECE, CLIP)


# ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_report_names_the_words_that_are_lost(maps):
    lost = report(maps["one-to-one"], ["a giraffe", "a Giraffe and a dog", "a dog"])
    assert lost.exact.value == pytest.approx(1 / 3) and lost.exact.n == 3
    assert lost.lost_words.values.tolist() == [["giraffe", ("gi", "raf", "fe</w>"), ("giraffe</w>",), 2]]
    assert lost.lost == 2 and lost.added_mass == pytest.approx(0, abs=1e-6)
    whole = report(maps["word-aligned"], ["a giraffe", "a dog"])
    assert whole.exact.value == 1 and whole.lost_words.empty


def test_report_judges_a_word_in_its_caption():
    """Byte-level BPE has tokens for "a" and " a", and for capitals; CLIP's are lower-cased: only capitals are lost."""
    back = VocabularyMap.learn(CLIP, BYTES, CAPTIONS)
    found = report(back, ["a dog on a surf board", "A dog on a Surf board"])
    assert found.exact.value == 0.5
    assert sorted(found.lost_words.word) == ["a", "surf"] and found.lost == 2


def test_report_counts_what_is_unknown_and_what_mass_is_added(maps):
    assert report(maps["word-aligned"], ["a 😀"]).unknown.value == 0.5
    assert report(maps["released"], ["a surf"]).added_mass == pytest.approx(1.0)  # both become two target tokens each


def test_report_counts_how_often_m_alone_is_right():
    """A source token counts if the target token to which it belongs is the likeliest of its row."""
    learned = VocabularyMap.learn(WORDPIECE, CLIP, ["surf", "surf", "a ski", "two skis"])
    assert report(learned, ["a surf"]).token_accuracy.value == 1
    assert report(learned, ["ski"]).token_accuracy.value == 1
    two = report(learned, ["ski 10 10"]).token_accuracy  # 10 was never seen: it becomes what its text begins with
    assert (two.value, two.n) == (1, 3)
    assert report(released_map(WORDPIECE, CLIP), ["surf giraffe"]).token_accuracy.value == 0.25
    spaced = VocabularyMap.learn(BYTES, CLIP, ["a in the"])
    assert report(spaced, ["a in the "]).token_accuracy.n == 3  # the space at the end belongs to no target token


def test_shares_on_published_captions(real_data):
    """Learned on Karpathy val, measured on test: the released rule as the fact sheet measured it."""
    folder = real_data / "coco-karpathy"
    val, test = (
        [
            entry["caption"]
            for entry in json.loads((folder / f"coco_karpathy_{part}_gt.json").read_text())["annotations"]
        ]
        for part in ("val", "test")
    )
    learned = [released_map(WORDPIECE, CLIP), *(VocabularyMap.learn(WORDPIECE, CLIP, val, kind) for kind in MAP_KINDS)]
    share = {one.kind: report(one, test).exact.value for one in learned}
    assert share["released"] == pytest.approx(0.651, abs=5e-4)
    assert share["one-to-one"] == pytest.approx(0.6675, abs=5e-4)
    assert share["word-aligned"] == pytest.approx(0.9994, abs=5e-5)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_input_says_what_was_expected(maps):
    aligned = maps["word-aligned"]
    with pytest.raises(ValueError, match="a map is learned from captions, and there are none"):
        VocabularyMap.learn(WORDPIECE, CLIP, [])
    with pytest.raises(ValueError, match="no map is called 'soft': choose one of one-to-one, word-aligned"):
        VocabularyMap.learn(WORDPIECE, CLIP, CAPTIONS, "soft")
    with pytest.raises(ValueError, match="the released rule leads from WordPiece to byte pairs"):
        released_map(BYTES, CLIP)
    with pytest.raises(TypeError, match="expected a list of captions"):
        VocabularyMap.learn(WORDPIECE, CLIP, "a dog")
    with pytest.raises(ValueError, match="1 rows of tokens and 2 texts"):
        aligned.align([[5]], ["a dog", "a cat"])
    with pytest.raises(ValueError, match="2 captions without a token"):
        report(aligned, ["", " "])
    with pytest.raises(ValueError, match="the text is 'a dog', but the tokens say 'a cat'"):
        aligned.align([WORDPIECE("a cat", add_special_tokens=False).input_ids], ["a dog"])
    alignments = aligned.align([WORDPIECE("a cat", add_special_tokens=False).input_ids])
    with pytest.raises(ValueError, match=r"distributions over 7 tokens.*resize\(7\)"):
        aligned.target_distributions(torch.ones(1, 2, 7), alignments)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 30522\) for 1 captions of up to 2 tokens"):
        aligned.target_distributions(torch.ones(1, 1, 30_522), alignments)
    with pytest.raises(ValueError, match="the model has 3 outputs, its tokenizer 30522 tokens"):
        aligned.resize(3)
