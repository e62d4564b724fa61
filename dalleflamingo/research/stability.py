"""How stable is a ranking by one picture of each caption? Every caption is drawn several times, from other noise.

    python -m dalleflamingo research stability --images 200 --pictures 4   after `make reproduce` has measured Insight I

The paper draws each caption once (§3.1). What one picture says of its caption is part caption, part chance: two
rankings by other pictures agree as far as it is caption, and the mean of several pictures is less chance.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image
from tqdm.auto import tqdm

from dalleflamingo import profiles, registry
from dalleflamingo.course import show
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import Interval, derive_seed, mean_interval, within_group_spearman
from dalleflamingo.reconstruct import ImageTextImage, Journey, load_models, run_journey
from dalleflamingo.research import pages, report
from dalleflamingo.research.insights import RANKED
from dalleflamingo.research.ranking import ALL, RESAMPLES, EvaluatedCandidates, evaluate_captions, gains, measure
from dalleflamingo.runs import RunFolder
from dalleflamingo.similarity import Similarity


class Written:
    """In a captioner's place: captions that are there already.

    Args:
        captions: image id -> K captions.
    """

    def __init__(self, captions: Mapping[int, Sequence[str]]):
        self.captions = captions
        self.digest = derive_seed(*chain.from_iterable(captions.values()))  # a run of other captions is another run


@dataclass(frozen=True)
class RedrawJourney(Journey):
    """Captions that are there already, each drawn M times: K · M candidates an image, a caption's pictures in a row."""

    captioner: Written

    what = "caption → pictures"
    columns, open, reconstruction = ImageTextImage.columns, ImageTextImage.open, ImageTextImage.reconstruction

    def make(self, examples: list[Example], sources: list[Image], run: RunFolder, bar: tqdm) -> list[dict]:
        captions, noise = [], []
        for example in examples:
            of_image = self.captioner.captions[example.image_id]
            pictures = self.candidates // len(of_image)
            captions += [caption for caption in of_image for _ in range(pictures)]
            # the same noise for every caption of an image, as where each is drawn once
            noise += [derive_seed(self.seed, "again", example.image_id, m) for _ in of_image for m in range(pictures)]
        drawn = self.draw(captions, noise, bar)
        return self.rows(examples, drawn, run, {"noise_seed": noise, "caption": captions})


def redraw(
    table: pd.DataFrame,
    dataset: Dataset,
    generator: Generator,
    similarities: Sequence[Similarity],
    run_folder: Path,
    pictures: int,
    profile: profiles.Profile,
) -> pd.DataFrame:
    """Draw the captions of a table as from `reconstruct.image_text_image` again, M = `pictures` times each; resumed.

    Returns:
        one row for each image × caption × picture, as `RedrawJourney` orders them, with a column for each similarity.
    Raises:
        as `reconstruct.image_text_image`.
    """
    captions = table.groupby("image_id", sort=False)["caption"].agg(list).to_dict()
    candidates = pictures * len(next(iter(captions.values())))
    size = candidates, profile.steps, profile.guidance_scale, 0, profile.batch_size
    trip = RedrawJourney(Written(captions), generator, similarities, *size)
    return run_journey(trip, dataset.only(captions), run_folder, chunk=4)


def agreement(found: np.ndarray, pictures: int, resamples: int = RESAMPLES) -> Interval:
    """How far rankings by `pictures` pictures each, and by as many others, agree: ρ within an image, mean over images.

    Args:
        found: (n, K, M) similarities, M ≥ 2 · pictures.
    Raises:
        ValueError: there are not so many pictures.
    """
    n, k, m = found.shape
    if 2 * pictures > m:
        raise ValueError(
            f"two times {pictures} pictures of each caption are wanted, {m} were drawn: draw more, or compare fewer"
        )
    image = np.repeat(np.arange(n), k)
    first, second = (found[:, :, part].mean(2).ravel() for part in (slice(pictures), slice(pictures, 2 * pictures)))
    rho = within_group_spearman(pd.DataFrame({"image": image, "x": first, "y": second}), "image", "x", "y")
    return mean_interval(rho.dropna().to_numpy(), resamples)


