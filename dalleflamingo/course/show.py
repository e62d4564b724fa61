"""What the notebooks draw with: pictures with their captions, and numbers with their intervals.

Every function returns a matplotlib figure: white ground, which reads in dark mode and in print; axes with units and the
better direction; one sentence below that says what to see. One thing has one colour throughout the course: `PALETTE`.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from dalleflamingo.course import layout
from dalleflamingo.course.layout import DPI, MARGIN, PALETTE, POINTS, Tile
from dalleflamingo.datasets import Example, open_image
from dalleflamingo.intervals import Interval
from dalleflamingo.miniature.scene_graph import Scene, main_relation
from dalleflamingo.reconstruct import rank
from dalleflamingo.tokens import END_OF_WORD

OUTPUT = "DALLEFLAMINGO_OUTPUT"
LABELS = {
    "clip": "CLIP",
    "dino": "DINO",
    "fidelity": "image fidelity",
    "pixels": "pixels",
    "text_clip": "CLIP's text",
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
# so that grey print tells them apart too
_MARKERS = {"clip": "o", "dino": "s", "fidelity": "^", "text_clip": "o", "text_sbert": "s", "text_cider": "^",
            "noise": "o", "blur": "s", "the picture": "o", "x̂": "s"}  # fmt: skip
_SIDES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_WIDTH, _HEIGHT = 6 * DPI, 4 * DPI  # of a chart


def row(
    pictures: Sequence[Image.Image], captions: Sequence[str] = (), note: str = "", headings: Sequence[str] = ()
) -> Figure:
    """Pictures side by side; arguments and errors as `sheet`."""
    return sheet(pictures, captions, max(1, len(pictures)), note, headings)


def sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str] = (),
    columns: int = 4,
    note: str = "",
    headings: Sequence[str] = (),
) -> Figure:
    """A contact sheet, row by row.

    Args:
        captions, headings: text below and above, one for each picture or none at all.
        note: the sentence below all that says what to see.
    Raises:
        ValueError: no pictures, or not as many captions or headings as pictures.
    """
    for what, texts in (("captions", captions), ("headings", headings)):
        if not pictures or (texts and len(texts) != len(pictures)):
            raise ValueError(f"{len(pictures)} pictures and {len(texts)} {what}: each needs its own")
    none = [""] * len(pictures)
    drawn = [
        Tile(picture, caption, heading=heading)
        for picture, caption, heading in zip(pictures, captions or none, headings or none, strict=True)
    ]
    return layout.lay_out([drawn[start : start + columns] for start in range(0, len(drawn), columns)], note)


def ranking(example: Example, table: pd.DataFrame, run_folder: str | Path, by: str, columns: int = 5) -> Figure:
    """The source picture and, best to worst by similarity `by`, the pictures drawn from its candidate captions.

    Args:
        table: a candidate table as `reconstruct` makes it; its columns `f1` (of the scene graph) and `cider` are shown
            where there are such.
        run_folder: where the table's picture paths start.
        columns: candidates in a row.
    Raises:
        KeyError: the table has no column `by`. ValueError: it has no row of this image.
    """
    own = table[table["image_id"] == example.image_id]
    if own.empty:
        raise ValueError(f"the table has no row of image {example.image_id}: is it of another run or data set?")
    ordered = rank(own, by).sort_values("rank").to_dict("records")
    candidates = [_candidate(entry, by, len(ordered), Path(run_folder)) for entry in ordered]
    human = f"“{example.references[0]}”" if example.references else ""
    source = Tile(open_image(example.path), human, ("in a person's words",) if human else (), "the picture")
    lines = [candidates[start : start + columns] for start in range(0, len(candidates), columns)]
    note = (
        f"One picture (left), {len(ordered)} captions that a model wrote for it and what another model drew from each, "
        f"ordered by how like the picture {LABELS.get(by, by)} finds the drawing. Does the better caption come first?"
    )
    return layout.lay_out([[None if i else source, *line] for i, line in enumerate(lines)], note)


def _candidate(entry: Mapping, by: str, count: int, run_folder: Path) -> Tile:
    place = {1: ", most like it", count: ", least like it"}.get(entry["rank"], "") if count > 1 else ""
    measured = [name for name in (by, "f1", "cider", "found") if name in entry]
    return Tile(
        open_image(run_folder / entry["picture"]),
        f"“{entry['caption']}”",
        tuple(f"{LABELS.get(name, name)} {entry[name]:.2f}" for name in measured),
        f"{entry['rank']}{place}",
        _colour(by),
    )


def pictures_ranked(table: pd.DataFrame, image_id: int, run_folder: str | Path, by: str, columns: int = 5) -> Figure:
    """The pictures drawn from one caption, best to worst by similarity `by`, each with what was said of it.

    Args:
        table: a candidate table of `reconstruct.text_image_text`; `found` is shown where there is such a column.
        run_folder, columns: as in `ranking`. Errors as `ranking`.
    """
    own = table[table["image_id"] == image_id]
    if own.empty:
        raise ValueError(f"the table has no row of image {image_id}: is it of another run or data set?")
    ordered = rank(own, by).sort_values("rank").to_dict("records")
    said = [entry | {"caption": entry["recovered"]} for entry in ordered]
    drawn = [_candidate(entry, by, len(ordered), Path(run_folder)) for entry in said]
    lines = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    note = (
        f"Drawn from “{ordered[0]['caption']}”. Below each picture what the captioner said of it; {LABELS.get(by, by)} "
        "orders them by how like the caption that is. Does the better picture come first?"
    )
    return layout.lay_out(lines, note)


def scene_graph(picture: Image.Image, scene: Scene) -> Figure:
    """A picture of the miniature world with its truth beside it; a thing's number stands on its centre."""
    figure = layout.blank(3 * layout.SIDE, layout.SIDE + 2 * MARGIN)
    axes = layout.place(figure, picture, MARGIN, MARGIN)
    zoom = layout.SIDE / picture.width
    facts = [f"ground: {scene.ground}"]
    ring = dict(boxstyle="circle,pad=0.2", facecolor=PALETTE["ground"], edgecolor=PALETTE["text"], linewidth=0.8)
    for number, thing in enumerate(scene.things, start=1):
        axes.text(
            thing.x * zoom, thing.y * zoom, str(number), bbox=ring, color=PALETTE["text"],
            fontsize=POINTS, weight="bold", ha="center", va="center",
        )  # fmt: skip
        facts.append(
            f"{number}   {thing.kind}: {thing.colour}, {thing.size},\n"
            f"     {thing.x:.0f} pixels from the left, {thing.y:.0f} from above"
        )
    numbered = combinations(enumerate(scene.things, start=1), 2)
    facts += [f"{i} is {_SIDES[main_relation(one, other)]} {j}" for (i, one), (j, other) in numbered]
    layout.write(figure, MARGIN + layout.SIDE + layout.GAP, MARGIN + layout.LINE, "\n\n".join(facts))
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
        score: what is measured, a key of `LABELS` or words. lower: it is better when lower; the axis is turned over.
        random: the score of candidates picked at random.
        of: "insight-1" ranks captions by their drawings, "insight-2" pictures by their descriptions.
    """
    figure, axes = _chart()
    longest = max(curves.values(), key=len)
    for i, (name, intervals) in enumerate(curves.items()):
        # beside each other, so that no bar hides another
        ranks = np.arange(1, len(intervals) + 1) + 0.15 * (i - (len(curves) - 1) / 2)
        axes.plot(ranks, [interval.value for interval in intervals], color=_colour(name), linewidth=1.2)
        _intervals(axes, ranks, intervals, name)
    if random is not None:
        axes.axhline(random, color=PALETTE["random"], linestyle="--", linewidth=1.2, label="at random")
    axes.set_xticks(range(1, len(longest) + 1))
    names = {"insight-1": ("caption", "drawing", "picture"), "insight-2": ("picture", "text", "caption")}
    ranked, reconstruction, source = names[of]
    axes.set_xlabel(
        f"rank among the {len(longest)} candidates of a {source} (1 = {reconstruction} most like the {source})"
    )
    axes.yaxis.set_inverted(lower)
    note = (
        f"A line that falls from rank 1 on says: the {ranked} whose {reconstruction} is most like the {source} is the "
        f"better {ranked}. Bars are 95 % intervals over n = {longest[0].n} {source}s."
    )
    return _finish(figure, axes, f"{LABELS.get(score, score)}  (better ↑)", note)


def lines(
    curves: Mapping[str, Mapping[float, Interval]], score: str, xlabel: str, note: str, lower: bool = False
) -> Figure:
    """A score against a setting.

    Args:
        curves: name -> {setting: interval}; a name that is no similarity's is drawn in grey.
        lower: the score is better when lower; the axis is turned over.
    """
    figure, axes = _chart()
    settings = {setting for points in curves.values() for setting in points}
    apart = 0.012 * (max(settings) - min(settings))  # beside each other, so that no bar hides another
    for i, (name, points) in enumerate(curves.items()):
        places = np.array(list(points), float) + apart * (i - (len(curves) - 1) / 2)
        intervals = list(points.values())
        colour = PALETTE.get(name, PALETTE["random"])
        axes.plot(places, [interval.value for interval in intervals], color=colour, linewidth=1.2)
        label = f"ranked by {LABELS[name]}" if name in LABELS else name
        _intervals(axes, places, intervals, name, label)
    axes.set_xlabel(xlabel)
    axes.yaxis.set_inverted(lower)
    return _finish(figure, axes, f"{score}  (better ↑)", note)


def gain_bars(gains: Mapping[str, Mapping[str, Interval]], score: str, lower: bool = False) -> Figure:
    """What ranking gains over picking at random, overall and by domain (Tables 1 and 2).

    Args:
        gains: similarity -> {"all" or a domain: gain}, as `intervals.ranked_minus_random` returns it.
        score, lower: as in `rank_curve`.
    """
    figure, axes = _chart()
    n = {group: gain.n for by_domain in gains.values() for group, gain in by_domain.items()}
    groups, width = list(n), 0.8 / len(gains)
    for i, (name, by_domain) in enumerate(gains.items()):
        middles = np.array([groups.index(group) for group in by_domain]) + (i - (len(gains) - 1) / 2) * width
        values = [gain.value for gain in by_domain.values()]
        axes.bar(middles, values, 0.9 * width, color=_colour(name), alpha=0.35)
        _intervals(axes, middles, list(by_domain.values()), name)
    axes.axhline(0, color=PALETTE["text"], linewidth=0.9)
    axes.set_xticks(range(len(groups)), [f"{LABELS.get(group, group)}\nn = {n[group]} pictures" for group in groups])
    axes.yaxis.set_inverted(lower)
    note = (
        "Above the line, the candidate that gives its source back best beats a random one. Bars are paired 95 % "
        "intervals; one that holds 0 decides nothing."
    )
    return _finish(figure, axes, f"{LABELS.get(score, score)}, ranked first − random  (better ↑)", note)


def words(texts: Sequence[str], values: Sequence[float], note: str = "") -> Figure:
    """Words in a row, each on a ground whose colour and depth tell its value: blue above 0, pink below.

    Raises:
        ValueError: not as many values as words.
    """
    if len(texts) != len(values):
        raise ValueError(f"{len(texts)} words and {len(values)} values: each word needs its own")
    values = np.asarray(values, float)
    shares = values / max(np.abs(values).max(initial=0), 1e-12)
    figure = layout.blank(max(400, 26 + 13 * sum(len(text) + 2 for text in texts)), 120)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    place = 0.02
    for text, share in zip(texts, shares, strict=True):
        colour = PALETTE["more" if share > 0 else "less"]
        ground = dict(facecolor=to_rgba(colour, 0.8 * abs(share)), edgecolor="none")
        word = axes.text(place, 0.6, text, fontsize=10, parse_math=False, bbox=ground)
        place += word.get_window_extent().width / figure.bbox.width + 0.02
    deepest = f"The deepest colour is {np.abs(values).max(initial=0):.2g}."
    axes.text(0.02, 0.12, f"{note} {deepest}".strip(), fontsize=8, style="italic")
    return figure


def words_cut_differently(table: pd.DataFrame, names: tuple[str, str], note: str) -> Figure:
    """A bar for each word that two tokenizers cut differently, as long as it is frequent, with both cuts beside it.

    Args:
        table: as `subwords.words_tokenized_differently` makes it. names: of the tokenizers, source and target.
    """
    height = 150 + 38 * len(table)
    figure = layout.blank(1000, height)
    axes = figure.add_axes((0.15, 0.2, 0.65, 0.76))
    finer = np.sign(table["source"].map(len) - table["target"].map(len)).to_numpy()
    sides = (1, f"{names[0]} cuts it finer", "wordpiece"), (-1, f"{names[1]} cuts it finer", "clip")
    for sign, label, colour in (*sides, (0, "as fine, elsewhere", "quiet")):
        [places] = np.nonzero(finer == sign)
        if len(places):
            axes.barh(places, table["count"].to_numpy()[places], color=PALETTE[colour], label=label)
    for place, row in enumerate(table.itertuples()):
        cuts = " | ".join("·".join(side).replace(f"{END_OF_WORD}·", " ") for side in (row.source, row.target))
        axes.text(row.count, place, f" {cuts.replace(END_OF_WORD, '')}", va="center", fontsize=7, parse_math=False)
    axes.set_yticks(range(len(table)), table["word"], fontsize=8, parse_math=False)
    axes.set_xlabel("occurrences", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    sentence = layout.wrap(note, 1000 - 2 * MARGIN)
    top = height - layout.text_height(sentence)
    layout.write(figure, MARGIN, top, sentence, color=PALETTE["quiet"], style="italic")
    return figure


def save(figure: Figure, name: str) -> Figure:
    """Save as `figures/NAME.png` in the folder that DALLEFLAMINGO_OUTPUT names; where it names none, save nothing.

    Returns:
        the figure, so that a cell that ends in `show.save(…)` shows it.
    """
    if folder := os.environ.get(OUTPUT):
        write_png(figure, Path(folder) / "figures" / f"{name}.png")
    return figure


def write_png(figure: Figure, path: Path) -> None:
    """Write the file whole or not at all, and the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="png", dpi=DPI)
    os.replace(part, path)


