"""Word Mover's Distance: how far the words of one text must travel to become those of another (Kusner et al. 2015).

Each text is a bag of its words, all with the same weight. Moving weight from one word to another costs the distance of
their vectors, and the distance of two texts is the least cost of moving the whole bag. Lower is more alike. Vectors
have length 1, so a distance lies in [0, 2]. POT solves the optimal transport.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import ot
from transformers import AutoModel, AutoTokenizer

from dalleflamingo import registry
from dalleflamingo.registry import check_weights, loading

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
        """GloVe as published, "word number number …" on each line (the paper: 200 numbers, glove.6B.200d.txt).

        Args:
            file: in UTF-8.
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


def _unit(vector: np.ndarray | None) -> np.ndarray | None:
    if vector is None or not (length := np.linalg.norm(vector)):
        return None
    return vector / length
