"""BLEU and CIDEr of many candidates of an image, and of any resample of a corpus.

pycocoevalcap scores one caption per image and starts from the words each time. Here the n-grams are counted once. What
remains is sums of counts, so another candidate of an image, or a bootstrap resample of a corpus, costs milliseconds.
The values are those of pycocoevalcap.
"""

import warnings
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array

from dalleflamingo.evaluation.caption_tokenizer import check_captions, default_tokenizer, tokenize

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of CIDEr's penalty on a difference in length, in words
_TINY, _SMALL = 1e-15, 1e-9  # keep BLEU's quotients defined, and are part of the published numbers


class Cider:
    """CIDEr (Vedantam et al. 2015; with the clipping and length penalty of the COCO server) under fixed idf weights.

    The weight of an n-gram is count × idf, with idf = log(images) − log(images whose references contain it). So the
    score of a candidate depends on its words and on the reference corpus, not on the other candidates.

    Args:
        references: image id -> human captions.
        idf_of: the corpus that says how rare an n-gram is; None: `references` themselves, as usual.
    Raises:
        ValueError: an image without references. TypeError: a caption that is not a string.
    """

    def __init__(self, references: Mapping[Hashable, Sequence[str]], idf_of: "Cider | None" = None):
        self.tokenizer = idf_of.tokenizer if idf_of else default_tokenizer()
        self.references = _counted(references, self.tokenizer)
        if idf_of:
            self.images, self.frequency = idf_of.images, idf_of.frequency
        else:
            self.images = len(self.references)
            self.frequency = Counter(gram for captions in self.references.values() for gram in set().union(*captions))
        warn_if_alone(self.images)

    def score(self, image_ids: Sequence[Hashable], captions: Sequence[str]) -> np.ndarray:
        """CIDEr of each caption against the references of its image: (N,) in [0, 10]; arguments, errors as `table`."""
        return self.table(image_ids, captions).scores()

    def table(self, image_ids: Sequence[Hashable], captions: Sequence[str]) -> "CiderTable":
        """Count the n-grams of N candidates, to score them under other weights as well.

        Args:
            image_ids: N, of the candidates' images.
            captions: N.
        Raises:
            ValueError: lengths differ, there are none, or an image has no references here.
            TypeError: a caption that is not a string.
        """
        _check_candidates(image_ids, captions, self.references)
        return CiderTable(self, image_ids, captions)


