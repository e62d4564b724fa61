"""Numbers over an image, as images: attention weights, and channels of latents."""

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

_DARKEST = 0.15  # what is left of a pixel without weight


def shade(image: Image.Image, weights: Tensor) -> Image.Image:
    """The image, bright where the weights are large.

    Args:
        image: RGB.
        weights: (h, w), not negative, not all 0; they cover the image and are interpolated.
    Raises:
        ValueError: a weight is negative, or all are 0.
    """
    if weights.min() < 0 or not weights.max() > 0:
        raise ValueError(f"weights from {weights.min():g} to {weights.max():g}: expected some above 0, and none below")
    values = (255 * weights / weights.max()).numpy().astype(np.uint8)
    smooth = np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.BICUBIC)) / 255
    light = _DARKEST + (1 - _DARKEST) * smooth[..., None]
    return Image.fromarray((np.asarray(image) * light).astype(np.uint8))


def heatmap(values: Tensor, side: int = 64) -> Image.Image:
    """Numbers as colours: blue below 0, red above, white at 0.

    Args:
        values: (h, w).
        side: of the image, in pixels.
    """
    largest = float(values.abs().max()) or 1.0
    colours = matplotlib.colormaps["RdBu_r"]((values.numpy() / largest + 1) / 2)[..., :3]
    small = Image.fromarray((255 * colours).astype(np.uint8))
    return small.resize((side, side), Image.Resampling.NEAREST)
