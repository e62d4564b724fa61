"""Notebooks 04 and 05: the metrics of captions and images, gains, intervals and controls.

Each check hands back the function that later cells use: the learner's once it is right, else the course's.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import permutations

import numpy as np
from scipy.stats import rankdata

from dalleflamingo.course.checks.cases import Case, check
from dalleflamingo.evaluation.intervals import mean_interval

Bounds = tuple[float, float]
Grams = Mapping[tuple[str, ...], int]

# ── notebook 04 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def ngram_cosine(attempt: Callable[[Grams, Grams, Mapping], float]) -> Callable[[Grams, Grams, Mapping], float]:
    """Notebook 04, exercise 1: how alike two captions are in their n-grams of one length, as CIDEr has it.

    Args:
        attempt: (counts of the candidate's n-grams, of the reference's, idf of each n-gram) -> cosine in [0, 1].
    """

    def ours(candidate: Grams, reference: Grams, idf: Mapping) -> float:
        shared = sum(min(n, reference[gram]) * reference[gram] * idf[gram] ** 2 for gram, n in candidate.items())
        norms = [sum((n * idf[gram]) ** 2 for gram, n in counts.items()) ** 0.5 for counts in (candidate, reference)]
        return shared / (norms[0] * norms[1]) if shared else 0.0

    a, red, boat, lake = ("a",), ("red",), ("boat",), ("lake",)
    idf = {a: 0.0, red: 1.0, boat: 2.0, lake: 2.0}
    candidate, reference = Counter({a: 1, red: 1, boat: 2}), Counter({a: 1, boat: 1, lake: 1})
    norms = (17 * 8) ** 0.5  # of the vectors (0, 1, 4, 0) and (0, 0, 2, 2)
    mistakes = [
        (8 / norms, "the candidate says boat twice and the reference once: its count is clipped at the reference's"),
        (2 / 18**0.5, "every n-gram counts alike, but a rare one should weigh more: multiply each count by its idf"),
        (3 / 18**0.5, "every n-gram counts alike, but a rare one should weigh more: multiply each count by its idf"),
        (2 / norms, "both vectors hold count × idf, so that a shared n-gram has its idf twice"),
        (4.0, "divide by the lengths of both vectors, or a long caption gains by its length"),
        (4 / norms**2, "the length of a vector is the root of the sum of its squares"),
    ]
    cases = [
        Case(
            (candidate, reference, idf), 4 / norms, "one boat is shared, and its product is (1 · 2) · (1 · 2)", mistakes
        ),
        Case((candidate, candidate, idf), 1.0, "a caption is as like itself as can be"),
        Case((Counter({red: 1}), reference, idf), 0.0, "they share no n-gram"),
        Case((Counter(), reference, idf), 0.0, "a caption of three words has no n-gram of four"),
    ]
    shown = "A shared n-gram counts by how rare it is: what stands in every caption says nothing about an image."
    return attempt if check(attempt, cases, shown) else ours


def gain_over_random(
    attempt: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Notebook 04, exercise 2: score of the candidate ranked first minus that of a random one, for each image.

    Args:
        attempt: ((n, K) similarities, (n, K) scores) -> (n,) gains.
    """

    def ours(similarity: np.ndarray, score: np.ndarray) -> np.ndarray:
        return score[np.arange(len(score)), similarity.argmax(axis=1)] - score.mean(axis=1)

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
    shown = (
        "For a mean over images nothing has to be drawn at random: a random pick scores the mean over the "
        "candidates on average. Each image has one gain, so ranked and random are compared image by image."
    )
    return attempt if check(attempt, [case], shown) else ours


