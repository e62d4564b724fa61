"""The bootstrap over runs and images against the variance that theory gives it."""

import numpy as np
import pytest

from dalleflamingo.evaluation import intervals
from dalleflamingo.research.resampling import bootstrap_of_runs


def test_runs_are_drawn_anew_and_items():
    """Var of a two-way table's mean under the pigeonhole bootstrap (Owen 2007): σ²_runs/R + σ²_items/n, about."""
    rng = np.random.default_rng(0)
    values = 3 * rng.standard_normal((12, 1)) + 2 * rng.standard_normal((1, 80))
    sample, drawn = intervals.resample(lambda items: values[:, items].mean(1), 80, 4000)
    np.testing.assert_allclose(sample, values.mean(1))
    found = bootstrap_of_runs(lambda runs, means: means[runs].mean(), 12, sample, drawn, 80)
    spread = (values.mean(1).var() / 12 + values.mean(0).var() / 80) ** 0.5
    assert found.value == pytest.approx(values.mean()) and found.n == 80
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.08)


def test_of_one_run_the_interval_is_over_its_items():
    values = np.random.default_rng(1).standard_normal(60)
    sample, drawn = intervals.resample(lambda items: np.array([values[items].mean()]), 60)
    found = bootstrap_of_runs(lambda runs, means: means[0], 1, sample, drawn, 60)
    assert found == intervals.paired_bootstrap(lambda items: values[items].mean(), 60)
    with pytest.raises(ValueError, match="nothing to draw from"):
        bootstrap_of_runs(lambda runs, means: 0.0, 0, sample, drawn, 60)
