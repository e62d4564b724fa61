"""What recipes of networks with batch normalisation share: the average that is exported, its statistics included."""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn


class AveragedRecipe:
    """Trains `network` and follows it with `steady`, its running average, which is what is exported.

    Args:
        network: a diffusers `ModelMixin`.
    """

    average = 0.0  # `steady` is the average: it takes in the batch statistics, too, which the loop's own would not

    def __init__(self, network: nn.Module):
        self.network = network.to(memory_format=torch.channels_last)
        self.steady = deepcopy(self.network).requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"network": self.network, "steady": self.steady}
        self.compilable = [self.network]

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Moves the average, batch statistics included; early steps count little, so that it soon forgets them."""
        keep = min(0.999, (1 + step) / (10 + step))
        new = self.network.state_dict()
        for name, value in self.steady.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], 1 - keep)
            else:
                value.copy_(new[name])

    def restore(self, folder: Path) -> None:
        weights = type(self.network).from_pretrained(folder).state_dict()
        for module in self.modules.values():
            module.load_state_dict(weights)

    def export(self, folder: Path) -> None:
        """Writes config and safetensors, tensors in float16; `from_pretrained` loads them in float32."""
        deepcopy(self.steady).half().save_pretrained(folder)
