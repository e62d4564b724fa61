"""Notebooks 06 and 07: losses, what they train, and what they are compared with.

Each check of a function hands back the one that later cells use: the learner's once it is right, else the course's.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from dalleflamingo.course.checks.cases import Case, check

Function = Callable[..., object]


def is_trained(attempt: Function) -> Function:
    """Notebook 06, exercise 1: which parameters cycle finetuning trains.

    Args:
        attempt: name of a parameter -> whether it is a query of cross-attention.
    """

    def ours(name: str) -> bool:
        return "crossattention.self.query." in name or "attn2.to_q." in name

    decoder = "text_decoder.bert.encoder.layer.0."
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    self_attention = [(True, "that is a query of self-attention, which never sees the other modality")]
    other_projection = [(True, "that is no query: keys and values stay frozen")]
    queries = [(False, "that is a query of cross-attention")]
    biases = [(False, "a projection has a weight and a bias, and both are trained")]
    cases = [
        Case((f"{decoder}crossattention.self.query.weight",), True, "a query of BLIP's cross-attention", queries),
        Case((f"{decoder}crossattention.self.query.bias",), True, "a query of BLIP's cross-attention", biases),
        Case((f"{block}attn2.to_q.weight",), True, "a query of the U-Net's cross-attention", queries),
        Case((f"{decoder}attention.self.query.weight",), False, "a query of BLIP's self-attention", self_attention),
        Case((f"{block}attn1.to_q.weight",), False, "a query of the U-Net's self-attention", self_attention),
        Case((f"{decoder}crossattention.self.key.bias",), False, "a key of BLIP's cross-attention", other_projection),
        Case((f"{block}attn2.to_out.0.weight",), False, "an output of the U-Net's cross-attention", other_projection),
    ]
    shown = "What a model looks for in the other modality is trained; what it finds there stays as it was."
    return attempt if check(attempt, cases, shown, show_arguments=True) else ours


def caption_loss(attempt: Function) -> Function:
    """Notebook 06, exercise 2: loss (1), the mean over the tokens of padded captions.

    Args:
        attempt: ((B, T) log-probabilities, (B, T) which of them count) -> loss.
    """

    def ours(log_p: Tensor, is_token: Tensor) -> Tensor:
        return -log_p[is_token].sum() / is_token.sum()

    log_p = torch.tensor([[-1.0, -2.0, -4.0, -3.0], [-0.5, -1.5, -9.0, -7.0]])
    counts = torch.tensor([[True, True, True, True], [True, True, False, False]])
    mistakes = [
        (28 / 8, "padding is no part of a caption"),
        (12 / 8, "padding is left out of the sum, but counted in the mean"),
        (12.0, "the stock models give the mean over tokens, not their sum"),
        ((10 / 4 + 1) / 2, "that is the mean of each caption's mean, where a short one weighs as much as a long one"),
        (-2.0, "a likely caption should have a small loss: check the sign"),
    ]
    cases = [Case((log_p, counts), 2.0, "the 6 tokens that count sum to a loss of 12", mistakes)]
    shown = (
        "Every token counts once, the end of the caption too, padding never. So the parts of a batch can be summed to "
        "the whole."
    )
    return attempt if check(attempt, cases, shown) else ours


def whom_it_trains(prediction: Mapping[str, str], norms: Mapping[str, Mapping[str, float]]) -> None:
    """Notebook 06, exercise 3: a prediction of which models each loss trains, held against the measured gradients.

    Args:
        prediction: loss -> "captioner", "generator", "both" or "none", in any case; "" where nothing is predicted yet.
        norms: the six losses of the exercise in order -> model -> norm of the gradient of its trained parameters.
    """

    def predicted(loss: str) -> str:
        if prediction[loss] in ("", None):
            raise NotImplementedError
        return str(prediction[loss]).strip().lower()

    reasons = [
        ("no part of the generator computes it", []),
        (
            "the captioner's distributions cross the bridge, and the U-Net reads them",
            [
                ("captioner", "the U-Net's queries are on the way, and they are not frozen"),
                ("generator", "the bridge is there to pass a gradient on to the captioner"),
            ],
        ),
        (
            "argmax does not change where the logits change a little, and its gradient is 0",
            [
                ("both", "loss (2) has the same value, but straight-through adds the gradient of the softmax"),
                ("none", "the U-Net reads the words, however they were chosen"),
            ],
        ),
        ("no part of the captioner computes it", []),
        (
            "the captioner reads x̂, and the U-Net made x̂",
            [
                ("captioner", "x̂ is no photograph: the gradient flows on through the VAE's decoder to the U-Net"),
                ("generator", "the captioner's queries look at x̂, and they are not frozen"),
            ],
        ),
        (
            "x̂ is a constant now, as a photograph is, and the captioner reads it",
            [
                ("both", "no gradient reaches what was computed under no_grad"),
                ("none", "the captioner itself reads x̂ outside of no_grad"),
            ],
        ),
    ]
    cases = []
    for (loss, own), (reason, mistakes) in zip(norms.items(), reasons, strict=True):
        trained = [model for model, norm in own.items() if norm] or ["none"]
        cases.append(Case((loss,), "both" if len(trained) == 2 else trained[0], reason, mistakes))
    shown = (
        "A loss trains each model that a gradient reaches. Its value does not show which these are: the two variants "
        "have the same values as (2) and (4)."
    )
    check(predicted, cases, shown, show_arguments=True)


def matched_steps(attempt: Function) -> Function:
    """Notebook 06, exercise 4: how long labels alone train for as much computing as the cycle.

    Args:
        attempt: (steps of the cycle, cost of one, cost of a step from labels) -> steps from labels.
    """

    def ours(steps: int, cost_of_cycle: float, cost_of_labels: float) -> int:
        return round(steps * cost_of_cycle / cost_of_labels)

    def rounded_down(steps: float) -> float:
        return 2 if steps == 3 else steps  # which way to round is not asked

    mistakes = [
        (100, "as many steps are less computing: a step of the cycle costs more"),
        (40, "the ratio is upside down: a cheaper step can be taken more often"),
        (150, "the two costs are divided, not subtracted"),
    ]
    cases = [
        Case((100, 2.5, 1.0), 250, "100 steps cost 250, and one from labels costs 1", mistakes),
        Case((450, 3.0, 2.0), 675, "450 steps cost 1350, and one from labels costs 2"),
        Case((7, 1.0, 3.0), 2, "7 / 3 is 2.33, and there are whole steps only", measured=rounded_down),
    ]
    shown = "An arm that trains longer needs a control that trains as long; else we measure training time."
    return attempt if check(attempt, cases, shown, show_arguments=True) else ours


def kendall_tau(attempt: Function) -> Function:
    """Notebook 07, exercise 1: agreement of two orders.

    Args:
        attempt: two lists of scores of the same things -> τ in [-1, 1].
    """

    def ours(paper: list[float], ours_: list[float]) -> float:
        pairs = [(i, j) for i in range(len(paper)) for j in range(i)]
        agree = [(paper[i] - paper[j]) * (ours_[i] - ours_[j]) for i, j in pairs]
        return sum((a > 0) - (a < 0) for a in agree) / len(pairs)

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
    shown = "τ depends on the orders alone, not on how far apart two scores are."
    return attempt if check(attempt, cases, shown, show_arguments=True) else ours


def captioner_input(attempt: Function) -> Function:
    """Notebook 07, exercise 2: find the bug; the generator's image as the captioner expects it.

    Args:
        attempt: ((3, H, W) image in [-1, 1], (3, 1, 1) mean, (3, 1, 1) standard deviation) -> (3, H, W).
    """

    def ours(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return ((image + 1) / 2 - mean) / std

    image = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)
    mean, std = torch.tensor([0.5, 0.4, 0.6]).view(3, 1, 1), torch.tensor([0.25, 0.2, 0.2]).view(3, 1, 1)
    mistakes = [
        (image, "that is the bug itself: BLIP has never seen pixels in this range"),
        ((image + 1) / 2, "in [0, 1], as an image file is, but BLIP's processor then subtracts the mean and divides"),
        ((image - mean) / std, "the mean and the standard deviation are of pixels in [0, 1], not in [-1, 1]"),
        ((image + 1) / 2 - mean, "divide by the standard deviation, too"),
        ((image + 1) / 2 * std + mean, "that takes the normalisation back instead of applying it"),
    ]
    cases = [
        Case((image, mean, std), [[[-2.0]], [[0.5]], [[2.0]]], "(0 − 0.5) / 0.25 for the first value", mistakes, 1e-6)
    ]
    shown = (
        "A model hands back numbers in its own range; the next model has another. Nothing fails, it only reads badly."
    )
    return attempt if check(attempt, cases, shown) else ours


def reconstruction(attempt: Function) -> Function:
    """Notebook 07, exercise 3: find the bugs; ẑ_0 by a scheduler's step.

    Args:
        attempt: (step, predicted noise, t, clean latents, z_t) -> ẑ_0; `step` takes a prediction, t and latents.
    """

    def ours(step: Function, noise: Tensor, t: int, latents: Tensor, noisy_latents: Tensor) -> Tensor:
        return step(noise, t, noisy_latents).pred_original_sample

    def step(noise: Tensor, t: int, sample: Tensor) -> SimpleNamespace:
        clean = (sample - 0.8 * noise) / 0.6  # ᾱ = 0.36 at t, 0.3844 a step before
        return SimpleNamespace(prev_sample=0.62 * clean + 0.7846 * noise, pred_original_sample=clean)

    clean, noise = torch.tensor([2.0, -1.0]), torch.tensor([-1.5, 0.5])
    guess = noise + 0.3  # the U-Net errs
    noisy = 0.6 * clean + 0.8 * noise
    mistakes = [
        (step(guess, 500, clean).prev_sample, "both bugs are still there"),
        (step(guess, 500, noisy).prev_sample, "that is z one step before t: nearly all of the noise is still in it"),
        (step(guess, 500, clean).pred_original_sample, "the noise is taken from clean latents, which have none"),
        (clean, "those are the clean latents themselves: nothing was reconstructed"),
    ]
    cases = [
        Case(
            (step, guess, 500, clean, noisy),
            step(guess, 500, noisy).pred_original_sample,
            "z_t goes in, and the scheduler's estimate of z_0 comes out",
            mistakes,
            1e-6,
        )
    ]
    shown = "The captioner now reads what the U-Net makes of z_t, and loss (4) can teach the U-Net something."
    return attempt if check(attempt, cases, shown) else ours
