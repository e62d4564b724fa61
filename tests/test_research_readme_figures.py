"""The figures of README and front page are drawn, and their inputs are chosen without looking at captions."""

import dataclasses
import json

import fakes
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dalleflamingo import PairSimilarity
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import front_gallery, readme_figures
from dalleflamingo.sources.models import Models


class Clip(fakes.MeanColour):
    name = "clip"


def colours(figure: Figure) -> int:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return len(np.unique(np.asarray(canvas.buffer_rgba()).reshape(-1, 4), axis=0))


@pytest.fixture
def dataset(tmp_path):
    plain = fakes.dataset(tmp_path, n=24)
    scene = {"ground": "sand", "things": [{"kind": "cat", "colour": "red", "size": "small", "x": 30, "y": 30}]}
    examples = tuple(dataclasses.replace(example, extra={"scene": scene}) for example in plain)
    return dataclasses.replace(plain, examples=examples)


def test_the_world_is_drawn(dataset):
    assert colours(readme_figures.world(dataset)) > 10


def test_a_gallery_ranks_candidates_and_names_images_that_are_there(dataset, tmp_path):
    models = Models(fakes.Captioner(), fakes.Generator(), [Clip()])
    texts = [PairSimilarity("text_clip", fakes.common_letters)]
    settings = JourneySettings(candidates=6, steps=4, guidance_scale=3.0)
    readme_figures.write_ranked(dataset.subset(4), models, texts, settings, tmp_path)
    assert len(Image.open(tmp_path / "ranked.png").getcolors(2**20)) > 10
    gallery = json.loads((tmp_path / "gallery/gallery.json").read_text(encoding="utf-8"))
    inputs = gallery["image_text_image"] + gallery["text_image_text"]
    assert len(gallery["image_text_image"]) == front_gallery.IMAGES and gallery["ranked_by"]["images"] == "CLIP"
    for one in inputs:
        scores = [candidate["similarity"] for candidate in one["candidates"]]
        assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    named = {one["image"] for entry in inputs for one in [entry, *entry["candidates"]] if "image" in one}
    assert named == {path.name for path in (tmp_path / "gallery").glob("*.png")}
    assert [one["f1"] for one in gallery["image_text_image"][0]["candidates"]] == [0.0] * 6  # no caption names a cat


def test_inputs_are_chosen_by_the_spread_of_their_similarities():
    similarity = [("a", 0.9), ("a", 0.8), ("b", 0.1), ("b", 0.6), ("c", 0.5), ("c", 0.9)]
    ids = {"a": 3, "b": 1, "c": 2}
    table = pd.DataFrame([dict(image_id=ids[name], clip=value, caption="x") for name, value in similarity])
    assert front_gallery.widest(table, "clip", 2) == [1, 2]
