"""Trains the miniature's GAN generator on the latents that Stable Diffusion is trained on.

No caption is needed: the features it is conditioned on are CLIP's of the picture itself, disturbed (LAFITE's
pseudo-text, Zhou et al. 2022, §3.1), and a caption's take their place when it draws. The discriminator sees a picture's
latents and a feature, and scores how real the picture is and how well it belongs to the feature (Miyato & Koyama 2018);
which of a batch's features a real picture belongs to, it learns as LAFITE's does (Eq. 7).

StyleGAN's loss, R1 and modulated weights, as LAFITE has them, taught a generator this small grounds and blots; a score
that judges a drawn picture against the real one and is kept flat around both (Huang et al. 2024, "The GAN is dead; long
live the GAN!") taught it outlines, one for each ground. So it learns alone, at first, to come near the picture that the
feature is of (Isola et al. 2017), and comes to know what stands where in which colour. Captions' features beside the
pictures' in training were a trap: where things stand they seldom say, and all collapsed to one shape a ground. It has
not been trained long enough to draw kinds, and is not shipped.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import trange
from transformers import CLIPTokenizer

from dalleflamingo.lafite import Lafite
from dalleflamingo.miniature.clip import encode_text, pixels
from dalleflamingo.miniature.sd import BANK, latent_bank, latent_scale, web_caption, web_scene
from dalleflamingo.miniature.world import draw

DISTURBANCE = 0.8  # greatest length of the noise on a picture's feature of length 1; a caption's lies as far
ALONE = 12_000  # steps in which the generator learns without the discriminator
NEAR_WEIGHT = 30.0  # of the squared distance between a picture and what is drawn from its feature
KNOW_WEIGHT = 0.5  # of telling which feature a picture belongs to
CALM_EVERY, CALM_WEIGHT = 8, 0.25  # R1 and R2, the squared slopes of the score, at every eighth step eight times


class Discriminator(nn.Module):
    """(B, 4, 16, 16) latents, (B, D) features -> (B, B): how real a picture is, and each feature its own."""

    def __init__(self, feature_size: int, widths: tuple[int, int] = (128, 192)):
        super().__init__()
        self.fold = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(16, widths[0], 3, padding=1))
        self.high, self.low = PlainBlock(widths[0], widths[0]), PlainBlock(*widths)
        self.read = nn.Linear(widths[1] * 4 * 4, 256)
        self.real, self.belongs = nn.Linear(256, 1), nn.Linear(feature_size, 256)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        x = self.low(F.avg_pool2d(self.high(self.fold(latents)), 2))
        seen = _leaky(self.read(_leaky(x).flatten(1)))
        return self.real(seen) + seen @ self.belongs(features).T / 16


class PlainBlock(nn.Module):
    """Two convolutions beside a shortcut, without a norm, which would mix a batch's scores."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + 0.5 * self.second(_leaky(self.first(_leaky(x))))


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def picture_features(clip: open_clip.CLIP, file: Path, count: int = BANK) -> Tensor:
    """(count, D) CLIP's features of `web_scene(0 … count − 1)`, length 1; computed if `file` is missing."""
    if not file.exists():
        parts = []
        for first in trange(0, count, 100, desc="CLIP features", mininterval=10):
            pictures = np.stack([draw(web_scene(i)) for i in range(first, first + 100)])
            with torch.no_grad():
                parts.append(clip.encode_image(pixels(pictures), normalize=True))
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": torch.cat(parts).half().contiguous()}, file)
    return load_file(file)["features"]


