"""The miniature's Inception: a classifier of things, whose features FID and image fidelity compare (App. A.1).

FID and related metrics compare two sets of images in the feature space of a classifier of such images. For photographs
that is Inception-v3, for the miniature world this small network. It was trained to name the ground and the kind and
colour of all things of an image, between which it divides its probability.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL.Image import Image
from torch import Tensor, nn

from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.recogniser import Residual, conv, prepare


class MiniatureInception(ModelMixin, ConfigMixin):
    """Convolutions from 64 × 64 to 8 × 8, features averaged over the image, one linear layer to the classes.

    Args:
        features: their number D; small, so that a few hundred images suffice to estimate a D × D covariance.
        kinds, colours: names; class k · len(colours) + c is a thing of kind k and colour c.
        grounds: names of the second head's outputs, which only training uses.
    """

    title = "the miniature's Inception"

    @register_to_config
    def __init__(
        self,
        features: int = 64,
        kinds: Sequence[str] = scene_graph.KINDS,
        colours: Sequence[str] = scene_graph.COLOURS,
        grounds: Sequence[str] = scene_graph.GROUNDS,
    ):
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 32, 5, 2),  # 32 × 32
            conv(32, 64, 3, 2),  # 16 × 16
            Residual(64),
            conv(64, 96, 3, 2),  # 8 × 8
            Residual(96),
            Residual(96),
            conv(96, features, 1),
        )
        self.names = nn.Linear(features, len(kinds) * len(colours))
        self.ground = nn.Linear(features, len(grounds))

    def class_of(self, thing: scene_graph.Thing) -> int:
        """The class of a thing."""
        return self.config.kinds.index(thing.kind) * len(self.config.colours) + self.config.colours.index(thing.colour)

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """B images of 64 × 64 pixels -> (B, 3, 64, 64) in [-1, 1]; ValueError where an image has another size."""
        return prepare(images)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> features (B, D) ≥ 0, logits (B, number of classes)."""
        features = F.adaptive_avg_pool2d(self.body(pixel_values), 1).flatten(1)
        return features, self.names(features)
