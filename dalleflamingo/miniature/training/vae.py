"""Stable Diffusion's autoencoder in small: 64 × 64 × 3 images to 16 × 16 × 4 latents, as `diffusers.AutoencoderKL`."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dalleflamingo.miniature.training.base import Recipe
from dalleflamingo.miniature.world import draw, sample_scene


def vae_pixels(images: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32 in [-1, 1]; the permuted view is channels last already."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def make_vae() -> AutoencoderKL:
    """The autoencoder with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


class VaeRecipe(Recipe):
    """L1 and L2 on pixels, L1 on their differences (edges show the kind), and a weak KL term towards N(0, 1)."""

    name, steps, batch_size = "vae", 6000, 16
    learning_rate, warmup = 2e-3, 200

    def __init__(self):
        self.vae = make_vae().to(memory_format=torch.channels_last)
        self.modules = {"vae": self.vae}
        self.compilable = (self.vae.encoder, self.vae.decoder)

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`pixels` (B, 3, 64, 64) in [-1, 1]."""
        return {"pixels": vae_pixels(np.stack([draw(sample_scene(rng)) for _ in range(self.batch_size)]))}

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Reconstruction and KL; also logged: PSNR in dB, KL in nats for each latent number."""
        pixels = batch["pixels"].to(self.vae.device)
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        error = decoded - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # for each latent number
        squared = error.square().mean()
        return {
            "loss": error.abs().mean() + 0.5 * edges + 1e-3 * kl + squared,
            "psnr": 10 * torch.log10(4 / squared.detach()),
            "kl": kl.detach(),
        }

    def restore(self, folder: Path) -> None:
        """Read an `AutoencoderKL` folder."""
        self.vae.load_state_dict(AutoencoderKL.from_pretrained(folder).state_dict())
