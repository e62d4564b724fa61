"""Training of the miniature's GAN generator, on the latents on which Stable Diffusion is trained.

LAFITE (Zhou et al. 2022) is trained with CLIP's image features, slightly perturbed, and generates from a caption's
feature. Our captions' features are further from the images' and leave out most of what these contain: trained that way,
this small generator drew blots. Trained with the captions' features alone, it drew one shape for each ground. So it is
trained with captions' features, and everything that a caption leaves open is noise. In training, an encoder that is
thrown away later infers this noise from the image's feature: a variational autoencoder and a GAN in one (Larsen et
al. 2016; Zhu et al. 2017).

The autoencoder is trained alone at first: a reconstruction loss, and a KL divergence that keeps the inferred noise near
the normal distribution from which it is drawn later. From `DISCRIMINATOR_START` on, a discriminator compares images
generated from normal noise with real ones (relativistic loss with R1 and R2 penalties, Huang et al. 2024) and, as
LAFITE's, learns which caption of the batch belongs to an image (Eq. 7).

The result draws single things, but of two things little more than positions and colours (docs/miniature.md).
"""

from collections.abc import Callable
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

from dalleflamingo.miniature.lafite import Lafite
from dalleflamingo.miniature.training.base import Recipe
from dalleflamingo.miniature.training.clip import clip_pixels, encode_text
from dalleflamingo.miniature.training.sd import BANK_SIZE, latent_bank, latent_scale, web_caption, web_scene
from dalleflamingo.miniature.world import draw
from dalleflamingo.runs import write_whole

CAPTIONS = 3  # of each image
DISCRIMINATOR_START = 13_000  # step
RECONSTRUCTION_WEIGHT = 30.0  # of the mean squared error of the latents
KL_WEIGHT = 0.08  # of the KL divergence in nats; it rises linearly until `DISCRIMINATOR_START`
CONTRASTIVE_WEIGHT = 0.5  # of the cross-entropy of an image's own caption among those of the batch
PENALTY_INTERVAL, PENALTY_WEIGHT = 8, 0.25  # of R1 and R2; each counts `PENALTY_INTERVAL` times in its step
VARIANCE_FLOOR = 1e-3  # share of the largest variance that is added to all when features are whitened


class Discriminator(nn.Module):
    """(B, 4, 16, 16) latents, (B, D) features -> (B, B) scores of each image (down) with each caption (across).

    The diagonal has the scores of the pairs, and differences in a row tell which caption belongs to the image.
    """

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
    """Two convolutions and a shortcut, without normalisation, so that an image's score does not depend on its batch."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + 0.5 * self.second(_leaky(self.first(_leaky(x))))


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class Encoder(nn.Module):
    """(B, D) whitened features of images and of their captions -> (B, N) mean and log-variance of the noise."""

    def __init__(self, feature_size: int, noise_size: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * feature_size, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 2 * noise_size)
        )

    def forward(self, image_features: Tensor, caption_features: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.net(torch.cat([image_features, caption_features], dim=-1)).chunk(2, dim=-1)
        return mean, log_variance.clamp(-6, 2)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(0, 1) in nats, mean over the batch (Kingma & Welling 2014, App. B).

    Args:
        mean: (B, N).
        log_variance: (B, N).
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (D,) and symmetric matrix (D, D) such that `(features − centre) @ matrix` has about unit covariance.

    CLIP's features vary most with ground and colour, ten times as much as with kind. From features that were not
    whitened, no generator of this size learned a kind.

    Args:
        features: (N, D).
    """
    centre = features.mean(0)
    variances, axes = torch.linalg.eigh((features - centre).T @ (features - centre) / len(features))
    return centre, axes @ torch.diag((variances + VARIANCE_FLOOR * variances.max()).rsqrt()) @ axes.T


def feature_bank(encode: Callable[[list[int]], Tensor], file: Path, count: int = BANK_SIZE) -> Tensor:
    """(count, …) features of `web_scene(0 … count − 1)`; computed if `file` is missing.

    Args:
        encode: (100 indices of scenes) -> (100, …) features.
        file: that keeps them, in float16.
        count: number of scenes, a multiple of 100.
    """
    if not file.exists():
        parts = (encode(list(range(i, i + 100))) for i in trange(0, count, 100, desc=file.stem, mininterval=10))
        file.parent.mkdir(parents=True, exist_ok=True)
        features = torch.cat(list(parts)).half().contiguous()
        write_whole(file, lambda path: save_file({"features": features}, path))
    return load_file(file)["features"]


@torch.no_grad()
def image_features(clip: open_clip.CLIP, indices: list[int]) -> Tensor:
    """(B, D) features of length 1 of the images of these scenes."""
    return clip.encode_image(clip_pixels(np.stack([draw(web_scene(i)) for i in indices])), normalize=True)


@torch.no_grad()
def caption_features(clip: open_clip.CLIP, tokenizer: CLIPTokenizer, indices: list[int]) -> Tensor:
    """(B, CAPTIONS, D) features of length 1 of captions of these scenes."""
    captions = []
    for index in indices:
        rng = np.random.default_rng([index, 11])
        captions += [web_caption(web_scene(index), rng, unconditional_share=0.0) for _ in range(CAPTIONS)]
    ids = tokenizer(captions, padding="longest", truncation=True, return_tensors="pt").input_ids
    return F.normalize(encode_text(clip, ids), dim=-1).view(len(indices), CAPTIONS, -1)


