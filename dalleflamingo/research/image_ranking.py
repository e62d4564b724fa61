"""Drawn pictures held against the real one of their image, and against what was asked for (§3.2, Table 2, Fig. 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from dalleflamingo.datasets import Dataset, ImageFiles
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.image_metrics import fid, inception_score
from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.image_score import score_prompt
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.research.ranking import CorpusMetric, EvaluatedCandidates, mean_of, rows_of
from dalleflamingo.similarity import Encoder


@dataclass(frozen=True)
class Judges:
    """Who judges pictures; the recogniser only where the world is the miniature."""

    clip: Encoder
    dino: Encoder
    inception: FeatureExtractor
    recogniser: Recogniser | None = None


def evaluate_images(
    table: pd.DataFrame, dataset: Dataset, run_folder: str | Path, judges: Judges
) -> EvaluatedCandidates:
    """The pictures of a table as from `reconstruct.text_image_text`, judged.

    Returns:
        metrics and columns `clip_distance` and `dino_distance`, 100 · (1 − cosine) to the real picture of the image;
        metrics `fid` and `is`, of the whole set; in the miniature `found`, the share of the caption's things that the
        recogniser finds, in kind and colour, with `relations`, the share of its relations that are right of those that
        could be told (NaN where none could), as a column only.
    Raises:
        ValueError: the images have different numbers of candidates. KeyError: one is not in the data set.
        UnreadableImage: a picture is missing or damaged.
    """
    rows, ids = rows_of(table)
    examples = {example.image_id: example for example in dataset}
    real = ImageFiles(examples[i].path for i in ids)
    drawn = ImageFiles(Path(run_folder) / path for path in table["picture"])
    image = np.empty(len(table), dtype=int)
    image[rows] = np.arange(len(ids))[:, None]  # (n · K,) which real picture is a candidate's
    columns = {
        "clip_distance": distances(judges.clip, real, drawn, image),
        "dino_distance": distances(judges.dino, real, drawn, image),
    }
    if judges.recogniser:
        columns |= _found(judges.recogniser, drawn, table["caption"])
    metrics = {name: mean_of(columns[name]) for name in ("clip_distance", "dino_distance", "found") if name in columns}
    true, seen = judges.inception.look(real), judges.inception.look(drawn)
    metrics["fid"] = _each(lambda pick: fid(true.features[image[pick]], seen.features[pick]))
    metrics["is"] = _each(lambda pick: inception_score(seen.logits[pick]))
    domain = np.array([examples[i].domain for i in ids], dtype=object)
    return EvaluatedCandidates(table.assign(**columns), rows, domain, metrics, "found" if judges.recogniser else None)


def distances(encoder: Encoder, real: Sequence[Image], drawn: Sequence[Image], image: np.ndarray) -> np.ndarray:
    """(N,) 100 · (1 − cosine) of N drawn pictures to the real ones whose positions `image` (N,) gives."""
    cosine: Tensor = F.cosine_similarity(encoder.embed(real)[torch.from_numpy(image)], encoder.embed(drawn))
    return 100 * (1 - cosine.double().numpy())


def _found(recogniser: Recogniser, drawn: Sequence[Image], captions: Sequence[str]) -> dict[str, np.ndarray]:
    pairs = zip(recogniser.find(drawn), captions, strict=True)
    scores = [score_prompt(found, scene_graph.parse(caption)) for found, caption in pairs]
    relations = [score.relations_right / score.relations if score.relations else np.nan for score in scores]
    return {
        "found": np.array([score.right / max(1, score.things) for score in scores]),
        "relations": np.array(relations),
    }


def _each(statistic) -> CorpusMetric:
    """A metric of one corpus, (n,) row positions, as one of many, (S, n)."""
    return lambda picks: np.array([statistic(pick) for pick in picks])
