"""The records of a text, JSON Lines, CSV, TSV or JSON file: read one after another, and each again by its position.

A record is a caption, or the named values of a row or JSON object. Of a file with a million of them only positions are
kept in memory. What a record says of images and captions is in `captions_in`, `image_in` and `id_in`.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dalleflamingo.datasets import DatasetError
from dalleflamingo.runs import printable
from dalleflamingo.sources.text_files import Line, lines_of, load_json, shape_of

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename")  # the first of them that a file has is taken
CAPTION_COLUMNS = ("caption", "captions", "text")
ID_COLUMN = "image_id"
EXPECTED = "one of them caption, captions or text for captions, or image, image_path or file_name for images"


class Record(NamedTuple):
    """A caption or named values, the words for its position in errors, and the bytes that it was read from."""

    value: str | dict
    where: str
    offset: int
    length: int


class Records:
    """The records of a file, as its suffix says; `of` chooses. Errors are DatasetErrors that name file and line."""

    has_columns = False  # whether a record can hold more than a caption

    def __init__(self, path: Path):
        self.path, self.shown = Path(path), printable(path)

    @staticmethod
    def of(path: Path) -> "Records":
        """The reader for a suffix: .json, .jsonl, .csv or .tsv; any other file is a caption a line."""
        kinds = {".json": Json, ".jsonl": JsonLines, ".csv": Table, ".tsv": Table}
        return kinds.get(Path(path).suffix.lower(), Captions)(path)

    def __iter__(self) -> Iterator[Record]:
        raise NotImplementedError

    def parse(self, content: str, where: str) -> str | dict:
        """The value of one record, from its text."""
        raise NotImplementedError

    def read(self, file: io.BufferedReader, offset: int, length: int) -> str | dict:
        """The value of the record at a position that iteration gave, from the opened file."""
        file.seek(offset)
        try:
            content = file.read(length).decode("utf-8-sig" if offset == 0 else "utf-8")
            return self.parse(content.replace("\r\n", "\n").replace("\r", "\n"), self.shown)
        except (UnicodeDecodeError, DatasetError) as error:
            raise self.changed() from error

    def changed(self) -> DatasetError:
        """The error for a file that is not what it was when its positions were noted."""
        return DatasetError(f"{self.shown} was changed while it was in use: give the same command again")


class Captions(Records):
    """A caption on each line."""

    def __iter__(self) -> Iterator[Record]:
        first = True
        for number, line in enumerate(lines_of(self.path), start=1):
            text = line.text.strip()
            if text and first:
                self._check_first(text)
            first = first and not text
            if text:
                yield Record(text, f"{self.shown}, line {number}", line.offset, line.length)

    def parse(self, content: str, where: str) -> str:
        return content.strip()

    def _check_first(self, text: str) -> None:
        """Refuse a file of another format, whose every line would be taken for a caption."""
        found, names = _or_none(text), set(_names(text, ",")) | set(_names(text, ";")) | set(_names(text, "\t"))
        if isinstance(found, dict) or isinstance(found, list):
            raise DatasetError(f"{self.shown} begins with JSON, not with a caption: call it .jsonl or .json")
        if names & set(IMAGE_COLUMNS) and names & set(CAPTION_COLUMNS):
            raise DatasetError(f"{self.shown} begins with the names of columns, not with a caption: call it .csv")


class JsonLines(Records):
    """A string, or an object, on each line."""

    has_columns = True

    def __iter__(self) -> Iterator[Record]:
        for number, line in enumerate(lines_of(self.path), start=1):
            if line.text.strip():
                where = f"{self.shown}, line {number}"
                yield Record(self.parse(line.text, where), where, line.offset, line.length)

    def parse(self, content: str, where: str) -> str | dict:
        try:
            return _checked(json.loads(content), where)
        except (ValueError, RecursionError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(
                f"{where} is not JSON ({error}): write a string in double quotes or an object on each line; a file "
                "that is one JSON value is called .json, one with a caption a line call the file .txt"
            ) from error


class Table(Records):
    """A row after a header; .csv is separated by the first of , ; and tab that yields a known column."""

    has_columns = True

    def __init__(self, path: Path):
        super().__init__(path)
        self._separators = "\t" if self.path.suffix.lower() == ".tsv" else ",;\t"
        self._separator, self._columns = "", []

    def __iter__(self) -> Iterator[Record]:
        lines = _Counting(lines_of(self.path))
        header = next(lines, "").removesuffix("\n")
        self._read_header(header)
        rows = csv.reader(lines, delimiter=self._separator, strict=True)
        try:
            while True:
                begin, number = lines.end, rows.line_num + 2
                row = next(rows, None)
                if row is None:
                    return
                if row:
                    where = f"{self.shown}, line {number}"
                    yield Record(self._row(row, where), where, begin, lines.end - begin)
        except csv.Error as error:
            begins = f"; the row begins in line {number}" if rows.line_num + 1 > number else ""
            where = f"{self.shown}, line {rows.line_num + 1}"
            raise DatasetError(f"{where} cannot be read as a row ({error}{begins}): mend that line") from error

    def parse(self, content: str, where: str) -> dict:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=self._separator, strict=True)
        try:
            return self._row(next(reader, []), where)
        except csv.Error as error:
            raise DatasetError(f"{where} cannot be read as a row ({error})") from error

    def _read_header(self, header: str) -> None:
        known = {*IMAGE_COLUMNS, *CAPTION_COLUMNS}
        for separator in self._separators:
            columns = _names(header, separator)
            found = [name for name in columns if name in known]
            if found and len(set(found)) == len(found):
                self._separator, self._columns = separator, columns
                return
        twice = [name for name, count in Counter(_names(header, self._separators[0])).items() if count > 1]
        remedy = f"rename one of the columns called {twice[0]}" if twice else "add such a line"
        raise DatasetError(
            f"{self.shown} begins with {printable(header[:80])!r}; expected the names of columns, {EXPECTED}: "
            f"{remedy}, or call a file with one caption a line .txt"
        )

    def _row(self, row: list[str], where: str) -> dict:
        if len(row) != len(self._columns):
            raise DatasetError(
                f"{where} has {len(row)} columns and the header {len(self._columns)}: put a caption that contains "
                f"{self._separator!r} into double quotes"
            )
        value = dict(zip(self._columns, row, strict=True))
        if value.get("captions", "").lstrip().startswith("["):  # several captions in a cell, as JSON
            found = _or_none(value["captions"])
            if not isinstance(found, list):
                raise DatasetError(f"{where}, column captions is not a JSON list: mend it, or write one caption a row")
            value["captions"] = found
        return value


class Json(Records):
    """A list of strings or objects, or COCO captions; read as a whole, because JSON can be read no other way.

    A record's offset is its number.
    """

    has_columns = True

    def __init__(self, path: Path):
        super().__init__(path)
        self.payload = load_json(path)
        is_coco = isinstance(self.payload, dict)
        self.records = self.payload.get("annotations") if is_coco else self.payload
        if not isinstance(self.records, list):
            raise DatasetError(
                f"{self.shown} holds {shape_of(self.payload)}; expected a list of strings, a list of objects with a "
                'caption, or COCO captions, whose "annotations" are such a list'
            )

    def __iter__(self) -> Iterator[Record]:
        for number, record in enumerate(self.records):
            where = f"{self.shown}, entry {number + 1}"
            yield Record(_checked(record, where), where, number, 0)

    def read(self, file: io.BufferedReader, offset: int, length: int) -> str | dict:
        return self.records[offset]


class _Counting:
    """The texts of lines; `end` is where the last one that was taken ends."""

    def __init__(self, lines: Iterator[Line]):
        self._lines, self.end = lines, 0

    def __iter__(self) -> "_Counting":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.end = line.offset + line.length
        return line.text


def captions_in(record: Record) -> list[str]:
    """The captions of a record, without surrounding space; empty ones are left out.

    Raises:
        DatasetError: there is no caption column, or it holds neither a string nor a list of strings.
    """
    value = record.value
    if isinstance(value, dict):
        name = next((name for name in CAPTION_COLUMNS if name in value), CAPTION_COLUMNS[0])
        value = value.get(name)
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in found):
        raise DatasetError(
            f"{record.where} is {shape_of(record.value)}; expected a string, or an object whose "
            f'"{CAPTION_COLUMNS[0]}", "{CAPTION_COLUMNS[1]}" or "{CAPTION_COLUMNS[2]}" is one, or a list of strings'
        )
    return [caption.strip() for caption in found if caption.strip()]


def has_captions(record: Record) -> bool:
    """Whether a record has captions to read: it is one, or it has a column of captions."""
    return isinstance(record.value, str) or any(record.value.get(name) is not None for name in CAPTION_COLUMNS)


def image_in(record: Record) -> str | None:
    """The image's path as a record names it; None where it has no column of images.

    Raises:
        DatasetError: the column is empty, or not a string.
    """
    name = isinstance(record.value, dict) and next((name for name in IMAGE_COLUMNS if name in record.value), None)
    if not name:
        return None
    value = record.value[name]
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DatasetError(
            f"{record.where}: column {name} holds {value!r}; expected the path of an image, relative to the folder of "
            "the images: write it, or leave out the row"
        )
    return value


def id_in(record: Record) -> int | None:
    """The image's id where a record has a whole number in [0, 2**63) as `image_id`, else None."""
    value = record.value.get(ID_COLUMN) if isinstance(record.value, dict) else None
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value) if len(value) < 20 else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _checked(value: object, where: str) -> str | dict:
    if not isinstance(value, (str, dict)):
        raise DatasetError(f"{where} is {shape_of(value)}; expected a string, or an object with a caption or an image")
    return value


def _names(header: str, separator: str) -> list[str]:
    try:
        return [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
    except csv.Error:  # a line longer than a field may be: no header
        return []


def _or_none(text: str) -> object:
    """The JSON value of a text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
