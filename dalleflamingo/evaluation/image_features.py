"""What FID, IS, KID and image fidelity see of a picture: features and class logits of an Inception (App. A.1).

For photographs the network is Inception-v3 as the FID of published tables has it, through torch-fidelity; for the
miniature a small one of our own. Figures by the two do not compare.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dalleflamingo import registry
from dalleflamingo.miniature.inception import MiniatureInception
from dalleflamingo.miniature.recogniser import prepare
from dalleflamingo.registry import check_weights

BATCH = 32  # pictures looked at at once; bounds memory, does not change a feature


@dataclass(frozen=True)
class InceptionOutput:
    """What was seen of N pictures: features (N, D), and logits (N, C) of the classes."""

    features: Tensor
    logits: Tensor


class FeatureExtractor:
    """An Inception under one interface.

    Args:
        name: says in every figure that rests on it which network it was.
        model: pixels of B pictures -> features (B, D) and logits (B, C).
        pixels: pictures -> what the model takes, on the CPU.
    """

    def __init__(self, name: str, model: nn.Module, pixels: Callable[[Sequence[Image]], Tensor]):
        self.name, self.model, self.pixels = name, model.eval(), pixels

    @classmethod
    def of(cls, name: str, device: str = "cpu") -> "FeatureExtractor":
        """By its name in the registry; errors as `registry.locate`."""
        if name == "inception-v3":
            return cls.inception_v3(device=device)
        return cls.miniature(registry.locate(name), device)

    @classmethod
    def miniature(cls, folder: str | Path, device: str = "cpu") -> "FeatureExtractor":
        """The miniature's, D = 64, from its folder; its pictures are 64 × 64.

        Raises:
            RegistryError: the folder's weights are missing or cut short.
        """
        model = MiniatureInception.from_pretrained(check_weights(folder)).to(device)
        return cls("the miniature's Inception", model, prepare)

    @classmethod
    def inception_v3(cls, weights: Path | None = None, device: str = "cpu") -> "FeatureExtractor":
        """Inception-v3, D = 2048, by torch-fidelity.

        Args:
            weights: torch-fidelity's file (.pth) or the same tensors as safetensors; None downloads it (96 MB).
        Raises:
            FileNotFoundError: there is no such file.
        """
        return cls("Inception-v3", _inception_v3(_weights_of(weights)).to(device), _bytes)

    @torch.no_grad()
    def look(self, images: Sequence[Image]) -> InceptionOutput:
        """Features and logits of N pictures, float32 on the CPU; Inception-v3 resizes each by itself.

        Raises:
            ValueError: no picture, or for the miniature's one that is not 64 × 64.
        """
        if not images:
            raise ValueError("no picture to look at: give at least one")
        device = next(self.model.parameters()).device
        seen = []
        for start in range(0, len(images), BATCH):
            # photographs differ in size, and what is looked at together may not
            for _, alike in groupby(images[start : start + BATCH], key=lambda image: image.size):
                seen.append(self.model(self.pixels(list(alike)).to(device)))
        return InceptionOutput(*(torch.cat(tensors).float().cpu() for tensors in zip(*seen, strict=True)))


def _weights_of(file: Path | None) -> dict[str, Tensor]:
    if file is None:
        return torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", weights_only=True)
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no {file}: download {URL_INCEPTION_V3}, or give no file to have it done")
    if Path(file).suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _inception_v3(weights: dict[str, Tensor]) -> FeatureExtractorInceptionV3:
    # torch-fidelity unpickles its file; so it gets one that was written here, of tensors that were read safely
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return FeatureExtractorInceptionV3("inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)


def _bytes(images: Sequence[Image]) -> Tensor:
    """(B, 3, H, W) uint8 of pictures of one size; torch-fidelity resizes by itself, as the published FID does."""
    return torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)
