"""Training of the miniature's Inception: name all things of an image, and its ground."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalleflamingo.miniature import world
from dalleflamingo.miniature.inception import MiniatureInception
from dalleflamingo.miniature.recogniser import prepare
from dalleflamingo.miniature.training.averaging import AveragedRecipe
from dalleflamingo.miniature.training.recogniser import degrade, shift


class InceptionRecipe(AveragedRecipe):
    """Cross-entropy of kind and colour, with equal shares for all things of an image, plus that of the ground."""

    name, steps, batch_size = "inception", 6000, 64
    learning_rate, weight_decay, warmup = 2e-3, 0.01, 200

    def __init__(self):
        super().__init__(MiniatureInception())

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, 64, 64) in [-1, 1]; `names` (B, classes), shares that sum to 1; `grounds` (B,)."""
        scenes = [world.sample_scene(rng, count=int(rng.integers(1, 4))) for _ in range(self.batch_size)]
        names = torch.zeros(len(scenes), self.network.names.out_features)
        images = []
        for row, scene in enumerate(scenes):
            names[row, [self.network.class_of(thing) for thing in scene.things]] = 1 / len(scene.things)
            image, _ = shift(world.draw(scene), scene, *rng.integers(-2, 3, 2).tolist())
            images.append(degrade(image, rng))
        grounds = [self.network.config.grounds.index(scene.ground) for scene in scenes]
        return {"pixel_values": prepare(np.stack(images)), "names": names, "grounds": torch.tensor(grounds)}

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Mean cross-entropy in nats of the names (at least the entropy of their shares) and of the ground."""
        self.network.train()
        device = self.network.device
        pixels = batch["pixel_values"].to(device).contiguous(memory_format=torch.channels_last)
        features, logits = self.network(pixels)
        names = F.cross_entropy(logits, batch["names"].to(device))
        ground = F.cross_entropy(self.network.ground(features), batch["grounds"].to(device))
        return {"loss": names + ground, "names": names, "ground": ground}
