"""How similar two images are, by CLIP and DINO (§3.1, App. A.1); `evaluation.text_encoders` has what compares texts.

Higher is more similar. The encoder decides what counts: CLIP was trained with captions and compares what a caption
would say; DINO was trained on images alone and compares what they look like.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import open_clip
import torch
from huggingface_hub import hf_hub_download
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, BaseImageProcessor, ViTModel

from dalleflamingo.datasets import to_rgb
from dalleflamingo.registry import check_weights, loading
from dalleflamingo.runs import fingerprint

BATCH = 32  # images or texts encoded at once; bounds memory, does not change an embedding
T = TypeVar("T", Image, str)


class Similarity(Protocol[T]):
    """What `reconstruct` ranks by: T is an image in image → text → image, a text in text → image → text."""

    name: str

    def compare(self, sources: Sequence[T], candidates: Sequence[Sequence[T]]) -> Tensor:
        """Similarity of B sources with K candidates each, (B, K); higher is more similar."""

    def fingerprint(self) -> str:
        """A text that changes with everything that changes a result: a kept run is scored again when it does."""


def cosine_similarity(source: Tensor, candidates: Tensor) -> Tensor:
    """Cosine similarity of each source with its own candidates.

    Args:
        source: (B, D) embeddings of the inputs.
        candidates: (B, K, D) embeddings of the K candidates generated for each.
    Returns:
        (B, K) in [-1, 1].
    Raises:
        ValueError: the numbers of inputs or the embedding sizes differ.
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


class Encoder(Generic[T]):
    """A similarity that is the cosine of two embeddings; subclasses say how a batch is encoded.

    Attributes:
        model: the module that encodes.
        settings: what changes an embedding beside the weights: preprocessing, limits.
    """

    name: str
    model: nn.Module
    settings: Mapping[str, object]

    @torch.no_grad()
    def embed(self, items: Sequence[T]) -> Tensor:
        """(N, D) float32 embeddings of N images or texts, on the CPU.

        Raises:
            ValueError: there are no items.
        """
        if not items:
            raise ValueError("nothing to embed: give at least one image or text")
        batches = [self._encode(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
        return torch.cat(batches).float().cpu()

    def compare(self, sources: Sequence[T], candidates: Sequence[Sequence[T]]) -> Tensor:
        """(B, K) cosines in [-1, 1]; each source is embedded once."""
        embedded = self.embed(list(chain.from_iterable(candidates)))
        return cosine_similarity(self.embed(sources), embedded.reshape(len(sources), -1, embedded.shape[-1]))

    def fingerprint(self) -> str:
        """As `Similarity.fingerprint`: weights and settings."""
        return fingerprint(type(self).__name__, modules=[self.model], settings=self.settings)

    def _encode(self, items: Sequence[T]) -> Tensor:
        """(B, D) embeddings of one batch, on the encoder's device."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


class ClipImage(Encoder[Image]):
    """CLIP's projected image embedding (the paper: ViT-L/14, 768-d)."""

    name = "clip"

    def __init__(self, model: open_clip.CLIP, preprocess: Callable[[Image], Tensor]):
        self.model, self.preprocess = model.visual.eval(), preprocess  # the text tower is not needed
        self.settings = {"preprocess": re.sub(r" at 0x[0-9a-f]+", "", repr(preprocess))}  # without addresses

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str = "cpu", revision: str | None = None) -> "ClipImage":
        """CLIP's image encoder on `device`; other arguments and errors as `load_clip`."""
        model, preprocess, _ = load_clip(name_or_path, revision)
        return cls(model.to(device), preprocess)

    def _encode(self, images: Sequence[Image]) -> Tensor:
        return self.model(torch.stack([self.preprocess(to_rgb(image)) for image in images]).to(self._device))


class Dino(Encoder[Image]):
    """DINO's [CLS] embedding (the paper: ViT-B/8 on 384 × 384 pixels, 768-d).

    Attributes:
        image_size: side in pixels that images are resized to; embeddings at two sizes are not to be mixed.
    """

    name = "dino"

    def __init__(self, model: ViTModel, processor: BaseImageProcessor):
        self.model, self.processor, self.settings = model.eval(), processor, processor.to_dict()
        self.image_size: int = processor.size["height"]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: str = "cpu", revision: str | None = None, image_size: int | None = None
    ) -> "Dino":
        """DINO from a folder or a hub, on `device`; `revision`: commit, tag or branch of a hub's model.

        `image_size` replaces that of the model's own preprocessing (published DINO: 224 pixels); the position
        embeddings are interpolated to it.

        Raises:
            RegistryError: the folder's weights are missing or cut short.
        """
        source = {"pretrained_model_name_or_path": check_weights(name_or_path), "revision": revision or "main"}
        options = dict(dtype=torch.float32, add_pooling_layer=False, use_safetensors=True)
        size = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
        with loading(name_or_path):
            model = ViTModel.from_pretrained(**source, **options)
            return cls(model.to(device), AutoImageProcessor.from_pretrained(**source, **size))

    def _encode(self, images: Sequence[Image]) -> Tensor:
        pixel_values = self.processor(list(map(to_rgb, images)), return_tensors="pt").pixel_values.to(self._device)
        return self.model(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 0]


def load_clip(name_or_path: str, revision: str | None = None) -> tuple[open_clip.CLIP, Callable, Callable]:
    """A CLIP with its preprocessing of images and its tokenizer.

    From an open_clip folder, or by the hub id of published weights that open_clip knows, at a commit, tag or branch
    (None: the main branch) and never from a pickle.

    Raises:
        RegistryError: the folder's weights are missing or cut short.
        ValueError: open_clip knows no such weights.
    """
    if Path(name_or_path).is_dir():
        local = f"local-dir:{check_weights(name_or_path)}"
        with loading(name_or_path):
            model, _, preprocess = open_clip.create_model_and_transforms(local)
            return model, preprocess, open_clip.get_tokenizer(local)
    published = {
        weights["hf_hub"].rstrip("/"): (architecture, weights)
        for architecture, tag in reversed(open_clip.list_pretrained())
        if (weights := open_clip.get_pretrained_cfg(architecture, tag)).get("hf_hub")
    }
    if name_or_path not in published:
        raise ValueError(
            f"{name_or_path!r} is neither a folder nor the hub id of weights that open_clip knows, "
            "such as 'timm/vit_large_patch14_clip_224.openai'"
        )
    architecture, weights = published[name_or_path]
    with loading(name_or_path):
        file = hf_hub_download(name_or_path, "open_clip_model.safetensors", revision=revision)
        # the activation belongs to the weights; where the architecture's name implies another, open_clip only warns
        model, _, preprocess = open_clip.create_model_and_transforms(
            architecture, pretrained=file, force_quick_gelu=weights.get("quick_gelu", False)
        )
        return model, preprocess, open_clip.get_tokenizer(architecture)
