"""How sure a number is: bootstrap intervals, proportions and rank correlation within images.

A number comes with its n, its interval and its seed. Two systems are compared in pairs: both are measured on the same
images, and the bootstrap resamples the images (§3.1 compares ranked with random candidates of the same images).
Everything here works on arrays and tables and knows nothing of models.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest, bootstrap
from tqdm.auto import tqdm

LEVEL = 0.95  # of confidence, in every interval of the course
_DRAWN_AT_ONCE = 1 << 20  # indices held in memory by one block of resamples


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval.

    Attributes:
        value: the statistic on the sample itself.
        low, high: bounds; NaN where n is too small to tell.
        n: how many items (images, not candidates) were resampled.
        seed: of the bootstrap; None for a closed form.
    """

    value: float
    low: float
    high: float
    n: int
    seed: int | None

    def as_row(self, prefix: str = "") -> dict[str, float | int | None]:
        """Columns of a table: value, low and high, each behind `prefix`, and n and seed without it."""
        bounds = {f"{prefix}value": self.value, f"{prefix}low": self.low, f"{prefix}high": self.high}
        return bounds | {"n": self.n, "seed": self.seed}

    @classmethod
    def from_row(cls, row: Mapping, prefix: str = "") -> "Interval":
        """The interval that `as_row` wrote, with the same `prefix`, into `row`; a missing seed is None."""
        bounds = (float(row[f"{prefix}{name}"]) for name in ("value", "low", "high"))
        return cls(*bounds, int(row["n"]), None if pd.isna(row.get("seed")) else int(row["seed"]))

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n}{seed})"


def paired_bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    resamples: int = 2000,
    seed: int = 0,
    recentred: bool = False,
) -> Interval:
    """Percentile bootstrap of any statistic, recomputed on every resample.

    Pairing lies in the indices: a statistic that looks up both systems at the same indices compares them on the
    same images. Corpus metrics (BLEU, CIDEr, FID) belong here; for a mean, `mean_interval` is the same and faster.

    Args:
        statistic: takes (n,) int indices into the items, with repetitions, and returns one number.
        n: how many items there are.
        resamples: how often n items are drawn with replacement.
        seed: of the draws.
        recentred: shift the interval so that the mean of the resamples lies on the sample's value. For FID, Inception
            Score and CIDEr: a resample repeats some images, so it holds fewer different ones, which raises FID, lowers
            IS and makes rare n-grams seem common. The bootstrap then tells the spread, but not the location.
    Raises:
        ValueError: there are no items, or the statistic is not finite on the sample or on a resample.
    """
    return paired_bootstraps(lambda indices: np.array([statistic(indices)]), n, resamples, seed, [recentred])[0]


def paired_bootstraps(
    statistics: Callable[[np.ndarray], np.ndarray],
    n: int,
    resamples: int = 2000,
    seed: int = 0,
    recentred: Sequence[bool] | None = None,
) -> list[Interval]:
    """`paired_bootstrap` of M statistics that may share their work; M intervals.

    Args:
        statistics: takes (n,) int indices and returns (M,) numbers.
        n: how many items there are.
        resamples: as in `paired_bootstrap`, with its errors.
        seed: of the draws.
        recentred: (M,) which of the intervals to shift; None: none of them.
    """
    values, drawn = resample(statistics, n, resamples, seed)
    columns = drawn.T  # (M, resamples)
    # scipy has no shifted interval (its "basic" is reflected), so we shift the resamples
    shifts = np.where(np.zeros(len(values)) if recentred is None else recentred, values - columns.mean(axis=1), 0.0)
    return [
        percentile_interval(float(value), column + shift, n, seed)
        for value, column, shift in zip(values, columns, shifts, strict=True)
    ]


def mean_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Interval:
    """`paired_bootstrap` of the mean, and faster. Pass differences to compare two systems on the same items.

    Args:
        values: (n,) one number an item.
        resamples: as in `paired_bootstrap`, with its errors.
        seed: of the draws.
    """
    values = np.asarray(values, dtype=float)
    n = _at_least_one(len(values))
    drawn = _distribution(values, np.mean, resamples, seed) if n > 1 else values
    return percentile_interval(float(values.mean()), drawn, n, seed)


