"""The miniature BLIP: its image encoder equals the one that it starts from; batches, loss and export."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertTokenizer

from dalleflamingo.miniature.corpora import minimal_batch, texts, web_batch
from dalleflamingo.miniature.training import blip, clip
from dalleflamingo.miniature.training.tokenizers import train_wordpiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return BertTokenizer.from_pretrained(train_wordpiece(texts(400), 200, tmp_path_factory.mktemp("wordpiece")))


@torch.no_grad()
def test_image_encoder_initialised_from_clip_gives_its_hidden_states(tokenizer):
    torch.manual_seed(0)
    source, captioner = clip.build(600), blip.make_blip(tokenizer)
    for parameter in source.visual.parameters():  # norms and biases off their trivial start
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = clip.clip_pixels(web_batch(np.random.default_rng(0), 16)[0])
    blip.initialise_from_clip(captioner, source, images)
    captioner.vision_model.embeddings.position_embedding[0, 1:] -= blip.position_sines(
        64, 128
    )  # what CLIP does not have
    ours = captioner.vision_model(images).last_hidden_state
    visual = source.visual
    patches = visual.conv1(images).flatten(2).mT
    tokens = torch.cat([visual.class_embedding.expand(16, 1, -1), patches], 1) + visual.positional_embedding
    theirs = visual.ln_post(visual.transformer(visual.ln_pre(tokens)))
    # one standard deviation stands for those of all patches: alike, not equal; the class token's own path is exact
    assert F.cosine_similarity(ours, theirs, dim=-1).mean() > 0.9
    embedded = captioner.vision_model.embeddings(images)
    assert torch.allclose(embedded[:, 0], visual.ln_pre(tokens)[:, 0], atol=1e-5)


def test_position_sines_differ_and_are_more_similar_for_near_patches():
    sines = blip.position_sines(64, 128)
    assert torch.allclose(sines.norm(dim=1), torch.full((64,), 5.0))
    alike = F.cosine_similarity(sines[:1], sines, dim=-1).reshape(8, 8)  # of the upper left patch
    assert alike.flatten()[1:].max() < 0.99
    assert alike[0, 1].item() == pytest.approx(alike[1, 0].item(), abs=1e-5) and alike[0, 1] > alike[0, 2] > alike[2, 2]


def test_a_batch_begins_with_dec_ends_with_sep_and_scores_no_padding(tokenizer):
    recipe = blip.BlipRecipe("blip-web", web_batch, tokenizer)
    recipe.batch_size = 8
    batch = recipe.batch(np.random.default_rng(0), 0)
    assert (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    ends = batch["attention_mask"].sum(1) - 1
    assert (batch["input_ids"][torch.arange(8), ends] == tokenizer.sep_token_id).all()
    unscored = (batch["attention_mask"] == 0) | (torch.arange(batch["labels"].shape[1]) == 0)
    assert ((batch["labels"] == -100) == unscored).all()


def test_curriculum_is_drawn_first_then_less_and_less_often_and_at_last_never(tokenizer):
    drawn = []

    def draw(name):
        return lambda rng, n: (drawn.append(name), minimal_batch(rng, n))[1]

    recipe = blip.BlipRecipe("blip-web", draw("web"), tokenizer, draw_early=draw("first"))
    recipe.batch_size, recipe.steps, rng = 1, 400, np.random.default_rng(0)
    for step in range(401):
        recipe.draw(rng, step)
    assert drawn[0] == "first" and drawn[400] == "web"
    first = [drawn[100 * i : 100 * i + 100].count("first") for i in range(4)]
    assert first == pytest.approx([100, 100, 75, 25], abs=15)


def test_loss_is_eq_1(tokenizer):
    recipe = blip.BlipRecipe("blip-web", web_batch, tokenizer)
    recipe.batch_size = 4
    batch = recipe.batch(np.random.default_rng(0), 0)
    with torch.no_grad():
        loss = recipe.loss(batch, 0)["loss"]
        logits = recipe.model(batch["pixel_values"], batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        log_p = logits.log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    scored = batch["attention_mask"][:, 1:].bool()
    assert loss.item() == pytest.approx(-log_p[scored].mean().item(), rel=1e-5)


def test_exported_folder_opens_in_float32_with_the_same_weights(tokenizer, tmp_path):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    recipe = blip.BlipRecipe("blip-web", web_batch, tokenizer)
    recipe.export(tmp_path)
    model = BlipForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    halved = {name: tensor.half().float() for name, tensor in recipe.model.state_dict().items()}
    assert all(torch.equal(tensor, halved[name]) for name, tensor in model.state_dict().items())
    assert BlipProcessor.from_pretrained(tmp_path).tokenizer.bos_token == "[DEC]"


@torch.no_grad()
def test_deeper_image_encoder_begins_as_the_trained_one(tokenizer):
    torch.manual_seed(0)
    small, large = blip.make_blip(tokenizer), blip.make_blip(tokenizer, blip.LARGE)
    images = torch.randn(3, 3, 64, 64)
    blip.initialise_from_shallower(large, small)
    ours, theirs = (model.vision_model.eval()(images).last_hidden_state for model in (large, small))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(large.vision_model.encoder.layers) == 6 > len(small.vision_model.encoder.layers)
    assert large.vision_model.encoder.layers[5].mlp.fc1.weight.abs().sum() > 0  # so that gradients reach what is zero
