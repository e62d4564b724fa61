"""Several images of each caption: the same captions, other noise, and what their rankings have in common."""

import fakes
import numpy as np
import pandas as pd
import pytest
from worlds import NAME, candidates, world

from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.reconstruct import JourneySettings
from dalleflamingo.research import stability
from dalleflamingo.research.caption_ranking import evaluate_captions
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.runs import RunFolderError


def test_every_caption_is_rendered_again_from_the_same_few_noises(tmp_path):
    dataset, settings = fakes.dataset(tmp_path / "source", 3), JourneySettings(6, steps=4, guidance_scale=3.0)
    ids = [example.image_id for example in dataset]
    captions = {image_id: [f"a red thing {image_id}", "a blue thing", "a red thing"] for image_id in ids}
    rows = [{"image_id": i, "candidate": k, "caption": c} for i in ids for k, c in enumerate(captions[i])]
    table = pd.DataFrame(rows)
    generator, models = fakes.Generator(), [fakes.MeanColour(), fakes.Corner()]
    rendered = stability.rerender(table, dataset, generator, models, tmp_path / "run", settings)
    assert list(rendered["image_id"]) == [image_id for image_id in ids for _ in range(6)]
    assert list(rendered["caption"]) == [
        caption for image_id in ids for caption in captions[image_id] for _ in range(2)
    ]
    noise = rendered["noise_seed"].to_numpy().reshape(3, 3, 2)
    assert (noise == noise[:, :1]).all() and len(np.unique(noise)) == 6
    for row in rendered.itertuples():
        source = dataset.open(next(example for example in dataset if example.image_id == row.image_id))
        picture = generator._draw(row.caption, row.noise_seed, lambda n: None)
        assert row.colour == pytest.approx(models[0].compare([source], [[picture]]).item(), abs=1e-6)
    again = stability.rerender(table, dataset, fakes.Generator(), models, tmp_path / "run", settings)
    pd.testing.assert_frame_equal(again, rendered)
    with pytest.raises(RunFolderError, match="captioner"):
        stability.rerender(table.assign(caption="a cat"), dataset, generator, models, tmp_path / "run", settings)


def test_rankings_by_the_caption_alone_agree_and_those_by_chance_do_not():
    rng = np.random.default_rng(0)
    quality, chance = rng.normal(size=(300, 10, 1)), rng.normal(size=(300, 10, 4))
    assert stability.agreement(quality.repeat(4, 2), 2, 50).value == pytest.approx(1)
    nothing = stability.agreement(chance, 1, 50)
    assert nothing.low < 0 < nothing.high and nothing.n == 300
    one, two = (stability.agreement(quality + chance, m, 50).value for m in (1, 2))

    def expected(r):
        """Of Spearman's ρ of 10 pairs from a normal distribution with correlation r (Moran 1948)."""
        return 6 / (np.pi * 11) * (np.arcsin(r) + 8 * np.arcsin(r / 2))

    # means of m images correlate by m / (m + 1)
    assert one == pytest.approx(expected(1 / 2), abs=0.04) and two == pytest.approx(expected(2 / 3), abs=0.04)
    with pytest.raises(ValueError, match="two times 3 images of each caption are compared, 4 were generated"):
        stability.agreement(chance, 3)


def test_the_mean_of_the_first_images_ranks():
    evaluated = evaluate_captions(candidates(world()), world())
    f1 = evaluated.table["f1"].to_numpy()[evaluated.rows]
    against = np.stack([-f1, 3 * f1], axis=2)  # the first image misleads, the mean of both does not
    found = stability.gains_of_averaging(evaluated, {"clip": against}, resamples=20).set_index(["images", "metric"])
    assert found.gain_value[(1, "f1")] == pytest.approx(f1.min(1).mean() - f1.mean())
    assert found.gain_value[(2, "f1")] == pytest.approx(f1.max(1).mean() - f1.mean())
    assert found.gain_value[(2, "cider")] > 0 > found.gain_value[(1, "cider")]
    assert set(found["n"]) == {24}
    made = Provenance("make", "mini", NAME, 4, 4, "p", 20, 4.0, "DDPM", 20, 0, "abc")
    agreements = {"clip": {1: Interval(0.5, 0.4, 0.6, 24, 0)}}
    page = "\n".join(stability.page(stability.Stability(agreements, found.reset_index(), made, "make it")))
    assert "| CLIP | 1 | 0.500 [0.400, 0.600] |" in page and "by `make it`" in page
