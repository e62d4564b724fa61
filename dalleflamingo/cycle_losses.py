"""The four losses of cycle finetuning (§4.2, Eqs. 1–5): either model learns from the label, and through the other.

    (1) label → captioner       −Σ_t log p_θ(w_t | w_<t, x)
    (2) image → text → image    ‖ε − ε_φ(z_t, t, τ(P M E))‖²      P: what the captioner says along w
    (3) label → generator       ‖ε − ε_φ(z_t, t, τ(w))‖²
    (4) text → image → text     −Σ_t log p_θ(w_t | w_<t, x̂)       x̂: decoded from ẑ_0, see `diffusion.py`

(1) and (2) begin with the same pass through the captioner, (3) and (4) with the same through the U-Net, so that what
the cycle adds to learning from labels is a second half to each. Sums over t are means over the batch's pieces, norms
are means over elements, as both stock models have them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from dalleflamingo.bridge import Bridge, relax
from dalleflamingo.captioner import Captioner
from dalleflamingo.generator import Generator, NoisyLatents, add_noise


def captioner_parameters(captioner: Captioner) -> dict[str, nn.Parameter]:
    """Name -> parameter of what a captioner learns by. Errors as `generator_parameters`."""
    own = hasattr(captioner.model, "query_tokens")  # BLIP-2, whose Q-Former has cross-attention, too
    return _named(captioner.model, "query_tokens" if own else "crossattention.self.query.")


def generator_parameters(generator: Generator) -> dict[str, nn.Parameter]:
    """Name -> parameter of what a generator learns by.

    Raises:
        ValueError: the model has no such parameter.
    """
    return _named(generator.pipeline.unet, "attn2.to_q.")


def freeze_all_but(model: nn.Module, learning: dict[str, nn.Parameter]) -> None:
    """Let gradients reach these parameters of the model only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)


def count_parameters(learning: dict[str, nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in learning.values())


def _named(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in model.named_parameters() if part in name}
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter with {part!r} in its name: nothing to train")
    return found


NAMES = ("caption", "image_reconstruction", "generation", "caption_reconstruction")  # (1) to (4)
MOVED = ("both", "captioner", "generator")


@dataclass(frozen=True)
class Losses:
    """Which of the four, how much of each, and whom they move.

    Attributes:
        caption, image_reconstruction, generation, caption_reconstruction: weights of (1) to (4); 0 leaves one out.
        image_updates, caption_updates: whom (2) and (4) update: "both", "captioner" or "generator".
        mode, temperature: of the bridge, as `bridge.relax`.
        latest: (4) is taken of pictures whose timestep lies below this share of all; what is decoded from later ones
            is mostly the error of ε.
        decoded_size: side in pixels at which x̂ is decoded; None: the generator's own.
        previous_sample, unnormalised: as in the code that the authors released: x̂ is decoded from what the scheduler's
            `step` makes of the clean latents, z for z_t, and reaches the captioner without its normalisation.
    """

    caption: float = 1.0
    image_reconstruction: float = 1.0
    generation: float = 1.0
    caption_reconstruction: float = 1.0
    image_updates: str = "both"
    caption_updates: str = "both"
    mode: str = "straight-through"
    temperature: float = 1.0
    latest: float = 1.0
    decoded_size: int | None = None
    previous_sample: bool = False
    unnormalised: bool = False

    def __post_init__(self):
        for name in ("image_updates", "caption_updates"):
            if getattr(self, name) not in MOVED:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(MOVED)}")
        if not 0 < self.latest <= 1:
            raise ValueError(f"latest = {self.latest}: it is a share of the timesteps, above 0 and at most 1")
        if any(getattr(self, name) < 0 for name in NAMES):
            raise ValueError(f"weights {[getattr(self, name) for name in NAMES]}: none may be below 0")


