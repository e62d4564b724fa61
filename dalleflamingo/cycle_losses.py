"""The four losses of cycle finetuning (§4, Eqs. 1–5): each model learns from labels and through the other model.

    (1) label → captioner       −Σ_t log p_θ(w_t | w_<t, x)
    (2) image → text → image    ‖ε − ε_φ(z_t, t, τ(P M E))‖²      P: the captioner's distributions along w
    (3) label → generator       ‖ε − ε_φ(z_t, t, τ(w))‖²
    (4) text → image → text     −Σ_t log p_θ(w_t | w_<t, x̂)       x̂: decoded from ẑ_0, see `generator.py`
    (5) L = (1) + (2) + (3) + (4)

(1) and (2) share a pass through the captioner, (3) and (4) one through the U-Net, so the cycle adds a
second half to each loss on labels. Sums over t are means over the tokens of a batch, squared norms are means over
elements, as in both stock models. Only the queries of cross-attention are trained, unless `TRAINABLE` is used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from pydantic import Field
from torch import Tensor, nn

from dalleflamingo.bridge import BRIDGE_MODES, Bridge, relax
from dalleflamingo.captioner import Captioner
from dalleflamingo.generator import Generator, NoisyLatents, add_noise
from dalleflamingo.settings import Side, check

LOSS_NAMES = ("caption", "image_reconstruction", "generation", "caption_reconstruction")  # (1) to (4)
TRAINABLE = ("queries", "cross-attention", "lora")  # of cross-attention: query projections, everything, LoRA
LORA_RANK = 8
_TRAINED_OF_CAPTIONER = dict(zip(TRAINABLE, ("crossattention.self.query.", "crossattention.", ".lora_"), strict=True))
_TRAINED_OF_GENERATOR = dict(zip(TRAINABLE, ("attn2.to_q.", "attn2.", ".lora_"), strict=True))
_PROJECTIONS = r".*(crossattention\.\w+\.(query|key|value|dense)|attn2\.(to_q|to_k|to_v|to_out\.0))"
Weight = Annotated[float, Field(ge=0, le=1e6)]


def captioner_parameters(captioner: Captioner, trainable: str = "queries") -> dict[str, nn.Parameter]:
    """Name -> trained parameter of a captioner, by one of `TRAINABLE`; BLIP-2's queries are its query tokens.

    Raises ValueError where the model has no such parameter; those of "lora" come from `add_lora`.
    """
    if trainable == "queries" and hasattr(captioner.model, "query_tokens"):
        return _named(captioner.model, "query_tokens")
    return _named(captioner.model, _TRAINED_OF_CAPTIONER[trainable])


def generator_parameters(generator: Generator, trainable: str = "queries") -> dict[str, nn.Parameter]:
    """Name -> trained parameter of a generator's U-Net; arguments and errors as above."""
    return _named(generator.pipeline.unet, _TRAINED_OF_GENERATOR[trainable])


def add_lora(model: nn.Module, seed: int) -> None:
    """Add a low-rank change, 0 at first, to all projections of a model's cross-attention (Hu et al. 2022).

    Args:
        model: a captioner's, or a U-Net.
        seed: of the factors that are not 0.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=_PROJECTIONS))


def freeze_all_but(model: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
    """Let gradients reach only those parameters of a model that `trainable` names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def _named(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in model.named_parameters() if part in name}
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter with {part!r} in its name: nothing to train")
    return found


