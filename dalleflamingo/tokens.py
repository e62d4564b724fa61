"""Captions as tokens, and which tokens of two tokenizers belong together (App. G).

Captioner and generator tokenize the same caption differently. BLIP has WordPiece (`gi ##raf ##fe`: `##` continues a
word), Stable Diffusion has CLIP's byte pairs (`giraffe</w>`: `</w>` ends a word), and BLIP-2 has OPT's byte-level BPE
(`Ġgir affe`: `Ġ` is the space before a word). Here all tokens are written as CLIP writes them, so that they can be
compared as strings.

A caption is *aligned* through its text. Both tokenizers report which characters each token covers. A source token
belongs to the target token that holds its first character: `gi`, `##raf` and `##fe` all belong to `giraffe</w>`. The
source token `10` belongs to the target token `1</w>`, and no source token belongs to `0</w>`, which follows it.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from open_clip.tokenizer import bytes_to_unicode
from transformers import PreTrainedTokenizerBase as Tokenizer

END_OF_WORD = "</w>"
# byte-level vocabularies write bytes as letters
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}


class TokenizerStyle(NamedTuple):
    """How a tokenizer marks words. One of the three is set.

    Attributes:
        continuation_prefix: begins every token that continues a word, `##` in WordPiece.
        end_of_word: ends every token that ends a word, `</w>` in CLIP's vocabulary.
        byte_level: a word's first token begins with the space before the word, as in OPT and GPT-2.
    """

    continuation_prefix: str = ""
    end_of_word: str = ""
    byte_level: bool = False


def tokenizer_style(tokenizer: Tokenizer) -> TokenizerStyle:
    """How a fast tokenizer of transformers marks words.

    Raises:
        ValueError: it is neither WordPiece, nor byte pairs with `</w>`, nor byte-level BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(backend, "model", None)
    if type(model).__name__ == "WordPiece":
        return TokenizerStyle(continuation_prefix=model.continuing_subword_prefix)
    if getattr(model, "end_of_word_suffix", None) == END_OF_WORD:
        return TokenizerStyle(end_of_word=END_OF_WORD)
    if type(model).__name__ == "BPE" and type(backend.pre_tokenizer).__name__ == "ByteLevel":
        return TokenizerStyle(byte_level=True)
    raise ValueError(
        f"how {type(tokenizer).__name__}, with the model {type(model).__name__}, marks words is not known here: "
        "expected WordPiece (BLIP), byte pairs with </w> (CLIP) or byte-level BPE (OPT, GPT-2), as a fast tokenizer of "
        "transformers"
    )


def check_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    """Refuse a tokenizer that lacks most of its model's `size` tokens.

    Raises:
        FileNotFoundError: it does; transformers makes an empty one where a download left its files out.
    """
    if len(tokenizer) < size // 2:
        raise FileNotFoundError(f"the tokenizer has {len(tokenizer)} of the model's {size} tokens: files are missing")


def token_bytes(token: str, style: TokenizerStyle) -> bytes:
    """The bytes that a token adds to a text, by its tokenizer's style, spaces included.

    `Ġgir` adds b" gir", `gi` b" gi", `##raf` b"raf" and `fe</w>` b"fe ".
    """
    if style.continuation_prefix:
        continues = token.startswith(style.continuation_prefix)
        return token.removeprefix(style.continuation_prefix).encode() if continues else b" " + token.encode()
    letters = token.removesuffix(style.end_of_word)
    known = all(letter in _BYTE_OF for letter in letters)
    written = bytes(_BYTE_OF[letter] for letter in letters) if known else letters.encode()
    return written + b" " if style.end_of_word and token.endswith(style.end_of_word) else written


