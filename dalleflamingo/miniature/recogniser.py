"""The judge of pictures: which things stand in a 64 × 64 picture of the miniature world, on which ground, or nothing.

A fully convolutional detector of centre points: every cell of a 16 × 16 grid says how likely the centre of a thing lies
in it, where inside the cell, and which kind, colour and size the thing would be. A picture may hold nothing that the
network is sure of; then the scene that it reports has no things.
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

from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.scene_graph import Scene, Thing

PICTURE = 64  # pixels a side
STRIDE = 4  # pixels a cell
MAX_THINGS = 6  # peaks looked at in one picture; the world draws at most three things


@dataclass
class HeadMaps(BaseOutput):
    """What the network says of B pictures; logits unless stated. G = 16 cells a side.

    centre: (B, 1, G, G); the centre of a thing lies in this cell.
    offset: (B, 2, G, G); (x, y) of the centre from the cell's middle, in cells.
    kind, colour, size: (B, number of names, G, G); of the thing, if there is one.
    ground: (B, number of grounds).
    """

    centre: Tensor
    offset: Tensor
    kind: Tensor
    colour: Tensor
    size: Tensor
    ground: Tensor


@dataclass(frozen=True)
class Sighting:
    """A scene and how sure the recogniser is of each of its things, in (0, 1], surest first."""

    scene: Scene
    confidences: tuple[float, ...]


class Residual(nn.Module):
    """x + two 3 × 3 convolutions of x, with batch normalisation (on a CPU faster than groups)."""

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
    """The detector; `from_pretrained(folder)` opens a trained one, `find(pictures)` judges pictures.

    Args:
        width: channels on the 16 × 16 grid; 1.5 times as many on the 8 × 8 grid, where one cell sees the whole of a
            thing and its neighbours.
        threshold: the least confidence (probability of a centre × probability of the kind) of a thing that counts.
        kinds, colours, sizes, grounds: the names that the output channels stand for, kept with the weights so that a
            world that grows cannot shift what an old recogniser says.
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
            self.head.bias[0] = -4.0  # centres are rare: begin near their true share, not at one half

    def forward(self, pixel_values: Tensor) -> HeadMaps:
        """(B, 3, 64, 64) in [-1, 1] -> HeadMaps."""
        fine = self.fine(self.stem(pixel_values))
        coarse = self.coarse(fine)
        back = F.interpolate(self.back(coarse), scale_factor=2, mode="nearest")
        maps = self.head(self.merged(F.relu(fine + back))).split(list(self.parts.values()), dim=1)
        pooled = torch.cat([coarse.mean((2, 3)), coarse.amax((2, 3))], dim=1)
        return HeadMaps(**dict(zip(self.parts, maps, strict=True)), ground=self.ground(pooled))

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image] | np.ndarray, batch_size: int = 64) -> list[Sighting]:
        """What is seen in each picture, with confidences.

        Args:
            images: PIL pictures of 64 × 64, or an (N, 64, 64, 3) array of uint8.
            batch_size: pictures judged at once; the answer does not depend on it.
        Raises:
            ValueError: if a picture has another size or the array another type.
        """
        self.eval()
        sightings = []
        for start in range(0, len(images), batch_size):
            pixels = prepare(images[start : start + batch_size])
            sightings += self.decode(self(pixels.to(device=self.device, dtype=self.dtype)))
        return sightings

    def find(self, images: Sequence[Image.Image] | np.ndarray, batch_size: int = 64) -> list[Scene]:
        """The scene in each picture, without things where the recogniser is sure of none; arguments as in `look`."""
        return [sighting.scene for sighting in self.look(images, batch_size)]

    def decode(self, maps: HeadMaps) -> list[Sighting]:
        """HeadMaps of B pictures -> B sightings: peaks of the centre map whose confidence reaches the threshold."""
        names = self.config
        confidence, row, column = peaks(maps.centre, maps.kind)  # (B, MAX_THINGS) each
        ground = maps.ground.argmax(1).tolist()
        sightings = []
        for b in range(len(confidence)):
            things, sure = [], []
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
                sure.append(value)
            sightings.append(Sighting(Scene(names.grounds[ground[b]], tuple(things)), tuple(sure)))
        return sightings


def prepare(images: Sequence[Image.Image] | np.ndarray) -> Tensor:
    """PIL pictures or (N, 64, 64, 3) uint8 -> (N, 3, 64, 64) float32 in [-1, 1].

    Raises:
        ValueError: if a picture is not 64 × 64, or an array not uint8.
    """
    if not isinstance(images, np.ndarray):
        sizes = {image.size for image in images} - {(PICTURE, PICTURE)}
        if sizes:
            width, height = min(sizes)
            raise ValueError(
                f"a picture of {width} × {height} pixels; the recogniser knows the miniature world, whose pictures are "
                f"{PICTURE} × {PICTURE}: resize it first, and expect little of a photograph"
            )
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if images.dtype != np.uint8 or images.shape[1:] != (PICTURE, PICTURE, 3):
        raise ValueError(
            f"an array of {images.dtype} and shape {images.shape}; pictures are uint8 in 0..255 and of shape "
            f"(N, {PICTURE}, {PICTURE}, 3)"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # keeps channels last in memory
    return pixels.float() / 127.5 - 1


def peaks(centre: Tensor, kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells that no neighbour exceeds, surest first.

    Args:
        centre: (B, 1, G, G) logits. kind: (B, K, G, G) logits.
    Returns:
        confidence, row, column: (B, MAX_THINGS) each; confidence = P(centre) · max P(kind), 0 where there is no peak.
    """
    centre = centre.float()
    peak = centre == F.max_pool2d(centre, 3, stride=1, padding=1)  # of logits: probabilities near 1 are alike
    confidence = (centre.sigmoid() * peak * kind.float().softmax(1).amax(1, keepdim=True)).flatten(1)  # (B, G · G)
    confidence, cell = confidence.topk(MAX_THINGS, dim=1)
    return confidence, cell // centre.shape[-1], cell % centre.shape[-1]
