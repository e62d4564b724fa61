"""The recogniser: which things a 64 × 64 image of the miniature world shows, where, and on which ground.

A fully convolutional detector of centre points (Zhou et al. 2019). Every cell of a 16 × 16 grid predicts the
probability that it contains the centre of a thing, the position of the centre in the cell, and the thing's kind, colour
and size. Where no confidence reaches the threshold, the scene has no things.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from dalleflamingo.datasets import to_rgb
from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.scene_graph import Scene, Thing
from dalleflamingo.miniature.world import IMAGE_SIZE

STRIDE = 4  # pixels a cell
MAX_THINGS = 6  # peaks considered in an image; the world draws at most three things


@dataclass
class HeadMaps(BaseOutput):
    """Output of the network for B images; logits unless stated. G = 16 cells a side.

    Attributes:
        centre: (B, 1, G, G), the cell contains the centre of a thing.
        offset: (B, 2, G, G), (x, y) of the centre from the cell's middle, in cells.
        kind, colour, size: (B, number of names, G, G), of the thing if there is one.
        ground: (B, number of grounds).
    """

    centre: Tensor
    offset: Tensor
    kind: Tensor
    colour: Tensor
    size: Tensor
    ground: Tensor


@dataclass(frozen=True)
class Detection:
    """The scene found in an image and the confidence in each of its things, in (0, 1], highest first."""

    scene: Scene
    confidences: tuple[float, ...]


class Residual(nn.Module):
    """x + two 3 × 3 convolutions of x, with batch normalisation (faster on a CPU than group normalisation)."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(conv(width, width), conv(width, width, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution, batch normalisation and, if `act`, a rectifier."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