class CiderTable:
    """N candidates and their images' references as sparse counts.

    The cosine of two tf-idf vectors is a sum over n-grams of counts × idf², so a few sparse products give every score
    under any idf. A caption that several candidates of an image share is scored once. Shapes: N candidates, D distinct
    ones, R references, I images, P pairs of distinct candidate and reference, V n-grams.
    """

    def __init__(self, scorer: Cider, image_ids: Sequence[Hashable], captions: Sequence[str]):
        pairs = list(zip(image_ids, captions, strict=True))
        distinct = {pair: row for row, pair in enumerate(dict.fromkeys(pairs))}
        self._row = np.array([distinct[pair] for pair in pairs])  # (N,) of each candidate among the distinct ones
        candidates = _counted_candidates([caption for _, caption in distinct], scorer.tokenizer)

        images = list(dict.fromkeys(image_ids))
        number = {image: row for row, image in enumerate(images)}
        references = [caption for image in images for caption in scorer.references[image]]
        per_image = np.array([len(scorer.references[image]) for image in images])
        end = np.cumsum(per_image)  # of each image's references
        image_of = np.array([number[image] for image, _ in distinct])  # (D,)
        self._image = image_of[self._row]  # (N,)
        self._count = per_image[image_of]  # (D,) how many references a candidate is compared with
        self._candidate = np.repeat(np.arange(len(candidates)), self._count)  # (P,) among the distinct ones
        self._reference = np.concatenate([np.arange(end[i] - per_image[i], end[i]) for i in image_of])  # (P,)

        columns = {gram: i for i, gram in enumerate(dict.fromkeys(_grams(candidates + references)))}
        self._own = _matrix((_product(caption, caption) for caption in candidates), columns)  # (4 D, V)
        self._gold = _matrix((_product(caption, caption) for caption in references), columns)  # (4 R, V)
        compared = zip(self._candidate, self._reference, strict=True)
        self._shared = _matrix((_product(candidates[i], references[j]) for i, j in compared), columns)  # (4 P, V)
        self._held = _matrix((dict.fromkeys(_grams(scorer.references[i]), 1) for i in images), columns)  # (4 I, V)
        self._idf = np.log(scorer.images) - np.log([max(1, scorer.frequency[gram]) for gram in columns])  # (V,)
        words = np.array([_length(caption) for caption in candidates])[self._candidate]
        gap = words - np.array([_length(caption) for caption in references])[self._reference]
        self._penalty = np.exp(-(gap**2) / (2 * SIGMA**2))  # (P,)

    def scores(self) -> np.ndarray:
        """CIDEr of each candidate under the scorer's own idf: (N,) in [0, 10]."""
        return self._scores(self._idf)

    def corpus(self, rows: np.ndarray) -> np.ndarray:
        """CIDEr of corpora with one candidate per image, each with the idf of its own images.

        Args:
            rows: (..., n) positions of candidates; an image may come more than once, as in a bootstrap. All leading
                positions must name the same images in the same order.
        Returns:
            (...,) corpus values in [0, 10].
        Raises:
            ValueError: if the corpora are not of the same images.
        """
        image = self._image[rows]
        drawn = image.reshape(-1, image.shape[-1])[0]
        if not (image == drawn).all():
            raise ValueError("the corpora hold different images: each row of positions needs one candidate of each")
        times = np.bincount(drawn, minlength=self._image.max() + 1)
        frequency = self._held.T @ np.repeat(times, ORDERS)
        idf = np.log(len(drawn)) - np.log(np.maximum(1, frequency))
        return self._scores(idf)[rows].mean(axis=-1)

    def _scores(self, idf: np.ndarray) -> np.ndarray:
        weight = idf**2
        own, gold, shared = ((matrix @ weight).reshape(-1, ORDERS) for matrix in (self._own, self._gold, self._shared))
        norms = np.sqrt(own[self._candidate] * gold[self._reference])  # (P, 4)
        cosine = np.divide(shared, norms, out=np.zeros_like(shared), where=norms > 0).mean(axis=1)
        return (10 * np.bincount(self._candidate, cosine * self._penalty) / self._count)[self._row]


class BleuTable:
    """The counts of N candidates that BLEU is made of; errors as `Cider.table`.

    Args:
        references: image id -> human captions.
        image_ids: N, of the candidates' images.
        captions: N.
    Attributes:
        statistics: (N, 10) words, words of the reference closest in length, n-grams of each order, and how many of
            them are in a reference. BLEU of a corpus is a function of their sums.
    """

    def __init__(
        self, references: Mapping[Hashable, Sequence[str]], image_ids: Sequence[Hashable], captions: Sequence[str]
    ):
        self.tokenizer = default_tokenizer()
        counted = _counted(references, self.tokenizer)
        _check_candidates(image_ids, captions, counted)
        candidates = _counted_candidates(captions, self.tokenizer)
        self.statistics = np.array([_bleu_counts(c, counted[i]) for i, c in zip(image_ids, candidates, strict=True)])

    def scores(self) -> np.ndarray:
        """BLEU-1 to BLEU-4 of each candidate alone: (N, 4)."""
        return _bleu(self.statistics)

    def corpus(self, rows: np.ndarray) -> np.ndarray:
        """BLEU-1 to BLEU-4 of corpora of candidates at positions (..., n): (..., 4) in [0, 1]."""
        return _bleu(self.statistics[rows].sum(axis=-2))


