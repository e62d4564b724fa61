"""Candidate captions against the human ones and, in the miniature, against the scene (§3.1, Table 1, Fig. 3)."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation import caption_metrics
from dalleflamingo.evaluation.caption_tokenizer import tokenize
from dalleflamingo.evaluation.ngrams import BleuTable, Cider
from dalleflamingo.evaluation.word_movers import WordVectors
from dalleflamingo.miniature import scene_graph
from dalleflamingo.research.ranking import CorpusMetric, EvaluatedCandidates, mean_of, rows_of
from dalleflamingo.similarity import Encoder


def evaluate_captions(
    table: pd.DataFrame,
    dataset: Dataset,
    beam: Mapping[int, str] | None = None,
    vectors: WordVectors | None = None,
    encoders: Mapping[str, Encoder[str]] | None = None,
) -> EvaluatedCandidates:
    """Candidate captions against the human ones, their n-grams counted once.

    Args:
        table: as from `reconstruct.image_text_image`.
        dataset: its images, with their references, and their scenes where the world is the miniature.
        beam: image id -> the caption by beam search of every image, evaluated beside the candidates; None or empty for
            none.
        vectors: for WMD; None leaves it out.
        encoders: metric -> encoder of texts, for the similarity to the references: `clip_text`, `sbert`; None for none.
    Returns:
        metrics and columns `cider` (idf from all n images), `bleu3`, `bleu4` and, where SPICE runs, `spice`, each × 100
        as published tables are; `wmd`, to the nearest reference; `clip_text` and `sbert`, the cosine in [-1, 1], mean
        over the references; in the miniature `f1`, the scene-graph F1 in [0, 1], and as a column only `right`: no wrong
        kind, colour or relation. Where SPICE starts and fails, it is left out with a warning that says why.
    Raises:
        ValueError: an image has no references, is not in the data set, or has another number of candidates.
    """
    examples = {example.image_id: example for example in dataset}
    rows, ids = rows_of(table)
    _need_references(dataset.name, examples, ids)
    image_ids = [*table["image_id"], *(ids if beam else [])]
    captions = [*table["caption"], *(beam[i] for i in ids if beam)]
    references = {i: list(examples[i].references) for i in ids}
    cider, bleu = Cider(references).table(image_ids, captions), BleuTable(references, image_ids, captions)
    metrics: dict[str, CorpusMetric] = {
        "cider": lambda selection: 100 * cider.corpus(selection),
        "bleu3": lambda selection: 100 * bleu.corpus(selection)[..., 2],
        "bleu4": lambda selection: 100 * bleu.corpus(selection)[..., 3],
    }
    alone = 100 * bleu.scores()
    columns = {"cider": 100 * cider.scores(), "bleu3": alone[:, 2], "bleu4": alone[:, 3]}
    if vectors:
        columns["wmd"] = _nearest_reference(vectors, references, image_ids, captions)
    for name, encoder in (encoders or {}).items():
        columns[name] = caption_metrics.reference_similarity(encoder, references, image_ids, captions)
    if all("scene" in examples[i].extra for i in ids):
        scenes = {i: scene_graph.Scene.from_dict(examples[i].extra["scene"]) for i in ids}
        columns["f1"] = scene_graph.scene_graph_f1(captions, [scenes[i] for i in image_ids])
        pairs = zip(captions, image_ids, strict=True)
        columns["right"] = np.array([scene_graph.is_right(caption, scenes[i]) for caption, i in pairs])
    if caption_metrics.spice_available():
        try:
            columns["spice"] = _spice(references, image_ids, captions)
        except caption_metrics.MetricUnavailable as error:  # everything else is measured
            warnings.warn(f"without SPICE: {error}", stacklevel=2)
    elif "f1" not in columns:  # which stands in for it
        warnings.warn(f"without SPICE: {caption_metrics.missing_for_spice()}", stacklevel=2)
    metrics |= {name: mean_of(columns[name]) for name in columns if name not in (*metrics, "right")}
    return EvaluatedCandidates(
        table.assign(**{name: values[: len(table)] for name, values in columns.items()}),
        rows,
        np.array([examples[i].domain for i in ids], dtype=object),
        metrics,
        oracle="f1" if "f1" in metrics else None,
        # the captions by beam search are no rows of the table: the metrics' arrays hold them behind the candidates
        beam=len(table) + np.arange(len(ids)) if beam else None,
        tokenizer=bleu.tokenizer,
    )


def _need_references(name: str, examples: Mapping[int, Example], ids: Sequence[int]) -> None:
    without = [i for i in ids if i not in examples or not examples[i].references]
    if without:
        raise ValueError(
            f"{len(without)} of {len(ids)} images have no human captions in {name} (such as {without[:3]}): to "
            "evaluate captions, every image needs human ones"
        )


def _nearest_reference(
    vectors: WordVectors, references: Mapping[int, list[str]], image_ids: Sequence[int], captions: Sequence[str]
) -> np.ndarray:
    """(N,) Word Mover's Distance of each caption to the nearest reference of its image."""
    gold, split = tokenize(references), tokenize({"captions": captions})["captions"]
    pairs = zip(image_ids, split, strict=True)
    return np.array([min(vectors.distance(caption, other) for other in gold[i]) for i, caption in pairs])


def _spice(references: Mapping[int, list[str]], image_ids: Sequence[int], captions: Sequence[str]) -> np.ndarray:
    """(N,) SPICE × 100 of each caption, by as many calls as an image has different ones.

    Each call has one caption an image, as published scores have: its memory does not grow with K, and SPICE, which
    keeps the references that it has parsed, parses them once.
    """
    pairs = list(zip(image_ids, captions, strict=True))
    calls: dict[int, dict[int, str]] = defaultdict(dict)  # number of the call -> image id -> caption
    of_image = Counter()
    for i, caption in dict.fromkeys(pairs):
        calls[of_image[i]][i] = caption
        of_image[i] += 1
    scores = {}
    for own in calls.values():
        found = caption_metrics.spice({i: references[i] for i in own}, own).per_item
        scores |= {(i, caption): 100 * found[i] for i, caption in own.items()}
    return np.array([scores[pair] for pair in pairs])
