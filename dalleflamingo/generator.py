"""Captions to images: Stable Diffusion through the stock diffusers pipeline (§3: 50 DDPM steps, guidance 7.5).

Every image has a random generator of its own for its first latents and for every stochastic step, so an image is a
function of its caption and its seed, not of the batch it was generated in. For finetuning (§4.2), latents z get noise,

    z_t = √ᾱ_t z + √(1−ᾱ_t) ε,    ẑ_0 = (z_t − √(1−ᾱ_t) ε_φ(z_t, t, τ(w))) / √ᾱ_t,

and the U-Net's prediction ε_φ gives the loss and the one-step estimate ẑ_0. A model that predicts the velocity
v = √ᾱ_t ε − √(1−ᾱ_t) z instead of ε has v as its target.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import compare_versions
from diffusers import SchedulerMixin, StableDiffusionPipeline
from huggingface_hub import constants, try_to_load_from_cache
from PIL import ImageOps
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn import functional as F

from dalleflamingo.datasets import to_rgb
from dalleflamingo.denoising import fast_unet, load_scheduler, side_by_side, spread_steps
from dalleflamingo.registry import check_weights, loading
from dalleflamingo.runs import fingerprint
from dalleflamingo.tokens import check_caption, check_vocabulary

PREDICTIONS = ("epsilon", "v_prediction")
DTYPE = "dtype" if compare_versions("diffusers", ">=", "0.40") else "torch_dtype"  # 0.39 ignores dtype
BLACKENS = "the pipeline's safety checker returns black images, which would be ranked: load it with safety_checker=None"
FITS = {"resize": Image.resize, "crop": ImageOps.fit}  # how an image is made square


@dataclass(frozen=True)
class NoisyLatents:
    """A batch of latents with noise, and what the U-Net should predict of it, in float32 at least.

    In bfloat16 ᾱ_t near 1 is rounded to steps of 1/256, so σ_t = √(1−ᾱ_t) would be 0 or at least 0.06 at Stable
    Diffusion's first timesteps.
    """

    clean: Tensor  # z, (B, 4, h, w)
    noise: Tensor  # ε, (B, 4, h, w)
    timesteps: Tensor  # t, (B,)
    alphas_cumprod: Tensor  # ᾱ_t, (B, 1, 1, 1)
    prediction_type: str  # what the U-Net predicts, one of `PREDICTIONS`
    batch_timesteps: Tensor  # of the whole batch, where this is a part of one

    @property
    def latents(self) -> Tensor:
        """z_t."""
        return self.alphas_cumprod.sqrt() * self.clean + (1 - self.alphas_cumprod).sqrt() * self.noise

    @property
    def target(self) -> Tensor:
        """What the U-Net should predict: ε or v."""
        if self.prediction_type == "epsilon":
            return self.noise
        return self.alphas_cumprod.sqrt() * self.noise - (1 - self.alphas_cumprod).sqrt() * self.clean

    def original_sample(self, model_output: Tensor) -> Tensor:
        """ẑ_0, from the U-Net's prediction (B, 4, h, w); gradients pass."""
        if self.prediction_type == "epsilon":
            return (self.latents - (1 - self.alphas_cumprod).sqrt() * model_output) / self.alphas_cumprod.sqrt()
        return self.alphas_cumprod.sqrt() * self.latents - (1 - self.alphas_cumprod).sqrt() * model_output

    def loss(self, model_output: Tensor) -> Tensor:
        """Eqs. 2 and 3: the mean squared error of the U-Net's prediction."""
        return F.mse_loss(model_output.to(self.target), self.target)

    def select(self, mask: Tensor) -> "NoisyLatents":
        """The part of the batch where the (B,) mask is true."""
        parts = (part[mask] for part in (self.clean, self.noise, self.timesteps, self.alphas_cumprod))
        return NoisyLatents(*parts, self.prediction_type, self.batch_timesteps)


