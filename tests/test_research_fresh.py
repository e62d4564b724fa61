"""Scenes from a seed: the same again, others for another seed, fewer are the first of more, images as drawn."""

from collections import Counter

import numpy as np

from dalleflamingo.datasets import DOMAINS
from dalleflamingo.miniature.scene_graph import COCO_KINDS, NEW_KINDS, wrong_facts
from dalleflamingo.miniature.world import draw
from dalleflamingo.research import fresh


def test_scenes_follow_from_their_seed_and_purpose_and_fewer_are_the_first_of_more():
    scenes = fresh.scenes(30, 7, "one purpose", 2)
    assert scenes == fresh.scenes(40, 7, "one purpose", 2)[:30]
    for others in (fresh.scenes(30, 8, "one purpose", 2), fresh.scenes(30, 7, "another purpose", 2)):
        assert not set(scenes) & set(others)
    assert len(set(scenes)) == 30 and {len(scene.things) for scene in scenes} == {2}
    assert set(Counter(len(scene.things) for scene in fresh.scenes(60, 7))) == {1, 2, 3}


def test_fresh_nocaps_has_the_domains_in_turn_and_ten_true_captions_each():
    dataset = fresh.nocaps(12, 3)
    assert [example.domain for example in dataset] == [*DOMAINS] * 4
    assert dataset.examples == fresh.nocaps(20, 3).examples[:12] != fresh.nocaps(12, 4).examples
    for example, scene in zip(dataset, fresh.scenes_of(dataset), strict=True):
        assert len(example.references) == 10
        assert not any(sum(wrong_facts(caption, scene).values()) for caption in example.references)
        kinds = {thing.kind for thing in scene.things}
        of = {"in-domain": kinds <= set(COCO_KINDS), "out-domain": kinds <= set(NEW_KINDS)}
        assert of.get(example.domain, not any(of.values()))


def test_missing_images_are_drawn_and_others_left_alone(tmp_path):
    dataset = fresh.with_images(fresh.nocaps(4, 3), tmp_path / "sources")
    for example, scene in zip(dataset, fresh.scenes_of(dataset), strict=True):
        assert (np.asarray(dataset.open(example)) == draw(scene)).all()
    kept, lost = dataset[0].path, dataset[1].path
    before = kept.stat().st_mtime_ns
    lost.unlink()
    again = fresh.with_images(fresh.nocaps(4, 3), tmp_path / "sources")
    assert again == dataset and lost.exists() and kept.stat().st_mtime_ns == before
