"""How two tokenizers differ on captions, and what a map between them does to captions (App. G).

The tokens of captions are compared as strings in one notation (`tokens.py`), and what differs is named word by word:
a word is a stretch of a caption at whose end both tokenizers end a word.

`report` judges a map on captions that the captioner is certain about and that are known as its tokens only. This is the
harder case: with its text at hand, every caption passes the word-aligned map unchanged.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import pandas as pd
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from dalleflamingo import registry
from dalleflamingo.evaluation.intervals import Interval, proportion
from dalleflamingo.tokens import (
    END_OF_WORD,
    Alignment,
    TokenizedCaption,
    align_token_ids,
    align_tokenized,
    tokenize_captions,
)
from dalleflamingo.vocabulary import VocabularyMap

# ── the real vocabularies ────────────────────────────────────────────────────────────────────────────────────────────


def wordpiece_tokenizer() -> PreTrainedTokenizerBase:
    """BERT's uncased WordPiece, 30,522 tokens: BLIP's own vocabulary except for its two extra special tokens.

    It is also SBERT's, which the extra `course` installs, so it needs no network.
    """
    folder = registry.locate("sbert")
    with registry.loading(folder):
        return AutoTokenizer.from_pretrained(folder, revision=registry.ENTRIES["sbert"].revision)


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """CLIP's byte pairs, 49,408 tokens, as Stable Diffusion has them; from open_clip, so it needs no network."""
    original = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # open_clip's name, CLIP's
    ids = {special.get(token, token): id for token, id in original.encoder.items()}
    return CLIPTokenizer(vocab=ids, merges=list(original.bpe_ranks), model_max_length=77)


# ── how two tokenizers differ ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Word:
    """A stretch of a caption at whose end both tokenizers end a word; the shortest such, mostly what we call a word.

    Attributes:
        text: as the caption has it.
        source: its tokens by one tokenizer.
        target: its tokens by the other.
    """

    text: str
    source: tuple[str, ...]
    target: tuple[str, ...]

    @property
    def alike(self) -> bool:
        return self.source == self.target


