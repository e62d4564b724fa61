"""The metrics and the similarities that the studies report: a table of each, with how it is written and read.

`evaluate_captions` and `evaluate_images` compute the metrics; tables of effects name them in their column `metric`, and
similarities in `ranked_by`. A new similarity needs a row in `SIMILARITIES`.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from dalleflamingo.course import show
from dalleflamingo.similarity import Similarity

PRIMARY, SECONDARY = "primary", "secondary"  # parts of a claim: its verdict follows from the primary pairs alone


@dataclass(frozen=True)
class Metric:
    """How a metric is written and read.

    Attributes:
        label: its name in tables and figures.
        digits: after the decimal point.
        of: what it scores, "caption" or "image".
        lower_is_better: of two values the lower is the better one.
        of_sets: a value of a set of images, which no single image has, and slow: its bootstrap has fewer resamples.
        of_counts: a value of counts summed over a corpus, so no mean over its images.
        biased: resampling biases it, so that its intervals are recentred (see `intervals.paired_bootstrap`).
        part: of claim 1 or 3, "primary" or "secondary", where these correlate it with the similarities.
        stands_in_for: the metric whose part it takes where both were measured.
        figure: end of the names of its figures, as in rank_curve_f1.png; None where it has none.
    """

    label: str
    digits: int
    of: str
    lower_is_better: bool = False
    of_sets: bool = False
    of_counts: bool = False
    biased: bool = False
    part: str = ""
    stands_in_for: str = ""
    figure: str | None = None


METRICS = {
    "cider": Metric("CIDEr × 100", 1, "caption", biased=True, part=PRIMARY, figure=""),
    "bleu3": Metric("BLEU-3 × 100", 1, "caption", of_counts=True, part=SECONDARY),
    "bleu4": Metric("BLEU-4 × 100", 1, "caption", of_counts=True, part=PRIMARY),
    "spice": Metric("SPICE × 100", 1, "caption", part=PRIMARY),
    "f1": Metric(show.LABELS["f1"], 3, "caption", part=PRIMARY, stands_in_for="spice", figure="_f1"),
    "wmd": Metric(show.LABELS["wmd"], 3, "caption", lower_is_better=True, part=PRIMARY, figure="_wmd"),
    "clip_text": Metric("CLIP text similarity", 3, "caption", part=SECONDARY, figure="_clip_text"),
    "sbert": Metric("SBERT similarity", 3, "caption", part=SECONDARY, figure="_sbert"),
    "found": Metric(show.LABELS["found"], 3, "image", figure="_found"),
    "clip_distance": Metric(
        show.LABELS["clip_distance"], 2, "image", lower_is_better=True, part=PRIMARY, figure="_clip"
    ),
    "dino_distance": Metric(show.LABELS["dino_distance"], 2, "image", lower_is_better=True, part=PRIMARY),
    "fid": Metric(show.LABELS["fid"], 2, "image", lower_is_better=True, of_sets=True, biased=True, figure="_fid"),
    "is": Metric(show.LABELS["is"], 2, "image", of_sets=True, biased=True, figure="_is"),
}
# what claim 1 and claim 3 correlate
OF_CAPTIONS = tuple(name for name, metric in METRICS.items() if metric.part and metric.of == "caption")
OF_IMAGES = tuple(name for name, metric in METRICS.items() if metric.part and metric.of == "image")


@dataclass(frozen=True)
class Ranking:
    """A similarity that ranks candidates.

    Attributes:
        label: its name in tables.
        of: what it compares, "image" or "text".
        overlap: it counts or moves the words of two texts; claim 3 sets these against embeddings.
    """

    label: str
    of: str
    overlap: bool = False


SIMILARITIES = {  # by `Similarity.name`, in the order of tables
    "clip": Ranking(show.LABELS["clip"], "image"),
    "dino": Ranking(show.LABELS["dino"], "image"),
    "fidelity": Ranking(show.LABELS["fidelity"], "image"),
    "text_clip": Ranking(show.LABELS["text_clip"], "text"),
    "text_sbert": Ranking(show.LABELS["text_sbert"], "text"),
    "text_cider": Ranking(show.LABELS["text_cider"], "text", overlap=True),
    "text_wmd": Ranking(show.LABELS["text_wmd"], "text", overlap=True),
}
# what claim 3 compares
EMBEDDINGS = tuple(name for name, one in SIMILARITIES.items() if one.of == "text" and not one.overlap)
OVERLAPS = tuple(name for name, one in SIMILARITIES.items() if one.of == "text" and one.overlap)


class Pair(NamedTuple):
    """A similarity and a metric that claim 1 or claim 3 correlates within an image or a caption."""

    ranked_by: str
    metric: str
    part: str


def pairs_of_claim(of: str, measured: Container[str] | None = None) -> list[Pair]:
    """The pairs of claim 1 or 3, as docs/protocol.md declares them: every similarity with every metric.

    Args:
        of: what the metrics score, "caption" for claim 1, "image" for claim 3.
        measured: the similarities and metrics that there are; None: all. Where a metric and its stand-in were both
            measured, the stand-in takes its part.
    Returns:
        a similarity's pairs in a row, in the order of the tables here.
    """
    if measured is None:
        measured = {*SIMILARITIES, *(name for name, one in METRICS.items() if not one.stands_in_for)}
    metrics = {name: one for name, one in METRICS.items() if one.part and one.of == of and name in measured}
    replaced = {one.stands_in_for for one in metrics.values()}
    compared = "image" if of == "caption" else "text"
    ranked_by = [by for by, one in SIMILARITIES.items() if one.of == compared and by in measured]
    return [Pair(by, name, one.part) for by in ranked_by for name, one in metrics.items() if name not in replaced]


def ranking_label(ranked_by: str) -> str:
    """What tables call a way to rank: a similarity's label, else that of the figures or the name itself.

    Args:
        ranked_by: as in a table of effects.
    """
    return SIMILARITIES[ranked_by].label if ranked_by in SIMILARITIES else show.label(ranked_by)


def check_similarities(similarities: Iterable[Similarity], of: str) -> None:
    """Called before a study generates anything, as its tables would leave out a similarity that they do not know.

    Args:
        similarities: that the study ranks by.
        of: what they compare, "image" or "text".
    Raises:
        ValueError: one is not in `SIMILARITIES`, or compares something else.
    """
    known = [name for name, one in SIMILARITIES.items() if one.of == of]
    if unknown := [one.name for one in similarities if one.name not in known]:
        raise ValueError(
            f"{', '.join(map(repr, unknown))}: the studies know no such similarity of {of}s, only {', '.join(known)}; "
            "give it a row in SIMILARITIES of dalleflamingo/research/metrics.py"
        )
