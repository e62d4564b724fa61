"""Scenes drawn from a seed: no model was trained or chosen on them, and another seed gives others of the same sort.

Scene i depends on the seed and on i alone, so that fewer scenes are the first ones of more.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo.datasets import DOMAINS, Dataset, Example
from dalleflamingo.miniature.annotators import annotate
from dalleflamingo.miniature.corpora import nocaps_scene
from dalleflamingo.miniature.scene_graph import Scene
from dalleflamingo.miniature.world import draw, sample_scene
from dalleflamingo.runs import derive_seed, write_whole


def generator_of(seed: int, what: str, number: int) -> np.random.Generator:
    """The random numbers of one scene.

    Args:
        seed: of all scenes.
        what: they are for; scenes for another purpose are others.
        number: of the scene.
    """
    return np.random.default_rng(derive_seed(seed, what, number))


def scenes(n: int, seed: int, what: str = "scene", count: int | None = None) -> list[Scene]:
    """Scenes of all kinds.

    Args:
        n: their number.
        seed: of all of them.
        what: they are for, as in `generator_of`.
        count: things in each; None for one to three.
    """
    return [sample_scene(generator_of(seed, f"{what}, {count}", i), count=count) for i in range(n)]


def nocaps(n: int, seed: int) -> Dataset:
    """Scenes as those of miniature/nocaps, the domains in turn, with ten captions each; `with_images` draws them.

    Args:
        n: their number.
        seed: of all of them.
    """
    examples = []
    for i in range(n):
        rng, domain = generator_of(seed, "nocaps", i), DOMAINS[i % len(DOMAINS)]
        scene = nocaps_scene(rng, domain)
        examples.append(example(i, scene, annotate(scene, 10, rng), domain))
    return Dataset(f"fresh nocaps, seed {seed}", tuple(examples))


def example(image_id: int, scene: Scene, captions: Iterable[str], domain: str | None = None) -> Example:
    """An image that is not drawn yet; other arguments as `Example`."""
    return Example(image_id, Path(f"{image_id:06d}.png"), tuple(captions), domain, {"scene": scene.as_dict()})


def with_images(dataset: Dataset, folder: Path) -> Dataset:
    """The data set with its images in a folder, where those that are missing are drawn.

    Args:
        dataset: of images with known scenes.
        folder: created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [replace(one, path=folder / one.path.name) for one in dataset]
    missing = [(one.path, scene) for one, scene in zip(found, scenes_of(dataset), strict=True) if not one.path.exists()]
    for path, scene in tqdm(missing, desc="drawing", leave=False, delay=1):
        image = Image.fromarray(draw(scene))
        write_whole(path, lambda part, image=image: image.save(part, "PNG"))
    return Dataset(dataset.name, tuple(found))


def scenes_of(dataset: Dataset) -> list[Scene]:
    """What each image shows."""
    return [Scene.from_dict(one.extra["scene"]) for one in dataset]


def draw_all(scenes: Iterable[Scene]) -> list[Image.Image]:
    """An image of each scene."""
    return [Image.fromarray(draw(scene)) for scene in scenes]
