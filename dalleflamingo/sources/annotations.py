"""Readers of the formats in which caption data sets are published: COCO's, which NoCaps has too, and Karpathy's."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dalleflamingo.datasets import DOMAINS, Dataset, DatasetError, Example, distinct
from dalleflamingo.sources.text_files import load_json, shape_of, value_of

NOCAPS_HEADER = "nocaps_val_image_info.json"  # as published: addresses and licences, no captions and no domains
KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def open_coco(folder: Path, annotations: str, split: str | None) -> Dataset:
    """A data set in COCO's format whose images are in the folder's `images`; for the registry.

    Args:
        folder: of the data set.
        annotations: its annotation file, relative to the folder.
        split: the file's, or None.
    """
    return read_coco(folder / annotations, folder / "images")


def open_nocaps(folder: Path, annotations: str, split: None) -> Dataset:
    """NoCaps from its captions, its header (`NOCAPS_HEADER`), or both: then a record has the fields of both.

    From the header alone images have no captions and no domain, and a printed line says so.

    Args:
        folder: with the folder `images`.
        annotations: the name of the captions.
        split: None.
    Raises:
        DatasetError: as `read_coco`; or captions and header name different files for an image.
    """
    header, captions = folder / NOCAPS_HEADER, folder / annotations
    if not header.is_file():
        return open_coco(folder, annotations, split)
    records = _objects(load_json(header), "images", header)
    distinct([value_of(record, "id", int, header) for record in records], str(header), "image id")
    listed = {record["id"]: _example(record, folder / "images", {}, header) for record in records}
    if not captions.is_file():
        print(f"{header} holds no captions and no domains; if you need them, put {annotations} beside it")
        return Dataset(header.stem, tuple(listed.values()))
    found = open_coco(folder, annotations, split)
    for one in found:
        other = listed.get(one.image_id, one).path.name
        if one.path.name != other:
            raise DatasetError(
                f"image {one.image_id} is {one.path.name} in {captions} and {other} in {header}: are both of the same "
                "split? Fetch both again"
            )
    examples = (replace(one, extra=listed.get(one.image_id, one).extra | one.extra) for one in found)
    return replace(found, examples=tuple(examples))


def open_karpathy(folder: Path, annotations: str, split: str | None) -> Dataset:
    """A split of Karpathy's COCO, from its ground truth `coco_karpathy_{split}_gt.json` where the folder has that.

    Args:
        folder: with `train2014` and `val2014`.
        annotations: the name of `dataset_coco.json`.
        split: of `KARPATHY_SPLITS`.
    """
    ground_truth = folder / f"coco_karpathy_{split}_gt.json"
    if ground_truth.is_file():
        return read_coco(ground_truth, folder / "val2014")
    return read_karpathy(folder / annotations, folder, split)


def read_coco(annotations: Path, images: Path, name: str | None = None) -> Dataset:
    """COCO captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    NoCaps has the same format, with a `domain` in each image record. An image without annotations has no references.

    Args:
        annotations: the JSON file. Karpathy's `*_gt.json` names no image files; then their paths are
            `images/COCO_val2014_{id:012d}.jpg`, because both of his evaluation splits are from val2014.
        images: the folder that file names are relative to.
        name: the data set's name; by default the file's.
    Raises:
        DatasetError: not JSON, another format, a repeated id, a caption of an unlisted image, or a domain that is not
            one of `DOMAINS`.
    """
    path = Path(annotations)
    payload = load_json(path)
    records = _objects(payload, "images", path)
    references = _references(_objects(payload, "annotations", path), records, path)
    return Dataset(name or path.stem, tuple(_example(record, Path(images), references, path) for record in records))


def read_karpathy(dataset_json: Path, images: Path, split: str) -> Dataset:
    """Karpathy's file: `{"images": [{"cocoid", "filepath", "filename", "split", "sentences": [{"raw"}]}]}`.

    Args:
        dataset_json: `dataset_coco.json`, as published.
        images: the folder that holds `train2014` and `val2014`.
        split: "train" (its `train` and `restval`, 113,287 images in all), "val" or "test" (5,000 each).
    Raises:
        DatasetError: no such split, or as `read_coco`.
    """
    if split not in KARPATHY_SPLITS:
        raise DatasetError(f"Karpathy's splits are {', '.join(KARPATHY_SPLITS)}, not {split!r}")
    path, images = Path(dataset_json), Path(images)
    members = []
    for record in _objects(load_json(path), "images", path):
        if value_of(record, "split", str, path) in KARPATHY_SPLITS[split]:
            file = images / value_of(record, "filepath", str, path) / value_of(record, "filename", str, path)
            captions = (value_of(sentence, "raw", str, path) for sentence in _objects(record, "sentences", path))
            members.append(Example(value_of(record, "cocoid", int, path), file, tuple(captions)))
    return Dataset(f"{path.stem}/{split}", tuple(members))


def _example(record: dict, images: Path, references: Mapping[int, list[str]], path: Path) -> Example:
    image_id = record["id"]
    named = "file_name" in record
    file_name = value_of(record, "file_name", str, path) if named else f"COCO_val2014_{image_id:012d}.jpg"
    domain = record.get("domain")
    if domain is not None and domain not in DOMAINS:
        raise DatasetError(f"{path}: image {image_id} has domain {domain!r}; expected {', '.join(DOMAINS)} or none")
    extra = {key: value for key, value in record.items() if key not in ("id", "file_name", "domain")}
    return Example(image_id, images / file_name, tuple(references.get(image_id, ())), domain, extra)


def _references(captions: list[dict], images: list[dict], path: Path) -> dict[int, list[str]]:
    """{image_id: its captions in file order}, after checking that every caption belongs to a listed image."""
    listed = distinct([value_of(image, "id", int, path) for image in images], str(path), "image id")
    distinct(
        [value_of(caption, "id", int, path) for caption in captions if "id" in caption], str(path), "annotation id"
    )
    references = defaultdict(list)
    for caption in captions:
        image_id = value_of(caption, "image_id", int, path)
        if image_id not in listed:
            raise DatasetError(
                f"{path}: the caption {value_of(caption, 'caption', str, path)!r} is of image {image_id}, which is not "
                f'among the {len(listed)} under "images": list the image or remove the caption'
            )
        references[image_id].append(value_of(caption, "caption", str, path))
    return references


def _objects(payload, key: str, path: Path) -> list[dict]:
    """payload[key], checked to be a list of objects."""
    records = payload.get(key) if isinstance(payload, dict) else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DatasetError(
            f'{path} holds {shape_of(payload)}; expected an object whose "{key}" is a list of objects: '
            "is it for another reader (read_coco, read_karpathy, caption_results.read_results)?"
        )
    return records