@dataclass(frozen=True)
class Batch:
    """B pictures with a human caption each: a whole batch, or the part of one that a process has.

    Attributes:
        pixel_values: (B, 3, H, W) as the captioner's processor makes them.
        latents: (B, 4, h, w), scaled.
        states: (B, 77, D), τ of the captions.
        first: where the part begins in the whole.
        pieces: of every caption of the whole, its end included: the mean over parts of a part's loss is the loss of
            the whole, however long each part's captions are.
    """

    pixel_values: Tensor
    captions: Sequence[str]
    latents: Tensor
    states: Tensor
    pieces: Tensor
    first: int = 0

    @property
    def share(self) -> float:
        """Of the whole that this part is."""
        return len(self.captions) / len(self.pieces)


class Cycle:
    """A captioner and a generator that teach each other.

    Args:
        bridge: from the captioner's pieces to the generator's text encoder.
        captioner_learns, generator_learns: the parameters that are trained; see `cycle.trainable`.
    """

    def __init__(
        self,
        captioner: Captioner,
        generator: Generator,
        bridge: Bridge,
        captioner_learns: Sequence[nn.Parameter],
        generator_learns: Sequence[nn.Parameter],
        losses: Losses = Losses(),
    ):
        self.captioner, self.generator, self.bridge, self.weights = captioner, generator, bridge, losses
        self.learns = {"captioner": list(captioner_learns), "generator": list(generator_learns)}

    def from_image(self, batch: Batch, draw: torch.Generator) -> dict[str, Tensor]:
        """(1) and (2), those that have a weight, each without it."""
        weights, found = self.weights, {}
        if not (weights.caption or weights.image_reconstruction):
            return found
        logits, ids = self.captioner.token_logits(batch.pixel_values, batch.captions)
        if weights.caption:
            found["caption"] = caption_loss(logits, ids, self.captioner.pad_id, batch.pieces.sum() * batch.share)
        if weights.image_reconstruction:
            found["image_reconstruction"] = self.image_reconstruction(logits, ids, batch, draw)
        return found

    def from_text(self, batch: Batch, draw: torch.Generator) -> dict[str, Tensor]:
        """(3) and (4), those that have a weight, each without it."""
        weights, found = self.weights, {}
        if not (weights.generation or weights.caption_reconstruction):
            return found
        noised = self.noised(batch, draw)
        predicted = self.generator.predict(noised, batch.states)
        if weights.generation:
            found["generation"] = noised.loss(predicted)
        if weights.caption_reconstruction:
            found["caption_reconstruction"] = self.caption_reconstruction(predicted, noised, batch)
        return found

    def noised(self, batch: Batch, draw: torch.Generator) -> NoisyLatents:
        """The batch's latents with noise."""
        scheduler = self.generator.pipeline.scheduler
        return add_noise(batch.latents, scheduler, draw, batch.first, len(batch.pieces))

    def image_reconstruction(self, logits: Tensor, ids: Tensor, batch: Batch, draw: torch.Generator) -> Tensor:
        """Eq. 2, from what the captioner says of the pictures; only whom it moves receives a gradient."""
        weights = self.weights
        logits = logits if weights.image_updates != "generator" else logits.detach()
        noised = self.noised(batch, draw)
        states = self.bridge(self._relaxed(logits, batch, draw), ids, batch.captions)
        with still(self.learns["generator"] if weights.image_updates == "captioner" else []):
            return noised.loss(self.generator.predict(noised, states))

    def _relaxed(self, logits: Tensor, batch: Batch, draw: torch.Generator) -> Tensor:
        """(B, T, V) distributions; a picture's sample is its own, whichever part of the whole batch this is."""
        mode, temperature = self.weights.mode, self.weights.temperature
        if mode != "gumbel":
            return relax(logits, mode, temperature)
        seeds = torch.randint(2**62, (len(batch.pieces),), generator=draw)[batch.first :].tolist()
        draws = [torch.Generator().manual_seed(seed) for seed in seeds[: len(logits)]]
        return torch.stack([relax(row, mode, temperature, one) for row, one in zip(logits, draws, strict=True)])

    def caption_reconstruction(self, predicted: Tensor, noised: NoisyLatents, batch: Batch) -> Tensor:
        """Eq. 4, from what the generator predicts; 0 where every timestep of the batch is too late."""
        weights = self.weights
        limit = weights.latest * len(self.generator.pipeline.scheduler.alphas_cumprod)
        early, pieces = noised.timesteps < limit, batch.pieces[noised.batch_timesteps < limit].sum() * batch.share
        if not early.any():
            return predicted.sum() * 0  # with a gradient, so that every process has one
        predicted = predicted if weights.caption_updates != "captioner" else predicted.detach()
        latents = self._one_step(noised.of(early), predicted[early])
        captions = [caption for caption, kept in zip(batch.captions, early.tolist(), strict=True) if kept]
        with still(self.learns["captioner"] if weights.caption_updates == "generator" else []):
            pictures = self.generator.decode(self._reduced(latents))
            pictures = as_seen(self.captioner, pictures, normalised=not weights.unnormalised)
            logits, ids = self.captioner.token_logits(pictures, captions)
            return caption_loss(logits, ids, self.captioner.pad_id, pieces)

    def _one_step(self, noised: NoisyLatents, predicted: Tensor) -> Tensor:
        """The latents of x̂: ẑ_0, or what the released code takes for it."""
        if not self.weights.previous_sample:
            return noised.estimate(predicted)
        # a new one goes from t to t − 1, whatever the own was set to; and not every scheduler can
        scheduler = DDPMScheduler.from_config(self.generator.pipeline.scheduler.config)
        parts = zip(predicted, noised.timesteps, noised.clean, strict=True)  # `step` takes one timestep at a time
        return torch.stack([scheduler.step(answer, int(t), clean).prev_sample for answer, t, clean in parts])

    def _reduced(self, latents: Tensor) -> Tensor:
        if self.weights.decoded_size is None:
            return latents
        side = self.weights.decoded_size // self.generator.pipeline.vae_scale_factor
        return F.interpolate(latents, (side, side), mode="bilinear", antialias=True)


