"""Images on a sheet, at whole pixels: every pixel of a 64 × 64 image becomes a square, and all squares have one size.

Lengths are in pixels of the figure, from its upper left corner. Text is shown as it is, never taken for a formula.
"""

import textwrap
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dalleflamingo.datasets import to_rgb

PALETTE = {  # told apart by colour-blind eyes (Okabe and Ito; Tol)
    "clip": "#0072B2",
    "dino": "#D55E00",
    "fidelity": "#009E73",
    "text_clip": "#0072B2",
    "text_sbert": "#882255",
    "text_cider": "#999933",
    "text_wmd": "#44AA99",
    "random": "#767676",
    "wordpiece": "#E69F00",
    "more": "#56B4E9",
    "less": "#CC79A7",
    "text": "#1a1a1a",
    "quiet": "#5c5c5c",
    "rule": "#d0d0d0",
    "ground": "#ffffff",
}
DPI = 144
IMAGE_SIZE = 256  # side of an image on the sheet: 64 pixels, four times enlarged
GAP = 26  # between two images
MARGIN = 14
FONT_SIZE = 8.0  # in points
LINE_HEIGHT = 18  # of text in that size
CHARACTERS = 29  # that fit on a line below an image


@dataclass(frozen=True)
class Panel:
    """An image with its texts.

    Attributes:
        image: of any size and shape.
        caption: below the image, wrapped.
        remarks: lines below the caption, in a quieter colour.
        heading: above the image, in `colour`.
        colour: a matplotlib colour.
    """

    image: Image.Image
    caption: str = ""
    remarks: tuple[str, ...] = ()
    heading: str = ""
    colour: str = PALETTE["text"]

    @property
    def lines(self) -> list[str]:
        """The caption in lines of at most `CHARACTERS`."""
        return textwrap.wrap(self.caption, CHARACTERS)


def arrange(rows: Sequence[Sequence[Panel | None]], note: str) -> Figure:
    """Panels in rows, with a note below.

    Args:
        rows: None leaves its position empty.
        note: a sentence that says what to see.
    """
    width = 2 * MARGIN + max(map(len, rows)) * (IMAGE_SIZE + GAP) - GAP
    heights = [_row_height([panel for panel in row if panel]) for row in rows]
    below = note_height(wrap(note, width - 2 * MARGIN))
    figure = new_figure(width, 2 * MARGIN + sum(heights) + GAP * (len(rows) - 1) + below)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        above = LINE_HEIGHT + 2 if any(panel and panel.heading for panel in row) else 0
        for column, panel in enumerate(row):
            if panel:
                _add_panel(figure, panel, MARGIN + column * (IMAGE_SIZE + GAP), top, above)
        top += height + GAP
    add_note(figure, note, top - GAP + LINE_HEIGHT)
    return figure


def in_rows(panels: Sequence[Panel], count: int) -> list[Sequence[Panel]]:
    """The panels in rows of `count`; the last may be shorter.

    Args:
        panels: in reading order.
        count: panels in a row.
    """
    return [panels[start : start + count] for start in range(0, len(panels), count)]


def _row_height(panels: Sequence[Panel]) -> int:
    above = LINE_HEIGHT + 2 if any(panel.heading for panel in panels) else 0
    lines = max(len(panel.lines) + len(panel.remarks) for panel in panels)
    return above + IMAGE_SIZE + 6 + LINE_HEIGHT * lines


def _add_panel(figure: Figure, panel: Panel, left: int, top: int, above: int) -> None:
    """Add a panel whose image begins `above` pixels below `top`."""
    add_text(figure, left, top, panel.heading, color=panel.colour, weight="bold")
    add_image(figure, panel.image, left, top + above)
    below = top + above + IMAGE_SIZE + 6
    add_text(figure, left, below, "\n".join(panel.lines))
    remarks = below + LINE_HEIGHT * len(panel.lines)
    add_text(figure, left, remarks, "\n".join(panel.remarks), color=PALETTE["quiet"])


