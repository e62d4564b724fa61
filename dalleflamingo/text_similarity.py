"""How alike two texts are: cosines by CLIP and SBERT, and overlap of words by CIDEr and WMD (§3.1, App. A.1).

Higher is more alike. CLIP's text encoder learned which words go with which pictures, SBERT which sentences mean the
same; CIDEr counts shared n-grams, and WMD asks how far the words of one text must travel to become the other's.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dalleflamingo.ngrams import Cider
from dalleflamingo.similarity import Encoder, in_batches, load_clip
from dalleflamingo.weights import check_weights
from dalleflamingo.word_movers import WordVectors
from dalleflamingo.words import tokenize

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


class CiderOverlap:
    """CIDEr of a text with its source as the only reference.

    Args:
        corpus: says how rare each n-gram is; a single pair of texts cannot.
    """

    name = "text_cider"

    def __init__(self, corpus: Cider):
        self._corpus = corpus
        self.idf = f"of {corpus.images} images, words by {corpus.tokenizer}"

    def compare(self, sources: Sequence[str], candidates: Sequence[Sequence[str]]) -> Tensor:
        """(B, K) in [0, 10]."""
        scorer = Cider({i: [source] for i, source in enumerate(sources)}, idf_of=self._corpus)
        ids = [i for i, others in enumerate(candidates) for _ in others]
        return torch.from_numpy(scorer.score(ids, list(chain.from_iterable(candidates)))).reshape(len(sources), -1)


class WordMovers:
    """The negative Word Mover's Distance (Kusner et al. 2015)."""

    name = "text_wmd"

    def __init__(self, vectors: WordVectors):
        self._vectors = vectors
        self.vectors = vectors.name

    def compare(self, sources: Sequence[str], candidates: Sequence[Sequence[str]]) -> Tensor:
        """(B, K) in [-2, 0]; 0 for the same words in any order."""
        split = tokenize({"sources": sources, "candidates": list(chain.from_iterable(candidates))})
        others = iter(split["candidates"])
        pairs = zip(split["sources"], candidates, strict=True)
        return torch.tensor([[-self._vectors.distance(source, next(others)) for _ in row] for source, row in pairs])
