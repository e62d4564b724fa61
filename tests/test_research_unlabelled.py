"""Loss (2) on images without captions: along the captioner's own words, and nobody else's."""

import dataclasses

import pytest
import tiny_cycle
import torch
from tiny_cycle import SMALL

from dalleflamingo.cycle import step_losses
from dalleflamingo.cycle_losses import Losses
from dalleflamingo.datasets import Dataset
from dalleflamingo.research.unlabelled import build_unlabelled_cycle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_cycle.save_models(tmp_path_factory.mktemp("models"))


def built(folder, captions=("a red bird",), images=range(6), **losses):
    """A cycle with (1) and (2), whose unlabelled images have captions that nobody should read."""
    labelled = tiny_cycle.dataset(folder)
    unlabelled = Dataset("web", [dataclasses.replace(labelled[i], references=captions) for i in images])
    config = dataclasses.replace(SMALL, losses=Losses(generation=0, caption_reconstruction=0, **losses))
    cycle, batches, trainable = build_unlabelled_cycle(config, *tiny_cycle.models(folder), labelled, unlabelled)
    return config, cycle, batches, trainable


def test_each_image_has_the_captioners_greedy_caption(folder):
    _, cycle, _, _ = built(folder)
    chosen = cycle.unlabelled.choose(3)
    images = [cycle.unlabelled.dataset.open(example) for example, _ in chosen]
    assert [caption for _, caption in chosen] == cycle.captioner.describe(images, num_beams=1)
    assert len({example.image_id for example, _ in chosen}) == SMALL.batch_size


def test_the_loss_reads_neither_the_images_captions_nor_the_labels(folder):
    found = []
    for captions in (("a red bird",), ("two blue cats", "a tree")):
        config, cycle, batches, _ = built(folder, captions)
        found.append(step_losses(config, cycle, batches, 0)["image_reconstruction"])
    assert found[0] == found[1]
    batch = batches.batch(0)
    logits, ids = cycle.captioner.token_logits(batch.pixel_values, batch.captions)
    again = [
        cycle.image_reconstruction(given, ids, batch, torch.Generator().manual_seed(5))
        for given in (logits, 2 * logits)
    ]
    assert again[0] == again[1]


def test_it_follows_the_unlabelled_images_and_teaches_the_captioner(folder):
    losses = []
    for images in (range(4), (5, 4, 3, 2)):
        config, cycle, batches, trainable = built(folder, images=images, mode="soft")
        losses.append(step_losses(config, cycle, batches, 0)["image_reconstruction"])
    assert losses[0] != losses[1]
    for module in trainable.modules.values():
        gradients = torch.autograd.grad(losses[1], list(module.parameters()), retain_graph=True)
        assert all(gradient.any() for gradient in gradients)
