"""Checks of the exercises: not done yet, one calm line; wrong, in which way; right, what that proves.

A check prints and never raises, so that a notebook runs to its end whatever state its exercises are in.
"""

from collections.abc import Callable
from math import isclose

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
