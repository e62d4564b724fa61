"""Similarities that are metrics: CIDEr and WMD of texts, fidelity of pictures (§3.1, App. A.1).

Higher is more alike. CIDEr counts shared n-grams; WMD asks how far the words of one text must travel to become the
other's; fidelity compares the features that FID compares.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from PIL.Image import Image
from torch import Tensor

from dalleflamingo import profiles
from dalleflamingo.evaluation.caption_tokenizer import tokenize
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.ngrams import Cider
from dalleflamingo.evaluation.word_movers import WordVectors
from dalleflamingo.reconstruct import source_of
from dalleflamingo.similarity import ClipText, Sbert, Similarity


class Fidelity:
    """Image fidelity: the negative squared distance of two pictures' features (our reading of §3.1, as FID has them).

    Args:
        extractor: Inception-v3, or the miniature's own; see `image_features`.
    """

    name = "fidelity"

    def __init__(self, extractor: FeatureExtractor):
        self.extractor, self.model = extractor, extractor.model

    def compare(self, sources: Sequence[Image], candidates: Sequence[Sequence[Image]]) -> Tensor:
        """(B, K) in (-∞, 0]; 0 for equal features."""
        drawn = self.extractor.look(list(chain.from_iterable(candidates))).features
        source = self.extractor.look(sources).features.unsqueeze(1)  # (B, 1, D)
        return -(drawn.reshape(len(sources), -1, drawn.shape[-1]) - source).square().sum(-1)


class CiderSimilarity:
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


class WordMoversSimilarity:
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


def load_text_similarities(profile: profiles.Profile, corpus: Mapping[int, Sequence[str]]) -> list[Similarity]:
    """CLIP's text encoder, SBERT, CIDEr and WMD. Errors as `registry.locate`.

    Args:
        corpus: image id -> captions; says how rare an n-gram is, for CIDEr.
    """
    return [
        ClipText.from_pretrained(**source_of(profile, profile.clip)),
        Sbert.from_pretrained(**source_of(profile, "sbert")),
        CiderSimilarity(Cider(corpus)),
        WordMoversSimilarity(WordVectors.at_hand()),
    ]
