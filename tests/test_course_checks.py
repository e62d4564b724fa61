"""Every state of an exercise gets its answer, and none stops the notebook."""

from itertools import permutations

import numpy as np
import pytest
import tiny
import torch

from dalleflamingo.course import checks
from dalleflamingo.course.checks import world
from dalleflamingo.evaluation.vocabulary_report import clip_tokenizer, report, wordpiece_tokenizer
from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.scene_graph import Scene, Thing
from dalleflamingo.vocabulary import VocabularyMap


def right(claims, facts):
    hits = len(claims & facts)
    return 2 * hits / (len(claims) + len(facts))


def not_done(*arguments):
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


def rewards_a_lone_mistake(claims, facts):
    return 1.0 if len(claims) == 1 else right(claims, facts)


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
    (divides_by_hits, "so 0; yours raises ZeroDivisionError"),
    (rewards_a_lone_mistake, "one claim, and it is wrong"),
    (changes_its_input, "so 0.333; yours gives 1"),
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
    assert scene_graph.f1(caption, Scene("grass", things)) == pytest.approx(right(claims, world.FACTS)) == 10 / 13


# ── notebook 04 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def gain(similarity, score):
    return score[np.arange(len(score)), similarity.argmax(axis=1)] - score.mean(axis=1)


GAINS = [
    (gain, "Right. For a mean over images"),
    (not_done, "Not done yet"),
    (lambda similarity, score: score[np.arange(3), similarity.argmax(axis=1)], "without the random one subtracted"),
    (lambda similarity, score: score.max(axis=1) - score.mean(axis=1), "ranks by the score itself"),
    (lambda similarity, score: gain(-similarity, score), "least like the input"),
    (lambda similarity, score: gain(similarity, score) + score.mean(axis=1) - score.mean(), "mean over its row"),
    (lambda similarity, score: -gain(similarity, score), "random minus ranked"),
    (lambda similarity, score: gain(similarity, score).mean(), "has the shape ()"),
    (lambda similarity, score: similarity.index(1), "raises AttributeError"),
]


@pytest.mark.parametrize(("attempt", "said"), GAINS)
def test_a_gain_is_told_what_is_wrong_with_it(attempt, said, capsys):
    checks.gain_over_random(attempt)
    assert said in capsys.readouterr().out


def bootstrap(gains, rng, size=(1000, 200)):
    means = rng.choice(gains, size=size).mean(axis=1)
    return tuple(np.quantile(means, [0.025, 0.975]))


INTERVALS = [
    (bootstrap, "Right. Resampling the images"),
    (not_done, "Not done yet"),
    (lambda gains, rng: bootstrap(gains, rng)[::-1], "the lower bound comes first"),
    (lambda gains, rng: (rng.permutation(gains).mean(),) * 2, "every sample is the same"),
    (lambda gains, rng: np.quantile(gains, [0.025, 0.975]), "the question is about their mean"),
    (lambda gains, rng: bootstrap(gains, rng, size=(1000, 100)), "at least 1000 means of 200 gains each"),
    (lambda gains, rng: bootstrap(gains, rng)[0], "has the shape ()"),
    (lambda gains, rng: gains["low"], "raises IndexError"),
]


@pytest.mark.parametrize(("attempt", "said"), INTERVALS)
def test_an_interval_is_told_what_is_wrong_with_it(attempt, said, capsys):
    checks.bootstrap_interval(attempt)
    assert said in capsys.readouterr().out


# ── notebook 05 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def movers(costs):
    return min(costs[range(len(costs)), order].mean() for order in map(list, permutations(range(len(costs)))))


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (movers, "Right. The distance is the cost of the best plan"),
        (not_done, "Not done yet"),
        (lambda costs: costs.min(axis=1).mean(), "two words go to one"),
        (lambda costs: 3 * movers(costs), "each carries one nth"),
        (lambda costs: costs.trace() / 3, "keeps the order"),
        (lambda costs: costs.mean(), "divided into equal parts"),
        (lambda costs: (0 + 1.1 + 0.6) / 3, "cheapest pair first"),
        (lambda costs: costs[9], "raises IndexError"),
    ],
)
def test_a_distance_of_texts_is_told_what_is_wrong_with_it(attempt, said, capsys):
    checks.word_movers_distance(attempt)
    assert said in capsys.readouterr().out


