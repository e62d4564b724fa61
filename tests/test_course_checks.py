"""Every state of an exercise gets its answer, and none stops the notebook."""

import math
from itertools import permutations

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from scipy.linalg import sqrtm

from dalleflamingo.course import checks
from dalleflamingo.course.checks import cases, world
from dalleflamingo.evaluation.intervals import Interval, mean_interval
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
    (changes_its_input, "changes argument 2 itself"),
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


MEASURED = Interval(0.83, 0.64, 0.93, 24, None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0, 2.0, 3.0], "Right. all"),
        ([6.0], "of the shape (3,); yours has the shape (1,); it is a sum"),
        ([5.0], "of the shape (3,); yours has the shape (1,)"),
        ([1.0, 2.0, 4.0], "yours gives [1, 2, 4]; the last is too large"),
    ],
)
def test_an_answer_of_another_shape_gets_its_hint_too(answer, said, capsys):
    mistakes = [(lambda found: found[2] > 3, "the last is too large"), ([6.0], "it is a sum")]
    case = cases.Case((), [1.0, 2.0, 3.0], "three numbers", mistakes)
    cases.check(lambda: answer, [case], "all")
    assert capsys.readouterr().out.strip().endswith(said)


def negated_in_place(values):
    values *= -1
    return values


def sorted_in_place(values):
    values.sort()
    return values


def widened_in_place(values):
    values |= {2}
    return values


@pytest.mark.parametrize(
    ("attempt", "argument", "right", "copy"),
    [
        (negated_in_place, torch.tensor([1.0, -2.0]), [-1, 2], "clone"),
        (negated_in_place, np.array([[1.0], [-2.0]]), [[-1], [2]], "copy"),
        (sorted_in_place, [2, 1], [1, 2], "copy"),
        (widened_in_place, {1}, {1, 2}, "copy"),
    ],
    ids=["tensor", "array", "list", "set"],
)
def test_a_right_answer_that_changes_its_argument_is_told_so(attempt, argument, right, copy, capsys):
    one, other = cases.Case((argument,), right, "so it is"), cases.Case((0, argument), right, "so it is")
    assert not cases.check(attempt, [one], "all") and not cases.check(lambda n, values: attempt(values), [other], "all")
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(
        f"your function changes its argument itself, and later cells use it again: work on a copy (`.{copy}()`)"
    )
    assert "changes argument 2 itself" in second
    assert cases.check(lambda values: attempt(values.clone() if copy == "clone" else values.copy()), [one], "all")


def test_a_generator_of_random_numbers_may_move_on(capsys):
    case = cases.Case((np.random.default_rng(0),), np.random.default_rng(0).uniform(), "one number is drawn")
    assert cases.check(lambda rng: rng.uniform(), [case], "all")


@pytest.mark.parametrize(
    ("guess", "said"),
    [
        (None, "Not done yet"),
        (0.85, "Right. Your 0.85 agrees"),
        (0.64, "Right. "),
        (85, "60 % is 0.6; yours is 85"),
        ("0.85", "a share is a number"),
        (0.2, "Not so: 0.20 is no more than a blind guess"),
        (0.5, "Not so: 0.50 is too low"),
        (1.0, "Not so: 1.00 is too high"),
    ],
)
def test_a_prediction_is_held_against_the_measurement(guess, said, capsys):
    checks.share_ranked_first(guess, MEASURED)
    [line] = capsys.readouterr().out.splitlines()
    assert said in line
    if isinstance(guess, float):
        assert "0.83" in line and "[0.64, 0.93]" in line


# ── what later cells of notebooks 00, 04 and 05 use ──────────────────────────────────────────────────────────────────

HANDED_BACK = [  # check, notebook, name of the function there
    ("f1", "00_the_question", "f1"),
    ("ngram_cosine", "04_image_text_image", "ngram_cosine"),
    ("gain_over_random", "04_image_text_image", "gain"),
    ("bootstrap_interval", "04_image_text_image", "interval"),
    ("control", "04_image_text_image", "control"),
    ("spearman", "04_image_text_image", "spearman"),
    ("word_movers_distance", "05_text_image_text", "word_movers"),
    ("frechet_distance", "05_text_image_text", "frechet"),
    ("paired_interval", "05_text_image_text", "gain_interval"),
    ("text_similarity", "05_text_image_text", "my_similarity"),
]


