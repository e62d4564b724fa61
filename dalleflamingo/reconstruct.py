"""Image → text → image and text → image → text (§3.1): what comes back tells which candidate was best.

Each image gets K captions (the paper: K = 10 by nucleus sampling, p = 0.9), each caption one picture, and each picture
a similarity to the image it should give back. The similarity ranks the captions; Insight I says that the caption ranked
first is the better one. The other way round each caption gets N pictures, each picture one description by beam search,
and the similarity of description and caption ranks the pictures (Insight II).
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
from torch import Tensor
from tqdm.auto import tqdm

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import PAPER, Captioner
from dalleflamingo.datasets import (
    Dataset,
    DatasetError,
    Example,
    UnreadableImage,
    open_image,
)
from dalleflamingo.decoding import Strategy
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed
from dalleflamingo.runs import RunFolder, describe
from dalleflamingo.similarity import ClipImage, Dino, Similarity


@dataclass(frozen=True)
class Journey:
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

    def reconstruction(self, row: Mapping, run: RunFolder) -> Image | str:
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
            rows.append(
                {
                    "image_id": example.image_id,
                    "domain": example.domain,
                    "candidate": candidate,
                    "seed": derive_seed(self.seed, example.image_id, candidate),
                    "picture": run.save_image(f"{example.image_id:012d}-{candidate:02d}", picture),
                    **{name: column[i] for name, column in columns.items()},
                }
            )
        return rows


@dataclass(frozen=True)
class ImageTextImage(Journey):
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

    def reconstruction(self, row: Mapping, run: RunFolder) -> Image:
        return open_image(run.folder / row["picture"])


@dataclass(frozen=True)
class TextImageText(Journey):
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
        return example.sample_reference(self.seed)

    def make(self, examples: list[Example], sources: list[str], run: RunFolder, bar: tqdm) -> list[dict]:
        seeds = self.seeds(examples)  # (B, N)
        captions = [source for source in sources for _ in range(self.candidates)]
        pictures = self.draw(captions, list(chain.from_iterable(seeds)), bar)
        bar.set_postfix_str("descriptions")
        batches = (pictures[i : i + self.batch_size] for i in range(0, len(pictures), self.batch_size))
        recovered = list(chain.from_iterable(map(self.captioner.describe, batches)))
        return self.rows(examples, pictures, run, {"caption": captions, "recovered": recovered})

    def reconstruction(self, row: Mapping, run: RunFolder) -> str:
        return row["recovered"]


def run_journey(trip: Journey, dataset: Dataset, run_folder: str | Path, chunk: int) -> pd.DataFrame:
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


def _make(trip: Journey, examples: list[Example], sources: dict, run: RunFolder, bar: tqdm) -> dict[int, list[dict]]:
    """Image id -> its rows, made and kept."""
    if not examples:
        return {}
    rows = trip.make(examples, [sources[example.image_id] for example in examples], run, bar)
    run.add(rows)
    return {e.image_id: rows[i * trip.candidates :][: trip.candidates] for i, e in enumerate(examples)}


def _score(trip: Journey, similarity: Similarity, sources: dict, rows: dict[int, list[dict]], run: RunFolder) -> None:
    """Score the rows of some of the sources, by image id, and keep the scores."""
    if rows:
        flat = list(chain.from_iterable(rows.values()))
        candidates = [trip.reconstruction(row, run) for row in flat]
        run.add_scores(_key(similarity), flat, trip.compare(similarity, [sources[i] for i in rows], candidates))


def _open(
    trip: Journey, dataset: Dataset, examples: list[Example], skipped: list[dict], bar: tqdm
) -> dict[int, object]:
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
    trip: Journey, run: RunFolder, dataset: Dataset, skipped: list[dict], there: int, seconds: float
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


def image_text_image(
    dataset: Dataset,
    captioner: Captioner,
    generator: Generator,
    similarities: Sequence[Similarity],
    run_folder: str | Path,
    *,
    candidates: int,
    steps: int,
    guidance_scale: float,
    strategy: Strategy = PAPER,
    shared_noise: bool = True,
    seed: int = 0,
    chunk: int = 8,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Caption every image K times, draw every caption, and measure how much of the image came back.

    A candidate depends on the models, the settings, its image and its number, and on nothing else in the data set. So a
    run that was killed goes on when called again and ends with the same table, and one over more images of the same
    data set reuses what is there. A picture changed under the same image id goes unnoticed.

    Args:
        similarities: of pictures; each becomes a column under its name. With others than before, or retrained ones,
            a run that is kept is scored by them as it is, and nothing is drawn again.
        run_folder: laid out as in `runs`; its candidates.parquet is the returned table.
        candidates: K. steps: of denoising. guidance_scale: of classifier-free guidance.
        shared_noise: the pictures of one image start from the same noise, so that what differs between them comes from
            the captions, and equal captions are drawn once; False: each candidate has its own.
        chunk: images finished together: what a kill can cost. batch_size: pictures drawn at once.
    Returns:
        one row for each image × candidate, in the order of the data set:
            image_id; domain (None outside NoCaps); candidate, 0 … K − 1;
            seed, of the caption's sampling; noise_seed, of the picture's noise; caption;
            picture, a PNG relative to run_folder; each similarity, higher is more alike.
        `.attrs`: "run_folder", and "skipped": the unreadable images as {"image_id", "path", "reason"}.
    Raises:
        RunFolderError: run_folder was made with other settings or other models.
        DatasetError: not one image could be read.
        ValueError: candidates or steps < 1, or the similarities' names are not usable as columns.
    """
    models = captioner, generator, similarities, candidates, steps, guidance_scale, seed, batch_size
    return run_journey(ImageTextImage(*models, strategy, shared_noise), dataset, run_folder, chunk)


