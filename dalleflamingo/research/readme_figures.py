"""Figures of README and front page: `python -m dalleflamingo research figures [FOLDER]`, with the miniature's models.

    world.png   images of the miniature world, each with a caption
    ranked.png  an image and its candidates, ranked by how like it their generated images are
    gallery/    more of them as single images, and captions that became images, see `front_gallery`

The image of `ranked.png` is the one of a small run whose candidates CLIP finds most different. How good their captions
are plays no part in the choice.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dalleflamingo import profiles
from dalleflamingo.commands.parsers import command_parser
from dalleflamingo.course import show
from dalleflamingo.datasets import Dataset
from dalleflamingo.evaluation.similarities import load_text_similarities
from dalleflamingo.miniature.scene_graph import Scene, scene_graph_f1
from dalleflamingo.reconstruct import JourneySettings, image_text_image, text_image_text
from dalleflamingo.research import front_gallery
from dalleflamingo.sources import registered
from dalleflamingo.sources.models import Models, load_models

BY, BY_TEXT = "clip", "text_clip"
CANDIDATES, COLUMNS = 6, 3


def world(dataset: Dataset) -> Figure:
    """Twelve images with a caption each."""
    chosen = dataset.subset(12)
    return show.sheet(
        [dataset.open(example) for example in chosen],
        [example.references[0] for example in chosen],
        note="The miniature world: what each image shows is known, and annotators put it into words.",
    )


def ranked(dataset: Dataset, table: pd.DataFrame, run_folder: Path) -> Figure:
    """The candidates of one image.

    Args:
        dataset: with scenes.
        table: of a run over it.
        run_folder: where the table's image paths start.
    """
    [image_id] = front_gallery.widest(table, BY, 1)
    [example] = [one for one in dataset if one.image_id == image_id]
    own = table[table["image_id"] == image_id]
    scene = Scene.from_dict(example.extra["scene"])
    scored = own.assign(f1=scene_graph_f1(own["caption"], [scene] * len(own)))
    return show.ranked_captions(example, scored, run_folder, BY, COLUMNS)


def write_ranked(dataset: Dataset, models: Models, texts: Sequence, settings: JourneySettings, folder: Path) -> None:
    """Send a data set both ways, then write ranked.png and the gallery.

    Args:
        dataset: with scenes.
        models: of `load_models`.
        texts: similarities of texts, `BY_TEXT` among them.
        settings: of both journeys.
        folder: for ranked.png and gallery/.
    Raises:
        as `reconstruct.image_text_image`.
    """
    with tempfile.TemporaryDirectory() as runs:
        gallery, there, back = folder / "gallery", Path(runs) / "image", Path(runs) / "text"
        gallery.mkdir(parents=True, exist_ok=True)
        table = image_text_image(dataset, *models, there, settings)
        show.write_png(ranked(dataset, table, there), folder / "ranked.png")
        images = front_gallery.image_inputs(dataset, table, there, BY, gallery)
        table = text_image_text(dataset, models.captioner, models.generator, texts, back, settings)
        shown = front_gallery.text_inputs(table, back, BY_TEXT, gallery)
        front_gallery.write(gallery, settings, (BY, BY_TEXT), images, shown)


def main(arguments: list[str]) -> int:
    """The figures of README and front page, with the miniature's models."""
    parser = command_parser("research figures", main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/figures"), help="default: docs/figures")
    folder = parser.parse_args(arguments).folder
    profile = profiles.PROFILES[front_gallery.PROFILE]
    dataset, settings = registered.load_dataset(profile.dataset), JourneySettings.of(profile, candidates=CANDIDATES)
    show.write_png(world(dataset), folder / "world.png")
    chosen = dataset.subset(profile.images)
    texts = load_text_similarities(profile, {one.image_id: one.references for one in chosen})
    write_ranked(chosen, load_models(profile), texts, settings, folder)
    print(f"world.png, ranked.png and gallery/ are in {folder}/")
    return 0
