"""Number of candidates (Fig. 9): the score of the candidate ranked first among any k of the K that were drawn."""

from collections.abc import Callable, Sequence
from itertools import product
from math import comb

import numpy as np
import pandas as pd

from dalleflamingo.evaluation.intervals import paired_bootstraps
from dalleflamingo.research.metrics import METRICS
from dalleflamingo.research.ranking import RESAMPLES, EvaluatedCandidates, Selection, effects_table, similarities


def first_of_any(
    evaluated: EvaluatedCandidates, metric: str, numbers: Sequence[int]
) -> Callable[[np.ndarray], np.ndarray]:
    """Score of the candidate ranked first among any k of the K, mean over all choices of k.

    The candidate ranked rth of K is first if the other k − 1 are among the K − r behind it.

    Args:
        evaluated: the candidates.
        metric: a mean over the images of a corpus, so no metric of counts such as BLEU.
        numbers: the values of k.
    Returns:
        a function of images, as positions -> (similarities, numbers), the scores on the corpus that they make.
    Raises:
        ValueError: a k is not between 1 and K.
    """
    count = evaluated.k
    for k in numbers:
        if not 1 <= k <= count:
            raise ValueError(f"the first of any {k} of {count} candidates: take between 1 and {count}")
    chance = np.array([[comb(count - rank, k - 1) / comb(count, k) for k in numbers] for rank in range(1, count + 1)])
    ranked = [np.take_along_axis(evaluated.rows, evaluated.order(by), 1).T for by in similarities(evaluated.table)]
    every = np.stack(ranked)  # (similarities, K, n)
    return lambda images: evaluated.metrics[metric](every[..., images]) @ chance


def growth(
    evaluated: EvaluatedCandidates,
    numbers: Sequence[int],
    metrics: Sequence[str],
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """Fig. 9: score of the candidate ranked first among any k, and its gain over a random one.

    A random candidate has the same expected score whatever the number it is drawn from.

    Args:
        evaluated: the candidates.
        numbers: the values of k.
        metrics: as `first_of_any` takes them.
        resamples: of the bootstrap.
    Returns:
        a table of effects (see `ranking`) over all images, with rows of rank 1 and of the random selection for each k.
    Raises:
        ValueError: a k is not between 1 and K.
    """
    selections = [Selection("random", k=k) for k in numbers]
    selections += [Selection(by, 1, k) for by, k in product(similarities(evaluated.table), numbers)]
    found = []
    for metric in metrics:
        first = first_of_any(evaluated, metric, (1, *numbers))

        def statistics(images: np.ndarray, first: Callable[[np.ndarray], np.ndarray] = first) -> np.ndarray:
            scores = first(images)
            random = scores[0, 0]  # the first of any one
            values = np.concatenate([np.full(len(numbers), random), scores[:, 1:].ravel()])
            return np.concatenate([values, values - random])

        recentred = 2 * len(selections) * [METRICS[metric].biased]
        intervals = paired_bootstraps(statistics, len(evaluated.rows), resamples, recentred=recentred)
        together = zip(selections, intervals[: len(selections)], intervals[len(selections) :], strict=True)
        found += [(metric, *row) for row in together]
    return effects_table(found)
