"""Notebooks 04 and 05: gains, intervals, and the metrics of images."""

from collections.abc import Callable

import numpy as np

from dalleflamingo.course.checks.cases import Case, check
from dalleflamingo.evaluation.intervals import mean_interval


def gain_over_random(attempt: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Notebook 04, exercise 1: score of the candidate ranked first minus that of a random one, for each image.

    Args:
        attempt: ((n, K) similarities, (n, K) scores) -> (n,) gains.
    """
    similarity = np.array([[0.1, 0.9, 0.2], [0.8, 0.3, 0.8], [-0.5, -0.1, -0.9]])
    score = np.array([[1.0, 4.0, 10.0], [6.0, 0.0, 3.0], [2.0, 2.0, 2.0]])
    first, random = np.array([4.0, 6.0, 2.0]), score.mean(axis=1)
    mistakes = [
        (first, "that is the score of the first candidate, without the random one subtracted"),
        (score.max(axis=1) - random, "that ranks by the score itself, which a ranking by images does not know"),
        (np.array([1.0, 0.0, 2.0]) - random, "that takes the generated image least like the input"),
        (first - score.mean(), "each image has a random candidate of its own: the mean over its row"),
        (np.array([4.0, 3.0, 2.0]) - random, "of equally similar images the first counts"),
        (random - first, "that is random minus ranked"),
    ]
    case = Case(
        (similarity, score), first - random, "the first scores 4, 6 and 2, a random candidate 5, 3 and 2", mistakes
    )
    check(
        attempt,
        [case],
        "For a mean over images nothing has to be drawn at random: a random pick scores the mean over the "
        "candidates on average. Each image has one gain, so ranked and random are compared image by image.",
    )


def bootstrap_interval(attempt: Callable[[np.ndarray, np.random.Generator], tuple[float, float]]) -> None:
    """Notebook 04, exercise 2: the 95 % interval of a mean gain by resampling images.

    Args:
        attempt: ((n,) gains, random generator) -> (lower, upper) bound.
    """
    gains = np.random.default_rng(3).exponential(size=200)
    interval = mean_interval(gains)
    width = interval.high - interval.low
    mistakes = [
        (lambda bounds: bounds[0] > bounds[1], "the lower bound comes first"),
        (lambda bounds: np.isclose(*bounds), "drawn without replacement, every sample is the same"),
        (
            lambda bounds: bounds[1] - bounds[0] > 3 * width,
            "a single gain can lie that far away, but the question is about their mean",
        ),
        (lambda _: True, "are the bounds the quantiles 0.025 and 0.975 of at least 1000 means of 200 gains each?"),
    ]
    expected = (interval.low, interval.high)
    case = Case(
        (gains, np.random.default_rng(0)),
        expected,
        "the means of resampled gains lie close together",
        mistakes,
        tolerance=0.15 * width,
    )
    check(
        attempt,
        [case],
        "Resampling the images shows how much the mean would vary with other images; the spread of single gains does "
        "not.",
    )


def word_movers_distance(attempt: Callable[[np.ndarray], float]) -> None:
    """Notebook 05, exercise 1: the cheapest way to move the words of one text to those of another.

    Args:
        attempt: (n, n) costs of moving word i of one text to word j of the other -> distance.
    """
    costs = np.array([[0.0, 0.9, 0.8], [0.2, 1.0, 1.1], [0.7, 0.6, 1.0]])
    mistakes = [
        ((0.0 + 0.2 + 0.6) / 3, "every word goes to its nearest, but then two words go to one and one is left over"),
        (0.2 + 0.6 + 0.8, "that is the sum over the words; each carries one nth of the text"),
        (np.trace(costs) / 3, "that keeps the order of the words, which this distance ignores"),
        (costs.mean(), "that is the mean over all pairs, as if each word were divided into equal parts"),
        ((0.0 + 1.1 + 0.6) / 3, "that takes the cheapest pair first; a dearer first pair may make the others cheaper"),
    ]
    check(
        attempt,
        [
            Case(
                (costs,),
                (0.2 + 0.6 + 0.8) / 3,
                "the best plan costs 0.2 + 0.6 + 0.8, each for a third of the text",
                mistakes,
            )
        ],
        "The distance is the cost of the best plan for the whole text; no word can find it on its own.",
    )


def frechet_distance(attempt: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]) -> None:
    """Notebook 05, exercise 2: the Fréchet distance of two Gaussians.

    Args:
        attempt: (mean (D,), covariance (D, D), mean, covariance) -> distance.
    """
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    first, second = np.diag([4.0, 1.0]), turn @ np.diag([9.0, 1.0]) @ turn.T
    arguments = np.array([1.0, 2.0]), first, np.array([1.0, -1.0]), second
    spread = np.trace(first + second)
    shared = np.sqrt(np.linalg.eigvals(first @ second)).real.sum()
    mistakes = [
        (9 + spread - 2 * np.sqrt(first @ second).trace(), "the root of a matrix is not the root of its numbers"),
        (9 + spread - 2 * np.trace(first @ second), "the root of the product is missing"),
        (3 + spread - 2 * shared, "the distance of the means is squared"),
        (spread - 2 * shared, "the means count, too"),
        (9 + spread - shared, "the root is taken twice"),
    ]
    check(
        attempt,
        [Case(arguments, 9 + spread - 2 * shared, "the means count 9, the rest are the covariances", mistakes)],
        "FID is this distance between Inception features: of a set of images it sees mean and covariance only.",
    )