@dataclass(frozen=True)
class Losses:
    """Weights of the four losses, and which model each of them updates.

    Attributes:
        caption, image_reconstruction, generation, caption_reconstruction: weights of (1) to (4); 0 leaves one out.
        image_updates, caption_updates: which models (2) and (4) update: "both", "captioner" or "generator".
        mode, temperature: settings of the bridge, see `bridge.relax`.
        max_timestep: a share of all timesteps in (0, 1]: (4) leaves out images noised to later ones, because x̂ decoded
            from late timesteps shows little but the error in ε.
        decoded_size: side in pixels at which x̂ is decoded; None: the generator's own.
        label_smoothing: a share in [0, 1) of (1)'s and (4)'s targets, spread over the vocabulary; the authors' is 0.1.
    Raises:
        ValueError: as `settings.check`.
    """

    caption: Weight = 1.0
    image_reconstruction: Weight = 1.0
    generation: Weight = 1.0
    caption_reconstruction: Weight = 1.0
    image_updates: Literal["both", "captioner", "generator"] = "both"
    caption_updates: Literal["both", "captioner", "generator"] = "both"
    mode: Literal[BRIDGE_MODES] = "straight-through"
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    max_timestep: Annotated[float, Field(ge=1e-3, le=1)] = 1.0
    decoded_size: Side | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class Batch:
    """B images with one human caption each: a whole batch of N, or one process's part of it.

    Attributes:
        pixel_values: (B, 3, H, W) from the captioner's processor.
        captions: B texts.
        latents: (B, 4, h, w), scaled.
        encoder_hidden_states: (B, 77, D), τ of the captions.
        token_counts: (N,) number of tokens of every caption in the whole batch, including its end token, so that the
            mean of the parts' losses is the loss of the whole, however long each part's captions are.
        first: position of the part's first image in the whole batch.
    """

    pixel_values: Tensor
    captions: Sequence[str]
    latents: Tensor
    encoder_hidden_states: Tensor
    token_counts: Tensor
    first: int = 0

    @property
    def share(self) -> float:
        """The share of the whole batch's images that this part holds, in (0, 1]."""
        return len(self.captions) / len(self.token_counts)


class Cycle:
    """A captioner and a generator that teach each other.

    Args:
        captioner, generator: p_θ; ε_φ with τ and the VAE.
        bridge: from the captioner's tokens to the generator's text encoder.
        trainable_captioner, trainable_generator: the trained parameters, see `captioner_parameters`.
        losses: weights and settings.
    """

    def __init__(
        self,
        captioner: Captioner,
        generator: Generator,
        bridge: Bridge,
        trainable_captioner: Sequence[nn.Parameter],
        trainable_generator: Sequence[nn.Parameter],
        losses: Losses = Losses(),
    ):
        self.captioner, self.generator, self.bridge, self.losses = captioner, generator, bridge, losses
        self.trainable = {"captioner": list(trainable_captioner), "generator": list(trainable_generator)}

    def image_losses(self, batch: Batch, draw: torch.Generator) -> dict[str, Tensor]:
        """(1) and (2) where their weight is above 0, unweighted; `draw` (CPU) seeds timesteps, noise and samples."""
        losses, found = self.losses, {}
        logits, ids = self.captioner.token_logits(batch.pixel_values, batch.captions)
        if losses.caption:
            count = batch.token_counts.sum() * batch.share
            found["caption"] = caption_loss(logits, ids, self.captioner.pad_id, count, losses.label_smoothing)
        if losses.image_reconstruction:
            found["image_reconstruction"] = self.image_reconstruction(logits, ids, batch, draw)
        return found

    def text_losses(self, batch: Batch, draw: torch.Generator) -> dict[str, Tensor]:
        """(3) and (4), in the same form as `image_losses`; no (4) where the whole batch has no early timestep."""
        losses, found = self.losses, {}
        noisy = self.noisy_latents(batch, draw)
        model_output = self.generator.predict(noisy, batch.encoder_hidden_states)
        if losses.generation:
            found["generation"] = noisy.loss(model_output)
        if losses.caption_reconstruction and (noisy.batch_timesteps < self._limit).any():
            found["caption_reconstruction"] = self.caption_reconstruction(model_output, noisy, batch)
        return found

    @property
    def _limit(self) -> float:
        return self.losses.max_timestep * len(self.generator.pipeline.scheduler.alphas_cumprod)

    def noisy_latents(self, batch: Batch, draw: torch.Generator) -> NoisyLatents:
        """z_t of the batch, at timesteps drawn uniformly."""
        return add_noise(batch.latents, self.generator.pipeline.scheduler, draw, batch.first, len(batch.token_counts))

    def image_reconstruction(self, logits: Tensor, ids: Tensor, batch: Batch, draw: torch.Generator) -> Tensor:
        """Eq. 2 from the captioner's (B, T, V) logits along (B, T) ids; a scalar."""
        logits = logits if self.losses.image_updates != "generator" else logits.detach()
        noisy = self.noisy_latents(batch, draw)
        texts = self.captioner.behind_prompt(batch.captions)
        encoder_hidden_states = self.bridge(self._distributions(logits, batch, draw), ids, texts)
        with frozen(self.trainable["generator"] if self.losses.image_updates == "captioner" else []):
            return noisy.loss(self.generator.predict(noisy, encoder_hidden_states))

    def _distributions(self, logits: Tensor, batch: Batch, draw: torch.Generator) -> Tensor:
        """(B, T, V) relaxed logits; each image has its own Gumbel sample, however the batch is divided into parts."""
        mode, temperature = self.losses.mode, self.losses.temperature
        if mode != "gumbel":
            return relax(logits, mode, temperature)
        seeds = torch.randint(2**62, (len(batch.token_counts),), generator=draw)[batch.first :].tolist()
        draws = [torch.Generator().manual_seed(seed) for seed in seeds[: len(logits)]]
        return torch.stack([relax(row, mode, temperature, own) for row, own in zip(logits, draws, strict=True)])

    def caption_reconstruction(self, model_output: Tensor, noisy: NoisyLatents, batch: Batch) -> Tensor:
        """Eq. 4 from the U-Net's (B, 4, h, w) output; a scalar, 0 where every timestep is above `max_timestep`."""
        early = noisy.timesteps < self._limit
        if not early.any():
            return model_output.sum() * 0  # with a gradient, so that every process has one
        token_count = batch.token_counts[noisy.batch_timesteps < self._limit].sum() * batch.share
        model_output = model_output if self.losses.caption_updates != "captioner" else model_output.detach()
        latents = self.one_step_latents(noisy.select(early), model_output[early])
        captions = [caption for caption, is_early in zip(batch.captions, early.tolist(), strict=True) if is_early]
        with frozen(self.trainable["captioner"] if self.losses.caption_updates == "generator" else []):
            images = self.captioner_pixels(self.generator.decode(self._resized(latents)))
            logits, ids = self.captioner.token_logits(images, captions)
            return caption_loss(logits, ids, self.captioner.pad_id, token_count, self.losses.label_smoothing)

    def one_step_latents(self, noisy: NoisyLatents, model_output: Tensor) -> Tensor:
        """(B, 4, h, w) latents of x̂: ẑ_0."""
        return noisy.original_sample(model_output)

    def captioner_pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) generated images as the captioner's encoder expects them."""
        return captioner_pixels(self.captioner, images)

    def _resized(self, latents: Tensor) -> Tensor:
        if self.losses.decoded_size is None:
            return latents
        side = self.losses.decoded_size // self.generator.pipeline.vae_scale_factor
        return F.interpolate(latents, (side, side), mode="bilinear", antialias=True)