class LafiteRecipe:
    """Distance, then a relativistic logistic loss with both slopes beside it; both networks step together.

    Args:
        vae: Stable Diffusion's. clip: frozen; its tokenizer reads captions.
        bank, features: files that keep what is computed once of every picture.
    """

    name = "lafite"
    steps, batch_size, learning_rate, slower = 20_000, 64, 1e-3, 0.3
    weight_decay, warmup, average, betas, max_grad_norm = 0.0, 100, 0.998, (0.0, 0.99), 100.0

    def __init__(self, vae: AutoencoderKL, clip: open_clip.CLIP, tokenizer: CLIPTokenizer, bank: Path, features: Path):
        self.latents = latent_bank(vae, bank)
        self.scale = latent_scale(self.latents)
        self.clip, self.tokenizer = clip.eval().requires_grad_(False), tokenizer
        self.features = picture_features(clip, features)
        size = self.features.shape[1]
        self.generator, self.discriminator = Lafite(feature_size=size), Discriminator(size)
        self.generator.common.copy_(torch.stack([self.features.float().mean(0), self._texts().mean(0)]))
        self.modules = {"generator": self.generator, "discriminator": self.discriminator}
        self.compilable: list[nn.Module] = []

    def parameters(self) -> Iterable[nn.Parameter]:
        yield from self.generator.parameters()
        yield from self.discriminator.parameters()

    def paces(self) -> list[dict]:
        """The discriminator learns more slowly, or it always wins."""
        return [
            {"params": list(self.generator.parameters()), "pace": 1.0},
            {"params": list(self.discriminator.parameters()), "pace": self.slower},
        ]

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`latents` (B, 4, 16, 16), scaled, and `features` (B, D) of the pictures."""
        index = rng.integers(len(self.latents), size=self.batch_size)
        return {"latents": self.latents[index].float() * self.scale, "features": self.features[index].float()}

    @torch.no_grad()
    def _texts(self, count: int = 2000) -> Tensor:
        """(count, D) features of captions, length 1."""
        rng = np.random.default_rng(0)
        captions = [web_caption(web_scene(i), rng, unconditional_share=0.0) for i in range(count)]
        parts = (self._tokenize(captions[i : i + 100]) for i in range(0, count, 100))
        return torch.cat([F.normalize(encode_text(self.clip, ids), dim=-1) for ids in parts])

    def _tokenize(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions, padding="longest", truncation=True, return_tensors="pt").input_ids

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        device = self.generator.device
        real = batch["latents"].to(device)
        features = disturbed(self.generator.own(batch["features"].to(device), of_text=False))
        drawn = self.generator(torch.randn(len(real), self.generator.config.noise_size, device=device), features)
        far = (drawn - real).square().mean((1, 2, 3))
        if step < ALONE:
            return {"loss": NEAR_WEIGHT * far.mean(), "near": NEAR_WEIGHT * far.mean()}

        calming = step % CALM_EVERY == 0
        judged = [latents.detach().requires_grad_(calming) for latents in (real, drawn)]
        of_real, of_drawn = (self.discriminator(latents, features) for latents in judged)
        score_real, score_drawn = of_real.diagonal(), of_drawn.diagonal()
        tell = F.softplus(score_drawn - score_real).mean()
        know = KNOW_WEIGHT * F.cross_entropy(of_real, torch.arange(len(real), device=device))
        calm = torch.zeros(())
        if calming:
            calm = CALM_EVERY * CALM_WEIGHT * sum(map(steepness, (score_real, score_drawn), judged))

        self.discriminator.requires_grad_(False)  # from here on the generator is taught
        score = self.discriminator(drawn, features).diagonal()
        self.discriminator.requires_grad_(True)
        fool = F.softplus(score_real.detach() - score).mean()
        near = NEAR_WEIGHT * far.mean()
        losses = {"fool": fool, "near": near, "tell": tell, "know": know, "calm": calm}
        return {"loss": sum(losses.values())} | losses

    def after_step(self, step: int) -> None:
        pass

    def restore(self, folder: Path) -> None:
        self.generator.load_state_dict(Lafite.from_pretrained(folder).state_dict())

    def export(self, folder: Path) -> None:
        """A folder for `Lafite`: tensors in float16, loaded in float32."""
        model = Lafite.from_config(self.generator.config)
        model.load_state_dict(self.generator.state_dict())
        model.half().save_pretrained(folder)


def steepness(score: Tensor, latents: Tensor) -> Tensor:
    """Mean squared length of a score's (B,) gradient by the latents (B, …) that it judges; can be minimised."""
    [slope] = torch.autograd.grad(score.sum(), latents, create_graph=True)
    return slope.flatten(1).square().sum(1).mean()


def disturbed(features: Tensor) -> Tensor:
    """(B, D) features of length 1, moved by noise of any length to `DISTURBANCE` and brought back to length 1."""
    noise = F.normalize(torch.randn_like(features), dim=-1)
    length = DISTURBANCE * torch.rand(len(features), 1, device=features.device)
    return F.normalize(features + length * noise, dim=-1)
