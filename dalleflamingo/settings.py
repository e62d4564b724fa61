"""What a setting may be: one place checks types and ranges, for files, command lines and notebooks alike.

A dataclass of settings writes the range of a field into its annotation, as in `steps: Count`, and calls `check` in its
`__post_init__`, so that a run with a wrong setting is refused before anything is computed or written. pydantic compares
strictly: "8", 8.0 and true are no integers, and an integer is a number. NaN and infinity lie outside every range.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

Settings = TypeVar("Settings")
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what numpy, torch and a column of int64 all take
Side = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]  # of an image, in pixels; an autoencoder divides it by 8
GuidanceScale = Annotated[float, Field(ge=0, le=1000)]  # up to 1 diffusers leaves guidance out


def check(settings: object) -> None:
    """Compare every field of a dataclass with its annotation.

    Raises:
        ValueError: fields have another type or lie outside their range; the message names each with its value.
    """
    problems = []
    for name, adapter in _adapters(type(settings)).items():
        try:
            adapter.validate_python(getattr(settings, name), strict=True)
        except ValidationError as error:
            for one in error.errors(include_url=False):
                where = ".".join([name, *map(str, one["loc"])])
                problems.append(f"{where} = {reprlib.repr(one['input'])}: {one['msg'].replace('Input', 'it', 1)}")
    if problems:
        raise ValueError("; ".join(problems))


@cache
def _adapters(kind: type) -> dict[str, TypeAdapter]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(kind)}


def from_mapping(kind: type[Settings], named: object) -> Settings:
    """A dataclass that calls `check`, from a mapping of fields that a user has named, as in a file.

    Raises:
        ValueError: it is no mapping, names an unknown field or lacks a necessary one, or as `check`.
    """
    known = [field.name for field in fields(kind)]
    if not isinstance(named, Mapping):
        raise ValueError(f"{reprlib.repr(named)} should be an object with some of the fields {', '.join(known)}")
    if unknown := [name for name in named if name not in known]:
        raise ValueError(f"there is no field {unknown[0]!r}; the fields are {', '.join(known)}")
    try:
        return kind(**named)
    except TypeError as error:
        raise ValueError(f"{str(error).partition('() ')[2]}; the fields are {', '.join(known)}") from error
