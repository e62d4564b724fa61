"""Images of 64 × 64 pixels whose content is known exactly: which things they show, in which colour, size and position.

A sprite is a thing of one kind, colour and size, drawn from the primitives in `drawings.py`. An image is a ground with
one to three sprites on it. `sample_scene` samples a scene, `draw` draws it.
"""

from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
from PIL import Image, ImageDraw

from dalleflamingo.miniature.drawings import DRAWINGS, INK, PAPER
from dalleflamingo.miniature.scene_graph import COLOURS, GROUNDS, KINDS, SIZES, Scene, Thing, main_relation

IMAGE_SIZE = 64
PIXELS = {"small": 20, "large": 28}  # side of a thing's square
# pixels: sprites begin at a multiple of the autoencoder's factor, so that every sprite has one latent, not sixteen
_LATTICE = 4
RGB = {
    "red": (222, 40, 44),
    "orange": (250, 140, 24),
    "yellow": (252, 224, 50),
    "green": (36, 158, 66),
    "blue": (36, 92, 220),
    "purple": (136, 52, 176),
    "pink": (250, 138, 190),
    "white": (252, 252, 252),
}
GROUND_RGB = {
    "grass": (172, 206, 138),
    "sand": (234, 214, 172),
    "snow": (224, 232, 240),
    "water": (142, 192, 214),
    "night": (98, 100, 150),
}
_OVERSAMPLING = 8


def draw(scene: Scene) -> np.ndarray:
    """(64, 64, 3) uint8 image of a scene.

    Raises:
        ValueError: a thing is not wholly inside the image.
    """
    image = _ground(scene.ground).copy()  # float32
    for thing in scene.things:
        colour, opacity = _sprite(thing.kind, thing.colour, thing.size)
        side = PIXELS[thing.size]
        left, top = round(thing.x - side / 2), round(thing.y - side / 2)
        if not (0 <= left <= IMAGE_SIZE - side and 0 <= top <= IMAGE_SIZE - side):
            raise ValueError(f"{thing} reaches outside the {IMAGE_SIZE} × {IMAGE_SIZE} image: move its centre inwards")
        patch = image[top : top + side, left : left + side]
        patch *= 1 - opacity
        patch += colour * opacity
    return np.rint(image).astype(np.uint8)


def sample_scene(rng: np.random.Generator, kinds: tuple[str, ...] = KINDS, count: int | None = None) -> Scene:
    """A scene of things of different kinds.

    Args:
        rng: source of all choices.
        kinds: to choose from.
        count: number of things; None for 1, 2 or 3 with probabilities 0.4, 0.4 and 0.2.
    """
    count = count or int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    names = rng.choice(kinds, size=count, replace=False)
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=count)]
    things = tuple(
        Thing(str(name), COLOURS[rng.integers(len(COLOURS))], size, *centre)
        for name, size, centre in zip(names, sizes, _sample_centres(rng, sizes), strict=True)
    )
    return Scene(GROUNDS[rng.integers(len(GROUNDS))], things)


def rotate_layout(scene: Scene, quarter_turns: int) -> Scene:
    """The same things, upright, with their centres rotated clockwise about the image's: "left of" becomes "above"."""
    things = scene.things
    for _ in range(quarter_turns % 4):
        things = tuple(replace(thing, x=IMAGE_SIZE - thing.y, y=thing.x) for thing in things)
    return replace(scene, things=things)


