"""Images show what their scenes hold, and corpora are written and read back the same."""

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalleflamingo import datasets
from dalleflamingo.miniature import corpora
from dalleflamingo.miniature.drawings import DRAWINGS
from dalleflamingo.miniature.scene_graph import COCO_KINDS, COLOURS, GROUNDS, KINDS, NEW_KINDS, SIZES, Scene, Thing
from dalleflamingo.miniature.world import IMAGE_SIZE, PIXELS, RGB, draw, sample_scene
from dalleflamingo.sources import annotations

scenes = st.integers(0, 2**32 - 1).map(lambda seed: sample_scene(np.random.default_rng(seed)))


def test_the_world_has_24_kinds_in_8_colours_2_sizes_on_5_grounds():
    assert len(set(KINDS)) == 24
    assert (len(COLOURS), len(SIZES)) == (8, 2)
    assert len(GROUNDS) == 5
    assert set(DRAWINGS) == set(KINDS)
    assert not set(COCO_KINDS) & set(NEW_KINDS)


@given(scenes)
def test_things_lie_inside_apart_and_are_of_different_kinds(scene):
    assert 1 <= len(scene.things) <= 3
    assert len({thing.kind for thing in scene.things}) == len(scene.things)
    for thing in scene.things:
        half = PIXELS[thing.size] / 2
        assert half <= min(thing.x, thing.y)
        assert max(thing.x, thing.y) <= IMAGE_SIZE - half
    for a, b in itertools.combinations(scene.things, 2):
        apart = (PIXELS[a.size] + PIXELS[b.size]) / 2
        assert abs(a.x - b.x) >= apart or abs(a.y - b.y) >= apart


@given(scenes)
def test_outside_the_things_an_image_is_its_ground(scene):
    outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    for thing in scene.things:
        half = PIXELS[thing.size] // 2
        outside[int(thing.y) - half : int(thing.y) + half, int(thing.x) - half : int(thing.x) + half] = False
    ground = draw(Scene(scene.ground, ()))
    assert (draw(scene)[outside] == ground[outside]).all()


def test_kinds_and_colours_all_differ_visibly():
    names = list(itertools.product(KINDS, COLOURS))
    images = np.stack([draw(Scene("sand", (Thing(*name, "small", 32, 32),))) for name in names])
    sprites = images[:, 22:42, 22:42].astype(np.int16)  # a small thing is 20 pixels wide
    assert (images == images[0]).all((0, 3)).sum() >= 64 * 64 - 20 * 20
    for i, (name, sprite) in enumerate(zip(names, sprites, strict=True)):
        differing = (np.abs(sprites[i + 1 :] - sprite).max(-1) > 60).sum((1, 2))
        assert (differing >= 15).all(), (name, names[i + 1 + int(differing.argmin())])


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_shows_its_colour(kind):
    picture = draw(Scene("sand", (Thing(kind, "blue", "large", 32, 32),)))
    assert (np.abs(picture.astype(int) - RGB["blue"]).max(-1) < 12).sum() >= 40


def test_a_thing_that_reaches_outside_is_refused():
    with pytest.raises(ValueError, match="move its centre inwards"):
        draw(Scene("sand", (Thing("cat", "red", "large", 5, 32),)))


def test_domains_of_nocaps_hold_the_kinds_that_their_names_say():
    rng = np.random.default_rng(0)
    for _ in range(50):
        of = {domain: {t.kind for t in corpora.nocaps_scene(rng, domain).things} for domain in datasets.DOMAINS}
        assert of["in-domain"] <= set(COCO_KINDS)
        assert of["out-domain"] <= set(NEW_KINDS)
        assert of["near-domain"] & set(COCO_KINDS)
        assert of["near-domain"] & set(NEW_KINDS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("miniature")
    corpora.write_annotations(root, {"web": 6, "train": 8, "val": 5, "test": 5, "nocaps": 9, "nocaps-dev": 6})
    assert corpora.draw_images(root) == 39
    return root


def test_corpora_are_read_back_by_the_readers_of_the_real_ones(written):
    coco = annotations.read_coco(written / "coco/annotations/captions_test.json", written / "coco/images")
    nocaps = annotations.read_coco(written / "nocaps/annotations/nocaps_val.json", written / "nocaps/images")
    assert [len(example.references) for example in coco] == [5] * 5
    assert [len(example.references) for example in nocaps] == [10] * 9
    assert {name: len(part) for name, part in nocaps.by_domain().items()} == dict.fromkeys(datasets.DOMAINS, 3)
    for example in (*coco, *nocaps):
        scene = Scene.from_dict(example.extra["scene"])
        assert (np.asarray(Image.open(example.path)) == draw(scene)).all()


def test_images_of_other_annotations_are_drawn_anew_and_no_others(written, tmp_path):
    root = tmp_path / "miniature"
    shutil.copytree(written, root)
    assert corpora.draw_images(root) == 0
    file = root / "coco/annotations/captions_val.json"
    corpus = json.loads(file.read_text())
    ground = corpus["images"][0]["scene"]["ground"]
    corpus["images"][0]["scene"]["ground"] = next(one for one in GROUNDS if one != ground)
    file.write_text(json.dumps(corpus))
    assert corpora.draw_images(root) == 5  # those of val; train and test lie in the same folder
    for record in corpus["images"]:
        image = Image.open(root / "coco/images" / record["file_name"])
        assert (np.asarray(image) == draw(Scene.from_dict(record["scene"]))).all()
    assert corpora.draw_images(root) == 0


def test_splits_share_no_scene():
    files = [file for name, file in corpora.annotation_files().items() if name != "web"]
    examples = [example for file in files for example in annotations.read_coco(file, file.parent)]
    drawn = [Scene.from_dict(example.extra["scene"]) for example in examples]
    assert len(set(drawn)) >= 0.99 * len(drawn)  # single things on a lattice do meet by chance


def test_shipped_annotations_follow_from_the_seed(tmp_path):
    corpora.write_annotations(tmp_path)
    for name, file in corpora.annotation_files(tmp_path).items():
        assert file.read_bytes() == corpora.annotation_files()[name].read_bytes(), name


def test_a_missing_annotation_file_is_named_with_its_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="git checkout"):
        corpora.draw_images(tmp_path)


def test_the_command_draws_where_the_registry_looks_from_any_working_directory(written, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data/miniature"
    shutil.copytree(written, root, ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setenv("DALLEFLAMINGO_DATA", str(root.parent))
    monkeypatch.chdir(tmp_path / "data")
    corpora.prepare()
    assert f"{root}: 39 images drawn" in capsys.readouterr().out
    for file in root.rglob("*.png"):
        assert file.read_bytes() == (written / file.relative_to(root)).read_bytes()
