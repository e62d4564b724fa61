"""Images with a distractor: something drawn like a thing that is none, which a recogniser must not name.

A weak generator draws meaningless shapes in the world's colours, things blurred beyond recognition, fragments of
things, and two things grown into one. The distractors here imitate these four with the world's own sprites and colours,
so that only their shape gives them away.
"""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dalleflamingo.miniature import world
from dalleflamingo.miniature.drawings import INK, PAPER
from dalleflamingo.miniature.scene_graph import COLOURS, KINDS, Scene, Thing

_OVERSAMPLING = 4
_ROWS, _COLUMNS = np.mgrid[: world.IMAGE_SIZE, : world.IMAGE_SIZE] + 0.5


def add_distractor(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """Draw a scene with a distractor in place of one of its things.

    Returns:
        (64, 64, 3) uint8 image, and the scene without that thing.
    """
    *others, replaced = [scene.things[i] for i in rng.permutation(len(scene.things))]
    rest = Scene(scene.ground, tuple(others))
    distractor = DISTRACTORS[rng.integers(len(DISTRACTORS))]
    return distractor(rest, replaced, rng), rest


def blob(rest: Scene, replaced: Thing, rng: np.random.Generator) -> np.ndarray:
    """An irregular outline in the position, size and colour of the replaced thing, with or without marks in it."""
    side = world.PIXELS[replaced.size]
    size = side * _OVERSAMPLING
    shape = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(shape)
    points = (_flat_ellipse if rng.random() < 0.3 else _random_polygon)(size, rng)
    pen.polygon(points, fill=world.RGB[replaced.colour])
    pen.line([*points, points[0]], fill=INK, width=round(1.25 * _OVERSAMPLING), joint="curve")
    for _ in range(rng.integers(4)):
        x, y = rng.uniform(0.25, 0.75, 2) * size
        extent = rng.uniform(0.03, 0.12) * size
        pen.ellipse([x - extent, y - extent, x + extent, y + extent], fill=(INK, PAPER)[rng.integers(2)])
    sprite = shape.resize((side, side), Image.Resampling.BOX)
    image = Image.fromarray(world.draw(rest))
    image.paste(sprite, (round(replaced.x - side / 2), round(replaced.y - side / 2)), sprite)
    return np.asarray(image)


def blurred(rest: Scene, replaced: Thing, rng: np.random.Generator) -> np.ndarray:
    """The thing blurred until its outline is gone; its neighbours stay sharp."""
    side = world.PIXELS[replaced.size]
    alone = Image.fromarray(world.draw(Scene(rest.ground, (replaced,))))
    blurry = np.asarray(alone.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.2, 0.32))))
    distance = np.hypot(_COLUMNS - replaced.x, _ROWS - replaced.y)
    near = np.clip((0.75 * side - distance) / (0.25 * side), 0, 1)  # 1 within half a side, 0 beyond three quarters
    return _mix(world.draw(rest), blurry, near)


def fragment(rest: Scene, replaced: Thing, rng: np.random.Generator) -> np.ndarray:
    """Less than half of the thing, cut off by a straight line."""
    whole = world.draw(Scene(rest.ground, (*rest.things, replaced)))
    return _mix(world.draw(rest), whole, _half_plane(replaced, rng, rng.uniform(0.02, 0.16)))


def chimera(rest: Scene, replaced: Thing, rng: np.random.Generator) -> np.ndarray:
    """Two kinds in one position: joined along a line through the centre, or one seen through the other."""
    other = replace(replaced, kind=str(rng.choice([kind for kind in KINDS if kind != replaced.kind])))
    if rng.random() < 0.5:
        other = replace(other, colour=str(rng.choice(COLOURS)))
    one, two = (world.draw(Scene(rest.ground, (*rest.things, thing))) for thing in (replaced, other))
    share = np.full(_ROWS.shape, rng.uniform(0.4, 0.6)) if rng.random() < 0.4 else _half_plane(replaced, rng, 0.0)
    return _mix(one, two, share)


DISTRACTORS = (blob, blurred, fragment, chimera)


def _random_polygon(size: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """3 to 12 corners at random angles and distances around the middle of a square of `size` pixels."""
    corners = int(rng.integers(3, 13))
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = size * rng.uniform(0.2, 0.49, (corners, 1)) * rng.uniform(0.5, 1.0, 2)
    return [tuple(point) for point in size / 2 + np.stack([np.cos(angle), np.sin(angle)], 1) * radius]


def _flat_ellipse(size: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """A horizontal or vertical ellipse, flatter than the body of any kind."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    radius = size * rng.permutation([0.48, rng.uniform(0.12, 0.3)])
    return [tuple(point) for point in size / 2 + np.stack([np.cos(angle), np.sin(angle)], 1) * radius]


def _half_plane(thing: Thing, rng: np.random.Generator, shift: float) -> np.ndarray:
    """(64, 64) in [0, 1]: one side of a line of random direction, `shift` sides of the thing away from its centre."""
    angle = rng.uniform(0, 2 * np.pi)
    along = (_COLUMNS - thing.x) * np.cos(angle) + (_ROWS - thing.y) * np.sin(angle)
    return np.clip(along - shift * world.PIXELS[thing.size] + 0.5, 0, 1)


def _mix(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(64, 64, 3) uint8: `above` where `share` (64, 64) is 1, `below` where it is 0."""
    share = share[..., None]
    return np.rint(below * (1 - share) + above * share).astype(np.uint8)
