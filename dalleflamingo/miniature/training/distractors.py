"""Pictures with something in them that is no thing: what a recogniser must learn to pass over.

A poor generator draws shapes in the world's colours that are nothing, things melted beyond recognition, half things,
and two things grown into one. The ghosts here are made with the world's own pens and draws, so that nothing but their
form gives them away.
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
    """Draws a scene with one of its things turned into a ghost.

    Returns:
        (64, 64, 3) uint8 picture, and the scene of what is left: all things but that one.
    """
    *others, victim = [scene.things[i] for i in rng.permutation(len(scene.things))]
    left = Scene(scene.ground, tuple(others))
    ghost = (_blob, _melted, _half, _chimera)[rng.integers(4)]
    return ghost(left, victim, rng), left


def _blob(left: Scene, victim: Thing, rng: np.random.Generator) -> np.ndarray:
    """An irregular outline in the thing's place, size and colour, with or without marks in it."""
    side = world.PIXELS[victim.size]
    size = side * _OVERSAMPLING
    shape = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(shape)
    points = (_egg if rng.random() < 0.3 else _jagged)(size, rng)
    pen.polygon(points, fill=world.RGB[victim.colour])
    pen.line([*points, points[0]], fill=INK, width=round(1.25 * _OVERSAMPLING), joint="curve")
    for _ in range(rng.integers(4)):
        x, y = rng.uniform(0.25, 0.75, 2) * size
        extent = rng.uniform(0.03, 0.12) * size
        pen.ellipse([x - extent, y - extent, x + extent, y + extent], fill=(INK, PAPER)[rng.integers(2)])
    sprite = shape.resize((side, side), Image.Resampling.BOX)
    picture = Image.fromarray(world.draw(left))
    picture.paste(sprite, (round(victim.x - side / 2), round(victim.y - side / 2)), sprite)
    return np.asarray(picture)


def _jagged(size: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """3 to 12 corners around the middle of a square of `size` pixels, at any angle and distance."""
    corners = int(rng.integers(3, 13))
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = size * rng.uniform(0.2, 0.49, (corners, 1)) * rng.uniform(0.5, 1.0, 2)
    return [tuple(point) for point in size / 2 + np.stack([np.cos(angle), np.sin(angle)], 1) * radius]


def _egg(size: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """An ellipse, lying or standing, flatter than any kind's body."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    radius = size * rng.permutation([0.48, rng.uniform(0.12, 0.3)])
    return [tuple(point) for point in size / 2 + np.stack([np.cos(angle), np.sin(angle)], 1) * radius]


def _melted(left: Scene, victim: Thing, rng: np.random.Generator) -> np.ndarray:
    """The thing blurred until its outline is gone, its neighbours sharp."""
    side = world.PIXELS[victim.size]
    alone = Image.fromarray(world.draw(Scene(left.ground, (victim,))))
    blurred = np.asarray(alone.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.2, 0.32))))
    distance = np.hypot(_COLUMNS - victim.x, _ROWS - victim.y)
    near = np.clip((0.75 * side - distance) / (0.25 * side), 0, 1)  # 1 inside half a side, 0 beyond three quarters
    return _mix(world.draw(left), blurred, near)


def _half(left: Scene, victim: Thing, rng: np.random.Generator) -> np.ndarray:
    """The thing cut by a straight line, less than half of it left."""
    whole = world.draw(Scene(left.ground, (*left.things, victim)))
    return _mix(world.draw(left), whole, _beyond_line(victim, rng, rng.uniform(0.02, 0.16)))


def _chimera(left: Scene, victim: Thing, rng: np.random.Generator) -> np.ndarray:
    """Two kinds in one place: joined along a line through the middle, or one shining through the other."""
    other = replace(victim, kind=str(rng.choice([kind for kind in KINDS if kind != victim.kind])))
    if rng.random() < 0.5:
        other = replace(other, colour=str(rng.choice(COLOURS)))
    one, two = (world.draw(Scene(left.ground, (*left.things, thing))) for thing in (victim, other))
    share = np.full(_ROWS.shape, rng.uniform(0.4, 0.6)) if rng.random() < 0.4 else _beyond_line(victim, rng, 0.0)
    return _mix(one, two, share)


def _beyond_line(thing: Thing, rng: np.random.Generator, shift: float) -> np.ndarray:
    """(64, 64) in 0–1: the side of a line of random direction that passes `shift` sides from the thing's centre."""
    angle = rng.uniform(0, 2 * np.pi)
    along = (_COLUMNS - thing.x) * np.cos(angle) + (_ROWS - thing.y) * np.sin(angle)
    return np.clip(along - shift * world.PIXELS[thing.size] + 0.5, 0, 1)


def _mix(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(64, 64, 3) uint8: `above` where `share` (64, 64) is 1, `below` where it is 0."""
    share = share[..., None]
    return np.rint(below * (1 - share) + above * share).astype(np.uint8)
