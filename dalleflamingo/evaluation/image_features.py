"""Features and class logits of images by an Inception network: what FID, IS and image fidelity are made of (App. A.1).

For photographs the network is Inception-v3 with the weights of published FIDs, through torch-fidelity. The miniature
has a small one of its own, which its registry entry names. Numbers by different networks do not compare.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from dalleflamingo import registry
from dalleflamingo.datasets import open_image, to_rgb
from dalleflamingo.sources.models import class_of


class ImageFiles(Sequence[Image]):
    """A sequence of images that opens each file on access, so that thousands of images need little memory.

    Args:
        paths: paths of the image files; access raises as `open_image`.
    """

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        paths = self.paths[index]
        return [open_image(path) for path in paths] if isinstance(index, slice) else open_image(paths)


@dataclass(frozen=True)
class InceptionOutput:
    """Features (N, D) and class logits (N, C) of N images, float32 on the CPU."""

    features: Tensor
    logits: Tensor


class Inception(Protocol):
    """A network that `FeatureExtractor` can use: an `nn.Module` with a title, whose `from_pretrained` takes a path."""

    title: str

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """B images of one size -> what `forward` takes, on the CPU."""

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The result of `preprocess` -> features (B, D) and logits (B, C)."""


class InceptionV3(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception-v3: D = 2048 features, C = 1008 classes; it resizes images itself, to 299 pixels."""

    title = "Inception-v3"

    @classmethod
    def from_pretrained(cls, path: str | Path = URL_INCEPTION_V3) -> "InceptionV3":
        """The network with the weights of a file.

        Args:
            path: torch-fidelity's file (.pth) or the same tensors as safetensors; an address is downloaded (96 MB).
        Raises:
            FileNotFoundError: there is no such file.
        """
        # torch-fidelity unpickles its file, so it gets one that is written here, of tensors that were read safely
        file = io.BytesIO()
        torch.save(_read_weights(path), file)
        file.seek(0)
        return cls("inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """B images of one size -> (B, 3, H, W) uint8."""
        return torch.from_numpy(np.stack([np.array(to_rgb(image)) for image in images])).permute(0, 3, 1, 2)


def _read_weights(path: str | Path) -> dict[str, Tensor]:
    if str(path).startswith("https://"):
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(path).name)
        if not cached.is_file() and not registry.answers(str(path)):  # torch would wait for minutes
            raise registry.RegistryError(
                f"{cached} is not on this machine, and cannot be downloaded: {path} does not answer; connect to the "
                "network once, or copy the file from a machine that has it"
            )
        return torch.hub.load_state_dict_from_url(str(path), map_location="cpu", weights_only=True)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {path}: download {URL_INCEPTION_V3}, or give no path to have it done")
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


class FeatureExtractor:
    """Features and logits of any number of images, by one Inception.

    Args:
        model: the network; its title goes into every table whose numbers rest on it.
    """

    def __init__(self, model: Inception):
        self.model, self.name = model.eval(), model.title

    @classmethod
    def from_registry(cls, name: str, device: str = "cpu") -> "FeatureExtractor":
        """The network of a registry entry, such as a profile's `inception`.

        Args:
            name: "inception-v3", or an entry whose `opened_by` names its class.
            device: as `Profile.device`.
        Raises:
            RegistryError: unknown name, or weights that are missing or cut short.
        """
        network = class_of(name) or InceptionV3
        where = registry.check_weights(registry.locate(name))
        with registry.loading(where):
            return cls(network.from_pretrained(where).to(device))

    @torch.no_grad()
    def extract(self, images: Sequence[Image], batch_size: int = 32) -> InceptionOutput:
        """Features and logits of N images.

        Args:
            images: of any size for Inception-v3, 64 × 64 for the miniature's.
            batch_size: images at once; bounds memory, does not change a feature.
        Raises:
            ValueError: no image, or one of a size that the network does not take.
        """
        if not images:
            raise ValueError("no image to extract features of: give at least one")
        device = next(self.model.parameters()).device
        outputs = []
        for start in range(0, len(images), batch_size):
            # photographs differ in size, and only images of one size make a tensor
            for _, same in groupby(images[start : start + batch_size], key=lambda image: image.size):
                outputs.append(self.model(self.model.preprocess(list(same)).to(device)))
        return InceptionOutput(*(torch.cat(tensors).float().cpu() for tensors in zip(*outputs, strict=True)))
