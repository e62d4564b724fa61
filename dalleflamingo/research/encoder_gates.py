"""What CLIP, DINO and the features of image fidelity see in the miniature's images: gates of encoders.

Content must outweigh layout: an image of the same things elsewhere is nearer than one with a wrong kind, colour or
ground in the same places. And content must outweigh what a generator does badly: of generated images the one of the
true caption is nearest (`planted.py`).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn import functional as F

from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.intervals import Interval, paired_bootstrap, proportion
from dalleflamingo.generator import Generator
from dalleflamingo.miniature.annotators import ANNOTATORS, annotate_rotations, plant_error, precise, write_caption
from dalleflamingo.miniature.scene_graph import COLOURS, KINDS, Scene
from dalleflamingo.miniature.world import move
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import fresh
from dalleflamingo.research.metrics import ranking_label
from dalleflamingo.research.planted import FIRST, count_found, planted_errors, shares_of
from dalleflamingo.research.probes import knn_accuracy, ridge_accuracy
from dalleflamingo.research.ranking import RESAMPLES
from dalleflamingo.similarity import Dino, Encoder, Similarity

CHANGED = ("kind", "colour", "ground")  # facts that are visible in place
GROUP = 100  # scenes among which CLIP finds a caption


def planted_figures(
    similarity: Similarity, generator: Generator, n: int, run_folder: Path, settings: JourneySettings
) -> dict[str, Interval]:
    """How often the image of the true caption of five is nearest; per sort of error, how often it is nearer.

    Args:
        similarity: that ranks.
        generator: that renders; images that are in the run folder are not rendered again.
        n: scenes.
        run_folder: as in `planted.planted_errors`, with its errors.
        settings: likewise.
    """
    table = planted_errors(n, generator, [similarity], run_folder, settings)
    found = shares_of(count_found(table))[similarity.name]
    by = ranking_label(similarity.name)
    figures = {f"planted errors: truth ranked first by {by}": found.pop(FIRST)}
    return figures | {f"planted errors: truth nearer than wrong {fact}, by {by}": one for fact, one in found.items()}


def elsewhere_figures(similarity: Similarity, n: int, seed: int) -> dict[str, Interval]:
    """The same content elsewhere against changed content in place, in drawn images.

    Args:
        similarity: that compares.
        n: scenes of one to three things.
        seed: of the scenes and their changes.
    """
    scenes = fresh.scenes(n, seed, "elsewhere")
    others = []
    for i, scene in enumerate(scenes):
        rng = fresh.generator_of(seed, "changed", i)
        others.append([move(scene, rng), *(plant_error(scene, fact, rng) for fact in CHANGED)])
    found = similarity.compare(fresh.draw_all(scenes), [fresh.draw_all(row) for row in others]).double().numpy()
    by = ranking_label(similarity.name)
    auc = pooled_auc(found[:, 0], found[:, 1:])
    return {f"same content elsewhere nearer than changed content in place (AUC by {by})": auc}


def pooled_auc(same: np.ndarray, changed: np.ndarray, resamples: int = RESAMPLES) -> Interval:
    """P(a similarity in `same` > one in `changed`), pooled over scenes, equal ones counting half; bootstrap of scenes.

    Args:
        same: (n,) similarities of n scenes.
        changed: (n, C) of the same scenes.
        resamples: of the bootstrap.
    """

    def auc(scenes: np.ndarray) -> float:
        first, second = same[scenes], changed[scenes].ravel()
        return mannwhitneyu(first, second, method="asymptotic").statistic / (len(first) * len(second))

    return paired_bootstrap(auc, len(same), resamples)


def clip_figures(image: Encoder, text: Encoder, n: int, seed: int) -> dict[str, Interval]:
    """Which caption is nearest to an image: of 100 scenes' captions, and of four that differ in the relation alone.

    Args:
        image: CLIP's encoder of images.
        text: its encoder of texts.
        n: scenes, in groups of `GROUP`.
        seed: of the scenes.
    """

    def nearest(scenes: list[Scene], captions: list[str], choices: int) -> Tensor:
        """(groups, images of a group): the index of the nearest among the group's `choices` captions."""
        embedded = F.normalize(text.embed(captions), dim=-1)
        grouped = embedded.reshape(-1, choices, embedded.shape[-1])
        images = F.normalize(image.embed(fresh.draw_all(scenes)), dim=-1)
        return (images.reshape(len(grouped), -1, embedded.shape[-1]) @ grouped.mT).argmax(-1)

    hits, scenes = 0, fresh.scenes(n, seed, "retrieval")
    captions = []
    for i, scene in enumerate(scenes):
        rng = fresh.generator_of(seed, "retrieval words", i)
        captions.append(write_caption(scene, precise(ANNOTATORS[rng.integers(len(ANNOTATORS))]), rng))
    for start in range(0, n, GROUP):
        part = slice(start, start + GROUP)
        size = len(scenes[part])
        hits += int((nearest(scenes[part], captions[part], size) == torch.arange(size)).sum())
    scenes, rotations = fresh.scenes(n, seed, "rotations", 2), []
    for i, scene in enumerate(scenes):
        rotations += annotate_rotations(scene, fresh.generator_of(seed, "rotation words", i))
    return {
        f"image → text R@1 among {GROUP} scenes": proportion(hits, n),
        "relation right, among the four of two things": proportion(int((nearest(scenes, rotations, 4) == 0).sum()), n),
    }


def dino_figures(dino: Dino, n: int, seed: int) -> dict[str, Interval]:
    """Probes of frozen features on images of one thing: twice as many with labels as for the test.

    Args:
        dino: that is measured.
        n: scenes of the test.
        seed: of the scenes.
    """
    train, test = fresh.scenes(2 * n, seed, "probe, known", 1), fresh.scenes(n, seed, "probe, asked", 1)
    features = dino.embed(fresh.draw_all(train)), dino.embed(fresh.draw_all(test))

    def accuracy(probe: Callable[..., float], attribute: str, values: tuple[str, ...]) -> Interval:
        labels = (
            torch.tensor([values.index(getattr(scene.things[0], attribute)) for scene in scenes])
            for scenes in (train, test)
        )
        share = probe(features[0], next(labels), features[1], next(labels))
        return proportion(round(share * n), n)

    return {
        "20-NN accuracy of kind, one-thing pictures": accuracy(knn_accuracy, "kind", KINDS),
        "linear probe of colour, one-thing pictures": accuracy(ridge_accuracy, "colour", COLOURS),
    }


def inception_figures(extractor: FeatureExtractor, n: int, seed: int) -> dict[str, Interval]:
    """Whether it names the thing of an image.

    Args:
        extractor: of the miniature's Inception.
        n: scenes of one thing.
        seed: of the scenes.
    """
    scenes = fresh.scenes(n, seed, "inception", 1)
    classes = extractor.extract(fresh.draw_all(scenes)).logits.argmax(1).tolist()
    right = sum(a == extractor.model.class_of(scene.things[0]) for a, scene in zip(classes, scenes, strict=True))
    return {"kind and colour of one thing": proportion(right, n)}
