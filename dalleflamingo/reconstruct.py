"""Image → text → image and text → image → text (§3.1): what comes back tells which candidate was best.

The captioner writes K captions of an image x (the paper: K = 10 by nucleus sampling, p = 0.9), the generator makes an
image of each, and a similarity compares these with x. Insight I: the caption whose image is most like x is the best
caption. The other way round, the generator makes N images of a caption w, the captioner describes each by beam search,
and a similarity compares the descriptions with w. Insight II: the image whose description is most like w is the best
image.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import pandas as pd
import pyarrow as pa
from PIL.Image import Image
from tqdm.auto import tqdm

from dalleflamingo import registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset, DatasetError, Example, UnreadableImage, open_image
from dalleflamingo.decoding import PAPER_SAMPLING, Strategy
from dalleflamingo.generator import Generator
from dalleflamingo.profiles import Profile
from dalleflamingo.runs import RunFolder, derive_seed, hold
from dalleflamingo.settings import Count, GuidanceScale, Seed, check
from dalleflamingo.similarity import ClipImage, Dino, Similarity

_CANDIDATE = {"image_id": pa.int64(), "domain": pa.string(), "candidate": pa.int64(), "seed": pa.int64()}


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
    def of(cls, profile: Profile, **changes: float) -> "JourneySettings":
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

    def make(self, examples: list[Example], sources: list, run: RunFolder, bar: tqdm) -> list[dict]:
        """The B · K rows of B examples and their sources; the generated images are saved in the run folder."""
        raise NotImplementedError

    def reconstruction(self, row: Mapping, run: RunFolder) -> Image | str:
        """What the similarities compare with the source, of one row that was made."""
        raise NotImplementedError

    def seeds(self, examples: Sequence[Example]) -> list[list[int]]:
        """(B, K): a seed for each candidate of B examples."""
        seed, candidates = self.settings.seed, range(self.settings.candidates)
        return [[derive_seed(seed, example.image_id, k) for k in candidates] for example in examples]

    def render(self, captions: Sequence[str], seeds: Sequence[int], bar: tqdm) -> list[Image]:
        """One generated image for each caption and seed; the bar shows how many there are."""
        done = 0

        def show(count: int) -> None:
            nonlocal done
            done += count
            bar.set_postfix_str(f"{done} of {len(captions)} images generated")

        how = self.settings
        return self.generator.render(captions, seeds, how.steps, how.guidance_scale, how.batch_size, show)

    def rows(self, examples: list[Example], images: list[Image], run: RunFolder, **columns: Sequence) -> list[dict]:
        """The B · K rows of B examples, each of `columns` with B · K values; the images are saved."""
        columns |= {"seed": list(chain.from_iterable(self.seeds(examples)))}
        candidates, rows = [(example, k) for example in examples for k in range(self.settings.candidates)], []
        for (example, k), image, *values in zip(candidates, images, *columns.values(), strict=True):
            row = {"image_id": example.image_id, "domain": example.domain, "candidate": k}
            row["image"] = run.save_image(f"{example.image_id:012d}-{k:02d}", image)
            rows.append(row | dict(zip(columns, values, strict=True)))
        return rows

    def compare(self, similarity: Similarity, sources: list, rows: list[list[dict]], run: RunFolder) -> list[float]:
        """How like its source what each row gives back is: B · K numbers, for B sources with K rows each."""
        found = similarity.compare(sources, [[self.reconstruction(row, run) for row in own] for own in rows])
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

    def make(self, examples: list[Example], sources: list[Image], run: RunFolder, bar: tqdm) -> list[dict]:
        seeds = self.seeds(examples)  # (B, K)
        bar.set_postfix_str("captions")
        captions = list(chain.from_iterable(self.captioner.sample(sources, seeds, self.strategy)))
        noise_seeds = [row[0] if self.shared_noise else seed for row in seeds for seed in row]
        images = self.render(captions, noise_seeds, bar)
        return self.rows(examples, images, run, noise_seed=noise_seeds, caption=captions)

    def reconstruction(self, row: Mapping, run: RunFolder) -> Image:
        try:
            return open_image(run.folder / row["image"])
        except UnreadableImage as error:
            again = "delete it, and the same call makes it again"
            raise UnreadableImage(error.path, error.reason, again) from error


@dataclass(frozen=True)
class TextImageText(Journey):
    """N images generated from a caption and a description of each, compared with the caption."""

    name = "text → image → text"
    columns = _CANDIDATE | {"caption": pa.string(), "image": pa.string(), "recovered": pa.string()}

    def open_source(self, dataset: Dataset, example: Example) -> str:
        """One of the example's captions, sampled by the journey's seed (§3.2)."""
        if not example.path.is_file():  # generated images are compared with the real one later
            raise UnreadableImage(example.path, "there is no such file", "fetch it, or leave the example out")
        return example.sample_reference(self.settings.seed)

    def make(self, examples: list[Example], sources: list[str], run: RunFolder, bar: tqdm) -> list[dict]:
        captions = [source for source in sources for _ in range(self.settings.candidates)]
        images = self.render(captions, list(chain.from_iterable(self.seeds(examples))), bar)
        bar.set_postfix_str("descriptions")
        size = self.settings.batch_size
        batches = [images[start : start + size] for start in range(0, len(images), size)]
        recovered = list(chain.from_iterable(map(self.captioner.describe, batches)))
        return self.rows(examples, images, run, caption=captions, recovered=recovered)

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
    data set reuses those that are there. An image that changes under the same image id goes unnoticed.

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
            image_id; domain (None outside NoCaps); candidate, 0 … K − 1;
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
        dataset: of images with captions; `datasets.read_captions` makes one of your own texts.
        captioner: describes the generated images, by beam search.
        generator: makes N images of each caption.
        similarities: of two texts; else as in `image_text_image`.
        run_folder: as in `image_text_image`.
        settings: N and how images are generated.
        chunk: as in `image_text_image`.
    Returns:
        one row for each image × candidate, in the order of the data set:
            image_id; domain; candidate, 0 … N − 1; seed, of the generated image; caption, the source;
            image, the generated PNG relative to run_folder; recovered, its description; each similarity.
        `.attrs`: "run_folder", and "skipped": examples without a caption as {"image_id", "path", "reason"}.
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
    kept = run.rows().groupby("image_id")
    scored = {name: set(run.scores(key).image_id) for name, key in keys.items()}
    finished = {example.image_id for example in dataset}.intersection(kept.groups, *scored.values())
    skipped: list[dict] = []
    with tqdm(total=len(dataset), initial=len(finished), desc=journey.name, unit="image") as bar:
        try:
            for start in range(0, len(dataset), chunk):
                pending = [example for example in dataset[start : start + chunk] if example.image_id not in finished]
                sources = _open_sources(journey, dataset, pending, skipped, bar)
                rows = {i: kept.get_group(i).to_dict("records") for i in sources if i in kept.groups}
                if missing := [example for example in pending if example.image_id in sources.keys() - rows]:
                    made = journey.make(missing, [sources[example.image_id] for example in missing], run, bar)
                    run.add(made)
                    for row in made:
                        rows.setdefault(row["image_id"], []).append(row)
                bar.set_postfix_str("similarities")
                for similarity in journey.similarities:
                    if ids := [i for i in sources if i not in scored[similarity.name]]:
                        own = [rows[i] for i in ids]
                        values = journey.compare(similarity, [sources[i] for i in ids], own, run)
                        run.add_scores(keys[similarity.name], list(chain.from_iterable(own)), values)
                bar.update(len(sources))
        except BaseException as error:
            how = "Interrupted" if isinstance(error, KeyboardInterrupt) else "Stopped"
            bar.write(f"{how}: {bar.n} of {len(dataset)} images are kept; the same call goes on in {run.folder}")
            raise
    table = _collect(run, dataset, keys, skipped)
    path, seconds = run.finish(table, skipped), time.monotonic() - began
    print(
        f"{len(table)} candidates of {len(dataset) - len(skipped)} images ({len(finished)} were there already, "
        f"{len(skipped)} skipped) in {seconds:.0f} s: {path}, images in {run.folder / 'images'}"
    )
    table.attrs = {"run_folder": str(run.folder), "skipped": skipped}
    return table


def _open_sources(journey: Journey, dataset: Dataset, examples: list[Example], skipped: list[dict], bar: tqdm) -> dict:
    """Image id -> source of the examples that can be opened; the others are named and noted in `skipped`."""
    sources = {}
    for example in examples:
        try:
            sources[example.image_id] = journey.open_source(dataset, example)
        except DatasetError as error:
            skipped.append({"image_id": example.image_id, "path": str(example.path), "reason": str(error)})
            bar.write(f"Skipped image {example.image_id}: {error}")
    return sources


def _collect(run: RunFolder, dataset: Dataset, keys: Mapping[str, str], skipped: list[dict]) -> pd.DataFrame:
    """The candidate table, in the order of the data set, with a column for each similarity of `keys`."""
    lost = [image["image_id"] for image in skipped]  # a kept candidate whose source is gone has no new scores
    order = {example.image_id: i for i, example in enumerate(dataset) if example.image_id not in lost}
    rows = run.rows().sort_values("candidate").query("image_id in @order")
    table = rows.sort_values("image_id", key=lambda ids: ids.map(order), kind="stable", ignore_index=True)
    if table.empty:
        reason = skipped[0]["reason"] if skipped else f"the data set {dataset.name} is empty"
        raise DatasetError(f"not one of {len(dataset)} images could be read; the first: {reason}")
    for name, key in keys.items():
        scores = run.scores(key).rename(columns={"score": name})
        table = table.merge(scores, how="left", on=["image_id", "candidate"])
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


class Models(NamedTuple):
    """What image → text → image needs: `image_text_image(dataset, *load_models(profile), run_folder, settings)`."""

    captioner: Captioner
    generator: Generator
    similarities: list[Similarity]


def load_models(profile: Profile, scheduler: str | None = None) -> Models:
    """The profile's captioner and generator, with CLIP and DINO; arguments and errors are those of `load_generator`."""
    similarities = [
        ClipImage.from_pretrained(**registry.source_of(profile.clip, profile.device)),
        Dino.from_pretrained(**registry.source_of(profile.dino, profile.device), image_size=profile.dino_size),
    ]
    return Models(load_captioner(profile), load_generator(profile, scheduler=scheduler), similarities)


def load_captioner(profile: Profile, name: str | None = None) -> Captioner:
    """A captioner by its name in the registry (None: the profile's), for the profile's device; errors as `locate`."""
    source = registry.source_of(profile.captioner if name is None else name, profile.device)
    return Captioner.from_pretrained(**source, dtype=profile.torch_dtype)


def load_generator(profile: Profile, name: str | None = None, scheduler: str | None = None) -> Generator:
    """A generator by its name in the registry, for the profile's device.

    Args:
        profile: says which generator and scheduler where none are named, and the type of the weights.
        name: in the registry; unknown names and missing weights are a RegistryError.
        scheduler: of diffusers, as `Generator.from_pretrained` takes it; one that does not fit is a ValueError.
    """
    name = profile.generator if name is None else name
    source = registry.source_of(name, profile.device) | {"dtype": profile.torch_dtype}
    if other := registry.class_of(name):  # not a diffusion model: it has no scheduler
        return other.from_pretrained(**source)
    scheduler = profile.scheduler if scheduler is None else scheduler
    return Generator.from_pretrained(**source, scheduler=scheduler, image_size=profile.image_size)
