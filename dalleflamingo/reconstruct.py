"""Image → text → image (§3.1): which caption gives the picture back?

Each image gets K captions (the paper: K = 10 by nucleus sampling, p = 0.9), each caption one picture, and each picture
a similarity to the image it should give back. The similarity ranks the captions; Insight I says that the caption ranked
first is the better one.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pandas as pd
import pyarrow as pa
from PIL.Image import Image
from tqdm.auto import tqdm

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import PAPER, Captioner
from dalleflamingo.datasets import Dataset, DatasetError, Example, UnreadableImage, read_folder
from dalleflamingo.decoding import Strategy
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed
from dalleflamingo.runs import RunFolder, describe
from dalleflamingo.similarity import ClipImage, Dino, ImageSimilarity, cosine_similarity

COLUMNS = {
    "image_id": pa.int64(),
    "domain": pa.string(),
    "candidate": pa.int64(),
    "seed": pa.int64(),
    "caption": pa.string(),
    "picture": pa.string(),
}


def image_text_image(
    dataset: Dataset,
    captioner: Captioner,
    generator: Generator,
    similarities: Sequence[ImageSimilarity],
    run_folder: str | Path,
    *,
    candidates: int,
    steps: int,
    guidance_scale: float,
    strategy: Strategy = PAPER,
    seed: int = 0,
    chunk: int = 8,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Caption every image K times, draw every caption, and measure how much of the image came back.

    A candidate depends on the models, the settings, its image and its number, and on nothing else in the data set. So a
    run that was killed goes on when called again and ends with the same table, and one over more images of the same
    data set reuses what is there. A picture changed under the same image id goes unnoticed.

    Args:
        similarities: each becomes a column under its name; a source image is embedded once for its K candidates.
        run_folder: laid out as in `runs`; its candidates.parquet is the returned table.
        candidates: K. steps: of denoising. guidance_scale: of classifier-free guidance.
        chunk: images finished together: what a kill can cost. batch_size: pictures drawn at once.
    Returns:
        one row for each image × candidate, in the order of the data set:
            image_id; domain (None outside NoCaps); candidate, 0 … K − 1;
            seed, of the caption's sampling and of the picture's noise; caption;
            picture, a PNG relative to run_folder; each similarity, a cosine in [-1, 1], higher is more alike.
        `.attrs`: "run_folder", and "skipped": the unreadable images as {"image_id", "path", "reason"}.
    Raises:
        RunFolderError: run_folder was made with other settings or other models.
        DatasetError: not one image could be read.
        ValueError: candidates < 1, or the similarities' names are not usable as columns.
    """
    began = time.monotonic()
    names = [similarity.name for similarity in similarities]
    if candidates < 1 or len({*COLUMNS, *names}) < len(COLUMNS) + len(names):
        raise ValueError(
            f"candidates = {candidates}, similarities named {names}: give at least 1 candidate, and similarities with "
            f"different names that are not columns already ({', '.join(COLUMNS)})"
        )
    trip = _Trip(captioner, generator, similarities, candidates, steps, guidance_scale, strategy, seed, batch_size)
    run = RunFolder(run_folder, trip.settings(dataset.name), pa.schema(COLUMNS | dict.fromkeys(names, pa.float64())))
    there = set(run.rows().image_id).intersection(example.image_id for example in dataset)
    skipped: list[dict] = []
    with tqdm(total=len(dataset), initial=len(there), desc="image → text → image", unit="image") as bar:
        try:
            for start in range(0, len(dataset), chunk):
                pending = [example for example in dataset[start : start + chunk] if example.image_id not in there]
                images = _open(dataset, pending, skipped, bar)
                if images:
                    readable = [example for example in pending if example.image_id in images]
                    run.add(trip.make(readable, list(images.values()), run, bar))
                bar.update(len(images))
        except BaseException:
            bar.write(f"Interrupted: {bar.n} of {len(dataset)} images are kept; the same call goes on in {run.folder}")
            raise
    return _finish(run, dataset, skipped, len(there), time.monotonic() - began)


