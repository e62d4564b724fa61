"""Checks of the exercises: not done yet, one calm line; wrong, in which way; right, what has just been shown.

A check prints and never raises, so that a notebook runs to its end whatever state its exercises are in. Each exercise
is a few cases with known answers; wrong answers that are common have a hint of their own.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isclose

import numpy as np
import torch

from dalleflamingo.evaluation.intervals import mean_interval

Claims = set[tuple[str, ...]]

FACTS: Claims = {
    ("cat",),
    ("cat", "red"),
    ("cat", "small"),
    ("boat",),
    ("boat", "blue"),
    ("boat", "large"),
    ("cat", "left", "boat"),
    ("grass",),
}


@dataclass(frozen=True)
class Case:
    """Arguments of an exercise with the right answer.

    Attributes:
        arguments: of the learner's function, which gets a copy.
        expected: the right answer: a number, tokens, or lists, arrays and tensors of them.
        reason: why it is right, in words.
        mistakes: wrong answers, or tests that recognise them, each with a hint; the first that fits is shown.
        tolerance: by which each number may differ, beside 1e-5 of its size.
    """

    arguments: tuple
    expected: object
    reason: str
    mistakes: Sequence[tuple[object, str]] = ()
    tolerance: float = 1e-9


def f1(attempt: Callable[[Claims, Claims], float]) -> None:
    """Notebook 00, exercise 1: F1 of a caption's claims against the facts of an image.

    Args:
        attempt: (claims, facts) -> F1 in [0, 1].
    """
    two_of_four = {("cat",), ("cat", "white"), ("boat",), ("cat", "right", "boat")}  # of 4 claims 2 are true
    mistakes = [
        (1 / 2, "that is precision, which ignores the facts that the caption leaves out"),
        (1 / 4, "that is recall, which ignores wrong claims"),
        (3 / 8, "that is the arithmetic mean, in which one high value makes up for a low one"),
        (1 / 5, "that is the share of the union"),
        (1 / 6, "the harmonic mean of two numbers is 2PR / (P + R): is the 2 missing?"),
    ]
    cases = [
        Case((FACTS, FACTS), 1.0, "a caption that claims all 8 facts and nothing else is perfect"),
        Case(
            (two_of_four, FACTS), 1 / 3, "2 of the 4 claims are among the 8 facts: precision 1/2, recall 1/4", mistakes
        ),
        Case(({("dog",)}, FACTS), 0.0, "there is one claim, and it is wrong"),
        Case((set(), FACTS), 0.0, "a caption that claims nothing gets nothing right"),
    ]
    _check(
        attempt,
        cases,
        "F1 is the harmonic mean of precision and recall: 1 for all facts and nothing else, 0 without a hit, and close "
        "to the lower of the two. A caption gains neither by saying little nor by guessing much.",
    )


def with_word_ends(attempt: Callable[[list[str]], list[str]]) -> None:
    """Notebook 02, exercise 1: WordPiece's tokens in CLIP's notation.

    Args:
        attempt: tokens with ## -> the same tokens with </w>.
    """
    mistakes = [
        (["gi</w>", "raf</w>", "fe</w>"], "only a token that no ## follows ends a word"),
        (["gi", "##raf", "##fe</w>"], "the ## has to go, CLIP does not write it"),
        (["gi", "raf", "fe"], "nothing follows the last token, so a word ends there too"),
    ]
    cases = [
        Case((["gi", "##raf", "##fe"],), ["gi", "raf", "fe</w>"], "one word of three tokens", mistakes),
        Case((["a", "dog"],), ["a</w>", "dog</w>"], "two words of one token each"),
        Case((["a", "fr", "##is", "##bee", "!"],), ["a</w>", "fr", "is", "bee</w>", "!</w>"], "short and long words"),
        Case(([],), [], "a caption without tokens"),
    ]
    _check(
        attempt,
        cases,
        "Both notations carry the same information: a word ends where no ## follows.",
        show_arguments=True,
    )


def differing_words(attempt: Callable[[list[str], list[str]], list[tuple[list[str], list[str]]]]) -> None:
    """Notebook 02, exercise 2: what lies between two positions where both tokenizers end a word, if it differs.

    Args:
        attempt: (source tokens, target tokens), both in CLIP's notation -> pairs of token lists that differ.
    """
    by_position = [(["gi"], ["giraffe</w>"]), (["raf"], ["eats</w>"])]
    cases = [
        Case((["a</w>", "dog</w>"], ["a</w>", "dog</w>"]), [], "nothing differs"),
        Case(
            (["a</w>", "gi", "raf", "fe</w>", "eats</w>"], ["a</w>", "giraffe</w>", "eats</w>"]),
            [(["gi", "raf", "fe</w>"], ["giraffe</w>"])],
            "only the giraffe differs",
            [
                (
                    by_position,
                    "compared by position, tokens lose their partners after a difference; count letters instead",
                )
            ],
        ),
        Case(
            (["dog</w>", "'</w>", "s</w>", "toy</w>"], ["dog</w>", "'s</w>", "toy</w>"]),
            [(["'</w>", "s</w>"], ["'s</w>"])],
            "'s is two words on the left and one on the right",
            [([], "have both sides spelled the same number of letters where you stop?")],
        ),
        Case(
            (["computer</w>", "skate", "board</w>"], ["compu", "ter</w>", "skateboard</w>"]),
            [(["computer</w>"], ["compu", "ter</w>"]), (["skate", "board</w>"], ["skateboard</w>"])],
            "two words in a row differ, in opposite directions, and the second ends the caption",
        ),
    ]
    _check(
        attempt,
        cases,
        "Where both sides have spelled the same number of letters and both end a word, a caption can be divided, and "
        "every difference belongs to a word.",
        show_arguments=True,
    )


def soft_embedding(attempt: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Notebook 03, exercise 1: expected embeddings.

    Args:
        attempt: ((T, V) distributions, (V, D) embedding table) -> (T, D).
    """
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((2, 5), 0.2)
    cases = [
        Case((torch.eye(5)[[4, 1]], table), table[[4, 1]], "one-hot rows give back rows of the table", tolerance=1e-5),
        Case((uniform, table), table.mean(0).expand(2, -1), "equal shares give the mean of all rows", tolerance=1e-5),
    ]
    _check(
        attempt,
        cases,
        "A text encoder that looks tokens up can also read averages of tokens; looking up is the special case of "
        "certainty.",
    )


