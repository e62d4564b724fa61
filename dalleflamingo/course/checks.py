"""Checks of the exercises: not done yet, one calm line; wrong, in which way; right, what that proves.

A check prints and never raises, so that a notebook runs to its end whatever state its exercises are in.
"""

from collections.abc import Callable
from copy import deepcopy
from math import isclose

import numpy as np
import torch

from dalleflamingo.intervals import mean_interval

Claims = set[tuple[str, ...]]

FACTS: Claims = {
    ("cat",), ("cat", "red"), ("cat", "small"),
    ("boat",), ("boat", "blue"), ("boat", "large"),
    ("cat", "left", "boat"), ("grass",),
}  # fmt: skip
_MIXED: Claims = {("cat",), ("cat", "white"), ("boat",), ("cat", "right", "boat")}  # 2 of 4 claims hit, 2 of 8 facts


def f1(attempt: Callable[[Claims, Claims], float]) -> None:
    """Exercise of notebook 00: F1 of a caption's claims against a picture's facts."""
    _report(
        lambda: _f1_fault(attempt),
        "F1 is the harmonic mean of precision and recall: 1 for the whole truth and nothing else, 0 without a hit, and "
        "closer to the lower of the two, so that neither silence nor chatter pays.",
    )


def _f1_fault(attempt: Callable[[Claims, Claims], float]) -> str | None:
    """What is wrong with an F1, or None."""
    cases = [
        (FACTS, 1, "a caption that claims all 8 facts and nothing else is perfect"),
        (_MIXED, 1 / 3, "of 4 claims 2 are among the 8 facts: precision 1/2, recall 1/4"),
        ({("dog",)}, 0, "one claim, and it is wrong"),
        (set(), 0, "a caption that claims nothing gets nothing right"),
    ]
    mistaken = {
        1 / 2: "that is precision, which forgets what was left unsaid",
        1 / 4: "that is recall, which forgives wrong claims",
        3 / 8: "that is the arithmetic mean, which one high side can rescue",
        1 / 5: "that is the share of the union",
        1 / 6: "the harmonic mean of two numbers is 2PR / (P + R): is the 2 missing?",
    }
    for claims, expected, reason in cases:
        try:
            value = attempt(set(claims), set(FACTS))
        except NotImplementedError:
            raise
        except Exception as error:
            return f"{reason}, so {expected:.3f}; yours raises {type(error).__name__}: {error}"
        if not isinstance(value, (int, float)):
            return f"it gives {value!r}, not a number: does it end in `return …`?"
        if not isclose(value, expected, abs_tol=1e-9):
            hints = [hint for wrong, hint in mistaken.items() if claims is _MIXED and isclose(value, wrong)]
            return "; ".join([f"{reason}, so {expected:.3f}; yours gives {value:.3f}", *hints])
    return None


def _report(find_fault: Callable[[], str | None], proved: str) -> None:
    try:
        fault = find_fault()
    except NotImplementedError:
        print("Not done yet, and nothing below waits for it.")
    else:
        print(f"Right. {proved}" if fault is None else f"Not yet: {fault}.")


def with_word_ends(attempt: Callable[[list[str]], list[str]]) -> None:
    """Exercise 1 of notebook 02: WordPiece's pieces in CLIP's notation."""
    _report(
        lambda: _first_fault(attempt, _WORD_ENDS),
        "Both notations say the same: where a word ends is where no ## follows.",
    )


def differing_words(attempt: Callable[[list[str], list[str]], list[tuple[list[str], list[str]]]]) -> None:
    """Exercise 2 of notebook 02: what stands between two places where both tokenizers end a word, if it differs."""
    _report(
        lambda: _first_fault(attempt, _DIFFERING),
        "Where both sides have spelled as many letters and both end a word, a caption can be taken apart, and what "
        "differs has a name.",
    )


