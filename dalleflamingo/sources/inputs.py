"""What the command `reconstruct` is given: a folder of images, a file of captions, a table of both, or shards."""

import json
from pathlib import Path

from dalleflamingo.datasets import Dataset, DatasetError
from dalleflamingo.runs import printable, write_whole
from dalleflamingo.sources.own_files import holds, read_captions, read_folder, read_pairs
from dalleflamingo.sources.shards import is_shards, read_shards

_SHARDS = "shards"  # in the run folder: what was unpacked
STARTS = ("images", "captions")
_RECORD = "source.json"  # in the run folder: where its images are, for pages that show them


def read_source(source: Path, start: str | None, images: Path | None, run_folder: Path) -> tuple[Dataset, str]:
    """The user's own data set, and which of `STARTS` a journey begins with.

    Args:
        source: a folder of images; a file of captions, or of images with captions; shards.
        start: one of `STARTS`; None: what there is, and where there is both, the captions of a file and the images of
            shards.
        images: the folder that image paths in a file are relative to; None: the file's own.
        run_folder: where shards are unpacked to.
    Raises:
        DatasetError: as the readers, or the source does not hold what the journey should begin with.
    """
    if is_shards(source):
        start = start or "images"
        return read_shards(source, run_folder / _SHARDS, captions=start == "captions"), start
    if source.is_dir():
        if start == "captions":
            raise DatasetError(f"{printable(source)} is a folder of images: give a file of captions, or --from images")
        return read_folder(source), "images"
    has_images, has_captions = holds(source)
    if has_images and has_captions and start is None:
        print(
            f"{printable(source)} holds images and captions: begins with the captions; --from images: with the images"
        )
    start = start or ("images" if has_images and not has_captions else "captions")
    return (read_captions(source) if start == "captions" else read_pairs(source, images)), start


def remember(run_folder: Path, source: Path, images: Path | None) -> None:
    """Note in a run folder where its input images are."""
    record = {"source": str(Path(source).absolute()), "images": images and str(Path(images).absolute())}
    write_whole(Path(run_folder) / _RECORD, lambda part: part.write_text(json.dumps(record) + "\n", encoding="ascii"))


def recall(run_folder: Path) -> Dataset | None:
    """The input images of a run that `remember` has noted; None where they are not noted, or not there any more."""
    unpacked = Path(run_folder) / _SHARDS / "images.jsonl"
    try:
        if unpacked.is_file():
            return read_pairs(unpacked)
        record = json.loads((Path(run_folder) / _RECORD).read_text(encoding="ascii"))
        images = record["images"] and Path(record["images"])
        return read_source(Path(record["source"]), "images", images, Path(run_folder))[0]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"the page shows no input images, because they are not found ({printable(error)}): name them by --source")
        return None
