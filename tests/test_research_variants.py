"""Tables 7 and 8: a variant changes one thing, and the claims say what the tables say."""

from dataclasses import fields, replace

import fakes
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from worlds import NAME, candidates, world

from dalleflamingo.decoding import PAPER_SAMPLING, Temperature, TopK
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.profiles import PROFILES
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import ranking, report, variants
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.insights import difference
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.sources.models import load_generator

SMOKE = PROFILES["smoke"]


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    """Insight I ranked by the truth (clip) and against it (dino)."""
    evaluated = evaluate_captions(candidates(world()), world())
    table = evaluated.table.assign(clip=evaluated.table["f1"], dino=-evaluated.table["f1"])
    return ranking.measure(replace(evaluated, table=table), resamples=200)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("top-k", {"strategy": TopK(10)}),
        ("temperature", {"strategy": Temperature(0.7)}),
        ("blip2", {"captioner": "miniature/blip2"}),
        ("lafite", {"generator": "miniature/lafite"}),
        ("seed-2", {"seed": 2}),
        ("coco", {"dataset": "miniature/coco", "opened": "miniature/coco/test"}),
    ],
)
def test_a_variant_changes_one_thing(name, changed):
    variant, size = variants.VARIANTS[name], JourneySettings.of(SMOKE, candidates=10)
    usual = {"opened": SMOKE.dataset, "strategy": PAPER_SAMPLING, "seed": size.seed}
    usual |= {field.name: getattr(SMOKE, field.name) for field in fields(SMOKE)}
    settings, profile = variant.settings(SMOKE), variant.profile(SMOKE)
    found = {"opened": variant.dataset(SMOKE).name, "strategy": variant.strategy, "seed": settings.seed}
    found |= {field.name: getattr(profile, field.name) for field in fields(profile)}
    assert found == usual | changed
    assert replace(settings, seed=0) == size


def test_a_variant_runs_with_its_own_models_on_its_own_number_of_images(tmp_path):
    variant = replace(variants.VARIANTS["lafite"], images=2)
    evaluated = variants.run_variant(variant, SMOKE, 20, tmp_path)
    assert evaluated.rows.shape == (2, 10) and evaluated.metrics.keys() >= {"cider", "f1"}
    row, lafite = evaluated.table.iloc[0], load_generator(SMOKE, "miniature/lafite")
    [expected] = lafite.render([row["caption"]], [row["noise_seed"]])
    with Image.open(tmp_path / row["image"]) as generated:
        assert np.abs(np.asarray(generated, int) - np.asarray(expected, int)).max() <= 1
    assert {"clip", "dino"} <= set(evaluated.table)


def test_images_that_another_captioner_describes_stay_where_they_are(tmp_path):
    length = PairSimilarity("length", lambda source, candidate: -abs(len(source) - len(candidate)))
    rows = []
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"image_id": i // 2, "candidate": i % 2, "caption": "x" * i, "image": f"{i}.png"})
    table = pd.DataFrame(rows).assign(recovered="nothing", length=np.nan)
    found = variants.describe_again(table, tmp_path, fakes.Captioner(), [length])
    texts = [f"a thing of {i} and {i}" for i in range(20)]
    assert list(found["recovered"]) == texts
    assert list(found["length"]) == [-abs(i - len(text)) for i, text in enumerate(texts)]
    same = ["image_id", "candidate", "caption", "image"]
    pd.testing.assert_frame_equal(found[same], table[same])


def test_each_variant_decides_by_its_gain_and_tells_how_much_smaller_it_is(measured):
    first = measured.assign(gain_value=measured["gain_value"] + 7)
    claims = variants.claims_6_and_8({"top-k": measured, "seed-2": measured, "blip2": measured}, first)
    verdicts = [("clip", "holds"), ("dino", "does not hold")]
    assert [(c.number, c.ranked_by, c.verdict) for c in claims] == [(n, *one) for n in (6, 8) for one in verdicts]
    gain = ranking.gains(measured, "cider", "clip")["all"]
    [smaller] = claims[0].secondary.values()
    assert claims[0].effect == gain and smaller.value == pytest.approx(7)


def test_a_difference_of_two_independent_figures():
    found = difference(Interval(5.0, 2.0, 9.0, 10, 0), Interval(1.0, 0.0, 5.0, 20, 0))
    assert (found.value, found.n) == (4.0, 30)
    assert found.low == pytest.approx(4 - np.hypot(3, 4)) and found.high == pytest.approx(4 + np.hypot(4, 1))


def test_the_page_has_a_row_for_each_variant_and_each_captioner(measured):
    f1 = measured[measured["metric"] == "f1"]
    of_images = pd.concat([f1.assign(metric=metric) for metric in variants.TABLE_2])
    found = variants.Variants(
        insight_1={"top-k": measured},
        insight_2={"BLIP": of_images, "BLIP-2": of_images},
        errors=pd.DataFrame({"top-k": {"right": 0.7512, "kind": 0.0}}).T,
        claims=variants.claims_6_and_8({"top-k": measured}, measured),
        original=Provenance("make", "mini", NAME, 4, 4, "p", 20, 4.0, "DDPM", 20, 0, "abc"),
        command="make it",
    )
    page = "\n".join(variants.page(found))
    assert "| captions | right | kind |" in page and "| top-k | 0.75 | 0.0 |" in page
    assert "Claim 6, ranked by CLIP: **holds**" in page and "79.6 → 84.0" in page
    assert "40.54 → 33.47, 39.41" in page and page.count("BLIP-2 minus random") == 1 and "by `make it`" in page
    real = "\n".join(variants.page(replace(found, errors=found.errors[:0])))
    assert "Errors" in page and "Errors" not in real  # no truth is known of real images


def test_what_was_measured_is_read_again(measured, tmp_path):
    measured.to_csv(tmp_path / variants.file_of("top-k"), index=False)
    measured.to_csv(tmp_path / variants.file_of("BLIP-2"), index=False)
    first, second = variants.load(tmp_path)
    assert list(first) == ["top-k"] and list(second) == ["BLIP-2"]
    pd.testing.assert_frame_equal(variants.table_7(first), variants.table_7({"top-k": measured}))


def test_errors_are_shares_of_captions_and_of_the_wrong_ones():
    dataset = world(2)  # a red cat and a blue car, each alone on the grass
    captions = ["a red cat on the grass", "a blue cat", "a red fish and a red cat"]
    captions += ["a fish in the snow", "a blue car", "a car"]
    table = pd.DataFrame({"image_id": [0, 0, 0, 1, 1, 1], "candidate": [0, 1, 2] * 2, "caption": captions})
    found = variants.caption_errors(evaluate_captions(table, dataset), dataset)
    assert found["right"] == pytest.approx(3 / 6) and found["left out"] == pytest.approx(1 / 6)
    wrong = {"kind": 2 / 3, "colour": 1 / 3, "size": 0, "relation": 0, "ground": 1 / 3}
    assert {name: found[name] for name in wrong} == pytest.approx(wrong)


def test_images_that_are_not_on_this_machine_are_named_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="make them by `python -m dalleflamingo research insight-2"):
        variants.insight_2_by_captioner(report.SHIPPED.parent, tmp_path)
