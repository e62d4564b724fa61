"""Text and JSON files, read with errors that name the file, what is wrong with it and the remedy."""

import json
from pathlib import Path

from dalleflamingo.datasets import DatasetError
from dalleflamingo.runs import printable


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
