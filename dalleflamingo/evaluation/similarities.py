"""Similarities made of metrics: CIDEr and Word Mover's Distance of texts, fidelity of images (§3.1, App. A.1).

`similarities_among` finds the columns of all similarities in a run's table. Higher is more alike. CIDEr counts shared
n-grams. Word Mover's Distance adds up how far the words of one text are from those of the other. Image fidelity
compares the features that FID compares.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from dalleflamingo import registry
from dalleflamingo.adapters.safety import SafetyChecker
from dalleflamingo.evaluation.caption_tokenizer import tokenize
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.ngrams import Cider
from dalleflamingo.evaluation.text_encoders import ClipText, Sbert
from dalleflamingo.evaluation.word_movers import WordVectors
from dalleflamingo.profiles import Profile
from dalleflamingo.reconstruct import ImageTextImage, TextImageText
from dalleflamingo.runs import fingerprint
from dalleflamingo.similarity import ClipImage, Dino, Similarity

T = TypeVar("T")  # an image or a text


@dataclass(frozen=True)
class PairSimilarity(Generic[T]):
    """A similarity of one's own, by a function of a source and a candidate, higher where they are more similar."""

    name: str  # of its column in a run's table
    function: Callable[[T, T], float]
    version: str = "1"  # change it when you change the function, so that a kept run is scored again

    def compare(self, sources: Sequence[T], candidates: Sequence[Sequence[T]]) -> Tensor:
        """As `Similarity.compare`."""
        pairs = zip(sources, candidates, strict=True)
        return torch.tensor([[float(self.function(source, other)) for other in others] for source, others in pairs])

    def fingerprint(self) -> str:
        """As `Similarity.fingerprint`, by name and version."""
        return fingerprint(type(self).__name__, settings={"name": self.name, "version": self.version})


class Fidelity:
    """Image fidelity: the negative squared distance of two images' features (our reading of §3.1, after FID).

    Args:
        extractor: of Inception-v3, or of the miniature's own network.
    """

    name = "fidelity"

    def __init__(self, extractor: FeatureExtractor):
        self.extractor = extractor

    def fingerprint(self) -> str:
        """Changes with the network's weights."""
        return fingerprint("Fidelity", modules=[self.extractor.model], settings={"network": self.extractor.name})

    def compare(self, sources: Sequence[Image], candidates: Sequence[Sequence[Image]]) -> Tensor:
        """(B, K) in (-∞, 0], 0 for equal features, of B sources with K candidates each."""
        features = self.extractor.extract(list(chain.from_iterable(candidates))).features  # (B · K, D)
        source = self.extractor.extract(sources).features.unsqueeze(1)  # (B, 1, D)
        return -(features.reshape(len(sources), -1, features.shape[-1]) - source).square().sum(-1)


class CiderSimilarity:
    """CIDEr of a text with its source as the only reference.

    Args:
        corpus: says how rare each n-gram is; a single pair of texts cannot.
    """

    name = "text_cider"

    def __init__(self, corpus: Cider):
        self.corpus = corpus

    def fingerprint(self) -> str:
        """Changes with the corpus and with the tokenizer that splits its words."""
        corpus = [self.corpus.images, len(self.corpus.frequency), sum(self.corpus.frequency.values())]
        return fingerprint("CIDEr", settings={"corpus": corpus, "tokenizer": self.corpus.tokenizer})

    def compare(self, sources: Sequence[str], candidates: Sequence[Sequence[str]]) -> Tensor:
        """(B, K) in [0, 10], of B sources with K candidates each."""
        scorer = Cider({i: [source] for i, source in enumerate(sources)}, idf_of=self.corpus)
        ids = [i for i, others in enumerate(candidates) for _ in others]
        return torch.from_numpy(scorer.score(ids, list(chain.from_iterable(candidates)))).reshape(len(sources), -1)


class WordMoversSimilarity:
    """The negative Word Mover's Distance (Kusner et al. 2015).

    Args:
        vectors: of words.
    """

    name = "text_wmd"

    def __init__(self, vectors: WordVectors):
        self.vectors = vectors

    def fingerprint(self) -> str:
        """Changes with the name of the word vectors, and with the file that holds them."""
        digest = {"digest": self.vectors.digest} if self.vectors.digest else {}
        return fingerprint("Word Mover's Distance", settings={"vectors": self.vectors.name, **digest})

    def compare(self, sources: Sequence[str], candidates: Sequence[Sequence[str]]) -> Tensor:
        """(B, K) in [-2, 0], 0 for the same words in any order, of B sources with K candidates each."""
        words = tokenize({"sources": sources, "candidates": list(chain.from_iterable(candidates))})
        others = iter(words["candidates"])
        pairs = zip(words["sources"], candidates, strict=True)
        return torch.tensor([[-self.vectors.distance(source, next(others)) for _ in row] for source, row in pairs])


def load_image_similarities(profile: Profile) -> list[Similarity]:
    """The similarities of images: CLIP, DINO and image fidelity.

    Args:
        profile: names the models and the device.
    Raises:
        RegistryError: weights are missing or cut short.
    """
    return [
        ClipImage.from_pretrained(**registry.source_of(profile.clip, profile.device)),
        Dino.from_pretrained(**registry.source_of(profile.dino, profile.device), image_size=profile.dino_size),
        Fidelity(FeatureExtractor.from_registry(profile.inception, profile.device)),
    ]


def load_text_similarities(profile: Profile, corpus: Mapping[int, Sequence[str]]) -> list[Similarity]:
    """The similarities of texts: CLIP's text encoder, SBERT, CIDEr and Word Mover's Distance.

    Args:
        profile: names CLIP and the device.
        corpus: image id -> captions; says how rare an n-gram is, for CIDEr.
    Raises:
        RegistryError: weights are missing or cut short.
    """
    return [
        ClipText.from_pretrained(**registry.source_of(profile.clip, profile.device)),
        Sbert.from_pretrained(**registry.source_of("sbert", profile.device)),
        CiderSimilarity(Cider(corpus)),
        WordMoversSimilarity(WordVectors.at_hand()),
    ]


def similarities_among(columns: Iterable[str]) -> list[str]:
    """Those of a table's columns that are similarities: neither a journey, `reconstruct.rank` nor the checker's."""
    others = ImageTextImage.columns.keys() | TextImageText.columns.keys() | {"rank", SafetyChecker.name}
    return [name for name in columns if name not in others]