class CaptionedFigure(Figure):
    """A figure that notebooks show as a PNG whose alternative text is the figure's own: its texts and its note."""

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        file = BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        texts = [" ".join(text.split()) for text in self.written()]
        image, metadata = b64encode(file.getvalue()).decode(), {"alt": " · ".join(filter(None, texts))}
        return {"image/png": image}, {"image/png": metadata}

    def written(self) -> list[str]:
        """All that stands in the figure beside the numbers of its axes, the note last."""
        axes = [text for one in self.axes for text in (one.get_title("left"), one.get_ylabel(), one.get_xlabel())]
        return [*axes, *(text.get_text() for text in self.texts)]


def new_figure(width: int, height: int) -> CaptionedFigure:
    """An empty white figure.

    Args:
        width: in pixels.
        height: in pixels.
    """
    size = width / DPI, height / DPI
    figure = plt.figure(figsize=size, dpi=DPI, facecolor=PALETTE["ground"], FigureClass=CaptionedFigure)
    plt.close(figure)  # a cell shows the figure that it returns; pyplot would show it a second time
    return figure


def add_image(figure: Figure, image: Image.Image, left: int, top: int) -> Axes:
    """Add an image in the middle of a square of `IMAGE_SIZE`.

    Args:
        figure: that it is added to.
        image: of any size and shape.
        left: of the square, in pixels.
        top: of the square, in pixels.
    Returns:
        axes that count the pixels of the square.
    """
    width, height = (figure.get_size_inches() * DPI).round()
    bounds = left / width, 1 - (top + IMAGE_SIZE) / height, IMAGE_SIZE / width, IMAGE_SIZE / height
    axes = figure.add_axes(bounds)
    fitted = resize_to_fit(image)
    x, y = (IMAGE_SIZE - fitted.width) // 2, (IMAGE_SIZE - fitted.height) // 2
    axes.imshow(np.asarray(fitted), interpolation="none", extent=(x, x + fitted.width, y + fitted.height, y))
    axes.set(xlim=(0, IMAGE_SIZE), ylim=(IMAGE_SIZE, 0))
    axes.axis("off")
    return axes


def resize_to_fit(image: Image.Image) -> Image.Image:
    """The image in RGB within `IMAGE_SIZE`: a small one enlarged by a whole factor, a large one made smaller.

    Args:
        image: of any mode, size and shape; its shape is kept.
    """
    image = to_rgb(image)
    factor = IMAGE_SIZE // max(image.size)
    if factor > 0:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return image


def add_text(figure: Figure, left: float, top: float, text: str, **style) -> None:
    """Add lines of text.

    Args:
        figure: that they are added to.
        left: of the text, in pixels.
        top: of the first line, in pixels.
        text: lines, with line breaks between them.
        **style: as matplotlib's `Figure.text` takes it.
    """
    width, height = figure.get_size_inches() * DPI
    style = {"fontsize": FONT_SIZE, "color": PALETTE["text"], "linespacing": 1.1, **style}
    figure.text(left / width, 1 - top / height, text, va="top", parse_math=False, **style)


def add_note(figure: Figure, note: str, top: float | None = None) -> None:
    """Add the sentence that says what to see, wrapped to the figure's width.

    Args:
        figure: that it is added to.
        note: may be empty.
        top: of the note, in pixels; None for the bottom of the figure.
    """
    width, height = figure.get_size_inches() * DPI
    text = wrap(note, round(width) - 2 * MARGIN)
    top = height - note_height(text) if top is None else top
    add_text(figure, MARGIN, top, text, color=PALETTE["quiet"], style="italic")


def wrap(sentence: str, width: int) -> str:
    """The sentence in lines.

    Args:
        sentence: without line breaks.
        width: that each line fits into, in pixels.
    """
    return "\n".join(textwrap.wrap(sentence, width * CHARACTERS // IMAGE_SIZE))


def note_height(text: str) -> int:
    """Pixels that a note takes with the space above it.

    Args:
        text: wrapped.
    """
    return LINE_HEIGHT * (text.count("\n") + 2) if text else 0