# (arguments, expected, why; further answers that are wrong in a known way, each with what to say to it)
_WORD_ENDS = [
    (
        (["gi", "##raf", "##fe"],),
        ["gi", "raf", "fe</w>"],
        "three pieces of one word, which ends with the last",
        {
            ("gi</w>", "raf</w>", "fe</w>"): "only a piece that no ## follows ends a word",
            ("gi", "##raf", "##fe</w>"): "the ## has to go, CLIP writes none",
            ("gi", "raf", "fe"): "nothing follows the last piece, so a word ends there too",
        },
    ),
    ((["a", "dog"],), ["a</w>", "dog</w>"], "two words of one piece each", {}),
    ((["a", "fr", "##is", "##bee", "!"],), ["a</w>", "fr", "is", "bee</w>", "!</w>"], "long and short words mixed", {}),
    (([],), [], "a caption without pieces", {}),
]
_DIFFERING = [
    ((["a</w>", "dog</w>"], ["a</w>", "dog</w>"]), [], "nothing differs", {}),
    (
        (["a</w>", "gi", "raf", "fe</w>", "eats</w>"], ["a</w>", "giraffe</w>", "eats</w>"]),
        [(["gi", "raf", "fe</w>"], ["giraffe</w>"])],
        "only the giraffe differs",
        {
            ((("gi",), ("giraffe</w>",)), (("raf",), ("eats</w>",))): "place by place, pieces lose their partners "
            "after the first difference; count letters instead",
        },
    ),
    (
        (["dog</w>", "'</w>", "s</w>", "toy</w>"], ["dog</w>", "'s</w>", "toy</w>"]),
        [(["'</w>", "s</w>"], ["'s</w>"])],
        "'s is two words on the left and one on the right",
        {(): "have both sides spelled as many letters where you stop?"},
    ),
    (
        (["computer</w>", "skate", "board</w>"], ["compu", "ter</w>", "skateboard</w>"]),
        [(["computer</w>"], ["compu", "ter</w>"]), (["skate", "board</w>"], ["skateboard</w>"])],
        "two words in a row differ, in opposite directions, and the second ends the caption",
        {},
    ),
]


