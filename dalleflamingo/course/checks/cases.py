"""An exercise is a few cases with known answers; common wrong answers have a hint of their own."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isclose

import numpy as np
import torch


@dataclass(frozen=True)
class Case:
    """Arguments of an exercise with the right answer.

    Attributes:
        arguments: of the learner's function, which gets a copy.
        expected: the right answer: a number, tokens, or lists, arrays and tensors of them.
        reason: why it is right, in words.
        mistakes: wrong answers, or tests that recognise them, each with a hint; the first that fits is shown.
        tolerance: by which each number may differ, beside 1e-5 of its size.
        measured: what of the answer is compared, where several answers are right; None: all of it.
    """

    arguments: tuple
    expected: object
    reason: str
    mistakes: Sequence[tuple[object, str]] = ()
    tolerance: float = 1e-9
    measured: Callable | None = None


NOT_DONE = "Not done yet, and nothing below waits for it."


def check(attempt: Callable, cases: Sequence[Case], shown: str, show_arguments: bool = False) -> bool:
    """Print one line: not done, the first case that is wrong, or `shown`; whether the answer is right.

    Args:
        attempt: the learner's function.
        cases: with the right answers.
        shown: what a right answer has shown.
        show_arguments: of a case that is wrong.
    """
    try:
        faults = (fault for case in cases if (fault := _fault(attempt, case, show_arguments)))
        fault = next(faults, None)
    except NotImplementedError:
        print(NOT_DONE)
        return False
    print(f"Not yet: {fault}" if fault else f"Right. {shown}")
    return not fault


def _fault(attempt: Callable, case: Case, show_arguments: bool) -> str | None:
    """What is wrong with the answer to one case, or None."""
    expected = _plain(case.expected)
    shown = ", ".join(_short(_plain(argument)) for argument in case.arguments) + ": " if show_arguments else ""
    wanted = f"{shown}{case.reason}, so {_short(expected)}"
    given = [deepcopy(argument) for argument in case.arguments]
    try:
        answer = attempt(*given)
        found = _plain(case.measured(answer) if case.measured and answer is not None else answer)
    except NotImplementedError:
        raise
    except Exception as error:
        return f"{wanted}; yours raises {type(error).__name__}: {error}".splitlines()[0]
    if _equal(found, expected, case.tolerance):
        return _changed(case.arguments, given)
    if found is None:
        return f"{wanted}; yours gives None: does it end in `return …`?"
    shapes = _shape(expected), _shape(found)
    alike = None in shapes or shapes[0] == shapes[1]  # a test of a mistake takes an answer of the right shape
    hints = [
        hint
        for wrong, hint in case.mistakes
        if (alike and wrong(found) if callable(wrong) else _equal(found, _plain(wrong)))
    ]
    if alike:
        said = f"{wanted}; yours gives {_short(found)}"
    else:
        said = f"{wanted}, of the shape {shapes[0]}; yours has the shape {shapes[1]}"
    return "; ".join([said, *hints[:1]])


def _changed(before: Sequence, after: Sequence) -> str | None:
    """What is wrong where a call has changed one of its arguments, which later cells pass again; else None."""
    for number, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        holds_values = isinstance(old, (torch.Tensor, np.ndarray, list, dict, set))
        if holds_values and _plain(old) != _plain(new):
            copy = "clone" if isinstance(old, torch.Tensor) else "copy"
            which = f"argument {number}" if len(before) > 1 else "its argument"
            return f"your function changes {which} itself, and later cells use it again: work on a copy (`.{copy}()`)"
    return None


def _plain(value):
    """Tensors, arrays and tuples as lists, numbers as floats, which compare and print as one reads them."""
    value = value.tolist() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, complex):
        return value.real
    if isinstance(value, bool):
        return value
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
