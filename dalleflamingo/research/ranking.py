"""Selections, ways to choose one candidate of each image, and their scores: ranked first, at random, the best there is.

A selection is an (S, n) array of row positions: S ways to choose one candidate for each of n images. Its score is the
mean over S corpora of a corpus metric, computed anew on every bootstrap sample, n-gram statistics and FID included;
each domain is a corpus of its own. The random selection holds at least 20 draws, so balanced that every candidate is
drawn equally often: for metrics that are means over images it is the exact expectation.

A table of effects has a row for each domain, metric and selection:
    domain ("all" or a domain's name), metric;
    ranked_by, rank, k, shuffled: the fields of the `Selection`;
    n (images); value, low, high: the score with its 95 % interval; gain_value, gain_low, gain_high: that minus the
    random selection's, paired over images; seed, of the bootstrap.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from dalleflamingo.datasets import DOMAINS
from dalleflamingo.evaluation.intervals import (
    Interval,
    mean_interval,
    paired_bootstrap,
    paired_bootstraps,
    within_group_spearman,
)
from dalleflamingo.research.metrics import METRICS, PRIMARY, SECONDARY, SIMILARITIES, Pair, pairs_of_claim

# other rankings of captions, which need no generated image; columns of `baselines.add`
BASELINES = ("length", "likelihood", "consensus", "clip_score")
EFFECT_COLUMNS = (  # columns of a table of effects
    "domain",
    "metric",
    "ranked_by",
    "rank",
    "k",
    "shuffled",
    "n",
    "value",
    "low",
    "high",
    "gain_value",
    "gain_low",
    "gain_high",
    "seed",
)
DRAWS = 20  # random selections, at least
RESAMPLES = 2000
SHUFFLES = 500  # of `gain_of_chance`
ALL = "all"

CorpusMetric = Callable[[np.ndarray], np.ndarray]  # (S, n) row positions -> (S,) scores


@dataclass(frozen=True)
class Selection:
    """Which candidate of each image is chosen.

    Attributes:
        ranked_by: a similarity or a baseline; "random"; "oracle", by the truth; "beam", the caption by beam search.
        rank: 1 is the candidate ranked first; None where nothing ranks.
        k: of how many candidates it is chosen; None for beam search, which is no choice among candidates.
        shuffled: the ranking is that of another image, so that nothing but chance is gained.
    """

    ranked_by: str
    rank: int | None = None
    k: int | None = None
    shuffled: bool = False


@dataclass(frozen=True)
class EvaluatedCandidates:
    """A candidate table with the metrics of its captions or images.

    Attributes:
        table: K candidates for each of n images, with a column for each metric that a single candidate has.
        rows: (n, K) positions in the table, a row an image.
        domain: (n,) object.
        metrics: name -> a function of a selection, (S, n) -> (S,).
        oracle: the column that the oracle ranks by, if the truth is known.
        beam: (n,) positions of the captions by beam search, if there are such. They lie behind those of the table: the
            metrics know these captions, the table has no rows of them.
        tokenizer: which one split the words, if the metrics have any.
    """

    table: pd.DataFrame
    rows: np.ndarray
    domain: np.ndarray
    metrics: dict[str, CorpusMetric]
    oracle: str | None = None
    beam: np.ndarray | None = None
    tokenizer: str = ""

    @property
    def k(self) -> int:
        """Candidates of each image."""
        return self.rows.shape[1]

    @property
    def ranked(self) -> pd.DataFrame:
        """The rows of the table that `rows` names: with `limit`, not all of them."""
        return self.table.iloc[self.rows.ravel()]

    def limit(self, k: int) -> "EvaluatedCandidates":
        """The same with only the first k candidates of each image."""
        return replace(self, rows=self.rows[:, :k])

    def order(self, by: str) -> np.ndarray:
        """(n, K) candidate numbers, best first by a column of the table; of equals the first row is first.

        Raises:
            ValueError: the column holds NaN.
        """
        values = self.table[by].to_numpy(float)[self.rows]
        if np.isnan(values).any():
            raise ValueError(f"column {by!r} holds {int(np.isnan(values).sum())} NaN: such candidates have no rank")
        return np.argsort(-values, axis=1, kind="stable")

    def ranked_at(self, by: str, rank: int = 1) -> np.ndarray:
        """(1, n) positions of the candidates that a column of the table ranks there, 1 being the first."""
        return self.rows[np.arange(len(self.rows)), self.order(by)[:, rank - 1]][None]

    def random(self, rng: np.random.Generator) -> np.ndarray:
        """(S, n) positions, S ≥ 20, every candidate drawn equally often."""
        return np.concatenate([rng.permuted(self.rows, axis=1).T for _ in range(-(-DRAWS // self.k))])

    def selections(self, seed: int = 0) -> dict[Selection, np.ndarray]:
        """Every selection that is compared, (S, n) each.

        Random; by each similarity of the table every rank, and the shuffled first: the candidate whose number is
        ranked first in another image; first by each baseline of the table; the oracle's; beam search's.
        """
        (n, k), rng = self.rows.shape, np.random.default_rng(seed)
        found = {Selection("random", k=k): self.random(rng)}
        for by in similarities(self.table):
            found |= {Selection(by, rank, k): self.ranked_at(by, rank) for rank in range(1, k + 1)}
            # one shuffle only: several share their donors, so the mean over them would seem surer than it is
            of_others = self.order(by)[derangement(rng, n), 0]
            found[Selection(by, 1, k, shuffled=True)] = self.rows[np.arange(n), of_others][None]
        found |= {Selection(by, 1, k): self.ranked_at(by) for by in BASELINES if by in self.table}
        if self.oracle:
            found[Selection("oracle", 1, k)] = self.ranked_at(self.oracle)
        if self.beam is not None:
            found[Selection("beam")] = self.beam[None]
        return found


def of_columns(table: pd.DataFrame, metrics: Sequence[str]) -> EvaluatedCandidates:
    """A table that was evaluated before: its columns, whose means over images are the metrics.

    Args:
        table: with columns image_id, domain and those of the metrics.
        metrics: names of columns.
    Raises:
        ValueError: the images have different numbers of candidates.
    """
    rows, _ = rows_of(table)
    means = {name: mean_of(table[name].to_numpy(float)) for name in metrics}
    return EvaluatedCandidates(table, rows, table["domain"].to_numpy()[rows[:, 0]], means)


def mean_of(values: np.ndarray) -> CorpusMetric:
    """The metric that is the mean of (N,) values, one a candidate, over the images of a corpus."""
    return lambda selection: values[selection].mean(axis=-1)


def rows_of(table: pd.DataFrame) -> tuple[np.ndarray, list[int]]:
    """(n, K) positions in a candidate table, a row an image, and the n image ids.

    Raises:
        ValueError: the images have different numbers of candidates.
    """
    number, ids = pd.factorize(table["image_id"])
    counts = np.bincount(number)
    if len(set(counts)) != 1:
        raise ValueError(
            f"there are {sorted(set(counts.tolist()))} candidates an image: to compare selections every image needs "
            "as many"
        )
    return np.argsort(number, kind="stable").reshape(len(ids), counts[0]), list(ids)


# ── scores of selections ─────────────────────────────────────────────────────────────────────────────────────────────


def measure(evaluated: EvaluatedCandidates, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Scores and gains of every selection, overall and by domain.

    Args:
        evaluated: the candidates.
        seed: of the random selection, the shuffles and the bootstrap; each domain's bootstrap has its own.
        resamples: of the bootstrap.
    Returns:
        a table of effects; see the module's docstring.
    """
    selections = evaluated.selections(seed)
    tables = [
        _measure_corpus(evaluated, selections, images, seed + number, resamples).assign(domain=domain)
        for number, (domain, images) in enumerate(_members(evaluated.domain).items())
    ]
    return pd.concat(tables, ignore_index=True)


