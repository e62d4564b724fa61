"""Two vocabularies, one caption: where captioner and generator cut the same text differently (App. G).

BLIP reads WordPiece (`gi ##raf ##fe`: `##` goes on with a word), Stable Diffusion CLIP's byte pairs (`giraffe</w>`:
`</w>` ends a word), BLIP-2's OPT bytes with their spaces (`Ġgir affe`: `Ġ` is the space before a word). All are brought
to one notation, CLIP's, so that pieces can be compared as strings, and captions are cut at the places where both sides
end a word, so that what differs can be named word by word.

How a caption crosses from one tokenizer to another: in which target piece each source piece begins.

The text itself is the common measure. Both tokenizers tell from which letter to which each of their pieces reaches; a
source piece *lands* in the target piece that holds its first letter. `gi ##raf ##fe` all land in `giraffe</w>`; of `1`
and `0</w>`, for the source piece `10`, only the first is landed in.
"""

import gzip
import importlib.util
import json
import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pandas as pd
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dalleflamingo import registry
from dalleflamingo.intervals import Interval, proportion

END_OF_WORD = "</w>"
CLIP_SIZE = 49_408  # 256 bytes, 256 bytes ending a word, one id a merge, <|startoftext|>, <|endoftext|>

_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = sorted({*range(256)}.difference(_VISIBLE))
# Byte-level vocabularies write a byte as a letter; in this order the letters are CLIP's first ids.
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}


@dataclass(frozen=True)
class Word:
    """A stretch of a caption at whose end both tokenizers end a word; the shortest such, mostly what we call a word.

    source, target: its pieces on either side, in the common notation.
    """

    text: str
    source: tuple[str, ...]
    target: tuple[str, ...]

    @property
    def alike(self) -> bool:
        return self.source == self.target


class TokenizedCaption(NamedTuple):
    """A caption cut by one tokenizer: pieces in the common notation, their ids, each one's (start, end) in letters."""

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class TokenizerStyle(NamedTuple):
    """How a tokenizer marks words; one of `continuation_prefix`, `ends` (a suffix) and `spaced` is set."""

    continuation_prefix: str = ""
    ends: str = ""
    spaced: bool = False

    @property
    def in_bytes(self) -> bool:
        return bool(self.ends) or self.spaced


def wordpiece_tokenizer() -> PreTrainedTokenizerBase:
    """BERT's uncased WordPiece, 30,522 pieces: BLIP's own vocabulary but for its two extra special tokens.

    It is also SBERT's, which the extra `course` installs, so that it is there without a network.
    """
    return AutoTokenizer.from_pretrained(registry.locate("sbert"), revision=registry.ENTRIES["sbert"].revision)


def clip_tokenizer() -> PreTrainedTokenizerBase:
    """CLIP's byte pairs, 49,408 pieces, which Stable Diffusion reads; made from the merges that open_clip carries."""
    merges_file = Path(importlib.util.find_spec("open_clip").origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(merges_file, "rt", encoding="utf-8") as lines:
        merges = [tuple(line.split()) for line in lines][1 : CLIP_SIZE - 2 * len(_BYTE_OF) - 1]  # after a header
    letters = [*_BYTE_OF, *(letter + END_OF_WORD for letter in _BYTE_OF)]
    vocabulary = [*letters, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    with TemporaryDirectory() as folder:  # as files, which every version of transformers reads
        files = {
            "vocab.json": json.dumps({piece: i for i, piece in enumerate(vocabulary)}),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]),
            "tokenizer_config.json": json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}),
        }
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[tuple[str, ...]]:
    """Each caption's pieces in the common notation: `</w>` after a piece that ends a word, no `##`, no special tokens.

    Pieces of bytes are read as text again (`âĢĵ` is a dash); one that is a part of a letter shows its bytes as `\\xe2`.
    Nothing is truncated or padded, whatever the tokenizer is set to.

    Returns:
        one tuple a caption; joined, and `</w>` read as a space, it spells the caption as the tokenizer sees it.
    Raises:
        TypeError: `captions` is one string. ValueError: as `style`.
    """
    return [cut.pieces for cut in tokenize_captions(tokenizer, captions)]


def spelled(caption_pieces: Sequence[str]) -> str:
    """The text that pieces spell, a space after every word: `("gi", "raf", "fe</w>", "'</w>")` is "giraffe '"."""
    return "".join(caption_pieces).replace(END_OF_WORD, " ").rstrip()


