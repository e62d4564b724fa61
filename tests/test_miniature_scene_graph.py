"""Claims of captions, and which of them hold in a scene."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalleflamingo.miniature.annotators import WRONG_SHARE, alt_text, annotate, annotate_rotations, minimal_caption
from dalleflamingo.miniature.scene_graph import (
    RELATIONS,
    Scene,
    Thing,
    f1,
    holds,
    is_right,
    main_relation,
    parse,
    precision_recall_f1,
    recall_of_things,
    wrong_facts,
)
from dalleflamingo.miniature.training.sd import MINIMAL_SHARE, web_caption
from dalleflamingo.miniature.world import draw, rotate_layout, sample_scene

SCENE = Scene("grass", (Thing("cat", "red", "small", 12, 32), Thing("car", "blue", "large", 50, 32)))
scenes = st.integers(0, 2**32 - 1).map(lambda seed: sample_scene(np.random.default_rng(seed)))


def test_a_caption_is_read_as_things_relation_and_ground():
    graph = parse("There is a small red kitten to the left of a big blue car, on the lawn.")
    assert graph.things == [Thing("cat", "red", "small"), Thing("car", "blue", "large")]
    assert graph.relations == [(0, "left", 1)]
    assert graph.ground == "grass"


def test_a_kind_that_is_named_twice_is_one_thing():
    graph = parse("a red cat left of a blue car with a kite above the cat")
    assert [thing.kind for thing in graph.things] == ["cat", "car", "kite"]
    assert graph.relations == [(0, "left", 1), (2, "above", 0)]


@pytest.mark.parametrize("caption", ["", "left of", "🙂 нет", "the the the", "red", "left red cat below"])
def test_text_that_claims_nothing_or_half_is_read_without_error(caption):
    assert parse(caption).relations == []
    assert 0 <= f1(caption, SCENE) <= 1


@pytest.mark.parametrize(
    ("caption", "sort"),
    [
        ("a red dog... no, a red bird", "kind"),
        ("a green cat", "colour"),
        ("a large red cat", "size"),
        ("a red cat to the right of a blue car", "relation"),
        ("a red cat at night", "ground"),
    ],
)
def test_each_sort_of_wrong_fact_is_counted_once(caption, sort):
    wrong = wrong_facts(caption, SCENE)
    assert wrong.pop(sort) == 1
    assert not any(wrong.values())
    assert is_right(caption, SCENE) == (sort in ("size", "ground"))


def test_precision_recall_and_f1_by_hand():
    # claimed: cat, red, car, green (wrong), left, grass = 6, of which 5 hold;
    # the scene has 2 kinds, 2 colours, 2 sizes, 1 pair, 1 ground = 8
    precision, recall, score = precision_recall_f1("a red cat left of a green car on the grass", SCENE)
    assert precision == pytest.approx(5 / 6)
    assert recall == pytest.approx(5 / 8)
    assert score == pytest.approx(2 * (5 / 6) * (5 / 8) / (5 / 6 + 5 / 8))


def test_the_whole_truth_scores_one():
    assert f1("a small red cat to the left of a large blue car on the grass", SCENE) == 1
    assert recall_of_things("a car", SCENE) == 0.5


def test_on_a_diagonal_two_relations_hold_and_straight_above_one():
    a, below, diagonal = Thing("cat", x=20, y=20), Thing("car", x=22, y=50), Thing("cup", x=44, y=50)
    assert [name for name in RELATIONS if holds(name, a, below)] == ["above"]
    assert [name for name in RELATIONS if holds(name, a, diagonal)] == ["left", "above"]


@given(scenes)
def test_relations_are_antisymmetric_and_the_main_one_holds(scene):
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for a in scene.things:
        for b in scene.things:
            if a is not b:
                assert holds(main_relation(a, b), a, b)
                assert all(holds(name, a, b) == holds(opposite[name], b, a) for name in RELATIONS)


@given(scenes, st.integers(0, 2**32 - 1))
def test_annotators_write_only_true_captions(scene, seed):
    for caption in annotate(scene, 10, np.random.default_rng(seed)):
        assert not any(wrong_facts(caption, scene).values()), caption
        assert 5 <= len(caption.split()) <= 30


def test_minimal_captions_are_true_and_name_positions():
    rng = np.random.default_rng(0)
    for count in (1, 2):
        for scene in (sample_scene(rng, count=count) for _ in range(300)):
            caption = minimal_caption(scene, rng)
            assert not any(wrong_facts(caption, scene).values())
            graph = parse(caption)
            assert all(thing.colour for thing in graph.things) and len(graph.relations) == count - 1
            if count == 1:
                [thing] = scene.things
                where = caption.split()[-1]
                off = {"left": 32 - thing.x, "right": thing.x - 32, "above": 32 - thing.y, "below": thing.y - 32}
                assert off.get(where, 0) == max(off.values()) or (where == "middle" and max(off.values()) <= 5)


@given(scenes, st.integers(0, 2**32 - 1))
def test_captions_of_four_rotations_are_true_and_differ_in_positions_alone(scene, seed):
    captions = annotate_rotations(scene, np.random.default_rng(seed))
    graphs = [parse(caption) for caption in captions]
    for turn, graph in enumerate(graphs):
        assert not any(wrong_facts(graph, rotate_layout(scene, turn)).values())
        assert (graph.things, graph.ground) == (graphs[0].things, graphs[0].ground)
    # on a diagonal the main relation is left or right in every rotation
    first, last = scene.things[0], scene.things[1] if len(scene.things) > 1 else Thing("middle", x=32, y=32)
    every = set(RELATIONS) if abs(first.x - last.x) != abs(first.y - last.y) else {"left", "right"}
    if len(scene.things) == 1:
        where = {re.search("left|above|right|below|middle", caption).group() for caption in captions}
        assert where in ({"middle"}, every)
    if len(scene.things) == 2:
        assert {graph.relations[0][1] for graph in graphs} == every
        assert wrong_facts(graphs[2], scene)["relation"] == 1  # half a turn: the opposite


@given(scenes)
def test_a_rotation_makes_left_above_and_four_rotations_change_nothing(scene):
    once = rotate_layout(scene, 1)
    assert rotate_layout(scene, 4) == scene == rotate_layout(once, 3)
    draw(once)  # raises if a thing is outside
    after = {"left": "above", "above": "right", "right": "below", "below": "left"}
    for a, b in zip(scene.things, once.things, strict=True):
        assert (a.kind, a.colour, a.size) == (b.kind, b.colour, b.size)
        for c, d in zip(scene.things, once.things, strict=True):
            assert all(holds(name, a, c) == holds(after[name], b, d) for name in RELATIONS)


def test_captions_for_the_generator_are_empty_minimal_or_alt_text_with_the_shares_that_are_set():
    rng = np.random.default_rng(0)
    sampled = [sample_scene(rng) for _ in range(4000)]
    captions = [web_caption(scene, rng) for scene in sampled]
    assert np.mean([caption == "" for caption in captions]) == pytest.approx(0.12, abs=0.03)
    for few, share, near in ((True, WRONG_SHARE * (1 - MINIMAL_SHARE), 0.012), (False, WRONG_SHARE, 0.04)):
        wrong = [
            any(wrong_facts(caption, scene).values())
            for caption, scene in zip(captions, sampled, strict=True)
            if caption and (len(scene.things) < 3) == few
        ]
        assert np.mean(wrong) == pytest.approx(share, abs=near)


def test_one_alt_text_in_five_is_wrong():
    rng = np.random.default_rng(0)
    sampled = [sample_scene(rng) for _ in range(4000)]
    share = np.mean([any(wrong_facts(alt_text(scene, rng), scene).values()) for scene in sampled])
    assert share == pytest.approx(WRONG_SHARE, abs=0.03)  # 4.7 standard errors


def test_a_scene_survives_json():
    assert Scene.from_dict(SCENE.as_dict()) == SCENE