def bootstrap_interval(
    attempt: Callable[[np.ndarray, np.random.Generator], Bounds],
) -> Callable[[np.ndarray, np.random.Generator], Bounds]:
    """Notebook 04, exercise 3: the 95 % interval of a mean gain by resampling images.

    Args:
        attempt: ((n,) gains, random generator) -> (lower, upper) bound.
    """

    def ours(gains: np.ndarray, rng: np.random.Generator) -> Bounds:
        means = rng.choice(gains, size=(1000, len(gains))).mean(axis=1)
        return tuple(np.quantile(means, [0.025, 0.975]))

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
    case = Case(
        (gains, np.random.default_rng(0)),
        (interval.low, interval.high),
        "the means of resampled gains lie close together",
        mistakes,
        tolerance=0.15 * width,
    )
    shown = (
        "Resampling the images shows how much the mean would vary with other images; the spread of single gains does "
        "not."
    )
    return attempt if check(attempt, [case], shown) else ours


def control(attempt: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Notebook 04, exercise 4: similarities for a ranking that knows nothing of its own images.

    Args:
        attempt: (n, K) similarities -> (n, K) similarities of other images, a row an image.
    """

    def ours(similarity: np.ndarray) -> np.ndarray:
        return np.roll(similarity, 1, axis=0)

    rows = [np.round(np.random.default_rng(n).uniform(size=(n, 3)), 3) for n in range(4, 14)]

    def kept(similarity: np.ndarray) -> Callable[[np.ndarray], int]:
        """How many images have their own similarities still, in whatever order."""
        return lambda answer: int((np.sort(answer, axis=1) == np.sort(similarity, axis=1)).all(axis=1).sum())

    def invented(similarity: np.ndarray) -> Callable[[np.ndarray], int]:
        """How many rows are those of no image."""
        return lambda answer: len(answer) - sum((row == similarity).all(axis=1).any() for row in answer)

    n = len(rows[0])

    def shuffled(answer: np.ndarray) -> int:
        """How many rows hold an image's own similarities in an order that no image has."""
        own = (np.sort(answer, axis=1) == np.sort(rows[0], axis=1)).all(axis=1)
        given = [(row == rows[0]).all(axis=1).any() for row in answer]
        return int((own & ~np.array(given)).sum())

    within = [
        (
            lambda _: True,
            "a shuffle within the row gains nothing either, but it moves the candidates to other positions, too, and "
            "could not find out whether first candidates are better: take the whole row of another image",
        )
    ]
    unchanged = [
        (float(n), "every image keeps its own row, perhaps in another order: take the rows of other images"),
        (lambda _: True, "a permutation may leave some images where they are: move every row"),
    ]
    new = [
        (lambda _: True, "a control changes one thing only, the image: keep each row whole, with the numbers it has")
    ]
    cases = [
        Case((rows[0],), float(n), f"{n} images have {n} rows", measured=len),
        Case((rows[0],), 0.0, "no row is shuffled", within, measured=shuffled),
        Case((rows[0],), 0.0, "no row is made up", new, measured=invented(rows[0])),
        *(Case((one,), 0.0, "no image keeps its own similarities", unchanged, measured=kept(one)) for one in rows),
    ]
    shown = (
        "The control differs from the ranking in one thing only: its similarities are those of other images. What it "
        "gains, no knowledge of the image can have gained."
    )
    return attempt if check(attempt, cases, shown) else ours


def spearman(attempt: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """Notebook 04, exercise 5: the rank correlation of similarities and scores of one image.

    Args:
        attempt: ((K,) similarities, (K,) scores) -> ρ in [-1, 1].
    """

    def ours(similarity: np.ndarray, score: np.ndarray) -> float:
        return float(np.corrcoef(rankdata(similarity), rankdata(score))[0, 1])

    similarity, score = np.array([0.2, 0.9, 0.1, 0.3, 0.25]), np.array([4.0, 50.0, 0.0, 1.0, 3.0])
    tied, halves = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 0.0, 1.0, 1.0])
    mistakes = [
        (np.corrcoef(similarity, score)[0, 1], "that is Pearson's correlation of the values: rank them first"),
        (
            np.corrcoef(similarity.argsort(), score.argsort())[0, 1],
            "argsort gives the positions of the sorted values, not the ranks of the values",
        ),
        (0.4, "that counts pairs, as Kendall's τ does; ρ compares the ranks themselves"),
        (-0.6, "large values belong to large values: the sign is the other way round"),
    ]
    ties = [
        (1.0, "equal values share the mean of their ranks, here 1.5 and 3.5"),
        (0.9, "the formula with the squared differences holds without ties only: correlate the ranks"),
    ]
    cases = [
        Case((similarity, score), 0.6, "the ranks are 2, 5, 1, 4, 3 and 4, 5, 1, 2, 3", mistakes),
        Case((similarity, -similarity), -1.0, "the order is reversed"),
        Case((tied, halves), 2 / 5**0.5, "two scores are 0 and two are 1", ties),
    ]
    shown = "ρ sees the order alone: one caption with a score far above the others weighs no more than its rank."
    return attempt if check(attempt, cases, shown) else ours


