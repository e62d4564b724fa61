"""Images with their reference captions.

COCO captions, Karpathy's splits, NoCaps and a user's own files all become a `Dataset` of `Example`s by the readers in
`dalleflamingo.sources`. Captions are kept as published: metrics tokenize them, training cleans them (`clean_caption`).
"""

import hashlib
import heapq
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from dalleflamingo.runs import derive_seed, printable

DOMAINS = ("in-domain", "near-domain", "out-domain")  # NoCaps: are the image's things among COCO's 80 classes?
_UPRIGHT = {  # EXIF's orientation -> what undoes it; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DatasetError(ValueError):
    """A file or folder is not what it should be; the message says what was found, what was expected and what to do."""


class UnreadableImage(DatasetError):
    """One image that cannot be opened: `path`, `reason` and `remedy`. A run may skip it and go on."""

    def __init__(self, path: Path, reason: str, remedy: str):
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"cannot read the image {printable(self.path)}: {self.reason}; {self.remedy}"


@dataclass(frozen=True)
class Example:
    """One image: `references` are its human captions, `extra` the rest of its record (a scene, a licence)."""

    image_id: int
    path: Path
    references: tuple[str, ...] = ()
    domain: str | None = None
    extra: dict = field(default_factory=dict, hash=False)

    def sample_reference(self, seed: int) -> str:
        """One of its captions, chosen at random (§3.1, Table 4), the same for the same `seed`.

        Raises:
            DatasetError: it has no caption.
        """
        if not self.references:
            raise DatasetError(f"image {self.image_id} has no caption to start from: give it one, or leave it out")
        return self.references[derive_seed(seed, "source", self.image_id) % len(self.references)]


@dataclass(frozen=True)
class Dataset(Sequence[Example]):
    """Named examples, in file order. A slice is a `Dataset` too.

    Raises:
        DatasetError: two examples share an image id, which is the key of every table of results.
    """

    name: str
    examples: tuple[Example, ...]

    def __post_init__(self):
        object.__setattr__(self, "examples", tuple(self.examples))
        distinct([example.image_id for example in self.examples], f"data set {self.name}", "image id")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return replace(self, examples=self.examples[index]) if isinstance(index, slice) else self.examples[index]

    def filter(self, image_ids: Collection[int]) -> "Dataset":
        """The examples whose ids are among `image_ids`, in file order; unknown ids are ignored."""
        return replace(self, examples=tuple(example for example in self.examples if example.image_id in image_ids))

    def subset(self, n: int, seed: int = 0) -> "Dataset":
        """`n` examples chosen by `seed`, in file order.

        The choice depends on the seed and the image ids only: it is the same on every machine, and for one seed a
        smaller subset lies inside a larger one, so that the images of `smoke` are among those of `mini`.

        Raises:
            DatasetError: `n` is below 1 or above the size.
        """
        if not 1 <= n <= len(self):
            raise DatasetError(f"a subset of {n} was asked of {self.name}: ask for 1 to {len(self)}, its size")
        chosen = heapq.nsmallest(n, self.examples, key=lambda one: derive_seed("subset", seed, one.image_id))
        return self.filter({example.image_id for example in chosen})

    def by_domain(self) -> dict[str, "Dataset"]:
        """{domain: its examples} for the domains that occur, in the order of `DOMAINS`; {} if there are none."""
        return {
            domain: replace(self, name=f"{self.name}/{domain}", examples=members)
            for domain in DOMAINS
            if (members := tuple(example for example in self.examples if example.domain == domain))
        }

    def open(self, example: Example) -> Image.Image:
        """The image of `example`; result and errors as `open_image`."""
        return open_image(example.path)


def open_image(path: Path) -> Image.Image:
    """Open an image file, of any suffix, as `to_rgb` gives it, turned upright by its EXIF tag.

    Raises:
        UnreadableImage: the file is missing, truncated or not an image, has more pixels than Pillow opens (twice
            `Image.MAX_IMAGE_PIXELS`), or `to_rgb` refuses it.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            image.load()  # before the metadata is read, so that a truncated image is not taken for damaged metadata
            turn = _turn(image)
            return to_rgb(image if turn is None else image.transpose(turn))
    except Exception as error:  # for broken files, decoders raise OSError, SyntaxError, ValueError, zlib.error and more
        raise unreadable(path, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as every model reads it: 8-bit RGB, with transparent pixels on white.

    Grey of 16 or 32 bits or in floats, whose files do not say what is white, becomes 8 bits by one rule: 0 is black,
    white the first of 255, 4,095 and 65,535 (8, 12, 16 bits; for floats 1 comes before them) that no value exceeds.

    Raises:
        ValueError: grey values that are negative, NaN or above 65,535, or a mode that Pillow does not convert.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def digest_of_file(path: Path) -> str:
    """16 hexadecimal digits that tell a file's content from others. Raises UnreadableImage where it is not readable."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=8)).hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UnreadableImage:
    """The error that says why an image could not be opened, with a remedy that fits."""
    if isinstance(error, FileNotFoundError):
        return UnreadableImage(path, "there is no such file", "download or draw it, or leave the example out")
    size = f"it has {os.path.getsize(path):,} bytes, and " if os.path.isfile(path) else ""
    remedy = "fetch or draw it again, save it as PNG or JPEG with 8 bits a channel, or leave the example out"
    if isinstance(error, Image.UnidentifiedImageError):
        return UnreadableImage(path, f"{size}Pillow knows no image format with such content", remedy)
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        remedy = "make it smaller (the models read a few hundred pixels a side), or leave the example out"
    return UnreadableImage(path, f"{size}{type(error).__name__} says: {error}", remedy)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright; None if it is upright, or its orientation cannot be read."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # not an EXIF block at all: its readers raise SyntaxError, struct.error and more
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey, of which Pillow would clip what is above 255, in 8 bits."""
    whites, values = (1, 255, 4095, 65_535)[image.mode != "F" :], np.asarray(image)
    low, high = values.min(), values.max()
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        raise ValueError(f"its grey values go from {low} to {high}, expected 0 to {' or '.join(map(str, whites))}")
    grey = (values.astype(np.float32) * (255 / white)).round().astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def clean_caption(caption: str) -> str:
    """A human caption as BLIP reads captions in finetuning (`pre_caption` in its data/utils.py, for COCO).

    Lower case; each of . ! " ( ) * # : ; ~ becomes a space, other punctuation stays; words are one space apart, and
    the first 30 are kept. Three in four captions of COCO end in a full stop that BLIP has never been taught.
    """
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()[:30])


def distinct(ids: list, where: str, what: str) -> set:
    """The ids as a set, checked to be distinct."""
    counts = Counter(ids)
    if len(counts) < len(ids):
        twice, times = counts.most_common(1)[0]
        raise DatasetError(f"{where}: {what} {twice} occurs {times} times: an id names one thing, remove the copies")
    return set(counts)
