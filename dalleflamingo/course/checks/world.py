"""Notebook 00: how often the way back finds the true caption, and what is true of an image."""

from collections.abc import Callable

from dalleflamingo.course.checks.cases import NOT_DONE, Case, check
from dalleflamingo.evaluation.intervals import Interval

Claims = set[tuple[str, ...]]
Score = Callable[[Claims, Claims], float]
CHANCE = 0.2  # that a blind guess finds the true one of five captions

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


def share_ranked_first(guess: float | None, measured: Interval) -> None:
    """Notebook 00, exercise 1: a prediction, held against the measurement that follows it.

    Args:
        guess: in which share of the scenes the true caption's image is the one most like the original; None: no guess.
        measured: that share.
    """
    found = f"the measured share is {measured.value:.2f}, with the interval [{measured.low:.2f}, {measured.high:.2f}]"
    if guess is None:
        print(NOT_DONE)
    elif not isinstance(guess, (int, float)) or not 0 <= guess <= 1:
        print(f"Not yet: a share is a number from 0 to 1, so 60 % is 0.6; yours is {guess!r}")
    elif measured.low <= guess <= measured.high:
        print(f"Right. Your {guess:.2f} agrees with the measurement: {found}.")
    elif guess <= CHANCE:
        print(f"Not so: {guess:.2f} is no more than a blind guess among five captions reaches, but {found}")
    elif guess < measured.low:
        print(f"Not so: {guess:.2f} is too low, {found}. Most planted errors become visible in the image")
    else:
        print(f"Not so: {guess:.2f} is too high, {found}. The generator errs too, and an encoder overlooks details")


def f1(attempt: Score) -> Score:
    """Notebook 00, exercise 2: F1 of a caption's claims against the facts of an image.

    Args:
        attempt: (claims, facts) -> F1 in [0, 1].
    Returns:
        the function that later cells use: the learner's once it is right, else the course's.
    """

    def ours(claims: Claims, facts: Claims) -> float:
        return 2 * len(claims & facts) / (len(claims) + len(facts))

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
    shown = (
        "F1 is the harmonic mean of precision and recall: 1 for all facts and nothing else, 0 without a hit, and close "
        "to the lower of the two. A caption gains neither by saying little nor by guessing much."
    )
    return attempt if check(attempt, cases, shown) else ours
