"""Live sets: a similarity that knows the truth makes every set visible, one by chance makes none."""

import json

import numpy as np
import pandas as pd
import pytest
import written

from dalleflamingo import profiles
from dalleflamingo.evaluation.intervals import mean_interval
from dalleflamingo.miniature.scene_graph import f1
from dalleflamingo.reconstruct import JourneySettings, image_text_image
from dalleflamingo.research import fresh, live
from dalleflamingo.sources.models import Models

SEED, SETS, IMAGES = 6, 4, 12
SETTINGS = JourneySettings(5, steps=2, guidance_scale=3.0, seed=SEED)
FUNCTIONS = {
    "clip": written.oracle,
    "dino": written.chance,
    "fidelity": lambda caption, scene: -written.oracle(caption, scene),
}


def models(generator=None, functions=FUNCTIONS, seed=SEED) -> Models:
    shown = written.Shown(fresh.scenes_of(fresh.nocaps(SETS * IMAGES, seed)))
    similarities = [written.Similarity(name, function, shown) for name, function in functions.items()]
    return Models(written.Captioner(shown), generator or written.Generator(), similarities)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    return folder, live.measure_live(SEED, models(), folder, SETTINGS, SETS, IMAGES)


def test_the_gain_is_that_of_the_candidate_ranked_first_over_the_mean():
    scores = np.array([[0.2, 0.8, 0.5], [0.9, 0.3, 0.3]])
    likeness = np.array([[0.0, 1.0, 0.5], [0.1, 0.7, 0.7]])  # the second image: of equals the first
    np.testing.assert_allclose(live.gains_of_ranking(scores, likeness), [0.8 - 0.5, 0.3 - 0.5])


def test_an_oracle_makes_every_set_visible_and_chance_none(run):
    _, found = run
    assert [found.visible(by) for by in FUNCTIONS] == [SETS, 0, 0]
    assert found.gain["clip"].low > 0 > found.gain["fidelity"].high
    assert found.gain["dino"].low < 0 < found.gain["dino"].high
    assert {gain.n for gain in found.gain.values()} == {SETS * IMAGES}
    assert {one.n for sets in found.sets.values() for one in sets} == {IMAGES}


def test_gains_are_those_of_the_candidates_table(run):
    folder, found = run
    table = pd.read_parquet(folder / "candidates.parquet")
    dataset = fresh.nocaps(SETS * IMAGES, SEED)
    scenes = fresh.scenes_of(dataset)
    table["f1"] = [f1(row.caption, scenes[row.image_id]) for row in table.itertuples()]
    by_image = table.groupby("image_id")["f1"]
    gains = (by_image.max() - by_image.mean()).to_numpy()
    assert found.gain["clip"].value == pytest.approx(gains.mean())
    for number, one in enumerate(found.sets["clip"]):
        own = mean_interval(gains[number * IMAGES : (number + 1) * IMAGES])
        assert (one.value, one.low, one.high) == pytest.approx((own.value, own.low, own.high))


def test_a_set_whose_interval_touches_zero_is_not_visible(tmp_path):
    shown = written.Shown(fresh.scenes_of(fresh.nocaps(6, SEED)))
    same = written.Captioner(shown)
    same.sample = lambda images, seeds, strategy=None: [["a red cat"] * len(row) for row in seeds]
    similarity = written.Similarity("clip", written.oracle, shown)
    found = live.measure_live(SEED, Models(same, written.Generator(), [similarity]), tmp_path, SETTINGS, 2, 3)
    assert found.gain["clip"].value == 0 and found.visible("clip") == 0


def test_an_interrupted_measurement_goes_on_and_more_sets_reuse_the_first(run, tmp_path):
    _, whole = run
    with pytest.raises(KeyboardInterrupt):
        live.measure_live(SEED, models(written.Generator(limit=1)), tmp_path, SETTINGS, SETS, IMAGES)
    rest = written.Generator()
    assert live.measure_live(SEED, models(rest), tmp_path, SETTINGS, SETS, IMAGES) == whole
    assert len(rest.rendered) == 5 * (SETS * IMAGES - 16)
    few = live.measure_live(SEED, models(written.Generator(limit=0)), tmp_path, SETTINGS, 2, IMAGES)
    assert few.sets["clip"] == whole.sets["clip"][:2]


def test_the_command_writes_its_counts_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(profiles.VARIABLE, "smoke")
    loaded = models(seed=8)
    monkeypatch.setattr(live, "load_captioner", lambda profile: loaded.captioner)
    monkeypatch.setattr(live, "load_generator", lambda profile: loaded.generator)
    monkeypatch.setattr(live, "load_image_similarities", lambda profile: loaded.similarities)
    file = tmp_path / "live.json"
    arguments = ["--seed", "8", "--sets", "2", "--images", "6", "--runs", str(tmp_path), "--json", str(file)]
    assert live.main(arguments) == 0
    written_down = json.loads(file.read_text())
    assert list(written_down) == ["seed", "sets", "images", "candidates", "visible", "gain"]
    assert [written_down[name] for name in ("seed", "sets", "images", "candidates")] == [8, 2, 6, 5]
    assert written_down["visible"]["clip"] == 2
    low, value, high = (written_down["gain"]["clip"][i] for i in (1, 0, 2))
    assert 0 < low <= value <= high
    assert "clip: visible in 2 of 2 sets" in capsys.readouterr().out


def test_scenes_are_captioned_as_the_journey_does(tmp_path):
    """The sets are one run of the ordinary journey: the same candidates as `image_text_image` gives."""
    found = models()
    dataset = fresh.with_images(fresh.nocaps(6, SEED), tmp_path / "sources")
    table = image_text_image(dataset, *found, tmp_path / "journey", SETTINGS)
    live.measure_live(SEED, models(), tmp_path / "live", SETTINGS, 2, 3)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "live/candidates.parquet"), table)
