"""How a caption crosses from one tokenizer to another: in which target piece each source piece begins.

The text itself is the common measure. Both tokenizers tell from which letter to which each of their pieces reaches; a
source piece *lands* in the target piece that holds its first letter. `gi ##raf ##fe` all land in `giraffe</w>`; of `1`
and `0</w>`, for the source piece `10`, only the first is landed in.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dalleflamingo.subwords import Cut, Style, cuts, style, token_bytes

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands in the text for a piece that spells nothing
# Pieces bring their spaces along; a caption neither begins nor ends with one, and no two stand side by side.
_SPARE = re.compile(r"^ +| +$| +(?= )")
# What transformers' decoder tidies after WordPiece, which sets every punctuation mark apart: "dog ' s ." is "dog's."
_SUPERFLUOUS = re.compile(_SPARE.pattern + r"| (?=[.?!,])| (?=' )|(?<= ') ")


class Path(NamedTuple):
    """One caption on both sides.

    source, target: ids of its pieces, without special tokens; lands: for each source piece the place of the target
    piece that holds its first letter, −1 where no target piece does.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    lands: tuple[int, ...]


def paths_of_texts(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[Path]:
    """Paths of captions that are known as text: teacher forcing. The target side is exactly the target's own reading.

    Raises:
        TypeError, ValueError: as `subwords.cuts`.
    """
    return [path_of_cuts(first, second) for first, second in zip(cuts(source, texts), cuts(target, texts), strict=True)]


def paths_of_ids(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, ids: Iterable[Sequence[int]]
) -> list[Path]:
    """Paths of captions that are known as source pieces only: the argmax path. The text is what the pieces spell.

    Args:
        ids: rows without special tokens; a piece that spells nothing ([UNK], say) crosses as the target's own [UNK].
    """
    rows = [tuple(map(int, row)) for row in ids]
    how, special = style(source), set(source.all_special_ids)
    spelled = [_spell(source.convert_ids_to_tokens(list(row)), [id in special for id in row], how) for row in rows]
    read = cuts(target, [text for text, _ in spelled])
    return [
        path_of_cuts(Cut((), row, tuple((start, start) for start in starts)), _collapse(cut, text, target.unk_token_id))
        for row, (text, starts), cut in zip(rows, spelled, read, strict=True)
    ]


def path_of_cuts(source: Cut, target: Cut) -> Path:
    """The path of one caption that both tokenizers have cut."""
    starts = [start for start, _ in target.spans]
    return Path(source.ids, target.ids, tuple(_land(start, starts, target.spans) for start, _ in source.spans))


def _land(letter: int, starts: list[int], spans: Sequence[tuple[int, int]]) -> int:
    """Place of the first piece that holds a letter; several do where a letter is cut into bytes."""
    last = bisect_right(starts, letter) - 1
    if last < 0 or letter >= spans[last][1]:
        return -1
    return bisect_left(starts, starts[last])


def _spell(tokens: Sequence[str], special: Sequence[bool], how: Style) -> tuple[str, list[int]]:
    """The text of pieces, and the letter at which each begins, behind its space."""
    parts = [
        f" {_UNKNOWN} ".encode() if spells_nothing else token_bytes(token, how)
        for token, spells_nothing in zip(tokens, special, strict=True)
    ]
    text = b"".join(parts).decode("utf-8", errors="surrogateescape")
    ends = list(accumulate(len(letter.encode("utf-8", errors="surrogateescape")) for letter in text))
    offsets = accumulate(map(len, parts), initial=0)
    firsts = [offset + len(part) - len(part.lstrip()) for offset, part in zip(offsets, parts, strict=False)]
    letters = [bisect_right(ends, first) for first in firsts]
    text = "".join(_UNKNOWN if "\ud800" <= letter <= "\udfff" else letter for letter in text)
    return _without(_SUPERFLUOUS if how.goes_on else _SPARE, text, letters)


def _without(spaces: re.Pattern, text: str, letters: list[int]) -> tuple[str, list[int]]:
    """The text without those spaces; `letters` are places in it, moved with it."""
    gone = [place for match in spaces.finditer(text) for place in range(*match.span())]
    return spaces.sub("", text), [letter - bisect_left(gone, letter) for letter in letters]


def _collapse(cut: Cut, text: str, unknown: int) -> Cut:
    """All pieces of one _UNKNOWN become a single [UNK]."""
    kept = [
        (unknown if text[start] == _UNKNOWN else id, (start, end))
        for place, (id, (start, end)) in enumerate(zip(cut.ids, cut.spans, strict=True))
        if text[start] != _UNKNOWN or not place or cut.spans[place - 1] != (start, end)
    ]
    return Cut((), tuple(id for id, _ in kept), tuple(span for _, span in kept))
