"""Pictures judged by the shipped judges: the truth scores best, and every metric is that of its own module."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dalleflamingo import registry
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation import image_metrics
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.world import draw, sample_scene
from dalleflamingo.research import ranking
from dalleflamingo.research.image_ranking import Judges, evaluate_images
from dalleflamingo.similarity import ClipImage, Dino

N = 12


@pytest.fixture(scope="module")
def judges():
    kinds = ("clip", ClipImage), ("dino", Dino)
    encoders = [kind.from_pretrained(registry.locate(f"miniature/{name}")) for name, kind in kinds]
    recogniser = Recogniser.from_pretrained(registry.locate("miniature/recogniser"))
    return Judges(*encoders, FeatureExtractor.of("miniature/inception"), recogniser)


@pytest.fixture(scope="module")
def judged(judges, tmp_path_factory):
    """Of each image three "drawings": the picture itself, another thing's, and the empty ground."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = [sample_scene(np.random.default_rng([5, i]), count=1) for i in range(N)]
    examples, rows = [], []
    for i, scene in enumerate(scenes):
        other = scenes[(i + 1) % N]
        for k, drawn in enumerate((scene, other, type(scene)(scene.ground, ()))):
            Image.fromarray(draw(drawn)).save(folder / f"{i}-{k}.png")
            caption = f"a {scene.things[0].colour} {scene.things[0].kind} on the {scene.ground}"
            rows.append({"image_id": 100 - i, "picture": f"{i}-{k}.png", "caption": caption, "text_sbert": -k})
        examples.append(Example(100 - i, folder / f"{i}-0.png", (caption,), "in-domain"))
    table = pd.DataFrame(rows)
    return evaluate_images(table, Dataset("miniature/truth", tuple(examples)), folder, judges), folder


def test_the_real_picture_is_at_no_distance_and_holds_what_the_caption_names(judged):
    table = judged[0].table
    by_kind = [table.iloc[k::3] for k in range(3)]
    for distance in ("clip_distance", "dino_distance"):
        assert by_kind[0][distance].abs().max() < 1e-3
        assert by_kind[1][distance].mean() > 1 and by_kind[2][distance].mean() > 1
    found = [one["found"].mean() for one in by_kind]
    assert found[0] == 1 and found[1] < 0.3 and found[2] == 0
    assert judged[0].best == "found" and judged[0].domain.tolist() == ["in-domain"] * N


def test_fid_and_is_are_those_of_the_pictures_picked(judged, judges):
    ours, folder = judged
    chosen = ours.rows[:, 1][None]
    pictures = [Image.open(folder / path) for path in ours.table["picture"].iloc[chosen[0]]]
    real = [Image.open(folder / f"{i}-0.png") for i in range(N)]
    seen, true = judges.inception.look(pictures), judges.inception.look(real)
    assert ours.metrics["fid"](chosen)[0] == pytest.approx(image_metrics.fid(true.features, seen.features), rel=1e-6)
    assert ours.metrics["is"](chosen)[0] == pytest.approx(image_metrics.inception_score(seen.logits), rel=1e-6)
    assert ours.metrics["fid"](ours.rows[:, 0][None])[0] == pytest.approx(0, abs=1e-3)
    twice = chosen[:, [0, 0, *range(2, N)]]  # a resample takes the real picture of each drawing, as often
    features = true.features[[0, 0, *range(2, N)]], seen.features[torch.tensor([0, 0, *range(2, N)])]
    assert ours.metrics["fid"](twice)[0] == pytest.approx(image_metrics.fid(*features), rel=1e-6)


@pytest.mark.filterwarnings("ignore:FID")
def test_ranked_first_beats_random_where_the_ranking_knows_the_truth(judged):
    effects = ranking.measure(judged[0], resamples=50)
    for metric in judged[0].metrics:
        gain = ranking.gains(effects, metric, "text_sbert")["all"].value
        assert gain < 0 if metric in ranking.LOWER else gain > 0, metric
    best = ranking.scores(effects, "found", "oracle")["all"].value
    assert best == 1 and set(ranking.similarities(effects)) == {"text_sbert"}


def test_a_picture_that_is_gone_is_named(judged, judges, tmp_path):
    ours, _ = judged
    examples = Dataset("x", tuple(Example(100 - i, judged[1] / f"{i}-0.png") for i in range(N)))
    with pytest.raises(ValueError, match="cannot read the picture .*0-0.png"):
        evaluate_images(ours.table, examples, tmp_path, judges)
