"""What the notebooks draw with: pictures with their captions, and numbers with their intervals.

Every function returns a matplotlib figure: white ground, so that it reads in dark mode and in print; axes with units and
the better direction; one sentence below that says what to see. One thing has one colour throughout: `PALETTE`.
Captions are drawn as they are: what a model wrote is never taken for a formula.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from dalleflamingo.datasets import Example, open_picture
from dalleflamingo.intervals import Interval
from dalleflamingo.reconstruct import rank
from dalleflamingo.scene_graph import Scene

OUTPUT = "DALLEFLAMINGO_OUTPUT"
PALETTE = {  # told apart by colour-blind eyes (Okabe and Ito) and, as each line has its own marker, in grey print
    "clip": "#0072B2",
    "dino": "#D55E00",
    "fidelity": "#009E73",
    "random": "#767676",
    "text": "#1a1a1a",
    "quiet": "#5c5c5c",
    "rule": "#c8c8c8",
    "ground": "#ffffff",
}
LABELS = {
    "clip": "CLIP",
    "dino": "DINO",
    "fidelity": "image fidelity",
    "f1": "scene-graph F1",
    "cider": "CIDEr",
    "all": "overall",
    "in-domain": "in domain",
    "near-domain": "near domain",
    "out-domain": "out of domain",
}
_MARKERS = {"clip": "o", "dino": "s", "fidelity": "^"}
_DPI = 144
_SIDE, _GAP, _LINE, _MARGIN = 256, 26, 19, 14  # pixels: a picture (64 × 64 four times), between two, a text line, border
_POINTS = 8.0
_LETTERS = 29  # of that size beside each other under a picture


@dataclass(frozen=True)
class Tile:
    """A picture with a line above it and text below."""

    picture: Image.Image
    text: str = ""
    heading: str = ""
    colour: str = PALETTE["text"]

    @property
    def lines(self) -> list[str]:
        return [line for part in self.text.split("\n") for line in textwrap.wrap(part, _LETTERS)]


def row(pictures: Sequence[Image.Image], captions: Sequence[str] = (), note: str = "") -> Figure:
    """Pictures side by side, each with its caption; arguments as `sheet`."""
    return sheet(pictures, captions, columns=max(1, len(pictures)), note=note)


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str] = (), columns: int = 4, note: str = "") -> Figure:
    """A contact sheet, row by row.

    Args:
        captions: one for each picture, or none.
        note: the sentence below that says what to see.
    Raises:
        ValueError: no pictures, or not as many captions as pictures.
    """
    if not pictures or (captions and len(captions) != len(pictures)):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: give a picture or more, each with its own")
    tiles = [Tile(picture, text) for picture, text in zip(pictures, captions or [""] * len(pictures), strict=True)]
    return _lay_out([tiles[start : start + columns] for start in range(0, len(tiles), columns)], note)


def ranking(example: Example, table: pd.DataFrame, run_folder: str | Path, by: str, columns: int = 5) -> Figure:
    """The source picture and, best to worst by similarity `by`, the pictures drawn from its candidate captions.

    Args:
        table: a candidate table (`reconstruct`). Its columns `f1` (scene-graph F1) and `cider` are shown where they are.
        run_folder: the folder that the table's picture paths start from.
        columns: candidates in a row.
    Raises:
        KeyError: the table has no column `by`. ValueError: it has no row of this image.
    """
    own = table[table["image_id"] == example.image_id]
    if own.empty:
        raise ValueError(f"the table has no row of image {example.image_id}: is it of another run or data set?")
    ordered = rank(own, by).sort_values("rank")
    colour = PALETTE.get(by, PALETTE["text"])
    candidates = [_candidate(entry, by, len(ordered), Path(run_folder), colour) for entry in ordered.to_dict("records")]
    human = f"a person: {example.references[0]}" if example.references else ""
    source = Tile(open_picture(example.path), human, "the picture to give back")
    lines = [candidates[start : start + columns] for start in range(0, len(candidates), columns)]
    note = (
        f"The picture (left) was captioned {len(ordered)} times and every caption drawn; best to worst by how like the "
        f"picture {LABELS.get(by, by)} finds the drawing. Does the better caption come first?"
    )
    return _lay_out([[source if i == 0 else None, *line] for i, line in enumerate(lines)], note)


def _candidate(entry: Mapping, by: str, count: int, run_folder: Path, colour: str) -> Tile:
    place = {1: " (best)", count: " (worst)"}.get(entry["rank"], "") if count > 1 else ""
    scores = [f"{LABELS[name]} {entry[name]:.2f}" for name in ("f1", "cider") if name in entry]
    text = "\n".join([entry["caption"].replace("\n", " "), *scores])
    heading = f"{entry['rank']}{place} · {LABELS.get(by, by)} {entry[by]:.2f}"
    return Tile(open_picture(run_folder / entry["picture"]), text, heading, colour)


def scene_graph(picture: Image.Image, scene: Scene) -> Figure:
    """A picture of the miniature world with its truth written beside it; a thing's dot stands on its centre."""
    figure = _blank(3 * _SIDE + 2 * _MARGIN, _SIDE + 2 * _MARGIN)
    axes = _place(figure, picture, _MARGIN, _MARGIN)
    zoom = _SIDE / picture.width
    facts = [f"ground: {scene.ground}"]
    for number, thing in enumerate(scene.things, start=1):
        spot = dict(ha="center", va="center", fontsize=_POINTS, weight="bold", color=PALETTE["text"])
        ring = dict(boxstyle="circle,pad=0.2", facecolor=PALETTE["ground"], edgecolor=PALETTE["text"], linewidth=0.8)
        axes.text(thing.x * zoom, thing.y * zoom, str(number), bbox=ring, **spot)
        facts.append(f"{number}  {thing.kind}: {thing.colour}, {thing.size}, centre ({thing.x:.0f}, {thing.y:.0f}) pixels")
    _write(figure, _MARGIN + _SIDE + _GAP, _MARGIN + _LINE, "\n\n".join(facts))
    return figure


