"""Intervals against closed forms, scipy and the laws of drawing."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dalleflamingo.evaluation import intervals
from dalleflamingo.runs import derive_seed


def test_seed_is_the_same_on_every_machine():
    assert derive_seed(0, 391895, 3) == 1389401576
    assert derive_seed(np.int64(0), np.int32(391895), True + 2) == 1389401576


def test_seeds_of_different_parts_differ():
    parts = [(0, 12), (1, 2), (12, 0), (0, "12"), ("0", 12), ("0,12",), (0, 1, 2)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)


@given(st.lists(st.integers() | st.text(), max_size=4))
def test_seed_fits_every_generator(parts):
    assert 0 <= derive_seed(*parts) < 2**31


def test_float_is_refused_as_part_of_a_seed():
    with pytest.raises(TypeError, match=r"0\.9 \(float\).*string"):
        derive_seed(0, 0.9)


def test_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(0).normal(0.3, 2.0, size=400)
    interval = intervals.mean_interval(values, resamples=8000, seed=1)
    half = 1.959964 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def plain_bootstrap(statistics, n, resamples, seed, recentred=False):
    """The percentile bootstrap as a loop: (M, 3) values and bounds."""
    rng = np.random.default_rng(seed)
    value = statistics(np.arange(n))
    drawn = np.array([statistics(rng.integers(n, size=n)) for _ in range(resamples)])
    drawn = drawn + (value - drawn.mean(axis=0)) * np.asarray(recentred)
    return np.column_stack([value, *np.quantile(drawn, [(1 - 0.95) / 2, (1 + 0.95) / 2], axis=0)])


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30).map(np.array),
    seed=st.integers(0, 2**31 - 1),
    resamples=st.integers(2, 40),
    recentred=st.lists(st.booleans(), min_size=3, max_size=3),
    block=st.sampled_from([1, 40, 1 << 20]),
)
def test_bootstrap_has_the_draws_and_bounds_of_a_plain_loop(values, seed, resamples, recentred, block):
    n = len(values)

    def statistics(indices):
        return np.array([values[indices].mean(), values[indices].max(), values[indices[0]] - values[indices[-1]]])

    expected = plain_bootstrap(statistics, n, resamples, seed, recentred)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "_DRAWN_AT_ONCE", block)
        found = intervals.paired_bootstraps(statistics, n, resamples, seed, recentred)
        mean = intervals.mean_interval(values, resamples, seed)
    bounds = [(one.value, one.low, one.high) for one in found]
    np.testing.assert_allclose(bounds, expected, rtol=1e-12, atol=1e-8)
    alone = plain_bootstrap(lambda indices: np.array([values[indices].mean()]), n, resamples, seed)[0]
    assert (mean.value, mean.low, mean.high) == tuple(alone)
    assert {(one.n, one.seed) for one in (*found, mean)} == {(n, seed)}


def test_bounds_are_those_of_scipys_percentile_interval():
    values = np.random.default_rng(0).exponential(size=37)
    scipys = stats.bootstrap((values,), np.mean, n_resamples=300, method="percentile", rng=np.random.default_rng(5))
    ours = intervals.mean_interval(values, resamples=300, seed=5)
    assert (ours.low, ours.high) == pytest.approx(tuple(scipys.confidence_interval), rel=1e-12)


def test_seed_decides_the_draws():
    values = np.random.default_rng(0).exponential(size=37)
    one, same, other = (intervals.mean_interval(values, resamples=300, seed=seed) for seed in (1, 1, 2))
    assert one == same and (one.low, one.high) != (other.low, other.high) and one.value == other.value


def test_resamples_are_all_different():
    seen = []
    intervals.resample(lambda indices: np.array([seen.append(tuple(indices)) or 0.0]), 50, 200)
    assert seen[0] == tuple(range(50)) and len(set(seen)) == 201


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
    values, drawn = intervals.resample(lambda indices: 2.0 + indices, 1, 7)
    assert values == 2 and drawn.shape == (7, 1) and (drawn == 2).all()
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


def test_interval_prints_value_bounds_n_and_seed():
    assert str(intervals.Interval(0.5, 0.25, 0.75, 24, 7)) == "0.500 [0.250, 0.750] (n = 24, seed 7)"


floats = st.floats(allow_nan=False, allow_infinity=False)
bounds = st.floats(allow_infinity=False)


@settings(deadline=None)
@given(
    st.builds(intervals.Interval, floats, bounds, bounds, st.integers(1, 10**6), st.none() | st.integers(0, 2**31 - 1)),
    st.text("abcdefgh_", max_size=5),
)
def test_an_interval_survives_a_row_of_a_table(interval, prefix):
    row = interval.as_row(prefix)
    assert set(row) == {f"{prefix}value", f"{prefix}low", f"{prefix}high", "n", "seed"}
    other = intervals.Interval(0.0, -1.0, 1.0, 5, 3).as_row("other ")
    in_a_table = pd.DataFrame([other | row, other]).iloc[0]  # a column with gaps turns whole numbers into floats
    for back in (intervals.Interval.from_row(row, prefix), intervals.Interval.from_row(in_a_table, prefix)):
        assert repr(back) == repr(interval)  # NaN is not equal to itself
    del row["seed"]
    assert intervals.Interval.from_row(row, prefix).seed is None


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