def frechet(m1, s1, m2, s2, root=lambda s: np.sqrt(np.linalg.eigvals(s)).sum()):
    return ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * root(s1 @ s2)


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (frechet, "Right. FID is this"),
        (not_done, "Not done yet"),
        (lambda *given: frechet(*given, root=lambda s: np.trace(np.sqrt(s))), "not the root of its numbers"),
        (lambda *given: frechet(*given, root=np.trace), "root of the product is missing"),
        (lambda m1, s1, m2, s2: frechet(m1, s1, m1, s2) + abs(m1 - m2).sum(), "means is squared"),
        (lambda m1, s1, m2, s2: frechet(m1, s1, m1, s2), "means count, too"),
        (lambda *given: "far", "yours gives 'far'"),
        (lambda *given: frechet(*given).item("far"), "raises TypeError"),
    ],
)
def test_a_frechet_distance_is_told_what_is_wrong_with_it(attempt, said, capsys):
    checks.frechet_distance(attempt)
    assert said in capsys.readouterr().out


# ── notebooks 02 and 03 ──────────────────────────────────────────────────────────────────────────────────────────────

BRIDGE = [
    ("02_tokenizer_mapping", "with_word_ends"),
    ("02_tokenizer_mapping", "learn_map"),
    ("02_tokenizer_mapping", "differing_words"),
    ("03_differentiable_bridge", "soft_embedding"),
    ("03_differentiable_bridge", "departures"),
    ("03_differentiable_bridge", "straight_through"),
    ("03_differentiable_bridge", "gumbel_sample"),
    ("03_differentiable_bridge", "gathered"),
]


