"""Weights over an image stay where they are; numbers have the colour of their sign."""

import numpy as np
import pytest
import torch
from PIL import Image

from dalleflamingo.course import overlays

WHITE = Image.new("RGB", (64, 64), "white")


def test_the_image_is_bright_where_the_weight_is():
    weights = torch.zeros(4, 4)
    weights[0, 3] = 7.0  # first row, last column
    light = np.asarray(overlays.shade(WHITE, weights)).mean(axis=2)
    assert light[4, 60] > 240 and light[60, 4] < 50 and light[4, 4] < 50 and light[60, 60] < 50


@pytest.mark.parametrize("weights", [torch.zeros(2, 2), torch.tensor([[1.0, -1.0]]), torch.full((2, 2), float("nan"))])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="expected some above 0, and none below"):
        overlays.shade(WHITE, weights)


def test_a_heatmap_is_red_above_zero_blue_below_and_white_at_zero():
    image = overlays.heatmap(torch.tensor([[2.0, -2.0], [0.0, 1.0]]), side=8)
    red, blue, white, pale = (image.getpixel(at) for at in ((1, 1), (5, 1), (1, 5), (5, 5)))
    assert image.size == (8, 8) and red[0] > red[2] and blue[2] > blue[0] and min(white) > 240
    assert pale[0] > pale[2] and sum(pale) > sum(red)
