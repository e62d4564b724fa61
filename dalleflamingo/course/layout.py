"""Pictures on a sheet, at whole pixels: every pixel of a 64 × 64 picture becomes a square, and all squares are alike.

Lengths are in pixels of the figure, from its upper left corner. Text is drawn as it is, never taken for a formula.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

PALETTE = {  # told apart by colour-blind eyes (Okabe and Ito; Tol)
    "clip": "#0072B2",
    "dino": "#D55E00",
    "fidelity": "#009E73",
    "pixels": "#661100",
    "text_clip": "#0072B2",
    "text_sbert": "#882255",
    "text_cider": "#999933",
    "text_wmd": "#44AA99",
    "random": "#767676",
    "wordpiece": "#E69F00",
    "more": "#56B4E9",
    "less": "#CC79A7",
    "noise": "#0072B2",
    "blur": "#D55E00",
    "the picture": "#0072B2",
    "x̂": "#D55E00",
    "text": "#1a1a1a",
    "quiet": "#5c5c5c",
    "rule": "#d0d0d0",
    "ground": "#ffffff",
}
DPI = 144
SIDE = 256  # a picture: 64 × 64 four times
GAP = 26  # between two pictures
LINE = 18  # of text
MARGIN = 14
POINTS = 8.0
LETTERS = 29  # of that size, fit beside each other under a picture


@dataclass(frozen=True)
class Tile:
    """A picture with a heading in `colour` above it, a caption below, and under that a quieter remark, line by line."""

    picture: Image.Image
    caption: str = ""
    remarks: tuple[str, ...] = ()
    heading: str = ""
    colour: str = PALETTE["text"]

    @property
    def lines(self) -> list[str]:
        return textwrap.wrap(self.caption, LETTERS)


def lay_out(rows: Sequence[Sequence[Tile | None]], note: str) -> Figure:
    """Tiles in rows, None for an empty place, and under them a sentence that says what to see."""
    width = 2 * MARGIN + max(map(len, rows)) * (SIDE + GAP) - GAP
    heights = [_height([tile for tile in line if tile]) for line in rows]
    sentence = wrap(note, width - 2 * MARGIN)
    figure = blank(width, 2 * MARGIN + sum(heights) + GAP * (len(rows) - 1) + text_height(sentence))
    top = MARGIN
    for line, height in zip(rows, heights, strict=True):
        headed = any(tile and tile.heading for tile in line)
        for column, tile in enumerate(line):
            if tile:
                _draw(figure, tile, MARGIN + column * (SIDE + GAP), top, LINE + 2 if headed else 0)
        top += height + GAP
    write(figure, MARGIN, top - GAP + LINE, sentence, color=PALETTE["quiet"], style="italic")
    return figure


def _height(tiles: Sequence[Tile]) -> int:
    above = LINE + 2 if any(tile.heading for tile in tiles) else 0
    return above + SIDE + 6 + LINE * max(len(tile.lines) + len(tile.remarks) for tile in tiles)


def _draw(figure: Figure, tile: Tile, left: int, top: int, above: int) -> None:
    write(figure, left, top, tile.heading, color=tile.colour, weight="bold")
    place(figure, tile.picture, left, top + above)
    below = top + above + SIDE + 6
    write(figure, left, below, "\n".join(tile.lines))
    write(figure, left, below + LINE * len(tile.lines), "\n".join(tile.remarks), color=PALETTE["quiet"])


def blank(width: int, height: int) -> Figure:
    """A white figure of that many pixels."""
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PALETTE["ground"])
    plt.close(figure)  # a cell shows the figure that it returns; pyplot would show it a second time
    return figure


def place(figure: Figure, picture: Image.Image, left: int, top: int) -> Axes:
    """A picture in the middle of a square; the axes returned count the square's pixels."""
    width, height = (figure.get_size_inches() * DPI).round()
    axes = figure.add_axes((left / width, 1 - (top + SIDE) / height, SIDE / width, SIDE / height))
    fitted = fit(picture)
    x, y = (SIDE - fitted.width) // 2, (SIDE - fitted.height) // 2
    axes.imshow(np.asarray(fitted), interpolation="none", extent=(x, x + fitted.width, y + fitted.height, y))
    axes.set(xlim=(0, SIDE), ylim=(SIDE, 0))
    axes.axis("off")
    return axes


def fit(picture: Image.Image) -> Image.Image:
    """RGB, within SIDE × SIDE: a small picture enlarged by a whole factor, a large one made smaller."""
    picture = picture.convert("RGB")
    factor = SIDE // max(picture.size)
    if factor > 0:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture


def write(figure: Figure, left: float, top: float, text: str, **style) -> None:
    """Lines of text whose first begins at (left, top)."""
    width, height = figure.get_size_inches() * DPI
    style = {"fontsize": POINTS, "color": PALETTE["text"], "linespacing": 1.1, **style}
    figure.text(left / width, 1 - top / height, text, va="top", parse_math=False, **style)


def wrap(sentence: str, width: int) -> str:
    """The sentence in lines that fit into `width` pixels."""
    return "\n".join(textwrap.wrap(sentence, width * LETTERS // SIDE))


def text_height(text: str) -> int:
    """Pixels that a note takes, with the space above it."""
    return LINE * (text.count("\n") + 2) if text else 0