class LafiteRecipe(Recipe):
    """Variational autoencoder, then also a relativistic GAN with R1 and R2; all networks take each step together.

    Args:
        vae: Stable Diffusion's.
        clip: frozen.
        tokenizer: of `clip`.
        bank: file of the latents; see `latent_bank`.
        image_bank, caption_bank: files of CLIP's features; see `feature_bank`.
    """

    name = "lafite"
    steps, batch_size, learning_rate = 20_000, 64, 1e-3
    betas, max_grad_norm = (0.0, 0.99), 100.0

    def __init__(
        self,
        vae: AutoencoderKL,
        clip: open_clip.CLIP,
        tokenizer: CLIPTokenizer,
        bank: Path,
        image_bank: Path,
        caption_bank: Path,
    ):
        clip = clip.eval().requires_grad_(False)
        self.latents = latent_bank(vae, bank)
        self.scale = latent_scale(self.latents)
        of_images = feature_bank(lambda indices: image_features(clip, indices), image_bank).float()
        self.caption_features = feature_bank(lambda indices: caption_features(clip, tokenizer, indices), caption_bank)
        centre, matrix = whitening(of_images)
        self.image_features = ((of_images - centre) @ matrix).half()
        size = of_images.shape[1]
        self.generator, self.discriminator = Lafite(feature_size=size), Discriminator(size)
        self.encoder = Encoder(size, self.generator.config.noise_size)
        self.generator.centre, self.generator.matrix = whitening(self.caption_features.flatten(0, 1).float())
        self.modules = {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "encoder": self.encoder,
        }

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`latents` (B, 4, 16, 16), scaled; (B, D) CLIP's `image_features`, whitened, and `caption_features`."""
        index = rng.integers(len(self.latents), size=self.batch_size)
        caption = rng.integers(CAPTIONS, size=self.batch_size)
        return {
            "latents": self.latents[index].float() * self.scale,
            "image_features": self.image_features[index].float(),
            "caption_features": self.caption_features[index, caption].float(),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The parts of the loss and their sum ("loss"); before `DISCRIMINATOR_START` those of the autoencoder only."""
        device = self.generator.device
        names = ("latents", "image_features", "caption_features")
        real, of_images, of_captions = (batch[name].to(device) for name in names)
        condition = self.generator.whiten(of_captions)
        mean, log_variance = self.encoder(of_images, condition)
        noise = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        reconstruction = RECONSTRUCTION_WEIGHT * (self.generator(noise, condition) - real).square().mean()
        kl = min(1.0, step / DISCRIMINATOR_START) * KL_WEIGHT * kl_divergence(mean, log_variance)
        losses = {"reconstruction": reconstruction, "kl": kl}
        if step >= DISCRIMINATOR_START:
            generated = self.generator(torch.randn_like(noise), condition)
            is_penalised = step % PENALTY_INTERVAL == 0
            losses |= self.adversarial_losses(real, generated, condition, is_penalised)
        return {"loss": sum(losses.values())} | losses

    def adversarial_losses(
        self, real: Tensor, generated: Tensor, condition: Tensor, is_penalised: bool
    ) -> dict[str, Tensor]:
        """The generator's relativistic loss, and the discriminator's: relativistic, contrastive, gradient penalty.

        Args:
            real: (B, 4, 16, 16) latents.
            generated: likewise.
            condition: (B, D) whitened features of the captions.
            is_penalised: whether R1 and R2 are computed in this step; otherwise the penalty is 0.
        """
        fixed = [latents.detach().requires_grad_(is_penalised) for latents in (real, generated)]
        scores_of_real, scores_of_generated = (self.discriminator(latents, condition) for latents in fixed)
        real_score, generated_score = scores_of_real.diagonal(), scores_of_generated.diagonal()
        own = torch.arange(len(real), device=real.device)
        penalty = torch.zeros((), device=real.device)
        if is_penalised:
            penalties = map(gradient_penalty, (real_score, generated_score), fixed)
            penalty = PENALTY_INTERVAL * PENALTY_WEIGHT * sum(penalties)

        self.discriminator.requires_grad_(False)  # the generator's loss does not train the discriminator
        score = self.discriminator(generated, condition).diagonal()
        self.discriminator.requires_grad_(True)
        return {
            "generator": F.softplus(real_score.detach() - score).mean(),
            "discriminator": F.softplus(generated_score - real_score).mean(),
            "contrastive": CONTRASTIVE_WEIGHT * F.cross_entropy(scores_of_real, own),
            "gradient_penalty": penalty,
        }

    def restore(self, folder: Path) -> None:
        """Read the generator; discriminator and encoder, which are not shipped, begin anew."""
        self.generator.load_state_dict(Lafite.from_pretrained(folder).state_dict())

    def export(self, folder: Path) -> None:
        """Write a folder for `Lafite`: tensors in float16, loaded in float32."""
        model = Lafite.from_config(self.generator.config)
        model.load_state_dict(self.generator.state_dict())
        model.half().save_pretrained(folder)


def gradient_penalty(score: Tensor, latents: Tensor) -> Tensor:
    """Mean squared norm of the gradient of scores (B,) with respect to latents (B, …); differentiable."""
    [slope] = torch.autograd.grad(score.sum(), latents, create_graph=True)
    return slope.flatten(1).square().sum(1).mean()
