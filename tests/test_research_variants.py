"""Tables 7 and 8: what is changed is changed, what is not stays, and the claims say what the tables say."""

import dataclasses

import fakes
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_research_insights import candidates, world

from dalleflamingo import profiles
from dalleflamingo.captioner import PAPER
from dalleflamingo.decoding import Temperature, TopK
from dalleflamingo.intervals import Interval
from dalleflamingo.research import ranking, report, variants
from dalleflamingo.research.insights import difference
from dalleflamingo.similarity import PairSimilarity


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    """Insight I ranked by the truth (clip) and against it (dino)."""
    judged = ranking.evaluate_captions(candidates(world()), world())
    table = judged.table.assign(clip=judged.table["f1"], dino=-judged.table["f1"])
    return ranking.measure(dataclasses.replace(judged, table=table), resamples=200)


@pytest.mark.parametrize(("name", "changed"), [
    ("top-k", {"strategy": TopK(10)}), ("temperature", {"strategy": Temperature(0.7)}),
    ("blip2", {"captioner": "other"}), ("lafite", {"generator": "miniature/lafite"}),
    ("seed-2", {"seed": 2, "n": 15}), ("coco", {"dataset": ("miniature/coco", "test")}),
])  # fmt: skip
def test_a_variant_changes_one_thing(monkeypatch, tmp_path, name, changed):
    asked, opened = [], []
    variant = variants.VARIANTS[name]
    assert variant.images is None or variant.images == 150

    def trip(dataset, *models, **settings):
        asked.append((models, settings))
        return candidates(dataset)

    monkeypatch.setattr(variants, "load_models", lambda profile: ("usual", "generator", ["clip", "dino"]))
    monkeypatch.setattr(variants, "load_captioner", lambda profile, name: "other")
    monkeypatch.setattr(variants.LafiteGenerator, "from_pretrained", lambda name, device: name)
    monkeypatch.setattr(variants.registry, "locate", lambda name: name)
    monkeypatch.setattr(variants.registry, "dataset", lambda *name: opened.append(name) or world())
    monkeypatch.setattr(variants, "image_text_image", trip)
    if variant.images:
        variant = dataclasses.replace(variant, images=15)
    judged = variants.insight_1_again(variant, 20, tmp_path)
    [(models, settings)] = asked
    profile = profiles.current()
    usual = {"strategy": PAPER, "captioner": "usual", "generator": "generator", "seed": 0, "n": 20}
    usual |= {"dataset": ("miniature/nocaps",)}
    wanted = usual | changed
    assert models == (wanted.pop("captioner"), wanted.pop("generator"), ["clip", "dino"], tmp_path)
    assert opened == [wanted.pop("dataset")] and len(judged.rows) == wanted.pop("n")
    assert settings == wanted | {
        "candidates": 10, "steps": profile.steps, "guidance_scale": profile.guidance_scale,
        "batch_size": profile.batch_size,
    }  # fmt: skip


def test_pictures_that_another_captioner_describes_stay_where_they_are(tmp_path):
    length = PairSimilarity("length", lambda source, candidate: -abs(len(source) - len(candidate)))
    rows = []
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"image_id": i // 2, "candidate": i % 2, "caption": "x" * i, "picture": f"{i}.png"})
    table = pd.DataFrame(rows).assign(recovered="nothing", length=np.nan)
    found = variants.described_again(table, tmp_path, fakes.Captioner(), [length])
    said = [f"a thing of {i} and {i}" for i in range(20)]
    assert list(found["recovered"]) == said
    assert list(found["length"]) == [-abs(i - len(text)) for i, text in enumerate(said)]
    same = ["image_id", "candidate", "caption", "picture"]
    pd.testing.assert_frame_equal(found[same], table[same])


def test_each_variant_decides_by_its_gain_and_tells_how_much_smaller_it_is(measured):
    first = measured.assign(gain=measured["gain"] + 7)
    claims = variants.claims_6_and_8({"top-k": measured, "seed-2": measured, "blip2": measured}, first)
    assert [(claim.number, claim.ranked_by, claim.verdict) for claim in claims] == [
        (6, "clip", "holds"), (6, "dino", "does not hold"), (8, "clip", "holds"), (8, "dino", "does not hold"),
    ]  # fmt: skip
    gain = ranking.gains(measured, "cider", "clip")["all"]
    [smaller] = claims[0].apart.values()
    assert claims[0].effect == gain and smaller.value == pytest.approx(7)


def test_a_difference_of_two_independent_figures():
    found = difference(Interval(5.0, 2.0, 9.0, 10, 0), Interval(1.0, 0.0, 5.0, 20, 0))
    assert (found.value, found.n) == (4.0, 30)
    assert found.low == pytest.approx(4 - np.hypot(3, 4)) and found.high == pytest.approx(4 + np.hypot(4, 1))


def test_the_page_has_a_row_for_each_variant_and_each_reader(measured):
    f1 = measured[measured["metric"] == "f1"]
    of_pictures = pd.concat([f1.assign(metric=metric) for metric in variants.TABLE_2])
    claims = variants.claims_6_and_8({"top-k": measured}, measured)
    wrong = pd.DataFrame({"top-k": {"right": 0.7512, "kind": 0.0}}).T
    page = variants.page({"top-k": measured}, {"BLIP": of_pictures, "BLIP-2": of_pictures}, wrong, claims, "make it")
    assert "| captions | right | kind |" in page and "| top-k | 0.75 | 0.0 |" in page
    assert "Claim 6, ranked by CLIP: **holds**" in page and "79.6 → 84.0" in page
    readers = {"BLIP": of_pictures, "BLIP-2": of_pictures}
    real = variants.page({"top-k": measured}, readers, wrong[:0], claims, "make it")
    assert "err in" in page and "err in" not in real  # no truth is known of real pictures
    assert "40.54 → 33.47, 39.41" in page and page.count("BLIP-2 minus random") == 1 and "by `make it`" in page


def test_what_was_measured_is_read_again(measured, tmp_path):
    measured.to_csv(tmp_path / variants._file("top-k"), index=False)
    measured.to_csv(tmp_path / variants._file("BLIP-2"), index=False)
    first, second = variants.load(tmp_path)
    assert list(first) == ["top-k"] and list(second) == ["BLIP-2"]
    pd.testing.assert_frame_equal(variants.table_7(first), variants.table_7({"top-k": measured}))


def test_faults_are_shares_of_captions_and_of_the_wrong_ones():
    dataset = world(2)  # a red cat and a blue car, each alone on the grass
    said = ["a red cat on the grass", "a blue cat", "a red fish and a red cat"]
    said += ["a fish in the snow", "a blue car", "a car"]
    table = pd.DataFrame({"image_id": [0, 0, 0, 1, 1, 1], "candidate": [0, 1, 2] * 2, "caption": said})
    found = variants.faults(ranking.evaluate_captions(table, dataset), dataset)
    assert found["right"] == pytest.approx(3 / 6) and found["left out"] == pytest.approx(1 / 6)
    wrong = {"kind": 2 / 3, "colour": 1 / 3, "size": 0, "relation": 0, "ground": 1 / 3}
    assert {name: found[name] for name in wrong} == pytest.approx(wrong)


def test_pictures_that_were_never_drawn_here_are_named_with_the_command_that_draws_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="draw them by `python -m dalleflamingo research insight insight-2"):
        variants.insight_2_again(report.SHIPPED.parent, tmp_path)