def _measure_corpus(
    evaluated: EvaluatedCandidates,
    selections: Mapping[Selection, np.ndarray],
    images: np.ndarray,
    seed: int,
    resamples: int,
) -> pd.DataFrame:
    """Scores and gains of every selection on some of the images; gains are over the first selection, the random one."""
    stack = np.concatenate(list(selections.values()))[:, images]
    sizes = np.array([len(selection) for selection in selections.values()])
    starts = np.cumsum([0, *sizes[:-1]])

    def statistics(indices: np.ndarray) -> np.ndarray:
        corpora = stack[:, indices]
        scores = np.array([metric(corpora) for metric in evaluated.metrics.values()])  # (metrics, all corpora)
        scores = np.add.reduceat(scores, starts, axis=1) / sizes  # (metrics, selections)
        return np.stack([scores, scores - scores[:, :1]]).ravel()

    names = [(metric, selection) for metric in evaluated.metrics for selection in selections]
    recentred = 2 * [METRICS[metric].biased for metric, _ in names]
    intervals = paired_bootstraps(statistics, len(images), resamples, seed, recentred=recentred)
    together = zip(names, intervals[: len(names)], intervals[len(names) :], strict=True)
    return effects_table([(metric, selection, score, gain) for (metric, selection), score, gain in together])


