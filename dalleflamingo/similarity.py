"""How alike two pictures are: cosine between their embeddings by CLIP or DINO (§3.1, App. A.1).

Higher is more alike. An encoder says what "alike" means: CLIP learned from captions and sees what one would say of a
picture; DINO learned from pictures alone and sees how things look.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import open_clip
import torch
from huggingface_hub import hf_hub_download
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, BaseImageProcessor, ViTModel

from dalleflamingo.weights import check_weights

BATCH = 32  # pictures encoded at once; bounds memory, does not change an embedding


class ImageSimilarity(Protocol):
    """What `reconstruct` ranks by."""

    name: str
    higher_is_better: bool

    def embed(self, images: Sequence[Image]) -> Tensor:
        """(N, D) float32 embeddings of N pictures, on the CPU."""


def cosine_similarity(source: Tensor, candidates: Tensor) -> Tensor:
    """Cosine similarity of each source with its own candidates.

    Args:
        source: (B, D) embeddings of the input pictures.
        candidates: (B, K, D) embeddings of the K pictures drawn for each.
    Returns:
        (B, K) in [-1, 1].
    Raises:
        ValueError: if the numbers of pictures or the embedding sizes differ.
    """
    if source.ndim != 2 or candidates.ndim != 3 or len(source) != len(candidates):
        raise ValueError(
            f"source is {tuple(source.shape)} and candidates {tuple(candidates.shape)}: expected (B, D) and (B, K, D)"
        )
    if source.shape[-1] != candidates.shape[-1]:
        raise ValueError(
            f"source embeds into {source.shape[-1]} dimensions, candidates into {candidates.shape[-1]}: "
            "were both made by the same encoder?"
        )
    return (F.normalize(source, dim=-1).unsqueeze(1) * F.normalize(candidates, dim=-1)).sum(-1)  # (B, 1, D) · (B, K, D)


class ClipImage:
    """CLIP's projected image embedding (the paper: ViT-L/14, 768-d)."""

    name = "clip"
    higher_is_better = True

    def __init__(self, model: open_clip.CLIP, preprocess: Callable[[Image], Tensor]):
        self.visual, self.preprocess = model.visual.eval(), preprocess  # the text tower is not needed

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str = "cpu", revision: str | None = None) -> "ClipImage":
        """CLIP from an open_clip folder, or by the hub id of weights that open_clip publishes.

        Raises:
            RegistryError: the folder's weights are missing or cut short.
            ValueError: open_clip knows no such weights.
        """
        if Path(name_or_path).is_dir():
            model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{check_weights(name_or_path)}")
        else:
            model, _, preprocess = _published_clip(name_or_path, revision)
        return cls(model.to(device), preprocess)

    def embed(self, images: Sequence[Image]) -> Tensor:
        """(N, D) float32 embeddings, on the CPU."""
        return _in_batches(self._encode, images)

    def _encode(self, images: Sequence[Image]) -> Tensor:
        device = next(self.visual.parameters()).device
        return self.visual(torch.stack([self.preprocess(image) for image in images]).to(device))


class Dino:
    """DINO's [CLS] embedding (the paper: ViT-B/8 on 384 × 384 pixels, 768-d).

    Attributes:
        image_size: side in pixels that pictures are resized to; embeddings at two sizes are not to be mixed.
    """

    name = "dino"
    higher_is_better = True

    def __init__(self, model: ViTModel, processor: BaseImageProcessor):
        self.model, self.processor = model.eval(), processor
        self.image_size: int = processor.size["height"]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: str = "cpu", revision: str | None = None, image_size: int | None = None
    ) -> "Dino":
        """DINO from a folder or a hub.

        Args:
            image_size: another size than the model's own preprocessing has (published DINO: 224); the position
                embeddings are interpolated to it.
        Raises:
            RegistryError: the folder's weights are missing or cut short.
        """
        name = check_weights(name_or_path)
        where = {} if revision is None else {"revision": revision}
        model = ViTModel.from_pretrained(
            name, dtype=torch.float32, add_pooling_layer=False, use_safetensors=True, **where
        )
        size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
        return cls(model.to(device), AutoImageProcessor.from_pretrained(name, **where, **size))

    def embed(self, images: Sequence[Image]) -> Tensor:
        """(N, D) float32 embeddings, on the CPU."""
        return _in_batches(self._encode, images)

    def _encode(self, images: Sequence[Image]) -> Tensor:
        images = [image.convert("RGB") for image in images]
        pixel_values = self.processor(images, return_tensors="pt").pixel_values.to(self.model.device)
        return self.model(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 0]


@torch.no_grad()
def _in_batches(encode: Callable[[Sequence[Image]], Tensor], images: Sequence[Image]) -> Tensor:
    if not images:
        raise ValueError("no picture to embed: give at least one")
    batches = [encode(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return torch.cat(batches).float().cpu()


def _published_clip(hub_id: str, revision: str | None):
    """open_clip's model whose weights have that hub id, at a pinned revision and never from a pickle."""
    published = {
        weights["hf_hub"].rstrip("/"): (architecture, weights)
        for architecture, tag in reversed(open_clip.list_pretrained())
        if (weights := open_clip.get_pretrained_cfg(architecture, tag)).get("hf_hub")
    }
    if hub_id not in published:
        raise ValueError(
            f"{hub_id!r} is neither a folder nor the hub id of weights that open_clip knows, "
            "such as 'timm/vit_large_patch14_clip_224.openai'"
        )
    architecture, weights = published[hub_id]
    file = hf_hub_download(hub_id, "open_clip_model.safetensors", revision=revision)
    # the activation belongs to the weights; where the architecture's name implies another, open_clip only warns
    return open_clip.create_model_and_transforms(
        architecture, pretrained=file, force_quick_gelu=weights.get("quick_gelu", False)
    )
