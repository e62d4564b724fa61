"""Images evaluated by the shipped models: the truth scores best, and every metric is that of its own module."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dalleflamingo import registry
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation import image_metrics
from dalleflamingo.miniature.world import draw, sample_scene
from dalleflamingo.profiles import PROFILES
from dalleflamingo.research import ranking
from dalleflamingo.research.image_ranking import ImageEvaluators, evaluate_images
from dalleflamingo.research.metrics import METRICS
from dalleflamingo.similarity import ClipImage, Dino

N = 12


@pytest.fixture(scope="module")
def evaluators():
    kinds = ("clip", ClipImage), ("dino", Dino)
    encoders = [kind.from_pretrained(registry.locate(f"miniature/{name}")) for name, kind in kinds]
    return ImageEvaluators.of(PROFILES["smoke"], *encoders)


@pytest.fixture(scope="module")
def evaluated(evaluators, tmp_path_factory):
    """Of each image three candidates: the image itself, another thing's, and the empty ground."""
    folder = tmp_path_factory.mktemp("images")
    scenes = [sample_scene(np.random.default_rng([5, i]), count=1) for i in range(N)]
    examples, rows = [], []
    for i, scene in enumerate(scenes):
        other = scenes[(i + 1) % N]
        for k, shown in enumerate((scene, other, type(scene)(scene.ground, ()))):
            Image.fromarray(draw(shown)).save(folder / f"{i}-{k}.png")
            caption = f"a {scene.things[0].colour} {scene.things[0].kind} on the {scene.ground}"
            rows.append({"image_id": 100 - i, "image": f"{i}-{k}.png", "caption": caption, "text_sbert": -k})
        examples.append(Example(100 - i, folder / f"{i}-0.png", (caption,), "in-domain"))
    table = pd.DataFrame(rows)
    return evaluate_images(table, Dataset("miniature/truth", tuple(examples)), folder, evaluators), folder


def test_the_real_image_is_at_no_distance_and_holds_what_the_caption_names(evaluated):
    table = evaluated[0].table
    by_kind = [table.iloc[k::3] for k in range(3)]
    for distance in ("clip_distance", "dino_distance"):
        assert by_kind[0][distance].abs().max() < 1e-3
        assert by_kind[1][distance].mean() > 1 and by_kind[2][distance].mean() > 1
    found = [one["found"].mean() for one in by_kind]
    assert found[0] == 1 and found[1] < 0.3 and found[2] == 0
    assert evaluated[0].oracle == "found" and evaluated[0].domain.tolist() == ["in-domain"] * N


def test_fid_and_is_are_those_of_the_images_selected(evaluated, evaluators):
    ours, folder = evaluated
    chosen = ours.rows[:, 2][None]  # the empty grounds; the others' things are the same images in another order
    pictures = [Image.open(folder / path) for path in ours.table["image"].iloc[chosen[0]]]
    real = [Image.open(folder / f"{i}-0.png") for i in range(N)]
    seen, true = evaluators.inception.extract(pictures), evaluators.inception.extract(real)
    assert ours.metrics["fid"](chosen)[0] == pytest.approx(image_metrics.fid(true.features, seen.features), rel=1e-6)
    assert ours.metrics["is"](chosen)[0] == pytest.approx(image_metrics.inception_score(seen.logits), rel=1e-6)
    assert ours.metrics["fid"](ours.rows[:, 0][None])[0] == pytest.approx(0, abs=1e-3)
    twice = chosen[:, [0, 0, *range(2, N)]]  # a resample takes the real picture of each drawing, as often
    features = true.features[[0, 0, *range(2, N)]], seen.features[torch.tensor([0, 0, *range(2, N)])]
    assert ours.metrics["fid"](twice)[0] == pytest.approx(image_metrics.fid(*features), rel=1e-6)


@pytest.mark.filterwarnings("ignore:FID")
def test_ranked_first_beats_random_where_the_ranking_knows_the_truth(evaluated):
    effects = ranking.measure(evaluated[0], resamples=2)
    for metric in evaluated[0].metrics:
        gain = ranking.gains(effects, metric, "text_sbert")["all"].value
        assert gain < 0 if METRICS[metric].lower_is_better else gain > 0, metric
    best = ranking.scores(effects, "found", "oracle")["all"].value
    assert best == 1 and set(ranking.similarities(effects)) == {"text_sbert"}


def test_an_image_that_is_gone_is_named(evaluated, evaluators, tmp_path):
    ours, _ = evaluated
    examples = Dataset("x", tuple(Example(100 - i, evaluated[1] / f"{i}-0.png") for i in range(N)))
    with pytest.raises(ValueError, match="cannot read the image .*0-0.png"):
        evaluate_images(ours.table, examples, tmp_path, evaluators)
