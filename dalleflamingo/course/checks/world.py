"""Notebook 00: what is true of an image."""

from collections.abc import Callable

from dalleflamingo.course.checks.cases import Case, check

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
    check(
        attempt,
        cases,
        "F1 is the harmonic mean of precision and recall: 1 for all facts and nothing else, 0 without a hit, and close "
        "to the lower of the two. A caption gains neither by saying little nor by guessing much.",
    )
