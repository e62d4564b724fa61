"""Planted errors: does an encoder see what changed in an image, whatever else differs?

A caption is true, four others are wrong in one fact each. Drawn from the same noise, the image of the true caption
should be nearest to the image that was described.
"""

import numpy as np

from dalleflamingo.miniature.annotators import FACTS, Annotator, plant_error, precise, write_caption
from dalleflamingo.miniature.scene_graph import Scene, wrong_facts


def planted_captions(scene: Scene, annotator: Annotator, rng: np.random.Generator) -> list[str]:
    """The true caption of a scene of several things, then one with each of `FACTS` wrong.

    All five name every thing, its colour, a relation and the ground, in the same words where they agree. What should be
    wrong is wrong: where a rotated layout's relation still holds, as on a diagonal, the layout is rotated anew.

    Args:
        scene: of two or three things.
        annotator: whose words are used.
        rng: source of all choices.
    Raises:
        ValueError: a scene of one thing, which has no relation.
    """
    seed, captions = rng.integers(2**32), []
    for fact in (None, *FACTS):
        while True:
            described = scene if fact is None else plant_error(scene, fact, rng)
            caption = write_caption(described, precise(annotator), np.random.default_rng(seed))
            if fact is None or wrong_facts(caption, scene)[fact]:
                break
        captions.append(caption)
    return captions
