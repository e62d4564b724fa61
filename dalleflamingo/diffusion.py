"""Noise in and noise out: z_t, what a U-Net is asked of it, and the clean picture that its answer implies (§4.2).

    z_t = √ᾱ_t z + √(1−ᾱ_t) ε,    ε-prediction is asked for ε,  v-prediction for v = √ᾱ_t ε − √(1−ᾱ_t) z

and solved for z, the answer gives ẑ_0 in one step. An error in ε comes back √((1−ᾱ_t)/ᾱ_t) times as large: 15 times at
the last timestep of Stable Diffusion's schedule.
"""

from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from torch.nn import functional as F

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Noised:
    """Latents z with noise: all (B, 4, h, w), but for timesteps (B,) and kept, ᾱ_t, (B, 1, 1, 1).

    asked: what the U-Net predicts, one of `PREDICTIONS`. of_whole: the timesteps of the batch that this is a part of.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    kept: Tensor
    asked: str
    of_whole: Tensor

    @property
    def latents(self) -> Tensor:
        """z_t."""
        return self.kept.sqrt() * self.clean + (1 - self.kept).sqrt() * self.noise

    @property
    def target(self) -> Tensor:
        """What the U-Net should answer."""
        if self.asked == "epsilon":
            return self.noise
        return self.kept.sqrt() * self.noise - (1 - self.kept).sqrt() * self.clean

    def estimate(self, predicted: Tensor) -> Tensor:
        """ẑ_0, from what the U-Net answered; gradients pass."""
        if self.asked == "epsilon":
            return (self.latents - (1 - self.kept).sqrt() * predicted) / self.kept.sqrt()
        return self.kept.sqrt() * self.latents - (1 - self.kept).sqrt() * predicted

    def loss(self, predicted: Tensor) -> Tensor:
        """Eqs. 2 and 3: the mean squared error of the answer, in float32 at least."""
        precise = torch.promote_types(predicted.dtype, torch.float32)
        return F.mse_loss(predicted.to(precise), self.target.to(precise))

    def of(self, chosen: Tensor) -> "Noised":
        """Some of the batch, by a (B,) mask."""
        parts = (part[chosen] for part in (self.clean, self.noise, self.timesteps, self.kept))
        return Noised(*parts, self.asked, self.of_whole)


def add_noise(
    latents: Tensor, scheduler: SchedulerMixin, draw: torch.Generator, first: int = 0, whole: int | None = None
) -> Noised:
    """Noise at timesteps drawn uniformly, both from `draw`, on the CPU, so that every device gets the same.

    Args:
        latents: (B, 4, h, w), scaled; of a batch of `whole` those from `first` on. Every part of a batch has the noise
            that it would have in the whole.
    Raises:
        ValueError: the scheduler's model predicts neither ε nor v.
    """
    asked = scheduler.config.prediction_type
    if asked not in PREDICTIONS:
        raise ValueError(f"the generator predicts {asked!r}: expected one of {', '.join(PREDICTIONS)}")
    alphas = scheduler.alphas_cumprod  # not the scheduler's own `add_noise`, which some scale otherwise
    whole, own = whole or len(latents), slice(first, first + len(latents))
    of_whole = torch.randint(len(alphas), (whole,), generator=draw)
    timesteps = of_whole[own]
    noise = torch.randn((whole, *latents.shape[1:]), generator=draw)[own].to(latents)
    kept = alphas.cpu()[timesteps].view(-1, 1, 1, 1).to(latents)
    return Noised(latents, noise, timesteps.to(latents.device), kept, asked, of_whole)
