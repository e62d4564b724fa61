"""Image → text → image and text → image → text (§3.1): what comes back tells which candidate was best.

The captioner writes K captions of an image x (the paper: K = 10 by nucleus sampling, p = 0.9), the generator makes an
image of each, and a similarity compares these with x. Insight I: the caption whose image is most like x is the best
caption. The other way round, the generator makes N images of a caption w, the captioner describes each by beam search,
and a similarity compares the descriptions with w. Insight II: the image whose description is most like w is the best
image.
"""

import hashlib
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import pandas as pd
import pyarrow as pa
from PIL.Image import Image
from tqdm.auto import tqdm

from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset, DatasetError, Example, UnreadableImage, digest_of_file, open_image
from dalleflamingo.decoding import PAPER_SAMPLING, Strategy
from dalleflamingo.generator import Generator
from dalleflamingo.profiles import Profile
from dalleflamingo.runs import SOURCE, RunFolder, derive_seed, hold, printable
from dalleflamingo.settings import Count, GuidanceScale, Seed, check
from dalleflamingo.similarity import Similarity

_SOURCE = {"image_id": pa.int64(), "file": pa.string(), "digest": pa.string(), "domain": pa.string()}
_CANDIDATE = _SOURCE | {"candidate": pa.int64(), "seed": pa.int64()}


class Source(NamedTuple):
    """What a journey starts from: an example, its content, and a digest of the content."""

    example: Example
    digest: str
    content: Image | str

    @property
    def key(self) -> tuple[int, str]:
        """Image id and digest, by which rows and scores are found again."""
        return self.example.image_id, self.digest


@dataclass(frozen=True)
class JourneySettings:
    """How many candidates a journey makes, and how their images are generated.

    Attributes:
        candidates: K captions of each image, or N images of each caption.
        steps: denoising steps of the generator.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        seed: with image id and number of the candidate, it determines all random numbers of a candidate.
        batch_size: images generated at once; bounded by memory, without influence on any candidate.
    Raises:
        ValueError: as `settings.check`.
    """

    candidates: Count
    steps: Count
    guidance_scale: GuidanceScale
    seed: Seed = 0
    batch_size: Count = 16

    def __post_init__(self):
        check(self)

    @classmethod
    def of(cls, profile: Profile, /, **changes: float) -> "JourneySettings":
        """The profile's settings, with `changes` to some of the fields."""
        fields = ("candidates", "steps", "guidance_scale", "batch_size")
        return cls(**{name: getattr(profile, name) for name in fields} | changes)


@dataclass(frozen=True)
class Journey:
    """A way there and back. A subclass says what its source is, and how candidates are made of it."""

    name: ClassVar[str]
    columns: ClassVar[dict[str, pa.DataType]]  # of its table, before those of the similarities

    captioner: Captioner
    generator: Generator
    similarities: Sequence[Similarity]
    settings: JourneySettings

    def __post_init__(self):
        names = [similarity.name for similarity in self.similarities]
        if len(self.columns | dict.fromkeys(names)) < len(self.columns) + len(names):
            raise ValueError(f"similarities named {names}: give names that differ, and none of {list(self.columns)}")

    def identity(self) -> dict[str, object]:
        """All that a candidate depends on but the data set: so neither the batch size nor the similarities."""
        models = {"captioner": self.captioner.fingerprint(), "generator": self.generator.fingerprint()}
        settings = {name: value for name, value in vars(self.settings).items() if name != "batch_size"}
        return {"journey": self.name} | models | settings

    def open_source(self, dataset: Dataset, example: Example) -> Image | str:
        """What the journey starts from. Raises DatasetError where the example has none."""
        raise NotImplementedError

    def digest(self, example: Example) -> str:
        """Of the content that the journey starts from; errors as `open_source`."""
        raise NotImplementedError

    def make(self, sources: list[Source], run: RunFolder, bar: tqdm) -> list[dict]:
        """The B · K rows of B sources; the generated images are saved in the run folder."""
        raise NotImplementedError

    def reconstruction(self, row: Mapping, run: RunFolder) -> Image | str:
        """What the similarities compare with the source, of one row that was made: the generated image."""
        try:
            return open_image(run.folder / row["image"])
        except UnreadableImage as error:
            again = "delete it, and the same call makes it again"
            raise UnreadableImage(error.path, error.reason, again) from error

    def seeds(self, sources: Sequence[Source]) -> list[list[int]]:
        """(B, K): a seed for each candidate of B sources."""
        seed, candidates = self.settings.seed, range(self.settings.candidates)
        return [[derive_seed(seed, source.example.image_id, k) for k in candidates] for source in sources]

    def render(self, captions: Sequence[str], seeds: Sequence[int], bar: tqdm) -> list[Image]:
        """One generated image for each caption and seed; the bar shows how many there are."""
        done = 0

        def show(count: int) -> None:
            nonlocal done
            done += count
            bar.set_postfix_str(f"{done} of {len(captions)} images generated")

        how = self.settings
        return self.generator.render(captions, seeds, how.steps, how.guidance_scale, how.batch_size, show)

    def rows(self, sources: list[Source], images: list[Image], run: RunFolder, **columns: Sequence) -> list[dict]:
        """The B · K rows of B sources, each of `columns` with B · K values; the images are saved."""
        columns |= {"seed": list(chain.from_iterable(self.seeds(sources)))}
        candidates, rows = [(source, k) for source in sources for k in range(self.settings.candidates)], []
        for ((example, digest, _), k), image, *values in zip(candidates, images, *columns.values(), strict=True):
            row = {"image_id": example.image_id, "file": printable(example.path.name), "digest": digest}
            row |= {"domain": example.domain, "candidate": k}
            row["image"] = run.save_image(f"{example.image_id:012d}-{digest}-{k:02d}", image)
            rows.append(row | dict(zip(columns, values, strict=True)))
        return rows

    def compare(self, similarity: Similarity, sources: list, rows: list[list[dict]], run: RunFolder) -> list[float]:
        """How like its source what each row gives back is: B · K numbers, for B sources with K rows each."""
        kind = Journey if getattr(similarity, "of_images", False) else type(self)  # a checker judges images alone
        found = similarity.compare(sources, [[kind.reconstruction(self, row, run) for row in own] for own in rows])
        if found.shape != (len(sources), self.settings.candidates):
            raise ValueError(
                f"similarity {similarity.name!r} gave {tuple(found.shape)} numbers for {len(sources)} sources with "
                f"{self.settings.candidates} candidates each: expected one row per source, one number per candidate"
            )
        return found.flatten().tolist()


