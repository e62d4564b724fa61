"""SD's autoencoder in small, 64 × 64 × 3 pictures to 16 × 16 × 4 latents, as `diffusers.AutoencoderKL`."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dalleflamingo.miniature.world import draw, sample_scene


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32 in [-1, 1]; the permuted view is channels last already."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def make_vae() -> AutoencoderKL:
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


class VaeRecipe:
    """L1 on pixels and on their differences (edges tell the kind), and a light KL to keep latents near N(0, 1)."""

    name, steps, batch_size = "vae", 6000, 16
    learning_rate, weight_decay, warmup, average = 2e-3, 0.0, 200, 0.998

    def __init__(self):
        self.vae = make_vae().to(memory_format=torch.channels_last)
        self.modules = {"vae": self.vae}
        self.compilable = [self.vae.encoder, self.vae.decoder]

    def parameters(self):
        return self.vae.parameters()

    def batch(self, rng: np.random.Generator, step: int) -> dict:
        return {
            "pixels": to_pixels(np.stack([draw(sample_scene(rng)) for _ in range(self.batch_size)])).to(self.vae.device)
        }

    def loss(self, batch: dict, step: int) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        posterior = self.vae.encode(pixels).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        error = decoded - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()  # per latent number
        squared = error.square().mean()
        return {
            "loss": error.abs().mean() + 0.5 * edges + 1e-3 * kl + squared,
            "psnr": 10 * torch.log10(4 / squared.detach()),
            "kl": kl.detach(),
        }

    def after_step(self, step: int) -> None:
        pass

    def restore(self, folder: Path) -> None:
        self.vae.load_state_dict(AutoencoderKL.from_pretrained(folder).state_dict())
