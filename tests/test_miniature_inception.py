"""The miniature's Inception: what it is taught, and that the shipped one knows it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dalleflamingo import registry
from dalleflamingo.evaluation.image_features import FeatureExtractor
from dalleflamingo.miniature import world
from dalleflamingo.miniature.inception import MiniatureInception
from dalleflamingo.miniature.scene_graph import COLOURS, GROUNDS, KINDS
from dalleflamingo.miniature.training import inception
from dalleflamingo.miniature.training.inception import InceptionRecipe


@pytest.fixture(scope="module")
def recipe():
    torch.manual_seed(0)
    made = InceptionRecipe()
    made.batch_size = 200
    return made


def test_every_thing_of_a_picture_has_an_equal_share_and_its_ground_is_asked_for(recipe, monkeypatch):
    scene = world.sample_scene(np.random.default_rng(3), count=3)
    monkeypatch.setattr(inception.world, "sample_scene", lambda rng, count: scene)
    batch = recipe.batch(np.random.default_rng(0), 0)
    assert batch["pixel_values"].shape == (recipe.batch_size, 3, 64, 64)
    names = {(thing.kind, thing.colour) for thing in scene.things}
    for row in batch["names"]:
        asked = [(KINDS[c // len(COLOURS)], COLOURS[c % len(COLOURS)]) for c in row.nonzero().flatten().tolist()]
        assert set(asked) == names and row.unique().tolist() == pytest.approx([0, 1 / 3])
    assert {GROUNDS[ground] for ground in batch["grounds"].tolist()} == {scene.ground}


def test_loss_is_the_cross_entropy_of_names_and_ground_and_training_lowers_it(recipe):
    recipe.batch_size = 16
    batch = recipe.batch(np.random.default_rng(1), 0)
    optimizer = torch.optim.AdamW(recipe.parameters(), lr=2e-3)
    losses = []
    for step in range(8):
        loss = recipe.loss(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recipe.after_step(step)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(192) + np.log(5), abs=0.6) and losses[-1] < losses[0] - 0.5


def test_exported_weights_come_back_in_float32_with_their_statistics(recipe, tmp_path):
    recipe.export(tmp_path)
    again = MiniatureInception.from_pretrained(tmp_path).eval()
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        for ours, theirs in zip(again(pixels), recipe.averaged.eval()(pixels), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    assert again.dtype == torch.float32
    other = InceptionRecipe()
    other.restore(tmp_path)
    torch.testing.assert_close(other.network.names.weight, again.names.weight)


def test_shipped_one_names_a_thing_and_divides_its_mind_between_two():
    extractor = FeatureExtractor.from_registry("miniature/inception")
    one = [world.sample_scene(np.random.default_rng([11, i]), count=1) for i in range(60)]
    two = [world.sample_scene(np.random.default_rng([12, i]), count=2) for i in range(60)]

    def sure(scenes):
        pictures = [Image.fromarray(world.draw(scene)) for scene in scenes]
        shares = F.softmax(extractor.extract(pictures).logits, dim=-1)
        names = [[extractor.model.class_of(thing) for thing in scene.things] for scene in scenes]
        return [share[own].tolist() for share, own in zip(shares, names, strict=True)]

    assert np.mean([own[0] > 0.5 for own in sure(one)]) > 0.9
    both = np.array(sure(two))  # (60, 2)
    assert both.sum(axis=1).mean() > 0.5 and both.min(axis=1).mean() > 0.1  # by chance 2/192 and 1/192


def test_registry_knows_it():
    assert registry.ENTRIES["miniature/inception"].kind == registry.ENTRIES["inception-v3"].kind == "judge"
