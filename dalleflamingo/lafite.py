"""A second generator: captions to pictures in one step, a GAN conditioned on CLIP's features (Table 8).

LAFITE (Zhou et al. 2022) learns to draw from CLIP's embedding of a picture, disturbed a little, and is then given that
of a text, because CLIP has brought the two close together. (The paper calls it VAE-based; it is a StyleGAN.) Ours is
of that kind, small, and draws the latents of Stable Diffusion's autoencoder instead of pixels; and its first 4 × 4 map
is made of the style, where StyleGAN has a constant, so that things need not stand where they always stand.
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
from dalleflamingo.generator import draw_once
from dalleflamingo.text_similarity import ClipText
from dalleflamingo.weights import check_weights


class StyledConv(nn.Module):
    """A 3 × 3 convolution whose inputs are scaled by a style and whose outputs are brought back to variance 1.

    StyleGAN2's modulation and demodulation (Karras et al. 2020, §2.2), with one weight for the whole batch.
    """

    def __init__(self, inputs: int, outputs: int, style_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.style = nn.Linear(style_size, inputs)
        nn.init.ones_(self.style.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, style_size) -> (B, outputs, H, W)."""
        scale = self.style(style)  # (B, inputs)
        norm = (self.weight.square().sum((2, 3)) @ scale.square().T + 1e-8).rsqrt().T  # (B, outputs)
        x = F.conv2d(x * scale[:, :, None, None], self.weight, padding=1) * norm[:, :, None, None]
        return F.leaky_relu(x + self.bias[:, None, None], 0.2) * 2**0.5


class Lafite(ModelMixin, ConfigMixin):
    """Noise and a CLIP feature to the latents of an autoencoder.

    Args:
        feature_size: of CLIP's embeddings. noise_size, style_size: of what the mapping reads beside and writes.
        widths: channels at 4, 8 and 16 latents a side.
        latent_channels: of the autoencoder.
        clip, autoencoder: what it was trained with, names in the registry; the second's folder `vae` is meant.
    """

    @register_to_config
    def __init__(
        self,
        feature_size: int = 128,
        noise_size: int = 64,
        style_size: int = 128,
        widths: Sequence[int] = (128, 128, 64),
        latent_channels: int = 4,
        clip: str = "miniature/clip",
        autoencoder: str = "miniature/sd",
    ):
        super().__init__()
        # what all pictures, or all captions, have in common: most of a feature's length, and the gap between the two
        self.register_buffer("common", torch.zeros(2, feature_size))  # of pictures, of captions
        self.mapping = nn.Sequential(
            nn.Linear(feature_size + noise_size, 2 * style_size), nn.LeakyReLU(0.2),
            nn.Linear(2 * style_size, 2 * style_size), nn.LeakyReLU(0.2),
            nn.Linear(2 * style_size, style_size), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.start = nn.Linear(style_size, widths[0] * 4 * 4)
        self.first, self.second, self.to_latents = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = widths[0]
        for width in widths:
            self.first.append(StyledConv(before, width, style_size))
            self.second.append(StyledConv(width, width, style_size))
            self.to_latents.append(nn.Conv2d(width, latent_channels, 1))
            before = width

    def own(self, features: Tensor, of_text: Tensor | bool) -> Tensor:
        """What (B, feature_size) features have for themselves, of length 1; (B,) `of_text` says of what they are."""
        common = self.common[torch.as_tensor(of_text, device=features.device).long()]
        return F.normalize(features - common, dim=-1)

    def forward(self, noise: Tensor, features: Tensor) -> Tensor:
        """(B, noise_size), (B, feature_size) of `own` -> (B, 4, 16, 16), scaled as Stable Diffusion's latents are."""
        features = F.normalize(features, dim=-1) * features.shape[-1] ** 0.5  # of the size of the noise
        style = self.mapping(torch.cat([noise, features], dim=-1))
        x, latents = self.start(style).view(len(noise), -1, 4, 4), None
        for level, (first, second, to_latents) in enumerate(zip(self.first, self.second, self.to_latents, strict=True)):
            if level:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
                latents = F.interpolate(latents, scale_factor=2, mode="bilinear", align_corners=False)
            x = second(first(x, style), style)
            latents = to_latents(x) + (0 if latents is None else latents)
        return latents


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
            features = self.model.own(F.normalize(features, dim=-1), of_text=True)
            size = self.model.config.noise_size
            noise = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for _, seed in batch]
            latents = self.model(torch.stack(noise).to(features), features)
            pixels = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            return self.processor.postprocess(pixels.float())

        return draw_once(list(captions), seeds, draw, batch_size, progress)
