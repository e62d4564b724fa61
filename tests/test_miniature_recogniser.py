"""The recogniser: decoding and targets agree, it loads as it was saved, it learns, and distractors are no things."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dalleflamingo.miniature import world
from dalleflamingo.miniature.recogniser import MAX_THINGS, STRIDE, HeadMaps, Recogniser, prepare
from dalleflamingo.miniature.scene_graph import COLOURS, GROUNDS, KINDS, SIZES, Scene, Thing
from dalleflamingo.miniature.training import distractors
from dalleflamingo.miniature.training.recogniser import (
    GRID,
    RecogniserRecipe,
    centre_loss,
    degrade,
    draw_example,
    shift,
    targets,
)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Recogniser(width=8)


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return np.stack([world.draw(world.sample_scene(rng)) for _ in range(5)])


def blank_maps(count=1):
    """Maps without a thing."""

    def grid(channels):
        return torch.zeros(count, channels, GRID, GRID)

    return HeadMaps(
        centre=torch.full((count, 1, GRID, GRID), -9.0),
        offset=grid(2),
        kind=grid(len(KINDS)),
        colour=grid(len(COLOURS)),
        size=grid(len(SIZES)),
        ground=torch.zeros(count, len(GROUNDS)),
    )


def plant(maps, b, row, column, kind, colour, size, offset=(0.0, 0.0), centre=9.0):
    maps.centre[b, 0, row, column] = centre
    maps.kind[b, KINDS.index(kind), row, column] = 20
    maps.colour[b, COLOURS.index(colour), row, column] = 20
    maps.size[b, SIZES.index(size), row, column] = 20
    maps.offset[b, :, row, column] = torch.tensor(offset)


def test_decode_gives_exactly_the_planted_things_highest_confidence_first(tiny):
    maps = blank_maps(2)
    plant(maps, 0, 3, 10, "cat", "red", "small", (0.25, -0.5))
    plant(maps, 0, 12, 4, "boat", "white", "large", centre=5.0)
    plant(maps, 1, 0, 15, "kite", "blue", "large")
    maps.ground[0, GROUNDS.index("snow")] = maps.ground[1, GROUNDS.index("night")] = 3
    first, second = tiny.decode(maps)
    cat = Thing("cat", "red", "small", x=(10.5 + 0.25) * STRIDE, y=(3.5 - 0.5) * STRIDE)
    boat = Thing("boat", "white", "large", x=4.5 * STRIDE, y=12.5 * STRIDE)
    assert first.scene == Scene("snow", (cat, boat))
    assert second.scene == Scene("night", (Thing("kite", "blue", "large", x=62.0, y=2.0),))
    assert first.confidences == pytest.approx([1 / (1 + math.exp(-9)), 1 / (1 + math.exp(-5))], abs=1e-6)


def test_blank_maps_hold_nothing(tiny):
    assert tiny.decode(blank_maps())[0].scene.things == ()


def test_a_centre_of_no_kind_in_particular_is_nothing(tiny):
    maps = blank_maps()
    plant(maps, 0, 5, 5, "cat", "red", "small")
    maps.kind.zero_()
    assert tiny.decode(maps)[0].scene.things == ()


def test_a_slope_beside_a_peak_is_not_a_second_thing_even_where_probabilities_are_all_one(tiny):
    maps = blank_maps()
    plant(maps, 0, 5, 5, "cat", "red", "small", centre=40.0)
    plant(maps, 0, 5, 6, "cat", "red", "small", centre=39.0)
    assert len(tiny.decode(maps)[0].scene.things) == 1


def test_only_the_six_things_of_highest_confidence_are_reported(tiny):
    maps = blank_maps()
    for i in range(7):
        plant(maps, 0, 2 * i, 2 * i, KINDS[i], "red", "small", centre=3.0 + i)
    assert [thing.kind for thing in tiny.decode(maps)[0].scene.things] == list(reversed(KINDS[1:7]))
    assert MAX_THINGS == 6


def test_perfect_maps_of_drawn_scenes_decode_to_those_scenes(tiny):
    rng = np.random.default_rng(1)
    scenes = [world.sample_scene(rng) for _ in range(50)]
    truth = targets(scenes, tiny)
    maps = HeadMaps(
        centre=torch.logit(truth["centre"].double(), eps=1e-9)[:, None],
        offset=truth["offset"],
        **{
            name: 30.0 * torch.nn.functional.one_hot(truth[name], len(names)).permute(0, 3, 1, 2)
            for name, names in (("kind", KINDS), ("colour", COLOURS), ("size", SIZES))
        },
        ground=torch.nn.functional.one_hot(truth["ground"], len(GROUNDS)).float(),
    )
    for scene, detection in zip(scenes, tiny.decode(maps), strict=True):
        seen = tuple(replace(thing, x=round(thing.x, 3), y=round(thing.y, 3)) for thing in detection.scene.things)
        assert detection.scene.ground == scene.ground
        assert set(seen) == set(scene.things) and len(seen) == len(scene.things)


def test_targets_have_one_peak_per_thing_and_neighbours_point_to_it(tiny):
    thing = Thing("bell", "pink", "large", x=30.0, y=41.0)  # cell (row 10, column 7)
    truth = targets([Scene("sand", (thing,))], tiny)
    assert (truth["centre"] == 1).nonzero().tolist() == [[0, 10, 7]]
    assert truth["weight"][0, 10, 8] > 0 and truth["weight"][0, 10, 9] == 0
    for row, column in ((10, 7), (10, 8), (11, 7)):
        x, y = (truth["offset"][0, :, row, column] + torch.tensor([column + 0.5, row + 0.5])) * STRIDE
        assert (x.item(), y.item()) == pytest.approx((30, 41))
    assert targets([Scene("sand", ())], tiny)["weight"].sum() == 0


def test_centre_loss_closed_form():
    heatmap = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert centre_loss(torch.zeros(1, 2, 2), heatmap).item() == pytest.approx(math.log(2))  # 4 cells × ¼ ln 2
    heatmap[0, 0, 1] = 0.5  # excused by (1 − ½)⁴
    assert centre_loss(torch.zeros(1, 2, 2), heatmap).item() == pytest.approx(math.log(2) * (3 + 1 / 16) / 4)
    assert centre_loss(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).item() == pytest.approx(math.log(2))


def test_every_cell_sees_at_least_forty_pixels(tiny):
    for module in tiny.modules():  # all positive: nothing can cancel on the way back to the pixels
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.abs_().add_(0.01)
    pixels = torch.rand(1, 3, 64, 64).requires_grad_()
    tiny.eval()(pixels).centre[0, 0, 0, 0].backward()  # the cell with the least around it
    seen = pixels.grad.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() >= 40 and seen.any(1).sum() >= 40


def test_export_is_half_precision_safetensors_and_loads_in_float32(tmp_path, tiny, pictures):
    recipe = RecogniserRecipe(tiny)
    recipe.batch_size = 4
    recipe.loss(recipe.batch(np.random.default_rng(0), 0), 0)  # moves the batch statistics away from 0 and 1
    recipe.after_step(0)
    recipe.export(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    loaded = Recogniser.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.state_dict().values() if p.is_floating_point()} == {torch.float32}
    assert tuple(loaded.config.kinds) == KINDS and not loaded.training
    maps, again = recipe.averaged.eval()(prepare(pictures)), loaded(prepare(pictures))
    for name in maps:
        torch.testing.assert_close(again[name], maps[name], atol=0.02, rtol=0.02)


def test_names_come_from_the_folder_not_from_todays_world():
    old = Recogniser(width=8, kinds=("zebra", "cat"), threshold=0.0)
    maps = blank_maps()
    maps.kind = torch.zeros(1, 2, GRID, GRID)
    maps.kind[:, 0] = 20
    assert {thing.kind for thing in old.decode(maps)[0].scene.things} == {"zebra"}


def test_find_is_the_same_for_pil_and_arrays_and_for_every_batch_size(tiny, pictures):
    tiny.register_to_config(threshold=0.0)
    whole = tiny.detect(pictures, batch_size=5)
    single = tiny.detect([Image.fromarray(picture) for picture in pictures], batch_size=1)
    for a, b in zip(whole, single, strict=True):
        assert len(a.confidences) == MAX_THINGS
        assert a.confidences == pytest.approx(b.confidences, rel=1e-3)
    assert [scene.ground for scene in tiny.find(pictures)] == [detection.scene.ground for detection in whole]
    assert tiny.find([]) == []


def test_pixels_run_from_minus_one_to_one():
    picture = np.zeros((1, 64, 64, 3), np.uint8)
    picture[0, 2, 5, 1] = 255
    pixels = prepare(picture)
    assert pixels.shape == (1, 3, 64, 64) and pixels[0, 1, 2, 5] == 1 and pixels.sum() == -pixels.numel() + 2


def test_pictures_of_another_size_or_type_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="96 × 64 pixels.*resize"):
        prepare([Image.new("RGB", (64, 64)), Image.new("RGB", (96, 64))])
    with pytest.raises(ValueError, match="float32.*uint8"):
        prepare(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match=r"\(64, 64, 3\).*\(N, 64, 64, 3\)"):
        prepare(np.zeros((64, 64, 3), np.uint8))


def test_loss_falls_on_one_batch():
    torch.manual_seed(0)
    recipe = RecogniserRecipe(Recogniser(width=16))
    recipe.batch_size = 8
    batch = recipe.batch(np.random.default_rng(0), 0)
    optimizer = torch.optim.AdamW(recipe.parameters(), 5e-3)
    curves = []
    for step in range(20):
        values = recipe.loss(batch, step)
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        curves.append({name: value.item() for name, value in values.items()})
    assert curves[-1]["loss"] < 0.5 * curves[0]["loss"]
    for name in curves[0]:
        assert curves[-1][name] < curves[0][name], name


def test_batches_repeat_with_the_seed_and_never_share_a_picture_by_chance(tiny):
    recipe = RecogniserRecipe(tiny)
    recipe.batch_size = 6
    one, same, other = (recipe.batch(np.random.default_rng(seed), 0) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert one["pixel_values"].abs().max() <= 1


def test_average_follows_weights_and_batch_statistics(tiny):
    recipe = RecogniserRecipe(tiny)
    for value in tiny.state_dict().values():
        value.fill_(10)
    before = {name: value.clone() for name, value in recipe.averaged.state_dict().items()}
    recipe.after_step(0)  # keeps 1/10 of the old
    for name, value in recipe.averaged.state_dict().items():
        expected = 0.1 * before[name] + 9 if value.is_floating_point() else torch.tensor(10)
        torch.testing.assert_close(value, expected)
    assert not any(p.requires_grad for p in recipe.averaged.parameters())


@pytest.mark.parametrize("distractor", distractors.DISTRACTORS)
def test_a_distractor_changes_its_own_position_only_and_is_not_the_thing(distractor):
    rng = np.random.default_rng(5)
    for _ in range(20):
        replaced = Thing("cat", "red", "large", x=44.0, y=20.0)
        rest = Scene("grass", (Thing("boat", "blue", "small", x=12.0, y=50.0),))
        without, whole = world.draw(rest), world.draw(Scene("grass", (*rest.things, replaced)))
        image = distractor(rest, replaced, rng).astype(int)
        changed = np.abs(image - without).sum(-1) > 0
        assert changed.any()
        rows, columns = changed.nonzero()
        assert np.hypot(rows + 0.5 - 20, columns + 0.5 - 44).max() <= 0.75 * 28
        assert np.abs(image - whole).sum(-1).max() > 60  # plainly not the cat itself


def test_a_fragment_is_less_than_half_of_the_thing():
    rng = np.random.default_rng(6)
    replaced, rest = Thing("star", "red", "large", x=30.0, y=30.0), Scene("sand", ())
    without, whole = world.draw(rest).astype(int), world.draw(Scene("sand", (replaced,))).astype(int)
    full = (np.abs(whole - without).sum(-1) > 30).sum()
    for _ in range(30):
        visible = (np.abs(distractors.fragment(rest, replaced, rng).astype(int) - without).sum(-1) > 30).sum()
        assert 0.05 * full < visible < 0.55 * full


def test_a_distractor_replaces_exactly_one_thing():
    rng = np.random.default_rng(7)
    for _ in range(30):
        scene = world.sample_scene(rng)
        _, rest = distractors.add_distractor(scene, rng)
        assert len(rest.things) == len(scene.things) - 1 and set(rest.things) < set(scene.things)
        assert rest.ground == scene.ground


def test_some_training_pictures_hold_nothing_at_all():
    rng = np.random.default_rng(8)
    counts = [len(draw_example(rng)[1].things) for _ in range(200)]
    assert set(counts) == {0, 1, 2, 3} and 5 <= counts.count(0) <= 60


def test_a_shifted_picture_is_the_picture_of_the_shifted_scene():
    scene = Scene("snow", (Thing("cup", "red", "small", 30, 26), Thing("key", "blue", "large", 40, 44)))
    picture, moved = shift(world.draw(scene), scene, dx=2, dy=-3)
    assert [(thing.x, thing.y) for thing in moved.things] == [(32, 23), (42, 41)]
    assert np.array_equal(picture[7:61, 12:62], world.draw(scene)[10:64, 10:60])  # both things lie within


def test_damage_leaves_every_colour_nearest_to_its_own_name():
    rng = np.random.default_rng(9)
    palette = np.array([world.RGB[name] for name in COLOURS], float)
    for index, name in enumerate(COLOURS):
        for _ in range(40):
            plain = np.broadcast_to(np.array(world.RGB[name], np.uint8), (64, 64, 3))
            mean = degrade(np.ascontiguousarray(plain), rng)[16:48, 16:48].mean((0, 1))
            assert np.abs(palette - mean).sum(1).argmin() == index, name