def effects_table(found: Sequence[tuple[str, Selection, Interval, Interval]]) -> pd.DataFrame:
    """A table of effects over all images, from metric, selection, score and gain of each row."""
    rows = [
        {"domain": ALL, "metric": metric, **asdict(selection), **gain.as_row("gain_"), **score.as_row()}
        for metric, selection, score, gain in found
    ]
    return pd.DataFrame(rows, columns=list(EFFECT_COLUMNS)).astype({"rank": "Int64", "k": "Int64"})


def contrast(
    evaluated: EvaluatedCandidates,
    metric: str,
    plus: Sequence[np.ndarray],
    minus: Sequence[np.ndarray],
    resamples: int = RESAMPLES,
) -> Interval:
    """Scores of some selections minus those of others, paired over images: a difference of gains has four of them.

    Args:
        evaluated: the candidates.
        metric: one of its metrics.
        plus: selections, (S, n) each, whose scores are added.
        minus: as many, whose scores are subtracted.
        resamples: of the bootstrap.
    """

    def statistic(indices: np.ndarray) -> float:
        corpora = np.concatenate([selection[:, indices] for selection in (*plus, *minus)])
        values = evaluated.metrics[metric](corpora)
        ends = np.cumsum([len(selection) for selection in (*plus, *minus)])[:-1]
        means = [part.mean() for part in np.split(values, ends)]
        return sum(means[: len(plus)]) - sum(means[len(plus) :])

    return paired_bootstrap(statistic, len(evaluated.rows), resamples, recentred=METRICS[metric].biased)


def gain_of_chance(evaluated: EvaluatedCandidates, by: str, metric: str) -> Interval:
    """What chance gains over random: candidates ranked by other images' similarities, shuffled 500 times.

    Args:
        evaluated: the candidates.
        by: column of similarities.
        metric: one of the evaluated candidates' metrics.
    Returns:
        the mean gain, and the bounds that 95 % of the shuffles lie in. A ranking that gains more knows something.
    """
    rng, n = np.random.default_rng(0), len(evaluated.rows)
    first = evaluated.order(by)[:, 0]
    shuffled = evaluated.rows[np.arange(n), first[[derangement(rng, n) for _ in range(SHUFFLES)]]]  # (SHUFFLES, n)
    score = evaluated.metrics[metric]
    gained = score(shuffled) - score(evaluated.random(np.random.default_rng(0))).mean()
    return Interval(float(gained.mean()), *map(float, np.quantile(gained, [0.025, 0.975])), n, 0)


