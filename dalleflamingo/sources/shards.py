"""webdataset shards: tar files in which members of one key are a sample, such as 000123.jpg with 000123.txt.

Shards that come in are unpacked beside a run, images as files and the rest as a table that `read_pairs` and
`read_captions` read from the disk: a run opens its images again and again and keeps many more generated ones. What goes
out is written by `write_shards`. The library `webdataset` does the reading and writing of samples.
"""

import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from urllib.parse import quote

from tqdm.auto import tqdm

from dalleflamingo.datasets import Dataset, DatasetError
from dalleflamingo.runs import hold, printable, write_whole
from dalleflamingo.sources.own_files import is_image, listed, opens, read_captions, read_pairs
from dalleflamingo.sources.records import CAPTION_COLUMNS, IMAGE_COLUMNS, Record, captions_in, has_captions
from dalleflamingo.sources.text_files import shape_of

PER_SHARD = 10_000  # samples in a shard that is written
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "img", "image")  # in the order of preference
_BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError)  # of a file that cannot be read or unpacked to its end
_LONGEST = 150  # of a file's name that is made of a key, in bytes


def is_shards(source: str | Path) -> bool:
    """Whether a path names shards: a tar file, a pattern such as photos-{000..099}.tar, or a folder that holds some
    and no image."""
    source = Path(source)
    if source.is_dir():
        is_tar = [path.name.endswith(SUFFIXES) for path in source.iterdir() if not path.name.startswith(".")]
        return any(is_tar) and not any(map(is_image, source.iterdir()))
    return source.name.endswith(SUFFIXES) or (source.is_file() and tarfile.is_tarfile(source))


def read_shards(shards: str | Path, folder: str | Path, captions: bool = False) -> Dataset:
    """Unpack shards into a folder, once, and read them from there.

    A sample's image is its member .jpg, .jpeg, .png, .webp or another that Pillow opens; its caption is .txt, or the
    key caption, captions or text of .json, whose image_id, a whole number, is the image's id. The other values of
    .json, and the class of .cls, are the example's `extra`. Samples that lack what is read are left out, and a printed
    line names them. No member is written outside of the folder, whatever its name.

    Args:
        shards: a tar file, also compressed by gzip; a folder of them; or a pattern with braces, {000..099}.
        folder: gets the images and the table; nothing is unpacked again while the shards stay the same.
        captions: read captions without images, for text → image → text; images are then not unpacked.
    Raises:
        ImportError: `webdataset` is not installed.
        DatasetError: there is no shard, one is cut short or holds two members of one name, a text is not UTF-8 or
            not JSON, or no sample holds what is read.
    """
    paths, folder = _paths(shards), Path(folder)
    kind = "captions" if captions else "images"
    table, note = folder / f"{kind}.jsonl", folder / f"{kind}.json"
    unpacked = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    with hold(folder):
        if not (table.is_file() and note.is_file() and json.loads(note.read_text(encoding="ascii")) == unpacked):
            note.unlink(missing_ok=True)
            write_whole(table, lambda part: _unpack(paths, folder, part, captions))
            write_whole(note, lambda part: part.write_text(json.dumps(unpacked), encoding="ascii"))
    found = read_captions(table) if captions else read_pairs(table)
    return replace(found, name=printable(_stem(Path(shards).resolve())))


def write_shards(folder: str | Path, samples: Iterable[Mapping[str, object]], per_shard: int = PER_SHARD) -> list[Path]:
    """Write samples as shards `00000.tar`, `00001.tar`, …, the same bytes for the same samples.

    Args:
        folder: new or empty; it appears when all shards are complete.
        samples: {"__key__": name, suffix: value}: bytes as they are, a `str` as UTF-8, JSON values under "json".
        per_shard: samples in a shard.
    Raises:
        ImportError: `webdataset` is not installed. DatasetError: the folder holds files.
    """
    samples, number = iter(samples), 0
    with new_folder(folder) as part:
        while first := next(samples, None):
            with open(part / f"{number:05d}.tar", "wb") as file, _webdataset().TarWriter(file, mtime=0) as shard:
                for sample in chain([first], islice(samples, per_shard - 1)):
                    shard.write(dict(sample))
            number += 1
    return sorted(Path(folder).glob("*.tar"))


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write to that gets its name when it is complete; what an interrupted call left is written again.

    Raises:
        DatasetError: there is a folder with files, or a file, of that name.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DatasetError(f"{printable(folder)} is there and holds files: give another folder, or delete it")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    os.replace(part, folder)


def _webdataset():
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("shards need the library webdataset: pip install 'webdataset>=1.0'") from error
    return webdataset


def _paths(shards: str | Path) -> list[Path]:
    shown = printable(shards)
    if os.path.isdir(shards):
        paths = sorted(path for path in Path(shards).iterdir() if path.name.endswith(SUFFIXES))
    elif "{" in str(shards) and not os.path.exists(shards):
        _webdataset()
        from braceexpand import UnbalancedBracesError, braceexpand  # comes with webdataset

        try:
            paths = [Path(path) for path in braceexpand(str(shards))]
        except UnbalancedBracesError as error:
            raise DatasetError(f"{shown} is not a pattern such as photos-{{000..099}}.tar: close the brace") from error
    else:
        paths = [Path(shards)]
    if not paths:
        raise DatasetError(f"{shown} holds no shards: put files into it that end in {', '.join(SUFFIXES)}")
    for path in paths:
        _check_whole(path)
    twice = [name for name, count in Counter(map(_stem, paths)).items() if count > 1]
    if twice:
        raise DatasetError(
            f"{shown}: two shards are called {twice[0]}: rename one, its name is part of the images' ids"
        )
    return paths


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(end) for end in SUFFIXES if path.name.endswith(end)), path.name)


