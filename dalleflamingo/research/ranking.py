"""Picks, ways to choose one candidate an image, and what each is worth: ranked first, at random, the best there is.

A *pick* is an (S, n) array of row positions: S ways to choose one candidate for each of n images. Its score is the mean
over S corpora of a corpus metric, computed anew on every bootstrap sample, n-gram statistics and FID included; each
domain is a corpus of its own. The pick "random" holds at least 20 draws, so balanced that every candidate is drawn
equally often: for metrics that are means over images it is the exact expectation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import comb

import numpy as np
import pandas as pd

from dalleflamingo.datasets import DOMAINS, Dataset
from dalleflamingo.evaluation.caption_metrics import BleuTable, Cider
from dalleflamingo.evaluation.caption_tokenizer import tokenize
from dalleflamingo.evaluation.word_movers import WordVectors
from dalleflamingo.intervals import Interval, mean_interval, paired_bootstrap, paired_bootstraps, within_group_spearman
from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.scene_graph import scene_graph_f1

SIMILARITIES = ("clip", "dino", "fidelity", "pixels", "text_clip", "text_sbert", "text_cider", "text_wmd")
# other ways to rank captions, which need no picture drawn; columns of `baselines.add`
BASELINES = ("length", "likelihood", "consensus", "clip_score")
LOWER = ("wmd", "clip_distance", "dino_distance", "fid")  # metrics that are better when lower
OF_SETS = ("fid", "is")  # metrics of a set of pictures, which resamples bias: their intervals are recentred
# what claims 1 and 3 correlate: a metric of single captions or pictures; in the miniature F1 stands for SPICE
OF_CAPTIONS, OF_PICTURES = ("cider", "bleu4", "f1", "wmd"), ("clip_distance", "dino_distance")
DRAWS = 20  # at least so many random picks
RESAMPLES = 2000
ALL = "all"

CorpusMetric = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class EvaluatedCandidates:
    """A candidate table held against the truth.

    Attributes:
        table: K candidates for each of n images, with a column for each metric that a single candidate has.
        rows: (n, K) positions in the table, a row an image. domain: (n,) object.
        metrics: name -> a function of a pick, (S, n) -> (S,); `LOWER` says which are better when lower.
        best: the column that the oracle ranks by, if the truth is known.
        beam: (n,) positions of the captions by beam search, behind the table's, if there are such.
        tokenizer: which one split the words, if the metrics have any.
    """

    table: pd.DataFrame
    rows: np.ndarray
    domain: np.ndarray
    metrics: dict[str, CorpusMetric]
    best: str | None = None
    beam: np.ndarray | None = None
    tokenizer: str = ""

    @property
    def ranked(self) -> pd.DataFrame:
        """The rows of the table that `rows` names: with `first`, not all of them."""
        return self.table.iloc[self.rows.ravel()]

    def first(self, k: int) -> "EvaluatedCandidates":
        """The same, of each image only the first k candidates."""
        return replace(self, rows=self.rows[:, :k])

    def picks(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Every choice that is compared, (S, n) each.

        "clip 1" … "clip K": the candidate ranked there, of equals the first row first, as in `reconstruct.rank`; of
        the baselines that are there the first only, "length 1".
        "random". "clip shuffled": the candidate whose number is ranked first in another image, so that nothing but
        chance is gained. "oracle": the best by `best`. "beam": the caption by beam search.
        """
        n, k = self.rows.shape
        rng, images = np.random.default_rng(seed), np.arange(n)
        mixed = [rng.permuted(self.rows, axis=1).T for _ in range(-(-DRAWS // k))]
        picks = {"random": np.concatenate(mixed)}
        for by in similarities(self.table):
            order = self.order(by)  # (n, K) candidates, best first
            picks |= {f"{by} {rank + 1}": self.rows[images, order[:, rank]][None] for rank in range(k)}
            # one shuffle only: several share their donors, so the mean over them would seem surer than it is
            picks[f"{by} shuffled"] = self.rows[images, order[_others(rng, n), 0]][None]
        for by in (by for by in BASELINES if by in self.table):
            picks[f"{by} 1"] = self.rows[images, self.order(by)[:, 0]][None]
        if self.best:
            picks["oracle"] = self.rows[images, self.order(self.best)[:, 0]][None]
        if self.beam is not None:
            picks["beam"] = self.beam[None]
        return picks

    def order(self, by: str) -> np.ndarray:
        """(n, K) candidate numbers, best first by a column of the table."""
        return _order(self.table[by].to_numpy(float)[self.rows], by)


def evaluate_captions(
    table: pd.DataFrame, dataset: Dataset, beam: Mapping[int, str] | None = None, vectors: WordVectors | None = None
) -> EvaluatedCandidates:
    """Candidate captions against the human ones, their n-grams counted once.

    Args:
        table: as from `reconstruct.image_text_image`.
        dataset: its images, with their references, and their scenes where the world is the miniature.
        beam: image id -> the caption by beam search, judged beside the candidates.
        vectors: for WMD; None leaves it out.
    Returns:
        metrics and columns `cider` (idf from all n images) and `bleu4`, each × 100 as published tables are; `wmd`, to
        the nearest reference; in the miniature `f1`, the scene-graph F1 in [0, 1], and as a column only `right`: no
        wrong kind, colour or relation.
    Raises:
        ValueError: an image has no references, is not in the data set, or has another number of candidates.
    """
    examples = {example.image_id: example for example in dataset}
    rows, ids = rows_of(table)
    mute = [i for i in ids if i not in examples or not examples[i].references]
    if mute:
        raise ValueError(
            f"{len(mute)} of {len(ids)} images have no human captions in {dataset.name} (such as {mute[:3]}): to judge "
            "captions, every image needs human ones"
        )
    image_ids = [*table["image_id"], *(ids if beam else [])]
    captions = [*table["caption"], *(beam[i] for i in ids if beam)]
    references = {i: list(examples[i].references) for i in ids}
    cider, bleu = Cider(references).table(image_ids, captions), BleuTable(references, image_ids, captions)
    metrics: dict[str, CorpusMetric] = {
        "cider": lambda pick: 100 * cider.corpus(pick),
        "bleu4": lambda pick: 100 * bleu.corpus(pick)[..., 3],
    }
    columns = {"cider": 100 * cider.scores(), "bleu4": 100 * bleu.scores()[:, 3]}
    if vectors:
        columns["wmd"] = wmd = _nearest_reference(vectors, references, image_ids, captions)
        metrics["wmd"] = mean_of(wmd)
    if all("scene" in examples[i].extra for i in ids):
        scenes = {i: scene_graph.Scene.from_dict(examples[i].extra["scene"]) for i in ids}
        columns["f1"] = f1 = scene_graph_f1(captions, [scenes[i] for i in image_ids])
        pairs = zip(captions, image_ids, strict=True)
        columns["right"] = np.array([scene_graph.is_right(caption, scenes[i]) for caption, i in pairs])
        metrics["f1"] = mean_of(f1)
    return EvaluatedCandidates(
        table.assign(**{name: values[: len(table)] for name, values in columns.items()}),
        rows,
        np.array([examples[i].domain for i in ids], dtype=object),
        metrics,
        "f1" if "f1" in metrics else None,
        None if beam is None else len(table) + np.arange(len(ids)),
        bleu.tokenizer,
    )


def mean_of(values: np.ndarray) -> CorpusMetric:
    """The metric that is the mean of (N,) values, one a candidate, over the images of a corpus."""
    return lambda pick: values[pick].mean(axis=-1)


def rows_of(table: pd.DataFrame) -> tuple[np.ndarray, list[int]]:
    """(n, K) positions in a candidate table, a row an image, and the n image ids.

    Raises:
        ValueError: the images have different numbers of candidates.
    """
    number, ids = pd.factorize(table["image_id"])
    counts = np.bincount(number)
    if len(set(counts)) != 1:
        raise ValueError(
            f"there are {sorted(set(counts.tolist()))} candidates an image: to compare picks every image needs as many"
        )
    return np.argsort(number, kind="stable").reshape(len(ids), counts[0]), list(ids)


def _order(values: np.ndarray, by: str) -> np.ndarray:
    if np.isnan(values).any():
        raise ValueError(f"column {by!r} holds {int(np.isnan(values).sum())} NaN: such candidates have no rank")
    return np.argsort(-values, axis=1, kind="stable")


def _nearest_reference(
    vectors: WordVectors, references: Mapping[int, list[str]], image_ids: Sequence[int], captions: Sequence[str]
) -> np.ndarray:
    gold, split = tokenize(references), tokenize({"captions": captions})["captions"]
    pairs = zip(image_ids, split, strict=True)
    return np.array([min(vectors.distance(caption, other) for other in gold[i]) for i, caption in pairs])


def measure(judged: EvaluatedCandidates, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Score of every pick, and its gain over the random one, in all and by domain; returns as `score_picks`."""
    picks = judged.picks(seed)
    tables = [
        score_picks(judged, picks, dict.fromkeys(picks, "random"), inside, domain, seed + number, resamples)
        for number, (domain, inside) in enumerate(_members(judged.domain).items())
    ]
    return pd.concat(tables, ignore_index=True)


def of_columns(table: pd.DataFrame, metrics: Sequence[str]) -> EvaluatedCandidates:
    """A table that was judged before: its columns, whose means over images are the metrics."""
    rows, _ = rows_of(table)
    means = {name: mean_of(table[name].to_numpy(float)) for name in metrics}
    return EvaluatedCandidates(table, rows, table["domain"].to_numpy()[rows[:, 0]], means)


def first_of_any(
    judged: EvaluatedCandidates, metric: str, numbers: Sequence[int]
) -> Callable[[np.ndarray], np.ndarray]:
    """What the candidate ranked first among any k of the K scores, mean over all choices of k.

    The one ranked rth of K is first if the other k − 1 are among the K − r behind it.

    Args:
        metric: a mean over the images of a corpus, so not BLEU. numbers: those k.
    Returns:
        images, as positions -> (similarities, numbers), of the corpus that they make.
    Raises:
        ValueError: a k is not between 1 and K.
    """
    count = judged.rows.shape[1]
    for k in numbers:
        if not 1 <= k <= count:
            raise ValueError(f"the first of any {k} of {count} candidates: take between 1 and {count}")
    chance = np.array([[comb(count - rank, k - 1) / comb(count, k) for k in numbers] for rank in range(1, count + 1)])
    ranked = [np.take_along_axis(judged.rows, judged.order(by), axis=1).T for by in similarities(judged.table)]
    every = np.stack(ranked)  # (similarities, K, n)
    return lambda images: judged.metrics[metric](every[..., images]) @ chance


def growth(
    judged: EvaluatedCandidates,
    numbers: Sequence[int],
    metrics: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """Fig. 9: "clip of 5", the score of the candidate ranked first among any 5 of the K, for each of `numbers`; and its
    gain over a random one, which has the same expectation whatever their number.

    Args:
        metrics: as `first_of_any` takes them.
    Returns:
        as `score_picks`.
    """
    ranked_by, found = similarities(judged.table), []
    names = [f"random of {k}" for k in numbers] + [f"{by} of {k}" for by, k in product(ranked_by, numbers)]
    for metric in metrics:
        first = first_of_any(judged, metric, (1, *numbers))

        def statistics(images: np.ndarray, first: Callable[[np.ndarray], np.ndarray] = first) -> np.ndarray:
            scores = first(images)
            random = scores[0, 0]  # the first of any one
            values = np.concatenate([np.full(len(numbers), random), scores[:, 1:].ravel()])
            return np.concatenate([values, values - random])

        intervals = paired_bootstraps(statistics, len(judged.rows), resamples, seed)
        together = zip(names, intervals[: len(names)], intervals[len(names) :], strict=True)
        found += [_row(ALL, metric, name, score, gain) for name, score, gain in together]
    return pd.DataFrame(found)


def contrast(
    judged: EvaluatedCandidates,
    metric: str,
    plus: Sequence[np.ndarray],
    minus: Sequence[np.ndarray],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The scores of some picks minus those of others, paired over images: a difference of gains has four of them."""

    def statistic(indices: np.ndarray) -> float:
        corpora = np.concatenate([pick[:, indices] for pick in (*plus, *minus)])
        values = judged.metrics[metric](corpora)
        means = [part.mean() for part in np.split(values, np.cumsum([len(pick) for pick in (*plus, *minus)])[:-1])]
        return sum(means[: len(plus)]) - sum(means[len(plus) :])

    return paired_bootstrap(statistic, len(judged.rows), resamples, seed, recentred=metric in OF_SETS)


def score_picks(
    judged: EvaluatedCandidates,
    picks: Mapping[str, np.ndarray],
    against: Mapping[str, str],
    inside: np.ndarray,
    domain: str,
    seed: int,
    resamples: int,
) -> pd.DataFrame:
    """Score of every pick, and its gain over another.

    Args:
        picks: name -> (S, n). against: name -> the name of the pick that its gain is over.
        inside: which images, as positions. domain: their name.
    Returns:
        columns domain, metric, pick, n (images); value, low, high: the score with its 95 % interval; gain, gain_low,
        gain_high: that minus the other pick's, paired over images; seed, of the bootstrap.
    """
    stack, starts = np.concatenate(list(picks.values()))[:, inside], np.cumsum([0, *map(len, picks.values())][:-1])
    sizes = np.array([len(pick) for pick in picks.values()])
    others = [list(picks).index(against[name]) for name in picks]

    def statistics(indices: np.ndarray) -> np.ndarray:
        corpora = stack[:, indices]
        scores = np.array([metric(corpora) for metric in judged.metrics.values()])  # (metrics, all corpora)
        scores = np.add.reduceat(scores, starts, axis=1) / sizes  # (metrics, picks)
        return np.stack([scores, scores - scores[:, others]]).ravel()

    names = [(metric, pick) for metric in judged.metrics for pick in picks]
    shifted = 2 * [metric in OF_SETS for metric, _ in names]
    found = iter(paired_bootstraps(statistics, len(inside), resamples, seed, recentred=shifted))
    absolute, paired = [next(found) for _ in names], list(found)
    return pd.DataFrame([
        _row(domain, metric, pick, score, gain)
        for (metric, pick), score, gain in zip(names, absolute, paired, strict=True)
    ])  # fmt: skip


def _row(domain: str, metric: str, pick: str, score: Interval, gain: Interval) -> dict:
    return {
        "domain": domain, "metric": metric, "pick": pick, "n": score.n,
        "value": score.value, "low": score.low, "high": score.high,
        "gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "seed": score.seed,
    }  # fmt: skip


def shuffle(judged: EvaluatedCandidates, by: str, metric: str, shuffles: int = 500, seed: int = 0) -> Interval:
    """What chance gains: over random when candidates are ranked by other images' similarities, shuffled many times.

    Returns:
        the mean gain, and the bounds that 95 % of the shuffles lie in. A ranking that gains more knows something.
    """
    rng, (n, _) = np.random.default_rng(seed), judged.rows.shape
    first = judged.order(by)[:, 0]
    picked = judged.rows[np.arange(n), first[[_others(rng, n) for _ in range(shuffles)]]]  # (shuffles, n)
    score = judged.metrics[metric]
    found = score(picked) - score(judged.picks(seed)["random"]).mean()
    return Interval(float(found.mean()), *map(float, np.quantile(found, [0.025, 0.975])), n, seed)


def correlate(table: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Claims 1 and 3: Spearman's correlation of similarity and score among the candidates of an image, averaged.

    Metrics that are better when lower are negated, so that ρ > 0 is the paper's side. An image whose candidates all
    score alike has none for that pair; it is left out and counted. The last row is the mean over the pairs that an
    image has.

    Returns:
        columns ranked_by, metric ("all" in the last row), rho, low, high, n (images), undefined (images).
    """
    measured = [metric for metric in (*OF_CAPTIONS, *OF_PICTURES) if metric in table]
    pairs = [(by, metric) for by in similarities(table) for metric in measured]
    signed = table.assign(**{metric: -table[metric] for metric in measured if metric in LOWER})
    per_image = pd.DataFrame({pair: within_group_spearman(signed, "image_id", *pair) for pair in pairs})
    columns = [*((pair, per_image[pair]) for pair in pairs), ((ALL, ALL), per_image.mean(axis=1))]
    rows = []
    for (by, metric), rho in columns:
        known = rho.dropna().to_numpy()
        nothing = Interval(np.nan, np.nan, np.nan, 0, seed)
        found = mean_interval(known, resamples, seed) if len(known) else nothing
        rows.append({
            "ranked_by": by, "metric": metric, "rho": found.value, "low": found.low, "high": found.high,
            "n": found.n, "undefined": len(rho) - found.n,
        })  # fmt: skip
    return pd.DataFrame(rows)


def similarities(table: pd.DataFrame) -> list[str]:
    """Which similarities a candidate table has as columns, or a table of effects as picks."""
    names = set(table["pick"].str.split().str[0]) if "pick" in table else set(table)
    return [by for by in SIMILARITIES if by in names]


def scores(effects: pd.DataFrame, metric: str, pick: str) -> dict[str, Interval]:
    """Domain ("all" first) -> the pick's score."""
    return _intervals(effects, metric, pick, ("value", "low", "high"))


def gains(effects: pd.DataFrame, metric: str, pick: str) -> dict[str, Interval]:
    """Domain ("all" first) -> the pick's score minus the random pick's; "clip" stands for "clip 1"."""
    first = f"{pick} 1" if pick in (*SIMILARITIES, *BASELINES) else pick
    return _intervals(effects, metric, first, ("gain", "gain_low", "gain_high"))


def curves(effects: pd.DataFrame, metric: str, domain: str = ALL) -> dict[str, list[Interval]]:
    """Similarity -> the score at rank 1 … K (Fig. 3)."""
    ranks = sorted({int(pick.split()[1]) for pick in effects["pick"] if pick[-1].isdigit()})
    return {by: [scores(effects, metric, f"{by} {rank}")[domain] for rank in ranks] for by in similarities(effects)}


def _intervals(effects: pd.DataFrame, metric: str, pick: str, columns: Sequence[str]) -> dict[str, Interval]:
    chosen = effects[(effects["metric"] == metric) & (effects["pick"] == pick)]
    if chosen.empty:
        known = ", ".join(effects["metric"].unique()), ", ".join(effects["pick"].unique())
        raise KeyError(f"nothing measured of {metric!r} for {pick!r}; there are the metrics {known[0]} for {known[1]}")
    rows = chosen.to_dict("records")
    return {row["domain"]: Interval(*(row[name] for name in columns), row["n"], row["seed"]) for row in rows}


def _members(domain: np.ndarray) -> dict[str, np.ndarray]:
    """Which images belong to "all" and to each domain there is, as positions."""
    inside = {name: np.flatnonzero(domain == name) for name in DOMAINS}
    return {ALL: np.arange(len(domain))} | {name: images for name, images in inside.items() if len(images)}


def _others(rng: np.random.Generator, n: int) -> np.ndarray:
    """A permutation of n images that leaves none in its place, if n > 1."""
    around = rng.permutation(n)
    other = np.empty(n, dtype=int)
    other[around] = np.roll(around, 1)
    return other