def _bleu_counts(candidate: Counter, references: list[Counter]) -> list[int]:
    words = _length(candidate)
    closest = min((abs(_length(reference) - words), _length(reference)) for reference in references)[1]
    clip = Counter()
    for reference in references:
        clip |= reference  # the most that any one reference holds
    right = [0] * ORDERS
    for gram, n in candidate.items():
        right[len(gram) - 1] += min(n, clip[gram])
    return [words, closest, *(max(0, words - order) for order in range(ORDERS)), *right]


def _bleu(statistics: np.ndarray) -> np.ndarray:
    words, closest = statistics[..., :1], statistics[..., 1:2]
    guessed, right = statistics[..., 2 : 2 + ORDERS], statistics[..., 2 + ORDERS :]
    precision = np.cumprod((right + _TINY) / (guessed + _SMALL), axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (words + _TINY) / (closest + _SMALL)
    return precision * np.exp(np.minimum(0, 1 - 1 / ratio))  # brevity penalty


def _counted(references: Mapping[Hashable, Sequence[str]], tokenizer: str) -> dict[Hashable, list[Counter]]:
    if not references:
        raise ValueError("there are no references: give image id -> human captions for at least one image")
    return {i: [_ngrams(text) for text in texts] for i, texts in tokenize(references, tokenizer).items()}


def refuse_unknown(image_ids: Iterable[Hashable], references: Mapping[Hashable, object]) -> None:
    """Raise a ValueError that names the images without references."""
    if unknown := [i for i in dict.fromkeys(image_ids) if i not in references]:
        raise ValueError(
            f"no references for {len(unknown)} of the images, such as {unknown[:5]}; there are references for "
            f"{len(references)} images, such as {list(references)[:5]}: are the ids of the same data set and type?"
        )


def warn_if_alone(images: int) -> None:
    """Warn where CIDEr's corpus has a single image."""
    if images == 1:
        warnings.warn(
            "CIDEr in a corpus of one image is 0 by definition, as no n-gram is rarer than another: score the image "
            "with others, or take the idf from a larger corpus",
            stacklevel=3,
        )


def _check_candidates(
    image_ids: Sequence[Hashable], captions: Sequence[str], references: Mapping[Hashable, list[Counter]]
) -> None:
    if len(image_ids) != len(captions) or len(captions) == 0:
        raise ValueError(f"{len(image_ids)} image ids for {len(captions)} captions: give as many, and at least one")
    refuse_unknown(image_ids, references)
    check_captions("candidates", captions)  # before equal ones are looked for, which must be hashable


def _counted_candidates(captions: Sequence[str], tokenizer: str) -> list[Counter]:
    return [_ngrams(text) for text in tokenize({"candidates": captions}, tokenizer)["candidates"]]


def _ngrams(text: str) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _length(caption: Counter) -> int:
    return sum(n for gram, n in caption.items() if len(gram) == 1)


def _grams(captions: Iterable[Counter]) -> Iterable[tuple]:
    return (gram for caption in captions for gram in caption)


def _product(candidate: Counter, reference: Counter) -> dict[tuple, int]:
    """Counts of shared n-grams multiplied, those of the candidate clipped at the reference's."""
    return {gram: min(n, reference[gram]) * reference[gram] for gram, n in candidate.items() if gram in reference}


def _matrix(rows: Iterable[Mapping[tuple, int]], columns: Mapping[tuple, int]) -> csr_array:
    """(4 · rows, V): row 4 r + n − 1 holds the n-grams of r that have n words."""
    row, column, value = array("q"), array("q"), array("d")
    count = 0
    for grams in rows:
        for gram, n in grams.items():
            row.append(ORDERS * count + len(gram) - 1)
            column.append(columns[gram])
            value.append(n)
        count += 1
    return csr_array((np.array(value), (np.array(row), np.array(column))), shape=(ORDERS * count, len(columns)))
