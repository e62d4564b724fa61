"""Runs of the cycle study side by side: the scores of every arm and the differences between arms, with intervals.

Arms are compared seed by seed on the same images. The bootstrap draws seeds anew, then images; corpus metrics are
computed again on every resample, once for all comparisons.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor, from_numpy

from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.image_metrics import fid
from dalleflamingo.evaluation.intervals import Interval, resample
from dalleflamingo.profiles import Profile
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.cycle_arms import START, TABLE_3
from dalleflamingo.research.cycle_study import read_result
from dalleflamingo.research.metrics import METRICS
from dalleflamingo.research.ranking import ALL
from dalleflamingo.research.resampling import bootstrap_of_runs
from dalleflamingo.runs import write_whole

RESAMPLES, RESAMPLES_OF_SETS = 1000, 300  # FID, a metric of a set, takes its time
_RUN = ["arm", "seed"]
CAPTIONS, IMAGES = "cycle-captions.parquet", "cycle-images.parquet"

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class EvaluatedRuns:
    """Runs of one captioner that were evaluated on the same n images.

    Attributes:
        runs: (arm, seed) of each. domain: (n,) of the images.
        scores: metric -> function of S runs and some images, as positions, which gives (S,) values of the corpora.
        resamples: of the bootstrap. resamples_of_sets: likewise, of metrics of sets of images.
    """

    runs: tuple[tuple[str, int], ...]
    domain: np.ndarray
    scores: Mapping[str, Score]
    resamples: int = RESAMPLES
    resamples_of_sets: int = RESAMPLES_OF_SETS
    _kept: dict[tuple[str, str], tuple[np.ndarray, np.ndarray, int]] = field(default_factory=dict, repr=False)

    def seeds(self, arm: str) -> list[int]:
        """Training seeds of an arm; none where it was not run."""
        return sorted(seed for name, seed in self.runs if name == arm)

    def shared_seeds(self, arms: Sequence[str]) -> list[int]:
        """The training seeds that all of these arms have; the models before training, once evaluated, have any."""
        if START in arms and not self.seeds(START):
            return []
        trained = [set(self.seeds(arm)) for arm in arms if arm != START]
        return sorted(set.intersection(*trained)) if trained else [0]

    def value(self, metric: str, arm: str, minus: str | None = None, domain: str = ALL) -> Interval:
        """An arm's metric, mean over its seeds; or its difference to another arm with the same seeds.

        Args:
            metric: of `scores`.
            arm: of `runs`.
            minus: the other arm.
            domain: of the images, or all.
        """
        if minus is None:
            return self.combine(metric, lambda mean: mean(arm), [arm], domain)
        return self.combine(metric, lambda mean: mean(arm) - mean(minus), [arm, minus], domain)

    def combine(
        self,
        metric: str,
        function: Callable[[Callable[[str], float]], float],
        arms: Sequence[str],
        domain: str = ALL,
    ) -> Interval:
        """A function of the arms' means over the seeds that all of them have.

        Args:
            metric: of `scores`.
            function: takes a function that gives an arm's mean.
            arms: those that it asks for.
            domain: of the images, or all.
        """
        shared = self.shared_seeds(arms)
        columns = {
            arm: np.array([self.runs.index((arm, 0 if arm == START else seed)) for seed in shared]) for arm in arms
        }

        def statistic(chosen: np.ndarray, scores: np.ndarray) -> float:
            return function(lambda arm: float(scores[columns[arm][chosen]].mean()))

        sample, drawn, n = self._resampled(metric, domain)
        return bootstrap_of_runs(statistic, len(shared), sample, drawn, n, recentred=METRICS[metric].biased)

    def _resampled(self, metric: str, domain: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Every run's score, its scores on resampled images, computed once, and the number of images."""
        if (metric, domain) not in self._kept:
            inside = np.arange(len(self.domain)) if domain == ALL else np.flatnonzero(self.domain == domain)
            every, score = np.arange(len(self.runs)), self.scores[metric]
            resamples = self.resamples_of_sets if METRICS[metric].of_sets else self.resamples
            drawn = resample(lambda images: score(every, inside[images]), len(inside), resamples)
            self._kept[metric, domain] = *drawn, len(inside)
        return self._kept[metric, domain]