def _first_fault(attempt: Callable, cases: list[tuple]) -> str | None:
    """The first case that `attempt` gets wrong, in words, or None; lists and tuples count as the same."""
    for arguments, expected, reason, mistaken in cases:
        shown = ", ".join(map(repr, arguments))
        try:
            value = attempt(*deepcopy(arguments))
        except NotImplementedError:
            raise
        except Exception as error:
            return f"{shown}: {reason}; yours raises {type(error).__name__}: {error}"
        if _tuples(value) != _tuples(expected):
            hint = next((hint for wrong, hint in mistaken.items() if wrong == _tuples(value)), None)
            hint = "does it end in `return …`?" if value is None else hint
            said = f"{shown}: {reason}, so {expected}; yours gives {value!r}"
            return f"{said}; {hint}" if hint else said
    return None


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def gain(attempt: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Exercise 1 of notebook 04: what the candidate ranked first scores above a random one, for each picture."""
    _report(
        lambda: _gain_fault(attempt),
        "For a mean over pictures the random pick needs no dice: its expectation is the mean over the candidates, so "
        "the gain of each picture is one number, and pictures pair up.",
    )


def _gain_fault(attempt: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> str | None:
    similarity = np.array([[0.1, 0.9, 0.2], [0.8, 0.3, 0.8], [-0.5, -0.1, -0.9]])
    score = np.array([[1.0, 4.0, 10.0], [6.0, 0.0, 3.0], [2.0, 2.0, 2.0]])
    first, random = np.array([4.0, 6.0, 2.0]), score.mean(axis=1)
    mistaken = [
        (first, "that is the score of the first, from which random has yet to be taken away"),
        (score.max(axis=1) - random, "that ranks by the score itself, which a ranking by pictures does not know"),
        (np.array([1.0, 0.0, 2.0]) - random, "that takes the drawing least like the picture"),
        (first - score.mean(), "each picture has a random candidate of its own: mean over its row"),
        (np.array([4.0, 3.0, 2.0]) - random, "of equally similar drawings the first counts"),
        (random - first, "that is random minus ranked"),
    ]
    try:
        found = np.asarray(attempt(similarity.copy(), score.copy()), dtype=float)
    except NotImplementedError:
        raise
    except Exception as error:
        return f"for 3 pictures of 3 candidates it raises {type(error).__name__}: {error}"
    if found.shape != (3,):
        return f"3 pictures of 3 candidates have 3 gains; yours has the shape {found.shape}"
    if np.allclose(found, first - random):
        return None
    hints = [hint for wrong, hint in mistaken if np.allclose(found, wrong)]
    shown = f"the gains of three pictures should be {(first - random).round(2)}; yours are {found.round(2)}"
    return "; ".join([shown, *hints[:1]])


def bootstrap(attempt: Callable[[np.ndarray, np.random.Generator], tuple[float, float]]) -> None:
    """Exercise 2 of notebook 04: the 95 % interval of a mean gain, pictures drawn again."""
    _report(
        lambda: _bootstrap_fault(attempt),
        "Drawing the pictures again shows how much the mean would differ had we met other pictures; the spread of "
        "single gains says something else.",
    )


def _bootstrap_fault(attempt: Callable[[np.ndarray, np.random.Generator], tuple[float, float]]) -> str | None:
    gains = np.random.default_rng(3).exponential(size=200)
    expected = mean_interval(gains)
    try:
        low, high = map(float, attempt(gains.copy(), np.random.default_rng(0)))
    except NotImplementedError:
        raise
    except Exception as error:
        return f"for 200 gains it raises {type(error).__name__}: {error}"
    width = expected.high - expected.low
    if max(abs(low - expected.low), abs(high - expected.high)) < 0.15 * width:
        return None
    shown = f"for 200 gains expected about ({expected.low:.2f}, {expected.high:.2f}); yours is ({low:.2f}, {high:.2f})"
    if low > high:
        return f"{shown}; the lower bound comes first"
    if np.isclose(low, high):
        return f"{shown}; drawn without replacement, every sample is the same"
    if high - low > 3 * width:
        return f"{shown}; so far can a single gain lie, but the question is about their mean"
    return f"{shown}; are the bounds the quantiles 0.025 and 0.975 of at least 1000 means of 200 gains each?"


def word_movers(attempt: Callable[[np.ndarray], float]) -> None:
    """Exercise 1 of notebook 05: the cheapest way to move the words of one text to those of another."""
    costs = np.array([[0.0, 0.9, 0.8], [0.2, 1.0, 1.1], [0.7, 0.6, 1.0]])
    mistaken = [
        ((0.0 + 0.2 + 0.6) / 3, "every word goes to its nearest, but then two words go to one and one is left over"),
        (0.2 + 0.6 + 0.8, "that is the sum over the words; each carries one nth of the text"),
        (np.trace(costs) / 3, "that keeps the order of the words, which says nothing to this distance"),
        (costs.mean(), "that is the mean over all pairs, as if each word were torn into equal parts"),
        ((0.0 + 1.1 + 0.6) / 3, "that takes the cheapest pair first; a dearer first pair may make the others cheaper"),
    ]
    _report(
        lambda: _number_fault(lambda: attempt(costs.copy()), (0.2 + 0.6 + 0.8) / 3, mistaken, "3 words of each text"),
        "The distance is the cost of the best plan for the whole text, which no word can choose by itself.",
    )


def frechet(attempt: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]) -> None:
    """Exercise 2 of notebook 05: the Fréchet distance of two Gaussians."""
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    first, second = np.diag([4.0, 1.0]), turn @ np.diag([9.0, 1.0]) @ turn.T
    means = np.array([1.0, 2.0]), np.array([1.0, -1.0])
    spread = np.trace(first + second)
    shared = np.sqrt(np.linalg.eigvals(first @ second)).real.sum()
    mistaken = [
        (9 + spread - 2 * np.sqrt(first @ second).trace(), "the root of a matrix is not the root of its numbers"),
        (9 + spread - 2 * np.trace(first @ second), "the root of the product is missing"),
        (3 + spread - 2 * shared, "the distance of the means is squared"),
        (spread - 2 * shared, "the means count, too"),
        (9 + spread - shared, "the root is taken twice"),
    ]
    _report(
        lambda: _number_fault(
            lambda: attempt(means[0], first, means[1], second), 9 + spread - 2 * shared, mistaken, "two Gaussians"
        ),
        "FID is this, with Inception's features: of a set of pictures it sees the mean and the spread, nothing else.",
    )


def _number_fault(
    attempt: Callable[[], float], expected: float, mistaken: list[tuple[float, str]], what: str
) -> str | None:
    try:
        found = float(np.asarray(attempt()).real)
    except NotImplementedError:
        raise
    except Exception as error:
        return f"for {what} it raises {type(error).__name__}: {error}"
    if isclose(found, expected, rel_tol=1e-5):
        return None
    hints = [hint for wrong, hint in mistaken if isclose(found, wrong, rel_tol=1e-5)]
    return "; ".join([f"for {what} expected {expected:.3f}; yours is {found:.3f}", *hints[:1]])


def soft_embedding(attempt: Callable) -> None:
    """Exercise 1 of notebook 03: expected embeddings, (T, V) and (V, d) -> (T, d)."""
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    cases = [
        (torch.eye(5)[[4, 1]], table[[4, 1]], "one-hot rows give back rows of the table"),
        (torch.full((2, 5), 0.2), table.mean(0).expand(2, -1), "equal shares give the mean of all rows"),
    ]
    _report(
        lambda: _embedding_fault(attempt, table, cases),
        "A text encoder that looks words up can read averages of words, and looking up is the case of certainty.",
    )


def _embedding_fault(attempt: Callable, table: torch.Tensor, cases: list[tuple]) -> str | None:
    for distributions, expected, reason in cases:
        try:
            found = attempt(distributions.clone(), table.clone())
        except NotImplementedError:
            raise
        except Exception as error:
            return f"{reason}; yours raises {type(error).__name__}: {error}"
        if not isinstance(found, torch.Tensor):
            return f"it gives {found!r}, not a tensor: does it end in `return …`?"
        if found.shape != expected.shape:
            return f"two places and a table of 3 columns make {tuple(expected.shape)}; yours has {tuple(found.shape)}"
        if not torch.allclose(found, expected, atol=1e-5):
            return f"{reason}, so {expected.tolist()}; yours gives {found.tolist()}"
    return None


# (p_t of the source places, expected: departures and who stays, why; answers wrong in a known way)
_DEPARTURES = [
    (([0.75, 1.0, 1.0],), ([0.25, 0.0, 0.0], 0.75), "only the first place hesitates", {}),
    (
        ([0.5, 0.5],),
        ([0.5, 0.25], 0.25),
        "who departs at the second place has passed the first",
        {
            ((0.5, 0.5), 0.25): "together 1.25: the second place counts those who had left before",
            ((0.5, 0.5), 0.5): "together 1.5: each place counts as if it were the only one",
            ((0.5, 0.25), 0.5): "together 1.25: to stay is to keep the path at both places",
        },
    ),
    (
        ([0.75, 0.5, 0.75],),
        ([0.25, 0.375, 0.09375], 0.28125),
        "who departs at the third place has passed both before it",
        {((0.25, 0.375, 0.125), 0.28125): "0.125 forgets those who had left at the first place"},
    ),
    (([],), ([], 1.0), "there is no place to depart at, and the path is kept", {}),
]


def departures(attempt: Callable[[list[float]], tuple[list[float], float]]) -> None:
    """Exercise 2 of notebook 03: the weights of one target place."""
    _report(
        lambda: _first_fault(lambda kept: _plain_numbers(attempt(kept)), _DEPARTURES),
        "What departs and what stays make 1 together, whatever the probabilities: the map loses and makes nothing.",
    )


def _plain_numbers(value):
    """Tensors, arrays and tuples as lists and floats, which compare and print as one reads them."""
    value = value.tolist() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value
    if isinstance(value, (list, tuple)):
        return list(map(_plain_numbers, value))
    return round(value, 9) if isinstance(value, float) else value


def clean_picture(attempt: Callable[[float, float, float], float]) -> None:
    """Exercise 2 of notebook 06: z_t, the noise that was predicted, ᾱ_t -> ẑ_0."""
    clean, noise, kept = 2.0, -1.5, 0.36
    noised = kept**0.5 * clean + (1 - kept) ** 0.5 * noise
    mistaken = [
        (noised - (1 - kept) ** 0.5 * noise, "what is left of z is √ᾱ_t as large: divide"),
        ((noised - (1 - kept) ** 0.5 * noise) / kept, "z_t holds √ᾱ_t of z: divide by the root"),
        ((noised - (1 - kept) * noise) / kept**0.5, "z_t holds √(1−ᾱ_t) of the noise: the root is missing"),
        ((noised + (1 - kept) ** 0.5 * noise) / kept**0.5, "the noise was added: take it away"),
        (noised - noise, "both parts are weighted by the schedule"),
    ]
    _report(
        lambda: _number_fault(lambda: attempt(noised, noise, kept), clean, mistaken, "a z of 2, noised with −1.5"),
        "Whoever knows the noise knows the picture, in one step; how well, depends on how much of it was left.",
    )


def caption_loss(attempt: Callable) -> None:
    """Exercise 1 of notebook 06: (B, T) log-probabilities of captions' pieces, padded, and which of them count."""
    spent = torch.tensor([[-1.0, -2.0, -4.0, -3.0], [-0.5, -1.5, -9.0, -7.0]])
    counts = torch.tensor([[True, True, True, True], [True, True, False, False]])
    mistaken = [
        (28 / 8, "padding is no part of a caption"),
        (12 / 8, "padding is left out of the sum, but counted in the mean"),
        (12, "the stock models give the mean over pieces, not their sum"),
        ((10 / 4 + 1) / 2, "that is the mean of each caption's mean, where a short one weighs as much as a long one"),
        (-2, "a likely caption should have a small loss: the sign"),
    ]
    _report(
        lambda: _number_fault(lambda: attempt(spent.clone(), counts.clone()), 2.0, mistaken, "two captions"),
        "Every piece counts once, the end too, padding never; so parts of a batch can be summed to the whole.",
    )


# (paper's scores, ours, expected, why; answers wrong in a known way)
_ORDERS = [
    (([3.0, 2.0, 1.0], [30.0, 20.0, 10.0]), 1.0, "the same order agrees on all pairs", {}),
    (([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]), -1.0, "the order turned over agrees on none", {0.0: "disagreement counts −1"}),
    (
        ([5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 3.0, 4.0, 2.0, 1.0]),
        0.8,
        "one of ten pairs is the other way round: (9 − 1) / 10",
        {0.9: "that is the share that agrees: take off those that do not", 8.0: "divide by the number of pairs"},
    ),
    (([2.0, 1.0], [5.0, 5.0]), 0.0, "a tie agrees with nothing and disagrees with nothing", {}),
]


def kendall_tau(attempt: Callable[[list[float], list[float]], float]) -> None:
    """Exercise 1 of notebook 07: agreement of two orders."""
    _report(
        lambda: _first_fault(lambda *scores: _plain_numbers(attempt(*scores)), _ORDERS),
        "τ looks at orders alone: how far apart two scores lie, it cannot tell.",
    )
