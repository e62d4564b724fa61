"""Trains the miniature's GAN generator on the latents that Stable Diffusion is trained on.

LAFITE (Zhou et al. 2022) is taught with CLIP's features of pictures alone, disturbed a little, and is given a caption's
when it draws. Our captions' features lie further from the pictures', and are silent on most of what these tell: taught
so, this small generator drew blots, and taught with captions' features, one shape for each ground. So it is taught with
captions' features, and all that a caption leaves open is noise, which an encoder, thrown away later, reads from the
picture's feature in training: a variational autoencoder and a GAN in one (Larsen et al. 2016; Zhu et al. 2017).

At first autoencoder alone: near the picture, and the noise near the normal distribution that is drawn from later. Then
a discriminator judges what is drawn from such noise, against the real picture (Huang et al. 2024), and learns, as
LAFITE's does (Eq. 7), which of a batch's captions a picture belongs to.

It draws single things, and of two things little more than places and colours (docs/miniature.md).
"""

from collections.abc import Callable, Iterable
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
from dalleflamingo.miniature.training.clip import encode_text, pixels
from dalleflamingo.miniature.training.sd import BANK, latent_bank, latent_scale, web_caption, web_scene
from dalleflamingo.miniature.world import draw

TELLINGS = 3  # captions of every picture
ALONE = 13_000  # steps before the discriminator
NEAR_WEIGHT = 30.0  # of the squared distance between a picture and what is drawn of it
CODE_WEIGHT = 0.08  # of the divergence of the noise that is read from what is drawn, in nats; reached at `ALONE`
KNOW_WEIGHT = 0.5  # of telling which caption a picture belongs to
CALM_EVERY, CALM_WEIGHT = 8, 0.25  # R1 and R2, the squared slopes of the score, at every eighth step eight times
FLOOR = 1e-3  # of the greatest variance: directions of less are not blown up further when features are whitened


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