@pytest.mark.parametrize(("notebook", "name"), BRIDGE)
def test_later_cells_of_the_bridge_get_the_learners_function_once_it_is_right(notebook, name, capsys):
    solution = tiny.printed_solution(notebook, name)
    assert getattr(checks, name)(solution) is solution
    assert all(line.startswith("Right. ") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(("notebook", "name"), BRIDGE)
def test_until_then_they_get_one_of_the_course(notebook, name, capsys):
    ours = getattr(checks, name)(not_done)
    assert capsys.readouterr().out == "Not done yet, and nothing below waits for it.\n"
    assert ours is not not_done and getattr(checks, name)(ours) is ours


def last_pairing(pairs):
    return {s: u for source, target in pairs if len(source) == len(target) for s, u in zip(source, target, strict=True)}


def as_partners(pairs, usable=lambda source, target: len(source) == len(target)):
    printed = tiny.printed_solution("02_tokenizer_mapping", "learn_map")
    return printed(
        [(source[: len(target)], target[: len(source)]) for source, target in pairs if usable(source, target)]
    )


def straight(logits, hard=True, soft=1.0, detached=1.0):
    q = logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(logits.argmax(-1), q.shape[-1])
    return hard * one_hot + soft * q - detached * q.detach()


def departures(kept):
    on_the_path, leaving = 1.0, []
    for stay in kept:
        leaving.append(on_the_path * (1 - stay))
        on_the_path *= stay
    return leaving, on_the_path


WRONG = [
    (
        "with_word_ends",
        lambda tokens: [t.removeprefix("##") + "</w>" for t in tokens],
        "only a token that no ## follows",
    ),
    ("with_word_ends", lambda tokens: [t.removeprefix("##") for t in tokens], "nothing follows the last token"),
    (
        "with_word_ends",
        lambda tokens: [t[2:] if t[:2] == "##" else t + "</w>" for t in tokens],
        "look at the next token",
    ),
    ("learn_map", last_pairing, "the last pairing wins"),
    ("learn_map", lambda pairs: as_partners(pairs, lambda *_: True), "`zip` stops at the shorter side"),
    ("learn_map", lambda pairs: as_partners(pairs, lambda s, u: [t + "</w>" for t in s] == u), "may differ"),
    ("learn_map", lambda pairs: None, "`return …`"),
    (
        "differing_words",
        lambda source, target: [([s], [u]) for s, u in zip(source, target, strict=False) if s != u],
        "compared by position, tokens lose their partners",
    ),
    (
        "differing_words",
        lambda source, target: [(["gi", "raf", "fe</w>"], ["giraffe</w>"])] if "gi" in source else [],
        "have both sides spelled the same number of letters",
    ),
    ("soft_embedding", lambda rows, table: table[rows.argmax(-1)], "that is the likeliest token's row"),
    ("soft_embedding", lambda rows, table: rows.softmax(-1) @ table, "a one-hot row gives back a row of the table"),
    ("soft_embedding", lambda rows, table: (rows @ table).sum(0), "the shape (2, 2); yours has the shape (2,)"),
    ("soft_embedding", lambda rows, table: rows.bmm(table), "yours raises RuntimeError"),
    ("departures", lambda kept: ([1 - p for p in kept], departures(kept)[1]), "counts what had left before"),
    ("departures", lambda kept: ([1 - p for p in kept], min(kept, default=1.0)), "as if it were the only one"),
    ("departures", lambda kept: (departures(kept)[0], min(kept, default=1.0)), "to stay at both positions"),
    (
        "departures",
        lambda kept: ([(kept[i - 1] if i else 1) * (1 - p) for i, p in enumerate(kept)], departures(kept)[1]),
        "forgets what had left at the first position",
    ),
    ("departures", lambda kept: departures(kept)[0], "only the first position is uncertain"),
    ("departures", lambda kept: departures(kept) if kept else None, "no position to leave at"),
    ("departures", lambda kept: kept / 2, "yours raises TypeError"),
    ("straight_through", lambda logits: logits.softmax(-1), "that is soft"),
    ("straight_through", lambda logits: logits.argmax(-1), "each row has a single 1 (`one_hot`)"),
    ("straight_through", lambda logits: straight(logits, detached=0), "so that only the gradient is left"),
    ("straight_through", lambda logits: straight(logits, soft=0, detached=0), "no gradient passes through argmax"),
    (
        "straight_through",
        lambda logits: straight(logits) - logits.softmax(-1) + logits.softmax(-1).detach(),
        "no gradient",
    ),
    ("straight_through", lambda logits: straight(logits, soft=-1, detached=-1), "the sign"),
    ("straight_through", lambda logits: straight(logits, soft=2, detached=2), "counts twice"),
    (
        "straight_through",
        lambda logits: straight(logits, soft=0, detached=0) + logits - logits.detach(),
        "it should go through the softmax",
    ),
    ("gumbel_sample", lambda logits, u: (logits + u).argmax(-1), "uniform noise is not Gumbel noise"),
    ("gumbel_sample", lambda logits, u: (logits + (-u.log()).log()).argmax(-1), "the largest random number decides"),
    ("gumbel_sample", lambda logits, u: u.argmax(-1), "they are not replaced by it"),
    ("gumbel_sample", lambda logits, u: logits - (-u.log()).log(), "yours has the shape (1, 3)"),
    (
        "gumbel_sample",
        lambda logits, u: (logits.exp() - (-u.log()).log()).argmax(-1),
        "the noise belongs to the logits",
    ),
    ("gathered", lambda rows, pairs: rows[:, pairs], "have 0.2 each"),
    ("gathered", lambda rows, pairs: rows[:, pairs] / rows[:, pairs].sum(-1, keepdim=True), "still counts four times"),
    ("gathered", lambda rows, pairs: rows[:, pairs].softmax(-1), "each token is read once"),
    ("gathered", lambda rows, pairs: rows[:, pairs] / len(pairs), "each token is read once"),
    ("gathered", lambda rows, pairs: rows[:, pairs] * (torch.bincount(pairs)[pairs] == 1), "its probability is lost"),
]


@pytest.mark.parametrize(("exercise", "attempt", "said"), WRONG)
def test_exercises_of_the_bridge_are_told_what_is_wrong(exercise, attempt, said, capsys):
    assert getattr(checks, exercise)(attempt) is not attempt
    found = capsys.readouterr().out
    assert "Not yet: " in found and said in found
    assert len(found) < 400 and not any(len(word) > 12 and word.replace(".", "").isdigit() for word in found.split())


def test_a_prediction_is_answered_caption_by_caption(capsys):
    right = tiny.printed_solution("02_tokenizer_mapping", "prediction")
    checks.predicted_arrivals(right)
    assert capsys.readouterr().out.startswith("Right. ")
    checks.predicted_arrivals(dict.fromkeys(right, ""))
    assert "Not done yet" in capsys.readouterr().out
    checks.predicted_arrivals(dict.fromkeys(right, "yes"))
    assert "surf is the beginning of a word here" in capsys.readouterr().out
    checks.predicted_arrivals(dict.fromkeys(right, "no"))
    assert "every token has a partner" in capsys.readouterr().out
    equal_numbers = right | {"A woman on a surfboard.": "no", "A computer, a skateboard.": "yes"}
    checks.predicted_arrivals(equal_numbers)
    assert "7 tokens on both sides" in capsys.readouterr().out


def test_the_predictions_are_what_the_package_finds():
    right = tiny.printed_solution("02_tokenizer_mapping", "prediction")
    wordpiece, clip = wordpiece_tokenizer(), clip_tokenizer()
    six = ["A dog and a cat on a chair.", "A girl in a skate park.", "Two boys surf near a pier."]
    six += ["A woman can surf on a wave.", "A surfboard on the sand.", "A dog catches a frisbee."]
    learned = VocabularyMap.learn(wordpiece, clip, six, "one-to-one")
    assert {text: report(learned, [text]).exact.value for text in right} == {
        text: float(answer == "yes") for text, answer in right.items()
    }


# ── notebooks 06 and 07 ──────────────────────────────────────────────────────────────────────────────────────────────

PRINTED = [  # check, notebook, name of the function there
    ("caption_loss", "06_cycle_finetuning", "caption_loss"),
    ("clean_latents", "06_cycle_finetuning", "clean_latents"),
    ("kendall_tau", "07_ablations", "kendall_tau"),
]


@pytest.mark.parametrize(("check", "notebook", "name"), PRINTED)
def test_printed_solutions_of_the_cycle_are_right(check, notebook, name, capsys):
    getattr(checks, check)(tiny.printed_solution(notebook, name))
    assert capsys.readouterr().out.startswith("Right.")
    getattr(checks, check)(not_done)
    assert "Not done yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exercise", "attempt", "said"),
    [
        ("caption_loss", lambda s, c: -s.mean(), "padding is no part"),
        ("caption_loss", lambda s, c: -(s * c).mean(), "counted in the mean"),
        ("caption_loss", lambda s, c: -s[c].sum(), "not their sum"),
        ("caption_loss", lambda s, c: (-(s * c).sum(1) / c.sum(1)).mean(), "a short one weighs as much"),
        ("caption_loss", lambda s, c: s[c].mean(), "the sign"),
        ("clean_latents", lambda z, e, a: z - (1 - a) ** 0.5 * e, "divide"),
        ("clean_latents", lambda z, e, a: (z - (1 - a) ** 0.5 * e) / a, "divide by the root"),
        ("clean_latents", lambda z, e, a: (z - (1 - a) * e) / a**0.5, "the root is missing"),
        ("clean_latents", lambda z, e, a: (z + (1 - a) ** 0.5 * e) / a**0.5, "take it away"),
        ("clean_latents", lambda z, e, a: z - e, "weighted by the schedule"),
        ("kendall_tau", lambda a, b: 1.0, "agrees on none"),
        ("kendall_tau", lambda a, b: tau(a, b) * (10 if len(a) == 5 else 1), "divide by the number of pairs"),
        ("kendall_tau", lambda a, b: tau(a, b) / 2 + 0.5, "disagreement counts −1"),
    ],
)
def test_exercises_of_the_cycle_are_told_what_is_wrong(exercise, attempt, said, capsys):
    getattr(checks, exercise)(attempt)
    found = capsys.readouterr().out
    assert not found.startswith("Right.") and said in found


