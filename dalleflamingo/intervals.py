"""How sure a number is: seeds, bootstrap intervals, proportions and rank correlation within images.

A number comes with its n, its interval and its seed. "Better than" is decided on pairs: both sides are measured on the
same images, and the images are what is drawn again (§3.1 compares ranked with random candidates of the same images).
Everything here works on plain arrays and tables and knows nothing of models.
"""

import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from tqdm.auto import tqdm

_DRAWN_AT_ONCE = 1 << 20  # indices held in memory by one block of resamples


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval.

    value: the statistic on the sample itself. low, high: bounds, NaN where n is too small to tell.
    n: how many items (images, not candidates) were drawn again. seed: of the bootstrap; None for a closed form.
    """

    value: float
    low: float
    high: float
    n: int
    seed: int | None

    def as_row(self, prefix: str = "") -> dict[str, float | int | None]:
        """Columns of a table: value, low and high with `prefix` before their names, and n and seed without it."""
        bounds = {f"{prefix}value": self.value, f"{prefix}low": self.low, f"{prefix}high": self.high}
        return bounds | {"n": self.n, "seed": self.seed}

    @classmethod
    def from_row(cls, row: Mapping, prefix: str = "") -> "Interval":
        """What `as_row` made a row of; a seed that the row lacks is None."""
        seed = row.get("seed")
        bounds = (float(row[f"{prefix}{name}"]) for name in ("value", "low", "high"))
        return cls(*bounds, int(row["n"]), None if pd.isna(seed) else int(seed))

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n}{seed})"


def derive_seed(*parts: int | str) -> int:
    """One seed from whole numbers and strings, the same on every machine and in every Python.

    Returns:
        an int in [0, 2**31). Different parts, or the same in another order, give unrelated seeds; 1 and "1" differ.
    Raises:
        TypeError: for a part that is neither; a float's last digits may differ between machines.
    """
    plain = []
    for part in parts:
        try:
            plain.append(part if isinstance(part, str) else int(operator.index(part)))
        except TypeError:
            raise TypeError(
                f"a seed is derived from whole numbers and strings; got {part!r} ({type(part).__name__}): "
                "pass it as a string with as many digits as matter"
            ) from None
    digest = hashlib.blake2b(json.dumps(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def paired_bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    recentred: bool = False,
) -> Interval:
    """Percentile bootstrap of any statistic, recomputed on every resample.

    Pairing lies in the indices: a statistic that looks up both systems at the same indices compares them on the
    same images. Corpus metrics (BLEU, CIDEr, FID) belong here; for a mean, `mean_interval` is the same and faster.

    Args:
        statistic: takes (n,) int indices into the items, with repetitions, and returns one number.
        n: how many items there are. level: share of resamples inside the interval.
        recentred: move the interval so that the resamples' mean lies on the sample's value. For FID and the Inception
            Score: a resample holds some pictures twice, so fewer different ones, which pushes FID up and IS down in
            every resample alike. What the bootstrap knows then is the spread, not the place.
    Raises:
        ValueError: if there are no items, or the statistic is not finite on the sample or a resample.
    """
    together = paired_bootstraps(lambda indices: np.array([statistic(indices)]), n, resamples, seed, level, [recentred])
    return together[0]


def paired_bootstraps(
    statistics: Callable[[np.ndarray], np.ndarray],
    n: int,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    recentred: Sequence[bool] | None = None,
) -> list[Interval]:
    """`paired_bootstrap` of M statistics at once, which may share their work: indices -> (M,) gives M intervals."""
    values, drawn = resampled(statistics, n, resamples, seed)
    columns = drawn.T  # (M, resamples)
    shifts = np.where(np.zeros(len(values)) if recentred is None else recentred, values - columns.mean(axis=1), 0.0)
    return [
        _percentiles(float(value), column + shift, n, seed, level)
        for value, column, shift in zip(values, columns, shifts, strict=True)
    ]


def mean_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """`paired_bootstrap` of the mean of (n,) values, one number an item; a difference of two systems is paired."""
    values = np.asarray(values, dtype=float)
    n = _at_least_one(len(values))
    drawn = [values[block].mean(axis=1) for block in _resamples(n, resamples, seed)]
    return _percentiles(float(values.mean()), np.concatenate(drawn), n, seed, level)


def resampled(
    statistics: Callable[[np.ndarray], np.ndarray], n: int, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """M statistics of n items, (M,), and of the items drawn anew, (resamples, M); see `paired_bootstraps`.

    Raises:
        ValueError: there are no items.
    """
    sample = np.asarray(statistics(np.arange(_at_least_one(n))), dtype=float)
    every = chain.from_iterable(_resamples(n, resamples, seed))
    with tqdm(every, "bootstrap", resamples, leave=False, delay=10) as shown:  # FID takes its time
        drawn = [statistics(indices) for indices in shown]
    return sample, np.array(drawn, dtype=float)


def bootstrap_of_runs(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    runs: int,
    sample: np.ndarray,
    drawn: np.ndarray,
    n: int,
    seed: int = 0,
    level: float = 0.95,
    recentred: bool = False,
) -> Interval:
    """Percentile bootstrap of what several training runs do on the same items: runs are drawn anew, and the items.

    Args:
        statistic: takes (runs,) int indices, with repetitions, and (M,) values, and returns one number.
        sample, drawn: as `resampled` gives them; what takes long is computed once for many statistics.
        n: how many items there are. recentred: as in `paired_bootstrap`.
    Returns:
        an interval whose n is the number of items; of one run it is over the items alone.
    Raises:
        ValueError: as `paired_bootstrap`, or there are no runs.
    """
    rng = np.random.default_rng([seed, _at_least_one(runs)])
    value = float(statistic(np.arange(runs), sample))
    found = np.array([statistic(rng.integers(runs, size=runs), values) for values in drawn])
    return _percentiles(value, found + (value - found.mean() if recentred else 0.0), n, seed, level)


def proportion(k: int, n: int, level: float = 0.95) -> Interval:
    """Share k / n with Wilson's score interval, which stays inside [0, 1] and is honest for k = 0 and k = n.

    Raises:
        ValueError: unless 0 <= k <= n and n > 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"a proportion needs 0 <= k <= n and n > 0; got k = {k}, n = {n}")
    bounds = binomtest(k, n).proportion_ci(level, method="wilson")
    return Interval(k / n, float(bounds.low), float(bounds.high), n, None)


