"""The repair: one loss trains one damaged model; what its check-ups say."""

import numpy as np
import pandas as pd
import pytest
import torch

from dalleflamingo import profiles
from dalleflamingo.cycle import step_losses
from dalleflamingo.cycle_losses import LOSS_NAMES, captioner_parameters, generator_parameters
from dalleflamingo.miniature.scene_graph import Scene, Thing, told_facts
from dalleflamingo.research import repair, repair_study
from dalleflamingo.research.repair import ARMS, CAPTIONER, GENERATOR, Sizes
from dalleflamingo.sources.models import load_captioner, load_cycle, load_generator

SMOKE = profiles.PROFILES["smoke"]
SMALL = {"images": 8, "batch_size": 4}
SCENE = Scene("grass", (Thing("cat", "red", "large", 16, 32), Thing("boat", "blue", "small", 48, 32)))


def small(monkeypatch, arm, **changes):
    """An arm's configuration on a few images."""
    monkeypatch.setattr(repair, "SETTINGS", repair.SETTINGS | SMALL)
    return arm.config(SMOKE, **changes)


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("a red cat to the left of a boat on the grass", dict(kind=2, colour=1, size=0, relation=1, ground=1)),
        ("a boat to the left of a red cat", dict(kind=2, colour=1, size=0, relation=0, ground=0)),
        ("a large blue cat and a hat on the sand", dict(kind=1, colour=0, size=1, relation=0, ground=0)),
        ("", dict(kind=0, colour=0, size=0, relation=0, ground=0)),
    ],
)
def test_told_facts_by_sort(caption, told):
    found = told_facts(caption, SCENE)
    assert {sort: count for sort, (count, _) in found.items()} == told
    assert {sort: facts for sort, (_, facts) in found.items()} == dict(kind=2, colour=2, size=2, relation=1, ground=1)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_computes_its_loss_alone_and_trains_the_damaged_model_alone(monkeypatch, arm):
    config = small(monkeypatch, arm)
    cycle, batches, trainable = load_cycle(config, torch.device("cpu"))
    found = {}
    for step in range(4):  # (4) has a gradient only where a timestep is early enough
        found |= step_losses(config, cycle, batches, step)
    assert list(found) == [LOSS_NAMES[arm.loss - 1]]
    [loss] = found.values()
    for model, own in trainable.modules.items():
        gradients = torch.autograd.grad(loss, list(own.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.any() for g in gradients) == (model == arm.patient)


@pytest.mark.parametrize("patient", repair.PATIENTS)
def test_damage_scales_the_queries_of_one_model(patient):
    models = load_captioner(SMOKE), load_generator(SMOKE)
    before = [
        {name: p.detach().clone() for name, p in choose(model).items()}
        for choose, model in zip((captioner_parameters, generator_parameters), models, strict=True)
    ]
    repair.damage(*models, [patient])
    after = captioner_parameters(models[0]), generator_parameters(models[1])
    for who, old, new in zip(repair.PATIENTS, before, after, strict=True):
        factor = 0.02 if who == patient else 1.0
        assert all(torch.allclose(new[name], factor * value) for name, value in old.items())


@pytest.mark.parametrize("arm", [ARMS[0], ARMS[3]], ids=lambda arm: arm.name)
def test_a_repair_goes_on_where_it_was_and_keeps_every_check_up(monkeypatch, tmp_path, arm):
    monkeypatch.setattr(repair, "STEPS", 2)
    sizes = Sizes(images=3, prompts=4)

    def run(folder, steps):
        config = small(monkeypatch, arm, steps=steps, validate_every=2, checkpoint_every=2)
        return repair.repair(arm, config, sizes, SMOKE, folder)

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    pd.testing.assert_frame_equal(run(tmp_path / "parts", 4), whole)
    assert sorted(whole["step"].unique()) == [0, 2, 4]
    items = 3 if arm.patient == CAPTIONER else 4
    assert len(whole) == 3 * items * (1 + len(repair.SORTS))
    assert (whole["told"] <= whole["facts"]).all()
    images = sorted(path.name for path in (tmp_path / "whole" / "images").glob("0004/*.png"))
    assert images == (["0.png", "1.png", "2.png"] if arm.patient == GENERATOR else [])


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


FIRST, WHOLE = ARMS[0].name, repair_study.intact(CAPTIONER)


def table(told, facts, arm=FIRST, step=4):
    """Check-ups of as many seeds as there are rows, in one sort of fact."""
    return pd.DataFrame(
        {"arm": arm, "seed": seed, "step": step, "item": item, "sort": "all"}
        | {"told": told[seed][item], "facts": facts[seed][item], "caption": ""}
        for seed in range(len(told))
        for item in range(len(told[0]))
    )


def test_a_score_is_the_ratio_of_sums_over_seeds_and_items():
    made = table([[1, 0, 2], [1, 1, 0]], [[1, 2, 3], [1, 2, 3]])
    found = repair_study.score(made, FIRST, 4)
    assert found.value == pytest.approx(5 / 12) and found.n == 3
    assert found.low < found.value < found.high


def test_the_difference_to_the_intact_model_pairs_the_items():
    rng = np.random.default_rng(0)
    hard = rng.random(60)  # of the items: it moves both models alike
    trained = table([hard - 0.1, hard - 0.12], np.ones((2, 60)))
    intact = table([hard], np.ones((1, 60)), arm=WHOLE, step=0)
    both = pd.concat([trained, intact], ignore_index=True)
    found = repair_study.score(both, FIRST, 4, minus=WHOLE)
    assert found.value == pytest.approx(-0.11) and found.high - found.low < 0.03
    alone = repair_study.score(both, FIRST, 4)
    assert alone.high - alone.low > 0.1


def test_an_arm_of_fewer_seeds_is_compared_from_the_seeds_that_both_have():
    rng = np.random.default_rng(1)
    plain = [rng.random(50) + seed for seed in range(3)]
    both = pd.concat(
        [table(plain, np.ones((3, 50))), table([plain[0] - 0.2, plain[1] - 0.2], np.ones((2, 50)), arm="other")],
        ignore_index=True,
    )
    found = repair_study.score(both, "other", 4, minus=FIRST)
    assert found.value == pytest.approx(-0.2) and found.high - found.low < 1e-9


def test_more_seeds_that_disagree_make_the_interval_wide():
    alike = table([[0.5] * 40] * 4, np.ones((4, 40)))
    apart = table([[0.2] * 40, [0.8] * 40] * 2, np.ones((4, 40)))
    narrow, wide = (repair_study.score(made, FIRST, 4) for made in (alike, apart))
    assert narrow.value == pytest.approx(wide.value) and narrow.high - narrow.low < 1e-9
    assert wide.high - wide.low > 0.3


def test_curves_have_a_line_for_each_arm_that_was_run_and_a_point_for_each_check_up():
    made = pd.concat([table([[0.1, 0.3]], np.ones((1, 2)), step=0), table([[0.5, 0.7]], np.ones((1, 2)), step=4)])
    found = repair_study.curves(made, CAPTIONER)
    assert list(found) == [ARMS[0].label]
    assert {step: round(one.value, 6) for step, one in found[ARMS[0].label].items()} == {0: 0.2, 4: 0.6}
