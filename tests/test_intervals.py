"""Intervals against closed forms, scipy and the laws of drawing."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dalleflamingo import intervals


def test_seed_is_the_same_on_every_machine():
    assert intervals.derive_seed(0, 391895, 3) == 1389401576
    assert intervals.derive_seed(np.int64(0), np.int32(391895), True + 2) == 1389401576


def test_seeds_of_different_parts_differ():
    parts = [(0, 12), (1, 2), (12, 0), (0, "12"), ("0", 12), ("0,12",), (0, 1, 2)]
    assert len({intervals.derive_seed(*part) for part in parts}) == len(parts)


@given(st.lists(st.integers() | st.text(), max_size=4))
def test_seed_fits_every_generator(parts):
    assert 0 <= intervals.derive_seed(*parts) < 2**31


def test_float_is_refused_as_part_of_a_seed():
    with pytest.raises(TypeError, match=r"0\.9 \(float\).*string"):
        intervals.derive_seed(0, 0.9)


def test_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(0).normal(0.3, 2.0, size=400)
    interval = intervals.mean_interval(values, resamples=8000, seed=1)
    half = 1.959964 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_fast_mean_draws_the_same_samples_as_the_general_bootstrap():
    values = np.random.default_rng(0).exponential(size=37)
    general = intervals.paired_bootstrap(lambda indices: values[indices].mean(), 37, resamples=300, seed=5)
    fast = intervals.mean_interval(values, resamples=300, seed=5)
    assert (fast.value, fast.low, fast.high) == pytest.approx((general.value, general.low, general.high), abs=1e-12)
    assert (fast.n, fast.seed) == (general.n, general.seed) == (37, 5)


def test_seed_decides_the_draws():
    values = np.random.default_rng(0).exponential(size=37)
    one, same, other = (intervals.mean_interval(values, resamples=300, seed=seed) for seed in (1, 1, 2))
    assert one == same and (one.low, one.high) != (other.low, other.high) and one.value == other.value


def test_blocks_of_resamples_are_all_different(monkeypatch):
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 1)
    blocks = [tuple(block[0]) for block in intervals._resamples(50, 200, seed=0)]
    assert len(blocks) == len(set(blocks)) == 200


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=200)
    a, b = difficulty + 0.1 + rng.normal(0, 0.05, 200), difficulty + rng.normal(0, 0.05, 200)
    paired = intervals.paired_bootstrap(lambda i: a[i].mean() - b[i].mean(), 200, resamples=500)
    assert 0.08 < paired.low < 0.1 < paired.high < 0.12


def test_corpus_statistic_sees_each_resample_as_a_whole():
    values = np.arange(40.0)
    interval = intervals.paired_bootstrap(lambda i: values[i].max(), 40, resamples=400)
    assert interval.value == interval.high == 39 and interval.low < 39  # a mean of parts could never reach the maximum


def test_ninety_five_percent_intervals_cover_the_truth_about_as_often():
    rng = np.random.default_rng(7)
    samples = rng.exponential(1.0, size=(300, 60))  # skewed, as caption scores are
    drawn = [intervals.mean_interval(sample, resamples=400, seed=i) for i, sample in enumerate(samples)]
    covered = sum(interval.low <= 1.0 <= interval.high for interval in drawn)
    assert 0.88 <= covered / 300 <= 0.98


def test_one_item_has_no_interval_and_none_is_an_error():
    alone = intervals.mean_interval(np.array([2.5]))
    assert alone.value == 2.5 and math.isnan(alone.low) and math.isnan(alone.high)
    with pytest.raises(ValueError, match="0 items"):
        intervals.mean_interval(np.array([]))


def test_nan_is_not_averaged_away():
    with pytest.raises(ValueError, match="nan on the sample"):
        intervals.mean_interval(np.array([1.0, float("nan"), 2.0]))


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [  # published worked values of the score interval without continuity correction
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_the_published_values(k, n, low, high):
    interval = intervals.proportion(k, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert interval.value == k / n and interval.n == n and interval.seed is None


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_mirrors_and_stays_a_proportion(pair):
    k, n = pair
    a, b = intervals.proportion(k, n), intervals.proportion(n - k, n)
    assert 0 <= a.low <= a.value <= a.high <= 1
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low))


@pytest.mark.parametrize(("k", "n"), [(1, 0), (0, 0), (5, 4), (-1, 4)])
def test_impossible_proportion_is_refused(k, n):
    with pytest.raises(ValueError, match=f"k = {k}, n = {n}"):
        intervals.proportion(k, n)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_within_group_spearman_is_scipys_with_ties(rows):
    table = pd.DataFrame(rows, columns=["image", "x", "y"])
    ours = intervals.within_group_spearman(table, "image", "x", "y")
    undefined = 0
    for image, group in table.groupby("image"):
        if group.x.nunique() < 2 or group.y.nunique() < 2:
            assert math.isnan(ours[image])
            undefined += 1
        else:
            assert ours[image] == pytest.approx(stats.spearmanr(group.x, group.y).statistic, abs=1e-12)
    assert ours.attrs["undefined"] == undefined
    assert list(ours.index) == list(dict.fromkeys(table.image))


def test_spearman_names_missing_columns_and_nan():
    table = pd.DataFrame({"image": [1, 1], "x": [1.0, float("nan")], "y": [1.0, 2.0]})
    with pytest.raises(KeyError, match="'dino'.*image, x, y"):
        intervals.within_group_spearman(table, "image", "dino", "y")
    with pytest.raises(ValueError, match="'x' holds 1 NaN in 2 rows"):
        intervals.within_group_spearman(table, "image", "x", "y")


def candidates(images=60, k=5, seed=0):
    """`clip` is half the score, half noise; rows in no order, not as many for each image."""
    rng = np.random.default_rng(seed)
    score = rng.normal(size=images * k)
    table = pd.DataFrame(
        {
            "image_id": np.repeat(rng.permutation(images) + 1000, k),
            "domain": np.repeat(np.where(np.arange(images) % 3 == 0, "out-domain", "in-domain"), k),
            "clip": score + rng.normal(size=images * k),
            "score": score + np.repeat(rng.normal(0, 3, size=images), k),
        }
    )
    return table.sample(frac=0.8, random_state=seed)


def gains_by_hand(table):
    return {
        image: group.score[group["clip"].idxmax()] - group.score.mean() for image, group in table.groupby("image_id")
    }


def test_gain_is_the_first_ranked_minus_the_mean_of_its_image():
    table = candidates()
    by_hand = gains_by_hand(table)
    result = intervals.ranked_minus_random(table, "clip", "score", resamples=400, seed=3)
    assert set(result) == {"all", "in-domain", "out-domain"}
    assert result["all"].value == pytest.approx(np.mean(list(by_hand.values())))
    assert result["all"].n == 60 and result["out-domain"].n == 20
    outside = set(table.image_id[table.domain == "out-domain"])
    assert result["out-domain"].value == pytest.approx(np.mean([by_hand[i] for i in outside]))
    assert result["all"].low > 0


def test_exact_random_is_what_many_draws_come_to():
    table = candidates()
    scores = table.score.to_numpy()
    exact = intervals.ranked_minus_random(table, "clip", "score", resamples=50)
    drawn = intervals.ranked_minus_random(table, "clip", lambda rows: scores[rows].mean(-1), resamples=50, draws=1000)
    assert set(exact) == set(drawn) == {"all", "in-domain", "out-domain"}
    for name in exact:
        assert drawn[name].value == pytest.approx(exact[name].value, abs=0.02)
        assert drawn[name].low == pytest.approx(exact[name].low, abs=0.03)


def test_corpus_metric_gets_one_row_of_each_image_and_is_recomputed_on_every_resample():
    table = candidates()
    image = table.image_id.to_numpy()
    seen = []

    def corpus(rows):
        assert rows.shape == (21, 60) and (image[rows] == image[rows[0]]).all()
        seen.append(tuple(rows[0]))
        return table.score.to_numpy()[rows].max(axis=-1)

    del table["domain"]
    assert set(intervals.ranked_minus_random(table, "clip", corpus, resamples=30)) == {"all"}
    assert len(set(seen)) == 31 and len(set(image[list(seen[0])])) == 60


def test_ranking_by_noise_gains_nothing():
    table = candidates(images=400)
    table["noise"] = np.random.default_rng(1).normal(size=len(table))
    gain = intervals.ranked_minus_random(table, "noise", "score", resamples=400)["all"]
    assert gain.low < 0 < gain.high


def test_first_of_equals_is_chosen():
    table = pd.DataFrame({"image_id": [1, 1, 2, 2], "clip": [0.5, 0.5, 0.5, 0.5], "score": [3.0, 1.0, 5.0, 1.0]})
    assert intervals.ranked_minus_random(table, "clip", "score", resamples=10)["all"].value == 1.5


def test_images_without_domain_count_in_all_only():
    table = pd.DataFrame(
        {
            "image_id": [1, 1, 2, 2],
            "domain": [None, None, "near-domain", "near-domain"],
            "clip": [1.0, 0, 1, 0],
            "score": [1.0, 0, 1, 0],
        }
    )
    result = intervals.ranked_minus_random(table, "clip", "score", resamples=10)
    assert set(result) == {"all", "near-domain"} and result["near-domain"].n == 1


def test_gain_refuses_unmeasured_candidates():
    table = candidates()
    table.iloc[3, table.columns.get_loc("score")] = float("nan")
    with pytest.raises(ValueError, match="'score' holds 1 NaN"):
        intervals.ranked_minus_random(table, "clip", "score")
    with pytest.raises(KeyError, match="'dino'"):
        intervals.ranked_minus_random(table, "dino", "score")
    with pytest.raises(ValueError, match="0 items"):
        intervals.ranked_minus_random(table.iloc[:0], "clip", "score")


def test_interval_prints_value_bounds_n_and_seed():
    assert str(intervals.Interval(0.5, 0.25, 0.75, 24, 7)) == "0.500 [0.250, 0.750] (n = 24, seed 7)"


def test_recentred_interval_of_a_biased_statistic_lies_around_its_value():
    """The number of different items: every resample holds fewer, by a factor of about 1 − 1/e."""

    def different(rows):
        return float(len(set(rows.tolist())))

    plain = intervals.paired_bootstrap(different, 100, 400)
    moved = intervals.paired_bootstrap(different, 100, 400, recentred=True)
    assert plain.value == moved.value == 100 and plain.high < 75
    assert moved.low < 100 < moved.high and moved.high - moved.low == pytest.approx(plain.high - plain.low)
    both = intervals.paired_bootstraps(lambda rows: np.array([different(rows)] * 2), 100, 400, recentred=[True, False])
    assert both == [moved, plain]


def test_runs_are_drawn_anew_and_items():
    """Var of a two-way table's mean under the pigeonhole bootstrap (Owen 2007): σ²_runs/R + σ²_items/n, about."""
    rng = np.random.default_rng(0)
    values = 3 * rng.standard_normal((12, 1)) + 2 * rng.standard_normal((1, 80))
    sample, drawn = intervals.resampled(lambda items: values[:, items].mean(1), 80, 4000)
    np.testing.assert_allclose(sample, values.mean(1))
    found = intervals.bootstrap_of_runs(lambda runs, means: means[runs].mean(), 12, sample, drawn, 80)
    spread = (values.mean(1).var() / 12 + values.mean(0).var() / 80) ** 0.5
    assert found.value == pytest.approx(values.mean()) and found.n == 80
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.08)


def test_of_one_run_the_interval_is_over_its_items():
    values = np.random.default_rng(1).standard_normal(60)
    sample, drawn = intervals.resampled(lambda items: np.array([values[items].mean()]), 60)
    found = intervals.bootstrap_of_runs(lambda runs, means: means[0], 1, sample, drawn, 60)
    assert found == intervals.paired_bootstrap(lambda items: values[items].mean(), 60)
    with pytest.raises(ValueError, match="nothing to draw from"):
        intervals.bootstrap_of_runs(lambda runs, means: 0.0, 0, sample, drawn, 60)
