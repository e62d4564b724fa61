"""A second generator: a GAN conditioned on CLIP's features, which generates an image in one step (Table 8).

LAFITE (Zhou et al. 2022) generates from CLIP's embedding of a caption, without the caption's words. (The paper calls it
VAE-based; it is a StyleGAN.) So does this one. It is small, generates latents of Stable Diffusion's autoencoder instead
of pixels, and computes its first 4 × 4 map from noise and feature, where StyleGAN has a constant, so that positions can
vary. `training/lafite.py` has its training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor, nn

from dalleflamingo import registry
from dalleflamingo.evaluation.text_encoders import ClipText
from dalleflamingo.generator import render_distinct
from dalleflamingo.registry import check_weights, loading
from dalleflamingo.runs import fingerprint
from dalleflamingo.tokens import check_caption

FIRST_CHANNELS = 32  # of the first map, at 4 × 4 positions


class StyledBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut; the style scales and shifts the normalised input of each convolution.

    This is the adaptive group normalisation of diffusion models (Dhariwal & Nichol 2021). With the modulated weights of
    StyleGAN2 instead, the generator still drew blots after three times as many steps.
    """

    def __init__(self, width: int, style_size: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.styles = nn.ModuleList(nn.Linear(style_size, 2 * width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.convolutions[1].weight)  # at first only the shortcut

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """(B, width, H, W), (B, style_size) -> (B, width, H, W)."""
        inner = x
        for to_style, convolution in zip(self.styles, self.convolutions, strict=True):
            scale, shift = to_style(style)[:, :, None, None].chunk(2, dim=1)
            inner = convolution(F.silu(self.norm(inner) * (1 + scale) + shift))
        return x + inner


class Lafite(ModelMixin, ConfigMixin):
    """Noise and a CLIP feature to the latents of an autoencoder.

    Args:
        feature_size: of CLIP's embeddings.
        noise_size: of the noise.
        style_size: of the style, the output of the mapping network.
        width: channels at 8 × 8 positions, from which 16 × 16 latents are unfolded (Shi et al. 2016).
        latent_channels: of the autoencoder.
        clip, autoencoder: registry names of the models that it was trained with; the latter's subfolder `vae`.
    """

    @register_to_config
    def __init__(
        self,
        feature_size: int = 128,
        noise_size: int = 64,
        style_size: int = 128,
        width: int = 112,
        latent_channels: int = 4,
        clip: str = "miniature/clip",
        autoencoder: str = "miniature/sd",
    ):
        super().__init__()
        # of captions' features, from `training.lafite.whitening`
        self.register_buffer("centre", torch.zeros(feature_size))
        self.register_buffer("matrix", torch.eye(feature_size))
        read = feature_size + noise_size
        self.mapping = nn.Sequential(nn.Linear(read, 256), nn.SiLU(), nn.Linear(256, style_size), nn.SiLU())
        self.start = nn.Sequential(  # positions are no linear function of a feature
            nn.Linear(read, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, FIRST_CHANNELS * 4 * 4)
        )
        self.widen = nn.Conv2d(FIRST_CHANNELS, width, 3, padding=1)
        self.blocks = nn.ModuleList(StyledBlock(width, style_size) for _ in range(2))
        self.norm = nn.GroupNorm(8, width)
        self.to_latents = nn.Conv2d(width, 4 * latent_channels, 3, padding=1)

    def whiten(self, features: Tensor) -> Tensor:
        """(B, feature_size) features of captions, of length 1 -> whitened, with entries of about 1."""
        return F.normalize((features - self.centre) @ self.matrix, dim=-1) * features.shape[-1] ** 0.5

    def forward(self, noise: Tensor, features: Tensor) -> Tensor:
        """(B, noise_size), (B, feature_size) of `whiten` -> (B, 4, 16, 16), scaled as Stable Diffusion's latents."""
        read = torch.cat([noise, features], dim=-1)
        style = self.mapping(read)
        x = self.widen(F.interpolate(self.start(read).view(len(noise), -1, 4, 4), scale_factor=2, mode="nearest"))
        for block in self.blocks:
            x = block(x, style)
        return F.pixel_shuffle(self.to_latents(F.silu(self.norm(x))), 2)


class LafiteGenerator:
    """Generates images from captions with the interface of `Generator`; it has no denoising steps and no guidance.

    Args:
        model: features to latents.
        vae: of Stable Diffusion, latents to images.
        clip_text: captions to features.
    """

    def __init__(self, model: Lafite, vae: AutoencoderKL, clip_text: ClipText):
        self.model, self.vae, self.clip_text = model.eval(), vae.eval(), clip_text
        self.processor = VaeImageProcessor()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: str = "cpu", dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> "LafiteGenerator":
        """Open a folder; its config names CLIP and the autoencoder, which the registry locates.

        Args:
            name_or_path: folder or hub name of the model.
            device: where it computes.
            dtype: of its weights.
            revision: of a hub name.
        Raises:
            RegistryError: weights are missing or incomplete.
        """
        with loading(name_or_path):
            model = Lafite.from_pretrained(check_weights(name_or_path), revision=revision, torch_dtype=dtype)
        folder = Path(registry.locate(model.config.autoencoder))
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
        return cls(
            model.to(device), vae.to(device), ClipText.from_pretrained(registry.locate(model.config.clip), device)
        )

    def fingerprint(self) -> str:
        """Digest of the weights, by which a run notices another generator."""
        settings = {"clip": self.clip_text.fingerprint()}
        return fingerprint("LafiteGenerator", modules=[self.model, self.vae], settings=settings)

    def check_caption(self, caption: str) -> None:
        """As `Generator.check_caption`."""
        tokenizer = self.clip_text.tokenizer
        if hasattr(tokenizer, "tokenizer"):  # open_clip wraps one of transformers
            check_caption(caption, lambda text: len(tokenizer.tokenizer(text).input_ids), tokenizer.context_length)
        else:  # or has its own, which leaves out both ends
            check_caption(caption, lambda text: len(tokenizer.encode(text)) + 2, tokenizer.context_length)

    @torch.no_grad()
    def render(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        steps: int = 1,
        guidance_scale: float = 1.0,
        batch_size: int = 16,
        progress: Callable[[int], object] | None = None,
    ) -> list[Image]:
        """One image for each (caption, seed); arguments, result and errors as of `Generator.render`."""

        def draw(batch: list[tuple[str, int]]) -> list[Image]:
            features = self.clip_text.embed([caption for caption, _ in batch]).to(self.model.device, self.model.dtype)
            features = self.model.whiten(F.normalize(features, dim=-1))
            size = self.model.config.noise_size
            noise = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for _, seed in batch]
            latents = self.model(torch.stack(noise).to(features), features)
            pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            return self.processor.postprocess(pixels.float())

        return render_distinct(list(captions), seeds, draw, batch_size, progress)