def evaluated_captions(table: pd.DataFrame, dataset: Dataset, **resamples: int) -> EvaluatedRuns:
    """Captions by the runs of one captioner.

    Args:
        table: columns arm, seed, image_id, caption; every run has described every image.
        dataset: the images.
        resamples: as of `EvaluatedRuns`.
    """
    runs = tuple(table[_RUN].drop_duplicates().itertuples(index=False, name=None))
    number = {run: i for i, run in enumerate(runs)}
    candidate = [number[run] for run in table[_RUN].itertuples(index=False, name=None)]
    evaluated = evaluate_captions(table.assign(candidate=candidate).sort_values("candidate", kind="stable"), dataset)

    def score_of(metric: str) -> Score:
        return lambda chosen, images: evaluated.metrics[metric](evaluated.rows[images][:, chosen].T)

    return EvaluatedRuns(runs, evaluated.domain, {name: score_of(name) for name in evaluated.metrics}, **resamples)


def evaluated_images(table: pd.DataFrame, dataset: Dataset, real: Tensor, **resamples: int) -> EvaluatedRuns:
    """Images by the runs of one generator.

    Args:
        table: columns arm, seed, image_id, clip_distance, features (a list in each row).
        dataset: the real images.
        real: (n, D) features of these, in the order of the data set.
        resamples: as of `EvaluatedRuns`.
    """
    ids = [example.image_id for example in dataset]
    found = {run: part.set_index("image_id").loc[ids] for run, part in table.groupby(_RUN)}
    distances = np.stack([part["clip_distance"].to_numpy() for part in found.values()])  # (runs, n)
    features = from_numpy(np.stack([np.stack(part["features"].to_list()) for part in found.values()])).float()
    scores = {
        "clip_distance": lambda chosen, images: distances[chosen][:, images].mean(axis=1),
        "fid": lambda chosen, images: np.array([fid(real[images], features[run][images]) for run in chosen]),
    }
    domain = np.array([example.domain for example in dataset], dtype=object)
    return EvaluatedRuns(tuple(found), domain, scores, **resamples)


@dataclass(frozen=True)
class StudyResults:
    """Everything that was measured.

    Attributes:
        captions: "nocaps" and "coco" -> captioner -> its runs.
        images: "nocaps" -> captioner -> runs of the generators that were trained with it.
    """

    captions: Mapping[str, Mapping[str, EvaluatedRuns]]
    images: Mapping[str, Mapping[str, EvaluatedRuns]]


