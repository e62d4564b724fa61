"""Images with their reference captions: readers of the formats that captioning uses.

COCO captions, Karpathy's splits, NoCaps, and a user's own files (`dalleflamingo.sources`) all become a `Dataset` of
`Example`s, so that the rest of the package does not depend on the source. Captions are kept exactly as published:
metrics tokenize them, training cleans them (`clean_caption`).
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from dalleflamingo.runs import derive_seed, printable

DOMAINS = ("in-domain", "near-domain", "out-domain")  # NoCaps: are the image's things among COCO's 80 classes?
KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
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
        return Dataset(self.name, self.examples[index]) if isinstance(index, slice) else self.examples[index]

    def filter(self, image_ids: Collection[int]) -> "Dataset":
        """The examples whose ids are among `image_ids`, in file order; unknown ids are ignored."""
        return Dataset(self.name, tuple(example for example in self.examples if example.image_id in image_ids))

    def subset(self, n: int, seed: int = 0) -> "Dataset":
        """`n` examples chosen by `seed`, in file order.

        The choice depends on the seed and the image ids only: it is the same on every machine, and for one seed a
        smaller subset lies inside a larger one, so that the images of `smoke` are among those of `mini`.

        Raises:
            DatasetError: `n` is below 1 or above the size.
        """
        if not 1 <= n <= len(self):
            raise DatasetError(f"a subset of {n} was asked of {self.name}: ask for 1 to {len(self)}, its size")
        chosen = sorted(self.examples, key=lambda example: derive_seed("subset", seed, example.image_id))[:n]
        return self.filter({example.image_id for example in chosen})

    def by_domain(self) -> dict[str, "Dataset"]:
        """{domain: its examples} for the domains that occur, in the order of `DOMAINS`; {} if there are none."""
        return {
            domain: Dataset(f"{self.name}/{domain}", members)
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
    """What opening an image failed of, with a remedy that helps."""
    if isinstance(error, FileNotFoundError):
        return UnreadableImage(path, "there is no such file", "download or draw it, or leave the example out")
    size = f"it has {os.path.getsize(path):,} bytes, and " if os.path.isfile(path) else ""
    remedy = "fetch or draw it again, save it as PNG or JPEG with 8 bits a channel, or leave the example out"
    if isinstance(error, Image.UnidentifiedImageError):
        return UnreadableImage(path, f"{size}Pillow knows no image format with such content", remedy)
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        remedy = "make it smaller (the models read at most some hundred pixels a side), or leave the example out"
    return UnreadableImage(path, f"{size}{type(error).__name__} says: {error}", remedy)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright; a damaged orientation counts as none, other damage of the EXIF block as nothing."""
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


def read_coco(annotations: Path, images: Path, name: str | None = None) -> Dataset:
    """COCO captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    NoCaps has the same format, with a `domain` in each image record. An image without annotations has no references.

    Args:
        annotations: the JSON file. Karpathy's `*_gt.json` names no image files; then their paths are
            `images/COCO_val2014_{id:012d}.jpg`, because both of his evaluation splits are from val2014.
        images: the folder that file names are relative to.
        name: the data set's name; by default the file's.
    Raises:
        DatasetError: not JSON, another format, a repeated id, a caption of an unlisted image, or a domain that is not
            one of `DOMAINS`.
    """
    path = Path(annotations)
    payload = load_json(path)
    records = _objects(payload, "images", path)
    references = _references(_objects(payload, "annotations", path), records, path)
    return Dataset(name or path.stem, tuple(_example(record, Path(images), references, path) for record in records))


def read_karpathy(dataset_json: Path, images: Path, split: str) -> Dataset:
    """Karpathy's file: `{"images": [{"cocoid", "filepath", "filename", "split", "sentences": [{"raw"}]}]}`.

    Args:
        dataset_json: `dataset_coco.json`, as published.
        images: the folder that holds `train2014` and `val2014`.
        split: "train" (its `train` and `restval`, 113,287 images in all), "val" or "test" (5,000 each).
    Raises:
        DatasetError: no such split, or as `read_coco`.
    """
    if split not in KARPATHY_SPLITS:
        raise DatasetError(f"Karpathy's splits are {', '.join(KARPATHY_SPLITS)}, not {split!r}")
    path, images = Path(dataset_json), Path(images)
    members = []
    for record in _objects(load_json(path), "images", path):
        if value_of(record, "split", str, path) in KARPATHY_SPLITS[split]:
            file = images / value_of(record, "filepath", str, path) / value_of(record, "filename", str, path)
            captions = (value_of(sentence, "raw", str, path) for sentence in _objects(record, "sentences", path))
            members.append(Example(value_of(record, "cocoid", int, path), file, tuple(captions)))
    return Dataset(f"{path.stem}/{split}", tuple(members))


