"""The figures of the README are drawn, and their image is chosen without looking at captions."""

import dataclasses

import fakes
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import readme_figures
from dalleflamingo.sources.models import Models


class Clip(fakes.MeanColour):
    name = "clip"


def colours(figure: Figure) -> int:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return len(np.unique(np.asarray(canvas.buffer_rgba()).reshape(-1, 4), axis=0))


def test_both_figures_are_drawn(tmp_path):
    plain = fakes.dataset(tmp_path, n=24)
    scene = {"ground": "sand", "things": [{"kind": "cat", "colour": "red", "size": "small", "x": 30, "y": 30}]}
    examples = tuple(dataclasses.replace(example, extra={"scene": scene}) for example in plain)
    dataset = dataclasses.replace(plain, examples=examples)
    assert colours(readme_figures.world(dataset)) > 10
    models = Models(fakes.Captioner(), fakes.Generator(), [Clip()])
    settings = JourneySettings(candidates=6, steps=4, guidance_scale=3.0)
    assert colours(readme_figures.ranked(dataset.subset(4), models, settings)) > 10


def test_the_ranked_image_is_the_one_with_the_widest_spread():
    similarity = [("a", 0.9), ("a", 0.8), ("b", 0.1), ("b", 0.6), ("c", 0.5), ("c", 0.9)]
    ids = {"a": 3, "b": 1, "c": 2}
    table = pd.DataFrame([dict(image_id=ids[name], clip=value, caption="x") for name, value in similarity])
    assert readme_figures.most_different(table) == 1