def same_tokens(source: Sequence[tuple[str, ...]], target: Sequence[tuple[str, ...]]) -> Interval:
    """Share of captions that fall into the same pieces, as sequences, with Wilson's interval (claim 13).

    Args:
        source, target: what `pieces` returns for the same captions and two tokenizers.
    Raises:
        ValueError: not as many on one side as on the other, or none.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} captions against {len(target)}: give the pieces of the same captions")
    return proportion(sum(map(tuple.__eq__, source, target)), len(source))


def align_words(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, captions: Sequence[str]
) -> list[list[Word]]:
    """Each caption as words that both tokenizers agree to end; their pieces, one after the other, are `pieces`.

    "boy's" is cut by WordPiece after boy, ' and s, by CLIP after boy and 's: the words are "boy" and "'s".

    Raises:
        TypeError, ValueError: as `pieces`.
    """
    pairs = zip(captions, tokenize_captions(source, captions), tokenize_captions(target, captions), strict=True)
    return [align(caption, first, second) for caption, first, second in pairs]


def align(caption: str, source: TokenizedCaption, target: TokenizedCaption) -> list[Word]:
    """One caption, cut by both tokenizers, as words that both agree to end."""
    shared = sorted(_word_ends(source) & _word_ends(target) | {len(caption)})
    sides = (defaultdict(list), defaultdict(list))
    starts = defaultdict(lambda: len(caption))
    for cut, words in zip((source, target), sides, strict=True):
        for piece, (start, end) in zip(cut.pieces, cut.spans, strict=True):
            word = bisect_left(shared, end)
            words[word].append(piece)
            starts[word] = min(starts[word], start)
    return [
        Word(caption[starts[word] : shared[word]].strip(), tuple(sides[0][word]), tuple(sides[1][word]))
        for word in sorted(starts)
    ]


def words_tokenized_differently(captions: Iterable[Iterable[Word]]) -> pd.DataFrame:
    """The words that two tokenizers cut differently, most frequent first.

    Args:
        captions: what `align_words` returns.
    Returns:
        columns word (lower-cased), source and target (pieces), count (occurrences), captions (that hold it).
    """
    occurrences, holders = Counter(), Counter()
    for words in captions:
        found = [(word.text.lower(), word.source, word.target) for word in words if not word.alike]
        occurrences.update(found)
        holders.update(set(found))
    ordered = sorted(occurrences, key=lambda word: (-occurrences[word], word))
    rows = [(*word, occurrences[word], holders[word]) for word in ordered]
    return pd.DataFrame(rows, columns=["word", "source", "target", "count", "captions"])


def tokenize_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[TokenizedCaption]:
    """Each caption cut by a tokenizer: no special tokens, nothing truncated or padded.

    Raises:
        TypeError, ValueError: as `pieces`.
    """
    if isinstance(captions, str):
        raise TypeError(f"expected a list of captions, got the one string {captions[:40]!r}: put it into a list")
    how = style(tokenizer)
    if not captions:
        return []
    batch = tokenizer(list(captions), add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [_cut(encoding, caption, how) for encoding, caption in zip(batch.encodings, captions, strict=True)]


def style(tokenizer: PreTrainedTokenizerBase) -> TokenizerStyle:
    """How this tokenizer marks words.

    Raises:
        ValueError: it is neither WordPiece, nor byte pairs with `</w>`, nor bytes with their spaces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(backend, "model", None)
    if type(model).__name__ == "WordPiece":
        return TokenizerStyle(continuation_prefix=model.continuing_subword_prefix)
    if getattr(model, "end_of_word_suffix", None) == END_OF_WORD:
        return TokenizerStyle(ends=END_OF_WORD)
    if type(model).__name__ == "BPE" and type(backend.pre_tokenizer).__name__ == "ByteLevel":
        return TokenizerStyle(spaced=True)
    raise ValueError(
        f"how {type(tokenizer).__name__}, with the model {type(model).__name__}, marks words is not known here: "
        "expected WordPiece (BLIP), byte pairs with </w> (CLIP) or byte-level BPE (OPT, GPT-2), as a fast tokenizer of "
        "transformers"
    )


def token_bytes(token: str, how: TokenizerStyle) -> bytes:
    """What a token stands for, its spaces included: `Ġgir` is b" gir", `gi` b" gi", `##raf` b"raf", `fe</w>` b"fe "."""
    if how.continuation_prefix:
        return (
            token.removeprefix(how.continuation_prefix).encode()
            if token.startswith(how.continuation_prefix)
            else b" " + token.encode()
        )
    text = token.removesuffix(how.ends)
    known = all(letter in _BYTE_OF for letter in text)
    plain = bytes(_BYTE_OF[letter] for letter in text) if known else text.encode()
    return plain + b" " * (how.ends != "" and token.endswith(how.ends))


