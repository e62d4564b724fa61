"""Training of the recogniser, on scenes drawn on the fly, degraded images, and distractors that it must not name.

The recogniser judges images that an autoencoder decoded or a diffusion model generated. In training it therefore sees
blur, noise, resampling, JPEG artefacts and warped outlines, all too weak to change a name. Every third image has a
distractor (`distractors.py`), for which the target is: no thing.
"""

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from dalleflamingo.miniature import world
from dalleflamingo.miniature.recogniser import STRIDE, HeadMaps, Recogniser, prepare
from dalleflamingo.miniature.scene_graph import Scene
from dalleflamingo.miniature.training import distractors
from dalleflamingo.miniature.training.averaging import AveragedRecipe
from dalleflamingo.miniature.world import IMAGE_SIZE

GRID = IMAGE_SIZE // STRIDE
HEATMAP_SIGMA = 0.8  # cells, of the Gaussian around a centre
# Cells where the heatmap exceeds this predict the thing's attributes, too: the peak may lie next to the centre.
ATTRIBUTE_THRESHOLD = 0.3
DISTRACTOR_SHARE = 0.35  # of training images


class RecogniserRecipe(AveragedRecipe):
    """Focal loss of the centres, cross-entropies of the attributes, L1 of the offsets."""

    name, steps, batch_size = "recogniser", 8000, 64
    learning_rate, weight_decay, warmup = 2e-3, 0.01, 200

    def __init__(self, network: Recogniser | None = None):
        super().__init__(network or Recogniser())

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, 64, 64) in [-1, 1] and the `targets` of their scenes."""
        images, scenes = zip(*(draw_example(rng) for _ in range(self.batch_size)), strict=True)
        pixels = prepare(np.stack(images))
        return {"pixel_values": add_noise(warp(pixels, rng), rng), **targets(scenes, self.network)}

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The sum of the parts ("loss") and each part."""
        self.network.train()
        batch = {name: value.to(self.network.device) for name, value in batch.items()}
        pixels = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        return detection_losses(self.network(pixels), batch)


