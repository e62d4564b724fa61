"""How alike two pictures are: cosines by CLIP and DINO, and how near their pixels or features lie (§3.1, App. A.1).

Higher is more alike. An encoder says what "alike" means: CLIP learned from captions and sees what one would say of a
picture; DINO learned from pictures alone and sees how things look. How alike texts are says `text_similarity`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import open_clip
import torch
from huggingface_hub import hf_hub_download
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTModel,
)

from dalleflamingo.registry import check_weights

BATCH = 32  # pictures or texts encoded at once; bounds memory, does not change an embedding
T = TypeVar("T", Image, str)


class Similarity(Protocol[T]):
    """What `reconstruct` ranks by: T is a picture on the way image → text → image, a text on the other."""

    name: str

    def compare(self, sources: Sequence[T], candidates: Sequence[Sequence[T]]) -> Tensor:
        """(B, K): how like its source each candidate is, higher is more alike, for B sources with K candidates each."""


class Encoder(Generic[T]):
    """A similarity that is the cosine of two embeddings; subclasses say what an embedding is."""

    name: str

    def embed(self, items: Sequence[T]) -> Tensor:
        """(N, D) float32 embeddings of N pictures or texts, on the CPU."""
        raise NotImplementedError

    def compare(self, sources: Sequence[T], candidates: Sequence[Sequence[T]]) -> Tensor:
        """(B, K) cosines in [-1, 1]; each source is embedded once."""
        embedded = self.embed(list(chain.from_iterable(candidates)))
        return cosine_similarity(self.embed(sources), embedded.reshape(len(sources), -1, embedded.shape[-1]))


@dataclass(frozen=True)
class PairSimilarity(Generic[T]):
    """A similarity of one's own: a function of a source and a candidate, higher where they are more alike."""

    name: str
    function: Callable[[T, T], float]

    def compare(self, sources: Sequence[T], candidates: Sequence[Sequence[T]]) -> Tensor:
        """As `Similarity.compare`."""
        pairs = zip(sources, candidates, strict=True)
        return torch.tensor([[float(self.function(source, other)) for other in others] for source, others in pairs])


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


class ClipImage(Encoder[Image]):
    """CLIP's projected image embedding (the paper: ViT-L/14, 768-d)."""

    name = "clip"

    def __init__(self, model: open_clip.CLIP, preprocess: Callable[[Image], Tensor]):
        self.visual, self.preprocess = model.visual.eval(), preprocess  # the text tower is not needed

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str = "cpu", revision: str | None = None) -> "ClipImage":
        """CLIP from an open_clip folder, or by the hub id of published weights; errors as `load_clip`."""
        model, preprocess, _ = load_clip(name_or_path, revision)
        return cls(model.to(device), preprocess)

    def embed(self, images: Sequence[Image]) -> Tensor:
        """(N, D) float32 embeddings, on the CPU."""
        return in_batches(self._encode, images)

    def _encode(self, images: Sequence[Image]) -> Tensor:
        device = next(self.visual.parameters()).device
        return self.visual(torch.stack([self.preprocess(image) for image in images]).to(device))


class Dino(Encoder[Image]):
    """DINO's [CLS] embedding (the paper: ViT-B/8 on 384 × 384 pixels, 768-d).

    Attributes:
        image_size: side in pixels that pictures are resized to; embeddings at two sizes are not to be mixed.
    """

    name = "dino"

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
        return in_batches(self._encode, images)

    def _encode(self, images: Sequence[Image]) -> Tensor:
        images = [image.convert("RGB") for image in images]
        pixel_values = self.processor(images, return_tensors="pt").pixel_values.to(self.model.device)
        return self.model(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 0]


class Pixels:
    """The negative mean squared difference of two pictures' pixels; needs no model."""

    name = "pixels"

    def compare(self, sources: Sequence[Image], candidates: Sequence[Sequence[Image]]) -> Tensor:
        """(B, K) in [-1, 0]; candidates are resized to their source."""
        pairs = zip(sources, candidates, strict=True)
        return torch.tensor([[-_squared_difference(source, other) for other in others] for source, others in pairs])


def _squared_difference(source: Image, other: Image) -> float:
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in (source, other.resize(source.size)))
    return float(np.square(a - b).mean())


@torch.no_grad()
def in_batches(encode: Callable[[Sequence[T]], Tensor], items: Sequence[T]) -> Tensor:
    """(N, D) float32 on the CPU: N pictures or texts encoded a few at a time."""
    if not items:
        raise ValueError("nothing to embed: give at least one picture or text")
    batches = [encode(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    return torch.cat(batches).float().cpu()


def load_clip(name_or_path: str, revision: str | None = None) -> tuple[open_clip.CLIP, Callable, Callable]:
    """An open_clip folder's model, or a published one by its hub id, with its preprocessing and its tokenizer.

    Published weights are taken at a pinned revision and never from a pickle.

    Raises:
        RegistryError: the folder's weights are missing or cut short.
        ValueError: open_clip knows no such weights.
    """
    if Path(name_or_path).is_dir():
        local = f"local-dir:{check_weights(name_or_path)}"
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
    file = hf_hub_download(name_or_path, "open_clip_model.safetensors", revision=revision)
    # the activation belongs to the weights; where the architecture's name implies another, open_clip only warns
    model, _, preprocess = open_clip.create_model_and_transforms(
        architecture, pretrained=file, force_quick_gelu=weights.get("quick_gelu", False)
    )
    return model, preprocess, open_clip.get_tokenizer(architecture)


SBERT_TOKENS = 256  # more were not read in training


class ClipText(Encoder[str]):
    """CLIP's projected text embedding (the paper: ViT-L/14)."""

    name = "text_clip"

    def __init__(self, model: open_clip.CLIP, tokenizer: Callable[[Sequence[str]], Tensor]):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str = "cpu", revision: str | None = None) -> "ClipText":
        """As `similarity.ClipImage.from_pretrained`."""
        model, _, tokenizer = load_clip(name_or_path, revision)
        model.visual = nn.Identity()  # not needed, and the larger half
        return cls(model.to(device), tokenizer)

    def embed(self, items: Sequence[str]) -> Tensor:
        """(N, D) float32 embeddings, on the CPU; what lies behind CLIP's 77 tokens is not read."""
        return in_batches(self._encode, items)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model.encode_text(self.tokenizer(list(texts)).to(device))


class Sbert(Encoder[str]):
    """SBERT, all-MiniLM-L6-v2: the mean of the last layer's token embeddings, 384-d.

    The paper takes the [CLS] embedding; this model was trained for the mean.
    """

    name = "text_sbert"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: str = "cpu", revision: str | None = None) -> "Sbert":
        """SBERT from a folder or a hub.

        Raises:
            RegistryError: the folder's weights are missing or cut short.
        """
        name = check_weights(name_or_path)
        where = {} if revision is None else {"revision": revision}
        model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **where)
        return cls(model.to(device), AutoTokenizer.from_pretrained(name, **where))

    def embed(self, items: Sequence[str]) -> Tensor:
        """(N, 384) float32 embeddings of length 1, on the CPU."""
        return in_batches(self._encode, items)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=SBERT_TOKENS, return_tensors="pt"
        ).to(self.model.device)
        mask = inputs.attention_mask.unsqueeze(-1)  # (B, T, 1)
        states = self.model(**inputs).last_hidden_state * mask
        return F.normalize(states.sum(1) / mask.sum(1), dim=-1)
