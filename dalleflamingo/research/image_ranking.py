"""Generated images against the real one of their caption, and against what the caption says (§3.2, Table 2, Fig. 4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from dalleflamingo import registry
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.image_features import FeatureExtractor, ImageFiles
from dalleflamingo.evaluation.image_metrics import fid, inception_score
from dalleflamingo.miniature import scene_graph
from dalleflamingo.miniature.image_score import score_prompt
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.profiles import Profile
from dalleflamingo.research.ranking import CorpusMetric, EvaluatedCandidates, mean_of, rows_of
from dalleflamingo.similarity import Encoder


@dataclass(frozen=True)
class ImageEvaluators:
    """The models by which images are evaluated; the recogniser only where the profile has one."""

    clip: Encoder
    dino: Encoder
    inception: FeatureExtractor
    recogniser: Recogniser | None = None

    @classmethod
    def of(cls, profile: Profile, clip: Encoder, dino: Encoder) -> "ImageEvaluators":
        """CLIP and DINO with the profile's Inception and, where it has a judge, its recogniser.

        Args:
            profile: names the other models.
            clip: loaded already.
            dino: loaded already.
        Raises:
            RegistryError: as `registry.locate`.
        """
        judge = Recogniser.from_pretrained(registry.locate(profile.judge)) if profile.judge else None
        return cls(clip, dino, FeatureExtractor.from_registry(profile.inception, profile.device), judge)


def evaluate_images(
    table: pd.DataFrame, dataset: Dataset, run_folder: str | Path, evaluators: ImageEvaluators
) -> EvaluatedCandidates:
    """The generated images of a table, evaluated.

    Args:
        table: as from `reconstruct.text_image_text`.
        dataset: with the real images.
        run_folder: that the table's paths are relative to.
        evaluators: CLIP, DINO, Inception and, in the miniature, the recogniser.
    Returns:
        metrics and columns `clip_distance` and `dino_distance`, 100 · (1 − cosine) to the real image;
        metrics `fid` and `is`, of the whole set; with a recogniser `found`, the share of the caption's things that it
        finds, in kind and colour, and as a column only `relations`, the share of the caption's relations that are
        right of those that could be told (NaN where none could).
    Raises:
        ValueError: the images have different numbers of candidates.
        KeyError: an image is not in the data set.
        UnreadableImage: an image is missing or damaged.
    """
    rows, ids = rows_of(table)
    examples = {example.image_id: example for example in dataset}
    real = ImageFiles(examples[i].path for i in ids)
    generated = ImageFiles(Path(run_folder) / path for path in table["image"])
    source = np.empty(len(table), dtype=int)
    source[rows] = np.arange(len(ids))[:, None]  # (n · K,) which real image is a candidate's
    columns = {
        "clip_distance": distances(evaluators.clip, real, generated, source),
        "dino_distance": distances(evaluators.dino, real, generated, source),
    }
    if evaluators.recogniser:
        columns |= _recognised(evaluators.recogniser, generated, table["caption"])
    metrics = {name: mean_of(columns[name]) for name in ("clip_distance", "dino_distance", "found") if name in columns}
    of_real, of_generated = evaluators.inception.extract(real), evaluators.inception.extract(generated)
    metrics["fid"] = _each(lambda rows: fid(of_real.features[source[rows]], of_generated.features[rows]))
    metrics["is"] = _each(lambda rows: inception_score(of_generated.logits[rows]))
    domain = np.array([examples[i].domain for i in ids], dtype=object)
    oracle = "found" if evaluators.recogniser else None
    return EvaluatedCandidates(table.assign(**columns), rows, domain, metrics, oracle)


def distances(encoder: Encoder, real: Sequence[Image], generated: Sequence[Image], source: np.ndarray) -> np.ndarray:
    """100 · (1 − cosine) of each generated image to its real one.

    Args:
        encoder: CLIP or DINO.
        real: n images.
        generated: N images.
        source: (N,) position of each one's real image.
    Returns:
        (N,) in [0, 200].
    """
    cosine: Tensor = F.cosine_similarity(encoder.embed(real)[torch.from_numpy(source)], encoder.embed(generated))
    return 100 * (1 - cosine.double().numpy())


def _recognised(recogniser: Recogniser, generated: Sequence[Image], captions: Sequence[str]) -> dict[str, np.ndarray]:
    pairs = zip(recogniser.find(generated), captions, strict=True)
    scores = [score_prompt(found, scene_graph.parse(caption)) for found, caption in pairs]
    relations = [score.relations_right / score.relations if score.relations else np.nan for score in scores]
    return {
        "found": np.array([score.right / max(1, score.things) for score in scores]),
        "relations": np.array(relations),
    }


def _each(statistic: Callable[[np.ndarray], float]) -> CorpusMetric:
    """A metric of one corpus, (n,) row positions, as one of many, (S, n)."""
    return lambda selection: np.array([statistic(rows) for rows in selection])
