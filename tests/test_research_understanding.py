"""The matrix of who understands whom, of models whose understanding is known."""

from dataclasses import replace

import fakes
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dalleflamingo import reconstruct
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.research import understanding
from dalleflamingo.research.understanding import (
    mutual_understanding,
    pairs_that_understand,
    understanding_matrix,
    write,
)

COLOURS = list(fakes.COLOURS)
N = 8


class Seeing:
    """Names the colour in the middle of an image; blind, it always names the first."""

    def __init__(self, blind: bool = False):
        self.blind = blind

    def fingerprint(self):
        return f"Seeing {self.blind}"

    def sample(self, images, seeds, strategy):
        return [[caption] * len(row) for caption, row in zip(self.describe(images), seeds, strict=True)]

    def describe(self, images):
        middles = torch.tensor([image.getpixel((8, 8)) for image in images])
        known = torch.tensor(list(fakes.COLOURS.values()))
        nearest = torch.cdist(middles.float(), known.float()).argmin(1).tolist()
        return [f"a {COLOURS[0 if self.blind else i]} thing" for i in nearest]


class Painting:
    """Fills an image with the colour that a caption names; deaf, with grey."""

    def __init__(self, deaf: bool = False):
        self.deaf, self.rendered = deaf, 0

    def fingerprint(self):
        return f"Painting {self.deaf}"

    def check_caption(self, caption):
        pass

    def render(self, captions, seeds, steps, guidance_scale, batch_size, progress):
        self.rendered += len(captions)
        colours = [(90, 90, 90) if self.deaf else fakes.COLOURS[caption.split()[1]] for caption in captions]
        return [Image.new("RGB", (16, 16), colour) for colour in colours]


def closeness(source: Image.Image, other: Image.Image) -> float:
    return -float(np.abs(np.asarray(source, float) - np.asarray(other, float)).mean()) / 255


SIMILARITIES = [PairSimilarity("clip", closeness)], [PairSimilarity("text_clip", fakes.common_letters)]


def measure(folder, paints=None):
    """Two captioners and two generators, one of each without senses, on images of four colours in turn."""
    data = fakes.dataset(folder / "images", N)
    named = [replace(one, references=(f"a {COLOURS[i % 4]} thing",)) for i, one in enumerate(data)]
    paints = paints or {"paints": Painting(), "deaf": Painting(deaf=True)}
    return data, mutual_understanding(
        {"sees": Seeing, "blind": lambda: Seeing(blind=True)},
        {name: lambda found=found: found for name, found in paints.items()},
        replace(data, examples=tuple(named)),
        *SIMILARITIES,
        folder / "runs",
        replace(fakes.SETTINGS, candidates=2),
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("study"))[1]


def test_only_the_pair_with_senses_understands_each_other(table):
    assert pairs_that_understand(understanding_matrix(table)) == [("sees", "paints")]


def test_a_row_compares_what_came_back_with_its_own_source_and_the_next(table):
    texts = table[(table.direction == reconstruct.TextImageText.name) & (table.captioner == "sees")]
    own = texts[texts.generator == "paints"].reset_index(drop=True)
    captions = [f"a {COLOURS[i % 4]} thing" for i in range(N)]  # which come back as they were
    assert own.own.tolist() == [fakes.common_letters(one, one) for one in captions]
    following = captions[1:] + captions[:1]
    assert own.another.tolist() == [fakes.common_letters(*pair) for pair in zip(following, captions, strict=True)]
    assert table.groupby(["direction", "similarity", "captioner", "generator"]).size().tolist() == [N] * 8


def test_cells_are_means_over_images_with_paired_differences(table):
    cells = understanding_matrix(table).set_index(["direction", "captioner", "generator"])
    by = table.set_index(["direction", "captioner", "generator", "image_id"]).own
    first = reconstruct.ImageTextImage.name, "sees", "paints"
    for pair in (("sees", "deaf"), ("blind", "paints"), ("blind", "deaf")):
        key = (first[0], *pair)
        assert cells.own_value[key] == pytest.approx(by[key].mean())
        assert cells.minus_first_value[key] == pytest.approx((by[key] - by[first]).mean())
    assert cells.minus_first_low[first] == cells.minus_first_high[first] == 0
    assert (cells.n == N).all()


def test_an_image_that_a_pair_skipped_is_left_out_of_the_difference(table):
    some = table[~((table.captioner == "blind") & (table.image_id == table.image_id.max()))]
    cells = understanding_matrix(some)
    assert set(cells[cells.captioner == "blind"].n) == {N - 1} and np.isfinite(cells.minus_first_value).all()


def test_a_study_goes_on_and_makes_nothing_twice(tmp_path):
    paints = {"paints": Painting()}
    _, first = measure(tmp_path, paints)
    made = paints["paints"].rendered
    _, again = measure(tmp_path, paints)
    assert paints["paints"].rendered == made == 2 * 2 * (N * 2)  # captioners, directions, images, candidates
    pd.testing.assert_frame_equal(first, again)


def test_a_single_image_has_no_other_to_compare_with(tmp_path):
    data = fakes.dataset(tmp_path / "images", 1)
    with pytest.raises(ValueError, match="take two images or more"):
        mutual_understanding(
            {"sees": Seeing}, {"paints": Painting}, data, *SIMILARITIES, tmp_path / "runs", fakes.SETTINGS
        )


def test_page_table_and_figure_hold_the_cells(table, tmp_path, monkeypatch):
    data = fakes.dataset(tmp_path / "images", N)
    monkeypatch.setattr(understanding.pages, "measured_on", lambda name, unlike: f"Measured on {name}.")
    cells = write(tmp_path, table, data, fakes.SETTINGS, "the command")
    page = (tmp_path / "results/understanding.md").read_text()
    assert "1 of 4 pairs understand each other in both directions" in page
    own = Interval.from_row(cells.iloc[1], "own_")
    assert f"| sees | deaf | {own.value:.3f} [{own.low:.3f}, {own.high:.3f}] |" in page
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results/understanding.csv"), cells.round(5))
    assert len(pd.read_parquet(tmp_path / "results/understanding.parquet")) == len(table)
    with Image.open(tmp_path / "figures/understanding.png") as figure:
        assert figure.width > figure.height > 300


def test_darker_cells_lie_further_above_their_baselines(table):
    [axes, *_] = understanding.figure(understanding_matrix(table)).axes
    [heat] = axes.get_images()
    above = heat.get_array()
    assert above.shape == (2, 2) and above[0, 0] == above.max() > 0
    assert axes.texts[0].get_text().splitlines()[2].startswith("another: ")
