"""How far the miniature's people agree, and how its captioners err: the gates of captions, on development scenes."""

from collections.abc import Callable

import numpy as np
from tqdm.auto import tqdm

from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset
from dalleflamingo.decoding import Nucleus
from dalleflamingo.evaluation.intervals import Interval, mean_interval, paired_bootstraps, proportion
from dalleflamingo.evaluation.ngrams import BleuTable, Cider
from dalleflamingo.miniature.scene_graph import Scene, recall_of_things, scene_graph_f1, wrong_facts
from dalleflamingo.research import fresh
from dalleflamingo.research.insights import difference
from dalleflamingo.research.ranking import RESAMPLES
from dalleflamingo.runs import derive_seed

CANDIDATES = 10
P, LARGEST_P, SMALLEST_P = 0.9, 0.95, 0.1  # of the nucleus: the paper's, and the ends of its Table 6


def annotator_figures(dataset: Dataset, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """The first caption of every image against the others, as if it were a model's.

    Args:
        dataset: with several captions of every image, whose order is random.
        resamples: of the bootstrap over images.
    """
    ids, firsts = [one.image_id for one in dataset], [one.references[0] for one in dataset]
    others = {one.image_id: list(one.references[1:]) for one in dataset}
    cider, bleu = Cider(others).table(ids, firsts), BleuTable(others, ids, firsts)

    def statistics(images: np.ndarray) -> np.ndarray:
        return np.array([100 * cider.corpus(images), bleu.corpus(images)[3]])

    found = paired_bootstraps(statistics, len(ids), resamples)
    names = ("CIDEr × 100", "BLEU-4")
    return {
        f"one of ten captions against the other nine: {name}": value for name, value in zip(names, found, strict=True)
    }


def captioner_figures(
    captioner: Captioner, dataset: Dataset, seed: int, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Sampled captions beside those of beam search: how much CIDEr sampling costs, what is false, how much they vary.

    Args:
        captioner: that writes them.
        dataset: with scenes, human captions and domains.
        seed: of sampling.
        resamples: of the bootstrap over images.
    """
    scenes = fresh.scenes_of(dataset)
    images = fresh.draw_all(scenes)
    seeds = [[derive_seed(seed, one.image_id, k) for k in range(CANDIDATES)] for one in dataset]

    def sample(p: float, count: int) -> list[list[str]]:
        def work(part: slice) -> list[list[str]]:
            return captioner.sample(images[part], [row[:count] for row in seeds[part]], Nucleus(p))

        return _in_parts(work, len(images), f"nucleus p = {p}")

    sampled = sample(P, CANDIDATES)
    largest, smallest = ([caption for [caption] in sample(p, 1)] for p in (LARGEST_P, SMALLEST_P))
    beam = _in_parts(lambda part: captioner.describe(images[part]), len(images), "beam search")
    found = _cider_figures(dataset, [*map(list, zip(*sampled, strict=True)), largest, smallest, beam], resamples)

    pairs = list(zip(sampled, scenes, strict=True))
    shares = np.array([np.mean([says_nothing_false(caption, scene) for caption in row]) for row, scene in pairs])
    spread = [scene_graph_f1(row, [scene] * len(row)).std() for row, scene in pairs]
    domains, what = np.array([one.domain for one in dataset]), "candidates that say nothing false"
    by_domain = {domain: mean_interval(shares[domains == domain]) for domain in dataset.by_domain()}
    found |= {f"nucleus p = {P}, {domain}: {what}": share for domain, share in by_domain.items()}
    if {"in-domain", "out-domain"} <= by_domain.keys():
        lower = difference(by_domain["in-domain"], by_domain["out-domain"])
        found[f"nucleus p = {P}, in-domain − out-domain: {what}"] = lower
    found[f"nucleus p = {P}: standard deviation of F1 across {CANDIDATES} candidates"] = mean_interval(spread)
    return found | {
        "beam search: captions that say nothing false": proportion(
            sum(map(says_nothing_false, beam, scenes)), len(beam)
        ),
        "beam search: recall of things": mean_interval(list(map(recall_of_things, beam, scenes))),
    }


def says_nothing_false(caption: str, scene: Scene) -> bool:
    """Whether no kind, colour, size, relation or ground that the caption names is wrong."""
    return not any(wrong_facts(caption, scene).values())


def _cider_figures(dataset: Dataset, corpora: list[list[str]], resamples: int) -> dict[str, Interval]:
    """CIDEr of sampled captions over that of beam search, and of the largest p over the smallest.

    Args:
        dataset: n images with human captions.
        corpora: (C, n) captions: the candidates at `P`, one at the largest p, one at the smallest, by beam search.
        resamples: of the bootstrap.
    """
    ids = [one.image_id for one in dataset]
    references = {one.image_id: list(one.references) for one in dataset}
    table = Cider(references).table(ids * len(corpora), [caption for corpus in corpora for caption in corpus])
    rows = np.arange(len(corpora) * len(ids)).reshape(len(corpora), len(ids))

    def statistics(images: np.ndarray) -> np.ndarray:
        *candidates, largest, smallest, beam = 100 * table.corpus(rows[:, images])
        sampled = np.mean(candidates)
        return np.array([beam, sampled, sampled / beam, largest / smallest])

    names = (
        "CIDEr × 100 of beam search",
        f"CIDEr × 100 of nucleus p = {P}",
        f"CIDEr of nucleus p = {P} / beam search",
        f"CIDEr of nucleus p = {LARGEST_P} / p = {SMALLEST_P}",
    )
    return dict(zip(names, paired_bootstraps(statistics, len(ids), resamples), strict=True))


def _in_parts(work: Callable[[slice], list], n: int, what: str, size: int = 25) -> list:
    """`work` done on 25 images at a time, with a progress bar."""
    starts = tqdm(range(0, n, size), desc=what, mininterval=5)
    return [result for start in starts for result in work(slice(start, start + size))]
