"""The two figures of the README: `python -m dalleflamingo research figures [FOLDER]`, with the miniature's models.

    world.png   pictures of the miniature world, each with a caption
    ranked.png  one picture and its candidates, ranked by how like it their drawings are

The picture of `ranked.png` is the one of a small run whose candidates CLIP finds most different. How good their
captions are plays no part in the choice.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dalleflamingo import profiles, reconstruct, registry
from dalleflamingo.course import show
from dalleflamingo.datasets import Dataset
from dalleflamingo.miniature.scene_graph import Scene, scene_graph_f1

BY = "clip"
CANDIDATES, COLUMNS = 6, 3


def world(dataset: Dataset) -> Figure:
    """Twelve pictures with a caption each."""
    chosen = dataset.subset(12)
    return show.sheet(
        [dataset.open(example) for example in chosen],
        [example.references[0] for example in chosen],
        note="The miniature world: what stands in each picture is known, and annotators put it into words.",
    )


def ranked(dataset: Dataset, models: tuple, profile: profiles.Profile) -> Figure:
    """The candidates of one picture, after a run over all of `dataset`. Errors as `reconstruct.image_text_image`."""
    with tempfile.TemporaryDirectory() as folder:
        table = reconstruct.image_text_image(
            dataset,
            *models,
            folder,
            candidates=CANDIDATES,
            steps=profile.steps,
            guidance_scale=profile.guidance_scale,
            batch_size=profile.batch_size,
        )
        examples = {example.image_id: example for example in dataset}
        example = examples[most_different(table)]
        own = table[table["image_id"] == example.image_id]
        scene = Scene.from_dict(example.extra["scene"])
        scored = own.assign(f1=scene_graph_f1(own["caption"], [scene] * len(own)))
        return show.ranking(example, scored, folder, BY, COLUMNS)


def most_different(table: pd.DataFrame) -> int:
    """The id of the image whose candidates spread widest in similarity."""
    return int(table.groupby("image_id")[BY].agg(lambda likeness: likeness.max() - likeness.min()).idxmax())


def main(arguments: list[str] | None = None) -> int:
    """Draw both figures."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo research figures", description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/figures"), help="default: docs/figures")
    folder = parser.parse_args(arguments).folder
    profile = profiles.PROFILES["mini"]
    try:
        dataset = registry.dataset(profile.dataset)
        show.write_png(world(dataset), folder / "world.png")
        models = reconstruct.load_models(profile)
        show.write_png(ranked(dataset.subset(profile.images), models, profile), folder / "ranked.png")
    except registry.RegistryError as error:
        parser.error(str(error))
    print(f"world.png and ranked.png are in {folder}/")
    return 0
