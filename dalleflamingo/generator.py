"""Captions to pictures: Stable Diffusion through the stock diffusers pipeline (§3: 50 DDPM steps, guidance 7.5).

Every picture has a random generator of its own for its first latents and for every stochastic step, so a picture is a
function of its caption and its seed, not of the batch it was drawn in.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from PIL import ImageOps
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn import functional as F

from dalleflamingo.registry import check_weights

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoisyLatents:
    """Latents z with noise: all (B, 4, h, w), but for timesteps (B,) and kept, ᾱ_t, (B, 1, 1, 1).

    asked: what the U-Net predicts, one of `PREDICTIONS`. batch_timesteps: of the batch that this is a part of.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    kept: Tensor
    asked: str
    batch_timesteps: Tensor

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

    def of(self, chosen: Tensor) -> "NoisyLatents":
        """Some of the batch, by a (B,) mask."""
        parts = (part[chosen] for part in (self.clean, self.noise, self.timesteps, self.kept))
        return NoisyLatents(*parts, self.asked, self.batch_timesteps)


def add_noise(
    latents: Tensor, scheduler: SchedulerMixin, draw: torch.Generator, first: int = 0, whole: int | None = None
) -> NoisyLatents:
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
    batch_timesteps = torch.randint(len(alphas), (whole,), generator=draw)
    timesteps = batch_timesteps[own]
    noise = torch.randn((whole, *latents.shape[1:]), generator=draw)[own].to(latents)
    kept = alphas.cpu()[timesteps].view(-1, 1, 1, 1).to(latents)
    return NoisyLatents(latents, noise, timesteps.to(latents.device), kept, asked, batch_timesteps)


