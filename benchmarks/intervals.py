"""How far bootstrap intervals of corpus metrics lie from their values, and how often they hold the truth:

    python benchmarks/intervals.py [--samples 200] [--images 200] [--captions FOLDER]

The miniature's world and its annotators are a population without end. Each sample is n of its images, with ten
references each and two captions to score: one by another annotator, and a minimal one. The truth is the mean of the
metric over all samples of n images. Images are those of COCO's kinds against those of all kinds, for FID and Inception
Score. With FOLDER, which holds coco_karpathy_test_gt.json, CIDEr and BLEU also on n of its 5,000 photographs, one human
caption against the others.

Of each metric, the mean of the bootstrap minus the value (the bias of resampling), mean over the samples; and the share
of samples whose 95 % interval holds the truth, for four intervals: percentile, recentred, reflected (2 · value −
percentile, also called basic), and for CIDEr by the idf of the sample itself, not computed anew. Prints a table.

Reflecting takes the bias of resampling for a bias of the value, which has none: its samples do not repeat images. The
sample's own idf has no bias and holds the truth as often as recentring does. We recentre, because the protocol computes
metrics of a corpus anew on every resample, and because one rule then serves CIDEr, FID and the Inception Score.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dalleflamingo.datasets import DOMAINS
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.evaluation.image_metrics import fid, inception_score
from dalleflamingo.evaluation.intervals import resample
from dalleflamingo.evaluation.ngrams import BleuTable, Cider
from dalleflamingo.miniature.annotators import annotate, minimal_caption
from dalleflamingo.miniature.corpora import coco_scene, nocaps_scene
from dalleflamingo.miniature.scene_graph import Scene
from dalleflamingo.miniature.world import draw
from dalleflamingo.profiles import PROFILES
from dalleflamingo.research.pages import table
from dalleflamingo.sources.annotations import read_coco

Statistics = Callable[[np.ndarray], np.ndarray]  # (n,) indices -> (M,)
Sample = tuple[list[str], Statistics, np.ndarray | None]  # names, statistics, (n, M) values under the sample's own idf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="drawn from the population")
    parser.add_argument("--images", type=int, default=200, help="n, of each sample")
    parser.add_argument("--resamples", type=int, default=1000, help="of each bootstrap of captions; of images a third")
    parser.add_argument("--captions", type=Path, help="folder with coco_karpathy_test_gt.json")
    options = parser.parse_args()
    n, resamples = options.images, options.resamples
    sources = {"captions, miniature": (of_world(n), resamples), "images, miniature": (of_images(n), resamples // 3)}
    if options.captions:
        sources["captions, COCO"] = (of_coco(options.captions / "coco_karpathy_test_gt.json", n), resamples)
    header = ["", "metric", "value", "bias", "width", "percentile", "recentred", "reflected", "own idf"]
    rows = []
    for name, (samples, draws) in sources.items():
        rows += [[name, *row] for row in measured(samples, options.samples, draws, name)]
    print(table(header, rows))


def measured(samples: Iterator[Sample], count: int, resamples: int, name: str) -> list[list[str]]:
    """A row of texts for each statistic."""
    values, biases, bounds, own = [], [], [], []
    for _ in tqdm(range(count), desc=name):
        names, statistics, scores = next(samples)
        n = len(scores)
        value, drawn = resample(statistics, n, resamples)
        values.append(value)
        biases.append(drawn.mean(0) - value)
        bounds.append(np.quantile(drawn, [0.025, 0.975], axis=0))
        fixed = resample(lambda rows, scores=scores: scores[rows].mean(0), n, resamples)[1]
        own.append(np.quantile(fixed, [0.025, 0.975], axis=0))
    values, biases, bounds, own = (np.array(found) for found in (values, biases, bounds, own))  # bounds (S, 2, M)
    truth = values.mean(0)
    ways = {
        "percentile": bounds,
        "recentred": bounds - biases[:, None],
        "reflected": 2 * values[:, None] - bounds[:, ::-1],
        "own idf": own,
    }
    held = {way: (found[:, 0] <= truth) & (truth <= found[:, 1]) for way, found in ways.items()}
    rows = []
    for column, metric in enumerate(names):
        width = (bounds[:, 1] - bounds[:, 0])[:, column].mean()
        shares = [f"{100 * held[way][:, column].mean():.1f} %" for way in ways]
        if np.isnan(own[:, :, column]).any():
            shares[-1] = ""
        rows.append([metric, f"{truth[column]:.2f}", f"{biases[:, column].mean():+.2f}", f"{width:.2f}", *shares])
    return rows


def of_captions(references: Mapping[int, list[str]], first: list[str], second: list[str]) -> Sample:
    """CIDEr and BLEU of two captions an image, × 100, and their differences."""
    ids = list(references)
    scorer, captions, both = Cider(references), first + second, ids + ids
    cider, bleu = scorer.table(both, captions), BleuTable(references, both, captions)
    selections = np.arange(2 * len(ids)).reshape(2, -1)

    def statistics(rows: np.ndarray) -> np.ndarray:
        scores = 100 * np.stack([cider.corpus(selections[:, rows]), *bleu.corpus(selections[:, rows])[:, 2:].T])
        return np.concatenate([scores[:, 0], scores[:, 0] - scores[:, 1]])

    own = np.full((len(ids), 6), np.nan)
    of_first, of_second = 100 * cider.scores().reshape(2, -1)
    own[:, 0], own[:, 3] = of_first, of_first - of_second
    levels = ["CIDEr", "BLEU-3", "BLEU-4"]
    return [*levels, *(f"{name}, difference" for name in levels)], statistics, own


def of_world(n: int) -> Iterator[Sample]:
    """Samples of n scenes, a third in each domain."""
    rng = np.random.default_rng(0)
    while True:
        scenes = [nocaps_scene(rng, DOMAINS[i % len(DOMAINS)]) for i in range(n)]
        written = [annotate(scene, 11, rng) for scene in scenes]
        others = [minimal_caption(scene, rng) for scene in scenes]
        yield of_captions({i: own[1:] for i, own in enumerate(written)}, [own[0] for own in written], others)


def of_coco(file: Path, n: int) -> Iterator[Sample]:
    """Samples of n photographs: a human caption, and the same without its last two words, against the others."""
    rng, dataset = np.random.default_rng(0), read_coco(file, file.parent)
    while True:
        chosen = [dataset[int(i)].references for i in rng.permutation(len(dataset))[:n]]
        first = [own[0] for own in chosen]
        second = [" ".join(caption.split()[:-2]) for caption in first]
        yield of_captions({i: list(own[1:]) for i, own in enumerate(chosen)}, first, second)


def of_images(n: int) -> Iterator[Sample]:
    """Samples of n images of all kinds and n of COCO's kinds, by the features of the miniature's Inception."""
    rng, extractor = np.random.default_rng(0), FeatureExtractor.from_registry(PROFILES["mini"].inception, "cpu")
    while True:
        real = extractor.extract([image_of(coco_scene(rng)) for _ in range(n)])
        generated = extractor.extract([image_of(nocaps_scene(rng, DOMAINS[i % len(DOMAINS)])) for i in range(n)])

        def statistics(rows: np.ndarray, real=real, generated=generated) -> np.ndarray:
            distance = fid(real.features[rows], generated.features[rows])
            return np.array([distance, inception_score(generated.logits[rows])])

        yield ["FID", "Inception Score"], statistics, np.full((n, 2), np.nan)


def image_of(scene: Scene) -> Image.Image:
    return Image.fromarray(draw(scene))


if __name__ == "__main__":
    main()