@pytest.mark.parametrize(("exercise", "notebook", "name"), HANDED_BACK)
def test_a_right_answer_is_handed_back_and_until_then_one_of_ours(exercise, notebook, name, capsys):
    check, solution = getattr(checks, exercise), tiny.printed_solution(notebook, name)
    assert check(solution) is solution
    assert capsys.readouterr().out.startswith("Right. ")
    ours = check(not_done)
    assert "Not done yet" in capsys.readouterr().out
    assert ours is not not_done and check(ours) is ours
    assert capsys.readouterr().out.startswith("Right. ")


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


def cosine(power=2, clipped=True, root=0.5):
    """The solution of the first exercise, with a power of idf, a clipping and a root of the norms of one's own."""

    def attempt(candidate, reference, idf):
        shared = sum(
            (min(n, reference[gram]) if clipped else n) * reference[gram] * idf[gram] ** power
            for gram, n in candidate.items()
        )
        weights = idf if power else dict.fromkeys(idf, 1)
        norms = [sum((n * weights[gram]) ** 2 for gram, n in text.items()) for text in (candidate, reference)]
        return shared / (norms[0] * norms[1]) ** root if shared else 0.0

    return attempt


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (cosine(), "Right. A shared n-gram"),
        (cosine(clipped=False), "its count is clipped at the reference's"),
        (cosine(power=0), "a rare one should weigh more"),
        (cosine(power=0, clipped=False), "a rare one should weigh more"),
        (cosine(power=1), "a shared n-gram has its idf twice"),
        (cosine(root=1), "the root of the sum of its squares"),
        (cosine(root=0), "divide by the lengths of both vectors"),
        (lambda candidate, reference, idf: float(sum(candidate.values()) > 2), "so 0.343; yours gives 1"),
    ],
)
def test_a_cosine_of_ngrams_is_told_what_is_wrong_with_it(attempt, said, capsys):
    checks.ngram_cosine(attempt)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda similarity: np.roll(similarity, -2, axis=0), "Right. The control differs"),
        (lambda similarity: similarity, "take the rows of other images"),
        (lambda similarity: np.random.default_rng(0).permutation(similarity), "a permutation may leave some images"),
        (lambda similarity: similarity[::-1], "a permutation may leave some images"),
        (lambda similarity: np.random.default_rng(0).uniform(size=similarity.shape), "a control changes one thing"),
        (lambda similarity: np.random.default_rng(0).permuted(similarity, axis=1), "a shuffle within the row"),
        (lambda similarity: similarity[:, ::-1], "a shuffle within the row"),
        (lambda similarity: np.roll(similarity, 1, axis=0)[:, ::-1], "keep each row whole"),
        (lambda similarity: -similarity, "a control changes one thing"),
        (lambda similarity: similarity[1:], "4 images have 4 rows"),
        (lambda similarity: None, "`return …`"),
    ],
)
def test_a_control_is_told_what_is_wrong_with_it(attempt, said, capsys):
    checks.control(attempt)
    assert said in capsys.readouterr().out


def pearson(x, y):
    return np.corrcoef(x, y)[0, 1]


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda x, y: stats.spearmanr(x, y).statistic, "Right. ρ sees the order alone"),
        (pearson, "Pearson's correlation of the values"),
        (lambda x, y: pearson(x.argsort(), y.argsort()), "not the ranks of the values"),
        (lambda x, y: pearson(x.argsort().argsort(), y.argsort().argsort()), "share the mean of their ranks"),
        (lambda x, y: stats.kendalltau(x, y).statistic, "as Kendall's τ does"),
        (lambda x, y: -stats.spearmanr(x, y).statistic, "the sign is the other way round"),
        (
            lambda x, y: 1 - 6 * ((stats.rankdata(x) - stats.rankdata(y)) ** 2).sum() / (len(x) ** 3 - len(x)),
            "holds without ties only",
        ),
    ],
)
def test_a_rank_correlation_is_told_what_is_wrong_with_it(attempt, said, capsys):
    checks.spearman(attempt)
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


def frechet(m1, s1, m2, s2, root=lambda s: np.sqrt(np.linalg.eigvals(s).astype(complex)).real.sum()):
    return ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * root(s1 @ s2)


def roots_of_rounded(s):
    """Rounding takes some eigenvalues below 0, as LAPACK does on most machines; where it does not, this does."""
    eigenvalues = np.linalg.eigvals(s).real
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.where(abs(eigenvalues) < 1e-12, -1e-16, eigenvalues)).sum()


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (frechet, "Right. FID is this"),
        (lambda *given: frechet(*given, root=lambda s: np.trace(sqrtm(s)).real), "Right. FID is this"),
        (lambda *given: frechet(*given, root=roots_of_rounded), "`.astype(complex)`"),
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