def within_group_spearman(table: pd.DataFrame, group: str, x: str, y: str) -> pd.Series:
    """Spearman's rank correlation of x and y inside each group (claim 1: candidates of one image).

    Ties share their mean rank. A group in which x or y does not vary has no correlation: NaN, counted in
    `.attrs["undefined"]`, never a silent 0.

    Returns:
        one float in [-1, 1] or NaN for each group, indexed by group in the order of the table.
    Raises:
        KeyError: for a column that is not there. ValueError: if x or y holds NaN.
    """
    _need(table, group, x, y)
    _refuse_nan(table, x, y)
    groups = table[group]
    centred = {}
    for column in (x, y):
        ranks = table.groupby(group, sort=False)[column].rank(method="average")
        centred[column] = ranks - ranks.groupby(groups, sort=False).transform("mean")

    def total(product: pd.Series) -> pd.Series:
        return product.groupby(groups, sort=False).sum()

    spread = np.sqrt(total(centred[x] ** 2) * total(centred[y] ** 2))
    rho = (total(centred[x] * centred[y]) / spread.where(spread > 0)).clip(-1, 1).rename("spearman")
    rho.attrs["undefined"] = int(rho.isna().sum())
    return rho


def ranked_minus_random(
    table: pd.DataFrame,
    by: str,
    score: str | Callable[[np.ndarray], np.ndarray],
    resamples: int = 2000,
    seed: int = 0,
    draws: int = 20,
) -> dict[str, Interval]:
    """Gain of the candidate ranked first over a random one (Table 1), paired over images.

    Where `score` is a column, the random pick is its exact expectation, the mean over the image's candidates, and the
    gain is a mean over images. Where `score` is a corpus metric, random is the mean of `draws` fixed random picks and
    the metric is recomputed on every resample.

    Args:
        table: candidate table (columns image_id, `by`, and domain where there is one), one row a candidate.
        by: column that ranks, higher is better; of equals the first row wins, as in `reconstruct.rank`.
        score: a column; or a function of (draws + 1, n) row positions in the table, one row an image, that
            returns (draws + 1,) numbers, such as `metrics.CiderTable.corpus`.
    Returns:
        intervals of the gain under "all" and under each domain's name; > 0: ranking helps where score is
        better when higher.
    Raises:
        KeyError: for a column that is not there. ValueError: if one holds NaN or the table is empty.
    """
    measured = [by, score] if isinstance(score, str) else [by]
    _need(table, "image_id", *measured)
    _at_least_one(len(table))
    _refuse_nan(table, *measured)
    image, _ = pd.factorize(table["image_id"])
    rows = np.split(np.argsort(image, kind="stable"), np.cumsum(np.bincount(image))[:-1])  # row positions by image
    ranking = table[by].to_numpy(float)
    first = np.array([members[ranking[members].argmax()] for members in rows])  # (n,), the first of equals
    if isinstance(score, str):
        values = table[score].to_numpy(float)
        gains = values[first] - np.array([values[members].mean() for members in rows])
        return {name: mean_interval(gains[inside], resamples, seed) for name, inside in _domains(table, first).items()}
    rng = np.random.default_rng(derive_seed(seed, "random picks"))
    random = [rng.choice(members, size=draws) for members in rows]
    picks = np.column_stack([first, random]).T  # (draws + 1, n)
    return {
        name: paired_bootstrap(_corpus_gain(score, picks[:, inside]), len(inside), resamples, seed)
        for name, inside in _domains(table, first).items()
    }


