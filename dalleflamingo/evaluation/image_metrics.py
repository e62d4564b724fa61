"""How good generated images are against real ones (§3.2): FID and Inception Score, by torch-fidelity's functions.

Both describe a whole set of images as an Inception network sees it (`image_features`), never one image. FID depends on
the number n of images: it is biased upwards, far more for 200 than for 20,000, so only FIDs of equal n compare.
"""

from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

RESAMPLES = 300  # of a bootstrap of these two; an FID of 2,048 features takes seconds, so fewer than of other metrics


def fid(real: Tensor, generated: Tensor) -> float:
    """Fréchet Inception Distance (Heusel et al. 2017); 0 or more, lower is better.

    Args:
        real: (N, D) features of real images.
        generated: (M, D) features of generated images.
    Raises:
        ValueError: fewer than two images in a set, or features of different networks.
    """
    if real.shape[1:] != generated.shape[1:] or min(len(real), len(generated)) < 2:
        raise ValueError(
            f"features of real images are {tuple(real.shape)}, of generated ones {tuple(generated.shape)}: expected "
            "(N, D) and (M, D) by the same Inception, of at least 2 images each"
        )
    statistics = (fid_features_to_statistics(features.double()) for features in (real, generated))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """Inception Score (Salimans et al. 2016): exp of the mean KL divergence of p(y | x) from p(y); higher is better.

    One split by default. Published figures take the mean over ten, which needs ten times as many images.

    Args:
        logits: (N, C) of generated images.
        splits: parts, of which the mean is taken, divided by torch-fidelity's own seed; 10 in published figures.
    Returns:
        1 … C, and no more than N / splits.
    Raises:
        ValueError: there are fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images in {splits} splits: give at least one image a split")
    return isc_features_to_metric(logits, splits=splits, shuffle=splits > 1)["inception_score_mean"]
