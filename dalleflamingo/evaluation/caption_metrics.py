"""How good captions are against human references (§3.2): overlap of words, of facts, and of meaning.

BLEU 1–4, METEOR, ROUGE-L, CIDEr and SPICE come from pycocoevalcap, the code behind the published tables. `Cider` and
`BleuTable` give the same numbers for many candidates of an image and for the resamples of a bootstrap. In the miniature
the exact scene graph stands in for SPICE. WMD and embeddings ask for meaning; CLIPScore needs no reference. Every score
says which direction is better, which tokenizer split its words, and its n.
"""

import re
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pycocoevalcap.bleu import bleu as stock_bleu
from pycocoevalcap.cider import cider as stock_cider
from pycocoevalcap.meteor import meteor as stock_meteor
from pycocoevalcap.rouge import rouge as stock_rouge
from pycocoevalcap.spice import spice as stock_spice
from torch import Tensor
from torch.nn import functional as F

from dalleflamingo.evaluation.caption_tokenizer import PTB, default_tokenizer, tokenize
from dalleflamingo.evaluation.ngrams import ORDERS, SIGMA, BleuTable, Cider, CiderTable, refuse_unknown, warn_if_alone
from dalleflamingo.evaluation.word_movers import WordVectors
from dalleflamingo.similarity import Encoder, cosine_similarity

__all__ = [
    "BleuTable", "Cider", "CiderTable", "MetricUnavailable", "Score", "bleu", "cider", "clip_score",
    "embedding_similarity", "evaluate", "meteor", "ref_clip_score", "spice", "tokenize", "wmd",
]  # fmt: skip

SPICE_JAVA = 8, 11  # the versions that SPICE 1.0 runs on


class MetricUnavailable(RuntimeError):
    """Something that a metric needs is not on this machine; the message says what to install."""


@dataclass(frozen=True)
class Score:
    """One metric on one corpus.

    value: of the corpus. per_item: image id -> score of its caption alone; BLEU's value is not their mean.
    n: number of captions. tokenizer: which one split the words; numbers under different ones do not compare.
    """

    name: str
    value: float
    per_item: dict[Hashable, float]
    n: int
    tokenizer: str
    higher_is_better: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3f} (n = {self.n}, words by {self.tokenizer})"