def _chart() -> tuple[Figure, Axes]:
    figure = layout.blank(_WIDTH, _HEIGHT)
    axes = figure.add_axes((0.12, 0.24, 0.86, 0.68))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALETTE["rule"], linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=POINTS)
    return figure, axes


def _intervals(
    axes: Axes, places: np.ndarray, intervals: Sequence[Interval], name: str, label: str | None = None
) -> None:
    """Values and their bounds, drawn apart: a percentile interval need not hold its value."""
    style = dict(color=_colour(name), zorder=3)
    axes.vlines(places, [interval.low for interval in intervals], [interval.high for interval in intervals], **style)
    values = [interval.value for interval in intervals]
    marker = _MARKERS.get(name, "D")
    axes.plot(places, values, marker, markersize=5, label=label or f"ranked by {LABELS.get(name, name)}", **style)


def _colour(name: str) -> str:
    return PALETTE.get(name, PALETTE["text"])


def _finish(figure: Figure, axes: Axes, measure: str, note: str) -> Figure:
    axes.set_ylabel(measure, fontsize=POINTS)
    axes.xaxis.label.set_size(POINTS)
    close = dict(columnspacing=1.2, handletextpad=0.3, borderaxespad=0.2)
    in_a_row = 4
    if len(axes.get_legend_handles_labels()[1]) > in_a_row:  # two rows, and room for them
        in_a_row = 3
        left, bottom, width, height = axes.get_position().bounds
        axes.set_position((left, bottom, width, height - 0.06))
    axes.legend(frameon=False, fontsize=POINTS, loc="lower left", bbox_to_anchor=(0, 1), ncols=in_a_row, **close)
    sentence = layout.wrap(note, _WIDTH - 2 * MARGIN)
    top = _HEIGHT - layout.text_height(sentence)
    layout.write(figure, MARGIN, top, sentence, color=PALETTE["quiet"], style="italic")
    return figure