def rank_curve(curves: Mapping[str, Sequence[Interval]], score: str, random: float | None = None) -> Figure:
    """A caption score against the rank that a similarity gives (Fig. 3): one line for each similarity.

    Args:
        curves: similarity -> the score over the whole data set at rank 1 … K, with its interval.
        score: what is measured, a key of `LABELS` or words; higher is better.
        random: the score of a candidate picked at random.
    """
    figure, axes = _axes()
    count = max(map(len, curves.values()))
    for i, (name, intervals) in enumerate(curves.items()):
        ranks = np.arange(1, len(intervals) + 1) + 0.08 * (i - (len(curves) - 1) / 2)  # bars beside, not on, each other
        _intervals(axes, ranks, intervals, name)
        axes.plot(ranks, [interval.value for interval in intervals], color=_colour(name), linewidth=1.4)
    if random is not None:
        axes.axhline(random, color=PALETTE["random"], linestyle="--", linewidth=1.2, label="random candidate")
    axes.set_xticks(range(1, count + 1))
    axes.set_xlabel(f"rank among the {count} candidates of a picture (1 = drawing most like the picture)")
    axes.set_ylabel(f"{LABELS.get(score, score)}  (better ↑)")
    n = next(iter(curves.values()))[0].n
    _finish(figure, axes, f"A line that falls from rank 1 on says: the caption that gives the picture back is the better "
            f"caption. n = {n} pictures; bars are 95 % intervals.")
    return figure


def gain_bars(gains: Mapping[str, Mapping[str, Interval]], score: str) -> Figure:
    """What ranking gains over picking at random, overall and by domain (Table 1).

    Args:
        gains: similarity -> {"all" or a domain: gain}, as `intervals.ranked_minus_random` returns it.
        score: as in `rank_curve`.
    """
    figure, axes = _axes()
    groups = list(dict.fromkeys(group for by_domain in gains.values() for group in by_domain))
    width = 0.8 / len(gains)
    for i, (name, by_domain) in enumerate(gains.items()):
        there = [group for group in groups if group in by_domain]
        middles = np.array([groups.index(group) for group in there]) + (i - (len(gains) - 1) / 2) * width
        values = [by_domain[group] for group in there]
        axes.bar(middles, [gain.value for gain in values], 0.9 * width, color=_colour(name), alpha=0.35)
        _intervals(axes, middles, values, name)
    axes.axhline(0, color=PALETTE["text"], linewidth=0.9)
    n = {group: next(by_domain[group].n for by_domain in gains.values() if group in by_domain) for group in groups}
    axes.set_xticks(range(len(groups)), [f"{LABELS.get(group, group)}\nn = {n[group]} pictures" for group in groups])
    axes.set_ylabel(f"{LABELS.get(score, score)}: ranked first − random\n(better ↑)")
    _finish(figure, axes, "Above 0, choosing the caption whose drawing is most like the picture beats choosing at random; "
            "bars are paired 95 % intervals, and one that holds 0 decides nothing.")
    return figure


def save(figure: Figure, name: str) -> Figure:
    """Save as `figures/NAME.png` in the folder that DALLEFLAMINGO_OUTPUT names; without one, save nothing.

    Returns:
        the figure, so that a cell that ends in `show.save(…)` shows it.
    """
    if folder := os.environ.get(OUTPUT):
        write(figure, Path(folder) / "figures" / f"{name}.png")
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=_DPI)
    os.replace(part, path)