def evaluate(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> dict[str, Score]:
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr of one caption an image, by pycocoevalcap, under those names.

    BLEU and ROUGE-L lie in [0, 1], CIDEr in [0, 10]; published tables show them × 100. An empty caption scores 0.

    Args:
        references: image id -> human captions. predictions: the same image ids -> the caption to judge.
    Raises:
        ValueError: there are no predictions, the ids differ, or an image has no reference.
        TypeError: a caption that is not a string.
    """
    gold, guess, tokenizer = _split(references, predictions)
    warn_if_alone(len(guess))
    bleus, bleus_per_item = stock_bleu.Bleu(ORDERS).compute_score(gold, guess, verbose=0)
    values = {f"BLEU-{order}": (bleus[order - 1], bleus_per_item[order - 1]) for order in range(1, ORDERS + 1)}
    values["ROUGE-L"] = stock_rouge.Rouge().compute_score(gold, guess)
    values["CIDEr"] = stock_cider.Cider(n=ORDERS, sigma=SIGMA).compute_score(gold, guess)
    return {name: _score(name, *value, guess, tokenizer) for name, value in values.items()}


def _split(
    references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]
) -> tuple[dict[Hashable, list[str]], dict[Hashable, list[str]], str]:
    """References and predictions as the stock scorers take them, words split, and the tokenizer that did it."""
    _same_ids(references, predictions)
    tokenizer = default_tokenizer()
    gold = tokenize({i: references[i] for i in predictions}, tokenizer)
    if not any(caption for captions in gold.values() for caption in captions):
        raise ValueError("no reference holds a word: is the file of references right?")
    return gold, tokenize({i: [caption] for i, caption in predictions.items()}, tokenizer), tokenizer


def _score(name: str, value: float, per_item: Sequence[float], ids, tokenizer: str, higher: bool = True) -> Score:
    return Score(name, float(value), dict(zip(ids, map(float, per_item), strict=True)), len(ids), tokenizer, higher)


def meteor(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> Score:
    """METEOR 1.5 in [0, 1], by pycocoevalcap and Java; arguments and errors as `evaluate`.

    Raises:
        MetricUnavailable: there is no Java, or METEOR died in it.
    """
    gold, guess, tokenizer = _split(references, predictions)
    if tokenizer != PTB:
        raise MetricUnavailable("METEOR is a Java program: install a Java runtime (apt install default-jre-headless)")
    scorer = stock_meteor.Meteor()
    try:
        value, per_item = scorer.compute_score(gold, guess)
    except (OSError, ValueError) as error:
        said = scorer.meteor_p.stderr.read().decode(errors="replace").strip()[-500:]
        scorer.lock.release()  # compute_score left it held, and the scorer's end would wait for it forever
        raise MetricUnavailable(f"METEOR died ({error}): {said}. It wants 2 GB of memory.") from error
    return _score("METEOR", value, per_item, guess, tokenizer)


def spice(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> Score:
    """SPICE in [0, 1], by pycocoevalcap, Java 8 or 11 and Stanford's CoreNLP; arguments and errors as `evaluate`.

    Raises:
        MetricUnavailable: Java is another one, or CoreNLP's files are not in their place; nothing is downloaded.
    """
    _spice_ready(Path(stock_spice.__file__).parent / "lib")
    gold, guess, tokenizer = _split(references, predictions)
    numbered = [dict(enumerate(captions.values())) for captions in (gold, guess)]  # its JSON has no other ids
    value, per_item = stock_spice.Spice().compute_score(*numbered)
    return _score("SPICE", value, [item["All"]["f"] for item in per_item], guess, tokenizer)


def _spice_ready(folder: Path) -> None:
    release = "stanford-corenlp-3.6.0"
    absent = [file for file in (f"{release}.jar", f"{release}-models.jar") if not (folder / file).is_file()]
    if absent:
        raise MetricUnavailable(
            f"SPICE needs {' and '.join(absent)} in {folder}: take them from "
            "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip. (In the miniature the exact "
            "scene-graph F1 stands in: miniature.scene_graph.scene_graph_f1.)"
        )
    version = _java_version()
    if version not in SPICE_JAVA:
        found = f"Java {version} is here" if version else "there is no Java"
        raise MetricUnavailable(f"SPICE runs on Java 8 or 11; {found}: install openjdk-11-jre and put it first on PATH")


def _java_version() -> int | None:
    """The major version of `java`: 8 for "1.8.0_392", 17 for "17.0.15"."""
    try:
        said = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    except OSError:
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found[1]) if found else None


def wmd(
    references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str], vectors: WordVectors
) -> Score:
    """Word Mover's Distance in [0, 2] to the nearest reference, mean over images; lower is better.

    Arguments and errors as `evaluate`.
    """
    gold, guess, tokenizer = _split(references, predictions)
    nearest = [min(vectors.distance(guess[i][0], caption) for caption in gold[i]) for i in guess]
    return _score(f"WMD ({vectors.name})", np.mean(nearest), nearest, guess, tokenizer, higher=False)


def embedding_similarity(
    references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str], encoder: Encoder[str]
) -> Score:
    """Cosine in [-1, 1] of a caption's embedding and its references', mean over references, then images (§3.2).

    Arguments and errors as `evaluate`.
    """
    _same_ids(references, predictions)
    texts = [text for i in predictions for text in references[i]]
    owner = np.repeat(np.arange(len(predictions)), [len(references[i]) for i in predictions])
    said = encoder.embed(list(predictions.values()))[owner]  # (R, D)
    cosines = F.cosine_similarity(said, encoder.embed(texts)).double().numpy()
    per_item = np.bincount(owner, cosines) / np.bincount(owner)
    return _score(encoder.name, per_item.mean(), per_item, predictions, "the encoder's own")


def clip_score(images: Tensor, captions: Tensor) -> Tensor:
    """CLIPScore (Hessel et al. 2021, eq. 1): 2.5 · max(cos, 0), without references; higher is better.

    Args:
        images, captions: (N, D) CLIP embeddings; captions begin with "A photo depicts" in published figures.
    Returns:
        (N,) in [0, 2.5].
    """
    return 2.5 * F.cosine_similarity(images, captions).clamp(min=0)


def ref_clip_score(images: Tensor, captions: Tensor, references: Sequence[Tensor]) -> Tensor:
    """RefCLIPScore: the harmonic mean of CLIPScore and the cosine of the nearest reference, 0 where one is 0.

    Args:
        references: N tensors (R, D), the embeddings of each image's references.
    Returns:
        (N,) ≥ 0.
    """
    score = clip_score(images, captions)
    pairs = zip(captions, references, strict=True)
    nearest = score.new_tensor([float(cosine_similarity(c[None], r[None]).max().clamp(min=0)) for c, r in pairs])
    return 2 * score * nearest / (score + nearest).clamp(min=torch.finfo(score.dtype).tiny)


def bleu(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str], order: int = 4) -> Score:
    """BLEU with n-grams of 1 to `order` words; arguments and errors as `evaluate`, which gives all orders at once."""
    return evaluate(references, predictions)[f"BLEU-{order}"]


def cider(
    references: Mapping[Hashable, Sequence[str]],
    predictions: Mapping[Hashable, str],
    document_frequencies: Cider | None = None,
) -> Score:
    """CIDEr; arguments and errors as `evaluate`.

    Args:
        document_frequencies: the corpus that says how rare an n-gram is; None: these references, as usual. Few images
            need a larger corpus's: within one image every n-gram is common and CIDEr is 0.
    """
    if document_frequencies is None:
        return evaluate(references, predictions)["CIDEr"]
    _same_ids(references, predictions)
    scorer = Cider(references, idf_of=document_frequencies)
    scores = scorer.score(list(predictions), list(predictions.values()))
    per_item = dict(zip(predictions, scores.tolist(), strict=True))
    return Score("CIDEr", float(scores.mean()), per_item, len(per_item), scorer.tokenizer)


def _same_ids(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> None:
    if not predictions:
        raise ValueError("there are no predictions: give image id -> caption for at least one image")
    refuse_unknown(predictions, references)
    if silent := [i for i in references if i not in predictions]:
        raise ValueError(
            f"no prediction for {len(silent)} of {len(references)} images, such as {silent[:5]}; to score only the "
            "predicted ones, say so: {i: references[i] for i in predictions} (CIDEr then weighs n-grams by those alone)"
        )