def _example(record: dict, images: Path, references: Mapping[int, list[str]], path: Path) -> Example:
    image_id = record["id"]
    named = "file_name" in record
    file_name = value_of(record, "file_name", str, path) if named else f"COCO_val2014_{image_id:012d}.jpg"
    domain = record.get("domain")
    if domain is not None and domain not in DOMAINS:
        raise DatasetError(f"{path}: image {image_id} has domain {domain!r}; expected {', '.join(DOMAINS)} or none")
    extra = {key: value for key, value in record.items() if key not in ("id", "file_name", "domain")}
    return Example(image_id, images / file_name, tuple(references.get(image_id, ())), domain, extra)


def _references(captions: list[dict], images: list[dict], path: Path) -> dict[int, list[str]]:
    """{image_id: its captions in file order}, after checking that every caption belongs to a listed image."""
    listed = distinct([value_of(image, "id", int, path) for image in images], str(path), "image id")
    distinct(
        [value_of(caption, "id", int, path) for caption in captions if "id" in caption], str(path), "annotation id"
    )
    references = defaultdict(list)
    for caption in captions:
        image_id = value_of(caption, "image_id", int, path)
        if image_id not in listed:
            raise DatasetError(
                f"{path}: the caption {value_of(caption, 'caption', str, path)!r} is of image {image_id}, which is not "
                f'among the {len(listed)} under "images": list the image or remove the caption'
            )
        references[image_id].append(value_of(caption, "caption", str, path))
    return references


def read_text(path: Path) -> str:
    """A text in UTF-8, with or without a byte order mark; CRLF and CR become LF, and nothing else is a line's end.

    Raises:
        DatasetError: there is no such file, it cannot be read, or it is in another encoding, which the message names.
    """
    shown = printable(path)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DatasetError(f"there is no file {shown}: check the path, or download or make the file") from error
    except OSError as error:
        raise DatasetError(f"{shown} cannot be read ({error.strerror}): give the path of a file that can") from error
    encoding = json.detect_encoding(content).upper()  # by a byte order mark, or by zero bytes among the first four
    if encoding.startswith("UTF-8"):
        try:
            text = content.decode("utf-8-sig")
            if "\0" not in text:
                return text.replace("\r\n", "\n").replace("\r", "\n")
            encoding = "another encoding, if it is text at all: it holds zero bytes"
        except UnicodeDecodeError as error:
            encoding = f"Latin-1 or Windows-1252, if it is text at all: byte {error.start + 1} is not UTF-8"
    raise DatasetError(f"{shown} is not in UTF-8 but in {encoding}; save it as UTF-8 in a text editor")


def load_json(path: Path):
    """The value of a JSON file. Raises DatasetError: as `read_text`, or it is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: of JSON, or a number of thousands of digits
        raise DatasetError(
            f"{printable(path)} is not JSON ({error}); it has {len(text)} characters and begins {text[:40]!r}: "
            "fetch it again, the download may have been cut short or have brought a web page"
        ) from error


def _objects(payload, key: str, path: Path) -> list[dict]:
    """payload[key], checked to be a list of objects."""
    records = payload.get(key) if isinstance(payload, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DatasetError(
            f'{path} holds {shape_of(payload)}; expected an object whose "{key}" is a list of objects: '
            "is it for another reader (read_coco, read_karpathy, caption_results.read_results)?"
        )
    return records


def value_of(record: dict, key: str, kind: type, path: Path):
    """record[key], checked to be of `kind`."""
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and abs(value) >= 2**63):  # of a table
        raise DatasetError(
            f'{path}: expected "{key}" in every record, of type {kind.__name__}, but found {str(record)[:200]}: '
            "mend that record, or choose the reader for its format"
        )
    return value


def distinct(ids: list, where: str, what: str) -> set:
    """The ids as a set, checked to be distinct."""
    counts = Counter(ids)
    if len(counts) < len(ids):
        twice, times = counts.most_common(1)[0]
        raise DatasetError(f"{where}: {what} {twice} occurs {times} times: an id names one thing, remove the copies")
    return set(counts)


def shape_of(payload) -> str:
    """What a JSON value is, in words, for errors."""
    if isinstance(payload, dict):
        return f"an object with the keys {', '.join(map(repr, list(payload)[:8])) or '(none)'}"
    if isinstance(payload, list):
        first = "a list" if payload and isinstance(payload[0], list) else payload and shape_of(payload[0])
        return f"a list of {len(payload)}" + (f", the first one {first}" if payload else "")
    return f"a {type(payload).__name__}"
