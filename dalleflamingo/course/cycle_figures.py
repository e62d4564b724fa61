"""Figures of cycle finetuning: which loss updates which model, the losses step by step, captions before and after."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL.Image import Image

from dalleflamingo.course import layout
from dalleflamingo.course.layout import CHARACTERS, FONT_SIZE, PALETTE, Panel
from dalleflamingo.cycle_losses import LOSS_NAMES
from dalleflamingo.datasets import Dataset

TITLES = {
    "caption": "(1) label → captioner",
    "image_reconstruction": "(2) image → text → image",
    "generation": "(3) label → generator",
    "caption_reconstruction": "(4) text → image → text",
}
MODELS = ("captioner", "generator")
COLOURS = dict(zip(LOSS_NAMES, (PALETTE["clip"], PALETTE["more"], PALETTE["dino"], PALETTE["wordpiece"]), strict=True))
_CONTROLS = (PALETTE["random"], PALETTE["clip"], PALETTE["dino"])
_SIZE, _WIDE = (860, 430), (1300, 430)


def gradient_flow(norms: Mapping[str, Mapping[str, float]]) -> Figure:
    """Arrows from the losses to the models that they update.

    Args:
        norms: loss -> model -> norm of the loss's gradient with respect to the model's trained parameters, 0 where
            there is none.
    """
    figure = layout.new_figure(*_SIZE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    heights = dict(zip(norms, np.linspace(0.9, 0.3, len(norms)), strict=True))
    positions = dict(zip(MODELS, (0.75, 0.45), strict=True))
    largest = max(norm for by_model in norms.values() for norm in by_model.values())
    for model, height in positions.items():
        box = dict(boxstyle="round,pad=0.6", facecolor="none", edgecolor=PALETTE["text"])
        axes.text(
            0.88, height, model, ha="center", va="center", fontsize=FONT_SIZE + 1, bbox=box, color=PALETTE["text"]
        )
    for loss, by_model in norms.items():
        colour = COLOURS[loss]
        axes.text(0.02, heights[loss], TITLES[loss], va="center", fontsize=FONT_SIZE + 1, color=colour)
        for model, norm in by_model.items():
            if not norm:
                continue
            start, end = (0.36, heights[loss]), (0.78, positions[model])
            width = 0.8 + 3 * np.sqrt(norm / largest)
            arrow = dict(arrowstyle="-|>", color=colour, linewidth=width, shrinkA=0, shrinkB=0)
            axes.annotate("", end, start, arrowprops=arrow)
            where = 0.25 + 0.3 * (model == MODELS[0])  # so that two arrows' numbers do not meet
            at = tuple(np.array(start) + where * (np.array(end) - start))
            ground = dict(facecolor="white", edgecolor="none", pad=1)
            axes.text(*at, f"{norm:.2g}", fontsize=FONT_SIZE, color=colour, ha="center", va="center", bbox=ground)
    note = "The norm of each loss's gradient with respect to the trained parameters; no arrow where there is none."
    return _noted(figure, note)


def curves(log: Sequence[Mapping[str, float]], smooth: int = 1) -> Figure:
    """The four losses against the step, each in a panel of its own.

    Args:
        log: rows from `cycle_reporting.read_log`.
        smooth: rows of a loss that a running mean is over; the rows themselves are drawn faintly.
    """
    figure = layout.new_figure(*_WIDE)
    present = [name for name in LOSS_NAMES if any(name in row for row in log)]
    for column, name in enumerate(present):
        width = 0.93 / len(present)
        axes = figure.add_axes((0.065 + column * width, 0.32, width - 0.05, 0.56))
        steps, values = zip(*((row["step"], row[name]) for row in log if name in row), strict=True)
        mean = pd.Series(values).rolling(smooth, min_periods=1).mean()
        axes.plot(steps, values, color=COLOURS[name], alpha=0.3, linewidth=0.8)
        axes.plot(steps, mean, color=COLOURS[name], linewidth=1.6)
        axes.set_title(TITLES[name], fontsize=FONT_SIZE, color=COLOURS[name], loc="left")
        axes.set_xlabel("step", fontsize=FONT_SIZE)
        axes.set_ylabel("loss  (better ↓)" if column == 0 else "", fontsize=FONT_SIZE)
        axes.tick_params(labelsize=FONT_SIZE - 1)
        axes.spines[["top", "right"]].set_visible(False)
    mean = f"Faint: each loss at the steps that have it; thick: the mean of the last {smooth}. "
    return _noted(figure, (mean if smooth > 1 else "") + "A batch is small and its noise large.")


def controls(table: pd.DataFrame) -> Figure:
    """What the cycle adds, captioner by captioner: to the start, to labels only, and to labels only for longer.

    Args:
        table: as `cycle_report.controls`, or docs/results/cycle-controls.csv, has it.
    """
    figure = layout.new_figure(*_WIDE)
    measures = {
        "captions": "captions, CIDEr × 100",
        "images": "images: nearer out of domain, CLIP distance × 100",
    }
    names = list(table["minus"].unique())
    for column, (of, measure) in enumerate(measures.items()):
        axes = figure.add_axes((0.065 + 0.48 * column, 0.26, 0.43, 0.58))
        part = table[table["of"] == of]
        captioners = list(part["captioner"].unique())
        for i, (name, colour, marker) in enumerate(zip(names, _CONTROLS, "so^", strict=False)):
            own = part[part["minus"] == name]
            x = np.array([captioners.index(one) for one in own["captioner"]]) + 0.2 * (i - 1)
            axes.vlines(x, own["low"], own["high"], color=colour)
            axes.plot(x, own["value"], marker, color=colour, markersize=5, label=f"minus {name}")
        axes.axhline(0, color=PALETTE["text"], linewidth=0.9)
        axes.set_xticks(range(len(captioners)), captioners)
        axes.set_title(f"{measure}  (better ↑)", fontsize=FONT_SIZE, loc="left")
        axes.tick_params(labelsize=FONT_SIZE)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=FONT_SIZE, ncols=len(names), loc="upper left")
    return _noted(
        figure, "The cycle minus what it is compared with. Bars are paired 95 % intervals over seeds and images."
    )


def before_and_after(
    table: pd.DataFrame, dataset: Dataset, image_ids: Sequence[int], names: Mapping[str, str]
) -> Figure:
    """Images with their captions by one run after another.

    Args:
        table: columns arm, image_id, caption; a row for each arm and image.
        dataset: the images.
        image_ids: of those that are shown.
        names: arm -> the word for it, in order.
    """
    examples = {example.image_id: example for example in dataset}
    captions = table.set_index(["arm", "image_id"])["caption"]
    panels = []
    for image_id in image_ids:
        first, *others = (f"{name}: {captions[arm, image_id]}" for arm, name in names.items())
        remarks = tuple(line for caption in others for line in textwrap.wrap(caption, CHARACTERS))
        panels.append(Panel(dataset.open(examples[image_id]), first, remarks))
    note = "Captions of images that no model has seen in training."
    return layout.arrange([panels[start : start + 4] for start in range(0, len(panels), 4)], note)


def rendered_by(images: Mapping[str, Sequence[Image]], prompts: Sequence[str]) -> Figure:
    """The same captions rendered by several generators, a row each.

    Args:
        images: name -> an image for each of the prompts.
        prompts: the captions, which are written below the last row.
    """
    rows, names = [], list(images)
    for name in names:
        texts = prompts if name == names[-1] else [""] * len(prompts)
        rows.append([Panel(one, text, heading=name) for one, text in zip(images[name], texts, strict=True)])
    return layout.arrange(rows, "The same captions, rendered from the same noise before and after finetuning (seed 0).")


def _noted(figure: Figure, note: str) -> Figure:
    layout.add_note(figure, note)
    return figure
