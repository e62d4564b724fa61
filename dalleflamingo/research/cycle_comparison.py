"""Runs of the cycle study side by side: every arm's scores, and differences between arms, with their intervals.

Arms are compared seed by seed on the same pictures; seeds are drawn anew by the bootstrap, then pictures, and the
corpus metrics are computed again on every draw, once for all that is asked of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dalleflamingo import profiles
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.image_metrics import fid
from dalleflamingo.intervals import Interval, bootstrap_of_runs, resampled
from dalleflamingo.research.cycle_study import FIRST, START, TABLE_3, tested
from dalleflamingo.research.ranking import ALL, evaluate_captions

RESAMPLES, RESAMPLES_OF_FID = 1000, 300
_RUN = ["arm", "seed"]

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Examined:
    """Runs that were tested on the same n images.

    Attributes:
        runs: (arm, seed) of each. domain: (n,) of the images.
        scores: metric -> function of S runs and some images, as positions, which gives (S,) values of the corpora.
    """

    runs: tuple[tuple[str, int], ...]
    domain: np.ndarray
    scores: Mapping[str, Score]
    _kept: dict[tuple[str, str], tuple[np.ndarray, np.ndarray, int]] = field(default_factory=dict, repr=False)

    def seeds(self, arm: str) -> list[int]:
        """Of the arm's runs; none where it was not run."""
        return sorted(seed for name, seed in self.runs if name == arm)

    def shared(self, arms: Sequence[str]) -> list[int]:
        """The seeds that all of these arms have; the untrained models' is 0."""
        trained = [set(self.seeds(arm)) for arm in arms if arm != START]
        return sorted(set.intersection(*trained)) if trained else [0]

    def value(self, metric: str, arm: str, minus: str | None = None, domain: str = ALL) -> Interval:
        """An arm's metric, mean over its seeds; or its difference to another's with the same seeds."""
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
        """A function of the arms' means, over the seeds that all of `arms` have; the untrained models have any."""
        shared = self.shared(arms)
        columns = {
            arm: np.array([self.runs.index((arm, 0 if arm == START else seed)) for seed in shared]) for arm in arms
        }

        def statistic(chosen: np.ndarray, scores: np.ndarray) -> float:
            return function(lambda arm: float(scores[columns[arm][chosen]].mean()))

        sample, drawn, n = self._resampled(metric, domain)
        return bootstrap_of_runs(statistic, len(shared), sample, drawn, n, recentred=metric == "fid")

    def _resampled(self, metric: str, domain: str) -> tuple[np.ndarray, np.ndarray, int]:
        """Every run's score, and its scores on pictures drawn anew, computed once; and the number of pictures."""
        if (metric, domain) not in self._kept:
            inside = np.arange(len(self.domain)) if domain == ALL else np.flatnonzero(self.domain == domain)
            every, score = np.arange(len(self.runs)), self.scores[metric]
            resamples = RESAMPLES_OF_FID if metric == "fid" else RESAMPLES
            drawn = resampled(lambda images: score(every, inside[images]), len(inside), resamples)
            self._kept[metric, domain] = *drawn, len(inside)
        return self._kept[metric, domain]


def of_captions(table: pd.DataFrame, dataset: Dataset) -> Examined:
    """Captions by the runs of one captioner.

    Args:
        table: columns arm, seed, image_id, caption; every run has described every image.
    """
    runs = tuple(table[_RUN].drop_duplicates().itertuples(index=False, name=None))
    number = {run: i for i, run in enumerate(runs)}
    candidate = [number[run] for run in table[_RUN].itertuples(index=False, name=None)]
    judged = evaluate_captions(table.assign(candidate=candidate).sort_values("candidate", kind="stable"), dataset)

    def of(metric: str) -> Score:
        return lambda chosen, images: judged.metrics[metric](judged.rows[images][:, chosen].T)

    return Examined(runs, judged.domain, {name: of(name) for name in judged.metrics})


def of_pictures(table: pd.DataFrame, dataset: Dataset, real: torch.Tensor) -> Examined:
    """Pictures by the runs of one generator.

    Args:
        table: columns arm, seed, image_id, clip_distance, features (a list in each row).
        real: (n, D) features of the data set's pictures, in its order.
    """
    ids = [example.image_id for example in dataset]
    found = {run: part.set_index("image_id").loc[ids] for run, part in table.groupby(_RUN)}
    distances = np.stack([part["clip_distance"].to_numpy() for part in found.values()])  # (runs, n)
    features = torch.tensor(np.stack([np.stack(part["features"].to_list()) for part in found.values()])).float()
    scores = {
        "clip_distance": lambda chosen, images: distances[chosen][:, images].mean(axis=1),
        "fid": lambda chosen, images: np.array([fid(real[images], features[run][images]) for run in chosen]),
    }
    return Examined(tuple(found), np.array([example.domain for example in dataset], dtype=object), scores)


@dataclass(frozen=True)
class Study:
    """Everything that was measured: captioner -> its runs' captions, and pictures of the generators taught with it."""

    nocaps: Mapping[str, Examined]
    coco: Mapping[str, Examined]
    pictures: Mapping[str, Examined]
    coco_pictures: Mapping[str, Examined]


def gather(runs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The captions and the pictures of every run that is done, a row each.

    Raises:
        FileNotFoundError: no run with pictures is.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(runs.glob("*/result.json"))]
    if not any(run.get("pictures") for run in found):
        raise FileNotFoundError(f"{runs} has no run that is done: `python -m dalleflamingo research cycle` makes them")
    captions, pictures = [], []
    for run in found:
        of = {name: run[name] for name in ("captioner", "arm", "seed")}
        for corpus, said in run["captions"].items():
            captions += [of | {"corpus": corpus, "image_id": int(i), "caption": text} for i, text in said.items()]
        for corpus, drawn in run.get("pictures", {}).items():
            pictures.append(pd.DataFrame(drawn).assign(corpus=corpus, **of))
    return pd.DataFrame(captions), pd.concat(pictures, ignore_index=True)


def study(captions: pd.DataFrame, pictures: pd.DataFrame) -> Study:
    """Judge what `gather` found."""
    datasets = tested()
    said = {
        corpus: {
            captioner: of_captions(part[part["corpus"] == corpus], dataset)
            for captioner, part in captions.groupby("captioner")
        }
        for corpus, dataset in datasets.items()
    }
    drawn = {
        corpus: _drawn(pictures[pictures["corpus"] == corpus], dataset, features_of(dataset))
        for corpus, dataset in datasets.items()
    }
    return Study(said["nocaps"], said["coco"], drawn["nocaps"], drawn["coco"])


def _drawn(pictures: pd.DataFrame, dataset: Dataset, real: torch.Tensor) -> dict[str, Examined]:
    """Captioner -> runs; what labels teach the generator no captioner changes, and all have these runs of the first."""
    first = pictures[pictures["captioner"] == FIRST]
    alike = first[first["arm"].isin((START, *TABLE_3[:2]))]
    found = {FIRST: of_pictures(first, dataset, real)}
    for captioner, part in pictures[pictures["captioner"] != FIRST].groupby("captioner"):
        found[captioner] = of_pictures(pd.concat([alike, part]), dataset, real)
    return found


def features_of(dataset: Dataset) -> torch.Tensor:
    """(n, D) features of a data set's own pictures."""
    inception = FeatureExtractor.of(profiles.current().inception)
    return inception.look([dataset.open(example) for example in dataset]).features
