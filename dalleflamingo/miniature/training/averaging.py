"""Base class of the recipes of networks with batch normalisation."""

from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from dalleflamingo.miniature.training.base import Recipe


class AveragedRecipe(Recipe):
    """Trains `network`; exports `averaged`, the moving average of its weights and batch statistics.

    Args:
        network: a diffusers `ModelMixin`.
    """

    # The loop's average covers parameters only, as diffusers' EMAModel does. Averaged weights with the batch statistics
    # of the latest ones do not fit together, so these recipes keep an average of both.
    average = 0.0

    def __init__(self, network: nn.Module):
        self.network = network.to(memory_format=torch.channels_last)
        self.averaged = deepcopy(self.network).requires_grad_(False)
        self.modules = {"network": self.network, "averaged": self.averaged}
        self.compilable = (self.network,)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the average; its decay rises from 0.1 to 0.999, so that the first steps are soon forgotten."""
        decay = min(0.999, (1 + step) / (10 + step))
        latest = self.network.state_dict()
        for name, value in self.averaged.state_dict().items():
            if value.is_floating_point():
                value.lerp_(latest[name], 1 - decay)
            else:
                value.copy_(latest[name])

    def restore(self, folder: Path) -> None:
        """Read weights from a folder that `export` wrote."""
        weights = type(self.network).from_pretrained(folder).state_dict()
        for module in self.modules.values():
            module.load_state_dict(weights)

    def export(self, folder: Path) -> None:
        """Write config and safetensors, tensors in float16; `from_pretrained` loads them in float32."""
        deepcopy(self.averaged).half().save_pretrained(folder)