def read_runs(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The captions and the generated images of every run that is done, a row each.

    Args:
        folder: of all runs.
    Raises:
        FileNotFoundError: no run with images is done.
    """
    found = [read_result(path) for path in sorted(folder.glob("*/result.json"))]
    if not any(run.get("images") for run in found):
        raise FileNotFoundError(
            f"{folder} has no run that is done: `python -m dalleflamingo research cycle` makes them"
        )
    captions, images = [], []
    for run in found:
        names = {name: run[name] for name in ("captioner", "arm", "seed")}
        for corpus, by_id in run["captions"].items():
            captions += [names | {"corpus": corpus, "image_id": i, "caption": text} for i, text in by_id.items()]
        for corpus, columns in run.get("images", {}).items():
            images.append(pd.DataFrame(columns).assign(corpus=corpus, **names))
    return pd.DataFrame(captions), pd.concat(images, ignore_index=True)


def write_tables(captions: pd.DataFrame, images: pd.DataFrame, results: Path) -> None:
    """Keep what `read_runs` found, as `read_tables` reads it.

    Args:
        captions: of `read_runs`.
        images: of `read_runs`; features, which FID needs, are kept in float16, as runs keep them.
        results: folder of the tables.
    """
    features = [np.float16(row) for row in images["features"]]
    for name, table in ((CAPTIONS, captions), (IMAGES, images.round(4).assign(features=features))):
        write_whole(results / name, partial(table.to_parquet, index=False))


def count_runs(captions: pd.DataFrame) -> int:
    """How many runs a table of captions is of."""
    return len(captions[["captioner", *_RUN]].drop_duplicates())


def require_no_fewer(captions: pd.DataFrame, results: Path) -> None:
    """Refuse to replace the tables of a study by those of one that is less complete.

    Args:
        captions: of `read_runs`.
        results: folder of the tables, if there are some.
    Raises:
        ValueError: the tables there are of more runs, or have more captions.
    """
    if not (results / CAPTIONS).exists():
        return
    before = pd.read_parquet(results / CAPTIONS, columns=["captioner", *_RUN])
    if len(captions) < len(before) or count_runs(captions) < count_runs(before):
        there, now = (f"{count_runs(table)} runs with {len(table):,} captions" for table in (before, captions))
        raise ValueError(
            f"{results / CAPTIONS} is of {there}, and here are {now}: finish the runs (`python -m dalleflamingo "
            "research cycle`), give their --runs, or write this report elsewhere with another --docs"
        )


def read_tables(results: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `write_tables` kept: the same as the runs' own folders, which take hours to make.

    Args:
        results: folder of the tables.
    Raises:
        FileNotFoundError: the folder has no such tables.
    """
    if not (results / CAPTIONS).exists():
        raise FileNotFoundError(
            f"no run is done, and {results} has no table of earlier ones: "
            "`python -m dalleflamingo research cycle` makes them"
        )
    return pd.read_parquet(results / CAPTIONS), pd.read_parquet(results / IMAGES)


def evaluate_runs(
    captions: pd.DataFrame,
    images: pd.DataFrame,
    datasets: Mapping[str, Dataset],
    generated: Mapping[str, Dataset],
    profile: Profile,
    **resamples: int,
) -> StudyResults:
    """Evaluate what `read_runs` found.

    Args:
        captions: of `read_runs`.
        images: of `read_runs`.
        datasets: described images by name, with the human captions.
        generated: images whose captions were rendered, likewise.
        profile: names the first captioner and the network of FID.
        resamples: as of `EvaluatedRuns`.
    """
    by_captioner = {
        corpus: {
            captioner: evaluated_captions(part[part["corpus"] == corpus], dataset, **resamples)
            for captioner, part in captions.groupby("captioner")
        }
        for corpus, dataset in datasets.items()
    }
    by_teacher = {}
    for corpus, dataset in generated.items():
        parts, real = (
            _by_captioner(images[images["corpus"] == corpus], profile.captioners[0]),
            real_features(dataset, profile),
        )
        by_teacher[corpus] = {who: evaluated_images(part, dataset, real, **resamples) for who, part in parts.items()}
    return StudyResults(by_captioner, by_teacher)


def _by_captioner(images: pd.DataFrame, first: str) -> dict[str, pd.DataFrame]:
    """Captioner -> rows; what labels teach the generator no captioner changes, so all share these rows of the first.

    Loss (3) reads images and human captions alone, through the generator's own text encoder. With the alternating
    schedule no step trains both models, and so neither the bound on the gradient's norm nor AdamW couples them.
    """
    of_first = images[images["captioner"] == first]
    shared = of_first[of_first["arm"].isin((START, *TABLE_3[:2]))]
    others = images[images["captioner"] != first].groupby("captioner")
    return {first: of_first} | {captioner: pd.concat([shared, part]) for captioner, part in others}


def real_features(dataset: Dataset, profile: Profile) -> Tensor:
    """(n, D) features of a data set's own images by the profile's Inception."""
    inception = FeatureExtractor.from_registry(profile.inception, profile.device)
    return inception.extract([dataset.open(example) for example in dataset]).features