class Recogniser(ModelMixin, ConfigMixin):
    """The detector. `from_pretrained(folder)` opens a trained one, `find(images)` gives the scenes that it sees.

    Args:
        width: channels on the 16 × 16 grid; 1.5 times as many on the 8 × 8 grid, where the receptive field of one cell
            covers a thing and its neighbours.
        threshold: lowest confidence (probability of a centre × probability of the kind) of a thing that is reported.
        kinds, colours, sizes, grounds: names of the output channels, kept with the weights, so that an old recogniser
            stays right when the world gets new kinds.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 64,
        threshold: float = 0.4,
        kinds: Sequence[str] = scene_graph.KINDS,
        colours: Sequence[str] = scene_graph.COLOURS,
        sizes: Sequence[str] = scene_graph.SIZES,
        grounds: Sequence[str] = scene_graph.GROUNDS,
    ):
        super().__init__()
        deep = width * 3 // 2
        half = width // 2
        self.stem = nn.Sequential(conv(3, half, 5, 2), conv(half, half), conv(half, width, 3, 2))  # 64 -> 16 a side
        self.fine = nn.Sequential(Residual(width), Residual(width))  # 16 × 16
        self.coarse = nn.Sequential(conv(width, deep, 3, 2), Residual(deep), Residual(deep))  # 8 × 8
        self.back = conv(deep, width, 1, act=False)
        self.merged = nn.Sequential(Residual(width), conv(width, width))
        self.parts = {"centre": 1, "offset": 2, "kind": len(kinds), "colour": len(colours), "size": len(sizes)}
        self.head = nn.Conv2d(width, sum(self.parts.values()), 1)
        self.ground = nn.Linear(2 * deep, len(grounds))
        with torch.no_grad():
            self.head.bias[0] = -4.0  # centres are rare: begin near their frequency instead of one half

    def forward(self, pixel_values: Tensor) -> HeadMaps:
        """(B, 3, 64, 64) in [-1, 1] -> HeadMaps."""
        fine = self.fine(self.stem(pixel_values))
        coarse = self.coarse(fine)
        back = F.interpolate(self.back(coarse), scale_factor=2, mode="nearest")
        maps = self.head(self.merged(F.relu(fine + back))).split(list(self.parts.values()), dim=1)
        pooled = torch.cat([coarse.mean((2, 3)), coarse.amax((2, 3))], dim=1)
        return HeadMaps(**dict(zip(self.parts, maps, strict=True)), ground=self.ground(pooled))

    @torch.no_grad()
    def detect(self, images: Sequence[Image.Image] | np.ndarray, batch_size: int = 64) -> list[Detection]:
        """The things and the ground of each image, with confidences.

        Args:
            images: N PIL images of 64 × 64 pixels, or an (N, 64, 64, 3) array of uint8.
            batch_size: images at once; the result does not depend on it.
        Raises:
            ValueError: an image has another size, or the array another type or shape.
        """
        self.eval()
        detections = []
        for start in range(0, len(images), batch_size):
            pixels = prepare(images[start : start + batch_size])
            detections += self.decode(self(pixels.to(device=self.device, dtype=self.dtype)))
        return detections

    def find(self, images: Sequence[Image.Image] | np.ndarray, batch_size: int = 64) -> list[Scene]:
        """The scene in each image, with the things that reach the threshold; arguments as in `detect`."""
        return [detection.scene for detection in self.detect(images, batch_size)]

    def decode(self, maps: HeadMaps) -> list[Detection]:
        """HeadMaps of B images -> B detections: peaks of the centre map whose confidence reaches the threshold."""
        names = self.config
        confidence, row, column = peaks(maps.centre, maps.kind)  # (B, MAX_THINGS) each
        ground = maps.ground.argmax(1).tolist()
        detections = []
        for b in range(len(confidence)):
            things, confidences = [], []
            for value, j, i in zip(confidence[b].tolist(), row[b].tolist(), column[b].tolist(), strict=True):
                if value < names.threshold:
                    continue
                dx, dy = maps.offset[b, :, j, i].tolist()
                things.append(
                    Thing(
                        kind=names.kinds[int(maps.kind[b, :, j, i].argmax())],
                        colour=names.colours[int(maps.colour[b, :, j, i].argmax())],
                        size=names.sizes[int(maps.size[b, :, j, i].argmax())],
                        x=(i + 0.5 + dx) * STRIDE,
                        y=(j + 0.5 + dy) * STRIDE,
                    )
                )
                confidences.append(value)
            detections.append(Detection(Scene(names.grounds[ground[b]], tuple(things)), tuple(confidences)))
        return detections


def prepare(images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """N PIL images or (N, 64, 64, 3) uint8 -> (N, 3, 64, 64) float32 in [-1, 1].

    Raises:
        ValueError: an image is not 64 × 64, or an array not uint8 or of another shape.
    """
    if not isinstance(images, np.ndarray):
        sizes = {image.size for image in images} - {(IMAGE_SIZE, IMAGE_SIZE)}
        if sizes:
            width, height = min(sizes)
            raise ValueError(
                f"an image of {width} × {height} pixels; this network knows the miniature world, whose images are "
                f"{IMAGE_SIZE} × {IMAGE_SIZE}: resize it first, and expect little of a photograph"
            )
        images = np.stack([np.asarray(to_rgb(image)) for image in images])
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"an array of {images.dtype} and shape {images.shape}; images are uint8 in 0..255 and of shape "
            f"(N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3)"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # keeps channels last in memory
    return pixels.float() / 127.5 - 1


def peaks(centre: Tensor, kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells whose centre logit no neighbour exceeds, highest confidence first.

    Args:
        centre: (B, 1, G, G) logits.
        kind: (B, K, G, G) logits.
    Returns:
        confidence, row, column: (B, MAX_THINGS) each; confidence = P(centre) · max P(kind), 0 where there is no peak.
    """
    centre = centre.float()
    peak = centre == F.max_pool2d(
        centre, 3, stride=1, padding=1
    )  # of logits: probabilities near 1 are equal in float32
    confidence = (centre.sigmoid() * peak * kind.float().softmax(1).amax(1, keepdim=True)).flatten(1)  # (B, G · G)
    confidence, cell = confidence.topk(MAX_THINGS, dim=1)
    return confidence, cell // centre.shape[-1], cell % centre.shape[-1]
