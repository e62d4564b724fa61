"""Every state of an exercise gets its answer, and none stops the notebook."""

import pytest

from dalleflamingo import checks, scene_graph
from dalleflamingo.scene_graph import Scene, Thing


def right(claims, facts):
    hits = len(claims & facts)
    return 2 * hits / (len(claims) + len(facts))


def not_done(claims, facts):
    raise NotImplementedError


def precision(claims, facts):
    return len(claims & facts) / len(claims)


def recall(claims, facts):
    return len(claims & facts) / len(facts)


def arithmetic(claims, facts):
    return (precision(claims, facts) + recall(claims, facts)) / 2


def union(claims, facts):
    return len(claims & facts) / len(claims | facts)


def divides_by_hits(claims, facts):
    p, r = precision(claims, facts), recall(claims, facts)
    return 2 * p * r / (p + r)


def changes_its_input(claims, facts):
    facts.clear()
    return 1.0


def returns_nothing(claims, facts):
    right(claims, facts)


ANSWERS = [
    (right, "Right. F1 is the harmonic mean"),
    (not_done, "Not done yet"),
    (precision, "that is precision"),
    (recall, "that is recall"),
    (arithmetic, "arithmetic mean"),
    (union, "union"),
    (divides_by_hits, "0.000; yours raises ZeroDivisionError"),
    (changes_its_input, "so 0.333; yours gives 1.000"),
    (returns_nothing, "`return …`"),
]


@pytest.mark.parametrize(("attempt", "answer"), ANSWERS, ids=[attempt.__name__ for attempt, _ in ANSWERS])
def test_each_state_of_the_f1_exercise_gets_one_line_of_answer(capsys, attempt, answer):
    checks.f1(attempt)
    [line] = capsys.readouterr().out.splitlines()
    assert answer in line


def test_the_exercise_scores_a_caption_as_the_package_does():
    things = (Thing("cat", "red", "small", 16, 32), Thing("boat", "blue", "large", 48, 32))
    claims = {("cat",), ("cat", "red"), ("boat",), ("cat", "left", "boat"), ("grass",)}
    caption = "a red cat to the left of a boat on the grass"
    assert scene_graph.f1(caption, Scene("grass", things)) == pytest.approx(right(claims, checks.FACTS)) == 10 / 13
