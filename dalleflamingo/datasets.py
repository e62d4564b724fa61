"""Images with their reference captions: readers and writers of the formats that captioning uses.

COCO captions, Karpathy's splits, NoCaps, and a folder or text file of the user's own all become a `Dataset` of
`Example`s, so that the rest of the package does not depend on the source. Predictions are exchanged as COCO results
JSON. Captions are kept exactly as published: metrics tokenize them, training cleans them (`clean_caption`).
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from dalleflamingo.runs import derive_seed, write_whole

DOMAINS = ("in-domain", "near-domain", "out-domain")  # NoCaps: are the image's things among COCO's 80 classes?
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class DatasetError(ValueError):
    """A file or folder is not what it should be; the message says what was found, what was expected and what to do."""


class UnreadableImage(DatasetError):
    """One image that cannot be opened: `path`, `reason` and `remedy`. A run may skip it and go on."""

    def __init__(self, path: Path, reason: str, remedy: str):
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"cannot read the image {self.path}: {self.reason}; {self.remedy}"


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
        _unique([example.image_id for example in self.examples], f"data set {self.name}", "image id")

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
    """Open an image file as RGB, turned upright by its EXIF tag, with transparent pixels on white.

    Raises:
        UnreadableImage: the file is missing, truncated or not an image.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise UnreadableImage(path, "there is no such file", "download or draw it, or leave the example out") from error
    except Exception as error:  # for broken files, decoders raise OSError, SyntaxError, ValueError, zlib.error and more
        size = f"it has {path.stat().st_size:,} bytes, and " if path.is_file() else ""
        reason = f"{size}{type(error).__name__} says: {error}"
        raise UnreadableImage(path, reason, "fetch or draw it again, or leave the example out") from error


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
    payload = _load(path)
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
    for record in _objects(_load(path), "images", path):
        if _value(record, "split", str, path) in KARPATHY_SPLITS[split]:
            file = images / _value(record, "filepath", str, path) / _value(record, "filename", str, path)
            captions = (_value(sentence, "raw", str, path) for sentence in _objects(record, "sentences", path))
            members.append(Example(_value(record, "cocoid", int, path), file, tuple(captions)))
    return Dataset(f"{path.stem}/{split}", tuple(members))


def read_folder(folder: Path) -> Dataset:
    """The images in one of the user's own folders, sorted by name; its subfolders are not searched.

    An image id is a hash of the file's name, so neither it nor a seed derived from it changes when images are added.

    Raises:
        DatasetError: there is no such folder, or it holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}: give the path of a folder that holds images")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        found = f"{len(files)} other files, such as {files[0].name}" if files else "no files at all"
        raise DatasetError(
            f"{folder} holds no images but {found}: put files ending in {' '.join(IMAGE_SUFFIXES)} there "
            "(subfolders are not searched)"
        )
    return Dataset(folder.name, tuple(Example(derive_seed("picture", p.name), p) for p in images))


def read_captions(path: str | Path) -> Dataset:
    """A text file of the user's own captions, one per line, each an example without image; blank lines are skipped.

    An image id is a hash of the caption and of how often it occurred before: adding lines does not change it.

    Raises:
        DatasetError: there is no such file, it is not text, or it holds no caption.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is no text file ({error}): give one with a caption on each line") from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise DatasetError(f"{path} holds no caption: write one on each line")
    before: Counter[str] = Counter()
    examples = []
    for caption in captions:
        examples.append(Example(derive_seed("caption", caption, before[caption]), path, (caption,)))
        before[caption] += 1
    return Dataset(path.stem, tuple(examples))


def read_results(path: Path) -> dict[int, str]:
    """COCO results JSON, `[{"image_id", "caption"}]`, as {image_id: caption}.

    Raises:
        DatasetError: not JSON, another format, or two captions for one image.
    """
    path = Path(path)
    payload = _load(path)
    if not isinstance(payload, list) or not all(isinstance(record, dict) for record in payload):
        raise DatasetError(
            f"{path} holds {_shape(payload)}; expected COCO results, a list of objects with image_id and caption: "
            "references are read by read_coco"
        )
    _unique([_value(record, "image_id", int, path) for record in payload], str(path), "image_id")
    return {record["image_id"]: _value(record, "caption", str, path) for record in payload}