def total_loss(found: dict[str, Tensor], losses: Losses) -> Tensor:
    """Eq. 5: the weighted sum of the losses that were computed (name -> scalar)."""
    return sum(getattr(losses, name) * loss for name, loss in found.items())


def caption_loss(
    logits: Tensor, ids: Tensor, pad_id: int, token_count: Tensor | float, label_smoothing: float = 0.0
) -> Tensor:
    """Eqs. 1 and 4: −log p of the captions' tokens and end tokens, without padding; a scalar, in float32 at least.

    Args:
        logits: (B, T, V) from `Captioner.token_logits`, which leaves the prompt out.
        ids: (B, T), likewise.
        pad_id: id of padding.
        token_count: number of tokens to divide by; for a part of a batch, the mean over all parts.
        label_smoothing: as in `Losses`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    options = dict(ignore_index=pad_id, reduction="sum", label_smoothing=label_smoothing)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), **options) / token_count


def captioner_pixels(captioner: Captioner, images: Tensor) -> Tensor:
    """Generated images (B, 3, H, W), about in [-1, 1], as the captioner's processor would prepare them: (B, 3, H', W').

    Gradients flow through; they are 0 where a value is outside [-1, 1].
    """
    processor = captioner.processor.image_processor
    pixels = resized_pixels(captioner, images)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return ((pixels - mean) / std).to(captioner.model.dtype)


def resized_pixels(captioner: Captioner, images: Tensor) -> Tensor:
    """(B, 3, H, W) images in [-1, 1] to (B, 3, H', W') in [0, 1], clamped, and resized as PIL does."""
    size = captioner.processor.image_processor.size
    precise = torch.promote_types(images.dtype, torch.float32)  # in bfloat16 a CPU cannot resize
    pixels = (images.to(precise).clamp(-1, 1) + 1) / 2
    if pixels.shape[-2:] == (size["height"], size["width"]):
        return pixels
    return F.interpolate(pixels, (size["height"], size["width"]), mode="bicubic", antialias=True).clamp(0, 1)


@contextmanager
def frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Nothing computed inside the context sends gradients to these parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