# ── notebook 05 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def word_movers_distance(attempt: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    """Notebook 05, exercise 1: the cheapest way to move the words of one text to those of another.

    Args:
        attempt: (n, n) costs of moving word i of one text to word j of the other -> distance.
    """

    def ours(costs: np.ndarray) -> float:
        plans = permutations(range(len(costs)))
        return min(costs[range(len(costs)), list(plan)].mean() for plan in plans)

    costs = np.array([[0.0, 0.9, 0.8], [0.2, 1.0, 1.1], [0.7, 0.6, 1.0]])
    mistakes = [
        ((0.0 + 0.2 + 0.6) / 3, "every word goes to its nearest, but then two words go to one and one is left over"),
        (0.2 + 0.6 + 0.8, "that is the sum over the words; each carries one nth of the text"),
        (np.trace(costs) / 3, "that keeps the order of the words, which this distance ignores"),
        (costs.mean(), "that is the mean over all pairs, as if each word were divided into equal parts"),
        ((0.0 + 1.1 + 0.6) / 3, "that takes the cheapest pair first; a dearer first pair may make the others cheaper"),
    ]
    reason = "the best plan costs 0.2 + 0.6 + 0.8, each for a third of the text"
    case = Case((costs,), (0.2 + 0.6 + 0.8) / 3, reason, mistakes)
    shown = "The distance is the cost of the best plan for the whole text; no word can find it on its own."
    return attempt if check(attempt, [case], shown) else ours


def frechet_distance(attempt: Callable[..., float]) -> Callable[..., float]:
    """Notebook 05, exercise 2: the Fréchet distance of two Gaussians.

    Args:
        attempt: (mean (D,), covariance (D, D), mean, covariance) -> distance.
    """

    def ours(m1: np.ndarray, c1: np.ndarray, m2: np.ndarray, c2: np.ndarray) -> float:
        root_trace = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
        return ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root_trace

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
    cases = [
        Case(arguments, 9 + spread - 2 * shared, "the means count 9, the rest are the covariances", mistakes),
        Case((arguments[0], first) * 2, 0.0, "a Gaussian has no distance from itself", tolerance=1e-6),
        *(_of_few_images(seed) for seed in range(8)),
    ]
    shown = "FID is this distance between Inception features: of a set of images it sees mean and covariance only."
    return attempt if check(attempt, cases, shown) else ours


def _of_few_images(seed: int) -> Case:
    """Two sets of 4 points in 6 dimensions: with C = XᵀX, the trace of (C₁ C₂)^½ is the nuclear norm of X₁ X₂ᵀ."""
    points = np.random.default_rng(seed).normal(size=(2, 4, 6))
    one, other = points - points.mean(axis=1, keepdims=True)
    covariances = [np.cov(X, rowvar=False) for X in (one, other)]
    root_trace = np.linalg.norm(one @ other.T, "nuc") / 3
    mistakes = [
        (
            lambda found: np.isnan(found),
            "rounding makes tiny negative numbers of some eigenvalues: convert them before the root, "
            "`.astype(complex)`, and take `.real` after it",
        )
    ]
    expected = np.trace(covariances[0] + covariances[1]) - 2 * root_trace
    reason = "a covariance of 4 points in 6 dimensions is singular, and the distance is still finite"
    zero = np.zeros(6)
    return Case((zero, covariances[0], zero, covariances[1]), expected, reason, mistakes, tolerance=1e-5)


def paired_interval(attempt: Callable[..., Bounds]) -> Callable[..., Bounds]:
    """Notebook 05, exercise 3: find the bug in an interval, which resamples ranked and random apart.

    Args:
        attempt: ((n,) scores of the candidates ranked first, (n,) of random ones, random generator) -> bounds of the
            mean gain.
    """

    def ours(first: np.ndarray, random: np.ndarray, rng: np.random.Generator) -> Bounds:
        n = len(first)
        samples = [rng.integers(n, size=n) for _ in range(1000)]
        return tuple(np.quantile([(first[i] - random[i]).mean() for i in samples], [0.025, 0.975]))

    rng = np.random.default_rng(3)
    difficulty, gains = rng.uniform(size=60), 0.2 * rng.exponential(size=60)
    interval = mean_interval(gains)
    width = interval.high - interval.low
    same = [
        (lambda _: True, "easy and difficult captions differ by far more than 0.1, and that got into the interval"),
    ]
    varied = [
        (lambda bounds: bounds[0] > bounds[1], "the lower bound comes first"),
        (lambda bounds: np.isclose(*bounds), "drawn without replacement, every sample is the same"),
        (
            lambda bounds: bounds[1] - bounds[0] > 3 * width,
            "a single gain can lie that far away, but the question is about their mean",
        ),
        (
            lambda bounds: bounds[1] - bounds[0] < 0.75 * width,
            "are both scores of one caption still together? Sorting them apart also breaks the pairs",
        ),
    ]
    cases = [
        Case(
            (difficulty + 0.1, difficulty, np.random.default_rng(0)),
            (0.1, 0.1),
            "where each caption gains 0.1, so does every resample",
            same,
            tolerance=1e-6,
        ),
        Case(
            (difficulty + gains, difficulty, np.random.default_rng(0)),
            (interval.low, interval.high),
            "the gains vary, and their mean does a little",
            varied,
            tolerance=0.15 * width,
        ),
    ]
    shown = (
        "Both scores of a caption are drawn together, so that its difficulty cancels. The same captions then tell much "
        "more about the gain."
    )
    return attempt if check(attempt, cases, shown) else ours


def text_similarity(attempt: Callable[[str, str], float]) -> Callable[[str, str], float]:
    """Notebook 05, exercise 4: a similarity of texts of one's own, of which only the least is asked.

    Args:
        attempt: (caption, description) -> a number, higher where they are more alike.
    """

    def ours(source: str, text: str) -> float:
        words = set(source.lower().split())
        return len(words & set(text.lower().split())) / max(1, len(words))

    caption, near, far = "a red kite above a tree", "a red kite above a house", "two white cups"

    def of_all(source: str, texts: list[str]) -> list[float]:
        return [attempt(source, text) for text in texts]

    def ranks(values: list[float]) -> np.ndarray:
        return rankdata([-value for value in values])

    mistakes = [
        ([3, 2, 1], "that is a distance: a similarity is higher where two texts are more alike"),
        ([2, 2, 2], "that is the same for all texts, so it ranks nothing"),
    ]
    reason = "the caption itself ranks first, then the text with one other word, then “two white cups”"
    cases = [
        Case((caption, [caption, near, far]), [1, 2, 3], reason, mistakes, measured=ranks),
        Case((caption, ["", caption]), [2, 1], "a description may be empty", measured=ranks),
    ]
    shown = "It is a similarity. Whether it ranks images well, the next cell measures."
    return attempt if check(of_all, cases, shown) else ours
