"""The two figures of the README: `python -m dalleflamingo research figures [FOLDER]`, with the miniature's models.

    world.png   images of the miniature world, each with a caption
    ranked.png  an image and its candidates, ranked by how like it their generated images are

The image of `ranked.png` is the one of a small run whose candidates CLIP finds most different. How good their captions
are plays no part in the choice.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dalleflamingo import profiles
from dalleflamingo.course import show
from dalleflamingo.datasets import Dataset
from dalleflamingo.miniature.scene_graph import Scene, scene_graph_f1
from dalleflamingo.reconstruct import JourneySettings, image_text_image
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import Models, load_models

BY = "clip"
CANDIDATES, COLUMNS = 6, 3


def world(dataset: Dataset) -> Figure:
    """Twelve images with a caption each."""
    chosen = dataset.subset(12)
    return show.sheet(
        [dataset.open(example) for example in chosen],
        [example.references[0] for example in chosen],
        note="The miniature world: what each image shows is known, and annotators put it into words.",
    )


def ranked(dataset: Dataset, models: Models, settings: JourneySettings) -> Figure:
    """The candidates of one image, after a run over all of `dataset`.

    Args:
        dataset: with scenes.
        models: of `load_models`.
        settings: of the journey.
    Raises:
        as `reconstruct.image_text_image`.
    """
    with tempfile.TemporaryDirectory() as folder:
        table = image_text_image(dataset, *models, folder, settings)
        examples = {example.image_id: example for example in dataset}
        example = examples[most_different(table)]
        own = table[table["image_id"] == example.image_id]
        scene = Scene.from_dict(example.extra["scene"])
        scored = own.assign(f1=scene_graph_f1(own["caption"], [scene] * len(own)))
        return show.ranked_captions(example, scored, folder, BY, COLUMNS)


def most_different(table: pd.DataFrame) -> int:
    """The id of the image whose candidates spread widest in similarity."""
    return int(table.groupby("image_id")[BY].agg(lambda values: values.max() - values.min()).idxmax())


def main(arguments: list[str]) -> int:
    """The two figures of the README, with the miniature's models."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo research figures", description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/figures"), help="default: docs/figures")
    folder = parser.parse_args(arguments).folder
    profile = profiles.PROFILES["mini"]
    dataset, settings = registered.load_dataset(profile.dataset), JourneySettings.of(profile, candidates=CANDIDATES)
    show.write_png(world(dataset), folder / "world.png")
    show.write_png(ranked(dataset.subset(profile.images), load_models(profile), settings), folder / "ranked.png")
    print(f"world.png and ranked.png are in {folder}/")
    return 0
