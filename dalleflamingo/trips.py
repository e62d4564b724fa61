"""The two ways there and back, image → text → image and text → image → text: what a row of their tables is made of.

A trip knows models and settings, opens what it starts from, and makes the rows of a few examples. `travel` takes it
over a data set, a few examples at a time, keeps what is finished and goes on where it was.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pyarrow as pa
from PIL.Image import Image
from tqdm.auto import tqdm

from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset, DatasetError, Example, UnreadableImage, open_picture
from dalleflamingo.decoding import Strategy
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed
from dalleflamingo.runs import RunFolder, describe
from dalleflamingo.similarity import Similarity


@dataclass(frozen=True)
class Trip:
    """A way there and back: the two that talk, the similarities that judge, and how pictures are drawn.

    what: its name for people. columns: of its table, before the similarities'.
    """

    what: ClassVar[str]
    columns: ClassVar[dict[str, pa.DataType]]

    captioner: Captioner
    generator: Generator
    similarities: Sequence[Similarity]
    candidates: int
    steps: int
    guidance_scale: float
    seed: int
    batch_size: int

    def settings(self) -> dict[str, object]:
        """All that a candidate depends on, but for the data set; batch_size and similarities change nothing in it."""
        return dict(
            trip=self.what,
            captioner=describe(self.captioner),
            generator=describe(self.generator),
            candidates=self.candidates,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
        )

    def open(self, dataset: Dataset, example: Example) -> Image | str:
        """What the trip starts from. Raises DatasetError where it cannot be had."""
        raise NotImplementedError

    def make(self, examples: list[Example], sources: list, run: RunFolder, bar: tqdm) -> list[dict]:
        """The B · K rows of B examples, their pictures saved."""
        raise NotImplementedError

    def came_back(self, row: Mapping, run: RunFolder) -> Image | str:
        """What is held against the source, of a row that was made."""
        raise NotImplementedError

    def seeds(self, examples: Sequence[Example]) -> list[list[int]]:
        """(B, K), one a candidate."""
        return [[derive_seed(self.seed, e.image_id, k) for k in range(self.candidates)] for e in examples]

    def draw(self, captions: Sequence[str], seeds: Sequence[int], bar: tqdm) -> list[Image]:
        """A picture for each caption and seed."""
        drawn = []

        def note(count: int) -> None:
            drawn.append(count)
            bar.set_postfix_str(f"{sum(drawn)} of {len(captions)} pictures")

        return self.generator.render(captions, seeds, self.steps, self.guidance_scale, self.batch_size, note)

    def compare(self, similarity: Similarity, sources: list, candidates: list) -> list[float]:
        """B · K numbers; of B sources and their candidates in a row.

        Raises:
            ValueError: the similarity gives another shape than (B, K).
        """
        rows = [candidates[i : i + self.candidates] for i in range(0, len(candidates), self.candidates)]
        found = similarity.compare(sources, rows)
        if found.shape != (len(sources), self.candidates):
            raise ValueError(
                f"similarity {similarity.name!r} gave {tuple(found.shape)} numbers for {len(sources)} sources with "
                f"{self.candidates} candidates each: expected a row a source and a number a candidate"
            )
        return found.flatten().tolist()

    def rows(self, examples: list[Example], pictures: list[Image], run: RunFolder, columns: dict) -> list[dict]:
        """The rows of B examples, their pictures saved; each column holds B · K values."""
        rows = []
        for i, picture in enumerate(pictures):
            example, candidate = examples[i // self.candidates], i % self.candidates
            rows.append({
                "image_id": example.image_id,
                "domain": example.domain,
                "candidate": candidate,
                "seed": derive_seed(self.seed, example.image_id, candidate),
                "picture": run.save_picture(f"{example.image_id:012d}-{candidate:02d}", picture),
                **{name: column[i] for name, column in columns.items()},
            })
        return rows


@dataclass(frozen=True)
class ImageTrip(Trip):
    """Image → text → image: K captions of an image, a picture of each, held against the image."""

    strategy: Strategy
    shared_noise: bool

    what = "image → text → image"
    columns = {
        "image_id": pa.int64(),
        "domain": pa.string(),
        "candidate": pa.int64(),
        "seed": pa.int64(),
        "noise_seed": pa.int64(),
        "caption": pa.string(),
        "picture": pa.string(),
    }

    def settings(self) -> dict[str, object]:
        return super().settings() | dict(strategy=repr(self.strategy), shared_noise=self.shared_noise)

    def open(self, dataset: Dataset, example: Example) -> Image:
        return dataset.open(example)

    def make(self, examples: list[Example], sources: list[Image], run: RunFolder, bar: tqdm) -> list[dict]:
        seeds = self.seeds(examples)  # (B, K)
        bar.set_postfix_str("captions")
        captions = list(chain.from_iterable(self.captioner.sample(sources, seeds, self.strategy)))
        noise = [row[0] if self.shared_noise else seed for row in seeds for seed in row]
        pictures = self.draw(captions, noise, bar)
        return self.rows(examples, pictures, run, {"noise_seed": noise, "caption": captions})

    def came_back(self, row: Mapping, run: RunFolder) -> Image:
        return open_picture(run.folder / row["picture"])


@dataclass(frozen=True)
class TextTrip(Trip):
    """Text → image → text: N pictures of a caption, what is said of each, held against the caption."""

    what = "text → image → text"
    columns = {
        "image_id": pa.int64(),
        "domain": pa.string(),
        "candidate": pa.int64(),
        "seed": pa.int64(),
        "caption": pa.string(),
        "picture": pa.string(),
        "recovered": pa.string(),
    }

    def open(self, dataset: Dataset, example: Example) -> str:
        """One of the example's captions, drawn by the trip's seed (§3.2)."""
        if not example.path.is_file():  # the real picture is what drawn ones are judged by later
            raise UnreadableImage(example.path, "there is no such file", "fetch it, or leave the example out")
        return example.drawn_reference(self.seed)

    def make(self, examples: list[Example], sources: list[str], run: RunFolder, bar: tqdm) -> list[dict]:
        seeds = self.seeds(examples)  # (B, N)
        captions = [source for source in sources for _ in range(self.candidates)]
        pictures = self.draw(captions, list(chain.from_iterable(seeds)), bar)
        bar.set_postfix_str("descriptions")
        batches = (pictures[i : i + self.batch_size] for i in range(0, len(pictures), self.batch_size))
        recovered = list(chain.from_iterable(map(self.captioner.describe, batches)))
        return self.rows(examples, pictures, run, {"caption": captions, "recovered": recovered})

    def came_back(self, row: Mapping, run: RunFolder) -> str:
        return row["recovered"]


def travel(trip: Trip, dataset: Dataset, run_folder: str | Path, chunk: int) -> pd.DataFrame:
    """Make the rows of every example that can be opened, `chunk` of them at a time; what is there is not made again.

    Arguments, result and errors as of the two functions of `reconstruct`.
    """
    began = time.monotonic()
    names = [similarity.name for similarity in trip.similarities]
    if trip.steps < 1:
        raise ValueError(f"steps = {trip.steps}: give at least 1 step of denoising")
    if trip.candidates < 1 or len(trip.columns | dict.fromkeys(names)) < len(trip.columns) + len(names):
        raise ValueError(
            f"candidates = {trip.candidates}, similarities named {names}: give at least 1 candidate, and similarities "
            f"with different names that are not columns already ({', '.join(trip.columns)})"
        )
    run = RunFolder(run_folder, {"dataset": dataset.name} | trip.settings(), pa.schema(trip.columns))
    kept = run.rows().groupby("image_id")
    scored = {s.name: set(run.scores(_key(s)).image_id) for s in trip.similarities}
    there = {e.image_id for e in dataset}.intersection(kept.groups, *scored.values())
    skipped: list[dict] = []
    with tqdm(total=len(dataset), initial=len(there), desc=trip.what, unit="image") as bar:
        try:
            for start in range(0, len(dataset), chunk):
                pending = [example for example in dataset[start : start + chunk] if example.image_id not in there]
                sources = _open(trip, dataset, pending, skipped, bar)
                if not sources:
                    continue
                rows = {i: kept.get_group(i).to_dict("records") for i in sources if i in kept.groups}
                rows |= _make(trip, [e for e in pending if e.image_id in sources.keys() - rows], sources, run, bar)
                bar.set_postfix_str("similarities")
                for similarity in trip.similarities:
                    left = {i: rows[i] for i in sources if i not in scored[similarity.name]}
                    _score(trip, similarity, sources, left, run)
                bar.update(len(sources))
        except BaseException:
            bar.write(f"Interrupted: {bar.n} of {len(dataset)} images are kept; the same call goes on in {run.folder}")
            raise
    return _finish(trip, run, dataset, skipped, len(there), time.monotonic() - began)


def _key(similarity: Similarity) -> str:
    return f"{similarity.name} {describe(similarity)}"


def _make(trip: Trip, examples: list[Example], sources: dict, run: RunFolder, bar: tqdm) -> dict[int, list[dict]]:
    """Image id -> its rows, made and kept."""
    if not examples:
        return {}
    rows = trip.make(examples, [sources[example.image_id] for example in examples], run, bar)
    run.add(rows)
    return {e.image_id: rows[i * trip.candidates :][: trip.candidates] for i, e in enumerate(examples)}


def _score(trip: Trip, similarity: Similarity, sources: dict, rows: dict[int, list[dict]], run: RunFolder) -> None:
    """Score the rows of some of the sources, by image id, and keep the scores."""
    if rows:
        flat = list(chain.from_iterable(rows.values()))
        candidates = [trip.came_back(row, run) for row in flat]
        run.add_scores(_key(similarity), flat, trip.compare(similarity, [sources[i] for i in rows], candidates))


def _open(trip: Trip, dataset: Dataset, examples: list[Example], skipped: list[dict], bar: tqdm) -> dict[int, object]:
    """Image id -> source of those that can be opened; the others are named and noted in `skipped`."""
    sources = {}
    for example in examples:
        try:
            sources[example.image_id] = trip.open(dataset, example)
        except DatasetError as error:
            skipped.append({"image_id": example.image_id, "path": str(example.path), "reason": str(error)})
            bar.write(f"Skipped image {example.image_id}: {error}")
    return sources


def _finish(
    trip: Trip, run: RunFolder, dataset: Dataset, skipped: list[dict], there: int, seconds: float
) -> pd.DataFrame:
    place = {example.image_id: i for i, example in enumerate(dataset)}
    rows = run.rows()
    table = rows[rows.image_id.isin(place)].sort_values(["image_id", "candidate"], ignore_index=True)
    table = table.sort_values("image_id", key=lambda ids: ids.map(place), kind="stable", ignore_index=True)
    if table.empty:
        reason = skipped[0]["reason"] if skipped else f"the data set {dataset.name} is empty"
        raise DatasetError(f"not one of {len(dataset)} images could be read; the first: {reason}")
    for similarity in trip.similarities:
        scores = run.scores(_key(similarity)).rename(columns={"score": similarity.name})
        table = table.merge(scores, how="left", on=["image_id", "candidate"])
    path = run.finish(table, skipped)
    print(
        f"{len(table)} candidates of {len(dataset) - len(skipped)} images ({there} were there already, {len(skipped)} "
        f"skipped) in {seconds:.0f} s: {path}, pictures in {run.folder / 'pictures'}"
    )
    table.attrs = {"run_folder": str(run.folder), "skipped": skipped}
    return table