def _check_whole(path: Path) -> None:
    """Refuse what is no tar file, and one that is damaged where readers would take the damage for the end."""
    shown = printable(path)
    if not path.is_file():
        raise DatasetError(f"there is no shard {shown}: check the path, or the pattern")
    try:
        shard = tarfile.open(path)
    except (tarfile.TarError, *_BROKEN) as error:
        size = path.stat().st_size
        raise DatasetError(
            f"{shown} ({size:,} bytes) is not a tar file, or cut short: fetch it again, or make it with tar"
        ) from error
    try:
        with shard:
            while shard.next():
                shard.members = []  # which would otherwise hold all headers
            shard.fileobj.seek(shard.offset)
            if shard.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no member and no end at byte {shard.offset}")
            while shard.fileobj.read(1 << 20):
                pass  # to the checksum of a compressed file
    except (tarfile.TarError, *_BROKEN) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> DatasetError:
    return DatasetError(f"the shard {printable(path)} is cut short or damaged ({reason}): fetch it again")


def _samples(path: Path) -> Iterator[dict]:
    """The samples of a shard: `__key__`, and the bytes of each suffix."""
    base_plus_ext, seen = _webdataset().tariterators.base_plus_ext, set()

    def members(file) -> Iterator[dict]:
        for member in _webdataset().tariterators.tar_file_iterator(file):
            key, suffix = base_plus_ext(member["fname"])
            if key is not None:
                name = f"{key}.{suffix.lower()}"
                if name in seen:
                    raise DatasetError(
                        f"the shard {printable(path)} holds two members {printable(name)}: make it again"
                    )
                seen.add(name)
                yield member | {"__url__": str(path)}

    keys = set()
    try:
        with open(path, "rb") as file:
            for sample in _webdataset().tariterators.group_by_keys(members(file)):
                key = sample["__key__"].removeprefix("./")
                if key in keys:
                    raise DatasetError(
                        f"the shard {printable(path)} holds the members of {printable(key)} apart from each other: "
                        "make it again, as with tar --sort=name"
                    )
                keys.add(key)
                yield sample | {"__key__": key}
    except (tarfile.TarError, *_BROKEN) as error:
        raise _damaged(path, str(error).partition(" @ ")[0]) from error


def _unpack(paths: list[Path], folder: Path, table: Path, captions: bool) -> None:
    """Write the table of all samples, and their images unless only captions are wanted."""
    left_out = defaultdict(list)
    written = 0
    with open(table, "w", encoding="ascii") as lines:
        for path in tqdm(paths, "unpacking", unit="shard", disable=len(paths) < 2):
            for sample in _samples(path):
                where = f"{_stem(path)}/{sample['__key__']}"
                value = _values(sample, f"{printable(path)}, sample {printable(sample['__key__'])}")
                reason = "no caption" if captions and not has_captions(Record(value, where, 0, 0)) else ""
                if not captions:
                    value["image"], reason = _save_image(sample, _stem(path), folder)
                if reason:
                    left_out[reason].append(printable(where))
                else:
                    written += 1
                    lines.write(json.dumps(value) + "\n")
    others = "; ".join(f"{listed(names)} ({len(names)}: {reason})" for reason, names in left_out.items())
    if not written:
        what = "with a caption (.txt, or .json with a caption)" if captions else "with an image (.jpg, .png, …)"
        raise DatasetError(f"{printable(paths[0])} holds no sample {what} but {others or 'no samples at all'}")
    if others:
        print(f"{len(paths)} shards: samples: {written}; left out: {others}")


def _values(sample: Mapping[str, bytes], where: str) -> dict:
    """What a row of the table holds of a sample, but for the image."""
    value = {}
    if "json" in sample:
        try:
            value = json.loads(_text(sample["json"], f"{where}.json"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{where}.json is not JSON ({error}): mend it, or leave it out") from error
        if not isinstance(value, dict):
            raise DatasetError(f"{where}.json is {shape_of(value)}; expected an object, perhaps with a caption")
        value = {name: each for name, each in value.items() if name not in IMAGE_COLUMNS and each is not None}
    if "txt" in sample:
        value = {name: each for name, each in value.items() if name not in CAPTION_COLUMNS}
        if caption := _text(sample["txt"], f"{where}.txt").strip():
            value["caption"] = caption
    elif has_captions(record := Record(value, f"{where}.json", 0, 0)):
        captions_in(record)  # raises where they are wrong
    if "cls" in sample:
        value["class"] = _text(sample["cls"], f"{where}.cls").strip()
    return value


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where} is not in UTF-8 (byte {error.start + 1}): write it in UTF-8") from error


def _save_image(sample: Mapping[str, bytes], shard: str, folder: Path) -> tuple[str, str]:
    """The image's path in the folder, and why it was left out, or nothing."""
    suffix = next((suffix for suffix in _IMAGES if suffix in sample), None)
    if suffix is None:
        return "", "no image"
    if not opens(io.BytesIO(sample[suffix])):
        return "", "no format that Pillow opens"
    name = f"images/{_file_name(shard)}/{_file_name(sample['__key__'])}.{suffix}"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_bytes(sample[suffix]))
    return name, ""


def _file_name(key: str) -> str:
    """A name of a file, which leads nowhere else, of any key; different ones for different keys."""
    content = key.encode("utf-8", "surrogateescape")
    name = quote(content, safe=" ")
    if len(name) > _LONGEST or name.strip(".") != name:
        name = f"{name[:_LONGEST].strip('.')}-{hashlib.blake2b(content, digest_size=8).hexdigest()}"
    return name
