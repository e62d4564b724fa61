"""How good drawn pictures are against real ones (§3.2): FID, Inception Score and KID, by torch-fidelity's functions.

All three are figures of a whole set of pictures as an Inception sees it (`image_features`), never of one picture. The
sets are known by a finite number n of pictures, and FID is biased by it: figures of different n do not compare.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from dalleflamingo.evaluation.image_features import InceptionOutput
from dalleflamingo.intervals import Interval, paired_bootstrap

FEW = 2000  # pictures below which FID carries a warning
SUBSET = 100  # pictures in one of KID's subsets, fewer where there are not twice as many
SUBSETS = 100
RESAMPLES = 300


@dataclass(frozen=True)
class SetScore:
    """One metric of a set of pictures: its value, an interval around it, how many pictures each set has."""

    name: str
    interval: Interval
    higher_is_better: bool

    def __str__(self) -> str:
        return f"{self.name} {self.interval} ({'higher' if self.higher_is_better else 'lower'} is better)"


def fid(real: Tensor, drawn: Tensor) -> float:
    """Fréchet Inception Distance of two sets of features, (N, D) and (M, D); 0 or more, lower is better.

    Raises:
        ValueError: fewer than two pictures in a set, or features of different Inceptions.
    """
    _comparable(real, drawn)
    statistics = (fid_features_to_statistics(features.double()) for features in (real, drawn))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence of p(y | x) from p(y), for (N, C) logits; 1 … C, higher is better.

    One split: published figures take the mean over ten, which needs ten times as many pictures.
    """
    return isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]


def kid(real: Tensor, drawn: Tensor, seed: int = 0) -> Interval:
    """Kernel Inception Distance: unbiased squared MMD with a cubic kernel, mean over subsets; lower is better.

    Returns:
        the mean and the bounds that 95 % of the subsets would lie in; it may be a little below 0.
    Raises:
        as `fid`.
    """
    _comparable(real, drawn)
    size = min(SUBSET, len(real) // 2 or 1, len(drawn) // 2 or 1)
    settings = dict(kid_subsets=SUBSETS, kid_subset_size=max(2, size), rng_seed=seed, verbose=False)
    found = kid_features_to_metric(real.double(), drawn.double(), **settings)
    mean, spread = found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]
    return Interval(mean, mean - 1.96 * spread, mean + 1.96 * spread, min(len(real), len(drawn)), seed)


def evaluate(
    real: InceptionOutput, drawn: InceptionOutput, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, SetScore]:
    """FID, IS and KID of drawn pictures against real ones, under those names, with 95 % intervals.

    FID's and IS's are bootstraps over pictures, real and drawn alike. Warns where FID rests on fewer than 2,000.
    """
    n = min(len(real.features), len(drawn.features))
    if n < FEW:
        warnings.warn(
            f"FID of {n} pictures is biased upwards, far more than one of 2,000 or more: compare it only with another "
            f"of {n} pictures",
            stacklevel=2,
        )
    rng = np.random.default_rng(seed)
    others = rng.permutation(len(real.features))[:n]

    def distance(rows: np.ndarray) -> float:
        return fid(real.features[others[rows]], drawn.features[rows])

    def variety(rows: np.ndarray) -> float:
        return inception_score(drawn.logits[rows])

    return {
        "FID": SetScore("FID", paired_bootstrap(distance, n, resamples, seed, recentred=True), False),
        "IS": SetScore("IS", paired_bootstrap(variety, n, resamples, seed, recentred=True), True),
        "KID": SetScore("KID", kid(real.features, drawn.features, seed), False),
    }


def _comparable(real: Tensor, drawn: Tensor) -> None:
    if real.shape[1:] != drawn.shape[1:] or min(len(real), len(drawn)) < 2:
        raise ValueError(
            f"features of real pictures are {tuple(real.shape)}, of drawn ones {tuple(drawn.shape)}: expected (N, D) "
            "and (M, D) by the same Inception, of at least 2 pictures each"
        )