def _corpus_gain(score: Callable[[np.ndarray], np.ndarray], picks: np.ndarray) -> Callable[[np.ndarray], float]:
    def gain(indices: np.ndarray) -> float:
        values = np.asarray(score(picks[:, indices]))
        return float(values[0] - values[1:].mean())

    return gain


def _domains(table: pd.DataFrame, first: np.ndarray) -> dict[str, np.ndarray]:
    """Which images belong to "all" and to each domain, as positions among the images."""
    members = {"all": np.arange(len(first))}
    if "domain" in table:
        domain = table["domain"].to_numpy(object)[first]
        for name in pd.unique(domain[~pd.isna(domain)]):
            members[name] = np.flatnonzero(domain == name)
    return members


def _resamples(n: int, resamples: int, seed: int):
    """Blocks (≤ b, n) of indices drawn with replacement; every caller with one n and seed sees the same draws."""
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWN_AT_ONCE // n)
    for start in range(0, resamples, block):
        yield rng.integers(n, size=(min(block, resamples - start), n))


def _percentiles(value: float, drawn: np.ndarray, n: int, seed: int, level: float) -> Interval:
    if not (np.isfinite(value) and np.isfinite(drawn).all()):
        bad = int((~np.isfinite(drawn)).sum())
        raise ValueError(
            f"the statistic is {value} on the sample and not finite on {bad} of {len(drawn)} resamples: "
            "drop or count the items without a value first"
        )
    if n == 1:  # drawing one item again and again says nothing about spread
        return Interval(value, float("nan"), float("nan"), n, seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n, seed)


def _at_least_one(n: int) -> int:
    if n < 1:
        raise ValueError("there is nothing to draw from: 0 items; was the table filtered to nothing?")
    return n


def _need(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise KeyError(f"no column {', '.join(map(repr, missing))}; the table has {', '.join(map(str, table.columns))}")


def _refuse_nan(table: pd.DataFrame, *columns: str) -> None:
    for column in columns:
        if missing := int(table[column].isna().sum()):
            raise ValueError(
                f"column {column!r} holds {missing} NaN in {len(table)} rows: rank only what was measured; "
                "drop those images whole, or the comparison is no longer between candidates of one image"
            )