@dataclass(frozen=True)
class ImageTextImage(Journey):
    """K captions of an image and an image generated from each, compared with the first one."""

    strategy: Strategy = PAPER_SAMPLING
    shared_noise: bool = True

    name = "image → text → image"
    columns = _CANDIDATE | {"noise_seed": pa.int64(), "caption": pa.string(), "image": pa.string()}

    def identity(self) -> dict[str, object]:
        return super().identity() | {"strategy": repr(self.strategy), "shared_noise": self.shared_noise}

    def open_source(self, dataset: Dataset, example: Example) -> Image:
        return dataset.open(example)

    def digest(self, example: Example) -> str:
        return digest_of_file(example.path)

    def make(self, sources: list[Source], run: RunFolder, bar: tqdm) -> list[dict]:
        seeds = self.seeds(sources)  # (B, K)
        bar.set_postfix_str("captions")
        sampled = self.captioner.sample([source.content for source in sources], seeds, self.strategy)
        captions = list(chain.from_iterable(sampled))
        noise_seeds = [row[0] if self.shared_noise else seed for row in seeds for seed in row]
        images = self.render(captions, noise_seeds, bar)
        return self.rows(sources, images, run, noise_seed=noise_seeds, caption=captions)


@dataclass(frozen=True)
class TextImageText(Journey):
    """N images generated from a caption and a description of each, compared with the caption."""

    name = "text → image → text"
    columns = _CANDIDATE | {"caption": pa.string(), "image": pa.string(), "recovered": pa.string()}

    def open_source(self, dataset: Dataset, example: Example) -> str:
        """One of the example's captions, sampled by the journey's seed (§3.2)."""
        if not example.path.is_file():  # generated images are compared with the real one later
            raise UnreadableImage(example.path, "there is no such file", "fetch it, or leave the example out")
        caption = example.sample_reference(self.settings.seed)
        try:
            self.generator.check_caption(caption)
        except ValueError as error:
            raise DatasetError(f'cannot read the caption "{caption[:40]}": {error}, or leave it out') from error
        return caption

    def digest(self, example: Example) -> str:
        caption = example.sample_reference(self.settings.seed).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(caption, digest_size=8).hexdigest()

    def make(self, sources: list[Source], run: RunFolder, bar: tqdm) -> list[dict]:
        captions = [source.content for source in sources for _ in range(self.settings.candidates)]
        images = self.render(captions, list(chain.from_iterable(self.seeds(sources))), bar)
        bar.set_postfix_str("descriptions")
        size = self.settings.batch_size
        batches = [images[start : start + size] for start in range(0, len(images), size)]
        recovered = list(chain.from_iterable(map(self.captioner.describe, batches)))
        return self.rows(sources, images, run, caption=captions, recovered=recovered)

    def reconstruction(self, row: Mapping, run: RunFolder) -> str:
        return row["recovered"]