class Generator:
    """A Stable Diffusion pipeline: text encoder τ, U-Net ε_φ, VAE and schedule are its own modules."""

    def __init__(self, pipeline: StableDiffusionPipeline):
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_slicing()  # decoding a whole batch at 512 pixels is what overflows a small GPU

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        scheduler: str | None = None,
    ) -> "Generator":
        """A generator from a folder or a hub, without the safety checker (it blackens some harmless pictures).

        Args:
            variant: "fp16" downloads the half-size files of a hub's model, for dtype float16.
            scheduler: a diffusers scheduler by name, "DDIM", "Euler" or "DDIMScheduler"; None keeps the model's own.
        Raises:
            RegistryError: the folder's weights are missing or cut short.
            ValueError: no scheduler of that name fits.
        """
        pipeline = StableDiffusionPipeline.from_pretrained(
            check_weights(name_or_path),
            dtype=dtype,
            revision=revision,
            variant=variant,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        if scheduler is not None:
            pipeline.scheduler = _scheduler(scheduler, pipeline.scheduler)
        return cls(pipeline.to(device))

    def render(
        self,
        captions: Sequence[str | Tensor],
        seeds: Sequence[int],
        steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 16,
        progress: Callable[[int], object] | None = None,
    ) -> list[Image]:
        """One picture for each (caption, seed), each distinct pair drawn once.

        Args:
            captions: N texts, each distinct one encoded once, "" for a picture without a caption; or their (T, D)
                states, from the text encoder or from the bridge.
            seeds: N non-negative integers.
            guidance_scale: 1 or less is without guidance.
            batch_size: pictures drawn at once: memory and speed, never the result.
            progress: called with the number of pictures just made ready, as `tqdm.update` is.
        Returns:
            N RGB pictures.
        Raises:
            ValueError: if there are not as many seeds as captions.
        """
        captions = list(captions)  # of a stacked tensor too: rows that stay, so that each has an id of its own
        texts = [caption for caption in captions if isinstance(caption, str)]
        self._warn_of_long(texts)
        encoded = self._encode(dict.fromkeys([*texts, ""]), batch_size)
        keys = [caption if isinstance(caption, str) else id(caption) for caption in captions]
        states = {key: encoded[key] if isinstance(key, str) else c for key, c in zip(keys, captions, strict=True)}

        def draw(batch: list[tuple[Hashable, int]]) -> list[Image]:
            return self.pipeline(
                prompt_embeds=torch.stack([states[key] for key, _ in batch]),  # (B, T, D)
                negative_prompt_embeds=torch.stack([encoded[""]] * len(batch)),
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
            ).images

        return render_distinct(keys, seeds, draw, batch_size, progress)

    def noise_loss(self, images: Sequence[Image], states: Tensor, seed: int) -> Tensor:
        """How well the generator tells the noise in pictures, given texts: Eq. 3, or Eq. 2 with states from the bridge.

        A model that was trained to predict the velocity v instead of ε is asked for v, as it was taught.

        Args:
            images: B pictures; their middle square is resized to the generator's own size.
            states: (B, T, D) of the text encoder; gradients pass.
            seed: of noise and timesteps, which are drawn uniformly.
        Returns:
            scalar, the mean squared error.
        Raises:
            ValueError: the generator predicts neither ε nor v.
        """
        noised = add_noise(self.latents(images, states), self.pipeline.scheduler, torch.Generator().manual_seed(seed))
        return noised.loss(self.predict(noised, states))

    def predict(self, noised: NoisyLatents, states: Tensor) -> Tensor:
        """What the U-Net answers to noised latents, given (B, T, D) text states; gradients pass."""
        return self.pipeline.unet(noised.latents, noised.timesteps, encoder_hidden_states=states).sample

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) scaled latents to pictures (B, 3, H, W), about in [-1, 1]; gradients pass."""
        vae = self.pipeline.vae
        return vae.decode(latents / vae.config.scaling_factor).sample

    @torch.no_grad()
    def latents(self, images: Sequence[Image], like: Tensor) -> Tensor:
        """(B, 4, h, w) scaled latents of the pictures' middle squares, with the device and type of `like`."""
        pipeline = self.pipeline
        side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        squares = [ImageOps.fit(image.convert("RGB"), (side, side), Resampling.BICUBIC) for image in images]
        pixels = pipeline.image_processor.preprocess(squares).to(like)  # (B, 3, H, W) in [-1, 1]
        return pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor

    @torch.no_grad()
    def _encode(self, captions: Iterable[str], batch_size: int) -> dict[str, Tensor]:
        """Text embeddings τ(w) of distinct captions, each (T, D)."""
        captions, encoded = list(captions), {}
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            embeds, _ = self.pipeline.encode_prompt(batch, self.pipeline.device, 1, do_classifier_free_guidance=False)
            encoded.update(zip(batch, embeds, strict=True))
        return encoded

    def _warn_of_long(self, captions: Sequence[str]) -> None:
        tokenizer = self.pipeline.tokenizer
        limit = tokenizer.model_max_length
        for caption in dict.fromkeys(captions):
            ids = tokenizer(caption).input_ids
            if len(ids) > limit:
                read = tokenizer.decode(ids[: limit - 1], skip_special_tokens=True)
                message = f"{caption!r} has {len(ids)} tokens, the generator reads {limit}: it is drawn as {read!r}"
                warnings.warn(message, stacklevel=3)


def render_distinct(
    keys: Sequence[Hashable],
    seeds: Sequence[int],
    draw: Callable[[list[tuple[Hashable, int]]], list[Image]],
    batch_size: int,
    progress: Callable[[int], object] | None,
) -> list[Image]:
    """A picture for each of N (key, seed); each distinct pair is drawn once, `batch_size` of them together.

    Raises:
        ValueError: if there are not as many seeds as keys.
    """
    if len(keys) != len(seeds):
        raise ValueError(f"{len(keys)} captions but {len(seeds)} seeds: give every picture one of each")
    pairs = [(key, int(seed)) for key, seed in zip(keys, seeds, strict=True)]
    wanted, drawn = Counter(pairs), {}
    for start in range(0, len(wanted), batch_size):
        batch = list(wanted)[start : start + batch_size]
        drawn.update(zip(batch, draw(batch), strict=True))
        if progress is not None:
            progress(sum(wanted[pair] for pair in batch))
    return [drawn[pair] for pair in pairs]


def _scheduler(name: str, shipped):
    """The scheduler of that name, with the noise schedule and the settings that the model was shipped with."""
    kinds = {kind.__name__: kind for kind in shipped.compatibles}
    kinds.pop("DPMSolverSDEScheduler", None)  # takes its noise from no generator of ours: not a function of the seed
    for full_name in (name, f"{name}Scheduler", f"{name}DiscreteScheduler"):
        if full_name in kinds:
            return kinds[full_name].from_config(shipped.config)
    raise ValueError(f"no scheduler named {name!r} fits this model; choose one of {', '.join(sorted(kinds))}")