def paired(first, random, rng):
    return bootstrap(first - random, rng, size=(1000, len(first)))


def in_two_draws(first, random, rng):
    means = [rng.choice(first, len(first)).mean() - rng.choice(random, len(random)).mean() for _ in range(1000)]
    return tuple(np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (paired, "Right. Both scores of a caption"),
        (in_two_draws, "that got into the interval"),
        (lambda first, random, rng: paired(first, random, rng)[::-1], "the lower bound comes first"),
        (lambda first, random, rng: ((first - random).mean(),) * 2, "every sample is the same"),
        (lambda first, random, rng: np.quantile(first - random, [0.025, 0.975]), "the question is about their mean"),
        (lambda first, random, rng: paired(np.sort(first), np.sort(random), rng), "Sorting them apart"),
        (lambda first, random, rng: paired(first, random, rng)[0], "has the shape ()"),
    ],
)
def test_the_bug_is_found_only_where_pairs_stay_together(attempt, said, capsys):
    checks.paired_interval(attempt)
    assert said in capsys.readouterr().out


def test_the_exercise_gives_the_interval_of_the_package():
    rng = np.random.default_rng(7)
    random = rng.uniform(size=80)
    first = random + 0.1 * rng.exponential(size=80)
    ours, package = checks.paired_interval(not_done)(first, random, rng), mean_interval(first - random)
    assert ours == pytest.approx((package.low, package.high), abs=0.15 * (package.high - package.low))


def shared_words(source, text):
    return len(set(source.split()) & set(text.split()))


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (shared_words, "Right. It is a similarity"),
        (lambda source, text: -shared_words(source, text), "that is a distance"),
        (lambda source, text: len(source), "the same for all texts"),
        (lambda source, text: shared_words(source, text) / len(text.split()), "raises ZeroDivisionError"),
        (lambda source, text: float(text.startswith("a red")), "yours gives [1.5, 1.5, 3]"),
    ],
)
def test_a_similarity_of_ones_own_is_told_what_is_wrong_with_it(attempt, said, capsys):
    checks.text_similarity(attempt)
    assert said in capsys.readouterr().out


# ── notebook 03 ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
    checks.predicted_arrivals({text: f" {answer.capitalize()}" for text, answer in right.items()})
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

CYCLE = [
    *(("06_cycle_finetuning", name) for name in ("is_trained", "caption_loss", "matched_steps")),
    *(("07_ablations", name) for name in ("kendall_tau", "captioner_input", "reconstruction")),
]


@pytest.mark.parametrize(("notebook", "exercise"), CYCLE)
def test_printed_solutions_of_the_cycle_are_right(notebook, exercise, capsys):
    solution = tiny.printed_solution(notebook, exercise)
    assert getattr(checks, exercise)(solution) is solution
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(("notebook", "exercise"), CYCLE)
def test_until_an_exercise_of_the_cycle_is_done_later_cells_get_a_right_answer(notebook, exercise, capsys):
    ours = getattr(checks, exercise)(not_done)
    assert "Not done yet" in capsys.readouterr().out
    getattr(checks, exercise)(ours)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize(
    ("exercise", "attempt", "said"),
    [
        ("caption_loss", lambda s, c: -s.mean(), "padding is no part"),
        ("caption_loss", lambda s, c: -(s * c).mean(), "counted in the mean"),
        ("caption_loss", lambda s, c: -s[c].sum(), "not their sum"),
        ("caption_loss", lambda s, c: (-(s * c).sum(1) / c.sum(1)).mean(), "a short one weighs as much"),
        ("caption_loss", lambda s, c: s[c].mean(), "the sign"),
        ("is_trained", lambda name: "query" in name or "to_q" in name, "never sees the other modality"),
        ("is_trained", lambda name: "crossattention" in name or "attn2" in name, "keys and values stay frozen"),
        ("is_trained", lambda name: "crossattention.self.query" in name, "so True; yours gives False"),
        ("is_trained", lambda name: name.endswith(("crossattention.self.query.weight", "attn2.to_q.weight")), "a bias"),
        ("matched_steps", lambda steps, cycle, labels: steps, "as many steps are less computing"),
        ("matched_steps", lambda steps, cycle, labels: round(steps * labels / cycle), "upside down"),
        ("matched_steps", lambda steps, cycle, labels: round(steps * (cycle - labels)), "not subtracted"),
        ("matched_steps", lambda steps, cycle, labels: steps * cycle / labels, "whole steps only"),
        ("captioner_input", lambda image, mean, std: image, "the bug itself"),
        ("captioner_input", lambda image, mean, std: (image + 1) / 2, "as an image file is"),
        ("captioner_input", lambda image, mean, std: (image - mean) / std, "not in [-1, 1]"),
        ("captioner_input", lambda image, mean, std: (image + 1) / 2 - mean, "divide by the standard deviation"),
        ("captioner_input", lambda image, mean, std: (image + 1) / 2 * std + mean, "takes the normalisation back"),
        ("reconstruction", lambda step, e, t, z, z_t: step(e, t, z).prev_sample, "both bugs are still there"),
        ("reconstruction", lambda step, e, t, z, z_t: step(e, t, z_t).prev_sample, "nearly all of the noise"),
        ("reconstruction", lambda step, e, t, z, z_t: step(e, t, z).pred_original_sample, "which have none"),
        ("reconstruction", lambda step, e, t, z, z_t: z, "nothing was reconstructed"),
        ("kendall_tau", lambda a, b: 1.0, "agrees on none"),
        ("kendall_tau", lambda a, b: tau(a, b) * (10 if len(a) == 5 else 1), "divide by the number of pairs"),
        ("kendall_tau", lambda a, b: tau(a, b) / 2 + 0.5, "disagreement counts −1"),
    ],
)
def test_exercises_of_the_cycle_are_told_what_is_wrong(exercise, attempt, said, capsys):
    getattr(checks, exercise)(attempt)
    found = capsys.readouterr().out
    assert not found.startswith("Right.") and said in found


