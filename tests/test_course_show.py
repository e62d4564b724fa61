"""Figures show the right image with the right caption in the right place, and draw any caption as it is written."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from dalleflamingo.course import layout, show
from dalleflamingo.datasets import Example
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.miniature.scene_graph import Scene, Thing

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def plain(i: int, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), COLOURS[i])


def pixels(figure) -> np.ndarray:
    """(H, W, 3) as it would be saved."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_text()]


def intervals(*values: float) -> list[Interval]:
    return [Interval(value, value - 0.1, value + 0.1, 24, 0) for value in values]


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_pixel_of_a_small_image_becomes_a_square_of_the_same_size():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    drawn = pixels(show.row([Image.fromarray(noise)] * 2, ["one", "two"], note="a sentence"))
    enlarged = noise.repeat(4, axis=0).repeat(4, axis=1)
    for left in (layout.MARGIN, layout.MARGIN + layout.IMAGE_SIZE + layout.GAP):
        np.testing.assert_array_equal(drawn[layout.MARGIN :, left:][: layout.IMAGE_SIZE, : layout.IMAGE_SIZE], enlarged)


SIZES = [((64, 64), (256, 256)), ((100, 50), (200, 100)), ((1024, 512), (256, 128))]


@pytest.mark.parametrize(("size", "fitted"), SIZES)
def test_an_image_of_any_size_keeps_its_shape(size, fitted):
    assert layout.resize_to_fit(Image.new("L", size)).size == fitted


def test_a_sheet_is_read_row_by_row():
    drawn = pixels(show.sheet([plain(i) for i in range(4)], columns=3))
    step, middle = layout.IMAGE_SIZE + layout.GAP, layout.MARGIN + layout.IMAGE_SIZE // 2
    assert [tuple(drawn[middle, middle + i * step]) for i in range(3)] == COLOURS[:3]
    below = drawn[middle + layout.IMAGE_SIZE + 6 + layout.GAP]
    assert tuple(below[middle]) == COLOURS[3] and tuple(below[middle + step]) == (255, 255, 255)


@pytest.mark.parametrize("caption", ["costs $5 or $x^", r"\frac{", "$\\undefined$", "<b>bold</b> & more", "a_b^c", ""])
def test_a_caption_is_drawn_as_it_is_written(caption):
    figure = show.row([plain(0)], [caption])
    pixels(figure)
    assert texts(figure) == ([caption] if caption else [])


def test_a_long_caption_is_wrapped_and_lies_inside_the_figure():
    words = "a very small white cat to the left of a large orange boat " * 3
    figure = show.sheet([plain(0), plain(1)], [words, "short"], columns=1, note=words * 4)
    pixels(figure)
    box = figure.bbox
    for text in figure.texts:
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1
    assert " ".join(texts(figure)[0].split()) == words.strip()


@pytest.mark.parametrize(("images", "captions"), [(0, 0), (2, 1), (1, 2)])
def test_a_caption_missing_or_too_many_is_refused(images, captions):
    with pytest.raises(ValueError, match=f"{images} images and {captions} captions"):
        show.sheet([plain(0)] * images, ["a"] * captions)


def test_headings_stand_above_the_images_that_they_belong_to():
    figure = show.row([plain(0), plain(1)], ["below", "beside"], headings=["first", "second"])
    drawn = pixels(figure)
    place = {text.get_text(): text.get_window_extent() for text in figure.texts}
    assert place["first"].x0 < place["second"].x0 and place["first"].y0 > place["below"].y1 + layout.IMAGE_SIZE
    right = layout.MARGIN + layout.IMAGE_SIZE - 1  # the last column of the first image, where no heading reaches
    under = layout.MARGIN + layout.LINE_HEIGHT + 2
    assert [tuple(drawn[under + i, right]) for i in (-1, 0)] == [(255, 255, 255), COLOURS[0]]
    with pytest.raises(ValueError, match="2 images and 1 headings"):
        show.row([plain(0), plain(1)], headings=["first"])


