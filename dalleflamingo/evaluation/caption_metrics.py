"""How good captions are against human references (§3.2): overlap of words, of facts, and of image and text.

BLEU 1–4, ROUGE-L, CIDEr and SPICE come from pycocoevalcap, the code behind the published tables, for one caption an
image. `ngrams.Cider` and `ngrams.BleuTable` give the same numbers for many candidates of an image and for the resamples
of a bootstrap. CLIPScore needs no reference. Every `Score` says which tokenizer split its words, and its n.
"""

import re
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycocoevalcap.bleu import bleu as stock_bleu
from pycocoevalcap.cider import cider as stock_cider
from pycocoevalcap.rouge import rouge as stock_rouge
from pycocoevalcap.spice import spice as stock_spice
from torch import Tensor

from dalleflamingo.evaluation.caption_tokenizer import default_tokenizer, tokenize
from dalleflamingo.evaluation.ngrams import ORDERS, SIGMA, Cider, refuse_unknown, warn_if_alone
from dalleflamingo.similarity import cosine_similarity

SPICE_JAVA = 8, 11  # the Java versions that SPICE 1.0 runs on
SPICE_FOLDER = Path(stock_spice.__file__).parent / "lib"  # where pycocoevalcap looks for CoreNLP
CORENLP = "stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"  # pycocoevalcap comes without them


class MetricUnavailable(RuntimeError):
    """Something that a metric needs is not on this machine; the message says what to install."""


@dataclass(frozen=True)
class Score:
    """One metric on one corpus; higher is better.

    Attributes:
        name: of the metric.
        value: of the corpus.
        per_item: image id -> score of its caption alone; BLEU's value is not their mean.
        n: number of captions.
        tokenizer: which one split the words; numbers under different ones do not compare.
    """

    name: str
    value: float
    per_item: dict[Hashable, float]
    n: int
    tokenizer: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.3f} (n = {self.n}, words by {self.tokenizer})"


def evaluate(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> dict[str, Score]:
    """BLEU-1 to BLEU-4, ROUGE-L and CIDEr of one caption an image, by pycocoevalcap, under those names.

    BLEU and ROUGE-L lie in [0, 1], CIDEr in [0, 10]; published tables show them × 100. An empty caption scores 0.

    Args:
        references: image id -> human captions.
        predictions: the same image ids -> the caption to evaluate.
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


def _score(name: str, value: float, per_item: Sequence[float], ids: Sequence[Hashable], tokenizer: str) -> Score:
    return Score(name, float(value), dict(zip(ids, map(float, per_item), strict=True)), len(ids), tokenizer)


def spice_available() -> bool:
    """Whether Java and the files that SPICE needs are on this machine; the error of `spice` says what is missing."""
    return not _missing_for_spice(SPICE_FOLDER)


def spice(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> Score:
    """SPICE (Anderson et al. 2016) in [0, 1], by pycocoevalcap, Java 8 or 11 and Stanford's CoreNLP.

    Args:
        references: image id -> human captions.
        predictions: the same image ids -> the caption to evaluate.
    Raises:
        MetricUnavailable: no such Java, or CoreNLP's files are not in their place; nothing is downloaded.
        ValueError, TypeError: as `evaluate`.
    """
    if missing := _missing_for_spice(SPICE_FOLDER):
        raise MetricUnavailable(missing)
    gold, guess, tokenizer = _split(references, predictions)
    numbered = [dict(enumerate(captions.values())) for captions in (gold, guess)]  # its JSON has no other ids
    value, per_item = stock_spice.Spice().compute_score(*numbered)
    return _score("SPICE", value, [item["All"]["f"] for item in per_item], guess, tokenizer)


def _missing_for_spice(folder: Path) -> str:
    """What to install before SPICE can run; empty where all is there."""
    if absent := [file for file in CORENLP if not (folder / file).is_file()]:
        return (
            f"SPICE needs {' and '.join(absent)} in {folder}: download "
            "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip and copy them out of it. (In the "
            "miniature the exact scene graph stands in: miniature.scene_graph.scene_graph_f1.)"
        )
    version = _java_version()
    if version in SPICE_JAVA:
        return ""
    found = f"Java {version} is here" if version else "there is no Java"
    return f"SPICE runs on Java 8 or 11; {found}: install one (apt install openjdk-11-jre) and put it first on PATH"


def _java_version() -> int | None:
    """The major version of `java`: 8 for "1.8.0_392", 17 for "17.0.15"."""
    try:
        printed = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    except OSError:
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', printed)
    return int(found[1]) if found else None


def clip_score(images: Tensor, captions: Tensor, weight: float = 2.5) -> Tensor:
    """CLIPScore (Hessel et al. 2021, eq. 1): weight · max(cos, 0), without references; higher is better.

    Args:
        images: (N, D) CLIP embeddings.
        captions: (N, K, D) CLIP embeddings of K captions each; in published figures these begin with "A photo depicts".
        weight: 2.5 in published figures; it stretches the cosines of real captions to about [0, 1].
    Returns:
        (N, K) in [0, weight].
    """
    return weight * cosine_similarity(images, captions).clamp(min=0)


def cider(
    references: Mapping[Hashable, Sequence[str]],
    predictions: Mapping[Hashable, str],
    document_frequencies: Cider | None = None,
) -> Score:
    """CIDEr; errors as `evaluate`.

    Args:
        references: image id -> human captions.
        predictions: the same image ids -> the caption to evaluate.
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
