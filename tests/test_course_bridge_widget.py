"""The slider of notebook 03: a move sets another image."""

import base64
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dalleflamingo.course.bridge_widget import image_slider, image_tag


def grey(share: float) -> Image.Image:
    return Image.new("RGB", (64, 32), (round(255 * share),) * 3)


def image_in(tag: str) -> Image.Image:
    [data] = re.findall(r'src="data:image/png;base64,([^"]+)"', tag)
    return Image.open(BytesIO(base64.b64decode(data)))


def test_moving_the_slider_changes_the_image_and_its_words():
    slider, shown = image_slider(grey, "the boat is blue").children
    assert image_in(shown.value).getpixel((0, 0)) == (128, 128, 128) and 'alt="the boat is blue: 50%"' in shown.value
    slider.value = 1.0
    assert image_in(shown.value).getpixel((0, 0)) == (255, 255, 255) and 'alt="the boat is blue: 100%"' in shown.value


def test_an_image_is_drawn_when_the_slider_is_let_go():
    slider, _ = image_slider(grey, "share").children
    assert not slider.continuous_update and (slider.min, slider.max) == (0, 1)


@pytest.mark.parametrize(("width", "side"), [(64, 192), (512, 512)])
def test_small_images_are_enlarged_and_keep_their_pixels(width, side):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (width, width, 3)).astype(np.uint8))
    found = image_in(image_tag(image, ""))
    assert found.size == (side, side)
    step = side // width
    np.testing.assert_array_equal(np.asarray(found)[step // 2 :: step, step // 2 :: step], np.asarray(image))


def test_words_of_an_image_are_escaped():
    assert 'alt="&lt;b&gt;&quot;"' in image_tag(grey(0), '<b>"')