def correlate(table: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Claims 1 and 3: Spearman's correlation of similarity and metric among the candidates of an image, averaged.

    Metrics that are better when lower are negated, so that ρ > 0 supports the paper. An image whose candidates all
    score the same has no ρ for that pair; it is left out and counted. The last rows are the means over the primary
    pairs, and over the secondary ones where there are such, that an image has.

    Args:
        table: evaluated candidates, with columns of similarities and metrics.
        resamples: of the bootstrap.
    Returns:
        columns ranked_by, metric (both "all" in the rows of means), part ("primary" or "secondary"), rho, low, high,
        n (images), undefined (images).
    """
    pairs = pairs_of_claim("caption", table) + pairs_of_claim("image", table)
    lower = {pair.metric for pair in pairs if METRICS[pair.metric].lower_is_better}
    signed = table.assign(**{metric: -table[metric] for metric in lower})
    per_image = {pair: within_group_spearman(signed, "image_id", pair.ranked_by, pair.metric) for pair in pairs}
    columns = list(per_image.items())
    for part in (PRIMARY, SECONDARY):
        if own := [rho for pair, rho in per_image.items() if pair.part == part]:
            columns.append((Pair(ALL, ALL, part), pd.concat(own, axis=1).mean(axis=1)))
    rows = []
    for pair, rho in columns:
        known = rho.dropna().to_numpy()
        nothing = Interval(np.nan, np.nan, np.nan, 0, 0)
        found = mean_interval(known, resamples) if len(known) else nothing
        bounds = {"rho": found.value, "low": found.low, "high": found.high}
        rows.append(pair._asdict() | bounds | {"n": found.n, "undefined": len(rho) - found.n})
    return pd.DataFrame(rows)


# ── reading a table of effects ───────────────────────────────────────────────────────────────────────────────────────


def similarities(table: pd.DataFrame) -> list[str]:
    """Which similarities a candidate table has as columns, or a table of effects in its column ranked_by."""
    names = set(table["ranked_by"]) if "ranked_by" in table else set(table)
    return [by for by in SIMILARITIES if by in names]


def scores(
    effects: pd.DataFrame, metric: str, ranked_by: str, rank: int = 1, *, k: int | None = None, shuffled: bool = False
) -> dict[str, Interval]:
    """Scores of a selection by domain, "all" first.

    Args:
        effects: a table of effects.
        metric: one of its metrics.
        ranked_by: as in `Selection`; "random" and "beam" have no ranks.
        rank: 1 is the candidate ranked first.
        k: of how many candidates it is chosen; None where the table has one number only.
        shuffled: the shuffled ranking instead.
    Raises:
        KeyError: nothing like it was measured, or several numbers of candidates were and `k` names none.
    """
    return {
        row["domain"]: Interval.from_row(row) for row in _rows(effects, metric, Selection(ranked_by, rank, k, shuffled))
    }


def gains(
    effects: pd.DataFrame, metric: str, ranked_by: str, rank: int = 1, *, k: int | None = None, shuffled: bool = False
) -> dict[str, Interval]:
    """Score of a selection minus that of the random one, by domain, "all" first; arguments and errors as `scores`."""
    rows = _rows(effects, metric, Selection(ranked_by, rank, k, shuffled))
    return {row["domain"]: Interval.from_row(row, "gain_") for row in rows}


def curves(effects: pd.DataFrame, metric: str) -> dict[str, list[Interval]]:
    """Similarity -> the overall score at rank 1 … K (Fig. 3); arguments and errors as `scores`."""
    ranks = sorted(int(rank) for rank in effects["rank"].dropna().unique())
    return {by: [scores(effects, metric, by, rank)[ALL] for rank in ranks] for by in similarities(effects)}


def _rows(effects: pd.DataFrame, metric: str, selection: Selection) -> list[dict]:
    """Rows of one metric and selection, a domain each; `rank` and `k` are no condition where a row has none."""
    ranked = effects["rank"].isna() | (effects["rank"] == selection.rank)
    same = (effects["ranked_by"] == selection.ranked_by) & (effects["shuffled"] == selection.shuffled) & ranked
    if selection.k is not None:
        same &= effects["k"].isna() | (effects["k"] == selection.k)
    chosen = effects[(effects["metric"] == metric) & same]
    if chosen.empty or chosen["domain"].duplicated().any():
        columns = ("metric", "ranked_by", "rank", "k")
        known = (f"{name} {', '.join(map(str, effects[name].dropna().unique()))}" for name in columns)
        problem = "nothing" if chosen.empty else "more than one number of candidates"
        raise KeyError(f"{problem} measured of {metric!r} for {selection}: name one each of {'; '.join(known)}")
    return chosen.to_dict("records")


def _members(domain: np.ndarray) -> dict[str, np.ndarray]:
    """Which images belong to "all" and to each domain there is, as positions."""
    inside = {name: np.flatnonzero(domain == name) for name in DOMAINS}
    return {ALL: np.arange(len(domain))} | {name: images for name, images in inside.items() if len(images)}


def derangement(rng: np.random.Generator, n: int) -> np.ndarray:
    """A permutation of n images that leaves none where it was, if n > 1."""
    around = rng.permutation(n)
    other = np.empty(n, dtype=int)
    other[around] = np.roll(around, 1)
    return other