def image_text_image(
    dataset: Dataset,
    captioner: Captioner,
    generator: Generator,
    similarities: Sequence[Similarity],
    run_folder: str | Path,
    settings: JourneySettings,
    *,
    strategy: Strategy = PAPER_SAMPLING,
    shared_noise: bool = True,
    chunk: int = 8,
) -> pd.DataFrame:
    """Caption every image K times, generate an image from every caption, and measure how much of the image came back.

    A candidate depends on the models, the settings, its image and its number, and on nothing else in the data set. So a
    run that was killed goes on when called again and ends with the same table, and a run over more images of the same
    data set reuses those that are there. An image is known by its id and its content: one that was replaced is
    captioned anew.

    Args:
        dataset: the images.
        captioner: writes the captions.
        generator: makes an image of each.
        similarities: of two images; each becomes a column under its name. Others than before, or retrained ones, score
            the candidates that are kept, and nothing is generated again.
        run_folder: laid out as in `runs`; its candidates.parquet is the returned table.
        settings: K and how images are generated.
        strategy: how captions are sampled.
        shared_noise: the images generated for one source start from the same noise, so that only their captions differ,
            and equal captions are rendered once; False: each has its own.
        chunk: images finished together: at most so many are lost when the run is killed.
    Returns:
        one row for each image × candidate, in the order of the data set:
            image_id; file, its name (control characters are escaped); digest, of its content;
            domain (None outside NoCaps); candidate, 0 … K − 1;
            seed, of the caption's sampling; noise_seed, of the generated image; caption;
            image, the generated PNG relative to run_folder; each similarity, higher is more alike.
        `.attrs`: "run_folder", and "skipped": the unreadable images as {"image_id", "path", "reason"}.
    Raises:
        RunFolderError: run_folder was made with other settings or other models, another process is at work there, or
            it cannot be created or written to.
        DatasetError: not one image could be read.
        ValueError: the similarities' names are not usable as columns, or one gives a wrong number of values.
    """
    journey = ImageTextImage(captioner, generator, similarities, settings, strategy, shared_noise)
    return run_journey(journey, dataset, run_folder, chunk)


def text_image_text(
    dataset: Dataset,
    captioner: Captioner,
    generator: Generator,
    similarities: Sequence[Similarity],
    run_folder: str | Path,
    settings: JourneySettings,
    *,
    chunk: int = 8,
) -> pd.DataFrame:
    """Generate N images from a caption of every image, describe each, and measure how much of the caption came back.

    The caption is one of the image's, sampled by `settings.seed`. Errors are those of `image_text_image`.

    Args:
        dataset: of images with captions; `read_captions` makes one of your own texts.
        captioner: describes the generated images, by beam search.
        generator: makes N images of each caption.
        similarities: of two texts; else as in `image_text_image`.
        run_folder: as in `image_text_image`.
        settings: N and how images are generated.
        chunk: as in `image_text_image`.
    Returns:
        one row for each image × candidate, in the order of the data set:
            image_id; file; digest, of the caption; domain; candidate, 0 … N − 1; seed, of the generated image;
            caption, the source; image, as in `image_text_image`; recovered, its description; each similarity.
        `.attrs`: "run_folder", and "skipped": examples without a caption, or with one that the generator cannot read
            as a whole, as {"image_id", "path", "reason"}.
    """
    return run_journey(TextImageText(captioner, generator, similarities, settings), dataset, run_folder, chunk)


def run_journey(journey: Journey, dataset: Dataset, run_folder: str | Path, chunk: int) -> pd.DataFrame:
    """Make the rows of every example that can be opened, `chunk` of them at a time; rows that are there are reused.

    Arguments, result and errors are those of `image_text_image`.
    """
    with hold(run_folder):
        return _run_journey(journey, dataset, run_folder, chunk)


