"""Heat maps of pairs: a row for each captioner, a column for each generator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from matplotlib.figure import Figure

from dalleflamingo.course import layout
from dalleflamingo.course.layout import FONT_SIZE, PALETTE
from dalleflamingo.evaluation.intervals import Interval

_CELL, _LEFT, _ABOVE, _BELOW = (190, 96), 150, 70, 130  # pixels


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: what was measured.
        values: (row, column) -> the value with its interval.
        baselines: (row, column) -> what the value is to be compared with; the colour shows how far it lies above.
    """

    title: str
    values: Mapping[tuple[str, str], Interval]
    baselines: Mapping[tuple[str, str], float]


def heat_maps(panels: Sequence[Panel], note: str) -> Figure:
    """Panels side by side.

    Args:
        panels: each of all pairs of its rows and columns.
        note: a sentence that says what to see.
    """
    shapes = [tuple(list(dict.fromkeys(names)) for names in zip(*one.values, strict=True)) for one in panels]
    widths = [_LEFT + _CELL[0] * len(columns) for _, columns in shapes]
    height = _ABOVE + _CELL[1] * max(len(rows) for rows, _ in shapes) + _BELOW
    total, left = sum(widths) + layout.MARGIN, 0
    figure = layout.new_figure(total, height)
    for panel, (rows, columns), width in zip(panels, shapes, widths, strict=True):
        inner = _CELL[0] * len(columns), _CELL[1] * len(rows)
        axes = figure.add_axes(
            ((left + _LEFT) / total, 1 - (_ABOVE + inner[1]) / height, inner[0] / total, inner[1] / height)
        )
        above = np.array([[panel.values[r, c].value - panel.baselines[r, c] for c in columns] for r in rows])
        axes.imshow(above, cmap="Blues", vmin=0, vmax=max(above.max(), 1e-9) * 1.8, aspect="auto")
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            interval, baseline = panel.values[row, column], panel.baselines[row, column]
            text = f"{interval.value:.2f}\n[{interval.low:.2f}, {interval.high:.2f}]\nanother: {baseline:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=FONT_SIZE, color=PALETTE["text"])
        axes.set_xticks(range(len(columns)), columns, fontsize=FONT_SIZE)
        axes.set_yticks(range(len(rows)), rows, fontsize=FONT_SIZE)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(panel.title, fontsize=FONT_SIZE + 1, pad=8)
        left += width
    layout.add_note(figure, note)
    return figure
