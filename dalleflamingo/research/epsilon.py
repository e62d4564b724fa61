"""The miniature's generator in ε form: Eqs. 2 to 4 as the paper writes them, beside the form that it was trained in.

The miniature's U-Net predicts the velocity v, Stable Diffusion v1-4's predicts ε. The two differ by a known function of
z_t and t alone, so a U-Net that predicts v is a U-Net that predicts ε as well:

    ε̂ = √ᾱ_t v̂ + √(1−ᾱ_t) z_t,    hence    ε − ε̂ = √ᾱ_t (v − v̂)    and    ‖ε − ε̂‖² = ᾱ_t ‖v − v̂‖².

Images, ẑ_0 and loss (4) are the same in both forms. The losses (2) and (3) are not: the ε form weighs every timestep
by ᾱ_t. `epsilon_study.py` checks both timestep by timestep, and lets both forms repair damaged models.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from tqdm.auto import tqdm

from dalleflamingo.bridge import relax
from dalleflamingo.cycle_losses import Batch, Cycle
from dalleflamingo.generator import Generator, NoisyLatents, add_noise

# ── the two forms ────────────────────────────────────────────────────────────────────────────────────────────────────


class EpsilonUNet(UNet2DConditionModel):
    """A U-Net that predicts ε, made of one that predicts v: the same weights under the same names.

    Attributes:
        alphas_cumprod: ᾱ, (timesteps,), of the noise schedule that it was trained with.
    """

    alphas_cumprod: Tensor

    @classmethod
    def of(cls, unet: UNet2DConditionModel, alphas_cumprod: Tensor) -> "EpsilonUNet":
        """A copy of a U-Net that predicts v, in ε form."""
        own = cls.from_config(unet.config)
        own.load_state_dict(unet.state_dict())
        nn.Module.to(own.eval(), unet.device, unet.dtype)  # diffusers' own warns of a cast to float32, too
        # not a weight, so not in a checkpoint; float32 whatever the weights are, as in NoisyLatents
        own.register_buffer("alphas_cumprod", alphas_cumprod.to(unet.device, copy=True), persistent=False)
        return own

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True, **options
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """ε̂, (B, 4, h, w), of z_t (`sample`) at one timestep or B; other arguments as in diffusers.

        Raises:
            ValueError: a timestep between two of the noise schedule, as some settings of Euler's scheduler have it.
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if (timesteps != timesteps.long()).any():
            raise ValueError(f"timesteps {timesteps.tolist()}: ᾱ is known at whole ones, as of spacing 'leading'")
        [velocity] = super().forward(sample, timestep, encoder_hidden_states, return_dict=False, **options)
        alphas = self.alphas_cumprod[timesteps.long()].view(-1, 1, 1, 1)
        alphas = alphas.to(torch.promote_types(sample.dtype, alphas.dtype))
        noise = (alphas.sqrt() * velocity + (1 - alphas).sqrt() * sample).to(sample.dtype)
        return UNet2DConditionOutput(noise) if return_dict else (noise,)


def epsilon_form(generator: Generator) -> Generator:
    """The same generator in ε form: an ordinary pipeline with a U-Net of its own, all other modules shared.

    Its images are the same with schedulers that combine estimates of z_0 (DDPM, DDIM, Euler, DPM-Solver++), not with
    PNDM, which combines what the U-Net predicted at several timesteps.

    Raises:
        ValueError: the generator does not predict v.
    """
    pipeline = generator.pipeline
    if (own := pipeline.scheduler.config.prediction_type) != "v_prediction":
        raise ValueError(f"the generator predicts {own!r}: its ε form is made of one that predicts 'v_prediction'")
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type="epsilon")
    parts = pipeline.components | {"scheduler": scheduler}
    parts["unet"] = EpsilonUNet.of(pipeline.unet, scheduler.alphas_cumprod)
    twin = copy(generator)
    twin.pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    twin.pipeline.set_progress_bar_config(disable=True)
    return twin


# ── the same model, timestep by timestep ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class AtTimestep:
    """Both forms at one timestep, on the same images, captions and noise.

    Attributes:
        timestep, alpha: t and ᾱ_t.
        loss_v, loss_epsilon: loss (3).
        original_sample, gradient_3, gradient_2, gradient_4: by how much the ε form differs from what algebra makes of
            the v form, ‖difference‖ / ‖expected‖: ẑ_0 (the same), the gradients of (3) and of (2) (ᾱ_t times as
            large), and that of (4) (the same). Those of (3) and (4) are of the U-Net's queries, that of (2) is of the
            captioner's.
        norm_3, norm_2: of these gradients in v form.
    """

    timestep: int
    alpha: float
    loss_v: float
    loss_epsilon: float
    original_sample: float
    gradient_3: float
    gradient_2: float
    gradient_4: float
    norm_3: float
    norm_2: float

    @property
    def loss_ratio_error(self) -> float:
        """|loss ratio / ᾱ_t − 1|."""
        return abs(self.loss_epsilon / self.loss_v / self.alpha - 1)