def resample(
    statistics: Callable[[np.ndarray], np.ndarray], n: int, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """M statistics of n items and of each resample of them.

    Args:
        statistics: as in `paired_bootstraps`: (n,) indices -> (M,).
        n: how many items there are.
        resamples: how often n items are drawn with replacement.
        seed: of the draws; with the same n, every caller sees the same ones.
    Returns:
        (M,) on the items themselves, and (resamples, M).
    Raises:
        ValueError: there are no items.
    """
    sample = np.asarray(statistics(np.arange(_at_least_one(n))), dtype=float)
    if n == 1:  # scipy refuses a single item; every resample of it is the sample itself
        return sample, np.tile(sample, (resamples, 1))
    with tqdm(desc="bootstrap", total=resamples, leave=False, delay=10) as bar:  # FID takes its time

        def of_block(block: np.ndarray, axis: int) -> np.ndarray:
            """(b, n) indices -> (M, b)."""
            found = []
            for indices in block:
                found.append(statistics(indices))
                bar.update()
            return np.array(found, dtype=float).T

        drawn = _distribution(np.arange(n), of_block, resamples, seed)
    return sample, np.ascontiguousarray(drawn.T)


def proportion(k: int, n: int) -> Interval:
    """Share k / n with Wilson's score interval, which stays inside [0, 1] also for k = 0 and k = n.

    Args:
        k: how many of the items have the property.
        n: how many items there are.
    Raises:
        ValueError: unless 0 <= k <= n and n > 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"a proportion needs 0 <= k <= n and n > 0; got k = {k}, n = {n}")
    bounds = binomtest(k, n).proportion_ci(LEVEL, method="wilson")
    return Interval(k / n, float(bounds.low), float(bounds.high), n, None)


def within_group_spearman(table: pd.DataFrame, group: str, x: str, y: str) -> pd.Series:
    """Spearman's rank correlation of x and y inside each group (claim 1: candidates of one image).

    Ties share their mean rank. A group in which x or y does not vary has no correlation: NaN, counted in
    `.attrs["undefined"]`.

    Args:
        table: a row an item.
        group: column that names an item's group.
        x: a column of numbers.
        y: another.
    Returns:
        a float in [-1, 1] or NaN for each group, indexed by group in the order of the table.
    Raises:
        KeyError: the table lacks one of the columns.
        ValueError: x or y holds NaN.
    """
    if missing := [column for column in (group, x, y) if column not in table]:
        raise KeyError(f"no column {', '.join(map(repr, missing))}; the table has {', '.join(map(str, table.columns))}")
    for column in (x, y):
        if nans := int(table[column].isna().sum()):
            raise ValueError(
                f"column {column!r} holds {nans} NaN in {len(table)} rows: rank only what was measured; "
                "drop those images whole, or the comparison is no longer between candidates of one image"
            )
    matrices = table.groupby(group, sort=False)[[x, y]].corr("spearman")  # 2 × 2 for each group
    rho = matrices[y].xs(x, level=1).rename("spearman")
    rho.attrs["undefined"] = int(rho.isna().sum())
    return rho


def _distribution(items: np.ndarray, statistic: Callable[..., np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """(…, resamples): the statistic of (n,) items drawn with replacement; n ≥ 2, memory bounded by blocks."""
    rng, block = np.random.default_rng(seed), max(1, _DRAWN_AT_ONCE // len(items))
    found = bootstrap((items,), statistic, n_resamples=resamples, batch=block, method="percentile", rng=rng)
    return found.bootstrap_distribution


def percentile_interval(value: float, drawn: np.ndarray, n: int, seed: int) -> Interval:
    """The interval of a value between the percentiles of its resamples.

    Args:
        value: the statistic on the sample itself.
        drawn: (resamples,) the statistic on each resample, recentred or not.
        n: how many items there are; the bounds of one item alone are NaN.
        seed: of the draws.
    Raises:
        ValueError: the value or a resample is not finite.
    """
    if not (np.isfinite(value) and np.isfinite(drawn).all()):
        bad = int((~np.isfinite(drawn)).sum())
        raise ValueError(
            f"the statistic is {value} on the sample and not finite on {bad} of {len(drawn)} resamples: "
            "drop or count the items without a value first"
        )
    if n == 1:  # drawing one item again and again says nothing about spread
        return Interval(value, float("nan"), float("nan"), n, seed)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n, seed)


def _at_least_one(n: int) -> int:
    if n < 1:
        raise ValueError("there is nothing to draw from: 0 items; was the table filtered to nothing?")
    return n
