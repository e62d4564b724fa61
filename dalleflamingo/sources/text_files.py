"""Text and JSON files, read with errors that name the file, what is wrong with it and the remedy."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dalleflamingo.datasets import DatasetError
from dalleflamingo.runs import printable

_BLOCK = 1 << 20  # bytes read at once
_NO_TEXT = {  # how files begin that are often taken for tables
    b"PK\x03\x04": "a zip archive, perhaps an Excel file",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "gzip; unpack it first",
}


class Line(NamedTuple):
    """A line of a text: where it begins and how long it is, in bytes, and its characters; LF ends all but the last."""

    offset: int
    length: int
    text: str


def read_text(path: Path) -> str:
    """A text in UTF-8; what counts as a line's end, and the errors, are those of `lines_of`."""
    return "".join(line.text for line in lines_of(path))


def lines_of(path: Path) -> Iterator[Line]:
    """The lines of a text in UTF-8, with or without a byte order mark, one at a time.

    CRLF and CR become LF, and nothing else is a line's end.

    Raises:
        DatasetError: there is no such file, it cannot be read, or it is in another encoding, which the message names.
    """
    try:
        with open(path, "rb") as file:
            for offset, content in _split(file, path):
                yield Line(offset, len(content), _decoded(content, offset, path))
    except FileNotFoundError as error:
        raise DatasetError(
            f"there is no file {printable(path)}: check the path, or download or make the file"
        ) from error
    except OSError as error:
        raise DatasetError(
            f"{printable(path)} cannot be read ({error.strerror}): give the path of a file that can"
        ) from error


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


def value_of(record: dict, key: str, kind: type, path: Path):
    """record[key], checked to be of `kind`."""
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and abs(value) >= 2**63):  # of a table
        raise DatasetError(
            f'{path}: expected "{key}" in every record, of type {kind.__name__}, but found {str(record)[:200]}: '
            "mend that record, or choose the reader for its format"
        )
    return value


def shape_of(payload) -> str:
    """What a JSON value is, in words, for errors."""
    if isinstance(payload, dict):
        return f"an object with the keys {', '.join(map(repr, list(payload)[:8])) or '(none)'}"
    if isinstance(payload, list):
        first = "a list" if payload and isinstance(payload[0], list) else payload and shape_of(payload[0])
        return f"a list of {len(payload)}" + (f", the first one {first}" if payload else "")
    return {str: "a string", bool: "true or false", type(None): "null"}.get(type(payload), "a number")


def _split(file, path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end), from blocks, of which none is searched twice however long a line is."""
    offset, parts = 0, []
    while block := file.read(_BLOCK):
        if block.endswith(b"\r"):
            block += file.read(1)  # perhaps the LF of a CRLF
        if offset == 0 and not parts:
            _check_beginning(block, path)
        for line in block.splitlines(keepends=True):  # of bytes: at LF, CR and CRLF only
            parts.append(line)
            if line.endswith((b"\n", b"\r")):
                content, parts = b"".join(parts), []
                yield offset, content
                offset += len(content)
    if parts:
        yield offset, b"".join(parts)


def _check_beginning(block: bytes, path: Path) -> None:
    known = next((what for magic, what in _NO_TEXT.items() if block.startswith(magic)), None)
    encoding = json.detect_encoding(block).upper()  # by a byte order mark, or by zero bytes among the first four
    if known or not encoding.startswith("UTF-8"):
        raise _not_utf8(path, known or encoding)


def _decoded(content: bytes, offset: int, path: Path) -> str:
    try:
        text = content.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {offset + error.start + 1} is not UTF-8"
        raise _not_utf8(path, f"Latin-1 or Windows-1252, if it is text at all: {byte}") from error
    if "\0" in text:
        raise _not_utf8(path, "another encoding, if it is text at all: it holds zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(path: Path, encoding: str) -> DatasetError:
    return DatasetError(
        f"{printable(path)} is not in UTF-8 but in {encoding}; save it as UTF-8 in a text editor or a spreadsheet"
    )
