"""Stand-ins for captioner, generator and similarity: instant, and functions of picture, caption and seed alone."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from dalleflamingo import datasets, reconstruct
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.runs import derive_seed
from dalleflamingo.similarity import Encoder

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (250, 250, 250)}
SETTINGS = JourneySettings(candidates=3, steps=2, guidance_scale=4.0, seed=5, batch_size=4)


class Captioner:
    """Names some colour, by corner and seed. Logs each image that it is shown by the red of its corner."""

    def __init__(self, log: Path | None = None, delay: float = 0, temper: str = "even"):
        self.temper = temper
        self._hidden = (log, delay)
        self.batches: list[list[tuple[int, ...]]] = []

    def fingerprint(self):
        return f"Captioner {self.temper}"

    def sample(self, images, seeds, strategy, min_words=5, max_words=30):
        log, delay = self._hidden
        corners = [image.getpixel((0, 0)) for image in images]
        self.batches.append(corners)
        if log:
            with log.open("a") as file:
                file.writelines(f"{corner[0]}\n" for corner in corners)
        time.sleep(delay * len(images))
        return [[self._caption(corner, seed) for seed in row] for corner, row in zip(corners, seeds, strict=True)]

    def describe(self, images):
        return [f"a thing of {image.getpixel((3, 3))[0]} and {image.getpixel((5, 5))[0]}" for image in images]

    def _caption(self, corner, seed):
        digest = derive_seed("caption", str(corner), seed)
        return f"a {list(COLOURS)[digest % 4]} thing {digest % 1000}"


class Generator:
    """Draws the colour that the caption names, with noise from the seed. Logs the number at the end of each caption."""

    def __init__(self, delay: float = 0, on_draw: Callable[[], object] = lambda: None, log: Path | None = None):
        self._hidden = (delay, on_draw, log)
        self.calls = []

    def fingerprint(self):
        return "Generator"

    def check_caption(self, caption):
        if not caption.isprintable():
            raise ValueError("it is not printable: write it again")

    pipeline = SimpleNamespace(scheduler=DPMSolverMultistepScheduler())  # needs 10 steps

    def render(self, captions, seeds, steps=50, guidance_scale=7.5, batch_size=16, progress=None):
        self.calls.append(dict(captions=captions, seeds=seeds, steps=steps, guidance=guidance_scale, batch=batch_size))
        return [self._draw(caption, seed, progress) for caption, seed in zip(captions, seeds, strict=True)]

    def _draw(self, caption, seed, progress):
        delay, on_draw, log = self._hidden
        if log:
            with log.open("a") as file:
                file.write(f"{caption.split()[-1]}\n")
        time.sleep(delay)
        on_draw()
        progress(1)
        noise = np.random.default_rng(seed).integers(-20, 20, (16, 16, 3))
        colour = COLOURS.get(" ".join(caption.split()[1:2]), (90, 90, 90))
        return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


class MeanColour(Encoder):
    name = "colour"

    def __init__(self):
        self.embedded = []

    def fingerprint(self):
        return self.name

    def embed(self, images):
        self.embedded.append(len(images))
        return torch.tensor(np.array([np.asarray(image).mean((0, 1)) - 128 for image in images]), dtype=torch.float32)


class Corner(MeanColour):
    name = "corner"

    def embed(self, images):
        return torch.tensor(np.array([image.getpixel((0, 0)) for image in images]), dtype=torch.float32)


def common_letters(source: str, other: str) -> int:
    return len(set(source) & set(other))


def dataset(folder: Path, n: int = 10) -> datasets.Dataset:
    """n pictures; the red of a picture's corner is its image id."""
    folder.mkdir(exist_ok=True)
    examples = []
    for i in range(n):
        image_id, path = 200 - 3 * i, folder / f"{i}.png"
        array = np.full((16, 16, 3), list(COLOURS.values())[i % 4], np.uint8)
        array[0, 0] = (image_id, 7, 7)
        if not path.exists():
            Image.fromarray(array).save(path)
        domain = [None, "in-domain", "out-domain"][i % 3]
        examples.append(datasets.Example(image_id, path, (f"a thing {image_id}",), domain))
    return datasets.Dataset("coloured things", tuple(examples))


def image_text_image(data, captioner, generator, similarities, run_folder, chunk=3, **changes):
    """The journey with `SETTINGS` but for some changes."""
    how = {name: changes.pop(name) for name in ("strategy", "shared_noise") if name in changes}
    settings = dataclasses.replace(SETTINGS, **changes)
    return reconstruct.image_text_image(
        data, captioner, generator, similarities, run_folder, settings, chunk=chunk, **how
    )


def run(run_folder: Path, pictures: Path, log=None, delay=0.0, n=10, on_draw=lambda: None, **changes):
    """The whole way with fakes."""
    models = Captioner(log, delay), Generator(delay, on_draw), [MeanColour(), Corner()]
    return image_text_image(dataset(pictures, n), *models, run_folder, **changes)


def run_texts(run_folder: Path, pictures: Path, log=None, delay=0.0, n=10, on_draw=lambda: None, data=None):
    """The other way round; logs the image id of each caption that is drawn."""
    models = Captioner(), Generator(delay, on_draw, log), [PairSimilarity("letters", common_letters)]
    return reconstruct.text_image_text(data or dataset(pictures, n), *models, run_folder, SETTINGS, chunk=3)


def logits_with(log_likelihoods: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Captioner.token_logits` returns for captions of one token, (B, 1, 2) and (B, 1), with these log p ≤ 0."""
    other = torch.log(torch.expm1(-log_likelihoods))  # of two tokens: log p = −log(1 + exp(other))
    logits = torch.stack([torch.zeros_like(other), other], dim=-1)
    return logits[:, None], torch.zeros(len(other), 1, dtype=torch.long)