class Encoder(nn.Module):
    """(B, D) features of pictures and of their captions, whitened -> (B, N) mean and log-variance of the noise."""

    def __init__(self, feature_size: int, noise_size: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 * feature_size, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 2 * noise_size)
        )

    def forward(self, pictures: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.net(torch.cat([pictures, captions], dim=-1)).chunk(2, dim=-1)
        return mean, log_variance.clamp(-6, 2)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence from normal noise, in nats, mean over the batch (Kingma & Welling 2014, App. B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (D,) and symmetric matrix (D, D) for `(features − centre) @ matrix`, which has about unit covariance.

    CLIP's features differ most by ground and colour. What tells a kind from another has a tenth of their spread; of
    features as they are, no generator of this size had learned a kind.
    """
    centre = features.mean(0)
    variances, axes = torch.linalg.eigh((features - centre).T @ (features - centre) / len(features))
    return centre, axes @ torch.diag((variances + FLOOR * variances.max()).rsqrt()) @ axes.T


def feature_bank(encode: Callable[[list[int]], Tensor], file: Path, count: int = BANK) -> Tensor:
    """(count, …) features of `web_scene(0 … count − 1)`, a hundred encoded at once; computed if `file` is missing."""
    if not file.exists():
        parts = (encode(list(range(i, i + 100))) for i in trange(0, count, 100, desc=file.stem, mininterval=10))
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": torch.cat(list(parts)).half().contiguous()}, file)
    return load_file(file)["features"]


@torch.no_grad()
def picture_features(clip: open_clip.CLIP, indices: list[int]) -> Tensor:
    """(B, D) CLIP's features, length 1, of the pictures of these scenes."""
    return clip.encode_image(pixels(np.stack([draw(web_scene(i)) for i in indices])), normalize=True)


@torch.no_grad()
def caption_features(clip: open_clip.CLIP, tokenizer: CLIPTokenizer, indices: list[int]) -> Tensor:
    """(B, TELLINGS, D) CLIP's features, length 1, of captions of these scenes."""
    told = []
    for index in indices:
        rng = np.random.default_rng([index, 11])
        told += [web_caption(web_scene(index), rng, unconditional_share=0.0) for _ in range(TELLINGS)]
    ids = tokenizer(told, padding="longest", truncation=True, return_tensors="pt").input_ids
    return F.normalize(encode_text(clip, ids), dim=-1).view(len(indices), TELLINGS, -1)


class LafiteRecipe:
    """Autoencoder, then a relativistic logistic loss with both slopes beside it; all networks step together.

    Args:
        vae: Stable Diffusion's. clip: frozen; its tokenizer reads captions.
        bank, pictures, captions: files that keep what is computed once of every picture.
    """

    name = "lafite"
    steps, batch_size, learning_rate = 20_000, 64, 1e-3
    weight_decay, warmup, average, betas, max_grad_norm = 0.0, 100, 0.998, (0.0, 0.99), 100.0

    def __init__(
        self,
        vae: AutoencoderKL,
        clip: open_clip.CLIP,
        tokenizer: CLIPTokenizer,
        bank: Path,
        pictures: Path,
        captions: Path,
    ):
        clip = clip.eval().requires_grad_(False)
        self.latents = latent_bank(vae, bank)
        self.scale = latent_scale(self.latents)
        of_pictures = feature_bank(lambda indices: picture_features(clip, indices), pictures).float()
        self.captions = feature_bank(lambda indices: caption_features(clip, tokenizer, indices), captions)
        centre, matrix = whitening(of_pictures)
        self.pictures = ((of_pictures - centre) @ matrix).half()
        size = of_pictures.shape[1]
        self.generator, self.discriminator = Lafite(feature_size=size), Discriminator(size)
        self.encoder = Encoder(size, self.generator.config.noise_size)
        self.generator.centre, self.generator.matrix = whitening(self.captions.flatten(0, 1).float())
        networks = (self.generator, self.discriminator, self.encoder)
        self.modules = dict(zip(("generator", "discriminator", "encoder"), networks, strict=True))
        self.compilable: list[nn.Module] = []

    def parameters(self) -> Iterable[nn.Parameter]:
        for module in self.modules.values():
            yield from module.parameters()

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`latents` (B, 4, 16, 16), scaled, of pictures; CLIP's features (B, D): `pictures`, whitened, `captions`."""
        index = rng.integers(len(self.latents), size=self.batch_size)
        telling = rng.integers(TELLINGS, size=self.batch_size)
        return {
            "latents": self.latents[index].float() * self.scale,
            "pictures": self.pictures[index].float(),
            "captions": self.captions[index, telling].float(),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        device = self.generator.device
        real, pictures, captions = (batch[name].to(device) for name in ("latents", "pictures", "captions"))
        told = self.generator.whitened(captions)
        mean, log_variance = self.encoder(pictures, told)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        near = NEAR_WEIGHT * (self.generator(code, told) - real).square().mean()
        normal = min(1.0, step / ALONE) * CODE_WEIGHT * divergence(mean, log_variance)
        losses = {"near": near, "code": normal}
        if step >= ALONE:
            drawn = self.generator(torch.randn_like(code), told)
            losses |= self._judged(real, drawn, told, calming=step % CALM_EVERY == 0)
        return {"loss": sum(losses.values())} | losses

    def _judged(self, real: Tensor, drawn: Tensor, told: Tensor, calming: bool) -> dict[str, Tensor]:
        judged = [latents.detach().requires_grad_(calming) for latents in (real, drawn)]
        of_real, of_drawn = (self.discriminator(latents, told) for latents in judged)
        score_real, score_drawn = of_real.diagonal(), of_drawn.diagonal()
        tell = F.softplus(score_drawn - score_real).mean()
        know = KNOW_WEIGHT * F.cross_entropy(of_real, torch.arange(len(real), device=real.device))
        calm = torch.zeros((), device=real.device)
        if calming:
            calm = CALM_EVERY * CALM_WEIGHT * sum(map(steepness, (score_real, score_drawn), judged))

        self.discriminator.requires_grad_(False)  # from here on the generator is taught
        score = self.discriminator(drawn, told).diagonal()
        self.discriminator.requires_grad_(True)
        return {"fool": F.softplus(score_real.detach() - score).mean(), "tell": tell, "know": know, "calm": calm}

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
