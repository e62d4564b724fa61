"""Word Mover's Distance: how far the words of one text must travel to become those of another (Kusner et al. 2015).

Each text is a heap of its words, in equal shares; moving a share from one word to another costs the distance of the two
words' vectors, and the distance of the texts is the least cost of moving the whole heap. Lower is more alike. Vectors
have length 1, so that a distance lies in [0, 2]; it is POT that solves the transport.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import ot
from transformers import AutoModel, AutoTokenizer

from dalleflamingo import registry
from dalleflamingo.registry import check_weights

FARTHEST = 2.0  # the diameter of vectors of length 1; the distance to a text without a known word


class WordVectors:
    """Static word vectors.

    Args:
        name: which vectors; distances by different ones do not compare.
        vector: word -> (D,) vector, or None for an unknown word.
    """

    def __init__(self, name: str, vector: Callable[[str], np.ndarray | None]):
        self.name = name
        self._vector = cache(lambda word: _unit(vector(word)))
        self._distance = cache(self._transport)

    @classmethod
    def at_hand(cls) -> "WordVectors":
        """GloVe where `DALLEFLAMINGO_GLOVE` names its file, else `of_sbert`; errors as theirs."""
        file = os.environ.get("DALLEFLAMINGO_GLOVE")
        if file:
            return cls.glove(Path(file).expanduser())
        return cls.of_sbert(registry.locate("sbert"), registry.ENTRIES["sbert"].revision)

    @classmethod
    def glove(cls, file: str | Path) -> "WordVectors":
        """GloVe as published, "word number number …" a line (the paper: 200 numbers, glove.6B.200d.txt).

        Raises:
            FileNotFoundError: there is no such file. ValueError: a line that is not of that form.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"there is no {file}: have DALLEFLAMINGO_GLOVE name GloVe's text file, or unset it for SBERT's "
                "embeddings"
            )
        table: dict[str, np.ndarray] = {}
        width = None
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                word, *numbers = line.rstrip().split(" ")
                width = width or len(numbers)
                if len(numbers) != width or not numbers:
                    raise ValueError(
                        f"{file}, line {number}: {len(numbers)} numbers behind {word!r} where the first line has "
                        f"{width}: is it GloVe's text format, and was it downloaded whole?"
                    )
                table[word] = np.array(numbers, dtype=np.float32)
        return cls(f"GloVe-{width}", table.get)

    @classmethod
    def of_sbert(cls, folder: str | Path, revision: str | None = None) -> "WordVectors":
        """SBERT's own word embeddings, the stand-in where GloVe is not at hand: a word is the mean of its WordPieces.

        Raises:
            RegistryError: the folder's weights are missing or cut short.
        """
        where = {} if revision is None else {"revision": revision}
        model = AutoModel.from_pretrained(check_weights(folder), use_safetensors=True, **where)
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        table = model.get_input_embeddings().weight.detach().float().numpy()
        table = table - table.mean(axis=0)  # what all have in common tells no two apart

        def vector(word: str) -> np.ndarray | None:
            ids = [i for i in tokenizer(word, add_special_tokens=False).input_ids if i != tokenizer.unk_token_id]
            return table[ids].mean(axis=0) if ids else None

        return cls("SBERT's word embeddings, centred", vector)

    def distance(self, a: str, b: str) -> float:
        """Word Mover's Distance of two texts whose words stand between single spaces, in [0, 2].

        Words without a vector are passed over; a text without any known word is 2 away from all others.
        """
        return self._distance(*sorted((a, b)))

    def _transport(self, a: str, b: str) -> float:
        first, second = self._heap(a.split()), self._heap(b.split())
        if not first or not second:
            return 0.0 if a == b else FARTHEST
        costs = np.linalg.norm(np.stack([*first])[:, None] - np.stack([*second])[None], axis=-1)
        return float(ot.emd2(np.ones(len(first)) / len(first), np.ones(len(second)) / len(second), costs))

    def _heap(self, words: Iterable[str]) -> list[np.ndarray]:
        return [vector for word in words if (vector := self._vector(word)) is not None]


def _unit(vector: np.ndarray | None) -> np.ndarray | None:
    if vector is None or not (length := np.linalg.norm(vector)):
        return None
    return vector / length