def total(found: dict[str, Tensor], losses: Losses) -> Tensor:
    """Eq. 5: the weighted sum of those that were computed."""
    return sum(getattr(losses, name) * loss for name, loss in found.items())


def caption_loss(logits: Tensor, ids: Tensor, pad_id: int, pieces: Tensor | float) -> Tensor:
    """Eqs. 1 and 4: −log p of the captions' pieces and of their ends, over `pieces`; padding does not count.

    Args:
        logits: (B, T, V). ids: (B, T), of `Captioner.token_logits`, which leaves the prompt out.
        pieces: how many there are; for a part of a batch, how many a part has in the mean.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    spent = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=pad_id, reduction="sum")
    return spent / pieces


def as_seen(captioner: Captioner, pictures: Tensor, normalised: bool = True) -> Tensor:
    """Pictures (B, 3, H, W) about in [-1, 1] as the captioner's processor would make them; gradients pass.

    Clamped, resized as PIL resizes, normalised, unless that is left out. Where a picture leaves [-1, 1] its gradient
    is 0.
    """
    processor = captioner.processor.image_processor
    precise = torch.promote_types(pictures.dtype, torch.float32)  # in bfloat16 a CPU cannot resize
    pixels = (pictures.to(precise).clamp(-1, 1) + 1) / 2
    side = processor.size["height"], processor.size["width"]
    if pixels.shape[-2:] != side:
        pixels = F.interpolate(pixels, side, mode="bicubic", antialias=True).clamp(0, 1)
    if not normalised:
        return pixels.to(captioner.model.dtype)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return ((pixels - mean) / std).to(captioner.model.dtype)


@contextmanager
def still(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """What is computed meanwhile sends no gradient to these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
