"""A second generator: captions to pictures in one step, a GAN conditioned on CLIP's features (Table 8).

LAFITE (Zhou et al. 2022) draws from CLIP's embedding of a caption, at once, without the caption's words. (The paper
calls it VAE-based; it is a StyleGAN.) Ours does so, too; it is small, and draws the latents of Stable Diffusion's
autoencoder instead of pixels; and its first 4 × 4 map is made of noise and feature, where StyleGAN has a constant, so
that things need not stand where they always stand. How it is taught is another story: `miniature/lafite.py`.
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
from dalleflamingo.generator import render_distinct
from dalleflamingo.registry import check_weights
from dalleflamingo.similarity import ClipText

STARTS = 32  # channels of the first map, at 4 × 4 places


class StyledBlock(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut; a style scales and shifts what goes into each, normalised before.

    The adaptive group normalisation of diffusion models (Dhariwal & Nichol 2021). With the modulated weights of
    StyleGAN2 in its place, three times as many steps left blots without a shape.
    """

    def __init__(self, width: int, style_size: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.styles = nn.ModuleList(nn.Linear(style_size, 2 * width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.convolutions[1].weight)  # the shortcut alone, at first

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
        feature_size: of CLIP's embeddings. noise_size, style_size: of what the mapping reads beside and writes.
        width: channels at 8 × 8 places, from which 16 × 16 latents are unfolded (Shi et al. 2016).
        latent_channels: of the autoencoder.
        clip, autoencoder: what it was trained with, names in the registry; the second's folder `vae` is meant.
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
        # of captions' features; `miniature.lafite.whitening` makes both
        self.register_buffer("centre", torch.zeros(feature_size))
        self.register_buffer("matrix", torch.eye(feature_size))
        read = feature_size + noise_size
        self.mapping = nn.Sequential(nn.Linear(read, 256), nn.SiLU(), nn.Linear(256, style_size), nn.SiLU())
        self.start = nn.Sequential(  # what stands where is no linear function of a feature
            nn.Linear(read, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, STARTS * 4 * 4)
        )
        self.widen = nn.Conv2d(STARTS, width, 3, padding=1)
        self.blocks = nn.ModuleList(StyledBlock(width, style_size) for _ in range(2))
        self.norm = nn.GroupNorm(8, width)
        self.to_latents = nn.Conv2d(width, 4 * latent_channels, 3, padding=1)

    def whitened(self, features: Tensor) -> Tensor:
        """(B, feature_size) features of captions, length 1, so that each direction counts as much as any other."""
        return F.normalize((features - self.centre) @ self.matrix, dim=-1) * features.shape[-1] ** 0.5

    def forward(self, noise: Tensor, features: Tensor) -> Tensor:
        """(B, noise_size), (B, feature_size) of `whitened` -> (B, 4, 16, 16), scaled as Stable Diffusion's latents."""
        read = torch.cat([noise, features], dim=-1)
        style = self.mapping(read)
        x = self.widen(F.interpolate(self.start(read).view(len(noise), -1, 4, 4), scale_factor=2, mode="nearest"))
        for block in self.blocks:
            x = block(x, style)
        return F.pixel_shuffle(self.to_latents(F.silu(self.norm(x))), 2)


class LafiteGenerator:
    """Draws as `Generator` does, at once: denoising steps and guidance mean nothing to it.

    Args:
        vae: of Stable Diffusion. clip_text: what captions are embedded by.
    """

    def __init__(self, model: Lafite, vae: AutoencoderKL, clip_text: ClipText):
        self.model, self.vae, self.clip_text = model.eval(), vae.eval(), clip_text
        self.processor = VaeImageProcessor()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: str = "cpu", dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> "LafiteGenerator":
        """From a folder; CLIP and the autoencoder from the registry, by the names that the folder's config has.

        Raises:
            RegistryError: weights are missing or cut short.
        """
        model = Lafite.from_pretrained(check_weights(name_or_path), revision=revision, dtype=dtype).to(device)
        folder = Path(registry.locate(model.config.autoencoder))
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=dtype).to(device)
        return cls(model, vae, ClipText.from_pretrained(registry.locate(model.config.clip), device))

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
        """One picture for each (caption, seed); arguments, result and errors as of `Generator.render`."""

        def draw(batch: list[tuple[str, int]]) -> list[Image]:
            features = self.clip_text.embed([caption for caption, _ in batch]).to(self.model.device, self.model.dtype)
            features = self.model.whitened(F.normalize(features, dim=-1))
            size = self.model.config.noise_size
            noise = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for _, seed in batch]
            latents = self.model(torch.stack(noise).to(features), features)
            pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            return self.processor.postprocess(pixels.float())

        return render_distinct(list(captions), seeds, draw, batch_size, progress)
