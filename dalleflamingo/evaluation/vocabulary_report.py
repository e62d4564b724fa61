"""What a map does to captions: how many cross, what becomes [UNK], which words are lost (App. G).

Captions count as known by the captioner's pieces only, said with certainty. That is the harder way: with its text at
hand, every caption crosses the word-aligned map.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import pandas as pd
import torch

from dalleflamingo.intervals import Interval, proportion
from dalleflamingo.tokens import (
    Alignment,
    TokenizedCaption,
    Word,
    align,
    align_token_ids,
    align_tokenized,
    same_tokens,
    tokenize_captions,
)
from dalleflamingo.vocabulary import VocabularyMap

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """How captions cross.

    Attributes:
        same: share of captions that both tokenizers cut into the same pieces.
        exact: share of captions that arrive as the target's own reading. With the word-aligned map M has no part in it:
            said with certainty, a caption is its text. With the others every right target piece has to be what its
            source piece is read as, or one of them, where several are equally likely.
        read: share of source pieces that M, by itself, reads as the target piece they begin in: what departures rely
            on.
        unknown: share of source pieces that are read as [UNK].
        made: mean of (mass of a row − 1) over source pieces; 0 but for `released`.
        words: word, source and target (pieces), count: the words that do not cross, most frequent first.
    """

    same: Interval
    exact: Interval
    read: Interval
    unknown: Interval
    made: float
    words: pd.DataFrame

    @property
    def lost(self) -> int:
        """Occurrences of words that do not cross."""
        return int(self.words["count"].sum())


def report(vocabulary_map: VocabularyMap, captions: Sequence[str]) -> Report:
    """What a map does to captions.

    Raises:
        ValueError: there are no captions, or none that holds a word.
    """
    source, target = vocabulary_map.source, vocabulary_map.target
    first, second = tokenize_captions(source, captions), tokenize_captions(target, captions)
    crossing = _Crossing(vocabulary_map)
    exact = crossing.exact([cut.ids for cut in first], [cut.ids for cut in second])
    found = Counter(
        (word.text.lower(), word.source, word.target)
        for caption, said, wanted, whole in zip(captions, first, second, exact, strict=True)
        if not whole
        for word in crossing.lost_words(caption, said, wanted)
    )
    lost = sorted(([*word, times] for word, times in found.items()), key=lambda row: (-row[3], row[0]))
    pieces = torch.tensor([id for cut in first for id in cut.ids], dtype=torch.long)
    if not len(pieces):
        raise ValueError(f"{len(captions)} captions without a piece: give captions that hold words")
    begins = crossing.begins(map(align_tokenized, first, second))
    return Report(
        same=same_tokens([cut.pieces for cut in first], [cut.pieces for cut in second]),
        exact=proportion(sum(exact), len(captions)),
        read=proportion(sum(begins), len(begins)),
        unknown=proportion(int(crossing.unknown[pieces].sum()), len(pieces)),
        made=float((crossing.mass[pieces] - 1).mean()),
        words=pd.DataFrame(lost, columns=["word", "source", "target", "count"]),
    )


class _Crossing:
    """Are source pieces, said with certainty, read as the right target pieces?"""

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
        self.best = set(zip(rows[best].tolist(), columns[best].tolist(), strict=True))

    def exact(self, said: Sequence[Ids], wanted: Sequence[Ids]) -> list[bool]:
        """For each caption: is every piece right?"""
        if self.map.kind == "word-aligned":
            paths = align_token_ids(self.map.source, self.map.target, said)
            return [path.target == ids for path, ids in zip(paths, wanted, strict=True)]
        return [self._equal(*pair) for pair in zip(said, wanted, strict=True)]

    def begins(self, paths: Iterable[Alignment]) -> list[bool]:
        """For each source piece that begins in a target piece: is that how M reads it?"""
        return [
            (piece, path.target[land]) in self.best
            for path in paths
            for piece, land in zip(path.source, path.lands, strict=True)
            if land >= 0
        ]

    def lost_words(self, caption: str, said: TokenizedCaption, wanted: TokenizedCaption) -> Iterator[Word]:
        """The words of a caption that do not arrive whole."""
        arrives = self._judge(said.ids, wanted.ids)
        i = j = 0
        for word in align(caption, said, wanted):
            here, there = slice(i, i + len(word.source)), slice(j, j + len(word.target))
            if not arrives(here, there):
                yield word
            i, j = here.stop, there.stop

    def _judge(self, said: Ids, wanted: Ids) -> Callable[[slice, slice], bool]:
        """Of one caption: do these source places arrive as those target places?"""
        if self.map.kind != "word-aligned":
            return lambda here, there: self._equal(said[here], wanted[there])
        [path] = align_token_ids(self.map.source, self.map.target, [said])  # of all: a space before a word matters
        blocks = SequenceMatcher(None, path.target, wanted, autojunk=False).get_matching_blocks()
        arrived = {place for _, start, size in blocks for place in range(start, start + size)}
        return lambda _, there: arrived.issuperset(range(there.start, there.stop))

    def _equal(self, said: Ids, wanted: Ids) -> bool:
        return len(said) == len(wanted) and self.best.issuperset(zip(said, wanted, strict=True))
