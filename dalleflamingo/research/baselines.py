"""Rankings of candidate captions that need no generated image: baselines of the journey there and back."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image

from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset
from dalleflamingo.decoding import count_words
from dalleflamingo.evaluation.caption_metrics import clip_score
from dalleflamingo.evaluation.image_features import ImageFiles
from dalleflamingo.evaluation.ngrams import Cider
from dalleflamingo.research.ranking import rows_of
from dalleflamingo.similarity import Encoder


def add(
    table: pd.DataFrame, dataset: Dataset, captioner: Captioner, clip_image: Encoder, clip_text: Encoder
) -> pd.DataFrame:
    """A candidate table with a column for each baseline; higher ranks first.

    Args:
        table: of `reconstruct.image_text_image`.
        dataset: its images.
        captioner: that wrote the captions.
        clip_image: CLIP's image encoder.
        clip_text: its text encoder.
    Returns:
        the table with `length`, in words; `likelihood`, the captioner's own log p(caption | image); `consensus`, the
        mean CIDEr to the image's other candidates; `clip_score`, CLIPScore without its factor of 2.5.
    Raises:
        ValueError: the images have different numbers of candidates.
        KeyError: an image is not in the data set.
        UnreadableImage: it cannot be opened.
    """
    examples = {example.image_id: example for example in dataset}
    rows, ids = rows_of(table)
    captions, k = table["caption"].to_numpy(object), rows.shape[1]
    images = ImageFiles(examples[i].path for i in ids)
    likelihood, matches = np.empty(len(table)), np.empty(len(table))
    for image, own in zip(images, rows, strict=True):
        likelihood[own] = log_likelihood(captioner, [image] * k, list(captions[own]))
    texts = clip_text.embed(list(captions))[torch.from_numpy(rows)]  # (n, K, D)
    matches[rows] = clip_score(clip_image.embed(images), texts, weight=1)
    idf = Cider({i: list(examples[i].references) for i in ids})
    return table.assign(
        length=[count_words(caption) for caption in captions],
        likelihood=likelihood,
        consensus=_consensus(captions, rows, idf),
        clip_score=matches,
    )


@torch.no_grad()
def log_likelihood(captioner: Captioner, images: Sequence[Image], captions: Sequence[str]) -> torch.Tensor:
    """(B,) log p(caption | image) of B captions, their ends included, on the CPU; errors as `token_logits`.

    Args:
        captioner: p_θ.
        images: B images.
        captions: B texts, without the prompt.
    """
    logits, ids = captioner.token_logits(images, captions)
    chosen = logits.float().log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1)  # (B, T)
    return (chosen * (ids != captioner.pad_id)).sum(1).cpu()


def _consensus(captions: Sequence[str], rows: np.ndarray, idf: Cider) -> np.ndarray:
    """(N,) mean CIDEr of each candidate to the others of its image; 0 where it is alone."""
    others: Mapping[int, list[str]] = {
        row: [captions[other] for other in own if other != row] for own in rows for row in own if len(own) > 1
    }
    found = np.zeros(len(captions))
    if others:
        found[list(others)] = Cider(others, idf_of=idf).score(list(others), [captions[row] for row in others])
    return found
