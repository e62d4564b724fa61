"""Word Mover's Distance: how far the words of one text must travel to become those of another (Kusner et al. 2015).

Each text is a bag of its words, all with the same weight. Moving weight from one word to another costs the distance of
their vectors, and the distance of two texts is the least cost of moving the whole bag. Lower is more alike. Vectors
have length 1, so a distance lies in [0, 2]. POT solves the optimal transport.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import ot
from transformers import AutoModel, AutoTokenizer

from dalleflamingo import registry
from dalleflamingo.registry import check_weights, loading

FARTHEST = 2.0  # the diameter of vectors of length 1; the distance to a text without a known word
_LONGEST = 2**20  # bytes of a line; a file without line ends is not read whole to find that out
_LARGEST = float(np.finfo(np.float32).max)
_REMEDY = "Is it GloVe's text format, unpacked, and was it downloaded whole? Unset DALLEFLAMINGO_GLOVE for SBERT's"


class WordVectors:
    """Static word vectors.

    Args:
        name: which vectors; distances by different ones do not compare.
        vector: word -> (D,) vector, or None for an unknown word.
        digest: of the file that holds them; "" where the name says all.
    """

    def __init__(self, name: str, vector: Callable[[str], np.ndarray | None], digest: str = ""):
        self.name, self.digest = name, digest
        self._vector = cache(lambda word: _unit(vector(word)))
        self._distance = cache(self._transport)

    @classmethod
    def at_hand(cls) -> "WordVectors":
        """GloVe where `DALLEFLAMINGO_GLOVE` names its file, else `of_sbert`; errors as theirs."""
        file = os.environ.get("DALLEFLAMINGO_GLOVE")
        if file:
            return cls.glove(os.path.expanduser(file))
        return cls.of_sbert(registry.locate("sbert"), registry.ENTRIES["sbert"].revision)

    @classmethod
    def glove(cls, file: str | Path) -> "WordVectors":
        """GloVe as published (the paper: 200 numbers, glove.6B.200d.txt), see `read_glove`; errors as there."""
        table, digest = read_glove(Path(file))
        return cls(f"GloVe-{len(next(iter(table.values())))}", table.get, digest)

    @classmethod
    def of_sbert(cls, folder: str | Path, revision: str | None = None) -> "WordVectors":
        """SBERT's own token embeddings, the stand-in where GloVe is missing: a word is the mean of its tokens.

        Args:
            folder: of the model, or its hub id.
            revision: of the hub; None for a folder.
        Raises:
            RegistryError: the folder's weights are missing or cut short.
        """
        where = {} if revision is None else {"revision": revision}
        with loading(folder):
            model = AutoModel.from_pretrained(check_weights(folder), use_safetensors=True, **where)
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        table = model.get_input_embeddings().weight.detach().float().numpy()
        table = table - table.mean(axis=0)  # the common part would make all words seem alike

        def vector(word: str) -> np.ndarray | None:
            ids = [i for i in tokenizer(word, add_special_tokens=False).input_ids if i != tokenizer.unk_token_id]
            return table[ids].mean(axis=0) if ids else None

        return cls("SBERT's word embeddings, centred", vector)

    def distance(self, a: str, b: str) -> float:
        """Word Mover's Distance of two texts with single spaces between their words, in [0, 2].

        Words without a vector are left out; a text without any known word has distance 2 to all others.
        """
        return self._distance(*sorted((a, b)))

    def _transport(self, a: str, b: str) -> float:
        first, second = self._bag(a.split()), self._bag(b.split())
        if not first or not second:
            return 0.0 if a == b else FARTHEST
        costs = np.linalg.norm(np.stack([*first])[:, None] - np.stack([*second])[None], axis=-1)
        return float(ot.emd2(np.ones(len(first)) / len(first), np.ones(len(second)) / len(second), costs))

    def _bag(self, words: Iterable[str]) -> list[np.ndarray]:
        return [vector for word in words if (vector := self._vector(word)) is not None]


def read_glove(file: Path) -> tuple[dict[str, np.ndarray], str]:
    """Word vectors in GloVe's text format: "word number number …" on each line, in UTF-8.

    A word may contain spaces, as some of glove.840B.300d.txt do. Of a word that occurs twice the first vector counts,
    that of the more frequent spelling. A first line "words numbers", as word2vec has it, is checked against the rest.

    Returns:
        word -> (D,) vector, and the file's sha256.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, cut short or of another format; the message names the line.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file}: have DALLEFLAMINGO_GLOVE name GloVe's text file, or unset it for SBERT's "
            "embeddings"
        )
    table, width, header, digest, number = {}, None, None, hashlib.sha256(), 0
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST), b""), start=1):
            digest.update(line)
            try:
                text = _decode(line, "utf-8" if number > 1 else "utf-8-sig")
                if number == 1 and (header := re.fullmatch(r"([0-9]+) ([0-9]+)", text)):
                    continue
                width = width or _count_numbers(text)
                word, vector = _split(text, width)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}. {_REMEDY}") from error
            table.setdefault(word, vector)
    found = (number - bool(header), width)
    if not table:
        raise ValueError(f"{file} holds no word vectors, in {file.stat().st_size:,} bytes. {_REMEDY}")
    if header and found != (promised := tuple(map(int, header.groups()))):
        raise ValueError(
            f"{file} holds {found[0]:,} words of {found[1]} numbers, but its first line says {promised[0]:,} words of "
            f"{promised[1]}. {_REMEDY}"
        )
    return table, digest.hexdigest()


def _decode(line: bytes, encoding: str) -> str:
    if not line.endswith(b"\n"):
        raise ValueError(f"{len(line):,} bytes without a line end behind them (if the file is whole, add one)")
    if b"\0" in line:
        raise ValueError("NUL bytes in it")
    try:
        return line.decode(encoding).rstrip("\r\n ")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {line[error.start]:#04x} is not UTF-8") from error


def _count_numbers(text: str) -> int:
    """How many numbers end a line that begins with a word, which may be a number itself."""
    behind = text.split(" ")[1:]
    count = next((i for i, part in enumerate(reversed(behind)) if not _is_number(part)), len(behind))
    if count < 2:
        raise ValueError(f"{count} numbers behind {text[:40]!r}, where a vector has 2 or more")
    return count


def _split(text: str, width: int) -> tuple[str, np.ndarray]:
    """The word of a line and its (width,) vector."""
    word, *numbers = text.rsplit(" ", width)
    last = word.rpartition(" ")
    try:
        with np.errstate(over="ignore"):
            vector = np.array(numbers, dtype=np.float32)
    except ValueError:
        vector = np.array([np.nan])
    if len(numbers) < width or not np.isfinite(vector).all() or (last[0] and _is_number(last[2])):
        word, count = text.split(" ")[0], sum(map(_is_number, text.split(" ")[1:]))
        raise ValueError(f"{count} numbers behind {word[:40]!r} where the first line has {width}")
    return word, vector


def _is_number(text: str) -> bool:
    """Whether float32 has it."""
    try:
        return abs(float(text)) <= _LARGEST
    except ValueError:
        return False


def _unit(vector: np.ndarray | None) -> np.ndarray | None:
    if vector is None or not (length := np.linalg.norm(vector)):
        return None
    return vector / length
