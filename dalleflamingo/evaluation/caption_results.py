"""Captions of a whole data set, and predictions in the format of COCO results: what is exchanged and evaluated."""

import json
from collections.abc import Mapping
from pathlib import Path

from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import Dataset, DatasetError, distinct
from dalleflamingo.runs import write_whole
from dalleflamingo.sources.text_files import load_json, shape_of, value_of


def describe_dataset(captioner: Captioner, dataset: Dataset, batch_size: int = 32) -> dict[int, str]:
    """Image id -> caption by beam search, for every image of a data set; errors as `Dataset.open`."""
    captions = []
    for start in range(0, len(dataset), batch_size):
        captions += captioner.describe([dataset.open(example) for example in dataset[start : start + batch_size]])
    return {example.image_id: caption for example, caption in zip(dataset, captions, strict=True)}


def read_results(path: Path) -> dict[int, str]:
    """COCO results JSON, `[{"image_id", "caption"}]`, as {image_id: caption}.

    Raises:
        DatasetError: not JSON, another format, or two captions for one image.
    """
    path = Path(path)
    payload = load_json(path)
    if not isinstance(payload, list) or not all(isinstance(record, dict) for record in payload):
        raise DatasetError(
            f"{path} holds {shape_of(payload)}; expected COCO results, a list of objects with image_id and caption: "
            "references are read by read_coco"
        )
    distinct([value_of(record, "image_id", int, path) for record in payload], str(path), "image_id")
    return {record["image_id"]: value_of(record, "caption", str, path) for record in payload}


def write_results(path: Path, captions: Mapping[int, str]) -> None:
    """Write {image_id: caption} as COCO results JSON, replacing an older file; a missing folder is created."""
    results = [{"image_id": int(image_id), "caption": caption} for image_id, caption in captions.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # ASCII escapes, since captions may contain characters that UTF-8 cannot encode
    write_whole(Path(path), lambda part: part.write_text(json.dumps(results), encoding="ascii"))