def _run_journey(journey: Journey, dataset: Dataset, run_folder: str | Path, chunk: int) -> pd.DataFrame:
    began = time.monotonic()
    run = RunFolder(run_folder, {"dataset": dataset.name} | journey.identity(), pa.schema(journey.columns))
    # the fingerprint keeps the scores of a retrained model of the same name apart
    keys = {similarity.name: f"{similarity.name} {similarity.fingerprint()}" for similarity in journey.similarities}
    kept = run.rows().groupby(SOURCE)
    found = {name: run.scores(key) for name, key in keys.items()}
    scored = {name: set(zip(scores.image_id, scores.digest, strict=True)) for name, scores in found.items()}
    finished = _finished(journey, dataset, set(kept.groups).intersection(*scored.values()))
    current = dict(finished)  # image id -> digest of what the table is of
    skipped: list[dict] = []
    with tqdm(total=len(dataset), initial=len(finished), desc=journey.name, unit="image") as bar:
        try:
            for start in range(0, len(dataset), chunk):
                pending = [example for example in dataset[start : start + chunk] if example.image_id not in finished]
                sources = _open_sources(journey, dataset, pending, skipped, bar)
                there = [source.key for source in sources if source.key in kept.groups]
                rows = {key: kept.get_group(key).to_dict("records") for key in there}
                if missing := [source for source in sources if source.key not in rows]:
                    made = journey.make(missing, run, bar)
                    run.add(made)
                    for row in made:
                        rows.setdefault(tuple(row[name] for name in SOURCE), []).append(row)
                bar.set_postfix_str("similarities")
                for similarity in journey.similarities:
                    if unscored := [source for source in sources if source.key not in scored[similarity.name]]:
                        own = [rows[source.key] for source in unscored]
                        values = journey.compare(similarity, [source.content for source in unscored], own, run)
                        run.add_scores(keys[similarity.name], list(chain.from_iterable(own)), values)
                current |= dict(source.key for source in sources)
                bar.update(len(sources))
        except BaseException as error:
            how = "Interrupted" if isinstance(error, KeyboardInterrupt) else "Stopped"
            kept_in = f"{bar.n} of {len(dataset)} images are kept; the same call goes on in {printable(run.folder)}"
            bar.write(f"{how}: {kept_in}")
            raise
    table = _collect(run, dataset, current, keys, skipped)
    path, seconds = run.finish(table, skipped), time.monotonic() - began
    print(
        f"{len(table)} candidates of {len(dataset) - len(skipped)} images ({len(finished)} were there already, "
        f"{len(skipped)} skipped) in {seconds:.0f} s: {printable(path)}, images in {printable(run.folder / 'images')}"
    )
    table.attrs = {"run_folder": str(run.folder), "skipped": skipped}
    return table


def _finished(journey: Journey, dataset: Dataset, done: Collection[tuple[int, str]]) -> dict[int, str]:
    """Image id -> digest of the examples that are `done`, pairs of both; one that is gone since is as it was."""
    known, finished = defaultdict(set), {}
    for image_id, digest in done:
        known[image_id].add(digest)
    for example in tqdm([one for one in dataset if one.image_id in known], "finished before", leave=False):
        digests = known[example.image_id]
        with suppress(DatasetError):  # what cannot be read now is opened later, and skipped by name
            is_there = example.path.exists() or len(digests) > 1
            if (digest := journey.digest(example) if is_there else next(iter(digests))) in digests:
                finished[example.image_id] = digest
    return finished


def _open_sources(
    journey: Journey, dataset: Dataset, examples: list[Example], skipped: list[dict], bar: tqdm
) -> list[Source]:
    """The examples that can be opened; the others are named and noted in `skipped`."""
    sources = []
    for example in examples:
        try:  # the digest first: a file that is replaced in between is then made again, never taken for the new one
            sources.append(Source(example, journey.digest(example), journey.open_source(dataset, example)))
        except DatasetError as error:
            skipped.append({"image_id": example.image_id, "path": str(example.path), "reason": str(error)})
            bar.write(printable(f"Skipped image {example.image_id}: {error}"))
    return sources


def _collect(
    run: RunFolder, dataset: Dataset, current: Mapping[int, str], keys: Mapping[str, str], skipped: list[dict]
) -> pd.DataFrame:
    """The candidates of the `current` contents, in the order of the data set, with a column for each of `keys`."""
    order, rows = {example.image_id: i for i, example in enumerate(dataset)}, run.rows()
    rows = rows[rows.digest == rows.image_id.map(current)].sort_values("candidate")
    table = rows.sort_values("image_id", key=lambda ids: ids.map(order), kind="stable", ignore_index=True)
    if table.empty:
        reason = skipped[0]["reason"] if skipped else f"the data set {dataset.name} is empty"
        raise DatasetError(f"not one of {len(dataset)} images could be read; the first: {reason}")
    for name, key in keys.items():
        scores = run.scores(key).rename(columns={"score": name})
        table = table.merge(scores, how="left", on=[*SOURCE, "candidate"])
    return table


def rank(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """The table with a column `rank`: for each image 1 has the highest value in `by`, of equals the first in the table.

    Args:
        table: of candidates, as a journey returns it.
        by: a column, such as a similarity.
    Raises:
        KeyError: there is no such column.
        ValueError: it holds NaN.
    """
    if by not in table:
        raise KeyError(f"no column {by!r} to rank by; the table has {', '.join(table.columns)}")
    if table[by].isna().any():
        raise ValueError(f"column {by!r} holds {int(table[by].isna().sum())} NaN: such candidates have no rank")
    return table.assign(rank=table.groupby("image_id")[by].rank(method="first", ascending=False).astype(int))


def select(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """The candidate ranked first for each image, in the order of the table; arguments and errors as `rank`."""
    return rank(table, by).query("rank == 1").drop(columns="rank").reset_index(drop=True)
