"""How good captions are against human references (§3.2): overlap of words, of facts, of meaning, and of image and text.

BLEU 1–4, ROUGE-L, CIDEr and SPICE come from pycocoevalcap, the code behind the published tables, for one caption an
image. `ngrams.Cider` and `ngrams.BleuTable` give the same numbers for many candidates of an image and for the resamples
of a bootstrap. CLIPScore needs no reference. Every `Score` says which tokenizer split its words, and its n.

SPICE has to be installed: see "SPICE" in the README and the error of `spice`. Its scorer (spice-1.0.jar) writes its
results by Java's JavaScript engine, which Java 8 to 14 have and later ones do not: no flag makes it run on Java 17.
"""

import re
import subprocess
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pycocoevalcap.bleu import bleu as stock_bleu
from pycocoevalcap.cider import cider as stock_cider
from pycocoevalcap.rouge import rouge as stock_rouge
from pycocoevalcap.spice import spice as stock_spice
from torch import Tensor
from torch.nn import functional as F

from dalleflamingo.evaluation.caption_tokenizer import default_tokenizer, tokenize
from dalleflamingo.evaluation.ngrams import ORDERS, SIGMA, Cider, refuse_unknown, warn_if_alone
from dalleflamingo.similarity import Encoder, cosine_similarity

SPICE_JAVA = range(8, 15)  # the Java versions that SPICE 1.0 runs on: 15 removed the JavaScript engine
SPICE_FOLDER = Path(stock_spice.__file__).parent / "lib"  # where pycocoevalcap looks for CoreNLP
CORENLP = "stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"  # pycocoevalcap comes without them
EMBEDDED_AT_ONCE = 1024  # texts whose embeddings `reference_similarity` holds at a time


class MetricUnavailable(RuntimeError):
    """A metric cannot be computed on this machine; the message says why, and what to install."""


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
    """Whether Java and the files that SPICE needs are on this machine; `missing_for_spice` says what is missing."""
    return not missing_for_spice()


def spice(references: Mapping[Hashable, Sequence[str]], predictions: Mapping[Hashable, str]) -> Score:
    """SPICE (Anderson et al. 2016) in [0, 1], by pycocoevalcap, Java 8 to 14 and Stanford's CoreNLP.

    Captions that were parsed once are kept by SPICE itself, in the folder `cache` of pycocoevalcap's `spice`.

    Args:
        references: image id -> human captions.
        predictions: the same image ids -> the caption to evaluate.
    Raises:
        MetricUnavailable: no such Java, or CoreNLP's files are not in their place (nothing is downloaded), or SPICE
            started and failed.
        ValueError, TypeError: as `evaluate`.
    """
    if missing := missing_for_spice():
        raise MetricUnavailable(missing)
    gold, guess, tokenizer = _split(references, predictions)
    numbered = [dict(enumerate(captions.values())) for captions in (gold, guess)]  # its JSON has no other ids
    try:
        value, per_item = stock_spice.Spice().compute_score(*numbered)
    except (subprocess.CalledProcessError, OSError, ValueError, KeyError) as error:
        raise MetricUnavailable(
            f"SPICE failed on {len(guess)} captions: {error!r}. What its Java printed is above. It takes up to 8 GiB "
            f"of memory, writes into {SPICE_FOLDER.parent}, and has no library for ARM processors"
        ) from error
    return _score("SPICE", value, [item["All"]["f"] for item in per_item], guess, tokenizer)


def missing_for_spice() -> str:
    """What to install before SPICE can run; empty where all is there."""
    if absent := [file for file in CORENLP if not (SPICE_FOLDER / file).is_file()]:
        first = f"delete {CORENLP[0]} there and " if len(absent) < len(CORENLP) else ""
        return (
            f"SPICE needs {' and '.join(absent)} in {SPICE_FOLDER}: {first}run `python -m "
            "pycocoevalcap.spice.get_stanford_models`, which downloads Stanford's CoreNLP 3.6.0 and puts both there. "
            "(In the miniature the exact scene graph stands in: miniature.scene_graph.scene_graph_f1.)"
        )
    version = _java_version()
    if version in SPICE_JAVA and (version == 8 or _has_javascript()):
        return ""
    found = f"Java {version} is here" if version else "there is no Java"
    without = f", without {_JAVASCRIPT}" if version in SPICE_JAVA else ""
    return (
        f"SPICE runs on Java 8 to 14, as later ones have no JavaScript engine; {found}{without}: install Java 11, by "
        "`conda install openjdk=11` or from adoptium.net, and put its `bin` first on PATH"
    )


