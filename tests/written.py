"""Fakes that know everything: a generator that writes its caption into the image, similarities that read it there."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image

from dalleflamingo.miniature.annotators import ANNOTATORS, FACTS, plant_error, write_caption
from dalleflamingo.miniature.scene_graph import Scene, f1, wrong_facts
from dalleflamingo.miniature.world import draw
from dalleflamingo.runs import derive_seed


def write(text: str) -> Image.Image:
    """An image of 64 × 64 pixels that holds a text."""
    values = np.zeros(64 * 64 * 3, np.uint8)
    values[: len(text.encode())] = list(text.encode())
    return Image.fromarray(values.reshape(64, 64, 3))


def read(image: Image.Image) -> str:
    return bytes(np.asarray(image).ravel()).rstrip(b"\0").decode()


class Shown:
    """Which scene an image was drawn from."""

    def __init__(self, scenes: Iterable[Scene]):
        self.scenes = {draw(scene).tobytes(): scene for scene in scenes}

    def __getitem__(self, image: Image.Image) -> Scene:
        return self.scenes[np.asarray(image).tobytes()]


class Generator:
    """Logs what it renders; refuses all after `limit` calls."""

    def __init__(self, limit: float = np.inf):
        self.limit, self.rendered = limit, []

    def fingerprint(self):
        return "writes"

    def render(self, captions, seeds, steps=50, guidance_scale=7.5, batch_size=16, progress=None):
        if self.limit <= 0:
            raise KeyboardInterrupt
        self.limit -= 1
        self.rendered += zip(captions, seeds, strict=True)
        return [write(caption) for caption in captions]


class Captioner:
    """True captions and captions with one wrong fact, by random annotators."""

    def __init__(self, shown: Shown):
        self._shown = shown

    def fingerprint(self):
        return "annotators"

    def sample(self, images, seeds, strategy=None):
        return [
            [self._caption(self._shown[image], seed) for seed in row] for image, row in zip(images, seeds, strict=True)
        ]

    def _caption(self, scene: Scene, seed: int) -> str:
        rng = np.random.default_rng(seed)
        fact = FACTS[rng.integers(2)]
        described = plant_error(scene, fact, rng) if rng.random() < 0.5 else scene
        return write_caption(described, ANNOTATORS[rng.integers(len(ANNOTATORS))], rng)


class Similarity:
    """A function of the caption that an image holds and the scene of the original."""

    def __init__(self, name: str, function: Callable[[str, Scene], float], shown: Shown):
        self.name, self._function, self._shown = name, function, shown

    def fingerprint(self):
        return self.name

    def compare(self, sources, candidates):
        pairs = zip(sources, candidates, strict=True)
        return torch.tensor(
            [[float(self._function(read(one), self._shown[source])) for one in row] for source, row in pairs]
        )


def oracle(caption: str, scene: Scene) -> float:
    return f1(caption, scene)


def fewest_errors(caption: str, scene: Scene) -> float:
    return -sum(wrong_facts(caption, scene).values())


def constant(caption: str, scene: Scene) -> float:
    return 1.0


def chance(caption: str, scene: Scene) -> float:
    return derive_seed("chance", caption, str(scene))
