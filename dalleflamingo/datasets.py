"""Images with their reference captions: readers and writers of the formats that captioning uses.

COCO captions, Karpathy's splits, NoCaps and a folder of one's own pictures all become the same `Dataset` of `Example`s,
so that nothing after this file knows where a picture came from. Predictions travel as COCO results JSON. Captions are
kept as published, character by character: tokenizing is the metrics' business.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from dalleflamingo.intervals import derive_seed

DOMAINS = ("in-domain", "near-domain", "out-domain")  # NoCaps: are the image's things among COCO's 80 classes?
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class DatasetError(ValueError):
    """A file or folder is not what it should be; the message says what was found, what was expected and what to do."""


class UnreadableImage(DatasetError):
    """One picture that cannot be opened: `path`, `reason` and `remedy`. A run may skip it and go on."""

    def __init__(self, path: Path, reason: str, remedy: str):
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"cannot read the picture {self.path}: {self.reason}; {self.remedy}"


@dataclass(frozen=True)
class Example:
    """One image: `references` are its human captions, `extra` whatever else its record holds (a scene, a licence)."""

    image_id: int
    path: Path
    references: tuple[str, ...] = ()
    domain: str | None = None
    extra: dict = field(default_factory=dict, hash=False)

    def sample_reference(self, seed: int) -> str:
        """One of its captions, drawn at random (§3.1, Table 4), for one seed always the same.

        Raises:
            DatasetError: it has none.
        """
        if not self.references:
            raise DatasetError(f"image {self.image_id} has no caption to start from: give it one, or leave it out")
        return self.references[derive_seed(seed, "source", self.image_id) % len(self.references)]


@dataclass(frozen=True)
class Dataset(Sequence[Example]):
    """Examples under a name, in file order. A slice of it is a `Dataset` too.

    Raises:
        DatasetError: two examples share an image id, which every table of results is keyed by.
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

    def only(self, image_ids: Collection[int]) -> "Dataset":
        """The examples of these images, in file order; ids that it does not have are passed over."""
        return Dataset(self.name, tuple(example for example in self.examples if example.image_id in image_ids))

    def subset(self, n: int, seed: int = 0) -> "Dataset":
        """`n` examples chosen by `seed`, in file order.

        The choice looks at image ids only: it is the same on every machine, and a smaller subset of the same seed lies
        inside a larger one, so that `smoke` shows pictures of `mini`.

        Raises:
            DatasetError: `n` is below 1 or above the size.
        """
        if not 1 <= n <= len(self):
            raise DatasetError(f"a subset of {n} was asked of {self.name}: ask for 1 to {len(self)}, its size")
        chosen = sorted(self.examples, key=lambda example: derive_seed("subset", seed, example.image_id))[:n]
        return self.only({example.image_id for example in chosen})

    def by_domain(self) -> dict[str, "Dataset"]:
        """NoCaps's domains that occur, in the order in, near, out; empty for a data set without domains."""
        return {
            domain: Dataset(f"{self.name}/{domain}", members)
            for domain in DOMAINS
            if (members := tuple(example for example in self.examples if example.domain == domain))
        }

    def open(self, example: Example) -> Image.Image:
        """The picture as RGB, turned as its EXIF tag says, transparency over white.

        Raises:
            UnreadableImage: the file is missing, truncated or no picture.
        """
        return open_image(example.path)


class ImageFiles(Sequence[Image.Image]):
    """Picture files as a sequence that opens them when they are asked for, so that thousands never lie in memory.

    Errors as `Dataset.open`.
    """

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        found = self.paths[index]
        return [open_image(path) for path in found] if isinstance(index, slice) else open_image(found)


def open_image(path: Path) -> Image.Image:
    """As `Dataset.open`, for one file."""
    path = Path(path)
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            return upright.convert("RGB")
    except FileNotFoundError as error:
        raise UnreadableImage(path, "there is no such file", "download or draw it, or leave the example out") from error
    except Exception as error:  # decoders meet broken files with OSError, SyntaxError, ValueError, zlib.error and more
        size = f"it has {path.stat().st_size:,} bytes, and " if path.is_file() else ""
        reason = f"{size}{type(error).__name__} says: {error}"
        raise UnreadableImage(path, reason, "fetch or draw it again, or leave the example out") from error


def read_coco(annotations: Path, images: Path, name: str | None = None) -> Dataset:
    """COCO captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    Karpathy's `*_gt.json` names no files; there the path is `images/COCO_val2014_{id:012d}.jpg`, where both of its
    evaluation splits come from. An image without annotations has no references; one may have a `domain`, as in NoCaps.

    Raises:
        DatasetError: not JSON, another shape, a repeated id, a caption of an image that is not listed, or a domain that
            is none of `DOMAINS`.
    """
    annotations, images = Path(annotations), Path(images)
    payload = _load(annotations)
    pictures = _objects(payload, "images", annotations)
    references = _references(_objects(payload, "annotations", annotations), pictures, annotations)
    return Dataset(name or annotations.stem, tuple(_example(p, images, references, annotations) for p in pictures))


