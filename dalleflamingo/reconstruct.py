"""Image → text → image and text → image → text (§3.1): what comes back tells which candidate was best.

Each image gets K captions (the paper: K = 10 by nucleus sampling, p = 0.9), each caption one picture, and each picture
a similarity to the image it should give back. The similarity ranks the captions; Insight I says that the caption ranked
first is the better one. The other way round each caption gets N pictures, each picture one description by beam search,
and the similarity of description and caption ranks the pictures (Insight II).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from PIL.Image import Image
from torch import Tensor

from dalleflamingo import profiles, registry
from dalleflamingo.captioner import PAPER, Captioner
from dalleflamingo.datasets import Dataset, read_captions, read_folder
from dalleflamingo.decoding import Strategy
from dalleflamingo.generator import Generator
from dalleflamingo.intervals import derive_seed
from dalleflamingo.ngrams import Cider
from dalleflamingo.similarity import ClipImage, Dino, Similarity
from dalleflamingo.text_similarity import CiderOverlap, ClipText, Sbert, WordMovers
from dalleflamingo.trips import ImageTrip, TextTrip, travel
from dalleflamingo.word_movers import WordVectors


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
    return travel(ImageTrip(*models, strategy, shared_noise), dataset, run_folder, chunk)


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
    return travel(TextTrip(*models), dataset, run_folder, chunk)


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


def load_text_similarities(profile: profiles.Profile, corpus: Mapping[int, Sequence[str]]) -> list[Similarity]:
    """CLIP's text encoder, SBERT, CIDEr and WMD. Errors as `registry.locate`.

    Args:
        corpus: image id -> captions; says how rare an n-gram is, for CIDEr.
    """
    return [
        ClipText.from_pretrained(**source_of(profile, profile.clip)),
        Sbert.from_pretrained(**source_of(profile, "sbert")),
        CiderOverlap(Cider(corpus)),
        WordMovers(WordVectors.at_hand()),
    ]


def source_of(profile: profiles.Profile, name: str) -> dict:
    """A registry name as arguments of `from_pretrained`: where it is, its revision, the profile's device."""
    return dict(name_or_path=registry.locate(name), revision=registry.ENTRIES[name].revision, device=profile.device)


def main(arguments: list[str] | None = None) -> int:
    """One's own pictures (a folder) or captions (a file, one a line) there and back, with the profile's models."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo.reconstruct", description=main.__doc__)
    parser.add_argument("source", type=Path, help="a folder of pictures, or a text file of captions")
    parser.add_argument("--out", type=Path, required=True, help="run folder; an interrupted run goes on in its own")
    parser.add_argument("--scheduler", help="that draws, DPMSolverMultistep for example; default: the profile's")
    parser.add_argument("--steps", type=int, help="of drawing; default: the profile's")
    options = parser.parse_args(arguments)
    try:
        profile = profiles.current()
        settings = dict(
            candidates=profile.candidates,
            steps=profile.steps if options.steps is None else options.steps,
            guidance_scale=profile.guidance_scale,
            batch_size=profile.batch_size,
        )
        is_text = options.source.suffix.lower() == ".txt" or options.source.is_file()
        source = read_captions(options.source) if is_text else read_folder(options.source)
        captioner, generator, similarities = load_models(profile, options.scheduler)
        if is_text:
            similarities = load_text_similarities(profile, {text.image_id: text.references for text in source})
            text_image_text(source, captioner, generator, similarities, options.out, **settings)
        else:
            image_text_image(source, captioner, generator, similarities, options.out, **settings)
    except (ValueError, FileNotFoundError, registry.RegistryError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
