"""A user's own images in a folder, and captions in a text, JSON or CSV file.

Images are known by their content, whatever a file's suffix says; caption files are read as what their suffix says.
"""

import csv
import hashlib
import io
import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dalleflamingo.datasets import Dataset, DatasetError, Example
from dalleflamingo.runs import printable
from dalleflamingo.sources.text_files import load_json, read_text, shape_of

_NAMED = 10  # names printed for each reason; the rest are counted
_OF_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}  # a .csv is split by the first that yields a column called caption


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
    others = "; ".join(f"{_listed(names)} ({len(names)}: {reason})" for reason, names in left_out.items())
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
    caption on each line; .csv and .tsv: a table with a column called caption; any other suffix: a caption on each line,
    which ends at LF, CRLF or CR. All in UTF-8.

    An image id is a hash of the caption and of how often it occurred before: adding lines does not change it.

    Raises:
        DatasetError: there is no such file, it is not text or in another encoding, it is not what its suffix says, or
            it holds no caption.
    """
    path = Path(path)
    shown, suffix = printable(path), path.suffix.lower()
    if suffix in _OF_IMAGES or (os.path.isfile(path) and _opens(path)):
        raise DatasetError(f"{shown} is a single image: put it into a folder, and give the folder")
    if suffix == ".json":
        found = _of_json(load_json(path), shown)
    elif suffix == ".jsonl":
        found = _of_json_lines(read_text(path), shown)
    elif suffix in _SEPARATORS:
        found = _of_table(read_text(path), _SEPARATORS[suffix], shown)
    else:
        found = iter(read_text(path).split("\n"))
    captions = [caption.strip() for caption in found if caption.strip()]
    if not captions:
        raise DatasetError(f"{shown} holds no caption: write some into it, in the form of a {suffix or '.txt'} file")
    before: Counter[str] = Counter()
    examples = []
    for caption in captions:
        examples.append(Example(stable_id("caption", caption, before[caption]), path, (caption,)))
        before[caption] += 1
    return Dataset(printable(path.stem), tuple(examples))


def stable_id(*parts: int | str) -> int:
    """An id in [0, 2**63) from strings and whole numbers, the same on every machine.

    Among a million ids two are equal with a probability of 5 in 100 million.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
    return "" if _opens(path) else "no format that Pillow opens; if it is an image, save it as JPEG or PNG"


def _opens(path: Path) -> bool:
    """Whether Pillow knows the format, by a file's content."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of damaged metadata
            Image.open(path).close()
    except Image.DecompressionBombError:
        return True  # opening it says how large an image may be
    except Exception:  # readers of broken headers raise anything
        return False
    return True


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _of_json(payload: object, shown: str) -> Iterator[str]:
    """The captions of a list, or of an object with a list of annotations, as COCO has them."""
    records = payload.get("annotations") if isinstance(payload, dict) else payload
    if not isinstance(records, list):
        raise DatasetError(
            f"{shown} holds {shape_of(payload)}; expected a list of strings, a list of objects with a caption, or COCO "
            'captions, whose "annotations" are such a list'
        )
    for number, record in enumerate(records, start=1):
        yield _caption(record, f"{shown}, entry {number}")


def _of_json_lines(text: str, shown: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(
                    f"{shown}, line {number} is not JSON ({error}): write a string in double quotes or an object with "
                    "a caption on each line, or call the file .txt"
                ) from error
            yield _caption(record, f"{shown}, line {number}")


def _caption(record: object, where: str) -> str:
    caption = record.get("caption") if isinstance(record, dict) else record
    if not isinstance(caption, str):
        raise DatasetError(f'{where} is {shape_of(record)}; expected a string, or an object whose "caption" is one')
    return caption


def _of_table(text: str, separators: str, shown: str) -> Iterator[str]:
    """The column called caption, in whatever case, of a table with a header."""
    header = text.split("\n", 1)[0]
    for separator in separators:
        columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
        if columns.count("caption") == 1:
            break
    else:
        raise DatasetError(
            f"{shown} begins with {printable(header[:80])!r}; expected the names of columns, one of them caption: "
            "add such a line, or call a file with one caption a line .txt"
        )
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        next(rows)
        for row in rows:
            if row and len(row) != len(columns):
                raise DatasetError(
                    f"{shown}, line {rows.line_num} has {len(row)} columns and the header {len(columns)}: put a "
                    f"caption that contains {separator!r} into double quotes"
                )
            yield from row[columns.index("caption") :][:1]
    except csv.Error as error:
        raise DatasetError(
            f"{shown}, line {rows.line_num} cannot be read as a row ({error}): mend that line"
        ) from error
