"""Rankings of candidate captions that draw no picture: what the journey there and back has to be held against."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset, ImageFiles
from dalleflamingo.decoding import count_words
from dalleflamingo.evaluation.ngrams import Cider
from dalleflamingo.research.ranking import rows_of
from dalleflamingo.similarity import Encoder, cosine_similarity


def add(
    table: pd.DataFrame, dataset: Dataset, captioner: Captioner, clip_image: Encoder, clip_text: Encoder
) -> pd.DataFrame:
    """A candidate table of `reconstruct.image_text_image` with a column for each baseline; higher ranks first.

    Returns:
        the table with `length`, in words; `likelihood`, the captioner's own log p(caption | picture); `consensus`, the
        mean CIDEr to the picture's other candidates; `clip_score`, CLIP's cosine of picture and caption.
    Raises:
        KeyError: an image is not in the data set. UnreadableImage: it cannot be opened.
    """
    examples = {example.image_id: example for example in dataset}
    rows, ids = rows_of(table)
    captions, k = table["caption"].to_numpy(object), rows.shape[1]
    images = ImageFiles(examples[i].path for i in ids)
    likelihood, matches = np.empty(len(table)), np.empty(len(table))
    for image, own in zip(images, rows, strict=True):
        likelihood[own] = captioner.log_likelihood([image] * k, list(captions[own]), k)
    said = clip_text.embed(list(captions))[torch.from_numpy(rows)]  # (n, K, D)
    matches[rows] = cosine_similarity(clip_image.embed(images), said)
    idf = Cider({i: list(examples[i].references) for i in ids})
    return table.assign(
        length=[count_words(caption) for caption in captions],
        likelihood=likelihood,
        consensus=_consensus(captions, rows, idf),
        clip_score=matches,
    )


def _consensus(captions: Sequence[str], rows: np.ndarray, idf: Cider) -> np.ndarray:
    """(N,) mean CIDEr of each candidate to the others of its image; 0 where it is alone."""
    others: Mapping[int, list[str]] = {
        row: [captions[other] for other in own if other != row] for own in rows for row in own if len(own) > 1
    }
    found = np.zeros(len(captions))
    if others:
        found[list(others)] = Cider(others, idf_of=idf).score(list(others), [captions[row] for row in others])
    return found