def write_results(path: Path, captions: Mapping[int, str]) -> None:
    """Write {image_id: caption} as COCO results JSON, replacing an older file; a missing folder is created."""
    results = [{"image_id": int(image_id), "caption": caption} for image_id, caption in captions.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # ASCII escapes, since captions may contain characters that UTF-8 cannot encode
    write_whole(Path(path), lambda part: part.write_text(json.dumps(results), encoding="ascii"))


def _example(record: dict, images: Path, references: Mapping[int, list[str]], path: Path) -> Example:
    image_id = record["id"]
    named = "file_name" in record
    file_name = _value(record, "file_name", str, path) if named else f"COCO_val2014_{image_id:012d}.jpg"
    domain = record.get("domain")
    if domain is not None and domain not in DOMAINS:
        raise DatasetError(f"{path}: image {image_id} has domain {domain!r}; expected {', '.join(DOMAINS)} or none")
    extra = {key: value for key, value in record.items() if key not in ("id", "file_name", "domain")}
    return Example(image_id, images / file_name, tuple(references.get(image_id, ())), domain, extra)


def _references(captions: list[dict], images: list[dict], path: Path) -> dict[int, list[str]]:
    """{image_id: its captions in file order}, after checking that every caption belongs to a listed image."""
    listed = _unique([_value(image, "id", int, path) for image in images], str(path), "image id")
    _unique([_value(caption, "id", int, path) for caption in captions if "id" in caption], str(path), "annotation id")
    references = defaultdict(list)
    for caption in captions:
        image_id = _value(caption, "image_id", int, path)
        if image_id not in listed:
            raise DatasetError(
                f"{path}: the caption {_value(caption, 'caption', str, path)!r} is of image {image_id}, which is not "
                f'among the {len(listed)} under "images": list the image or remove the caption'
            )
        references[image_id].append(_value(caption, "caption", str, path))
    return references


def _load(path: Path):
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DatasetError(f"there is no file {path}: check the path, or download or make the file") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        kind = "a folder" if path.is_dir() else "binary"
        raise DatasetError(f"{path} is not JSON but {kind}: give the path of the .json file itself") from error
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DatasetError(
            f"{path} is not JSON ({error}); it has {len(text)} characters and begins {text[:40]!r}: "
            "fetch it again, the download may have been cut short or have brought a web page"
        ) from error


def _objects(payload, key: str, path: Path) -> list[dict]:
    """payload[key], checked to be a list of objects."""
    records = payload.get(key) if isinstance(payload, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DatasetError(
            f'{path} holds {_shape(payload)}; expected an object whose "{key}" is a list of objects: '
            "is it for another reader (read_coco, read_karpathy, read_results)?"
        )
    return records


def _value(record: dict, key: str, kind: type, path: Path):
    """record[key], checked to be of `kind`."""
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DatasetError(
            f'{path}: expected "{key}" in every record, of type {kind.__name__}, but found {str(record)[:200]}: '
            "mend that record, or choose the reader for its format"
        )
    return value


def _unique(ids: list, where: str, what: str) -> set:
    """The ids as a set, checked to be distinct."""
    counts = Counter(ids)
    if len(counts) < len(ids):
        twice, times = counts.most_common(1)[0]
        raise DatasetError(f"{where}: {what} {twice} occurs {times} times: an id names one thing, remove the copies")
    return set(counts)


def _shape(payload) -> str:
    """What a JSON value is, in words, for errors."""
    if isinstance(payload, dict):
        return f"an object with the keys {', '.join(map(repr, list(payload)[:8])) or '(none)'}"
    if isinstance(payload, list):
        return f"a list of {len(payload)}" + (f", the first one {_shape(payload[0])}" if payload else "")
    return f"a {type(payload).__name__}"
