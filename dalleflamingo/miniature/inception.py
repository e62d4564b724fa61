"""The miniature's Inception: a classifier of things, whose features FID, KID and image fidelity compare (App. A.1).

FID and its kin ask a network that knows the world by heart how far two sets of pictures lie apart. For photographs that
is Inception-v3; for 64 × 64 pixels with cats and kites in eight colours it is this small one. It was taught to name one
thing of each picture, kind and colour at once, whichever was asked; so it divides its mind between two things.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.recogniser import Residual, conv


class MiniatureInception(ModelMixin, ConfigMixin):
    """Convolutions from 64 pixels a side to 8, features averaged over the picture, one linear layer to the names.

    Args:
        features: their number, D; few, so that a covariance of D × D can be known from a few hundred pictures.
        kinds, colours: the names; class k · len(colours) + c is a thing of kind k and colour c.
    """

    @register_to_config
    def __init__(
        self,
        features: int = 64,
        kinds: Sequence[str] = scene_graph.KINDS,
        colours: Sequence[str] = scene_graph.COLOURS,
    ):
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 32, 5, 2), conv(32, 64, 3, 2), Residual(64),  # 64 -> 16 pixels a side
            conv(64, 96, 3, 2), Residual(96), Residual(96),       # 8
            conv(96, features, 1),
        )  # fmt: skip
        self.names = nn.Linear(features, len(kinds) * len(colours))

    def class_of(self, thing: scene_graph.Thing) -> int:
        """The class that a thing belongs to."""
        return self.config.kinds.index(thing.kind) * len(self.config.colours) + self.config.colours.index(thing.colour)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> features (B, D) ≥ 0, logits (B, number of names)."""
        features = F.adaptive_avg_pool2d(self.body(pixel_values), 1).flatten(1)
        return features, self.names(features)
