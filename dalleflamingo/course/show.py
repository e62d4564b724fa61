"""Figures of the notebooks: images with their captions, and numbers with their intervals.

Every function returns a matplotlib figure: white ground, which reads in dark mode and in print; axes with units and the
better direction; one sentence below that says what to see. One thing has one colour throughout the course:
`layout.PALETTE`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from dalleflamingo.course import layout
from dalleflamingo.course.layout import DPI, FONT_SIZE, MARGIN, PALETTE, Panel
from dalleflamingo.datasets import Example, open_image
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.miniature.scene_graph import Scene, main_relation
from dalleflamingo.reconstruct import rank
from dalleflamingo.runs import write_whole
from dalleflamingo.tokens import END_OF_WORD

OUTPUT = "DALLEFLAMINGO_OUTPUT"
LABELS = {  # similarities, metrics and domains, as figures and tables of the course name them
    "clip": "CLIP",
    "dino": "DINO",
    "fidelity": "image fidelity",
    "text_clip": "CLIP text",
    "text_sbert": "SBERT",
    "text_cider": "CIDEr",
    "text_wmd": "WMD",
    "f1": "scene-graph F1",
    "found": "things found",
    "wmd": "WMD",
    "clip_distance": "CLIP distance × 100",
    "dino_distance": "DINO distance × 100",
    "fid": "FID",
    "is": "Inception Score",
    "cider": "CIDEr",
    "all": "overall",
    "in-domain": "in domain",
    "near-domain": "near domain",
    "out-domain": "out of domain",
}
_MARKERS = {  # so that grey print tells them apart too
    "clip": "o",
    "dino": "s",
    "fidelity": "^",
    "text_clip": "o",
    "text_sbert": "s",
    "text_cider": "^",
}
_OTHER_STYLES = (  # colour and marker of lines that are no similarity's, one after another
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#E69F00", "v"),
)
_RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_CHART = 6 * DPI, 4 * DPI


def row(
    images: Sequence[Image.Image], captions: Sequence[str] = (), note: str = "", headings: Sequence[str] = ()
) -> Figure:
    """Images side by side.

    Args:
        images: from left to right.
        captions: text below the images, one for each or none at all.
        note: the sentence below all that says what to see.
        headings: text above the images, one for each or none at all.
    Raises:
        ValueError: no images, or not as many captions or headings as images.
    """
    return sheet(images, captions, max(1, len(images)), note, headings)


def sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str] = (),
    columns: int = 4,
    note: str = "",
    headings: Sequence[str] = (),
) -> Figure:
    """A contact sheet, row by row.

    Args:
        images: in reading order.
        captions: text below the images, one for each or none at all.
        columns: images in a row.
        note: the sentence below all that says what to see.
        headings: text above the images, one for each or none at all.
    Raises:
        ValueError: no images, or not as many captions or headings as images.
    """
    for what, texts in (("captions", captions), ("headings", headings)):
        if not images or (texts and len(texts) != len(images)):
            raise ValueError(f"{len(images)} images and {len(texts)} {what}: each image needs its own")
    none = [""] * len(images)
    panels = [
        Panel(image, caption, heading=heading)
        for image, caption, heading in zip(images, captions or none, headings or none, strict=True)
    ]
    return layout.arrange(layout.in_rows(panels, columns), note)


def ranked_captions(example: Example, table: pd.DataFrame, run_folder: str | Path, by: str, columns: int = 5) -> Figure:
    """An image and, best to worst by a similarity, its candidate captions with the image generated from each.

    Args:
        example: the input image.
        table: a candidate table of `reconstruct.image_text_image`; its columns `f1` (of the scene graph), `cider` and
            `found` are shown where there are such.
        run_folder: where the table's image paths start.
        by: the similarity, a column of the table.
        columns: candidates in a row.
    Raises:
        KeyError: the table has no column `by`.
        ValueError: it has no row of this image.
    """
    candidates = _ranked(table, example.image_id, by)
    panels = [_candidate(entry, entry["caption"], by, len(candidates), Path(run_folder)) for entry in candidates]
    human = f"“{example.references[0]}”" if example.references else ""
    source = Panel(open_image(example.path), human, ("in a person's words",) if human else (), "the input image")
    note = (
        f"One image (left), {len(panels)} captions that the captioner wrote for it, and the image generated from each, "
        f"ordered by similarity to the input image ({label(by)}). Does the better caption come first?"
    )
    rows = layout.in_rows(panels, columns)
    return layout.arrange([[None if i else source, *panels] for i, panels in enumerate(rows)], note)


def ranked_images(table: pd.DataFrame, image_id: int, run_folder: str | Path, by: str, columns: int = 5) -> Figure:
    """The images generated from one caption, best to worst by a similarity, each with its own caption.

    Args:
        table: a candidate table of `reconstruct.text_image_text`; `found` is shown where there is such a column.
        image_id: of the real image whose caption was given.
        run_folder: where the table's image paths start.
        by: the similarity, a column of the table.
        columns: images in a row.
    Raises:
        KeyError: the table has no column `by`.
        ValueError: it has no row of this image.
    """
    candidates = _ranked(table, image_id, by)
    panels = [_candidate(entry, entry["recovered"], by, len(candidates), Path(run_folder)) for entry in candidates]
    note = (
        f"Generated from “{candidates[0]['caption']}”. Below each image is the captioner's caption of it; "
        f"the order is by that caption's similarity to the input ({label(by)}). Does the better image come first?"
    )
    return layout.arrange(layout.in_rows(panels, columns), note)


def _ranked(table: pd.DataFrame, image_id: int, by: str) -> list[dict]:
    own = table[table["image_id"] == image_id]
    if own.empty:
        raise ValueError(f"the table has no row of image {image_id}: is it of another run or data set?")
    return rank(own, by).sort_values("rank").to_dict("records")


def _candidate(entry: Mapping, caption: str, by: str, count: int, run_folder: Path) -> Panel:
    extreme = {1: ", most similar", count: ", least similar"}.get(entry["rank"], "") if count > 1 else ""
    measured = [name for name in (by, "f1", "cider", "found") if name in entry]
    return Panel(
        open_image(run_folder / entry["image"]),
        f"“{caption}”",
        tuple(f"{label(name)} {entry[name]:.2f}" for name in measured),
        f"{entry['rank']}{extreme}",
        PALETTE.get(by, PALETTE["text"]),
    )


def scene_graph(image: Image.Image, scene: Scene) -> Figure:
    """An image of the miniature world with its truth beside it.

    Args:
        image: square.
        scene: what the image shows; the number of a thing is written on its centre.
    """
    figure = layout.new_figure(3 * layout.IMAGE_SIZE, layout.IMAGE_SIZE + 2 * MARGIN)
    axes = layout.add_image(figure, image, MARGIN, MARGIN)
    zoom = layout.IMAGE_SIZE / image.width
    facts = [f"ground: {scene.ground}"]
    ring = dict(boxstyle="circle,pad=0.2", facecolor=PALETTE["ground"], edgecolor=PALETTE["text"], linewidth=0.8)
    style = dict(bbox=ring, color=PALETTE["text"], fontsize=FONT_SIZE, weight="bold", ha="center", va="center")
    for number, thing in enumerate(scene.things, start=1):
        axes.text(thing.x * zoom, thing.y * zoom, str(number), **style)
        facts.append(
            f"{number}   {thing.kind}: {thing.colour}, {thing.size},\n"
            f"     {thing.x:.0f} pixels from the left, {thing.y:.0f} from above"
        )
    numbered = combinations(enumerate(scene.things, start=1), 2)
    facts += [f"{i} is {_RELATIONS[main_relation(one, other)]} {j}" for (i, one), (j, other) in numbered]
    left = MARGIN + layout.IMAGE_SIZE + layout.GAP
    layout.add_text(figure, left, MARGIN + layout.LINE_HEIGHT, "\n\n".join(facts))
    return figure


def rank_curve(
    curves: Mapping[str, Sequence[Interval]],
    score: str,
    random: float | None = None,
    lower: bool = False,
    of: str = "insight-1",
) -> Figure:
    """A score against the rank that a similarity gives (Figs. 3 and 4): one line for each similarity.

    Args:
        curves: similarity -> the score over the whole data set at rank 1 … K, with its interval.
        score: what is measured, a key of `LABELS` or words.
        random: the score of candidates picked at random; None for no such line.
        lower: the score is better when lower; the axis is turned over.
        of: "insight-1" ranks captions by their generated images, "insight-2" generated images by their captions.
    """
    figure, axes = _chart()
    longest = max(curves.values(), key=len)
    styles = _styles(curves)
    for i, (name, intervals) in enumerate(curves.items()):
        ranks = np.arange(1, len(intervals) + 1) + _offset(i, curves, 0.15)
        axes.plot(ranks, [interval.value for interval in intervals], color=styles[name][0], linewidth=1.2)
        _intervals(axes, ranks, intervals, styles[name], _line_label(name))
    if random is not None:
        axes.axhline(random, color=PALETTE["random"], linestyle="--", linewidth=1.2, label="random pick")
    axes.set_xticks(range(1, len(longest) + 1))
    ranked, back, source = {
        "insight-1": ("caption", "generated image", "image"),
        "insight-2": ("generated image", "recovered caption", "caption"),
    }[of]
    axes.set_xlabel(f"rank among the {len(longest)} candidates of each {source} (1 = {back} most like the {source})")
    axes.yaxis.set_inverted(lower)
    note = (
        f"If a line falls from rank 1 on, the {ranked} whose {back} is most like the input {source} is the better "
        f"{ranked}. Bars are 95 % intervals over n = {longest[0].n} {source}s."
    )
    return _finish(figure, axes, f"{label(score)}  (better ↑)", note)


def lines(
    curves: Mapping[str, Mapping[float, Interval]], score: str, xlabel: str, note: str, lower: bool = False
) -> Figure:
    """A score against a setting.

    Args:
        curves: label of a line -> {setting: interval}. A similarity's name is written as `LABELS` has it.
        score: what is measured, in words.
        xlabel: what the setting is, with its unit.
        note: a sentence that says what to see.
        lower: the score is better when lower; the axis is turned over.
    """
    figure, axes = _chart()
    styles = _styles(curves)
    settings = {setting for points in curves.values() for setting in points}
    step = 0.012 * (max(settings) - min(settings))
    for i, (name, points) in enumerate(curves.items()):
        x = np.array(list(points), float) + _offset(i, curves, step)
        axes.plot(x, [interval.value for interval in points.values()], color=styles[name][0], linewidth=1.2)
        _intervals(axes, x, list(points.values()), styles[name], _line_label(name))
    axes.set_xlabel(xlabel)
    axes.yaxis.set_inverted(lower)
    return _finish(figure, axes, f"{score}  (better ↑)", note)


def gain_bars(gains: Mapping[str, Mapping[str, Interval]], score: str, lower: bool = False) -> Figure:
    """What ranking gains over picking at random, overall and by domain (Tables 1 and 2).

    Args:
        gains: similarity -> {"all" or a domain: gain}, as `research.ranking.gains` returns it.
        score: what is measured, a key of `LABELS` or words.
        lower: the score is better when lower; the axis is turned over.
    """
    figure, axes = _chart()
    n = {group: gain.n for by_domain in gains.values() for group, gain in by_domain.items()}
    groups, width = list(n), 0.8 / len(gains)
    styles = _styles(gains)
    for i, (name, by_domain) in enumerate(gains.items()):
        middles = np.array([groups.index(group) for group in by_domain]) + _offset(i, gains, width)
        values = [gain.value for gain in by_domain.values()]
        axes.bar(middles, values, 0.9 * width, color=styles[name][0], alpha=0.35)
        _intervals(axes, middles, list(by_domain.values()), styles[name], _line_label(name))
    axes.axhline(0, color=PALETTE["text"], linewidth=0.9)
    axes.set_xticks(range(len(groups)), [f"{label(group)}\nn = {n[group]} images" for group in groups])
    axes.yaxis.set_inverted(lower)
    note = (
        "Above the line, the candidate ranked first beats a random one. Bars are paired 95 % intervals; one that "
        "contains 0 decides nothing."
    )
    return _finish(figure, axes, f"{label(score)}, ranked first − random  (better ↑)", note)


def shares(found: Mapping[str, Mapping[str, Interval]], chance: Mapping[str, float], measure: str, note: str) -> Figure:
    """How often something is right, by group: a point for each similarity, a dashed line where chance is.

    Args:
        found: similarity -> group -> share in [0, 1].
        chance: group -> the share that chance has, for every group.
        measure: what the share is of, in words.
        note: a sentence that says what to see.
    """
    figure, axes = _chart()
    groups, styles = list(chance), _styles(found)
    for i, (name, by_group) in enumerate(found.items()):
        middles = np.array([groups.index(group) for group in by_group]) + _offset(i, found, 0.2)
        _intervals(axes, middles, list(by_group.values()), styles[name], label(name))
    middles, width = np.arange(len(groups)), 0.42
    style = dict(color=PALETTE["random"], linestyle="--", linewidth=1.2, label="chance")
    axes.hlines(list(chance.values()), middles - width, middles + width, **style)
    axes.set_xticks(middles, groups)
    axes.set_ylim(0, 1.02)
    return _finish(figure, axes, f"{measure}  (better ↑)", note)


def words(texts: Sequence[str], values: Sequence[float], note: str = "") -> Figure:
    """Words in a row, each on a ground whose colour and depth show its value: blue above 0, pink below.

    Args:
        texts: the words.
        values: a number for each.
        note: a sentence that says what to see.
    Raises:
        ValueError: not as many values as words.
    """
    if len(texts) != len(values):
        raise ValueError(f"{len(texts)} words and {len(values)} values: each word needs its own")
    values = np.asarray(values, float)
    largest = np.abs(values).max(initial=0)
    sentences = f"{note} The deepest colour is {largest:.2g}.".strip()
    width, row = max(400, 26 + 13 * sum(len(text) + 2 for text in texts)), 70
    height = row + layout.note_height(layout.wrap(sentences, width - 2 * MARGIN))
    figure = layout.new_figure(width, height)
    axes = figure.add_axes((0, 1 - row / height, 1, row / height))
    axes.axis("off")
    x = 0.02
    for text, share in zip(texts, values / max(largest, 1e-12), strict=True):
        colour = PALETTE["more" if share > 0 else "less"]
        ground = dict(facecolor=to_rgba(colour, 0.8 * abs(share)), edgecolor="none")
        word = axes.text(x, 0.4, text, fontsize=10, parse_math=False, bbox=ground)
        x += word.get_window_extent().width / figure.bbox.width + 0.02
    layout.add_note(figure, sentences)
    return figure


def words_tokenized_differently(table: pd.DataFrame, names: tuple[str, str], note: str) -> Figure:
    """A bar for each word that two tokenizers split differently, as long as it is frequent, with both splits beside it.

    Args:
        table: as `evaluation.vocabulary_report.words_tokenized_differently` makes it.
        names: of the two tokenizers, source and target.
        note: a sentence that says what to see.
    """
    width = 1000
    figure = layout.new_figure(width, 150 + 38 * len(table))
    axes = figure.add_axes((0.15, 0.2, 0.65, 0.76))
    finer = np.sign(table["source"].map(len) - table["target"].map(len)).to_numpy()
    sides = (1, f"{names[0]} splits it finer", "wordpiece"), (-1, f"{names[1]} splits it finer", "clip")
    for sign, label, colour in (*sides, (0, "as many tokens, others", "quiet")):
        [positions] = np.nonzero(finer == sign)
        if len(positions):
            axes.barh(positions, table["count"].to_numpy()[positions], color=PALETTE[colour], label=label)
    for position, row in enumerate(table.itertuples()):
        splits = " | ".join("·".join(side).replace(f"{END_OF_WORD}·", " ") for side in (row.source, row.target))
        text = f" {splits.replace(END_OF_WORD, '')}"
        axes.text(row.count, position, text, va="center", fontsize=7, parse_math=False)
    axes.set_yticks(range(len(table)), table["word"], fontsize=8, parse_math=False)
    axes.set_xlabel("occurrences", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    layout.add_note(figure, note)
    return figure


def save(figure: Figure, name: str) -> Figure:
    """Save as `figures/NAME.png` in the folder that DALLEFLAMINGO_OUTPUT names; where it names none, save nothing.

    Args:
        figure: any figure of this module.
        name: of the file, without suffix.
    Returns:
        the figure, so that a cell that ends in `show.save(…)` shows it.
    """
    if folder := os.environ.get(OUTPUT):
        write_png(figure, Path(folder) / "figures" / f"{name}.png")
    return figure


def write_png(figure: Figure, path: Path) -> None:
    """Write the file whole or not at all, and the folders that it needs.

    Args:
        figure: any figure of this module.
        path: of the PNG file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=DPI))


