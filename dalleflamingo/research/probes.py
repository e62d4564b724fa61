"""Probes of frozen features: nearest neighbours and a ridge classifier.

Both are deterministic and have no setting that needs tuning, so that a gate computed twice gives the same number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _check(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor) -> None:
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if len(features) != len(labels) or not len(labels):
            raise ValueError(f"{name}: {len(features)} feature rows and {len(labels)} labels; give one label a row")


def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 20
) -> float:
    """Accuracy of a weighted vote of the k nearest neighbours (Caron et al. 2021, §4.1, after Wu et al. 2018).

    A neighbour of cosine similarity s votes with weight exp(s / 0.07).

    Args:
        train_features: (N, D).
        train_labels: (N,) integers ≥ 0.
        test_features: (M, D).
        test_labels: (M,).
        k: neighbours that vote.
    Returns:
        accuracy in [0, 1].
    Raises:
        ValueError: rows and labels differ in number, or fewer than k training rows are given.
    """
    _check(train_features, train_labels, test_features, test_labels)
    if len(train_labels) < k:
        raise ValueError(f"{k} neighbours wanted, but only {len(train_labels)} training rows: draw more or lower k")
    similarity = F.normalize(test_features, dim=-1) @ F.normalize(train_features, dim=-1).T  # (M, N)
    nearest, index = similarity.topk(k, dim=-1)
    votes = torch.zeros(len(test_labels), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[index], (nearest / 0.07).exp())
    return (votes.argmax(-1) == test_labels).float().mean().item()


def ridge_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, penalty: float = 1.0
) -> float:
    """Accuracy of a linear classifier: ridge regression of standardised features onto one-hot labels.

    Args:
        train_features: (N, D).
        train_labels: (N,) integers ≥ 0.
        test_features: (M, D).
        test_labels: (M,).
        penalty: weight of ‖W‖² for each 1,000 training rows.
    Returns:
        accuracy in [0, 1].
    Raises:
        ValueError: rows and labels differ in number.
    """
    _check(train_features, train_labels, test_features, test_labels)
    train, test = train_features.double(), test_features.double()
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    target = F.one_hot(train_labels).double()
    prior = target.mean(0)  # the intercept, which is not penalised
    gram = train.T @ train + penalty * len(train) / 1000 * torch.eye(train.shape[1], dtype=train.dtype)
    weight = torch.linalg.solve(gram, train.T @ (target - prior))
    return ((test @ weight + prior).argmax(-1) == test_labels).double().mean().item()
