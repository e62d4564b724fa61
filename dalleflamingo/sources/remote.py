"""NoCaps and COCO from their public addresses: the annotations at once, the photographs as they are used.

What is fetched lies in the folder that huggingface_hub keeps for such files, `HF_ASSETS_CACHE` (by default
~/.cache/huggingface/assets), in dalleflamingo/nocaps and dalleflamingo/coco.
"""

import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from huggingface_hub import cached_assets_path
from PIL import Image

from dalleflamingo.datasets import Dataset, DatasetError, Example, UnreadableImage
from dalleflamingo.registry import Entry
from dalleflamingo.runs import printable
from dalleflamingo.sources import annotations
from dalleflamingo.sources.downloads import DownloadError, Remote, announcement, download, write_shared
from dalleflamingo.sources.registered import variable_of
from dalleflamingo.sources.text_files import load_json, shape_of

HEADER_URL = "https://s3.amazonaws.com/nocaps/nocaps_val_image_info.json"  # as nocaps.org/download links it
COCO_IMAGES = "http://images.cocodataset.org"
COCO_TERMS = "https://cocodataset.org/#termsofuse"
PHOTOGRAPHS = {"nocaps": 4_500, "coco": 123_287}  # whose size is `Entry.size_mb`
_JPEG = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Shelf:
    """What the parts of a data set share.

    Attributes:
        name: of the data set, in the registry.
        megabytes: of a photograph, roughly; None: unknown.
        lost: path -> why its photograph cannot be had; filled as they are asked for.
    """

    name: str
    megabytes: float | None = None
    lost: dict[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoteDataset(Dataset):
    """A data set whose photographs are fetched when they are used, each from the `coco_url` of its record.

    A slice, `filter` and `subset` fetch the photographs that they hold, and `open` fetches its own; `by_domain` fetches
    none. One that its server does not have is named in a printed line, and opening it is an `UnreadableImage`.

    Raises:
        DownloadError: the network or the server is out of reach; what has been fetched is kept.
    """

    shelf: Shelf = field(default_factory=lambda: Shelf("unnamed"), compare=False)

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return found.fetch() if isinstance(index, slice) else found

    def filter(self, image_ids: Collection[int]) -> "RemoteDataset":
        return super().filter(image_ids).fetch()

    def open(self, example: Example) -> Image.Image:
        self._fetch((example,))
        if reason := self.shelf.lost.get(example.path):
            raise UnreadableImage(example.path, f"it could not be fetched: {reason}", "leave the example out")
        return super().open(example)

    def fetch(self) -> "RemoteDataset":
        """Fetch the photographs that are not on this machine; returns itself."""
        self._fetch(self.examples)
        return self

    def missing(self) -> list[Remote]:
        """What `fetch` would fetch."""
        return [remote for remote in self._remotes(self.examples) if not remote.path.is_file()]

    def plan(self) -> str:
        """What `fetch` would do, in one line."""
        missing = self.missing()
        if not missing:
            return f"photographs of {self.shelf.name}: all {len(self)} are here"
        return announcement(missing, len(self), f"photographs of {self.shelf.name}", self.shelf.megabytes)

    def _fetch(self, examples: Sequence[Example]) -> None:
        shelf = self.shelf
        what = f"photographs of {shelf.name}"
        shelf.lost.update(download(self._remotes(examples), what, own_copy(shelf.name), shelf.megabytes))

    def _remotes(self, examples: Sequence[Example]) -> list[Remote]:
        wanted = [example for example in examples if example.path not in self.shelf.lost]
        return [Remote(example.extra["coco_url"], example.path, image_check(example)) for example in wanted]


def fetch_nocaps(entry: Entry, split: None = None) -> RemoteDataset:
    """NoCaps validation, for the registry. Its header says where each photograph is.

    Raises:
        DownloadError: its annotations are not here and cannot be fetched.
        DatasetError: they are not what they should be.
    """
    folder = folder_of(entry)
    header = folder / annotations.NOCAPS_HEADER
    files = [
        Remote(HEADER_URL, header, partial(require_list, "images")),
        Remote(entry.url, folder / entry.annotations, partial(require_list, "annotations")),
    ]
    _fetch_annotations(entry, files)
    found = annotations.open_nocaps(folder, entry.annotations, split)
    of_each = ("coco_url", "license", "open_images_id", "date_captured")
    told = {key: value for key, value in load_json(header).items() if key in ("info", "licenses")}
    told["images"] = {one.path.name: {key: one.extra.get(key) for key in of_each} for one in found}
    return _on_shelf(entry, split, found, folder, told)


def fetch_coco(entry: Entry, split: str) -> RemoteDataset:
    """A split of Karpathy's COCO, for the registry; errors as `fetch_nocaps`."""
    folder, name = folder_of(entry), entry.annotations
    _fetch_annotations(entry, [Remote(entry.url, folder / name, partial(require_list, "images"), member=name)])
    found = annotations.open_karpathy(folder, name, split)
    addresses = [f"{COCO_IMAGES}/{one.path.parent.name}/{one.path.name}" for one in found]
    addressed = [replace(one, extra={"coco_url": url}) for one, url in zip(found, addresses, strict=True)]
    told = {"licence": entry.licence, "terms": COCO_TERMS, "captions": entry.url}
    return _on_shelf(entry, split, replace(found, examples=tuple(addressed)), folder, told)


def folder_of(entry: Entry) -> Path:
    """Where a data set is that was fetched: in `HF_ASSETS_CACHE`, which huggingface_hub reads once, at import."""
    return cached_assets_path("dalleflamingo", entry.name)


def own_copy(name: str) -> str:
    """The remedy of a user who has the data set already."""
    return f"name the folder of your own copy in {variable_of(name)}"


def image_check(example: Example) -> Callable[[Path], None]:
    """`require_image` for the file of an example, of the size that its record states, if it states one."""
    width, height = (example.extra.get(key) for key in ("width", "height"))
    stated = (width, height) if isinstance(width, int) and isinstance(height, int) else None
    return partial(require_image, stated, example.path.suffix.lower() in _JPEG)


def require_image(stated: tuple[int, int] | None, jpeg: bool, path: Path) -> None:
    """Raise ValueError where a file is not a whole image.

    Args:
        stated: width and height that it should have, before or after its EXIF tag turns it; None: unknown.
        jpeg: it should be a JPEG.
        path: of the file, whose suffix says nothing yet.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            kind, size = image.format, image.size
    except Exception as error:  # decoders of broken files raise anything
        raise ValueError(f"{len(content):,} bytes that begin {content[:20]!r} and are no whole image") from error
    if jpeg and kind not in ("JPEG", "MPO"):
        raise ValueError(f"an image in the format {kind}, expected JPEG")
    # Pillow may have been told to accept a short file (LOAD_TRUNCATED_IMAGES). No marker occurs in compressed data, so
    # that the one of the end must follow the last one of a scan.
    if jpeg and content.rfind(b"\xff\xd9") <= content.rfind(b"\xff\xda"):
        raise ValueError(f"{len(content):,} bytes of a JPEG without its end")
    if stated and sorted(size) != sorted(stated):
        raise ValueError(f"an image of {size[0]} × {size[1]} pixels, expected {stated[0]} × {stated[1]}")


def require_list(key: str, path: Path) -> None:
    """Raise ValueError where a file is not a JSON object with a list under `key`."""
    payload = load_json(path)
    if not isinstance(payload, dict) or not isinstance(payload.get(key), list):
        raise ValueError(f'{shape_of(payload)}, expected an object whose "{key}" is a list')


def _fetch_annotations(entry: Entry, files: Sequence[Remote]) -> None:
    what = f"annotations of {entry.name}"
    if lost := download(files, what, own_copy(entry.name)):
        path, reason = next(iter(lost.items()))
        [url] = [file.url for file in files if file.path == path]
        raise DownloadError(f"{what}: {url} cannot be used: {reason}. Try again later, or {own_copy(entry.name)}")


def _on_shelf(entry: Entry, split: str | None, found: Dataset, folder: Path, told: Mapping) -> RemoteDataset:
    """The data set, with what is `told` of licences written beside its photographs."""
    for one in found:
        # what was fetched names the files to be written: they must not be elsewhere
        inside = one.path.parent.parent == folder and re.fullmatch(r"\w[\w.-]*", one.path.name)
        if not inside or not isinstance(one.extra.get("coco_url"), str):
            raise DatasetError(
                f"{printable(folder)}: image {one.image_id} is to lie at {printable(one.path)!r}, with the address "
                f"{one.extra.get('coco_url')!r}; expected a plain file name and a URL: delete the annotations in that "
                "folder, and they are fetched again"
            )
    text = json.dumps(told, indent=1) + "\n"
    licences = folder / "licences.json"
    if not licences.is_file() or licences.read_text() != text:
        write_shared(licences, text)
    megabytes = entry.size_mb / PHOTOGRAPHS[entry.name] if entry.size_mb else None
    name = f"{entry.name}/{split}" if split else entry.name
    return RemoteDataset(name, found.examples, Shelf(entry.name, megabytes))
