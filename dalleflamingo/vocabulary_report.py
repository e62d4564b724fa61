"""What a map does to captions: how many cross, what becomes [UNK], which words are lost (App. G).

Captions count as known by the captioner's pieces only, said with certainty. That is the harder way: with its text at
hand, every caption crosses the word-aligned map.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import pandas as pd
import torch

from dalleflamingo.alignment import paths_of_ids
from dalleflamingo.intervals import Interval, proportion
from dalleflamingo.subwords import align, cuts, same_pieces
from dalleflamingo.vocabulary import VocabularyMap


@dataclass(frozen=True)
class Report:
    """How captions cross.

    Attributes:
        same: share of captions that both tokenizers cut into the same pieces.
        exact: share of captions whose every right target piece is what its source piece is read as.
        unknown: share of source pieces that are read as [UNK].
        made: mean of (mass of a row − 1) over source pieces; 0 but for `released`.
        words: word, source and target (pieces), count: the words that do not cross, most frequent first.
    """

    same: Interval
    exact: Interval
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
        ValueError: there are no captions.
    """
    source, target = vocabulary_map.source, vocabulary_map.target
    first, second = cuts(source, captions), cuts(target, captions)
    crosses = _Crossing(vocabulary_map)
    exact = crosses([(a.ids, b.ids) for a, b in zip(first, second, strict=True)])
    found = Counter()
    for caption, a, b in zip(captions, first, second, strict=True):
        said, wanted = iter(a.ids), iter(b.ids)
        for word in align(caption, a, b):
            ids = (tuple(islice(said, len(word.source))), tuple(islice(wanted, len(word.target))))
            found[word.text.lower(), word.source, word.target, *ids] += 1
    fates = crosses([(said, wanted) for *_, said, wanted in found])
    lost = [(*word[:3], times) for (word, times), fate in zip(found.items(), fates, strict=True) if not fate]
    words = pd.DataFrame(sorted(lost, key=lambda row: (-row[3], row[0])), columns=["word", "source", "target", "count"])
    said = torch.tensor([id for cut in first for id in cut.ids])
    return Report(
        same=same_pieces([cut.pieces for cut in first], [cut.pieces for cut in second]),
        exact=proportion(sum(exact), len(captions)),
        unknown=proportion(int(crosses.unknown[said].sum()), len(said)),
        made=float((crosses.mass[said] - 1).mean()),
        words=words,
    )


class _Crossing:
    """Are these source pieces, said with certainty, read as those target pieces?"""

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

    def __call__(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[bool]:
        if self.map.kind == "word-aligned":
            paths = paths_of_ids(self.map.source, self.map.target, [said for said, _ in pairs])
            return [path.target == wanted for path, (_, wanted) in zip(paths, pairs, strict=True)]
        return [
            len(said) == len(wanted) and self.best.issuperset(zip(said, wanted, strict=True)) for said, wanted in pairs
        ]
