"""Data sets that stay in their file: an example is read when it is asked for, so a million captions need no memory.

In memory are its position in the file and its id: about 40 bytes a caption, and twice as many while a file is indexed.
Indexing goes through the whole file once, so every line that is wrong is named before a run begins.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dalleflamingo.datasets import DOMAINS, Dataset, DatasetError, Example
from dalleflamingo.runs import printable
from dalleflamingo.sources.records import (
    CAPTION_COLUMNS,
    ID_COLUMN,
    IMAGE_COLUMNS,
    Json,
    Record,
    Records,
    captions_in,
    has_captions,
    id_in,
    image_in,
)

_READ = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, ID_COLUMN}  # columns that become fields of an example; others are its extra


class StreamedDataset(Dataset):
    """A `Dataset` whose `examples` are read when they are asked for; those of a slice, too, but not of a `filter`."""

    def __post_init__(self):
        pass  # the ids were found to be distinct when the file was indexed


@dataclass(frozen=True)
class StreamedExamples(Sequence[Example]):
    """Examples of a file of records, by their positions; `chosen` are those of a slice."""

    records: Records
    offsets: np.ndarray  # (R,) of the records, in bytes
    lengths: np.ndarray  # (R,)
    ids: np.ndarray  # (N,) of the examples
    chosen: range

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return replace(self, chosen=self.chosen[index])
        with self._opened() as file:
            return self._example(file, self.chosen[index])

    def __iter__(self) -> Iterator[Example]:
        with self._opened() as file:
            for i in self.chosen:
                yield self._example(file, i)

    def _opened(self):
        if isinstance(self.records, Json):
            return nullcontext()
        try:
            return open(self.records.path, "rb")
        except OSError as error:
            raise self.records.changed() from error

    def _record(self, file, number: int) -> Record:
        offset, length = int(self.offsets[number]), int(self.lengths[number])
        return Record(self.records.read(file, offset, length), self.records.shown, offset, length)

    def _example(self, file, i: int) -> Example:
        raise NotImplementedError


@dataclass(frozen=True)
class StreamedCaptions(StreamedExamples):
    """Examples of a caption each, without image."""

    numbers: np.ndarray  # (N,) of an example's record
    among: np.ndarray  # (N,) which of its record's captions it is
    repeats: np.ndarray  # (N,) how often the same caption came before; a caption's id depends on that

    @staticmethod
    def of(records: Records) -> "StreamedCaptions":
        """Index the captions of a file. Raises DatasetError where a record is wrong, or two ids are equal."""
        offsets, lengths, keys, numbers, among = array("q"), array("q"), array("q"), array("q"), array("i")
        for record in records:
            for k, caption in enumerate(captions_in(record)):
                keys.append(stable_id("caption", caption, 0))
                numbers.append(len(offsets))
                among.append(k)
            offsets.append(record.offset)
            lengths.append(record.length)
        ids, positions = _numpy(keys), (_numpy(numbers), _numpy(among))
        repeats = _earlier(ids)
        found = StreamedCaptions(records, _numpy(offsets), _numpy(lengths), ids, range(len(ids)), *positions, repeats)
        with found._opened() as file:
            for i in np.flatnonzero(repeats):
                found.ids[i] = stable_id("caption", found._caption(file, i), int(repeats[i]))
        check_distinct(found.ids, records.shown)
        return found

    def _caption(self, file, i: int) -> str:
        captions = captions_in(self._record(file, self.numbers[i]))
        if self.among[i] >= len(captions):
            raise self.records.changed()
        return captions[self.among[i]]

    def _example(self, file, i: int) -> Example:
        caption = self._caption(file, i)
        if stable_id("caption", caption, int(self.repeats[i])) != self.ids[i]:
            raise self.records.changed()
        return Example(int(self.ids[i]), self.records.path, (caption,))


@dataclass(frozen=True)
class StreamedPairs(StreamedExamples):
    """Examples of an image each, with the captions of all records that name it."""

    folder: Path  # that the images' paths are relative to
    root: Path  # the same, from the file system's root
    order: np.ndarray  # (R,) numbers of the records, those of one image beside each other
    starts: np.ndarray  # (N + 1,) where an image's records begin in `order`

    @staticmethod
    def of(records: Records, folder: Path) -> "StreamedPairs":
        """Index the images of a file, in the order in which they are first named.

        Raises:
            DatasetError: a record is wrong or names no image, an image lies outside the folder, or one id stands for
                two images, or two ids for one.
        """
        offsets, lengths, keys, ids = array("q"), array("q"), array("q"), array("q")
        root = Path(os.path.abspath(folder))
        for record in records:
            name = named_image(record, root)
            if has_captions(record):
                captions_in(record)  # raises where they are wrong
            own = id_in(record)
            offsets.append(record.offset)
            lengths.append(record.length)
            keys.append(stable_id("picture", name))
            ids.append(-1 if own is None else own)
        keys, ids = _numpy(keys), _numpy(ids)
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        lead = first[group]  # (R,) the first record of the same image
        order = np.argsort(lead, kind="stable")
        starts = np.flatnonzero(np.diff(lead[order], prepend=-1, append=len(lead)))
        for number in np.flatnonzero((ids >= 0) & (ids != ids[lead]))[:1]:
            raise DatasetError(
                f"{records.shown}: record {number + 1} gives an image the {ID_COLUMN} {ids[number]}, and record "
                f"{lead[number] + 1} gives the same image {'none' if ids[lead[number]] < 0 else ids[lead[number]]}: "
                "an image has one id, write the same into both"
            )
        own = np.where(ids < 0, keys, ids)[lead[order[starts[:-1]]]]
        check_distinct(own, records.shown)
        return StreamedPairs(
            records, _numpy(offsets), _numpy(lengths), own, range(len(own)), Path(folder), root, order, starts
        )

    def _example(self, file, i: int) -> Example:
        found = [self._record(file, number) for number in self.order[self.starts[i] : self.starts[i + 1]]]
        names = {named_image(record, self.root) for record in found}
        name, own = min(names), id_in(found[0])
        if len(names) > 1 or (stable_id("picture", name) if own is None else own) != self.ids[i]:
            raise self.records.changed()
        captions = tuple(caption for record in found if has_captions(record) for caption in captions_in(record))
        extra = {key: value for key, value in found[0].value.items() if key not in _READ}
        domain = extra.pop("domain") if extra.get("domain") in DOMAINS else None
        return Example(int(self.ids[i]), self.folder / name, captions, domain, extra)


def named_image(record: Record, root: Path) -> str:
    """The path of a record's image, relative to the folder of the images, in one spelling.

    Raises:
        DatasetError: the record names none, or one that is an address or outside the folder `root`.
    """
    name = image_in(record)
    if name is None:
        raise DatasetError(
            f"{record.where} names no image: expected a column or key {', '.join(IMAGE_COLUMNS[:3])} with a path"
        )
    if "://" in name:
        raise DatasetError(f"{record.where}: the image {printable(name)} is an address: download it, name the file")
    path = os.path.normpath(os.path.join(root, name))
    relative = os.path.relpath(path, root)
    if relative == os.curdir or relative.split(os.sep, 1)[0] == os.pardir:
        raise DatasetError(
            f"{record.where}: the image {printable(name)} is not inside the folder {printable(root)}: name the folder "
            "that holds all images (--image-folder, or images= in Python)"
        )
    return Path(relative).as_posix()


def stable_id(*parts: int | str) -> int:
    """An id in [0, 2**63) from strings and whole numbers, the same on every machine.

    Among a million ids two are equal with a probability of 5 in 100 million.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_distinct(ids: np.ndarray, where: str) -> None:
    """Raises DatasetError where two of (N,) ids are equal; needs a few bytes for each, where `distinct` needs many."""
    ordered = np.sort(ids)
    for twice in ordered[1:][ordered[1:] == ordered[:-1]][:1]:
        raise DatasetError(
            f"{where}: image id {twice} occurs {int((ids == twice).sum())} times: an id names one thing, remove the "
            "copies"
        )


def _earlier(keys: np.ndarray) -> np.ndarray:
    """(N,) how many equal keys come before each one."""
    order = np.argsort(keys, kind="stable")
    begins = np.diff(keys[order], prepend=keys[order[:1]] - 1) != 0
    counts = np.arange(len(keys), dtype=np.int32)
    counts -= np.maximum.accumulate(np.where(begins, counts, 0))
    found = np.empty_like(counts)
    found[order] = counts
    return found


def _numpy(values: array) -> np.ndarray:
    """The numbers without a copy."""
    return np.frombuffer(values, values.typecode) if values else np.empty(0, values.typecode)