def test_no_figure_is_left_open_for_the_notebook_to_show_twice():
    show.row([plain(0)])
    assert plt.get_fignums() == []


# ── a ranking ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def candidates(tmp_path):
    """Image 7 with three candidates, in the order 2, 0, 1 by `dino`; image 8 with one."""
    rows = []
    for image_id, k, dino in [(8, 0, 0.99), (7, 0, 0.5), (7, 1, -0.25), (7, 2, 0.875)]:
        name = f"{image_id}-{k}.png"
        plain(k).save(tmp_path / name)
        rows.append(dict(image_id=image_id, candidate=k, caption=f"caption {k}", image=name, dino=dino))
    plain(3).save(tmp_path / "source.png")
    return Example(7, tmp_path / "source.png", ("what a person said",)), pd.DataFrame(rows), tmp_path


def test_a_ranking_shows_the_source_and_then_its_own_candidates_from_best_to_worst(candidates):
    figure = show.ranked_captions(*candidates, by="dino")
    drawn = pixels(figure)
    step, middle = layout.IMAGE_SIZE + layout.GAP, layout.MARGIN + layout.IMAGE_SIZE // 2
    assert [tuple(drawn[middle, middle + i * step]) for i in range(4)] == [COLOURS[i] for i in (3, 2, 0, 1)]
    shown = texts(figure)
    assert [text for text in shown if "caption " in text and len(text) < 20] == [f"“caption {k}”" for k in (2, 0, 1)]
    assert [text for text in shown if text.startswith("DINO")] == ["DINO 0.88", "DINO 0.50", "DINO -0.25"]
    assert "“what a person said”" in shown


def test_a_ranking_of_many_goes_on_in_a_second_row_beside_the_source(candidates):
    drawn = pixels(show.ranked_captions(*candidates, by="dino", columns=2))
    first = layout.MARGIN + layout.IMAGE_SIZE // 2
    step = layout.IMAGE_SIZE + layout.GAP
    column = drawn[:, first + step]
    assert tuple(COLOURS[1]) in {tuple(pixel) for pixel in column}
    assert tuple(COLOURS[1]) not in {tuple(pixel) for pixel in drawn[:, first]}


def test_scores_are_shown_where_the_table_has_them(candidates):
    example, table, folder = candidates
    figure = show.ranked_captions(example, table.assign(f1=0.75, cider=1.5), folder, by="dino")
    assert texts(figure).count("DINO 0.88\nscene-graph F1 0.75\nCIDEr 1.50") == 1


def test_a_table_without_the_image_is_refused(candidates):
    _, table, folder = candidates
    with pytest.raises(ValueError, match="no row of image 9"):
        show.ranked_captions(Example(9, folder / "source.png"), table, folder, by="dino")
    with pytest.raises(KeyError, match="no column 'clip'"):
        show.ranked_captions(candidates[0], table, folder, by="clip")


# ── the world ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_numbers_of_a_scene_are_written_on_its_things():
    things = (Thing("cat", "red", "small", 10, 20), Thing("key", "blue", "large", 50, 40))
    figure = show.scene_graph(Image.new("RGB", (64, 64)), Scene("sand", things))
    pixels(figure)
    [axes] = figure.axes
    corner = axes.get_window_extent()
    for text, (x, y) in zip(axes.texts, [(10, 20), (50, 40)], strict=True):
        at = axes.transData.transform(text.get_position())
        assert at == pytest.approx((corner.x0 + 4 * x, corner.y1 - 4 * y), abs=0.01)
    [facts] = texts(figure)
    assert "ground: sand" in facts and "1   cat: red, small" in facts and "2   key: blue, large" in facts
    assert "1 is to the left of 2" in facts


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rank_curve_draws_each_similarity_in_its_own_colour_with_its_intervals():
    curves = {"clip": intervals(0.7, 0.6, 0.5), "dino": intervals(0.65, 0.6, 0.4)}
    figure = show.rank_curve(curves, "f1", random=0.6)
    [axes] = figure.axes
    lines = {to_hex(line.get_color()): line.get_ydata() for line in axes.lines}
    assert list(lines[layout.PALETTE["clip"].lower()]) == [0.7, 0.6, 0.5]
    assert list(lines[layout.PALETTE["dino"].lower()]) == [0.65, 0.6, 0.4]
    assert set(lines[layout.PALETTE["random"]]) == {0.6}
    bars = [[tuple(path.vertices[:, 1]) for path in bar.get_paths()] for bar in axes.collections]
    assert bars[0] == [(i.low, i.high) for i in curves["clip"]] and bars[1] == [(i.low, i.high) for i in curves["dino"]]
    assert "n = 24" in texts(figure)[-1]