def _lay_out(rows: Sequence[Sequence[Tile | None]], note: str) -> Figure:
    """Tiles in rows, at whole pixels so that every pixel of a small picture is a square of equal size."""
    width = 2 * _MARGIN + max(map(len, rows)) * (_SIDE + _GAP) - _GAP
    heights = [_height([tile for tile in line if tile]) for line in rows]
    sentence = _wrap(note, width)
    figure = _blank(width, 2 * _MARGIN + sum(heights) + _GAP * (len(rows) - 1) + _LINE * _lines(sentence))
    top = _MARGIN
    for line, height in zip(rows, heights, strict=True):
        above = _LINE if any(tile and tile.heading for tile in line) else 0
        for column, tile in enumerate(line):
            if tile:
                left = _MARGIN + column * (_SIDE + _GAP)
                _write(figure, left, top, tile.heading, color=tile.colour, weight="bold")
                _place(figure, tile.picture, left, top + above)
                _write(figure, left, top + above + _SIDE + 6, "\n".join(tile.lines))
        top += height + _GAP
    _write(figure, _MARGIN, top - _GAP // 2, sentence, color=PALETTE["quiet"], style="italic")
    return figure


def _height(tiles: Sequence[Tile]) -> int:
    above = _LINE if any(tile.heading for tile in tiles) else 0
    return above + _SIDE + _LINE * max(len(tile.lines) for tile in tiles)


def _blank(width: int, height: int) -> Figure:
    figure = plt.figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor=PALETTE["ground"])
    plt.close(figure)  # the cell shows what it returns; pyplot would show it a second time
    return figure


def _place(figure: Figure, picture: Image.Image, left: int, top: int):
    """Axes in pixels of the figure, a picture in their middle."""
    width, height = (figure.get_size_inches() * _DPI).round()
    axes = figure.add_axes((left / width, 1 - (top + _SIDE) / height, _SIDE / width, _SIDE / height))
    fitted = _fit(picture.convert("RGB"))
    x, y = (_SIDE - fitted.width) // 2, (_SIDE - fitted.height) // 2
    axes.imshow(np.asarray(fitted), interpolation="none", extent=(x, x + fitted.width, y + fitted.height, y))
    axes.set(xlim=(0, _SIDE), ylim=(_SIDE, 0))
    axes.axis("off")
    return axes


def _fit(picture: Image.Image) -> Image.Image:
    """Into the square of a tile: small pictures by a whole factor, every pixel a square; large ones made smaller."""
    factor = _SIDE // max(picture.size)
    if factor > 0:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    fitted = picture.copy()
    fitted.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return fitted


def _write(figure: Figure, left: float, top: float, text: str, **style) -> None:
    width, height = figure.get_size_inches() * _DPI
    style = {"fontsize": _POINTS, "color": PALETTE["text"], "linespacing": 1.1, **style}
    figure.text(left / width, 1 - top / height, text, va="top", parse_math=False, **style)


def _wrap(sentence: str, width: int) -> str:
    return "\n".join(textwrap.wrap(sentence, width * _LETTERS // _SIDE))


def _lines(text: str) -> int:
    return text.count("\n") + 2 if text else 0


def _axes():
    figure = _blank(6 * _DPI, 4 * _DPI)
    axes = figure.add_axes((0.13, 0.3, 0.84, 0.66))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=_POINTS)
    return figure, axes


def _intervals(axes, places: np.ndarray, intervals: Sequence[Interval], name: str) -> None:
    """Points with their intervals; a percentile interval need not hold its value, so bars are drawn apart from it."""
    style = dict(color=_colour(name), zorder=3)
    axes.vlines(places, [interval.low for interval in intervals], [interval.high for interval in intervals], **style)
    values = [interval.value for interval in intervals]
    label = f"ranked by {LABELS.get(name, name)}"
    axes.plot(places, values, _MARKERS.get(name, "D"), markersize=5, label=label, **style)


def _colour(name: str) -> str:
    return PALETTE.get(name, PALETTE["text"])


def _finish(figure: Figure, axes, note: str) -> None:
    axes.xaxis.label.set_size(_POINTS + 1)
    axes.yaxis.label.set_size(_POINTS + 1)
    axes.legend(frameon=False, fontsize=_POINTS)
    sentence = _wrap(note, 6 * _DPI - 2 * _MARGIN)
    _write(figure, _MARGIN, 4 * _DPI - _LINE * _lines(sentence), sentence, color=PALETTE["quiet"], style="italic")