class TokenizedCaption(NamedTuple):
    """A caption of T tokens.

    Attributes:
        tokens: as CLIP writes them: `</w>` behind each that ends a word, and no other mark.
        ids: of the tokens in the tokenizer's vocabulary.
        spans: each token's (start, end) in the caption, in characters.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def check_caption(caption: str, count: Callable[[str], int], positions: int) -> None:
    """Refuse a caption that a model could not read as a whole.

    Args:
        caption: a text.
        count: of a caption's tokens, with the special ones and the prompt that are read with it.
        positions: entries of the model's position table.
    Raises:
        ValueError: half of a surrogate pair, which is no character, or more tokens than positions.
    """
    try:
        size = len(caption.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is half of a surrogate pair: write the caption again") from None
    # a token has a byte or more, and no prompt fills half a table: short captions need not be counted
    if 2 * size > positions and (tokens := count(caption)) > positions:
        raise ValueError(f"it has {tokens} tokens and the model reads {positions}: shorten the caption")


def tokenize_captions(tokenizer: Tokenizer, captions: Sequence[str]) -> list[TokenizedCaption]:
    r"""Captions as tokens, without special tokens, truncation and padding, whatever the tokenizer is set to.

    Bytes are decoded: CLIP's token `âĢĵ</w>` becomes `–</w>`. A token that is only a part of a character shows its
    bytes, such as `\xe2`.

    Raises:
        TypeError: `captions` is one string.
        ValueError: as `tokenizer_style`.
    """
    if isinstance(captions, str):
        raise TypeError(f"expected a list of captions, got the one string {captions[:40]!r}: put it into a list")
    style = tokenizer_style(tokenizer)
    if not captions:
        return []
    batch = tokenizer(list(captions), add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [_tokenized(encoding, caption, style) for encoding, caption in zip(batch.encodings, captions, strict=True)]


def _tokenized(encoding, caption: str, style: TokenizerStyle) -> TokenizedCaption:
    ends_word = [*(word != following for word, following in pairwise(encoding.word_ids)), True]
    texts = (_without_marks(token, style) for token in encoding.tokens)
    tokens = tuple(text + END_OF_WORD if ends else text for text, ends in zip(texts, ends_word, strict=False))
    spans = encoding.offsets
    if style.byte_level:  # counts the space before a word as a part of the word
        spans = [(end - len(caption[start:end].lstrip()), end) for start, end in spans]
    return TokenizedCaption(tokens, tuple(encoding.ids), tuple(spans))


@lru_cache(maxsize=200_000)
def _without_marks(token: str, style: TokenizerStyle) -> str:
    if style.continuation_prefix:
        return token.removeprefix(style.continuation_prefix)
    return token_bytes(token, style).decode("utf-8", errors="backslashreplace").strip()


class Alignment(NamedTuple):
    """The tokens of one caption in both vocabularies.

    Attributes:
        source: (T,) ids, without special tokens.
        target: (T',) ids, without special tokens.
        target_positions: (T,) for each source token the position of the target token that holds its first character,
            −1 where none does.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    target_positions: tuple[int, ...]


def align_texts(source: Tokenizer, target: Tokenizer, texts: Sequence[str]) -> list[Alignment]:
    """Aligns captions that are known as texts, as in teacher forcing, between two tokenizers.

    Raises:
        TypeError, ValueError: as `tokenize_captions`.
    """
    pairs = zip(tokenize_captions(source, texts), tokenize_captions(target, texts), strict=True)
    return [align_tokenized(*pair) for pair in pairs]


def align_token_ids(source: Tokenizer, target: Tokenizer, ids: Iterable[Sequence[int]]) -> list[Alignment]:
    """Aligns captions that are known as source tokens only, as the captioner's argmax: the tokens spell the text.

    Args:
        source: the tokenizer of the ids.
        target: the other tokenizer.
        ids: rows of tokens, without [SEP] and padding. A special token, such as [UNK], spells nothing; it becomes the
            target's [UNK].
    Raises:
        ValueError: as `tokenizer_style`.
    """
    rows = [tuple(map(int, row)) for row in ids]
    style, special = tokenizer_style(source), set(source.all_special_ids)
    parts = {id: token_bytes(source.convert_ids_to_tokens(id), style) for id in {id for row in rows for id in row}}
    parts |= dict.fromkeys(special, f" {_UNKNOWN} ".encode())
    spare = _SPARE_AT_PUNCTUATION if style.continuation_prefix else _SPARE
    spelled = [_spell([parts[id] for id in row], spare) for row in rows]
    target_captions = tokenize_captions(target, [text for text, _ in spelled])
    return [
        align_tokenized(
            TokenizedCaption((), row, tuple((start, start) for start in starts)),
            _with_unknown(caption, text, target.unk_token_id),
        )
        for row, (text, starts), caption in zip(rows, spelled, target_captions, strict=True)
    ]


def align_tokenized(source: TokenizedCaption, target: TokenizedCaption) -> Alignment:
    """Aligns one caption, given as both tokenizers tokenize it."""
    starts = [start for start, _ in target.spans]
    positions = (_position_at(start, starts, target.spans) for start, _ in source.spans)
    return Alignment(source.ids, target.ids, tuple(positions))


def _position_at(character: int, starts: list[int], spans: Sequence[tuple[int, int]]) -> int:
    """Position of the token that holds a character; of several, each with some of its bytes, the first."""
    last = bisect_right(starts, character) - 1
    if last < 0 or character >= spans[last][1]:
        return -1
    return bisect_left(starts, starts[last])


_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # in a text, where a token spells nothing
# Tokens add spaces, but a caption neither begins nor ends with one, and has no two in a row.
_SPARE = re.compile(r"^ +| +$| +(?= )")
# WordPiece separates every punctuation mark; transformers' decoder cleans up "dog ' s ." to "dog's.", and so do we.
_SPARE_AT_PUNCTUATION = re.compile(_SPARE.pattern + r"| (?=[.?!,])| (?=' )|(?<= ') ")


def _spell(parts: Sequence[bytes], spare: re.Pattern) -> tuple[str, list[int]]:
    """The text that the bytes of tokens spell, and the character at which each token begins, behind its space."""
    text = b"".join(parts).decode("utf-8", errors="surrogateescape")
    character_ends = list(accumulate(len(character.encode("utf-8", errors="surrogateescape")) for character in text))
    part_starts = accumulate(map(len, parts), initial=0)
    first_bytes = (start + len(part) - len(part.lstrip()) for start, part in zip(part_starts, parts, strict=False))
    characters = [bisect_right(character_ends, byte) for byte in first_bytes]
    text = "".join(_UNKNOWN if "\ud800" <= character <= "\udfff" else character for character in text)
    removed = [position for match in spare.finditer(text) for position in range(*match.span())]
    return spare.sub("", text), [character - bisect_left(removed, character) for character in characters]


def _with_unknown(caption: TokenizedCaption, text: str, unknown_id: int) -> TokenizedCaption:
    """The caption with one [UNK] for all tokens that together are one _UNKNOWN of the text."""
    kept = [
        (unknown_id if text[start] == _UNKNOWN else id, (start, end))
        for position, (id, (start, end)) in enumerate(zip(caption.ids, caption.spans, strict=True))
        if text[start] != _UNKNOWN or not position or caption.spans[position - 1] != (start, end)
    ]
    return TokenizedCaption((), tuple(id for id, _ in kept), tuple(span for _, span in kept))
