"""Notebook 01: choosing tokens, adding and removing noise, guidance.

Each check hands back the function that later cells use: the learner's once it is right, else the course's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dalleflamingo.course.checks.cases import Case, check

Function = Callable[..., Tensor]


def nucleus(attempt: Function) -> Function:
    """Notebook 01, exercise 1: the nucleus of a distribution.

    Args:
        attempt: ((V,) probabilities, p) -> (V,) probabilities, 0 outside the nucleus.
    """

    def ours(probabilities: Tensor, p: float) -> Tensor:
        ordered, ids = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= p] = 0
        return torch.zeros_like(probabilities).scatter(0, ids, ordered / ordered.sum())

    four, p = torch.tensor([0.15, 0.5, 0.05, 0.3]), 0.9
    mistakes = [
        ([0, 0.625, 0, 0.375], "the two likeliest hold 0.8 only: the token that reaches p belongs to the nucleus"),
        ([0.15, 0.5, 0, 0.3], "the probabilities that are left should sum to 1 again"),
        ([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], "sorted: each token should keep its place"),
        ([0, 1, 0, 0], "that is greedy: only the likeliest token is left"),
        (four, "all tokens are left"),
        ([0, 0, 1, 0], "that is what the nucleus leaves out"),
    ]
    cases = [
        Case((four, p), torch.tensor([0.15, 0.5, 0, 0.3]) / 0.95, "three tokens hold 0.95, and two only 0.8", mistakes),
        Case((torch.tensor([0.1, 0.7, 0.2]), 0.5), [0, 1, 0], "one token alone holds more than p"),
        Case((torch.tensor([0.25, 0.25, 0.5]), 1.0), [0.25, 0.25, 0.5], "p = 1 leaves every token"),
    ]
    shown = "The nucleus is small where the captioner is sure, and large where it is not."
    return attempt if check(attempt, cases, shown) else ours


def noised(attempt: Function) -> Function:
    """Notebook 01, exercise 2: latents with noise.

    Args:
        attempt: (z, noise, ᾱ_t) -> z_t.
    """

    def ours(z: Tensor, noise: Tensor, alpha_cumprod: float) -> Tensor:
        return alpha_cumprod**0.5 * z + (1 - alpha_cumprod) ** 0.5 * noise

    z, noise, alpha = torch.tensor([2.0, -1.0]), torch.tensor([-1.5, 0.5]), 0.36
    mistakes = [
        (alpha * z + (1 - alpha) * noise, "the roots are missing, and the variance would shrink on the way"),
        ((1 - alpha) ** 0.5 * z + alpha**0.5 * noise, "the roots are swapped: ᾱ_t says how much of the image is left"),
        (alpha**0.5 * z + (1 - alpha) * noise, "the noise has a root, too"),
        (z + noise, "both terms are weighted"),
        (z + (1 - alpha) ** 0.5 * noise, "the image fades, too: it has the weight √ᾱ_t"),
    ]
    cases = [
        Case((z, noise, alpha), [0.0, -0.2], "0.6 z + 0.8 ε", mistakes),
        Case((z, noise, 1.0), z, "ᾱ = 1 is no noise at all"),
        Case((z, noise, 0.0), noise, "ᾱ = 0 leaves nothing of the image"),
    ]
    shown = "The squares of the two weights sum to 1: if z and ε have variance 1, so has z_t at every t."
    return attempt if check(attempt, cases, shown) else ours


def clean_from_velocity(attempt: Function) -> Function:
    """Notebook 01, exercise 3: clean latents from z_t and the velocity.

    Args:
        attempt: (z_t, v, ᾱ_t) -> ẑ_0.
    """

    def ours(z_t: Tensor, velocity: Tensor, alpha_cumprod: float) -> Tensor:
        return alpha_cumprod**0.5 * z_t - (1 - alpha_cumprod) ** 0.5 * velocity

    clean, noise, alpha = torch.tensor([2.0, -1.0]), torch.tensor([-1.5, 0.5]), 0.36
    z_t, velocity = 0.6 * clean + 0.8 * noise, 0.6 * noise - 0.8 * clean
    mistakes = [
        (0.6 * z_t + 0.8 * velocity, "check the sign: the √ᾱ_t ε in z_t and in v have to cancel"),
        ((z_t - 0.8 * velocity) / 0.6, "that would be right for a model that predicts ε"),
        (0.8 * z_t + 0.6 * velocity, "that is the noise ε, the other unknown"),
        (z_t - velocity, "both terms are weighted"),
        (0.36 * z_t - 0.64 * velocity, "the roots are missing"),
    ]
    cases = [
        Case((z_t, velocity, alpha), clean, "z = (2, −1) got the noise (−1.5, 0.5) at ᾱ_t = 0.36", mistakes, 1e-6),
        Case((clean, -noise, 1.0), clean, "at ᾱ = 1, z_t is clean"),
        Case((noise, -clean, 0.0), clean, "at ᾱ = 0, z_t is noise, and v = −z"),
    ]
    shown = "z_t and v are (z, ε) turned by an angle. To turn them back, no division is needed, at any t."
    return attempt if check(attempt, cases, shown) else ours


def denoising_step(attempt: Function) -> Function:
    """Notebook 01, exercise 4: from z_t to less noise, without new noise (DDIM).

    Args:
        attempt: (z_t, ẑ_0, ᾱ_t, ᾱ_s) -> z_s, s before t.
    """

    def ours(z_t: Tensor, clean: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
        noise = (z_t - alpha_t**0.5 * clean) / (1 - alpha_t) ** 0.5
        return alpha_s**0.5 * clean + (1 - alpha_s) ** 0.5 * noise

    clean, noise = torch.tensor([2.0, -1.0]), torch.tensor([-1.5, 0.5])
    z_t, z_s = 0.6 * clean + 0.8 * noise, 0.8 * clean + 0.6 * noise  # ᾱ = 0.36 and 0.64
    mistakes = [
        (clean, "that is ẑ_0 itself: a step goes only part of the way"),
        (z_t, "nothing has changed: which ᾱ belongs to the step before?"),
        (0.8 * clean + 0.6 * z_t, "that mixes ẑ_0 with z_t: take out the noise ε̂ first"),
        (0.8 * clean + 0.6 * (z_t - 0.6 * clean), "the noise in z_t has the weight √(1−ᾱ_t): divide by it"),
        (0.6 * clean + 0.8 * noise, "those are the weights of t: the result belongs to s"),
    ]
    cases = [
        Case(
            (z_t, clean, 0.36, 0.64),
            z_s,
            "the noise (−1.5, 0.5) is the same, its weight is 0.6 instead of 0.8",
            mistakes,
            1e-6,
        ),
        Case((z_t, clean, 0.36, 1.0), clean, "at ᾱ_s = 1 no noise is left", (), 1e-6),
    ]
    shown = "A step guesses the clean latents, and then puts a little less of the same noise back."
    return attempt if check(attempt, cases, shown) else ours


def guided(attempt: Function) -> Function:
    """Notebook 01, exercise 5: classifier-free guidance.

    Args:
        attempt: (prediction without the caption, with it, scale) -> prediction.
    """

    def ours(without: Tensor, given: Tensor, scale: float) -> Tensor:
        return without + scale * (given - without)

    without, given = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    mistakes = [
        (given + 3 * (given - without), "begin at the prediction without the caption: at scale 1 guidance is off"),
        (without + 3 * given, "the caption's effect is the difference of the two predictions"),
        (given + 3 * (without - given), "the two are swapped: that leads away from the caption"),
        (3 * given, "only the difference is multiplied"),
        (3 * (given - without), "the prediction without the caption is missing"),
        (without + 2 * (given - without), "at scale 1 the result should be the prediction with the caption"),
    ]
    cases = [
        Case((without, given, 3.0), [4.0, -4.0], "1 + 3 · (2 − 1) and 2 + 3 · (0 − 2)", mistakes),
        Case((without, given, 1.0), given, "scale 1 is the prediction with the caption"),
        Case((without, given, 0.0), without, "scale 0 ignores the caption"),
    ]
    shown = "Guidance goes in the direction in which the caption changes the prediction, and beyond."
    return attempt if check(attempt, cases, shown) else ours
