"""How sure a mean over training runs is: the bootstrap resamples the runs, and the images that they are tested on.

It is the pigeonhole bootstrap (Owen 2007) of a table of runs × images.
"""

from collections.abc import Callable

import numpy as np

from dalleflamingo.evaluation.intervals import Interval, percentile_interval


def bootstrap_of_runs(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    runs: int,
    sample: np.ndarray,
    drawn: np.ndarray,
    n: int,
    seed: int = 0,
    recentred: bool = False,
) -> Interval:
    """Percentile bootstrap of a statistic of several training runs that are tested on the same items.

    Args:
        statistic: takes (runs,) int indices, with repetitions, and (M,) values, and returns one number.
        runs: how many runs there are.
        sample: (M,) values on the items themselves, as `intervals.resample` gives them.
        drawn: (resamples, M) values on resampled items, likewise; computed once for many statistics.
        n: how many items there are.
        seed: of the resampled runs.
        recentred: as in `intervals.paired_bootstrap`.
    Returns:
        an interval whose n is the number of items; with one run it is over the items alone.
    Raises:
        ValueError: there are no runs, or the statistic is not finite on the sample or on a resample.
    """
    if runs < 1:
        raise ValueError("there is nothing to draw from: 0 runs; has one finished in the runs' folder?")
    rng = np.random.default_rng([seed, runs])
    value = float(statistic(np.arange(runs), sample))
    found = np.array([statistic(rng.integers(runs, size=runs), values) for values in drawn])
    return percentile_interval(value, found + (value - found.mean() if recentred else 0.0), n, seed)