def tau(paper, ours):
    return tiny.printed_solution("07_ablations", "kendall_tau")(paper, ours)


# ── notebook 01 ──────────────────────────────────────────────────────────────────────────────────────────────────────

MODELS = ["nucleus", "noised", "clean_from_velocity", "denoising_step", "guided"]


@pytest.mark.parametrize("name", MODELS)
def test_later_cells_get_the_learners_function_once_it_is_right(name, capsys):
    solution = tiny.printed_solution("01_how_the_models_work", name)
    assert getattr(checks, name)(solution) is solution
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize("name", MODELS)
def test_until_then_they_get_one_that_is_right(name, capsys):
    ours = getattr(checks, name)(not_done)
    assert "Not done yet" in capsys.readouterr().out
    assert ours is not not_done and getattr(checks, name)(ours) is ours
    assert capsys.readouterr().out.startswith("Right.")


def of_sorted(keep):
    """A nucleus that keeps the sorted tokens where `keep(cumulated, value, p)`."""

    def nucleus(probabilities, p):
        ordered, ids = probabilities.sort(descending=True)
        ordered[~keep(ordered.cumsum(0), ordered, p)] = 0
        return torch.zeros_like(probabilities).scatter(0, ids, ordered / ordered.sum())

    return nucleus


@pytest.mark.parametrize(
    ("exercise", "attempt", "said"),
    [
        ("nucleus", of_sorted(lambda mass, value, p: mass <= p), "the token that reaches p belongs"),
        ("nucleus", lambda q, p: q * (q > 0.1), "sum to 1 again"),
        ("nucleus", lambda q, p: torch.nn.functional.one_hot(q.argmax(), len(q)).float(), "greedy"),
        ("nucleus", lambda q, p: q, "all tokens are left"),
        ("noised", lambda z, e, a: a * z + (1 - a) * e, "the roots are missing"),
        ("noised", lambda z, e, a: (1 - a) ** 0.5 * z + a**0.5 * e, "swapped"),
        ("noised", lambda z, e, a: z + e, "weighted"),
        ("clean_from_velocity", lambda z, v, a: a**0.5 * z + (1 - a) ** 0.5 * v, "sign"),
        ("clean_from_velocity", lambda z, v, a: (z - (1 - a) ** 0.5 * v) / a**0.5, "predicts ε"),
        ("clean_from_velocity", lambda z, v, a: (1 - a) ** 0.5 * z + a**0.5 * v, "the other unknown"),
        ("denoising_step", lambda z, c, a, b: c, "only part of the way"),
        ("denoising_step", lambda z, c, a, b: b**0.5 * c + (1 - b) ** 0.5 * z, "take out the noise"),
        ("denoising_step", lambda z, c, a, b: z, "which ᾱ belongs to the step before"),
        ("guided", lambda u, c, s: c + s * (c - u), "begin at the prediction without"),
        ("guided", lambda u, c, s: u + s * c, "the difference of the two"),
        ("guided", lambda u, c, s: s * c, "only the difference"),
        ("guided", lambda u, c, s: c + s * (u - c), "swapped"),
    ],
)
def test_exercises_of_the_models_are_told_what_is_wrong(exercise, attempt, said, capsys):
    assert getattr(checks, exercise)(attempt) is not attempt
    found = capsys.readouterr().out
    assert found.startswith("Not yet") and said in found
