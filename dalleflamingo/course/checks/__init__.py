"""Checks of the exercises: not done yet, one calm line; wrong, in which way; right, what has just been shown.

A check prints and never raises, so that a notebook runs to its end whatever state its exercises are in.
"""

from dalleflamingo.course.checks.bridge import (
    departures,
    differing_words,
    gathered,
    gumbel_sample,
    learn_map,
    predicted_arrivals,
    soft_embedding,
    straight_through,
    with_word_ends,
)
from dalleflamingo.course.checks.cycle import caption_loss, clean_latents, kendall_tau
from dalleflamingo.course.checks.insights import (
    bootstrap_interval,
    frechet_distance,
    gain_over_random,
    word_movers_distance,
)
from dalleflamingo.course.checks.models import clean_from_velocity, denoising_step, guided, noised, nucleus
from dalleflamingo.course.checks.world import f1

__all__ = [
    "bootstrap_interval",
    "caption_loss",
    "clean_from_velocity",
    "clean_latents",
    "denoising_step",
    "departures",
    "differing_words",
    "f1",
    "frechet_distance",
    "gain_over_random",
    "gathered",
    "guided",
    "gumbel_sample",
    "kendall_tau",
    "learn_map",
    "noised",
    "nucleus",
    "predicted_arrivals",
    "soft_embedding",
    "straight_through",
    "with_word_ends",
    "word_movers_distance",
]
