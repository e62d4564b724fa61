"""The gallery of the site's front page: both journeys on a few inputs, all candidates ranked, in docs/figures/gallery.

    gallery.json   the inputs with their candidates, the best first, and what made them
    *.png          the images that it names, each as large as the models see it

Inputs are those whose candidates differ most in similarity. How good the candidates are plays no part in the choice.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from dalleflamingo.course.show import label
from dalleflamingo.datasets import Dataset, open_image
from dalleflamingo.miniature.scene_graph import Scene, scene_graph_f1
from dalleflamingo.reconstruct import JourneySettings, rank
from dalleflamingo.research.pages import current_commit
from dalleflamingo.runs import write_whole

IMAGES, TEXTS = 3, 2  # inputs of the two journeys that are shown
COMMAND, PROFILE = "python -m dalleflamingo research figures", "mini"


def widest(table: pd.DataFrame, by: str, count: int) -> list[int]:
    """The ids of the inputs whose candidates spread widest in similarity, the widest first.

    Args:
        table: of candidates.
        by: the similarity, a column of it.
        count: of inputs.
    """
    spread = table.groupby("image_id")[by].agg(lambda values: values.max() - values.min())
    return spread.nlargest(count).index.tolist()


def image_inputs(dataset: Dataset, table: pd.DataFrame, run_folder: Path, by: str, folder: Path) -> list[dict]:
    """Image → text → image: the inputs of the gallery; their images are copied to `folder`.

    Args:
        dataset: with scenes.
        table: of `reconstruct.image_text_image`.
        run_folder: where its image paths start.
        by: the similarity that ranks.
        folder: of the gallery.
    """
    inputs, examples = [], {example.image_id: example for example in dataset}
    for image_id in widest(table, by, IMAGES):
        example, rows = examples[image_id], _ranked(table, image_id, by)
        scenes = [Scene.from_dict(example.extra["scene"])] * len(rows)
        quality = scene_graph_f1(rows["caption"], scenes)
        source = _copy(example.path, folder, f"image-{image_id}-input")
        candidates = [
            _candidate(row, row["caption"], by, run_folder, folder) | {"f1": round(float(value), 2)}
            for row, value in zip(rows.to_dict("records"), quality, strict=True)
        ]
        inputs.append({"image": source, "text": example.references[0], "candidates": candidates})
    return inputs


def text_inputs(table: pd.DataFrame, run_folder: Path, by: str, folder: Path) -> list[dict]:
    """Text → image → text: the inputs of the gallery; their images are copied to `folder`.

    Args:
        table: of `reconstruct.text_image_text`.
        run_folder: where its image paths start.
        by: the similarity that ranks.
        folder: of the gallery.
    """
    inputs = []
    for image_id in widest(table, by, TEXTS):
        rows = _ranked(table, image_id, by).to_dict("records")
        candidates = [_candidate(row, row["recovered"], by, run_folder, folder) for row in rows]
        inputs.append({"text": rows[0]["caption"], "candidates": candidates})
    return inputs


def write(folder: Path, settings: JourneySettings, by: Sequence[str], images: list[dict], texts: list[dict]) -> None:
    """Write gallery.json.

    Args:
        folder: of the gallery.
        settings: of both journeys.
        by: the similarities that rank images and texts.
        images: of `image_inputs`.
        texts: of `text_inputs`.
    """
    ranked = {"images": label(by[0]), "texts": label(by[1])}
    made = {"command": COMMAND, "commit": current_commit(), "profile": PROFILE}
    content = {**made, **vars(settings), "ranked_by": ranked, "image_text_image": images, "text_image_text": texts}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / "gallery.json", lambda part: part.write_text(text, encoding="utf-8"))


def _ranked(table: pd.DataFrame, image_id: int, by: str) -> pd.DataFrame:
    own = rank(table, by)
    return own[own["image_id"] == image_id].sort_values("rank", kind="stable")


def _candidate(row: dict, text: str, by: str, run_folder: Path, folder: Path) -> dict:
    name = f"{Path(run_folder).name}-{row['image_id']}-{row['rank']}"
    return {
        "image": _copy(Path(run_folder) / row["image"], folder, name),
        "text": text,
        "similarity": round(float(row[by]), 3),
    }


def _copy(path: Path, folder: Path, name: str) -> str:
    image = open_image(path)
    write_whole(folder / f"{name}.png", lambda part: image.save(part, "PNG"))
    return f"{name}.png"
