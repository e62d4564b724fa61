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
from dalleflamingo.course.checks.cycle import (
    caption_loss,
    captioner_input,
    is_trained,
    kendall_tau,
    matched_steps,
    reconstruction,
    whom_it_trains,
)
from dalleflamingo.course.checks.insights import (
    bootstrap_interval,
    control,
    frechet_distance,
    gain_over_random,
    ngram_cosine,
    paired_interval,
    spearman,
    text_similarity,
    word_movers_distance,
)
from dalleflamingo.course.checks.models import clean_from_velocity, denoising_step, guided, noised, nucleus
from dalleflamingo.course.checks.world import f1, share_ranked_first

__all__ = [
    "bootstrap_interval",
    "caption_loss",
    "captioner_input",
    "clean_from_velocity",
    "control",
    "denoising_step",
    "departures",
    "differing_words",
    "f1",
    "frechet_distance",
    "gain_over_random",
    "gathered",
    "guided",
    "gumbel_sample",
    "is_trained",
    "kendall_tau",
    "learn_map",
    "matched_steps",
    "ngram_cosine",
    "noised",
    "nucleus",
    "paired_interval",
    "predicted_arrivals",
    "reconstruction",
    "share_ranked_first",
    "soft_embedding",
    "spearman",
    "straight_through",
    "text_similarity",
    "whom_it_trains",
    "with_word_ends",
    "word_movers_distance",
]
