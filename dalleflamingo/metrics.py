"""How good captions are against human references: BLEU 1–4, CIDEr, and in the miniature the scene graph (§3.1).

The reported numbers come from pycocoevalcap, the code behind the published tables. `Cider` and `BleuTable` give the
same numbers for many candidates of an image and for the resamples of a bootstrap. Higher is better for all.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocoevalcap.bleu import bleu as stock_bleu
from pycocoevalcap.cider import cider as stock_cider

from dalleflamingo import scene_graph
from dalleflamingo.ngrams import ORDERS, SIGMA, BleuTable, Cider, CiderTable, refuse_unknown, warn_if_alone
from dalleflamingo.words import default_tokenizer, tokenize

__all__ = [
    "BleuTable", "Cider", "CiderTable", "Score", "bleu", "cider", "evaluate", "scene_graph_f1", "tokenize",
]  # fmt: skip


@dataclass(frozen=True)
class Score:
    """One metric on one corpus.

    value: of the corpus. per_item: image id -> score of its caption alone; BLEU's value is not their mean.
    n: number of captions. tokenizer: which one split the words; numbers under different ones do not compare.
    """

    name: str
    value: float
    per_item: dict[Hashable, float]
    n: int
    tokenizer: str
    higher_is_better: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3f} (n = {self.n}, words by {self.tokenizer})"


def evaluate(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> dict[str, Score]:
    """BLEU-1 to BLEU-4 and CIDEr of one caption an image, by pycocoevalcap, under those names.

    BLEU lies in [0, 1], CIDEr in [0, 10]; published tables show both × 100. An empty caption scores 0.

    Args:
        references: image id -> human captions. predictions: the same image ids -> the caption to judge.
    Raises:
        ValueError: there are no predictions, the ids differ, or an image has no reference.
        TypeError: a caption that is not a string.
    """
    _same_ids(references, predictions)
    tokenizer = default_tokenizer()
    ids = list(predictions)
    gold = tokenize({i: references[i] for i in ids}, tokenizer)
    guess = tokenize({i: [predictions[i]] for i in ids}, tokenizer)
    if not any(caption for captions in gold.values() for caption in captions):
        raise ValueError("no reference holds a word: is the file of references right?")
    warn_if_alone(len(ids))
    bleus, bleus_per_item = stock_bleu.Bleu(ORDERS).compute_score(gold, guess, verbose=0)
    cider_value, cider_per_item = stock_cider.Cider(n=ORDERS, sigma=SIGMA).compute_score(gold, guess)
    values = {f"BLEU-{order}": (bleus[order - 1], bleus_per_item[order - 1]) for order in range(1, ORDERS + 1)}
    values["CIDEr"] = cider_value, cider_per_item
    return {
        name: Score(name, float(value), dict(zip(ids, map(float, per_item), strict=True)), len(ids), tokenizer)
        for name, (value, per_item) in values.items()
    }


def bleu(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str], order: int = 4) -> Score:
    """BLEU with n-grams of 1 to `order` words; arguments and errors as `evaluate`, which gives all orders at once."""
    return evaluate(references, predictions)[f"BLEU-{order}"]


def cider(
    references: Mapping[Hashable, Sequence[str]],
    predictions: Mapping[Hashable, str],
    document_frequencies: Cider | None = None,
) -> Score:
    """CIDEr; arguments and errors as `evaluate`.

    Args:
        document_frequencies: the corpus that says how rare an n-gram is; None: these references, as usual. Few images
            need a larger corpus's: within one image every n-gram is common and CIDEr is 0.
    """
    if document_frequencies is None:
        return evaluate(references, predictions)["CIDEr"]
    _same_ids(references, predictions)
    scorer = Cider(references, idf_of=document_frequencies)
    scores = scorer.score(list(predictions), list(predictions.values()))
    per_item = dict(zip(predictions, scores.tolist(), strict=True))
    return Score("CIDEr", float(scores.mean()), per_item, len(per_item), scorer.tokenizer)


def scene_graph_f1(captions: Sequence[str], scenes: Sequence[scene_graph.Scene]) -> np.ndarray:
    """Scene-graph F1 of each caption against its own scene, the miniature's SPICE: (N,) in [0, 1]."""
    return np.array([scene_graph.f1(caption, scene) for caption, scene in zip(captions, scenes, strict=True)])


def _same_ids(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> None:
    if not predictions:
        raise ValueError("there are no predictions: give image id -> caption for at least one image")
    refuse_unknown(predictions, references)
    if silent := [i for i in references if i not in predictions]:
        raise ValueError(
            f"no prediction for {len(silent)} of {len(references)} images, such as {silent[:5]}; to score only the "
            "predicted ones, say so: {i: references[i] for i in predictions} (CIDEr then weighs n-grams by those alone)"
        )