def test_gain_bars_show_every_domain_with_its_n():
    gains = {
        "clip": {"all": Interval(0.1, 0.05, 0.15, 24, 0), "out-domain": Interval(0.2, 0.1, 0.3, 8, 0)},
        "dino": {"all": Interval(-0.1, -0.2, 0.05, 24, 0), "out-domain": Interval(0.1, 0.0, 0.2, 8, 0)},
    }
    [axes] = show.gain_bars(gains, "CIDEr").axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["overall\nn = 24 images", "out of domain\nn = 8 images"]
    assert [bar.get_height() for bar in axes.patches] == [0.1, 0.2, -0.1, 0.1]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    assert centres == pytest.approx([-0.2, 0.8, 0.2, 1.2])


def test_shares_stand_in_their_own_group_beside_the_chance_of_that_group():
    found = {  # the second similarity lacks a group
        "clip": dict(zip(("first", "kind", "colour"), intervals(0.8, 0.9, 0.6), strict=True)),
        "dino": {"colour": Interval(0.4, 0.3, 0.5, 24, None)},
    }
    [axes] = show.shares(found, {"first": 0.2, "kind": 0.5, "colour": 0.5}, "right", "a note").axes
    points = {line.get_label(): line for line in axes.lines}
    assert list(points["CLIP"].get_ydata()) == [0.8, 0.9, 0.6] and list(points["DINO"].get_ydata()) == [0.4]
    assert list(points["CLIP"].get_xdata()) == pytest.approx([-0.1, 0.9, 1.9])
    assert list(points["DINO"].get_xdata()) == pytest.approx([2.1])
    assert to_hex(points["DINO"].get_color()) == layout.PALETTE["dino"].lower()
    *bars, chance = [[path.vertices for path in bar.get_paths()] for bar in axes.collections]
    assert [tuple(bar[:, 1]) for bar in bars[1]] == [(0.3, 0.5)]
    assert [(set(part[:, 1]), part[:, 0].mean()) for part in chance] == [({0.2}, 0), ({0.5}, 1), ({0.5}, 2)]


def test_lines_of_no_similarity_differ_in_colour_from_each_other_and_from_the_similarity():
    points = dict(zip((1, 2), intervals(0.5, 0.6), strict=True))
    [axes] = show.lines(dict.fromkeys(["clip", "blur", "noise"], points), "F1", "damage", "a note").axes
    colours = {line.get_label(): to_hex(line.get_color()) for line in axes.lines if line.get_marker() != "None"}
    assert len(set(colours.values())) == len(colours) == 3
    assert colours["ranked by CLIP"] == layout.PALETTE["clip"].lower()