def _cut(encoding, caption: str, how: TokenizerStyle) -> TokenizedCaption:
    words = encoding.word_ids
    ends = [*(here != following for here, following in zip(words, words[1:], strict=False)), True]
    texts = (_plain(token, how) for token in encoding.tokens)
    marked = tuple(text + END_OF_WORD if end else text for text, end in zip(texts, ends, strict=False))
    spans = encoding.offsets
    if how.spaced:  # GPT-2 counts the space before a word as the word's
        spans = [(end - len(caption[start:end].lstrip()), end) for start, end in spans]
    return TokenizedCaption(marked, tuple(encoding.ids), tuple(spans))


@lru_cache(maxsize=200_000)
def _plain(token: str, how: TokenizerStyle) -> str:
    """A token without its markers; bytes that are written as letters, as CLIP does, become text."""
    if how.in_bytes:
        return token_bytes(token, how).decode("utf-8", errors="backslashreplace").strip()
    return token.removeprefix(how.continuation_prefix)


def _word_ends(cut: TokenizedCaption) -> set[int]:
    """Letters behind which a word ends; of several pieces that end there (a letter cut into bytes) the last decides."""
    last = {end: piece for piece, (_, end) in zip(cut.pieces, cut.spans, strict=True)}
    return {end for end, piece in last.items() if piece.endswith(END_OF_WORD)}


_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands in the text for a piece that spells nothing
# Pieces bring their spaces along; a caption neither begins nor ends with one, and no two stand side by side.
_SPARE = re.compile(r"^ +| +$| +(?= )")
# What transformers' decoder tidies after WordPiece, which sets every punctuation mark apart: "dog ' s ." is "dog's."
_SUPERFLUOUS = re.compile(_SPARE.pattern + r"| (?=[.?!,])| (?=' )|(?<= ') ")


class Alignment(NamedTuple):
    """One caption on both sides.

    source, target: ids of its pieces, without special tokens; lands: for each source piece the place of the target
    piece that holds its first letter, −1 where no target piece does.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    lands: tuple[int, ...]


def align_texts(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[Alignment]:
    """Paths of captions that are known as text: teacher forcing. The target side is exactly the target's own reading.

    Raises:
        TypeError, ValueError: as `subwords.cuts`.
    """
    return [
        align_tokenized(first, second)
        for first, second in zip(tokenize_captions(source, texts), tokenize_captions(target, texts), strict=True)
    ]


def align_token_ids(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, ids: Iterable[Sequence[int]]
) -> list[Alignment]:
    """Paths of captions that are known as source pieces only: the argmax path. The text is what the pieces spell.

    Args:
        ids: rows without special tokens; a piece that spells nothing ([UNK], say) crosses as the target's own [UNK].
    """
    rows = [tuple(map(int, row)) for row in ids]
    how, special = style(source), set(source.all_special_ids)
    spelled = [_spell(source.convert_ids_to_tokens(list(row)), [id in special for id in row], how) for row in rows]
    read = tokenize_captions(target, [text for text, _ in spelled])
    return [
        align_tokenized(
            TokenizedCaption((), row, tuple((start, start) for start in starts)),
            _collapse(cut, text, target.unk_token_id),
        )
        for row, (text, starts), cut in zip(rows, spelled, read, strict=True)
    ]


def align_tokenized(source: TokenizedCaption, target: TokenizedCaption) -> Alignment:
    """The path of one caption that both tokenizers have cut."""
    starts = [start for start, _ in target.spans]
    return Alignment(source.ids, target.ids, tuple(_land(start, starts, target.spans) for start, _ in source.spans))


def _land(letter: int, starts: list[int], spans: Sequence[tuple[int, int]]) -> int:
    """Place of the first piece that holds a letter; several do where a letter is cut into bytes."""
    last = bisect_right(starts, letter) - 1
    if last < 0 or letter >= spans[last][1]:
        return -1
    return bisect_left(starts, starts[last])


def _spell(tokens: Sequence[str], special: Sequence[bool], how: TokenizerStyle) -> tuple[str, list[int]]:
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
    return _without(_SUPERFLUOUS if how.continuation_prefix else _SPARE, text, letters)


def _without(spaces: re.Pattern, text: str, letters: list[int]) -> tuple[str, list[int]]:
    """The text without those spaces; `letters` are places in it, moved with it."""
    gone = [place for match in spaces.finditer(text) for place in range(*match.span())]
    return spaces.sub("", text), [letter - bisect_left(gone, letter) for letter in letters]


def _collapse(cut: TokenizedCaption, text: str, unknown: int) -> TokenizedCaption:
    """All pieces of one _UNKNOWN become a single [UNK]."""
    kept = [
        (unknown if text[start] == _UNKNOWN else id, (start, end))
        for place, (id, (start, end)) in enumerate(zip(cut.ids, cut.spans, strict=True))
        if text[start] != _UNKNOWN or not place or cut.spans[place - 1] != (start, end)
    ]
    return TokenizedCaption((), tuple(id for id, _ in kept), tuple(span for _, span in kept))