def rank(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """The table with a column `rank`: 1 is the candidate most alike by column `by`, among those of its image.

    Of equals, the one that stands first in the table has the better rank.

    Raises:
        KeyError: no such column. ValueError: it holds NaN.
    """
    if by not in table:
        raise KeyError(f"no column {by!r} to rank by; the table has {', '.join(table.columns)}")
    if table[by].isna().any():
        raise ValueError(f"column {by!r} holds {int(table[by].isna().sum())} NaN: such candidates have no rank")
    return table.assign(rank=table.groupby("image_id")[by].rank(method="first", ascending=False).astype(int))


def select(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """The candidate ranked first by column `by` for each image, in the order of the table. Errors as `rank`."""
    return rank(table, by).query("rank == 1").drop(columns="rank").reset_index(drop=True)


@dataclass(frozen=True)
class _Trip:
    """Models and settings of the way there and back."""

    captioner: Captioner
    generator: Generator
    similarities: Sequence[ImageSimilarity]
    candidates: int
    steps: int
    guidance_scale: float
    strategy: Strategy
    seed: int
    batch_size: int

    def settings(self, dataset: str) -> dict[str, object]:
        """All that a candidate depends on; batch_size changes nothing."""
        return dict(
            dataset=dataset,
            captioner=describe(self.captioner),
            generator=describe(self.generator),
            similarities={similarity.name: describe(similarity) for similarity in self.similarities},
            candidates=self.candidates,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            strategy=repr(self.strategy),
            seed=self.seed,
        )

    def make(self, examples: list[Example], images: list[Image], run: RunFolder, bar: tqdm) -> list[dict]:
        """The B · K rows of B images, their pictures saved."""
        seeds = [[derive_seed(self.seed, e.image_id, k) for k in range(self.candidates)] for e in examples]  # (B, K)
        bar.set_postfix_str("captions")
        captions = list(chain.from_iterable(self.captioner.sample(images, seeds, self.strategy)))
        flat = list(chain.from_iterable(seeds))
        drawn = []

        def note(count: int) -> None:
            drawn.append(count)
            bar.set_postfix_str(f"{sum(drawn)} of {len(captions)} pictures")

        pictures = self.generator.render(captions, flat, self.steps, self.guidance_scale, self.batch_size, note)
        bar.set_postfix_str("similarities")
        columns = {similarity.name: self._compare(similarity, images, pictures) for similarity in self.similarities}
        rows = []
        for i, picture in enumerate(pictures):
            example, candidate = examples[i // self.candidates], i % self.candidates
            rows.append({
                "image_id": example.image_id,
                "domain": example.domain,
                "candidate": candidate,
                "seed": flat[i],
                "caption": captions[i],
                "picture": run.save_picture(f"{example.image_id:012d}-{candidate:02d}", picture),
                **{name: column[i] for name, column in columns.items()},
            })
        return rows

    def _compare(self, similarity: ImageSimilarity, images: list[Image], pictures: list[Image]) -> list[float]:
        source = similarity.embed(images)  # (B, D)
        drawn = similarity.embed(pictures).reshape(len(images), self.candidates, -1)  # (B, K, D)
        return cosine_similarity(source, drawn).flatten().tolist()


def _open(dataset: Dataset, examples: list[Example], skipped: list[dict], bar: tqdm) -> dict[int, Image]:
    """Image id -> image of those that can be read; the others are named and noted in `skipped`."""
    images = {}
    for example in examples:
        try:
            images[example.image_id] = dataset.open(example)
        except UnreadableImage as error:
            skipped.append({"image_id": example.image_id, "path": str(example.path), "reason": str(error)})
            bar.write(f"Skipped image {example.image_id}: {error}")
    return images


def _finish(run: RunFolder, dataset: Dataset, skipped: list[dict], there: int, seconds: float) -> pd.DataFrame:
    place = {example.image_id: i for i, example in enumerate(dataset)}
    rows = run.rows()
    table = rows[rows.image_id.isin(place)].sort_values(["image_id", "candidate"], ignore_index=True)
    table = table.sort_values("image_id", key=lambda ids: ids.map(place), kind="stable", ignore_index=True)
    if table.empty:
        reason = skipped[0]["reason"] if skipped else f"the data set {dataset.name} is empty"
        raise DatasetError(f"not one of {len(dataset)} images could be read; the first: {reason}")
    path = run.finish(table, skipped)
    print(
        f"{len(table)} candidates of {len(dataset) - len(skipped)} images ({there} were there already, {len(skipped)} "
        f"skipped) in {seconds:.0f} s: {path}, pictures in {run.folder / 'pictures'}"
    )
    table.attrs = {"run_folder": str(run.folder), "skipped": skipped}
    return table


def load_models(profile: profiles.Profile) -> tuple[Captioner, Generator, list[ImageSimilarity]]:
    """The profile's captioner, generator, and CLIP and DINO. Errors as `registry.locate`."""

    def found(name: str) -> dict:
        return dict(
            name_or_path=registry.locate(name), revision=registry.ENTRIES[name].revision, device=profile.device
        )

    return (
        Captioner.from_pretrained(**found(profile.captioner), dtype=profile.torch_dtype),
        Generator.from_pretrained(**found(profile.generator), dtype=profile.torch_dtype),
        [ClipImage.from_pretrained(**found(profile.clip)), Dino.from_pretrained(**found(profile.dino))],
    )


def main(arguments: list[str] | None = None) -> int:
    """A folder of one's own pictures there and back, with the models of the current profile."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo.reconstruct", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="a folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="run folder; an interrupted run goes on in its own")
    options = parser.parse_args(arguments)
    try:
        profile = profiles.current()
        image_text_image(
            read_folder(options.folder),
            *load_models(profile),
            options.out,
            candidates=profile.candidates,
            steps=profile.steps,
            guidance_scale=profile.guidance_scale,
            batch_size=profile.batch_size,
        )
    except (ValueError, registry.RegistryError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