def text_image_text(
    dataset: Dataset,
    captioner: Captioner,
    generator: Generator,
    similarities: Sequence[Similarity],
    run_folder: str | Path,
    *,
    candidates: int,
    steps: int,
    guidance_scale: float,
    seed: int = 0,
    chunk: int = 8,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Draw a caption of every image N times, describe every picture, and measure how much of the caption came back.

    The caption is one of the image's, drawn by `seed`; texts of one's own come by `datasets.read_captions`. Everything
    else is as in `image_text_image`.

    Args:
        similarities: of texts; each becomes a column under its name.
        candidates: N.
    Returns:
        one row for each image × candidate, in the order of the data set:
            image_id; domain; candidate, 0 … N − 1; seed, of the picture's noise; caption, the source;
            picture, a PNG relative to run_folder; recovered, its description; each similarity, higher is more alike.
        `.attrs`: "run_folder", and "skipped": examples without a caption as {"image_id", "path", "reason"}.
    Raises:
        as `image_text_image`.
    """
    models = captioner, generator, similarities, candidates, steps, guidance_scale, seed, batch_size
    return run_journey(TextImageText(*models), dataset, run_folder, chunk)


def reconstruction_score(
    images: Sequence[Image],
    captions: Sequence[str],
    generator: Generator,
    similarity: Similarity,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    pictures: int = 1,
    seed: int = 0,
    batch_size: int = 16,
) -> Tensor:
    """How good captions are, without any reference: how like its image is what the generator draws from it (§6).

    Args:
        images, captions: B of each, in pairs.
        similarity: of pictures, CLIP's or DINO's or one's own.
        pictures: drawn from each caption, from noise of their own; the score is the mean over them.
    Returns:
        (B,) higher is better; captions of one image compare, those of different images hardly.
    Raises:
        ValueError: not as many captions as images, or pictures < 1.
    """
    if len(images) != len(captions) or pictures < 1:
        raise ValueError(
            f"{len(images)} images, {len(captions)} captions, {pictures} pictures of each: give as many captions as "
            "images, and at least one picture"
        )
    texts = [caption for caption in captions for _ in range(pictures)]
    seeds = [derive_seed(seed, j) for _ in captions for j in range(pictures)]  # equal captions are drawn once
    drawn = generator.render(texts, seeds, steps, guidance_scale, batch_size)
    rows = [drawn[i : i + pictures] for i in range(0, len(drawn), pictures)]
    return similarity.compare(images, rows).mean(dim=1)


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


def load_models(
    profile: profiles.Profile, scheduler: str | None = None
) -> tuple[Captioner, Generator, list[Similarity]]:
    """The profile's captioner, generator, and CLIP and DINO. Errors as `registry.locate`.

    Args:
        scheduler: the generator's, in place of the profile's; as `Generator.from_pretrained`, with its error.
    """
    drawn = dict(dtype=profile.torch_dtype, scheduler=scheduler or profile.scheduler)
    return (
        load_captioner(profile, profile.captioner),
        Generator.from_pretrained(**source_of(profile, profile.generator), **drawn),
        [
            ClipImage.from_pretrained(**source_of(profile, profile.clip)),
            Dino.from_pretrained(**source_of(profile, profile.dino), image_size=profile.dino_size),
        ],
    )


def load_captioner(profile: profiles.Profile, name: str) -> Captioner:
    """A captioner by its name in the registry, for the profile's device. Errors as `registry.locate`."""
    prompt = registry.ENTRIES[name].prompt
    return Captioner.from_pretrained(**source_of(profile, name), dtype=profile.torch_dtype, prompt=prompt)


def source_of(profile: profiles.Profile, name: str) -> dict:
    """A registry name as arguments of `from_pretrained`: where it is, its revision, the profile's device."""
    return dict(name_or_path=registry.locate(name), revision=registry.ENTRIES[name].revision, device=profile.device)