def label(name: str) -> str:
    """How figures and tables name a similarity, metric or domain: as `LABELS` has it, else by the name itself.

    Args:
        name: of a column, or in one.
    """
    return LABELS.get(name, name)


def _line_label(name: str) -> str:
    return f"ranked by {LABELS[name]}" if name in LABELS else name


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each line: a similarity's own, or the next ones that no other line has."""
    own = {name: (PALETTE[name], _MARKERS.get(name, "D")) for name in names if name in PALETTE}
    taken = {colour for colour, _ in own.values()}
    free = iter([style for style in _OTHER_STYLES if style[0] not in taken])
    return {name: own.get(name) or next(free, (PALETTE["text"], "D")) for name in names}


def _offset(i: int, lines: Mapping, step: float) -> float:
    """How far line `i` is moved along the x axis, so that no interval hides another."""
    return step * (i - (len(lines) - 1) / 2)


def _chart() -> tuple[Figure, Axes]:
    figure = layout.new_figure(*_CHART)
    axes = figure.add_axes((0.12, 0.24, 0.86, 0.68))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT_SIZE)
    return figure, axes


def _intervals(axes: Axes, x: np.ndarray, intervals: Sequence[Interval], style: tuple[str, str], label: str) -> None:
    """Values and their bounds, drawn apart: a percentile interval need not hold its value."""
    colour, marker = style
    lows, highs = [interval.low for interval in intervals], [interval.high for interval in intervals]
    axes.vlines(x, lows, highs, color=colour, zorder=3)
    values = [interval.value for interval in intervals]
    axes.plot(x, values, marker, markersize=5, color=colour, label=label, zorder=3)


def _finish(figure: Figure, axes: Axes, measure: str, note: str) -> Figure:
    axes.set_ylabel(measure, fontsize=FONT_SIZE)
    axes.xaxis.label.set_size(FONT_SIZE)
    close = dict(columnspacing=1.2, handletextpad=0.3, borderaxespad=0.2)
    in_a_row = 4
    if len(axes.get_legend_handles_labels()[1]) > in_a_row:  # two rows, and room for them
        in_a_row = 3
        left, bottom, width, height = axes.get_position().bounds
        axes.set_position((left, bottom, width, height - 0.06))
    axes.legend(frameon=False, fontsize=FONT_SIZE, loc="lower left", bbox_to_anchor=(0, 1), ncols=in_a_row, **close)
    layout.add_note(figure, note)
    return figure
