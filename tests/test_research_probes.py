"""Probes of frozen features: perfect on separable ones, at chance on shuffled labels, exact on small cases."""

import pytest
import torch

from dalleflamingo.research.probes import knn_accuracy, ridge_accuracy


def clusters(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 8) features around four directions, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    return torch.eye(8)[labels] * 5 + torch.randn(n, 8, generator=generator) * 0.3, labels


def test_probes_are_perfect_on_separable_features_and_at_chance_on_shuffled_labels():
    train, train_labels = clusters(400, 0)
    test, test_labels = clusters(200, 1)
    for probe in (knn_accuracy, ridge_accuracy):
        assert probe(train, train_labels, test, test_labels) == 1
        assert probe(train, train_labels, test, (test_labels + 1) % 4) == 0
        shuffled = train_labels[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
        assert probe(train, shuffled, test, test_labels) < 0.45


def test_nearer_neighbours_outvote_more_numerous_far_ones():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    # weights exp(1 / .07) against 2 exp(.6 / .07): the one near neighbour wins
    assert knn_accuracy(train, labels, torch.tensor([[3.0, 0.0]]), torch.tensor([0]), k=3) == 1


def test_knn_compares_directions_not_lengths():
    train = torch.tensor([[0.1, 0.0], [5.0, 5.0]])  # by dot product the second would be nearer
    labels = torch.tensor([0, 1])
    assert knn_accuracy(train, labels, torch.tensor([[1.0, 0.2]]), torch.tensor([0]), k=1) == 1


def test_probes_say_what_is_wrong_with_their_input():
    features, labels = clusters(10, 0)
    with pytest.raises(ValueError, match="20 neighbours wanted, but only 10"):
        knn_accuracy(features, labels, features, labels)
    with pytest.raises(ValueError, match="test: 10 feature rows and 9 labels"):
        ridge_accuracy(features, labels, features, labels[:9])
