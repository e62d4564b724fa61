"""Writes examples as the COCO caption files that `datasets` reads."""

import json
from collections.abc import Iterable
from pathlib import Path

from dalleflamingo.datasets import Example


def write_coco(path: Path, examples: Iterable[Example], images: Path | None = None) -> Path:
    """File names are relative to the folder `images`; without one, they are names alone."""
    records, annotations = [], []
    for example in examples:
        file_name = example.path.relative_to(images).as_posix() if images else example.path.name
        domain = {} if example.domain is None else {"domain": example.domain}
        records.append({"id": example.image_id, "file_name": file_name, **domain, **example.extra})
        for caption in example.references:
            annotations.append({"id": len(annotations), "image_id": example.image_id, "caption": caption})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": records, "annotations": annotations}))
    return path
