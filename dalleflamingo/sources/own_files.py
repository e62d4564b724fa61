"""A user's own images in a folder, captions in a file, or both in a table.

Images are known by their content, whatever a file's suffix says; other files are read as what their suffix says, and
refused with a remedy where they hold something else.
"""

import os
import warnings
from collections import defaultdict
from io import BytesIO
from pathlib import Path

from PIL import Image

from dalleflamingo.datasets import Dataset, DatasetError, Example
from dalleflamingo.runs import printable
from dalleflamingo.sources.annotations import read_coco
from dalleflamingo.sources.records import Json, Records, has_captions, image_in
from dalleflamingo.sources.streamed import StreamedCaptions, StreamedDataset, StreamedPairs, stable_id

_NAMED = 10  # names printed for each reason; the rest are counted
_OF_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_folder(folder: str | Path) -> Dataset:
    """The images in one of the user's own folders, sorted by name.

    Every file that Pillow opens is taken; a printed line names the others with the reason. Hidden files are passed over
    silently, subfolders are not searched. Only the beginning of a file is read here: an image that turns out to be
    damaged is an `UnreadableImage` later.

    An image id is a hash of the file's name, so neither it nor a seed derived from it changes when images are added.

    Raises:
        DatasetError: there is no such folder, it cannot be listed, or it holds no image.
    """
    folder = Path(folder)
    shown = printable(folder)
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {shown}: give the path of a folder that holds images")
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{shown} cannot be listed ({error.strerror}): check its permissions") from error
    images, left_out = [], defaultdict(list)
    for path in entries:
        if reason := _not_an_image(path):
            left_out[reason].append(printable(path.name))
        else:
            images.append(path)
    others = "; ".join(f"{listed(names)} ({len(names)}: {reason})" for reason, names in left_out.items())
    if not images:
        raise DatasetError(
            f"{shown} holds no images but {others or 'no files at all'}: put images there that Pillow opens, such as "
            "JPEG or PNG"
        )
    if others:
        print(f"{shown}: images: {len(images)}; left out: {others}")
    name = printable(folder.resolve().name)  # also where it is given as "."
    return Dataset(name, tuple(Example(stable_id("picture", path.name), path) for path in images))


def read_captions(path: str | Path) -> Dataset:
    """A file of the user's own captions, each an example without image; empty ones are skipped.

    .json: a list of strings, or of objects with a caption, or COCO captions; .jsonl: a string or an object with a
    caption on each line; .csv and .tsv: a table with a column caption, captions or text; any other suffix: a caption on
    each line, which ends at LF, CRLF or CR. All in UTF-8.

    Captions stay in the file and are read when they are asked for; a JSON file alone is read as a whole. An image id is
    a hash of the caption and of how often it occurred before: adding lines does not change it.

    Raises:
        DatasetError: there is no such file, it is not text or in another encoding, it is not what its suffix says, or
            it holds no caption.
    """
    records = _records(path)
    examples = StreamedCaptions.of(records)
    if not examples:
        form = records.path.suffix.lower() or ".txt"
        raise DatasetError(f"{records.shown} holds no caption: write some into it, in the form of a {form} file")
    return StreamedDataset(printable(records.path.stem), examples)


def read_pairs(path: str | Path, images: str | Path | None = None) -> Dataset:
    """A file of the user's own images with captions; captions of one image may stand in one row or in several.

    .csv and .tsv: a table; .jsonl: an object a line; .json: a list of objects, or COCO captions. Columns or keys are
    image, image_path, file_name or filename; caption, captions (a list of strings) or text, if there are any; image_id,
    a whole number, if the images have ids of their own (otherwise an id is a hash of the image's path); domain, as
    NoCaps has it. Others are kept in `extra`. Rows stay in the file and are read when they are asked for; a JSON file
    alone is read as a whole.

    Args:
        path: of the file, in UTF-8.
        images: the folder that the images' paths are relative to, and that holds all of them; None: the file's own.
    Raises:
        DatasetError: there is no such file, it is not text or in another encoding, it is not what its suffix says, it
            names no image, or one outside the folder; or ids are not distinct. An image that is not there is an
            `UnreadableImage` when it is opened.
    """
    records = _records(path)
    folder = records.path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {printable(folder)}: give the folder that holds the images")
    if isinstance(records, Json) and isinstance(records.payload, dict):
        return read_coco(records.path, folder)
    if not records.has_columns:
        raise DatasetError(f"{records.shown} has no columns: images with captions are .csv, .tsv, .jsonl or .json")
    examples = StreamedPairs.of(records, folder)
    if not examples:
        raise DatasetError(f"{records.shown} names no image: write a row for each")
    return StreamedDataset(printable(records.path.stem), examples)


def holds(path: str | Path) -> tuple[bool, bool]:
    """Whether a file's first record names an image, and whether it has captions; errors as `read_captions`."""
    records = _records(path)
    if isinstance(records, Json) and isinstance(records.payload, dict):
        return bool(records.payload.get("images")), bool(records.records)
    first = next(iter(records), None)
    return first is not None and image_in(first) is not None, first is None or has_captions(first)


def _records(path: str | Path) -> Records:
    path = Path(path)
    if path.suffix.lower() in _OF_IMAGES or (os.path.isfile(path) and opens(path)):
        raise DatasetError(f"{printable(path)} is a single image: put it into a folder, and give the folder")
    return Records.of(path)


def _not_an_image(path: Path) -> str:
    """Why a file is left out, for a list of such files; empty where Pillow knows its format."""
    if path.is_dir():
        return "a folder, which is not searched"
    if not path.is_file():  # a device or a pipe might never end
        return "a broken link or a device"
    try:
        path.open("rb").close()
    except OSError as error:
        return str(error.strerror)
    return "" if opens(path) else "no format that Pillow opens; if it is an image, save it as JPEG or PNG"


def is_image(path: Path) -> bool:
    """Whether a folder's entry is an image that `read_folder` takes."""
    return not path.name.startswith(".") and not _not_an_image(path)


def opens(file: Path | BytesIO) -> bool:
    """Whether Pillow knows the format of a file, by its content."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of damaged metadata
            Image.open(file).close()
    except Image.DecompressionBombError:
        return True  # opening it says how large an image may be
    except Exception:  # readers of broken headers raise anything
        return False
    return True


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