def move(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same things elsewhere: other centres, with the same main relation of every pair."""
    while True:
        centres = _sample_centres(rng, [thing.size for thing in scene.things])
        things = tuple(replace(thing, x=x, y=y) for thing, (x, y) in zip(scene.things, centres, strict=True))
        if things != scene.things and _main_relations(things) == _main_relations(scene.things):
            return replace(scene, things=things)


def _main_relations(things: tuple[Thing, ...]) -> list[str]:
    return [main_relation(one, other) for one, other in combinations(things, 2)]


def _sample_centres(rng: np.random.Generator, sizes: list[str]) -> list[tuple[float, float]]:
    """Centres (x, y) without overlap: one thing anywhere, two in a half each, three in two quarters and a half."""
    half = IMAGE_SIZE / 2
    whole, first, second = (0, IMAGE_SIZE), (0, half), (half, IMAGE_SIZE)
    middle = (half - 20, half + 20)
    if len(sizes) == 1:
        slots = [(whole, whole)]
    elif len(sizes) == 2:
        slots = [(first, middle), (second, middle)]
    else:
        slots = [(first, first), (second, first), (middle, second)]
    if rng.random() < 0.5:
        slots = [(vertical, horizontal) for horizontal, vertical in slots]
    if rng.random() < 0.5:
        slots = [tuple((IMAGE_SIZE - high, IMAGE_SIZE - low) for low, high in slot) for slot in slots]
    order = rng.permutation(len(slots))
    return [
        tuple(_sample_coordinate(rng, axis, PIXELS[size]) for axis in slots[i])
        for i, size in zip(order, sizes, strict=True)
    ]


def _sample_coordinate(rng: np.random.Generator, axis: tuple[float, float], side: int) -> float:
    """A coordinate that keeps a sprite of this side between the ends of `axis`, its corner on the lattice."""
    low, high = (int(end) // _LATTICE for end in axis)
    return float(rng.integers(low, high - side // _LATTICE + 1) * _LATTICE + side / 2)


@cache
def _sprite(kind: str, colour: str, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Colour (S, S, 3) in 0–255 and opacity (S, S, 1) in 0–1, float32, antialiased by oversampling."""
    side = PIXELS[size] * _OVERSAMPLING
    shape = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(shape)
    main = RGB[colour]
    tones = {"main": main, "shade": tuple(int(0.7 * c) for c in main), "paper": PAPER, "ink": INK}
    outline = round(1.25 * _OVERSAMPLING)
    for primitive, points, tone in DRAWINGS[kind]:
        scaled = [(x * (side - 1) / 100, y * (side - 1) / 100) for x, y in points]
        if primitive == "ellipse":
            pen.ellipse([*scaled[0], *scaled[1]], fill=tones[tone], outline=INK, width=outline)
        elif primitive == "polygon":
            pen.polygon(scaled, fill=tones[tone])
            pen.line([*scaled, scaled[0], scaled[1]], fill=INK, width=outline, joint="curve")
        elif primitive == "dot":
            pen.ellipse([*scaled[0], *scaled[1]], fill=tones[tone])
        else:  # "line"
            pen.line(scaled, fill=tones[tone], width=round(1.6 * outline), joint="curve")
    pixels = np.asarray(shape, np.float32).reshape(PIXELS[size], _OVERSAMPLING, PIXELS[size], _OVERSAMPLING, 4)
    opacity = pixels[..., 3:] / 255
    weight = opacity.mean((1, 3))
    return (pixels[..., :3] * opacity).mean((1, 3)) / np.maximum(weight, 1e-6), weight


@cache
def _ground(name: str) -> np.ndarray:
    """(64, 64, 3) float32: a colour with a faint pattern, the same in every image."""
    ground = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), GROUND_RGB[name])
    pen = ImageDraw.Draw(ground)
    lighter = tuple(min(255, c + 22) for c in GROUND_RGB[name])
    darker = tuple(c - 18 for c in GROUND_RGB[name])
    for row in range(4):
        for column in range(4):
            x, y = 16 * column + (row % 2) * 8 + 3, 16 * row + 7
            if name == "grass":
                pen.line([(x, y), (x + 1, y - 3)], fill=darker)
                pen.line([(x + 3, y), (x + 2, y - 3)], fill=darker)
            elif name == "water":
                pen.line([(x, y), (x + 2, y - 1), (x + 5, y)], fill=lighter)
            elif name == "night":
                pen.rectangle([x, y, x + 1, y + 1], fill=(236, 230, 170))
            else:
                pen.rectangle([x, y, x + 1, y], fill=darker if name == "sand" else (255, 255, 255))
    return np.asarray(ground, np.float32)
