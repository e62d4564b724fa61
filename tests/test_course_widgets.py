"""Widgets: a move changes what is shown, images have words, captions are escaped, errors reach the reader."""

import re
from html import escape, unescape

import fakes
import ipywidgets
import pytest
from PIL import Image

from dalleflamingo.course import widgets
from dalleflamingo.miniature.scene_graph import Scene, Thing

EVIL = "<script>alert(1)</script> & a <b>boat</b>"
IMAGE = Image.new("RGB", (64, 64), (200, 30, 30))


class Captioner:
    """Writes with a seed only what the nucleus holds: p = 0.9 lets the seed decide."""

    def __init__(self):
        self.images = []

    def sample(self, images, seeds, strategy):
        self.images += images
        texts = ["a white cat and a red kite", "a cat on the grass", "a blue boat on the water"]
        return [[f"{texts[seed % 3 if strategy.p > 0.5 else 0]} {EVIL}" for seed in row] for row in seeds]


class Generator:
    """Paints with the number of letters, the steps and the scale."""

    def __init__(self):
        self.seeds = []

    def check_caption(self, caption):
        if len(caption) > 100:
            raise ValueError("101 tokens, and there is room for 77: shorten <it>")

    def render(self, captions, seeds, steps, guidance_scale):
        self.seeds += seeds
        how = 10 * steps, int(20 * guidance_scale)
        return [Image.new("RGB", (64, 64), (4 * len(text) % 256, *how)) for text in captions]


def controls(box: ipywidgets.Widget) -> dict[str, ipywidgets.Widget]:
    """Name -> control of a widget; of equal names, `thing` and `thing 2` and so on."""
    found, queue = {}, [box]
    while queue:
        one = queue.pop(0)
        queue += getattr(one, "children", ())
        if name := getattr(one, "description", ""):
            number = sum(key.partition(" #")[0] == name for key in found)
            found[f"{name} #{number + 1}" if number else name] = one
    return found


def result(box: ipywidgets.Widget) -> ipywidgets.HTML:
    [found] = [child for child in box.children if isinstance(child, ipywidgets.HTML)]
    return found


def images(box: ipywidgets.Widget) -> list[tuple[str, str]]:
    """(source, words) of each image that a widget shows; all must have words."""
    shown = re.findall(r"<img [^>]*>", result(box).value)
    sources = [re.search(r'src="([^"]+)"', tag)[1] for tag in shown]
    words = [unescape(re.search(r'alt="([^"]+)"', tag)[1]) for tag in shown]
    return list(zip(sources, words, strict=True))


def captions(box: ipywidgets.Widget) -> list[str]:
    return [unescape(text) for text in re.findall(r"<li>(.*?)</li>", result(box).value)]


# ── the nucleus ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_p_and_k_change_the_captions():
    box = widgets.nucleus(Captioner(), IMAGE)
    assert len(captions(box)) == 5 and "K = 5; captions that differ: 3" in result(box).value
    controls(box)["nucleus p"].value = 0.1
    assert len(set(captions(box))) == 1 and "K = 5; captions that differ: 1" in result(box).value
    controls(box)["captions K"].value = 2
    assert len(captions(box)) == 2 and len(images(box)) == 1


def test_captions_are_escaped():
    box = widgets.nucleus(Captioner(), IMAGE)
    assert EVIL not in result(box).value and result(box).value.count(escape(EVIL)) == 5


# ── guidance and steps ───────────────────────────────────────────────────────────────────────────────────────────────


def test_guidance_steps_and_caption_change_the_image():
    box = widgets.guidance(Generator(), "a red cat")
    seen = [images(box)]
    for name, value in (("guidance scale", 7.5), ("steps", 4), ("caption", f"a blue boat {EVIL}")):
        controls(box)[name].value = value
        seen.append(images(box))
    assert len({source for [(source, _)] in seen}) == 4
    assert seen[1][0][1] == "Generated from “a red cat” with guidance scale 7.5, 10 steps."
    assert EVIL in seen[3][0][1] and "<script>" not in result(box).value


def test_a_caption_that_cannot_be_read_is_answered_and_the_next_one_is_drawn():
    box = widgets.guidance(Generator(), "a red cat")
    controls(box)["caption"].value = 101 * "a"
    assert "room for 77: shorten &lt;it&gt;" in result(box).value and not images(box)
    controls(box)["caption"].value = "a cat"
    assert len(images(box)) == 1


# ── a scene ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sent():
    """(box, captioner, generator) of a scene."""
    captioner, generator = Captioner(), Generator()
    return widgets.scene(captioner, generator, [fakes.MeanColour()], 2, 3.0), captioner, generator


def test_a_change_draws_the_scene_without_a_model(sent):
    box, captioner, _ = sent
    before, words = images(box)[0]
    assert words == (
        "Your scene: grass, with a large red cat at the middle left, a large blue boat at the middle right."
    )
    for name, value in (("colour", "pink"), ("thing #3", "kite"), ("ground", "snow"), ("place #2", "top right")):
        controls(box)[name].value = value
        [(after, words)] = images(box)
        assert after != before and value in words
        before = after
    assert not captioner.images


def test_the_button_sends_the_scene_round_and_sorts_by_the_first_similarity(sent):
    box, captioner, generator = sent
    controls(box)["Send it round"].click()
    source, *generated = images(box)
    assert source[1].startswith("Your scene") and len(generated) == 3
    assert generator.seeds == [0, 0, 0], "differences between the images must come from the captions"
    values = [float(value) for value in re.findall(rf">{fakes.MeanColour.name} (-?[\d.]+)<", result(box).value)]
    assert values == sorted(values, reverse=True) and len(set(values)) > 1
    assert result(box).value.count("scene-graph F1") == 3 and "<script>" not in result(box).value
    controls(box)["ground"].value = "night"
    assert len(images(box)) == 1, "results of another scene are still shown"


def test_a_scene_has_the_chosen_things_where_they_were_put():
    things = [("cat", "red", "small", "top right"), (widgets.NOTHING, "blue", "large", "top right")]
    assert widgets.compose("sand", things) == Scene("sand", (Thing("cat", "red", "small", 50, 14),))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("thing #2", "cat", "the same kind, cat"), ("place #2", "middle left", "the same place, middle left")],
)
def test_a_scene_that_the_world_does_not_have_is_refused_with_its_reason(sent, name, value, reason):
    box, captioner, _ = sent
    controls(box)[name].value = value
    assert reason in result(box).value and not images(box)
    controls(box)["Send it round"].click()
    assert reason in result(box).value and not captioner.images and not controls(box)["Send it round"].disabled