def add_noise(
    latents: Tensor, scheduler: SchedulerMixin, draw: torch.Generator, first: int = 0, whole: int | None = None
) -> NoisyLatents:
    """Noise at uniformly drawn timesteps.

    Args:
        latents: z, (B, 4, h, w), scaled.
        scheduler: the pipeline's, whose noise schedule and prediction type are taken.
        draw: random generator on the CPU, so that every device gets the same timesteps and noise.
        first: position of the latents in the whole batch; a part gets the noise that it has in the whole batch.
        whole: size of the whole batch; None: the latents are the whole batch.
    Raises:
        ValueError: the scheduler's model predicts neither ε nor v.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"the generator predicts {prediction_type!r}: expected one of {', '.join(PREDICTIONS)}")
    # ours, not `scheduler.add_noise` and `get_velocity`: Euler's scales z_t otherwise, DPM-Solver's knows only the
    # timesteps of its last run, PNDM has no velocity; those of DDPM and DDIM give the same to the bit
    schedule = scheduler.alphas_cumprod.cpu()
    whole, own = whole or len(latents), slice(first, first + len(latents))
    batch_timesteps = torch.randint(len(schedule), (whole,), generator=draw)
    timesteps = batch_timesteps[own]
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    noise = torch.randn((whole, *latents.shape[1:]), generator=draw)[own].to(latents)
    alphas_cumprod = schedule[timesteps].view(-1, 1, 1, 1).to(latents)
    return NoisyLatents(latents, noise, timesteps.to(latents.device), alphas_cumprod, prediction_type, batch_timesteps)


class Generator:
    """A Stable Diffusion pipeline: text encoder τ, U-Net ε_φ, VAE and noise schedule are its modules.

    Args:
        pipeline: without a safety checker, else a ValueError; its progress bar is switched off.
        image_size: side in pixels of images; None: the model's own. Other sizes are legal, but were not trained.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, image_size: int | None = None):
        if pipeline.safety_checker is not None:
            raise ValueError(BLACKENS)
        self.pipeline = pipeline
        own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        self.image_size: int = own if image_size is None else image_size
        pipeline.set_progress_bar_config(disable=True)
        if self.image_size >= 256:
            pipeline.vae.enable_slicing()  # decoding a whole batch at 512 pixels is what overflows a small GPU

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        scheduler: str | None = None,
        image_size: int | None = None,
        **options: object,
    ) -> "Generator":
        """A generator from a folder or a hub, without the safety checker (it blackens some harmless images).

        Args:
            name_or_path: a folder, or the id of a model on the hub.
            device: where it computes.
            dtype: of the weights.
            scheduler: one of `denoising.SCHEDULERS`, such as "DDIM" or "DDIMScheduler"; None: of the model's own kind.
            image_size: as in the class, a multiple of 8.
            options: the stock pipeline's, such as a hub's `revision` and `variant`.
        Raises:
            RegistryError: the folder's weights are missing or cut short.
            ValueError: the scheduler is not one of `denoising.SCHEDULERS`.
        """
        unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        options = {DTYPE: dtype, "use_safetensors": True} | unchecked | options
        with loading(name_or_path):
            folder = check_weights(name_or_path)
            if constants.HF_HUB_OFFLINE and not Path(folder).is_dir():
                # by its name diffusers 0.39 opens a cached model only where all files of its repository are cached
                index = try_to_load_from_cache(folder, "model_index.json", revision=options.get("revision"))
                folder = Path(index).parent if isinstance(index, str) else folder
            pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
            check_vocabulary(pipeline.tokenizer, pipeline.text_encoder.config.vocab_size)
        wanted = type(pipeline.scheduler).__name__ if scheduler is None else scheduler
        pipeline.scheduler = load_scheduler(wanted, pipeline.scheduler)
        return cls(pipeline.to(device), image_size)

    def render(
        self,
        captions: Sequence[str | Tensor],
        seeds: Sequence[int],
        steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 16,
        progress: Callable[[int], object] | None = None,
    ) -> list[Image]:
        """One generated image for each (caption, seed); each distinct pair is generated once.

        Args:
            captions: N texts, each distinct one encoded once, "" for an image without a caption; or their (T, D)
                hidden states, from the text encoder or from the bridge.
            seeds: N non-negative integers.
            steps: denoising steps.
            guidance_scale: of classifier-free guidance; 1 or less is without.
            batch_size: images generated at once: memory and speed, never the result.
            progress: called with the number of generated images just made ready, as `tqdm.update` is.
        Returns:
            N RGB images.
        Raises:
            ValueError: there are not as many seeds as captions, or the scheduler cannot spread so many steps.
        """
        captions = list(captions)  # of a stacked tensor too: rows that stay, so that each has an id of its own
        texts = dict.fromkeys([*(caption for caption in captions if isinstance(caption, str)), ""])
        encoded = self._encode(list(texts), batch_size)
        keys = [caption if isinstance(caption, str) else id(caption) for caption in captions]
        hidden = {key: encoded[key] if isinstance(key, str) else c for key, c in zip(keys, captions, strict=True)}

        scheduler = spread_steps(self.pipeline.scheduler, steps)

        def generate(part: list[tuple[Hashable, int]]) -> list[Image]:
            pipeline = copy(self.pipeline)  # a scheduler counts its steps: each thread has one of its own
            pipeline.scheduler = deepcopy(scheduler)
            return pipeline(
                prompt_embeds=torch.stack([hidden[key] for key, _ in part]),  # (B, T, D)
                negative_prompt_embeds=torch.stack([encoded[""]] * len(part)),
                generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                height=self.image_size,
                width=self.image_size,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                cross_attention_kwargs={"keys_values": {}} if caches_text else None,
            ).images

        with fast_unet(self.pipeline.unet) as caches_text:
            split = partial(side_by_side, generate, self.pipeline.device)
            return render_distinct(keys, seeds, split, batch_size, progress)

    def check_caption(self, caption: str) -> None:
        """Refuse a caption that the text encoder cannot read as a whole; errors as `tokens.check_caption`."""
        parts = self.pipeline
        positions = parts.text_encoder.config.max_position_embeddings
        check_caption(caption, lambda text: len(parts.tokenizer(text, verbose=False).input_ids), positions)

    def predict(self, noisy: NoisyLatents, encoder_hidden_states: Tensor) -> Tensor:
        """The U-Net's prediction (B, 4, h, w) for noisy latents, given text (B, T, D); gradients pass."""
        unet = self.pipeline.unet
        return unet(noisy.latents.to(unet.dtype), noisy.timesteps, encoder_hidden_states=encoder_hidden_states).sample

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) scaled latents to images (B, 3, H, W), about in [-1, 1]; gradients pass."""
        vae = self.pipeline.vae
        return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image], like: Tensor, fit: str = "resize") -> Tensor:
        """(B, 4, h, w) scaled latents of B images made square, with the device and type of `like`.

        Args:
            images: of any size.
            like: a tensor of the U-Net's, such as a parameter.
            fit: "resize" takes the whole image, distorted where it is not square, as the authors' code does; "crop"
                takes its middle square, undistorted, though its caption tells of the whole (27 % of the pixels of
                NoCaps validation are lost, mean over images).
        Raises:
            ValueError: no other way to make an image square is known.
        """
        if fit not in FITS:
            raise ValueError(f"fit = {fit!r}: choose one of {', '.join(FITS)}")
        pipeline, size = self.pipeline, (self.image_size, self.image_size)
        squares = [FITS[fit](to_rgb(image), size, Resampling.BICUBIC) for image in images]
        pixels = pipeline.image_processor.preprocess(squares).to(like)  # (B, 3, H, W) in [-1, 1]
        return pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor

    def fingerprint(self) -> str:
        """A text that changes with weights, number format, image size, vocabulary, scheduler and its settings."""
        parts = self.pipeline
        settings = {
            "dtype": str(parts.dtype),
            "latents": (self.image_size, parts.vae.config.scaling_factor),
            "tokenizer": (parts.tokenizer.get_vocab(), parts.tokenizer.model_max_length),
            "scheduler": type(parts.scheduler).__name__,
            "config": {key: value for key, value in parts.scheduler.config.items() if not key.startswith("_")},
        }
        modules = [parts.text_encoder, parts.unet, parts.vae]
        return fingerprint(type(self).__name__, modules=modules, settings=settings)

    @torch.no_grad()
    def _encode(self, captions: Sequence[str], batch_size: int) -> dict[str, Tensor]:
        """Caption -> its hidden states τ(w), (T, D), of distinct captions; diffusers warns of unread tokens."""
        encoded = {}
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            embeds, _ = self.pipeline.encode_prompt(batch, self.pipeline.device, 1, do_classifier_free_guidance=False)
            encoded.update(zip(batch, embeds, strict=True))
        return encoded


def render_distinct(
    keys: Sequence[Hashable],
    seeds: Sequence[int],
    generate: Callable[[list[tuple[Hashable, int]]], list[Image]],
    batch_size: int,
    progress: Callable[[int], object] | None,
) -> list[Image]:
    """A generated image for each of N (key, seed), each distinct pair generated once.

    Args:
        keys: N captions, or what tells them apart.
        seeds: N non-negative integers.
        generate: from (key, seed) pairs to their images.
        batch_size: pairs that are generated together.
        progress: called with the number of images just made ready.
    Raises:
        ValueError: there are not as many seeds as keys.
    """
    if len(keys) != len(seeds):
        raise ValueError(f"{len(keys)} captions but {len(seeds)} seeds: give every image one of each")
    pairs = [(key, int(seed)) for key, seed in zip(keys, seeds, strict=True)]
    wanted, images = Counter(pairs), {}
    for start in range(0, len(wanted), batch_size):
        batch = list(wanted)[start : start + batch_size]
        images.update(zip(batch, generate(batch), strict=True))
        if progress is not None:
            progress(sum(wanted[pair] for pair in batch))
    return [images[pair] for pair in pairs]
