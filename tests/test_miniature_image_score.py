"""Found things against wanted ones: closed forms, and no better matching by brute force."""

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from dalleflamingo.miniature.image_score import (
    ImageScore,
    match_names,
    match_positions,
    score_in_place,
    score_prompt,
    total,
)
from dalleflamingo.miniature.scene_graph import CaptionGraph, Scene, Thing

CAT, BOAT = Thing("cat", "red", "small", 10, 10), Thing("boat", "blue", "large", 40, 12)
TRUTH = Scene("snow", (CAT, BOAT))


def test_the_truth_scores_full_marks_in_any_order():
    score = score_in_place(Scene("snow", (BOAT, CAT)), TRUTH)
    assert score == ImageScore(2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1)


def test_nothing_found_scores_nothing():
    assert score_in_place(Scene("sand", ()), TRUTH) == ImageScore(things=2, grounds=1)


def test_each_wrong_name_costs_its_own_count_only():
    found = Scene("snow", (Thing("cat", "pink", "small", 12, 10), Thing("car", "blue", "small", 40, 12)))
    score = score_in_place(found, TRUTH)
    assert (score.matched, score.kind_right, score.colour_right, score.size_right, score.right) == (2, 1, 1, 1, 0)
    assert score.relations == 0  # undecidable: not both things are right


def test_a_thing_further_than_eight_pixels_is_another_thing():
    def moved(dx):
        return score_in_place(Scene("snow", (Thing("cat", "red", "small", 10 + dx, 10),)), TRUTH)

    assert moved(8).right == 1 and moved(8.1).matched == 0


def test_places_are_matched_closest_first_and_once():
    truth = (Thing("cat", x=0), Thing("cat", x=6))
    assert match_positions((Thing("cat", x=4),), truth) == [None, 0]
    assert match_positions((Thing("cat", x=4), Thing("cat", x=-3)), truth) == [1, 0]
    assert match_positions((), truth) == [None, None]


def test_prompt_score_ignores_places_but_not_relations():
    wanted = CaptionGraph([Thing("cat", "red"), Thing("boat")], [(0, "left", 1)], None)
    right = score_prompt(Scene("sand", (Thing("boat", "pink", x=50, y=30), Thing("cat", "red", x=12, y=33))), wanted)
    assert (right.right, right.relations, right.relations_right, right.grounds) == (2, 1, 1, 0)
    swapped = score_prompt(Scene("sand", (Thing("cat", "red", x=50, y=30), Thing("boat", "pink", x=12, y=33))), wanted)
    assert (swapped.right, swapped.relations, swapped.relations_right) == (2, 1, 0)
    recoloured = score_prompt(Scene("sand", (Thing("cat", "blue", x=5, y=5), Thing("boat", "pink", x=30, y=5))), wanted)
    assert (recoloured.kind_right, recoloured.right, recoloured.relations) == (2, 1, 0)


def test_relation_of_a_wanted_scene_is_its_main_one():
    turned = Scene("snow", (Thing("cat", "red", "small", 40, 10), Thing("boat", "blue", "large", 10, 12)))
    assert (score_prompt(turned, TRUTH).relations, score_prompt(turned, TRUTH).relations_right) == (1, 0)


def test_a_said_colour_goes_before_an_unsaid_one():
    wanted = (Thing("cat"), Thing("cat", "red"))
    assert match_names((Thing("cat", "red"), Thing("cat", "blue")), wanted) == [1, 0]
    assert match_names((Thing("cat", "red"),), wanted) == [None, 0]


def test_of_two_cats_the_one_of_the_right_colour_is_taken():
    assert match_names((Thing("cat", "blue"), Thing("cat", "red")), (Thing("cat", "red"),)) == [1]


def test_totals_are_sums():
    one = score_in_place(TRUTH, TRUTH)
    assert total([one, ImageScore(things=2, grounds=1)]) == ImageScore(4, 2, 2, 2, 2, 2, 2, 1, 1, 2, 1)
    assert total([]) == ImageScore()


names = st.builds(Thing, st.sampled_from(["cat", "boat"]), st.sampled_from(["red", "blue"]))
claims = st.builds(Thing, st.sampled_from(["cat", "boat"]), st.sampled_from(["red", "blue", None]))


@given(st.lists(names, max_size=5), st.lists(claims, max_size=3))
def test_no_other_matching_has_more_right(found, wanted):
    def right(partner):
        pairs = [(found[i], w) for i, w in zip(partner, wanted, strict=True) if i is not None]
        return sum(f.kind == w.kind and w.colour in (None, f.colour) for f, w in pairs)

    partner = match_names(found, wanted)
    used = [i for i in partner if i is not None]
    assert len(used) == len(set(used))
    assert all(found[i].kind == w.kind for i, w in zip(partner, wanted, strict=True) if i is not None)
    slots = [*range(len(found)), *[None] * len(wanted)]
    assert right(partner) == max(map(right, permutations(slots, len(wanted))))
