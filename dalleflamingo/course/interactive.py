"""Figures that a reader can touch without a kernel or a network, in a notebook's output and on the exported pages.

The images are made when the cell runs, and all of them are in the figure, each with words for readers who cannot see
it. A small script shows the one that the sliders name, or sorts the cards; it is in `interactive.html` with the rest of
the figures' HTML. Everything that a model wrote is escaped.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import jinja2
import pandas as pd
from IPython.display import HTML
from PIL import Image

from dalleflamingo.course.show import label
from dalleflamingo.datasets import Example, open_image, to_rgb
from dalleflamingo.reconstruct import rank

_SMALL = 128  # images up to this side keep all their pixels, which are shown as squares
_SIDE = 256  # the longest side of the others
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)


@dataclass(frozen=True)
class Picture:
    """An image of a figure.

    Attributes:
        image: of any size.
        alt: the words for readers who cannot see it.
        heading: above the image.
    """

    image: Image.Image
    alt: str
    heading: str = ""

    @property
    def is_small(self) -> bool:
        """Whether its pixels are shown as squares."""
        return max(self.image.size) <= _SMALL

    @property
    def source(self) -> str:
        """The image as a data URI: a PNG where it is small, else a JPEG of at most `_SIDE` pixels."""
        file, image = BytesIO(), to_rgb(self.image)
        if self.is_small:
            image.save(file, "png", optimize=True)
        else:
            image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
            image.save(file, "jpeg", quality=85)
        return f"data:image/{'png' if self.is_small else 'jpeg'};base64,{b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True)
class Frame:
    """What a figure shows at one position of its sliders.

    Attributes:
        pictures: side by side.
        says: the sentence below them, which a screen reader reads aloud.
    """

    pictures: tuple[Picture, ...]
    says: str


@dataclass(frozen=True)
class Control:
    """A slider.

    Attributes:
        name: what it sets.
        labels: its values from left to right, as the reader sees them.
        start: the position that it begins at.
    """

    name: str
    labels: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class Candidate:
    """A card of a caption.

    Attributes:
        caption: as the captioner wrote it.
        picture: the image generated from it.
        scores: by name.
        ranks: by each of the scores, where the reader can choose one.
    """

    caption: str
    picture: Picture
    scores: Mapping[str, float]
    ranks: tuple[int, ...] = ()


def render(macro: str, *values: object) -> str:
    """HTML from `interactive.html`, where everything is escaped.

    Args:
        macro: its name in that file.
        values: its arguments.
    """
    return str(getattr(_ENVIRONMENT.get_template("interactive.html").module, macro)(*values))


def guidance_and_step(guesses: Mapping[float, Sequence[Image.Image]], timesteps: Sequence[int], caption: str) -> HTML:
    """Two sliders, guidance scale and denoising step; the image is x̂, the generator's guess, at that step.

    Args:
        guesses: guidance scale -> the decoded guesses from the first step to the last.
        timesteps: of the steps, T of them.
        caption: that the images are generated from.
    Raises:
        ValueError: a scale does not have T guesses.
    """
    for scale, images in guesses.items():
        _check_length(f"guesses at scale {scale:g}", images, "timesteps", timesteps)
    scales, count = tuple(f"{scale:g}" for scale in guesses), len(timesteps)
    controls = (
        Control("guidance scale", scales, len(scales) // 2),
        Control("step", tuple(f"{step} of {count}" for step in range(1, count + 1)), count - 1),
    )
    frames = {}
    for i, (scale, images) in enumerate(zip(scales, guesses.values(), strict=True)):
        for step, (image, t) in enumerate(zip(images, timesteps, strict=True)):
            says = f"Guidance scale {scale}, step {step + 1} of {count} (t = {t})."
            frames[i, step] = Frame((Picture(image, f"The guess at the image. {says}"),), says)
    return _sliders(controls, frames, f"The generator's guess at the image during sampling, for “{caption}”.")


def guess_by_timestep(
    timesteps: Sequence[int], noised: Sequence[Image.Image], guesses: Sequence[Image.Image], captions: Sequence[str]
) -> HTML:
    """A slider over t: the noised latents, the guess x̂ from them, and what the captioner writes about the guess.

    Args:
        timesteps: T of them, ascending.
        noised: T decoded z_t.
        guesses: T images x̂.
        captions: T captions of the guesses.
    Raises:
        ValueError: there are not T of each.
    """
    for name, values in (("noised images", noised), ("guesses", guesses), ("captions", captions)):
        _check_length(name, values, "timesteps", timesteps)
    frames = {}
    for i, (t, before, guess, caption) in enumerate(zip(timesteps, noised, guesses, captions, strict=True)):
        pictures = (
            Picture(before, f"The noised latents at t = {t}, decoded.", "noised latents, decoded"),
            Picture(guess, f"The guess from t = {t}, described as: {caption}", "the guess x̂"),
        )
        frames[i,] = Frame(pictures, f"The captioner about the guess: “{caption}”")
    control = Control("timestep t", tuple(map(str, timesteps)), 0)
    return _sliders(
        (control,), frames, "Noised latents, the guess from them, and the captioner's words about the guess."
    )


def share_of_word(shares: Sequence[float], images: Sequence[Image.Image], words: tuple[str, str], caption: str) -> HTML:
    """A slider that moves probability from one word of a soft caption to another.

    Args:
        shares: S probabilities of the second word; the first word has the rest.
        images: S images generated from the soft captions.
        words: the two.
        caption: with the first word.
    Raises:
        ValueError: there are not S images, or a share is no probability.
    """
    _check_length("images", images, "shares", shares)
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share of {wrong[0]}: a probability lies from 0 to 1")
    first, second = words
    frames = {}
    for i, (share, image) in enumerate(zip(shares, images, strict=True)):
        says = f"{first} {1 - share:.0%}, {second} {share:.0%}"
        frames[i,] = Frame((Picture(image, f"Generated from “{caption}” with {says}."),), f"{says}.")
    control = Control(f"probability of {second}", tuple(f"{share:.0%}" for share in shares), 0)
    note = f"“{caption}”, with probability moved from “{first}” to “{second}”; the noise stays the same."
    return _sliders((control,), frames, note)


def ranking(example: Example, table: pd.DataFrame, run_folder: str | Path, by: Sequence[str]) -> HTML:
    """An image and its candidates as cards, which a menu sorts by one score or another.

    Args:
        example: the input image.
        table: a candidate table of `reconstruct.image_text_image`, perhaps with scores of its captions.
        run_folder: where the table's image paths start.
        by: the columns in the menu, higher is better; the cards begin in the order of the first.
    Raises:
        KeyError: the table has no such column.
        ValueError: it has no row of this image, or as `reconstruct.rank`.
    """
    own = table[table["image_id"] == example.image_id]
    if own.empty:
        raise ValueError(f"the table has no row of image {example.image_id}: is it of another run or data set?")
    ranks = pd.DataFrame({name: rank(own, name)["rank"] for name in by})
    candidates = [
        Candidate(
            row["caption"],
            Picture(open_image(Path(run_folder) / row["image"]), f"Generated from: {row['caption']}"),
            {label(name): float(row[name]) for name in by},
            tuple(int(ranks.loc[index, name]) for name in by),
        )
        for index, row in own.loc[ranks[by[0]].sort_values().index].iterrows()
    ]
    words = f" A person describes it as: {example.references[0]}" if example.references else ""
    source = Picture(open_image(example.path), f"The input image.{words}", "the input image")
    note = "One input image, and its captions with the image generated from each. Higher scores are better."
    return HTML(render("ranking", source, candidates, note))


def _sliders(controls: Sequence[Control], frames: Mapping[tuple[int, ...], Frame], note: str) -> HTML:
    start = tuple(control.start for control in controls)
    return HTML(render("sliders", controls, frames, start, note))


def _check_length(name: str, values: Sequence, other: str, expected: Sequence) -> None:
    if len(values) != len(expected):
        raise ValueError(f"{len(values)} {name} for {len(expected)} {other}: there must be one for each")
