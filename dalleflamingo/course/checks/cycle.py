"""Notebooks 06 and 07: losses, and the order of arms."""

from collections.abc import Callable

import torch

from dalleflamingo.course.checks.cases import Case, check


def caption_loss(attempt: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Notebook 06, exercise 1: loss (1), the mean over the tokens of padded captions.

    Args:
        attempt: ((B, T) log-probabilities, (B, T) which of them count) -> loss.
    """
    log_p = torch.tensor([[-1.0, -2.0, -4.0, -3.0], [-0.5, -1.5, -9.0, -7.0]])
    counts = torch.tensor([[True, True, True, True], [True, True, False, False]])
    mistakes = [
        (28 / 8, "padding is no part of a caption"),
        (12 / 8, "padding is left out of the sum, but counted in the mean"),
        (12.0, "the stock models give the mean over tokens, not their sum"),
        ((10 / 4 + 1) / 2, "that is the mean of each caption's mean, where a short one weighs as much as a long one"),
        (-2.0, "a likely caption should have a small loss: check the sign"),
    ]
    check(
        attempt,
        [Case((log_p, counts), 2.0, "the 6 tokens that count sum to a loss of 12", mistakes)],
        "Every token counts once, the end of the caption too, padding never. So the parts of a batch can be summed to "
        "the whole.",
    )


def clean_latents(attempt: Callable[[float, float, float], float]) -> None:
    """Notebook 06, exercise 2: the one-step clean latents ẑ_0.

    Args:
        attempt: (z_t, predicted noise, ᾱ_t) -> ẑ_0.
    """
    clean, noise, alpha = 2.0, -1.5, 0.36
    noised = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    mistakes = [
        (noised - (1 - alpha) ** 0.5 * noise, "z_t holds √ᾱ_t times z_0: divide"),
        ((noised - (1 - alpha) ** 0.5 * noise) / alpha, "z_t holds √ᾱ_t times z_0: divide by the root"),
        ((noised - (1 - alpha) * noise) / alpha**0.5, "z_t holds √(1−ᾱ_t) times the noise: the root is missing"),
        ((noised + (1 - alpha) ** 0.5 * noise) / alpha**0.5, "the noise was added: take it away"),
        (noised - noise, "both terms are weighted by the schedule"),
    ]
    check(
        attempt,
        [Case((noised, noise, alpha), clean, "z_0 = 2 got the noise −1.5 at ᾱ_t = 0.36", mistakes)],
        "Whoever knows the noise knows the clean latents, in one step. How well depends on how much of them is left.",
    )


def kendall_tau(attempt: Callable[[list[float], list[float]], float]) -> None:
    """Notebook 07, exercise 1: agreement of two orders.

    Args:
        attempt: two lists of scores of the same things -> τ in [-1, 1].
    """
    cases = [
        Case(([3.0, 2.0, 1.0], [30.0, 20.0, 10.0]), 1.0, "the same order agrees on all pairs"),
        Case(
            ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]),
            -1.0,
            "the reversed order agrees on none",
            [(0.0, "disagreement counts −1")],
        ),
        Case(
            ([5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 3.0, 4.0, 2.0, 1.0]),
            0.8,
            "one of ten pairs is the other way round: (9 − 1) / 10",
            [
                (0.9, "that is the share that agrees: subtract the share that does not"),
                (8.0, "divide by the number of pairs"),
            ],
        ),
        Case(([2.0, 1.0], [5.0, 5.0]), 0.0, "a tie neither agrees nor disagrees"),
    ]
    check(attempt, cases, "τ depends on the orders alone, not on how far apart two scores are.", show_arguments=True)