def draw_example(rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """A degraded (64, 64, 3) uint8 image, with or without a distractor, and the scene of its real things."""
    scene = world.sample_scene(rng)
    if rng.random() < DISTRACTOR_SHARE:
        image, scene = distractors.add_distractor(scene, rng)
    else:
        image = world.draw(scene)
    image, scene = shift(image, scene, *rng.integers(-2, 3, 2).tolist())
    return degrade(image, rng), scene


def shift(image: np.ndarray, scene: Scene, dx: int, dy: int) -> tuple[np.ndarray, Scene]:
    """Move a (64, 64, 3) image and its things by up to 4 pixels: the world has a lattice, a generator need not."""
    wide = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="edge")
    things = tuple(replace(thing, x=thing.x + dx, y=thing.y + dy) for thing in scene.things)
    return wide[4 - dy : 4 - dy + IMAGE_SIZE, 4 - dx : 4 - dx + IMAGE_SIZE], Scene(scene.ground, things)


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A (64, 64, 3) uint8 image resampled, blurred, compressed, tinted, each with some probability; names stay true."""
    image = Image.fromarray(image)
    if rng.random() < 0.25:
        side = int(rng.integers(40, IMAGE_SIZE))
        image = image.resize((side, side), Image.Resampling.BOX).resize(
            (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC
        )
    if rng.random() < 0.35:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.1)))
    if rng.random() < 0.2:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(40, 95)))
        image = Image.open(file)
    pixels = np.asarray(image)
    if rng.random() < 0.5:
        contrast, brightness, tint = rng.uniform(0.85, 1.1), rng.uniform(-10, 10), rng.uniform(-6, 6, 3)
        pixels = ((pixels - 127.5) * contrast + 127.5 + brightness + tint).clip(0, 255).astype(np.uint8)
    return pixels


def warp(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the (B, 3, 64, 64) images warped by a smooth random field of up to about 2 pixels, as generators warp."""
    count = len(pixels)
    strength = rng.uniform(0, 0.8, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.5)
    coarse = torch.from_numpy((rng.standard_normal((count, 2, 6, 6)) * strength).astype(np.float32))
    field = F.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic", align_corners=True)  # pixels
    identity = F.affine_grid(
        torch.eye(2, 3).expand(count, 2, 3), [count, 3, IMAGE_SIZE, IMAGE_SIZE], align_corners=False
    )
    grid = identity + field.permute(0, 2, 3, 1) * (2 / IMAGE_SIZE)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def add_noise(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the (B, 3, 64, 64) images with Gaussian noise of standard deviation up to 0.08, in a range of 2."""
    count = len(pixels)
    strength = rng.uniform(0, 0.08, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.5)
    grains = rng.standard_normal(pixels.shape, dtype=np.float32) * strength.astype(np.float32)
    return (pixels + torch.from_numpy(grains)).clamp(-1, 1)


def targets(scenes: Sequence[Scene], network: Recogniser) -> dict[str, Tensor]:
    """Targets of the heads for B scenes.

    Args:
        scenes: B of them.
        network: whose names are counted.
    Returns:
        centre: (B, G, G) heatmap, exactly 1 in the cell of each centre.
        weight: (B, G, G) of the attributes' losses, 0 where no thing is near.
        offset: (B, 2, G, G) as in `HeadMaps`.
        kind, colour, size: (B, G, G) indices.
        ground: (B,) indices.
    """
    names = network.config
    count = len(scenes)
    maps = {
        "centre": np.zeros((count, GRID, GRID), np.float32),
        "offset": np.zeros((count, 2, GRID, GRID), np.float32),
        **{name: np.zeros((count, GRID, GRID), np.int64) for name in ("kind", "colour", "size")},
    }
    middle = np.arange(GRID) + 0.5
    for b, scene in enumerate(scenes):
        for thing in scene.things:
            x, y = thing.x / STRIDE, thing.y / STRIDE  # in cells
            i, j = np.clip((int(x), int(y)), 0, GRID - 1)
            square = (middle - middle[i]) ** 2 + (middle[:, None] - middle[j]) ** 2  # (G, G)
            gaussian = np.exp(-square / (2 * HEATMAP_SIGMA**2)).astype(np.float32)
            nearest = gaussian > maps["centre"][b]  # a cell belongs to the nearest thing
            maps["centre"][b][nearest] = gaussian[nearest]
            maps["offset"][b, 0][nearest] = np.broadcast_to(x - middle, (GRID, GRID))[nearest]
            maps["offset"][b, 1][nearest] = np.broadcast_to((y - middle)[:, None], (GRID, GRID))[nearest]
            maps["kind"][b][nearest] = names.kinds.index(thing.kind)
            maps["colour"][b][nearest] = names.colours.index(thing.colour)
            maps["size"][b][nearest] = names.sizes.index(thing.size)
    maps["weight"] = maps["centre"] * (maps["centre"] > ATTRIBUTE_THRESHOLD)
    maps["ground"] = np.array([names.grounds.index(scene.ground) for scene in scenes])
    return {name: torch.from_numpy(value) for name, value in maps.items()}


def detection_losses(maps: HeadMaps, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of the loss and their weighted sum ("loss"), scalars.

    Args:
        maps: output of the network.
        truth: of `targets`.
    """
    weight = truth["weight"]
    total = weight.sum().clamp(min=1)
    parts = {"centre": centre_loss(maps.centre[:, 0], truth["centre"])}
    for name in ("kind", "colour", "size"):
        parts[name] = (F.cross_entropy(maps[name], truth[name], reduction="none") * weight).sum() / total
    parts["offset"] = ((maps.offset - truth["offset"]).abs().sum(1) * weight).sum() / total
    parts["ground"] = F.cross_entropy(maps.ground, truth["ground"])
    scale = {"offset": 0.5, "ground": 0.5}
    return {"loss": sum(value * scale.get(name, 1.0) for name, value in parts.items()), **parts}


def centre_loss(logits: Tensor, heatmap: Tensor) -> Tensor:
    """Focal loss of centre points (Zhou et al. 2019, Objects as Points, eq. 1; α = 2, β = 4), per centre.

    Args:
        logits: (B, G, G).
        heatmap: (B, G, G); a value of 1 is a centre, a value below 1 lowers the loss of a near miss.
    """
    probability = logits.sigmoid()
    hit = (1 - probability) ** 2 * F.logsigmoid(logits)
    miss = (1 - heatmap) ** 4 * probability**2 * F.logsigmoid(-logits)
    centres = (heatmap == 1).float()
    return -(centres * hit + (1 - centres) * miss).sum() / centres.sum().clamp(min=1)
