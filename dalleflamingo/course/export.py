"""What leaves a run of `reconstruct`: a page to look at, captions for an evaluation server, shards of images."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa

from dalleflamingo.commands.parsers import command_parser, nonempty_path
from dalleflamingo.course.gallery import generated_image, write_gallery
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.caption_results import write_results
from dalleflamingo.evaluation.similarities import similarities_among
from dalleflamingo.reconstruct import ImageTextImage, TextImageText, rank, select
from dalleflamingo.runs import RunFolderError, printable
from dalleflamingo.sources.inputs import read_source, recall
from dalleflamingo.sources.shards import write_shards


def main(arguments: list[str]) -> int:
    """Make a page, COCO results or shards of a finished run."""
    parser = command_parser("export", main.__doc__)
    parser.add_argument("run", type=nonempty_path, help="the run folder that was given to reconstruct as --out")
    parser.add_argument("--by", metavar="SIMILARITY", help="that ranks the candidates; default: the run's first one")
    page = "new folder for a page of all inputs with their ranked candidates"
    parser.add_argument("--gallery", type=nonempty_path, metavar="DIR", help=page)
    results = "JSON of the caption ranked first for each image, as the servers of COCO and NoCaps take it"
    parser.add_argument("--coco-results", type=nonempty_path, metavar="FILE", help=results)
    shards = "new folder for webdataset shards of all generated images"
    parser.add_argument("--shards", type=nonempty_path, metavar="DIR", help=shards)
    moved = "for the page: where the input images are now, if they were moved"
    parser.add_argument("--source", type=nonempty_path, help=moved)
    parser.add_argument("--image-folder", type=nonempty_path, metavar="DIR", help="of that source, as for reconstruct")
    options = parser.parse_args(arguments)
    if not (options.gallery or options.coco_results or options.shards):
        parser.error("name what to make: --gallery DIR, --coco-results FILE or --shards DIR")

    table = read_run(options.run)
    by = chosen_similarity(table, options.by)
    skipped = _skipped(options.run)
    if options.coco_results:
        captions = coco_results(table, by)
        write_results(options.coco_results, captions)
        print(f"{printable(options.coco_results)}: {len(captions)} captions, one an image, ranked first by {by}")
        if skipped:
            print(f"{len(skipped)} images could not be read and have no caption: a server refuses a split without them")
    if options.shards:
        paths = write_shards(options.shards, samples(table, by, options.run))
        print(f"{printable(options.shards)}: {len(table)} generated images in {len(paths)} shards")
    if options.gallery:
        images = None if "recovered" in table else _input_images(options)
        write_gallery(options.gallery, table, options.run, by, images, skipped)
        print(f"{printable(options.gallery / 'index.html')}: open it in a browser; the folder is complete in itself")
    return 0


def _input_images(options: argparse.Namespace) -> Dataset | None:
    if options.source is None:
        return recall(options.run)
    return read_source(options.source, "images", options.image_folder, options.run)[0]


def _skipped(run_folder: Path) -> list[dict]:
    """The inputs that the run could not read."""
    path = run_folder / "skipped.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [{name: str(one[name]) for name in ("image_id", "path", "reason")} for one in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{printable(path)} is missing or damaged ({error}): give the command reconstruct again"
        ) from error


def read_run(run_folder: Path) -> pd.DataFrame:
    """The candidate table of a finished run. Raises RunFolderError: it is no run, not finished, or damaged."""
    path, shown = Path(run_folder) / "candidates.parquet", printable(run_folder)
    if not path.is_file():
        if (Path(run_folder) / "run.json").is_file():
            raise RunFolderError(f"the run in {shown} is not finished: give its command reconstruct again, it goes on")
        raise RunFolderError(f"{shown} holds no run: give the folder that reconstruct got as --out")
    try:
        table = pd.read_parquet(path)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise RunFolderError(
            f"{printable(path)} is damaged ({error}): delete it and give the command reconstruct again"
        ) from error
    columns = TextImageText.columns if "recovered" in table else ImageTextImage.columns
    if missing := [name for name in columns if name not in table]:
        raise RunFolderError(f"{printable(path)} lacks the columns {', '.join(missing)}: is it a table of reconstruct?")
    return table


def chosen_similarity(table: pd.DataFrame, by: str | None) -> str:
    """The similarity of that name, or the first of the table. Raises ValueError: there is none."""
    there = similarities_among(table)
    if not there or by not in (None, *there):
        raise ValueError(f"the run has no similarity {by or 'at all'}: it has {', '.join(there) or 'none'}")
    return by or there[0]


def coco_results(table: pd.DataFrame, by: str) -> dict[int, str]:
    """Image id -> the caption ranked first by a similarity, for every image of a run image → text → image.

    Raises:
        ValueError: the run is of captions.
    """
    if "recovered" in table:
        raise ValueError("the run is text → image → text: COCO results hold captions of images, so export another run")
    best = select(table, by)
    return dict(zip(best["image_id"].tolist(), best["caption"], strict=True))


def samples(table: pd.DataFrame, by: str, run_folder: Path) -> Iterator[dict]:
    """A sample of each generated image: png, txt (the caption that it was generated from) and json (its row).

    In json, `source_id` is the id of the input, because several generated images have it in common.

    Args:
        table: of candidates.
        by: the similarity that gives the `rank` in json.
        run_folder: where the table's image paths start.
    Raises:
        DatasetError: a generated image is missing.
    """
    for row in rank(table, by).to_dict("records"):
        path = generated_image(run_folder, row["image"])
        values = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in row.items()}
        values["source_id"] = values.pop("image_id")
        del values["image"]
        yield {
            "__key__": f"{row['image_id']:012d}-{row['digest']}-{row['candidate']:02d}",
            "png": path.read_bytes(),
            "txt": row["caption"].encode("utf-8", "replace"),
            "json": json.dumps(values).encode(),
        }