def departures(attempt: Callable[[list[float]], tuple[list[float], float]]) -> None:
    """Notebook 03, exercise 2: where a path along the caption's tokens is left, for one target token.

    Args:
        attempt: p_t at each source position -> (probability to leave at each, probability to stay to the end).
    """
    cases = [
        Case(([0.75, 1.0, 1.0],), ([0.25, 0.0, 0.0], 0.75), "only the first position is uncertain"),
        Case(
            ([0.5, 0.5],),
            ([0.5, 0.25], 0.25),
            "to leave at the second position, one must have stayed at the first",
            [
                (([0.5, 0.5], 0.25), "together 1.25: the second position counts what had left before"),
                (([0.5, 0.5], 0.5), "together 1.5: each position counts as if it were the only one"),
                (([0.5, 0.25], 0.5), "together 1.25: to stay to the end is to stay at both positions"),
            ],
        ),
        Case(
            ([0.75, 0.5, 0.75],),
            ([0.25, 0.375, 0.09375], 0.28125),
            "to leave at the third position, one must have stayed at both before it",
            [(([0.25, 0.375, 0.125], 0.28125), "0.125 forgets what had left at the first position")],
        ),
        Case(([],), ([], 1.0), "there is no position to leave at, so all of it stays"),
    ]
    _check(
        attempt,
        cases,
        "What leaves and what stays add up to 1, whatever the probabilities: the map neither loses nor adds mass.",
        show_arguments=True,
    )


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
    _check(
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
    _check(
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
    _check(
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
    _check(
        attempt,
        [Case(arguments, 9 + spread - 2 * shared, "the means count 9, the rest are the covariances", mistakes)],
        "FID is this distance between Inception features: of a set of images it sees mean and covariance only.",
    )


def caption_loss(attempt: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Notebook 06, exercise 1: loss (1), the mean over the tokens of padded captions.

    Args:
        attempt: ((B, T) log-probabilities, (B, T) which of them count) -> loss.
    """
    log_p = torch.tensor([[-1.0, -2.0, -4.0, -3.0], [-0.5, -1.5, -9.0, -7.0]])
    counts = torch.tensor([[True, True, True, True], [True, True, False, False]])
    mistakes = [
        (28 / 8, "padding is no part of a caption"),
        (12 / 8, "padding is left out of the sum, but counted in the mean"),
        (12.0, "the stock models give the mean over tokens, not their sum"),
        ((10 / 4 + 1) / 2, "that is the mean of each caption's mean, where a short one weighs as much as a long one"),
        (-2.0, "a likely caption should have a small loss: check the sign"),
    ]
    _check(
        attempt,
        [Case((log_p, counts), 2.0, "the 6 tokens that count sum to a loss of 12", mistakes)],
        "Every token counts once, the end of the caption too, padding never. So the parts of a batch can be summed to "
        "the whole.",
    )


def clean_latents(attempt: Callable[[float, float, float], float]) -> None:
    """Notebook 06, exercise 2: the one-step clean latents ẑ_0.

    Args:
        attempt: (z_t, predicted noise, ᾱ_t) -> ẑ_0.
    """
    clean, noise, alpha = 2.0, -1.5, 0.36
    noised = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    mistakes = [
        (noised - (1 - alpha) ** 0.5 * noise, "z_t holds √ᾱ_t times z_0: divide"),
        ((noised - (1 - alpha) ** 0.5 * noise) / alpha, "z_t holds √ᾱ_t times z_0: divide by the root"),
        ((noised - (1 - alpha) * noise) / alpha**0.5, "z_t holds √(1−ᾱ_t) times the noise: the root is missing"),
        ((noised + (1 - alpha) ** 0.5 * noise) / alpha**0.5, "the noise was added: take it away"),
        (noised - noise, "both terms are weighted by the schedule"),
    ]
    _check(
        attempt,
        [Case((noised, noise, alpha), clean, "z_0 = 2 got the noise −1.5 at ᾱ_t = 0.36", mistakes)],
        "Whoever knows the noise knows the clean latents, in one step. How well depends on how much of them is left.",
    )


def kendall_tau(attempt: Callable[[list[float], list[float]], float]) -> None:
    """Notebook 07, exercise 1: agreement of two orders.

    Args:
        attempt: two lists of scores of the same things -> τ in [-1, 1].
    """
    cases = [
        Case(([3.0, 2.0, 1.0], [30.0, 20.0, 10.0]), 1.0, "the same order agrees on all pairs"),
        Case(
            ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]),
            -1.0,
            "the reversed order agrees on none",
            [(0.0, "disagreement counts −1")],
        ),
        Case(
            ([5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 3.0, 4.0, 2.0, 1.0]),
            0.8,
            "one of ten pairs is the other way round: (9 − 1) / 10",
            [
                (0.9, "that is the share that agrees: subtract the share that does not"),
                (8.0, "divide by the number of pairs"),
            ],
        ),
        Case(([2.0, 1.0], [5.0, 5.0]), 0.0, "a tie neither agrees nor disagrees"),
    ]
    _check(attempt, cases, "τ depends on the orders alone, not on how far apart two scores are.", show_arguments=True)


def _check(attempt: Callable, cases: Sequence[Case], shown: str, show_arguments: bool = False) -> None:
    """Print one line: not done, the first case that is wrong, or `shown`, what a right answer has shown."""
    try:
        faults = (fault for case in cases if (fault := _fault(attempt, case, show_arguments)))
        fault = next(faults, None)
    except NotImplementedError:
        print("Not done yet, and nothing below waits for it.")
    else:
        print(f"Not yet: {fault}" if fault else f"Right. {shown}")


def _fault(attempt: Callable, case: Case, show_arguments: bool) -> str | None:
    """What is wrong with the answer to one case, or None."""
    expected = _plain(case.expected)
    shown = ", ".join(_short(_plain(argument)) for argument in case.arguments) + ": " if show_arguments else ""
    wanted = f"{shown}{case.reason}, so {_short(expected)}"
    try:
        found = _plain(attempt(*deepcopy(case.arguments)))
    except NotImplementedError:
        raise
    except Exception as error:
        return f"{wanted}; yours raises {type(error).__name__}: {error}".splitlines()[0]
    if _equal(found, expected, case.tolerance):
        return None
    if found is None:
        return f"{wanted}; yours gives None: does it end in `return …`?"
    shapes = _shape(expected), _shape(found)
    if None not in shapes and shapes[0] != shapes[1]:
        return f"{wanted}, of the shape {shapes[0]}; yours has the shape {shapes[1]}"
    hints = [
        hint for wrong, hint in case.mistakes if (wrong(found) if callable(wrong) else _equal(found, _plain(wrong)))
    ]
    return "; ".join([f"{wanted}; yours gives {_short(found)}", *hints[:1]])


def _plain(value):
    """Tensors, arrays and tuples as lists, numbers as floats, which compare and print as one reads them."""
    value = value.tolist() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, complex):
        return value.real
    return float(value) if isinstance(value, (int, float)) else value


def _equal(found, expected, tolerance: float = 1e-9) -> bool:
    if isinstance(expected, list):
        same_length = isinstance(found, list) and len(found) == len(expected)
        return same_length and all(_equal(*pair, tolerance) for pair in zip(found, expected, strict=True))
    if isinstance(expected, float):
        return isinstance(found, float) and isclose(found, expected, rel_tol=1e-5, abs_tol=tolerance)
    return found == expected


def _shape(value) -> tuple[int, ...] | None:
    """Of numbers in nested lists, as an array has it; None for anything else."""
    if isinstance(value, float):
        return ()
    if not isinstance(value, list) or not value:
        return None
    shapes = {_shape(part) for part in value}
    inner = shapes.pop()
    return None if shapes or inner is None else (len(value), *inner)


def _short(value) -> str:
    """As Python writes it, numbers with three digits."""
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    return f"{value:.3g}" if isinstance(value, float) else repr(value)
