"""The metrics and the similarities that the studies report: a table of each, with how it is written and read.

`evaluate_captions` and `evaluate_images` compute the metrics; tables of effects name them in their column `metric`, and
similarities in `ranked_by`. A new similarity needs a row in `SIMILARITIES`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dalleflamingo.course import show
from dalleflamingo.similarity import Similarity


@dataclass(frozen=True)
class Metric:
    """How a metric is written and read.

    Attributes:
        label: its name in tables and figures.
        digits: after the decimal point.
        of: what it scores, "caption" or "image".
        lower_is_better: of two values the lower is the better one.
        of_sets: a value of a set of images, which no single image has. Resampling biases it, so that its intervals are
            recentred (see `intervals.paired_bootstrap`).
        correlated: claim 1 or 3 correlates it with the similarities.
        figure: end of the names of its figures, as in rank_curve_f1.png; None where it has none.
    """

    label: str
    digits: int
    of: str
    lower_is_better: bool = False
    of_sets: bool = False
    correlated: bool = False
    figure: str | None = None


METRICS = {
    "cider": Metric("CIDEr × 100", 1, "caption", correlated=True, figure=""),
    "bleu4": Metric("BLEU-4 × 100", 1, "caption", correlated=True),
    "spice": Metric("SPICE × 100", 1, "caption", correlated=True),
    "f1": Metric(show.LABELS["f1"], 3, "caption", correlated=True, figure="_f1"),
    "wmd": Metric(show.LABELS["wmd"], 3, "caption", lower_is_better=True, correlated=True),
    "found": Metric(show.LABELS["found"], 3, "image", figure="_found"),
    "clip_distance": Metric(
        show.LABELS["clip_distance"], 2, "image", lower_is_better=True, correlated=True, figure="_clip"
    ),
    "dino_distance": Metric(show.LABELS["dino_distance"], 2, "image", lower_is_better=True, correlated=True),
    "fid": Metric(show.LABELS["fid"], 2, "image", lower_is_better=True, of_sets=True, figure="_fid"),
    "is": Metric(show.LABELS["is"], 2, "image", of_sets=True, figure="_is"),
}
# what claim 1 and claim 3 correlate
OF_CAPTIONS = tuple(name for name, metric in METRICS.items() if metric.correlated and metric.of == "caption")
OF_IMAGES = tuple(name for name, metric in METRICS.items() if metric.correlated and metric.of == "image")


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