def compare_timesteps(
    cycles: tuple[Cycle, Cycle], batch: Batch, timesteps: Sequence[int], seed: int = 0
) -> list[AtTimestep]:
    """Both forms of one generator at each of some timesteps.

    Args:
        cycles: with the generator in v form and in ε form, the captioner and bridge the same.
        batch: images with captions.
        timesteps: t, of every image alike.
        seed: of the noise.
    """
    found = []
    for timestep in tqdm(timesteps, desc="timesteps"):
        v, epsilon = (_at_timestep(cycle, batch, timestep, seed) for cycle in cycles)
        alpha = v.alpha
        found.append(
            AtTimestep(
                timestep,
                alpha,
                v.loss,
                epsilon.loss,
                relative_error(epsilon.original_sample, v.original_sample),
                relative_error(epsilon.gradient_3, alpha * v.gradient_3),
                relative_error(epsilon.gradient_2, alpha * v.gradient_2),
                relative_error(epsilon.gradient_4, v.gradient_4),
                v.gradient_3.norm().item(),
                v.gradient_2.norm().item(),
            )
        )
    return found


@dataclass(frozen=True)
class _Form:
    alpha: float
    loss: float
    original_sample: Tensor
    gradient_2: Tensor
    gradient_3: Tensor
    gradient_4: Tensor


def _at_timestep(cycle: Cycle, batch: Batch, timestep: int, seed: int) -> _Form:
    noisy = noisy_at(batch.latents, cycle.generator, timestep, seed)
    queries, words = cycle.trainable["generator"], cycle.trainable["captioner"]
    output = cycle.generator.predict(noisy, batch.encoder_hidden_states)
    loss_3 = noisy.loss(output)
    gradient_3 = _gradient(loss_3, queries, keep=True)
    gradient_4 = _gradient(cycle.caption_reconstruction(output, noisy, batch), queries)
    logits, ids = cycle.captioner.token_logits(batch.pixel_values, batch.captions)
    distributions = relax(logits, cycle.losses.mode, cycle.losses.temperature)
    hidden = cycle.bridge(distributions, ids, batch.captions)
    gradient_2 = _gradient(noisy.loss(cycle.generator.predict(noisy, hidden)), words)
    alpha = noisy.alphas_cumprod.flatten()[0].item()
    clean = noisy.original_sample(output).detach()
    return _Form(alpha, loss_3.item(), clean, gradient_2, gradient_3, gradient_4)


def noisy_at(latents: Tensor, generator: Generator, timestep: int, seed: int) -> NoisyLatents:
    """z_t of (B, 4, h, w) latents, at one timestep for all."""
    scheduler = generator.pipeline.scheduler
    noisy = add_noise(latents, scheduler, torch.Generator().manual_seed(seed))
    alpha = scheduler.alphas_cumprod[timestep].to(noisy.alphas_cumprod)
    timesteps = torch.full_like(noisy.timesteps, timestep)
    alphas_cumprod = torch.full_like(noisy.alphas_cumprod, alpha)
    return replace(
        noisy, timesteps=timesteps, alphas_cumprod=alphas_cumprod, batch_timesteps=timesteps.to(noisy.batch_timesteps)
    )


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter], keep: bool = False) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=keep)
    return torch.cat([gradient.flatten() for gradient in found])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


def pixel_differences(
    forms: tuple[Generator, Generator], captions: Sequence[str], steps: int, guidance_scale: float
) -> dict[str, float]:
    """Images of the same captions from the same noise by both forms, compared.

    Args:
        forms: v and ε.
        captions: one an image.
        steps: of denoising.
        guidance_scale: of classifier-free guidance.
    Returns:
        largest: difference of a value, of 256 levels. share: of the values that differ at all. n: images.
    """
    rendered = [one.render(captions, range(len(captions)), steps, guidance_scale) for one in forms]
    v, epsilon = (np.stack([np.asarray(image, dtype=int) for image in images]) for images in rendered)
    return {"largest": int(abs(v - epsilon).max()), "share": float((v != epsilon).mean()), "n": len(captions)}
