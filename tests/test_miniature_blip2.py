"""The miniature BLIP-2: trained parameters, labels and loss, and its folder opened by stock transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BertTokenizer, Blip2ForConditionalGeneration, GPT2Tokenizer

from dalleflamingo.captioner import Blip2Captioner, Captioner
from dalleflamingo.miniature.corpora import texts, web_batch
from dalleflamingo.miniature.training import blip, blip2
from dalleflamingo.miniature.training.clip import clip_pixels
from dalleflamingo.miniature.training.tokenizers import train_opt_bpe, train_wordpiece


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = GPT2Tokenizer.from_pretrained(train_opt_bpe(texts(400), 400, tmp_path_factory.mktemp("byte-level")))
    recipe = blip2.Blip2Recipe("blip2-web", web_batch, tokenizer)
    recipe.batch_size = 8
    return recipe


@pytest.fixture(scope="module")
def batch(recipe):
    return recipe.batch(np.random.default_rng(0), 0)


def test_the_tokenizer_keeps_every_text_and_splits_some_words(recipe):
    tokenizer = recipe.tokenizer
    said = list(texts(40))
    assert tokenizer.batch_decode(tokenizer(said).input_ids, skip_special_tokens=True) == said
    assert max(len(tokenizer.tokenize(f" {word}")) for word in " ".join(said).split()) > 1
    assert tokenizer("a cat").input_ids[0] == tokenizer.bos_token_id == 2


def test_the_same_texts_in_another_order_give_the_same_tokenizer(tmp_path):
    said = list(texts(200))
    first, second = (train_opt_bpe(some, 400, tmp_path / str(i)) for i, some in enumerate((said, said[::-1])))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 259, but 260 ids are needed"):
        train_opt_bpe(["a cat"], 259, tmp_path)


def test_labels_are_the_caption_and_its_end(recipe, batch):
    tokenizer, queries = recipe.tokenizer, blip2.QUERIES
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"][:, :queries] == image).all()
    assert (batch["input_ids"][:, queries] == tokenizer.bos_token_id).all()
    taught = [row[row != -100] for row in batch["labels"]]
    said = tokenizer.batch_decode(taught)
    assert said == [caption + "\n" for caption in recipe.draw(np.random.default_rng(0), 0)[1]]
    scored = batch["labels"] != -100
    assert torch.equal(batch["labels"][scored], batch["input_ids"][scored])


def test_loss_is_eq_1_as_computed_by_the_captioner(recipe, batch):
    captions = recipe.draw(np.random.default_rng(0), 0)[1]
    captioner = Blip2Captioner(recipe.model, recipe.processor)
    with torch.no_grad():
        loss = recipe.loss(batch, 0)["loss"].item()
        logits, ids = captioner.token_logits(batch["pixel_values"], captions)
    log_p = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0][ids != recipe.tokenizer.pad_token_id]
    assert loss == pytest.approx(-log_p.mean().item(), rel=1e-5)


def test_image_encoder_is_blips_and_stays_frozen(recipe, batch, tmp_path):
    torch.manual_seed(1)
    trained = blip.make_blip(BertTokenizer.from_pretrained(train_wordpiece(texts(200), 200, tmp_path)))
    blip2.initialise_from_blip(recipe.model, trained)
    with torch.no_grad():
        ours = recipe.model.vision_model(batch["pixel_values"]).last_hidden_state
        theirs = trained.vision_model(batch["pixel_values"]).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)  # their norms' epsilons differ
    recipe.loss(batch, 0)["loss"].backward()
    named = dict(recipe.model.named_parameters())
    trained = {id(parameter) for parameter in recipe.parameters()}
    for name, parameter in named.items():
        assert (id(parameter) in trained) == (not name.startswith("vision_model")), name
    reached = {name for name, p in named.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"query_tokens", "language_projection.weight"} <= reached
    assert not any(name.startswith("vision_model") for name in reached)


def test_queries_differ_at_the_start(recipe):
    assert torch.unique(recipe.model.query_tokens[0], dim=0).shape[0] == blip2.QUERIES


def test_exported_folder_opens_in_float32_and_writes_the_same_captions(recipe, tmp_path):
    recipe.export(tmp_path)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    halved = {name: tensor.half().float() for name, tensor in recipe.model.state_dict().items()}
    assert all(torch.equal(tensor, halved[name]) for name, tensor in model.state_dict().items())
    images = [Image.fromarray(image) for image in recipe.draw(np.random.default_rng(0), 0)[0]]
    processor = AutoProcessor.from_pretrained(tmp_path)
    seen = processor(images=images, return_tensors="pt").pixel_values
    torch.testing.assert_close(seen, clip_pixels(np.stack(images)))
    captioner = Captioner.from_pretrained(str(tmp_path))
    ids = model.generate(seen, max_length=60, do_sample=False, eos_token_id=captioner.end_id)
    stock = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    said = captioner.describe(images, num_beams=1, min_words=0, max_words=60)
    # untrained, it goes on until it is stopped, there by tokens and here by words
    assert all(text and ours.startswith(text[:40]) for ours, text in zip(said, stock, strict=True))