def read_nocaps(annotations: Path, images: Path) -> Dataset:
    """NoCaps: COCO's shape with a `domain` in each image record. Its published header has neither domains nor captions.

    Raises:
        DatasetError: as `read_coco`.
    """
    annotations, images = Path(annotations), Path(images)
    payload = _load(annotations)
    pictures = _objects(payload, "images", annotations)
    captions = _objects(payload, "annotations", annotations) if "annotations" in payload else []
    references = _references(captions, pictures, annotations)
    return Dataset(annotations.stem, tuple(_example(p, images, references, annotations) for p in pictures))


def read_karpathy(dataset_json: Path, images: Path, split: str) -> Dataset:
    """Karpathy's `dataset_coco.json`, as published.

    It reads `{"images": [{"cocoid", "filepath", "filename", "split", "sentences": [{"raw"}]}]}`.

    Args:
        images: the folder that holds `train2014` and `val2014`.
        split: "train" (its `train` and `restval`, 113,287 images in all), "val" or "test" (5,000 each).
    Raises:
        DatasetError: no such split, or as `read_coco`.
    """
    if split not in KARPATHY_SPLITS:
        raise DatasetError(f"Karpathy's splits are {', '.join(KARPATHY_SPLITS)}, not {split!r}")
    path, images = Path(dataset_json), Path(images)
    members = [
        _karpathy_example(record, images, path)
        for record in _objects(_load(path), "images", path)
        if _value(record, "split", str, path) in KARPATHY_SPLITS[split]
    ]
    return Dataset(f"{path.stem}/{split}", tuple(members))


def read_folder(folder: Path) -> Dataset:
    """A folder of one's own pictures, by name; its subfolders are not searched.

    An image id is a hash of the file's name, so that it, and every seed made from it, stays when pictures are added.

    Raises:
        DatasetError: no folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}: give the path of a folder that holds pictures")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        found = f"{len(files)} other files, such as {files[0].name}" if files else "no files at all"
        raise DatasetError(
            f"{folder} holds no pictures but {found}: put files ending in {' '.join(IMAGE_SUFFIXES)} there "
            "(subfolders are not searched)"
        )
    return Dataset(folder.name, tuple(Example(derive_seed("picture", p.name), p) for p in pictures))


def write_coco(path: Path, examples: Iterable[Example], images: Path | None = None) -> None:
    """Write examples as COCO captions, so that `read_coco` (or `read_nocaps`) gives them back.

    Args:
        images: the folder that file names are relative to; by default a name alone is written.
    """
    pictures, annotations = [], []
    for example in examples:
        file_name = example.path.relative_to(images).as_posix() if images else example.path.name
        domain = {} if example.domain is None else {"domain": example.domain}
        pictures.append({"id": int(example.image_id), "file_name": file_name, **domain, **example.extra})
        for caption in example.references:
            annotations.append({"id": len(annotations), "image_id": int(example.image_id), "caption": caption})
    _write(Path(path), {"images": pictures, "annotations": annotations})


def read_captions(path: str | Path) -> Dataset:
    """A text file of one's own captions, one a line, each as an example without a picture; blank lines are passed over.

    An image id is a hash of the caption, and of how often it stood there before, so that it stays when lines are added.

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
    """COCO results, `[{"image_id", "caption"}]` -> {image_id: caption}.

    Raises:
        DatasetError: not JSON, another shape, or two captions for one image.
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
    """{image_id: caption} -> COCO results, one caption an image."""
    _write(Path(path), [{"image_id": int(image_id), "caption": caption} for image_id, caption in captions.items()])


def _example(record: dict, images: Path, references: Mapping[int, list[str]], path: Path) -> Example:
    image_id = record["id"]
    named = "file_name" in record
    file_name = _value(record, "file_name", str, path) if named else f"COCO_val2014_{image_id:012d}.jpg"
    domain = record.get("domain")
    if domain is not None and domain not in DOMAINS:
        raise DatasetError(f"{path}: image {image_id} has domain {domain!r}; expected {', '.join(DOMAINS)} or none")
    extra = {key: value for key, value in record.items() if key not in ("id", "file_name", "domain")}
    return Example(image_id, images / file_name, tuple(references.get(image_id, ())), domain, extra)


def _karpathy_example(record: dict, images: Path, path: Path) -> Example:
    image_id = _value(record, "cocoid", int, path)
    file_name = Path(_value(record, "filepath", str, path)) / _value(record, "filename", str, path)
    references = tuple(_value(sentence, "raw", str, path) for sentence in _objects(record, "sentences", path))
    return Example(image_id, images / file_name, references)


def _references(captions: list[dict], pictures: list[dict], path: Path) -> dict[int, list[str]]:
    """{image_id: its captions in file order}, every caption checked to be of a listed image."""
    listed = _unique([_value(picture, "id", int, path) for picture in pictures], str(path), "image id")
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
            "is it for another reader (read_coco, read_karpathy, read_nocaps, read_results)?"
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


def _write(path: Path, payload) -> None:
    """Write JSON whole or not at all; ASCII escapes, since captions may hold what UTF-8 cannot encode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(payload), encoding="ascii")
    os.replace(unfinished, path)
