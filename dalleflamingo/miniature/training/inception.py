"""Training of the miniature's Inception: name one thing of each image, chosen at random."""

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
    """Cross-entropy of kind and colour of one thing, chosen uniformly from those in the image."""

    name, steps, batch_size = "inception", 6000, 64
    learning_rate, weight_decay, warmup = 2e-3, 0.01, 200

    def __init__(self):
        super().__init__(MiniatureInception())

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, 64, 64) in [-1, 1] and `classes` (B,), of one thing of each image."""
        images, classes = [], []
        for _ in range(self.batch_size):
            scene = world.sample_scene(rng)
            thing = scene.things[rng.integers(len(scene.things))]
            classes.append(self.network.class_of(thing))
            image, _ = shift(world.draw(scene), scene, *rng.integers(-2, 3, 2).tolist())
            images.append(degrade(image, rng))
        return {"pixel_values": prepare(np.stack(images)), "classes": torch.tensor(classes)}

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Mean cross-entropy in nats."""
        self.network.train()
        device = self.network.device
        pixels = batch["pixel_values"].to(device).contiguous(memory_format=torch.channels_last)
        _, logits = self.network(pixels)
        return {"loss": F.cross_entropy(logits, batch["classes"].to(device))}