def test_steps_may_be_rounded_up_or_down(capsys):
    for rounded in (math.ceil, math.floor):
        checks.matched_steps(lambda steps, cycle, labels, to=rounded: to(steps * cycle / labels))
        assert capsys.readouterr().out.startswith("Right. ")


TRAINED = {  # the norms are of any size
    "(1)": (0.2, 0.0),
    "(2)": (0.03, 0.03),
    "(2) by argmax": (0.0, 0.03),
    "(3)": (0.0, 0.02),
    "(4)": (0.2, 0.1),
    "(4) with the U-Net under no_grad": (0.2, 0.0),
}


@pytest.mark.parametrize(
    ("loss", "predicted", "said"),
    [
        (None, None, "Right. A loss trains each model"),
        ("(1)", " Captioner", "Right. "),
        ("(1)", "", "Not done yet"),
        ("(1)", "both", "no part of the generator computes it, so 'captioner'; yours gives 'both'"),
        ("(2)", "captioner", "so 'both'; yours gives 'captioner'; the U-Net's queries are on the way"),
        ("(2)", "generator", "the bridge is there to pass"),
        ("(2) by argmax", "both", "straight-through adds the gradient"),
        ("(2) by argmax", "none", "the U-Net reads the words"),
        ("(3)", "none", "no part of the captioner computes it, so 'generator'"),
        ("(4)", "captioner", "through the VAE's decoder"),
        ("(4)", "generator", "look at x̂"),
        ("(4) with the U-Net under no_grad", "both", "no gradient reaches what was computed under no_grad"),
        ("(4) with the U-Net under no_grad", "none", "outside of no_grad"),
        ("(4) with the U-Net under no_grad", None, "Not done yet"),
    ],
)
def test_a_prediction_of_what_is_trained_is_held_against_the_gradients(loss, predicted, said, capsys):
    norms = {name: dict(zip(("captioner", "generator"), pair, strict=True)) for name, pair in TRAINED.items()}
    answers = dict(zip(TRAINED, ("captioner", "both", "generator", "generator", "both", "captioner"), strict=True))
    checks.whom_it_trains(answers | ({loss: predicted} if loss else {}), norms)
    [line] = capsys.readouterr().out.splitlines()
    assert said in line
    norms["(3)"]["captioner"] = 0.01  # then the measurement counts
    checks.whom_it_trains(answers, norms)
    assert "'(3)': " in capsys.readouterr().out


def test_the_printed_prediction_of_what_is_trained_is_the_one_that_the_gradients_give(capsys):
    solution = tiny.printed_solution("06_cycle_finetuning", "prediction")
    models = ("captioner", "generator")
    norms = {loss: dict(zip(models, pair, strict=True)) for loss, pair in zip(solution, TRAINED.values(), strict=True)}
    checks.whom_it_trains(solution, norms)
    assert capsys.readouterr().out.startswith("Right. ")


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
