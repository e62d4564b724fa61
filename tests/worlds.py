"""A small world whose truth is known, with candidates of known scores: for the tests of the studies."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dalleflamingo.datasets import DOMAINS, Dataset, Example
from dalleflamingo.evaluation.image_features import InceptionOutput

KINDS = ("cat", "car", "fish", "boat", "tree", "cup")
COLOURS = ("red", "blue", "green", "pink", "white")
NAME = "miniature/nocaps"  # of a data set that is shipped


def world(n: int = 24) -> Dataset:
    """n images of one thing each, their truth, and three people's words for it."""
    examples = []
    for i in range(n):
        kind, colour = KINDS[i % len(KINDS)], COLOURS[i % len(COLOURS)]
        scene = {"ground": "grass", "things": [{"kind": kind, "colour": colour, "size": "small", "x": 9.0, "y": 9.0}]}
        words = (f"a small {colour} {kind} on the grass", f"there is a {colour} {kind}", f"a little {kind} on the lawn")
        examples.append(Example(i, Path(f"{i}.png"), words, DOMAINS[i % 3], {"scene": scene}))
    return Dataset(NAME, tuple(examples))


def candidates(dataset: Dataset) -> pd.DataFrame:
    """Four captions each, in another order for each image: F1 of 1, 0.4, 2/3 and 0; random similarities."""
    rng, rows = np.random.default_rng(1), []
    for example in dataset:
        thing = example.extra["scene"]["things"][0]
        other = KINDS[(KINDS.index(thing["kind"]) + 1) % len(KINDS)]
        full = f"a small {thing['colour']} {thing['kind']} on the grass"
        captions = [full, f"a {thing['kind']}", f"a {thing['colour']} {thing['kind']}", f"there is a {other}"]
        for k, at in enumerate(rng.permutation(4)):
            row = {"image_id": example.image_id, "domain": example.domain, "candidate": k}
            rows.append(row | {"caption": captions[at]})
    return pd.DataFrame(rows).assign(clip=rng.normal(size=len(rows)), dino=rng.normal(size=len(rows)))


class ThreeColours:
    """In Inception's place: an image's mean colour."""

    name = "three colours"

    def extract(self, images):
        colours = torch.tensor(np.array([np.asarray(image).mean((0, 1)) for image in images]), dtype=torch.float32)
        return InceptionOutput(colours, colours)
