"""Two vocabularies, one caption: where captioner and generator cut the same text differently (App. G).

BLIP reads WordPiece (`gi ##raf ##fe`: `##` goes on with a word), Stable Diffusion CLIP's byte pairs (`giraffe</w>`:
`</w>` ends a word), BLIP-2's OPT bytes with their spaces (`Ġgir affe`: `Ġ` is the space before a word). All are brought
to one notation, CLIP's, so that pieces can be compared as strings, and captions are cut at the places where both sides
end a word, so that what differs can be named word by word.
"""

import gzip
import importlib.util
import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
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


class Cut(NamedTuple):
    """A caption cut by one tokenizer: pieces in the common notation, their ids, each one's (start, end) in letters."""

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Style(NamedTuple):
    """How a tokenizer marks words; of `goes_on` (prefix), `ends` (suffix) and `spaced` (a space's byte) one is set."""

    goes_on: str = ""
    ends: str = ""
    spaced: bool = False

    @property
    def in_bytes(self) -> bool:
        return bool(self.ends) or self.spaced


def wordpiece_vocabulary() -> PreTrainedTokenizerBase:
    """BERT's uncased WordPiece, 30,522 pieces: BLIP's own vocabulary but for its two extra special tokens.

    It is also SBERT's, which the extra `course` installs, so that it is there without a network.
    """
    return AutoTokenizer.from_pretrained(registry.locate("sbert"), revision=registry.ENTRIES["sbert"].revision)


def clip_vocabulary() -> PreTrainedTokenizerBase:
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
    return [cut.pieces for cut in cuts(tokenizer, captions)]


def spelled(caption_pieces: Sequence[str]) -> str:
    """The text that pieces spell, a space after every word: `("gi", "raf", "fe</w>", "'</w>")` is "giraffe '"."""
    return "".join(caption_pieces).replace(END_OF_WORD, " ").rstrip()


def same_pieces(source: Sequence[tuple[str, ...]], target: Sequence[tuple[str, ...]]) -> Interval:
    """Share of captions that fall into the same pieces, as sequences, with Wilson's interval (claim 13).

    Args:
        source, target: what `pieces` returns for the same captions and two tokenizers.
    Raises:
        ValueError: not as many on one side as on the other, or none.
    """
    if len(source) != len(target):
        raise ValueError(f"{len(source)} captions against {len(target)}: give the pieces of the same captions")
    return proportion(sum(map(tuple.__eq__, source, target)), len(source))


def aligned_words(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, captions: Sequence[str]
) -> list[list[Word]]:
    """Each caption as words that both tokenizers agree to end; their pieces, one after the other, are `pieces`.

    "boy's" is cut by WordPiece after boy, ' and s, by CLIP after boy and 's: the words are "boy" and "'s".

    Raises:
        TypeError, ValueError: as `pieces`.
    """
    pairs = zip(captions, cuts(source, captions), cuts(target, captions), strict=True)
    return [align(caption, first, second) for caption, first, second in pairs]


def align(caption: str, source: Cut, target: Cut) -> list[Word]:
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


def split_differently(captions: Iterable[Iterable[Word]]) -> pd.DataFrame:
    """The words that two tokenizers cut differently, most frequent first.

    Args:
        captions: what `aligned_words` returns.
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


def cuts(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> list[Cut]:
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


def style(tokenizer: PreTrainedTokenizerBase) -> Style:
    """How this tokenizer marks words.

    Raises:
        ValueError: it is neither WordPiece, nor byte pairs with `</w>`, nor bytes with their spaces.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(backend, "model", None)
    if type(model).__name__ == "WordPiece":
        return Style(goes_on=model.continuing_subword_prefix)
    if getattr(model, "end_of_word_suffix", None) == END_OF_WORD:
        return Style(ends=END_OF_WORD)
    if type(model).__name__ == "BPE" and type(backend.pre_tokenizer).__name__ == "ByteLevel":
        return Style(spaced=True)
    raise ValueError(
        f"how {type(tokenizer).__name__}, with the model {type(model).__name__}, marks words is not known here: "
        "expected WordPiece (BLIP), byte pairs with </w> (CLIP) or byte-level BPE (OPT, GPT-2), as a fast tokenizer of "
        "transformers"
    )


def token_bytes(token: str, how: Style) -> bytes:
    """What a token stands for, its spaces included: `Ġgir` is b" gir", `gi` b" gi", `##raf` b"raf", `fe</w>` b"fe "."""
    if how.goes_on:
        return token.removeprefix(how.goes_on).encode() if token.startswith(how.goes_on) else b" " + token.encode()
    text = token.removesuffix(how.ends)
    known = all(letter in _BYTE_OF for letter in text)
    plain = bytes(_BYTE_OF[letter] for letter in text) if known else text.encode()
    return plain + b" " * (how.ends != "" and token.endswith(how.ends))


def _cut(encoding, caption: str, how: Style) -> Cut:
    words = encoding.word_ids
    ends = [*(here != following for here, following in zip(words, words[1:], strict=False)), True]
    texts = (_plain(token, how) for token in encoding.tokens)
    marked = tuple(text + END_OF_WORD if end else text for text, end in zip(texts, ends, strict=False))
    spans = encoding.offsets
    if how.spaced:  # GPT-2 counts the space before a word as the word's
        spans = [(end - len(caption[start:end].lstrip()), end) for start, end in spans]
    return Cut(marked, tuple(encoding.ids), tuple(spans))


@lru_cache(maxsize=200_000)
def _plain(token: str, how: Style) -> str:
    """A token without its markers; bytes that are written as letters, as CLIP does, become text."""
    if how.in_bytes:
        return token_bytes(token, how).decode("utf-8", errors="backslashreplace").strip()
    return token.removeprefix(how.goes_on)


def _word_ends(cut: Cut) -> set[int]:
    """Letters behind which a word ends; of several pieces that end there (a letter cut into bytes) the last decides."""
    last = {end: piece for piece, (_, end) in zip(cut.pieces, cut.spans, strict=True)}
    return {end for end, piece in last.items() if piece.endswith(END_OF_WORD)}