_JAVASCRIPT = "jdk.scripting.nashorn"  # the module of the engine since Java 9; a Java can be built without it


def _java_version() -> int | None:
    """The major version of `java`: 8 for "1.8.0_392", 17 for "17.0.15"."""
    found = re.search(r'version "(?:1\.)?(\d+)', _java("-version"))
    return int(found[1]) if found else None


def _has_javascript() -> bool:
    return _JAVASCRIPT in _java("--list-modules")


def _java(option: str) -> str:
    """What `java` prints; nothing where there is none."""
    try:
        ended = subprocess.run(["java", option], capture_output=True, text=True)
    except OSError:
        return ""
    return ended.stdout + ended.stderr


def reference_similarity(
    encoder: Encoder[str],
    references: Mapping[Hashable, Sequence[str]],
    image_ids: Sequence[Hashable],
    captions: Sequence[str],
) -> np.ndarray:
    """Cosine of each caption's embedding and a reference's, mean over the references of its image (§3.2).

    The paper reports "a human-labeled reference caption" without saying which; the mean needs no choice. It is the
    scalar product of the caption's unit vector and the mean of the references', so one vector an image is kept and
    each text, however often it comes, is embedded once as a caption and once as a reference.

    Args:
        encoder: of texts: CLIP's, SBERT.
        references: image id -> human captions.
        image_ids: N, of the captions' images.
        captions: N.
    Returns:
        (N,) in [-1, 1]; higher is more similar.
    Raises:
        ValueError: lengths differ, there are none, or an image has no references.
    """
    if len(image_ids) != len(captions) or len(captions) == 0:
        raise ValueError(f"{len(image_ids)} image ids for {len(captions)} captions: give as many, and at least one")
    refuse_unknown(image_ids, {i: texts for i, texts in references.items() if len(texts)})
    number = {i: row for row, i in enumerate(dict.fromkeys(image_ids))}
    image_of_reference = torch.tensor([row for i, row in number.items() for _ in references[i]])
    image_of_caption = torch.tensor([number[i] for i in image_ids])
    count = torch.tensor([len(references[i]) for i in number])
    mean: Tensor | None = None  # (images, D)
    for rows, embeddings in _embedded(encoder, [text for i in number for text in references[i]]):
        if mean is None:
            mean = torch.zeros(len(number), embeddings.shape[1], dtype=torch.float64)
        mean.index_add_(0, image_of_reference[rows], embeddings / count[image_of_reference[rows], None])
    found = torch.empty(len(captions), dtype=torch.float64)
    for rows, embeddings in _embedded(encoder, captions):
        found[rows] = (embeddings * mean[image_of_caption[rows]]).sum(1)
    return found.numpy()


def _embedded(encoder: Encoder[str], texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions in N texts and the unit vectors (M, D) of the texts there, in parts; a repeated text is embedded once.

    M ≤ `EMBEDDED_AT_ONCE`. Texts of like length come together, so that a batch has little padding.
    """
    positions_of: dict[str, list[int]] = {}
    for position, text in enumerate(texts):
        positions_of.setdefault(text, []).append(position)
    distinct = sorted(positions_of, key=lambda text: (len(text), text))
    for start in range(0, len(distinct), EMBEDDED_AT_ONCE):
        part = distinct[start : start + EMBEDDED_AT_ONCE]
        embeddings = F.normalize(encoder.embed(part).double(), dim=-1)
        positions = torch.tensor([position for text in part for position in positions_of[text]])
        rows = torch.tensor([row for row, text in enumerate(part) for _ in positions_of[text]])
        for some_positions, some_rows in zip(
            positions.split(EMBEDDED_AT_ONCE), rows.split(EMBEDDED_AT_ONCE), strict=True
        ):
            yield some_positions, embeddings[some_rows]


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