def caption_tokens(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[tuple[str, ...]]:
    """Each caption's tokens as `TokenizedCaption` has them.

    Args:
        tokenizer: a fast tokenizer of transformers.
        captions: texts, in a list.
    Raises:
        TypeError, ValueError: as `tokenize_captions`.
    """
    return [caption.tokens for caption in tokenize_captions(tokenizer, captions)]


def spell(tokens: Sequence[str]) -> str:
    """The text that tokens spell, a space after every word: `("gi", "raf", "fe</w>", "'</w>")` is "giraffe '"."""
    return "".join(tokens).replace(END_OF_WORD, " ").rstrip()


def same_tokens(source: Sequence[tuple[str, ...]], target: Sequence[tuple[str, ...]]) -> Interval:
    """Share of captions that have the same tokens, as sequences, with Wilson's interval (claim 13).

    Args:
        source: what `caption_tokens` returns for one tokenizer.
        target: the same for the other tokenizer and the same captions.
    Raises:
        ValueError: the numbers of captions differ, or there are none.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} captions against {len(target)}: give the tokens of the same captions")
    return proportion(sum(map(tuple.__eq__, source, target)), len(source))


def align_words(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, captions: Sequence[str]
) -> list[list[Word]]:
    """Each caption as words, which hold all of its tokens, in order.

    In "boy's" WordPiece ends a word after boy, ' and s, CLIP after boy and 's: the words are "boy" and "'s".

    Args:
        source: one tokenizer.
        target: the other.
        captions: texts, in a list.
    Raises:
        TypeError, ValueError: as `tokenize_captions`.
    """
    pairs = zip(captions, tokenize_captions(source, captions), tokenize_captions(target, captions), strict=True)
    return [align_caption(caption, first, second) for caption, first, second in pairs]


def align_caption(caption: str, source: TokenizedCaption, target: TokenizedCaption) -> list[Word]:
    """One caption, given as both tokenizers tokenize it, as words."""
    shared = sorted(_word_ends(source) & _word_ends(target) | {len(caption)})
    sides = (defaultdict(list), defaultdict(list))  # word number -> its tokens
    starts = defaultdict(lambda: len(caption))
    for tokenized, words in zip((source, target), sides, strict=True):
        for token, (start, end) in zip(tokenized.tokens, tokenized.spans, strict=True):
            word = bisect_left(shared, end)
            words[word].append(token)
            starts[word] = min(starts[word], start)
    return [
        Word(caption[starts[word] : shared[word]].strip(), tuple(sides[0][word]), tuple(sides[1][word]))
        for word in sorted(starts)
    ]


def _word_ends(caption: TokenizedCaption) -> set[int]:
    """Characters behind which a word ends; of several tokens that end there (bytes of a character) the last decides."""
    last = {end: token for token, (_, end) in zip(caption.tokens, caption.spans, strict=True)}
    return {end for end, token in last.items() if token.endswith(END_OF_WORD)}


def words_tokenized_differently(captions: Iterable[Iterable[Word]]) -> pd.DataFrame:
    """The words whose tokens differ, most frequent first.

    Args:
        captions: what `align_words` returns.
    Returns:
        columns word (lower-cased), source and target (tokens), count (occurrences), captions (that contain it).
    """
    occurrences, containing = Counter(), Counter()
    for words in captions:
        found = [(word.text.lower(), word.source, word.target) for word in words if not word.alike]
        occurrences.update(found)
        containing.update(set(found))
    ordered = sorted(occurrences, key=lambda word: (-occurrences[word], word))
    rows = [(*word, occurrences[word], containing[word]) for word in ordered]
    return pd.DataFrame(rows, columns=["word", "source", "target", "count", "captions"])


# ── what a map does ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Report:
    """What a map does to captions that the captioner is certain about.

    Attributes:
        same_tokens: share of captions that have the same tokens on both sides.
        exact: share of captions that arrive as the target's own tokens. The word-aligned map does not use M here: a
            certain caption is its text. With another map, every target token has to be the likeliest of its source
            token's row of M, or one of several equally likely.
        token_accuracy: share of source tokens whose likeliest target token, by M alone, is the one they belong to:
            this matters where the captioner departs from the caption.
        unknown: share of source tokens whose likeliest target token is [UNK].
        added_mass: mean of (sum of a row of M − 1) over source tokens; 0 but for the released map.
        lost_words: columns word, source, target (tokens), count: the words that do not arrive, most frequent first.
    """

    same_tokens: Interval
    exact: Interval
    token_accuracy: Interval
    unknown: Interval
    added_mass: float
    lost_words: pd.DataFrame

    @property
    def lost(self) -> int:
        """Occurrences of words that do not arrive."""
        return int(self.lost_words["count"].sum())


def report(vocabulary_map: VocabularyMap, captions: Sequence[str]) -> Report:
    """Measures what a map does to captions.

    Args:
        vocabulary_map: any.
        captions: texts, better not those that the map was learned from.
    Raises:
        ValueError: there are no captions, or none that contains a word.
    """
    source = tokenize_captions(vocabulary_map.source, captions)
    target = tokenize_captions(vocabulary_map.target, captions)
    judge = _Judge(vocabulary_map)
    exact = judge.exact([caption.ids for caption in source], [caption.ids for caption in target])
    lost = Counter(
        (word.text.lower(), word.source, word.target)
        for caption, first, second, arrived in zip(captions, source, target, exact, strict=True)
        if not arrived
        for word in judge.lost_words(caption, first, second)
    )
    rows = sorted(([*word, count] for word, count in lost.items()), key=lambda row: (-row[3], row[0]))
    ids = torch.tensor([id for caption in source for id in caption.ids], dtype=torch.long)
    if not len(ids):
        raise ValueError(f"{len(captions)} captions without a token: give captions that contain words")
    right = judge.right_tokens(map(align_tokenized, source, target))
    return Report(
        same_tokens=same_tokens([caption.tokens for caption in source], [caption.tokens for caption in target]),
        exact=proportion(sum(exact), len(captions)),
        token_accuracy=proportion(sum(right), len(right)),
        unknown=proportion(int(judge.unknown[ids].sum()), len(ids)),
        added_mass=float((judge.mass[ids] - 1).mean()),
        lost_words=pd.DataFrame(rows, columns=["word", "source", "target", "count"]),
    )


class _Judge:
    """Do source tokens that the captioner is certain about become the right target tokens?

    Attributes:
        mass: (|V_source|,) sums of the rows of M.
        unknown: (|V_source|,) is [UNK] the likeliest target token of the row?
        likeliest: pairs of a source token and a target token that is likeliest in its row.
    """

    def __init__(self, vocabulary_map: VocabularyMap):
        self.map = vocabulary_map
        rows, columns = vocabulary_map.matrix.indices()
        values = vocabulary_map.matrix.values()
        shape = (vocabulary_map.matrix.shape[0],)
        self.mass = torch.zeros(shape).index_add(0, rows, values)
        largest = torch.zeros(shape).scatter_reduce(0, rows, values, "amax")
        best = values == largest[rows]
        self.unknown = torch.zeros(shape, dtype=torch.bool)
        self.unknown[rows[best & (columns == vocabulary_map.target.unk_token_id)]] = True
        self.likeliest = set(zip(rows[best].tolist(), columns[best].tolist(), strict=True))

    def exact(self, source: Sequence[tuple[int, ...]], target: Sequence[tuple[int, ...]]) -> list[bool]:
        """For each caption: is every token right?"""
        if self.map.kind == "word-aligned":
            alignments = align_token_ids(self.map.source, self.map.target, source)
            return [alignment.target == ids for alignment, ids in zip(alignments, target, strict=True)]
        return [self._equal(*pair) for pair in zip(source, target, strict=True)]

    def right_tokens(self, alignments: Iterable[Alignment]) -> list[bool]:
        """For each source token that belongs to a target token: is this the likeliest of its row?"""
        return [
            (id, alignment.target[position]) in self.likeliest
            for alignment in alignments
            for id, position in zip(alignment.source, alignment.target_positions, strict=True)
            if position >= 0
        ]

    def lost_words(self, caption: str, source: TokenizedCaption, target: TokenizedCaption) -> Iterator[Word]:
        """The words of a caption that do not arrive."""
        arrives = self._arrives(source.ids, target.ids)
        i = j = 0
        for word in align_caption(caption, source, target):
            here, there = slice(i, i + len(word.source)), slice(j, j + len(word.target))
            if not arrives(here, there):
                yield word
            i, j = here.stop, there.stop

    def _arrives(self, source: tuple[int, ...], target: tuple[int, ...]) -> Callable[[slice, slice], bool]:
        """For one caption the function: do the tokens at these source positions become those at these target ones?"""
        if self.map.kind != "word-aligned":
            return lambda here, there: self._equal(source[here], target[there])
        [alignment] = align_token_ids(self.map.source, self.map.target, [source])  # whole, for the spaces before words
        blocks = SequenceMatcher(None, alignment.target, target, autojunk=False).get_matching_blocks()
        arrived = {position for _, start, size in blocks for position in range(start, start + size)}
        return lambda _, there: arrived.issuperset(range(there.start, there.stop))

    def _equal(self, source: tuple[int, ...], target: tuple[int, ...]) -> bool:
        return len(source) == len(target) and self.likeliest.issuperset(zip(source, target, strict=True))