def test_an_interval_beside_its_value_or_without_bounds_is_drawn():
    odd = [Interval(0.5, 0.6, 0.7, 5, 0), Interval(0.5, math.nan, math.nan, 1, 0)]
    pixels(show.rank_curve({"clip": odd}, "f1"))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_figure_is_saved_where_the_course_wants_it_and_nowhere_else(tmp_path, monkeypatch):
    figure = show.row([plain(0)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DALLEFLAMINGO_OUTPUT", raising=False)
    assert show.save(figure, "one") is figure
    assert not list(tmp_path.rglob("*"))
    monkeypatch.setenv("DALLEFLAMINGO_OUTPUT", str(tmp_path / "out"))
    show.save(figure, "one")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == ["out/figures/one.png"]
    with Image.open(tmp_path / "out" / "figures" / "one.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved)[..., :3], pixels(figure))
        assert saved.getpixel((1, 1))[:3] == (255, 255, 255)


def test_words_are_coloured_by_sign_and_deepest_at_the_largest():
    [axes] = show.words(["a", "red", "<b>$x$"], [0.0, 2.0, -1.0], "note").axes
    grounds = [word.get_bbox_patch().get_facecolor() for word in axes.texts[:3]]
    assert [round(colour[3], 2) for colour in grounds] == [0, 0.8, 0.4]
    assert grounds[1][2] > grounds[1][0] and grounds[2][0] > grounds[2][2]  # blue above 0, pink below
    places = [word.get_position()[0] for word in axes.texts[:3]]
    assert places == sorted(places) and axes.texts[2].get_text() == "<b>$x$"


def test_the_sentence_below_words_stays_inside_the_figure():
    figure = show.words(["a", "cat"], [1.0, -1.0], "More probability for the token lowers the loss or raises it. " * 2)
    note, word = figure.texts[-1].get_window_extent(), figure.axes[0].texts[0].get_window_extent()
    assert note.x1 <= figure.bbox.x1 and note.y0 >= 0 and note.y1 < word.y0


def test_words_and_values_must_be_as_many():
    with pytest.raises(ValueError, match="2 words and 1 values"):
        show.words(["a", "b"], [1.0])


def test_words_tokenized_differently_are_as_long_as_frequent_and_coloured_by_the_finer_side():
    rows = [
        ["giraffe", ("gi", "raf", "fe</w>"), ("giraffe</w>",), 7, 5],
        ["$x$'s", ("'</w>", "s</w>"), ("'s</w>",), 5, 5],
        ["computer", ("computer</w>",), ("compu", "ter</w>"), 3, 2],
        ["zebras", ("zebra", "s</w>"), ("ze", "bras</w>"), 2, 2],
    ]
    table = pd.DataFrame(rows, columns=["word", "source", "target", "count", "captions"])
    [axes] = show.words_tokenized_differently(table, ("WordPiece", "CLIP"), "note").axes
    bars = {bar.get_y() + bar.get_height() / 2: bar for bar in axes.patches}
    assert [bars[i].get_width() for i in range(4)] == [7, 5, 3, 2]
    colours = [layout.PALETTE[name] for name in ("wordpiece", "wordpiece", "clip", "quiet")]
    assert [to_hex(bars[i].get_facecolor()) for i in range(4)] == [colour.lower() for colour in colours]
    splits = ["gi·raf·fe | giraffe", "' s | 's", "computer | compu·ter", "zebra·s | ze·bras"]
    assert [text.get_text().strip() for text in axes.texts] == splits


def test_legends_of_many_lines_lie_inside_their_figure():
    names = "text_clip", "text_sbert", "text_cider", "text_wmd"
    curve = [Interval(value, value - 1, value + 1, 20, 0) for value in (20.0, 22.0, 25.0)]
    grown = dict.fromkeys(names, dict(zip((1, 2, 5), curve, strict=True)))
    for figure in (
        show.rank_curve(dict.fromkeys(names, curve), "clip_distance", 21.0, lower=True, of="insight-2"),
        show.lines({"random": grown["text_wmd"]} | grown, "distance", "k", "a note", lower=True),
        show.lines({"random": grown["text_wmd"]}, "distance", "k", "a note"),
    ):
        figure.canvas.draw()
        [axes] = [axes for axes in figure.axes if axes.get_legend()]
        box = axes.get_legend().get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert axes.yaxis.get_inverted() == (len(axes.get_legend().texts) == 5)