def worth(judged: EvaluatedCandidates, found: Mapping[str, np.ndarray], resamples: int = RESAMPLES) -> pd.DataFrame:
    """What ranking by the mean of the first m pictures gains over a random caption, m = 1 … M.

    Args:
        found: similarity -> (n, K, M), images in the order of `judged`.
    Returns:
        columns ranked_by, pictures, metric, gain, low, high, n.
    """
    rows = []
    for m in range(1, next(iter(found.values())).shape[2] + 1):
        table = judged.table.copy()
        for by, values in found.items():
            column = np.empty(len(table))
            column[judged.rows] = values[:, :, :m].mean(2)
            table[by] = column
        effects = measure(EvaluatedCandidates(**vars(judged) | {"table": table}), resamples=resamples)
        for by in found:
            for metric in (name for name in ("cider", "f1") if name in judged.metrics):
                gain = gains(effects, metric, by)[ALL]
                row = {"ranked_by": by, "pictures": m, "metric": metric}
                rows.append(row | {"gain": gain.value, "low": gain.low, "high": gain.high, "n": gain.n})
    return pd.DataFrame(rows)


def page(agreed: Mapping[str, Mapping[int, Interval]], gained: pd.DataFrame, command: str) -> str:
    """The page in Markdown."""
    stable = [[show.LABELS[by], str(m), pages.cell(rho, 3)] for by, row in agreed.items() for m, rho in row.items()]
    worth_rows = []
    for row in gained.itertuples():
        metric, gain = report.METRICS[row.metric], Interval(row.gain, row.low, row.high, row.n, 0)
        cell = pages.cell(gain, metric.digits, signed=True)
        worth_rows.append([show.LABELS[row.ranked_by], metric.label, str(row.pictures), cell])
    parts = [
        "# Several pictures of each caption",
        f"{pages.measured_on(profiles.current().dataset)}. Of this the paper has no figures; it draws each caption "
        "once.",
        f"n = {gained['n'].max()} images, K = {RANKED}. Made by `{command}` at commit `{pages.current_commit()}`. "
        "Brackets are 95 % intervals over images.",
        "## Do rankings by other pictures agree?",
        "Spearman's ρ within an image between the ranking by so many pictures of each caption and by as many others.",
        pages.table(["ranked by", "pictures", "ρ"], stable),
        "## Is the mean of several pictures worth more?",
        "The caption ranked first by the mean similarity of its pictures, minus a random one.",
        pages.table(["ranked by", "", "pictures", "minus random"], worth_rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Draw Insight I's captions again, going on where it was, and write a page and its tables into the docs."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo research stability", description=main.__doc__)
    parser.add_argument("--images", type=int, default=200, help="n; default: 200")
    parser.add_argument("--pictures", type=int, default=4, help="of each caption, an even number; default: 4")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="default: docs")
    parser.add_argument("--run", type=Path, default=Path("build/runs/stability"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        agreed = run(options.images, options.pictures, options.docs / "results", options.run)
    except (ValueError, FileNotFoundError, registry.RegistryError) as error:
        parser.error(str(error))
    for by, row in agreed.items():
        print(by, *(f"{m} pictures against {m}: {rho}" for m, rho in row.items()), sep="\n  ")
    return 0


def run(images: int, pictures: int, folder: Path, run_folder: Path) -> dict[str, dict[int, Interval]]:
    """Measure and write stability.csv and stability.md; returns similarity -> pictures on each side -> agreement."""
    profile = profiles.current()
    table, _ = report.load("insight-1", folder)
    dataset = registry.dataset(profile.dataset)
    ids = {example.image_id for example in dataset.subset(images)}
    table = table[table["image_id"].isin(ids) & (table["candidate"] < RANKED)].reset_index(drop=True)
    _, generator, encoders = load_models(profile)
    drawn = redraw(table, dataset, generator, encoders, run_folder, pictures, profile)
    judged = evaluate_captions(table, dataset)
    shape = (len(judged.rows), RANKED, pictures)
    found = {encoder.name: drawn[encoder.name].to_numpy().reshape(shape) for encoder in encoders}
    halves = [m for m in (1, 2, 4, 8) if 2 * m <= pictures]
    agreed = {by: {m: agreement(values, m) for m in halves} for by, values in found.items()}
    gained = worth(judged, found)
    gained.round(5).to_csv(folder / "stability.csv", index=False)
    command = f"python -m dalleflamingo research stability --images {images} --pictures {pictures}"
    (folder / "stability.md").write_text(page(agreed, gained, command), encoding="utf-8")
    return agreed
