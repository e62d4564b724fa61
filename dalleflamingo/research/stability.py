"""How stable is a ranking by one image of each caption? Every caption is rendered several times, from other noise.

    python -m dalleflamingo research stability --images 200 --per-caption 4

Insight I must be measured before.

The paper renders each caption once (§3.1). What one image says of its caption is part caption, part chance: two
rankings by other images agree as far as it is caption, and the mean of several images is less chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from dalleflamingo import profiles
from dalleflamingo.commands.parsers import positive
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.intervals import Interval, mean_interval, within_group_spearman
from dalleflamingo.generator import Generator
from dalleflamingo.reconstruct import ImageTextImage, JourneySettings, Source, run_journey
from dalleflamingo.research import pages, report
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.insights import RANKED
from dalleflamingo.research.metrics import METRICS, check_similarities, ranking_label
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.research.ranking import ALL, RESAMPLES, EvaluatedCandidates, gains, measure
from dalleflamingo.runs import RunFolder, derive_seed, write_whole
from dalleflamingo.similarity import Similarity
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import load_models


class FixedCaptions:
    """In a captioner's place: captions that are there already.

    Args:
        captions: image id -> K captions.
    """

    def __init__(self, captions: Mapping[int, Sequence[str]]):
        self.captions = captions

    def fingerprint(self) -> str:
        """A run of other captions is another run."""
        return f"captions {derive_seed(*chain.from_iterable(self.captions.values()))}"


@dataclass(frozen=True)
class RerenderJourney(ImageTextImage):
    """Captions that are there already, each rendered M times: K · M candidates an image, a caption's M in a row."""

    captioner: FixedCaptions

    name = "caption → images"

    def make(self, sources: list[Source], run: RunFolder, bar: tqdm) -> list[dict]:
        captions, noise_seeds, seed = [], [], self.settings.seed
        for example, *_ in sources:
            of_image = self.captioner.captions[example.image_id]
            per_caption = range(self.settings.candidates // len(of_image))
            captions += [caption for caption in of_image for _ in per_caption]
            # the same noise for every caption of an image, as where each is rendered once
            noise_seeds += [derive_seed(seed, "again", example.image_id, m) for _ in of_image for m in per_caption]
        images = self.render(captions, noise_seeds, bar)
        return self.rows(sources, images, run, noise_seed=noise_seeds, caption=captions)


def rerender(
    table: pd.DataFrame,
    dataset: Dataset,
    generator: Generator,
    similarities: Sequence[Similarity],
    run_folder: Path,
    settings: JourneySettings,
) -> pd.DataFrame:
    """Render the captions of a table again, M times each; resumed.

    Args:
        table: as from `reconstruct.image_text_image`, K captions of each image.
        dataset: its images.
        generator: that renders.
        similarities: of images.
        run_folder: of the journey.
        settings: of the journey; its `candidates` are K · M.
    Returns:
        one row for each image × caption × M, as `RerenderJourney` orders them, with a column for each similarity.
    Raises:
        as `reconstruct.image_text_image`.
    """
    captions = table.groupby("image_id", sort=False)["caption"].agg(list).to_dict()
    journey = RerenderJourney(FixedCaptions(captions), generator, similarities, settings)
    return run_journey(journey, dataset.filter(captions), run_folder, chunk=4)


def agreement(found: np.ndarray, images: int, resamples: int = RESAMPLES) -> Interval:
    """How far rankings by m images of each caption, and by m others, agree: ρ within an image, mean over images.

    Args:
        found: (n, K, M) similarities, M ≥ 2 · m.
        images: m.
        resamples: of the bootstrap.
    Raises:
        ValueError: there are not so many images of each caption.
    """
    n, k, m = found.shape
    if 2 * images > m:
        raise ValueError(
            f"two times {images} images of each caption are compared, {m} were generated: generate more, or compare "
            "fewer"
        )
    image = np.repeat(np.arange(n), k)
    first, second = (found[:, :, part].mean(2).ravel() for part in (slice(images), slice(images, 2 * images)))
    rho = within_group_spearman(pd.DataFrame({"image": image, "x": first, "y": second}), "image", "x", "y")
    return mean_interval(rho.dropna().to_numpy(), resamples)


def gains_of_averaging(
    evaluated: EvaluatedCandidates, found: Mapping[str, np.ndarray], resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Gain over a random caption of ranking by the mean similarity of the first m images, m = 1 … M.

    Args:
        evaluated: the captions.
        found: similarity -> (n, K, M), images in the order of `evaluated`.
        resamples: of the bootstrap.
    Returns:
        columns ranked_by, images, metric, and those of `Interval.as_row("gain_")`.
    """
    rows = []
    for m in range(1, next(iter(found.values())).shape[2] + 1):
        table = evaluated.table.copy()
        for by, values in found.items():
            column = np.empty(len(table))
            column[evaluated.rows] = values[:, :, :m].mean(2)
            table[by] = column
        effects = measure(replace(evaluated, table=table), resamples=resamples)
        for by in found:
            for metric in (name for name in ("cider", "f1") if name in evaluated.metrics):
                gain = gains(effects, metric, by)[ALL]
                rows.append({"ranked_by": by, "images": m, "metric": metric} | gain.as_row("gain_"))
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Stability:
    """What was measured.

    Attributes:
        agreements: similarity -> images on each side -> `agreement`.
        gained: of `gains_of_averaging`.
        insight_1: how the captions were made.
        command: that measured it.
    """

    agreements: Mapping[str, Mapping[int, Interval]]
    gained: pd.DataFrame
    insight_1: Provenance
    command: str


def page(found: Stability) -> list[str]:
    """The parts of the page in Markdown."""
    agreements = [
        [ranking_label(by), str(m), pages.cell(rho, 3)]
        for by, row in found.agreements.items()
        for m, rho in row.items()
    ]
    gained = []
    for row in found.gained.to_dict("records"):
        metric, gain = METRICS[row["metric"]], Interval.from_row(row, "gain_")
        cell = pages.cell(gain, metric.digits, signed=True)
        gained.append([ranking_label(row["ranked_by"]), metric.label, str(row["images"]), cell])
    return [
        "# Several images of each caption",
        pages.measured_on(
            found.insight_1.dataset, "; the paper has no values of this, as it renders each caption once"
        ),
        f"n = {found.gained['n'].max()} images, K = {RANKED}. {pages.made_by(found.command, pages.current_commit())}",
        "## Do rankings by other images agree?",
        "Spearman's ρ within an image between the ranking by so many images of each caption and by as many others.",
        pages.table(["ranked by", "images", "ρ"], agreements),
        "## Does the mean of several images rank better?",
        "The caption ranked first by the mean similarity of its images, minus a random one.",
        pages.table(["ranked by", "", "images", "minus random"], gained),
    ]


def main(arguments: list[str]) -> int:
    """Rankings by several generated images of each caption.

    Render Insight I's captions again, each from several noises: do rankings by other images agree, and does their mean
    rank better? Insight I must be measured before.
    """
    parser = study_parser("stability", main.__doc__)
    parser.add_argument("--images", type=positive, default=200, help="how many of Insight I's images; default: 200")
    parser.add_argument(
        "--per-caption", type=positive, default=4, help="images of each caption, an even number; default: 4"
    )
    options = parse(parser, arguments)
    folder = options.docs / "results"
    found = measure_stability(options.images, options.per_caption, folder, options.runs / "stability")
    write_whole(folder / "stability.csv", lambda path: found.gained.round(5).to_csv(path, index=False))
    pages.write_page(folder / "stability.md", page(found))
    for by, row in found.agreements.items():
        print(by, *(f"{m} images against {m}: {rho}" for m, rho in row.items()), sep="\n  ")
    return 0


def measure_stability(images: int, per_caption: int, folder: Path, run_folder: Path) -> Stability:
    """Render and measure, resumed.

    Args:
        images: n.
        per_caption: M, generated images of each caption.
        folder: with the measured Insight I.
        run_folder: of the journey.
    """
    profile = profiles.current()
    table, _ = report.load("insight-1", folder)
    dataset = registered.load_dataset(profile.dataset)
    ids = {example.image_id for example in dataset.subset(images)}
    table = table[table["image_id"].isin(ids) & (table["candidate"] < RANKED)].reset_index(drop=True)
    _, generator, encoders = load_models(profile)
    check_similarities(encoders, "image")
    settings = JourneySettings.of(profile, candidates=RANKED * per_caption)
    rendered = rerender(table, dataset, generator, encoders, run_folder, settings)
    evaluated = evaluate_captions(table, dataset)
    shape = (len(evaluated.rows), RANKED, per_caption)
    found = {encoder.name: rendered[encoder.name].to_numpy().reshape(shape) for encoder in encoders}
    sides = [m for m in (1, 2, 4, 8) if 2 * m <= per_caption]
    return Stability(
        agreements={by: {m: agreement(values, m) for m in sides} for by, values in found.items()},
        gained=gains_of_averaging(evaluated, found),
        insight_1=Provenance.from_attrs(table.attrs),
        command=f"python -m dalleflamingo research stability --images {images} --per-caption {per_caption}",
    )
