"""Claims of captions, and which of them hold in a scene."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalleflamingo.miniature import wording
from dalleflamingo.miniature.annotators import (
    ANNOTATORS,
    FACTS,
    WRONG_SHARE,
    alt_text,
    annotate,
    annotate_rotations,
    describe,
    exchange_colours,
    minimal_caption,
    plant_error,
    write_caption,
)
from dalleflamingo.miniature.corpora import HARD_NEGATIVE_FORMS, hard_negatives, is_held_out
from dalleflamingo.miniature.planted import planted_captions
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
from dalleflamingo.miniature.training.sd import MINIMAL_SHARE, PRECISE_SHARE, web_caption
from dalleflamingo.miniature.world import draw, move, rotate_layout, sample_scene

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


@pytest.mark.parametrize(
    ("caption", "relations"),
    [
        ("a cat on the left and a car on the right", [(0, "left", 1)]),
        ("a cat on the right and a car on the left", [(1, "left", 0)]),
        ("a car at the bottom and a kite in the upper half", [(1, "above", 0)]),
        ("a cat on the left and a kite at the top", []),
        ("a car with a cat to its left", [(1, "left", 0)]),
        ("a cat on the left side of an automobile", [(0, "left", 1)]),
        ("a cat higher than a car", [(0, "above", 1)]),
        ("a cat next to a car", [(0, "beside", 1)]),
        ("a cat to its left", []),
    ],
)
def test_each_form_of_a_relation_is_read(caption, relations):
    assert parse(caption).relations == relations


def test_every_word_of_the_world_means_one_thing():
    sorts = (wording.NAMES, wording.SIZE_WORDS, wording.GROUND_PHRASES, wording.SIDE_PHRASES)
    for phrases_of in sorts:
        phrases = [phrase for phrases in phrases_of.values() for phrase in phrases]
        assert len(phrases) == len(set(phrases))
    assert all(2 <= len(names) <= 4 and names[0] == kind for kind, names in wording.NAMES.items())
    for kind, names in wording.NAMES.items():
        assert all([thing.kind for thing in parse(f"a {name}").things] == [kind] for name in names)
    for ground, phrases in wording.GROUND_PHRASES.items():
        assert all(parse(f"a cat {phrase}") == parse(f"a cat {phrases[0]}") for phrase in phrases)
        assert parse(f"a cat {phrases[0]}").ground == ground


def test_ten_thousand_captions_are_read_as_their_annotators_meant_them():
    rng = np.random.default_rng(0)
    for i in range(10_000):
        scene = sample_scene(rng)
        caption, meant = describe(scene, ANNOTATORS[i % len(ANNOTATORS)], rng)
        assert parse(caption) == meant, caption
        assert not any(wrong_facts(caption, scene).values()), caption
        assert 5 <= len(caption.split()) <= 30


def test_annotators_leave_things_out_each_in_another_way():
    rng = np.random.default_rng(0)
    scenes_of_two = [sample_scene(rng, count=2) for _ in range(300)]
    for annotator in ANNOTATORS:
        graphs = [parse(write_caption(scene, annotator, rng)) for scene in scenes_of_two]
        both = np.mean([len(graph.things) == 2 for graph in graphs])
        coloured = np.mean([thing.colour is not None for graph in graphs for thing in graph.things])
        assert both == pytest.approx(annotator.mention, abs=0.1)  # 3.5 standard errors
        assert coloured == pytest.approx(annotator.colour, abs=0.1)
        # what is left out is one of the smaller things
        left_out = [
            (graph.things[0].kind, scene)
            for graph, scene in zip(graphs, scenes_of_two, strict=True)
            if len(graph.things) == 1 and {thing.size for thing in scene.things} == {"small", "large"}
        ]
        assert all(thing.size == "large" for kind, scene in left_out for thing in scene.things if thing.kind == kind)


def test_captions_of_one_scene_are_by_different_annotators():
    assert len(annotate(SCENE, 10, np.random.default_rng(0))) == 10
    with pytest.raises(ValueError, match="has 12 annotators"):
        annotate(SCENE, 13, np.random.default_rng(0))


@given(scenes, st.sampled_from(FACTS), st.integers(0, 2**32 - 1))
def test_a_planted_error_is_one_wrong_fact(scene, fact, seed):
    rng = np.random.default_rng(seed)
    if fact == "relation" and len(scene.things) == 1:
        with pytest.raises(ValueError, match="1 things"):
            plant_error(scene, fact, rng)
        return
    wrong = plant_error(scene, fact, rng)
    changed = [
        (a, b) for a, b in zip(scene.things, wrong.things, strict=True) if (a.kind, a.colour) != (b.kind, b.colour)
    ]
    assert len(changed) == (fact in ("kind", "colour"))
    assert (wrong.ground != scene.ground) == (fact == "ground")
    draw(wrong)


@given(st.integers(0, 2**32 - 1), st.sampled_from(ANNOTATORS))
def test_planted_captions_are_one_true_and_four_wrong_in_one_sort_of_fact(seed, annotator):
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, count=2)
    true, *wrong = planted_captions(scene, annotator, rng)
    assert not any(wrong_facts(true, scene).values())
    for fact, caption in zip(FACTS, wrong, strict=True):
        counts = wrong_facts(caption, scene)
        if fact == "kind":  # a relation to a thing that is not there is wrong, too
            counts.pop("relation")
        assert {sort for sort, count in counts.items() if count} == {fact}, (caption, scene)


def test_hard_negatives_differ_from_their_scene_in_one_fact_and_keep_the_held_out_pairs_out():
    rng = np.random.default_rng(0)
    for _ in range(200):
        group, captions = hard_negatives(rng)
        assert len(group) == len(captions) == 8
        assert not any(is_held_out(thing) for scene in group for thing in scene.things)
        for scene, caption in zip(group, captions, strict=True):
            assert not any(wrong_facts(caption, scene).values())
        assert len({scene.ground for scene in group}) == 2
        assert not any(caption.startswith(("on ", "in ", "at ", "after ")) for caption in captions)  # ground first
    assert "sides" not in HARD_NEGATIVE_FORMS and "ground first" not in HARD_NEGATIVE_FORMS


@given(scenes, st.integers(0, 2**32 - 1))
def test_exchanged_colours_are_the_same_colours_on_other_things(scene, seed):
    exchanged = exchange_colours(scene, np.random.default_rng(seed))
    assert exchanged != scene
    if len(scene.things) > 1 and scene.things[0].colour != scene.things[1].colour:
        assert sorted(thing.colour for thing in exchanged.things) == sorted(thing.colour for thing in scene.things)


@given(scenes, st.integers(0, 2**32 - 1))
def test_moved_things_keep_names_and_main_relations(scene, seed):
    moved = move(scene, np.random.default_rng(seed))
    assert moved != scene
    draw(moved)
    for a, b in zip(scene.things, moved.things, strict=True):
        assert (a.kind, a.colour, a.size) == (b.kind, b.colour, b.size)
        for c, d in zip(scene.things, moved.things, strict=True):
            assert a is c or main_relation(a, c) == main_relation(b, d)


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
                off = {"left": 32 - thing.x, "right": thing.x - 32, "above": 32 - thing.y, "below": thing.y - 32}
                named = [side for side, phrases in wording.SIDE_PHRASES.items() if caption.endswith(phrases)]
                if named:
                    assert off[named[0]] == max(off.values())
                else:
                    assert caption.endswith("in the middle") and max(off.values()) <= 5


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
        where = {
            next((side for side, phrases in wording.SIDE_PHRASES.items() if caption.endswith(phrases)), "middle")
            for caption in captions
        }
        assert where in ({"middle"}, every)
    if len(scene.things) == 2:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        named = [graph.relations[0] for graph in graphs]
        assert {name if subject < other else opposite[name] for subject, name, other in named} == every
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
    wrong = [
        any(wrong_facts(caption, scene).values()) for caption, scene in zip(captions, sampled, strict=True) if caption
    ]
    assert np.mean(wrong) == pytest.approx(WRONG_SHARE * (1 - MINIMAL_SHARE - PRECISE_SHARE), abs=0.02)


def test_one_alt_text_in_five_is_wrong():
    rng = np.random.default_rng(0)
    sampled = [sample_scene(rng) for _ in range(4000)]
    share = np.mean([any(wrong_facts(alt_text(scene, rng), scene).values()) for scene in sampled])
    assert share == pytest.approx(WRONG_SHARE, abs=0.03)  # 4.7 standard errors


def test_a_scene_survives_json():
    assert Scene.from_dict(SCENE.as_dict()) == SCENE
