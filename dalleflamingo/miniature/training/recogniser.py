"""Trains the judge of pictures on scenes drawn on the fly, on damaged ones, and on ghosts that it must not name.

The recogniser will judge pictures that a VAE decoded and a diffusion model drew. So it sees blur, noise, resampling,
JPEG and wavering outlines in training, all too weak to change a name; and every third picture holds a ghost (see
`ghosts.py`), at whose place the truth says: nothing.
"""

import io
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from dalleflamingo.miniature import world
from dalleflamingo.miniature.recogniser import PICTURE, STRIDE, HeadMaps, Recogniser, prepare
from dalleflamingo.miniature.scene_graph import Scene
from dalleflamingo.miniature.training import distractors
from dalleflamingo.miniature.training.averaging import AveragedRecipe

GRID = PICTURE // STRIDE
SPREAD = 0.8  # of the centre's bump, in cells
OWNED = 0.3  # cells where the bump is higher answer for the thing, too: a peak may fall next to the centre
GHOST_SHARE = 0.35  # of training pictures


class RecogniserRecipe(AveragedRecipe):
    """A recipe for `train.py`: 64 pictures a step, exported as the running average of the weights."""

    name, steps, batch_size = "recogniser", 8000, 64
    learning_rate, weight_decay, warmup = 2e-3, 0.01, 200

    def __init__(self, network: Recogniser | None = None):
        super().__init__(network or Recogniser())

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Pictures (B, 3, 64, 64) in [-1, 1] and the maps that `targets` makes of their scenes."""
        drawn = [draw_example(rng) for _ in range(self.batch_size)]
        scenes = [scene for _, scene in drawn]
        pixels = prepare(np.stack([picture for picture, _ in drawn]))
        return {"pixel_values": noise(waver(pixels, rng), rng), **targets(scenes, self.network)}

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.network.train()
        like = next(self.network.parameters())
        batch = {name: value.to(like.device) for name, value in batch.items()}
        pixels = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
        return losses(self.network(pixels), batch)


def draw_example(rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """A picture (64, 64, 3) uint8 as a judge may meet it, and the things in it that are things."""
    scene = world.sample_scene(rng)
    if rng.random() < GHOST_SHARE:
        picture, scene = distractors.add_distractor(scene, rng)
    else:
        picture = world.draw(scene)
    picture, scene = shift(picture, scene, *rng.integers(-2, 3, 2).tolist())
    return damage(picture, rng), scene


def shift(picture: np.ndarray, scene: Scene, dx: int, dy: int) -> tuple[np.ndarray, Scene]:
    """Moves a (64, 64, 3) picture and its things by up to 4 px: the world keeps to a lattice, a generator may not."""
    wide = np.pad(picture, ((4, 4), (4, 4), (0, 0)), mode="edge")
    things = tuple(replace(thing, x=thing.x + dx, y=thing.y + dy) for thing in scene.things)
    return wide[4 - dy : 4 - dy + PICTURE, 4 - dx : 4 - dx + PICTURE], Scene(scene.ground, things)


def damage(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Resamples, blurs, compresses, tints a (64, 64, 3) uint8 picture, each at times, never until a name changes."""
    image = Image.fromarray(picture)
    if rng.random() < 0.25:
        side = int(rng.integers(40, PICTURE))
        image = image.resize((side, side), Image.Resampling.BOX).resize((PICTURE, PICTURE), Image.Resampling.BICUBIC)
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


def waver(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Bends half of the (B, 3, 64, 64) pictures by a smooth random field of up to about 2 pixels, as generators do."""
    count = len(pixels)
    strength = rng.uniform(0, 0.8, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.5)
    coarse = torch.from_numpy((rng.standard_normal((count, 2, 6, 6)) * strength).astype(np.float32))
    field = F.interpolate(coarse, size=PICTURE, mode="bicubic", align_corners=True)  # pixels
    still = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 3, PICTURE, PICTURE], align_corners=False)
    grid = still + field.permute(0, 2, 3, 1) * (2 / PICTURE)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def noise(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Adds Gaussian noise of up to 0.08 (of a range of 2) to the (B, 3, 64, 64) pictures, half of the time none."""
    count = len(pixels)
    strength = rng.uniform(0, 0.08, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.5)
    grains = rng.standard_normal(pixels.shape, dtype=np.float32) * strength.astype(np.float32)
    return (pixels + torch.from_numpy(grains)).clamp(-1, 1)


def targets(scenes: list[Scene], network: Recogniser) -> dict[str, Tensor]:
    """What the heads should say of B scenes.

    Returns:
        centre: (B, G, G) bumps, exactly 1 in the cell of each centre.
        weight: (B, G, G) how much a cell answers for a thing's attributes, 0 where it answers for none.
        offset: (B, 2, G, G) as in `HeadMaps`; kind, colour, size: (B, G, G) indices; ground: (B,) indices.
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
            bump = np.exp(-square / (2 * SPREAD**2)).astype(np.float32)
            mine = bump > maps["centre"][b]  # nearest thing owns a cell
            maps["centre"][b][mine] = bump[mine]
            maps["offset"][b, 0][mine] = np.broadcast_to(x - middle, (GRID, GRID))[mine]
            maps["offset"][b, 1][mine] = np.broadcast_to((y - middle)[:, None], (GRID, GRID))[mine]
            maps["kind"][b][mine] = names.kinds.index(thing.kind)
            maps["colour"][b][mine] = names.colours.index(thing.colour)
            maps["size"][b][mine] = names.sizes.index(thing.size)
    maps["weight"] = maps["centre"] * (maps["centre"] > OWNED)
    maps["ground"] = np.array([names.grounds.index(scene.ground) for scene in scenes])
    return {name: torch.from_numpy(value) for name, value in maps.items()}


def losses(maps: HeadMaps, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum ("loss") and its parts, scalars: focal for centres, cross-entropies and L1 weighted to the centres."""
    weight = truth["weight"]
    total = weight.sum().clamp(min=1)
    parts = {"centre": centre_loss(maps.centre[:, 0], truth["centre"])}
    for name in ("kind", "colour", "size"):
        parts[name] = (F.cross_entropy(maps[name], truth[name], reduction="none") * weight).sum() / total
    parts["offset"] = ((maps.offset - truth["offset"]).abs().sum(1) * weight).sum() / total
    parts["ground"] = F.cross_entropy(maps.ground, truth["ground"])
    scale = {"offset": 0.5, "ground": 0.5}
    return {"loss": sum(value * scale.get(name, 1.0) for name, value in parts.items()), **parts}


def centre_loss(logits: Tensor, bumps: Tensor) -> Tensor:
    """Focal loss of centre points (Zhou et al. 2019, Objects as Points, eq. 1; α = 2, β = 4), per centre.

    Args:
        logits, bumps: (B, G, G); a bump of exactly 1 is a centre, less than 1 excuses a near miss.
    """
    probability = logits.sigmoid()
    hit = (1 - probability) ** 2 * F.logsigmoid(logits)
    miss = (1 - bumps) ** 4 * probability**2 * F.logsigmoid(-logits)
    centres = (bumps == 1).float()
    return -(centres * hit + (1 - centres) * miss).sum() / centres.sum().clamp(min=1)
