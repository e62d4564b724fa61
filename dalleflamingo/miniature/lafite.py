"""Trains the miniature's GAN generator on the latents that Stable Diffusion is trained on.

Half of the features it is conditioned on are CLIP's of the picture, disturbed (LAFITE's pseudo-text, Zhou et al. 2022,
§3.1), half are CLIP's of a caption. The discriminator sees a picture's latents and has two answers: is it real and does
it belong to the feature (Miyato & Koyama 2018), and which of the batch's features does it show (LAFITE's contrastive
loss, Eq. 7, on real and drawn pictures).

LAFITE's losses alone taught our small generator grounds and blots of colour in 2,400 steps, no shape. So what is drawn
from a picture's own feature has to be near that picture, too, as in Isola et al. 2017.
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

DISTURBANCE = 0.3  # length of the noise on a picture's feature of length 1
TEMPERATURE = 0.1  # of the contrastive loss
NEAR_WEIGHT = 10.0  # of the squared distance between a picture and what is drawn from its feature
PENALTY_EVERY, PENALTY = 4, 10.0  # R1 (Mescheder et al. 2018), at every fourth step


class Discriminator(nn.Module):
    """(B, 4, 16, 16) latents -> a feature (B, D) and a score (B,), which grows with what is real."""

    def __init__(self, feature_size: int, widths: tuple[int, int, int] = (64, 128, 192)):
        super().__init__()
        layers, before = [], 4
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.LeakyReLU(0.2)]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2)]
            before = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * before, 256), nn.LeakyReLU(0.2))
        self.shows, self.real = nn.Linear(256, feature_size), nn.Linear(256, 1)
        self.belongs = nn.Linear(feature_size, 256)

    def forward(self, latents: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.body(latents)
        return self.shows(seen), self.real(seen).squeeze(1) + (seen * self.belongs(features)).sum(1) / 16


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
    """Non-saturating logistic loss with R1, the contrastive loss, the distance; both networks step together.

    Args:
        vae: Stable Diffusion's. clip: frozen; its tokenizer reads captions.
        bank, features: files that keep what is computed once of every picture.
    """

    name = "lafite"
    steps, batch_size, learning_rate = 12_000, 32, 5e-4
    weight_decay, warmup, average, betas = 0.0, 100, 0.998, (0.0, 0.99)

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

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`latents` (B, 4, 16, 16), scaled; `features` (B, D) and `input_ids` (B, T) of them; `by_text` (B,)."""
        index = rng.integers(len(self.latents), size=self.batch_size)
        captions = [web_caption(web_scene(i), rng, unconditional_share=0.0) for i in index]
        return {
            "latents": self.latents[index].float() * self.scale,
            "features": self.features[index].float(),
            "input_ids": self._tokenize(captions),
            "by_text": torch.from_numpy(rng.random(self.batch_size) < 0.5),
        }

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
        real, by_text = batch["latents"].to(device), batch["by_text"].to(device)
        with torch.no_grad():
            texts = F.normalize(encode_text(self.clip.to(device), batch["input_ids"].to(device)), dim=-1)
        features = torch.where(by_text[:, None], texts, batch["features"].to(device))
        features = self.generator.own(features, by_text)
        features = torch.where(by_text[:, None], features, disturbed(features))
        drawn = self.generator(torch.randn(len(real), self.generator.config.noise_size, device=device), features)

        self.discriminator.requires_grad_(False)  # this loss teaches the generator only
        shown, score = self.discriminator(drawn, features)
        fool = F.softplus(-score).mean()
        show = contrast(shown, features)
        near = NEAR_WEIGHT * ((drawn - real).square().mean((1, 2, 3)) * ~by_text).mean()
        self.discriminator.requires_grad_(True)

        penalised = step % PENALTY_EVERY == 0
        real = real.requires_grad_(penalised)
        shown_real, score_real = self.discriminator(real, features)
        _, score_drawn = self.discriminator(drawn.detach(), features)
        tell = F.softplus(-score_real).mean() + F.softplus(score_drawn).mean()
        know = contrast(shown_real, features)
        calm = steepness(score_real, real) * PENALTY * PENALTY_EVERY / 2 if penalised else torch.zeros(())
        losses = {"fool": fool, "show": show, "near": near, "tell": tell, "know": know, "calm": calm}
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
    """(B, D) features of length 1, each moved by noise of length `DISTURBANCE` and brought back to length 1."""
    noise = F.normalize(torch.randn_like(features), dim=-1)
    return F.normalize(features + DISTURBANCE * noise, dim=-1)


def contrast(shown: Tensor, features: Tensor) -> Tensor:
    """Cross-entropy of telling, for each of B pictures, which of the batch's B features is its own."""
    logits = F.normalize(shown, dim=-1) @ features.T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(features), device=features.device))
