"""The miniature's two tokenizers and its CLIP, held against the stock libraries that open them."""

import gzip
import json
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import ClipLoss
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertTokenizer, CLIPTextModel, CLIPTokenizer

from dalleflamingo.miniature.corpora import rotation_batch
from dalleflamingo.miniature.scene_graph import parse
from dalleflamingo.miniature.training import clip
from dalleflamingo.miniature.training.sd_text import SdTextRecipe
from dalleflamingo.miniature.training.tokenizers import train_clip_bpe, train_wordpiece

WORDS = """
    bird fish cat house tree boat car kite umbrella snowman butterfly red orange yellow green blue purple pink white
    small large tiny little big a the on of left right above below beside next to grass sand water picture drawing
""".split()
CAPTIONS = [" ".join(random.Random(i).choices(WORDS, k=3 + i % 9)) + "." for i in range(400)]
ODD = ["A RED Umbrella, left of the kite's string!", "zebra é 99 ☃ 猫", "", "bird " * 100]


@pytest.fixture(scope="module")
def wordpiece_folder(tmp_path_factory):
    return train_wordpiece(CAPTIONS, 120, tmp_path_factory.mktemp("wordpiece"))


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    return train_clip_bpe(CAPTIONS, 560, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def bpe(bpe_folder):
    return CLIPTokenizer.from_pretrained(bpe_folder)


@pytest.fixture
def model(bpe):
    """Weights enlarged, so that attention, activation and positions all leave a mark on the output."""
    torch.manual_seed(0)
    model = clip.build(len(bpe)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def padded(tokenizer, texts):
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- tokenizers


def test_wordpiece_has_blips_special_tokens(wordpiece_folder):
    tokenizer = AutoTokenizer.from_pretrained(wordpiece_folder)
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("[DEC]", "[SEP]", 0)
    assert tokenizer.bos_token_id == len(tokenizer) - 1 == 119
    assert sorted(tokenizer.get_vocab().values()) == list(range(120))


def test_wordpiece_lower_cases_and_gives_captions_back(wordpiece_folder):
    tokenizer = BertTokenizer.from_pretrained(wordpiece_folder)
    ids = tokenizer("A Red Umbrella").input_ids
    assert ids == tokenizer("a red umbrella").input_ids
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == "a red umbrella"


def test_clip_vocabulary_is_laid_out_as_clips(bpe_folder, bpe):
    vocabulary = json.loads((bpe_folder / "vocab.json").read_text())
    merges = (bpe_folder / "merges.txt").read_text().splitlines()[1:]
    original = open_clip.tokenizer.SimpleTokenizer().encoder  # OpenAI's own vocabulary file
    first_512 = sorted(original, key=original.get)[:512]
    assert sorted(vocabulary, key=vocabulary.get)[:512] == first_512
    learned = sorted(vocabulary, key=vocabulary.get)[512:-2]
    assert learned == [merge.replace(" ", "") for merge in merges] and len(learned) == 560 - 514
    assert bpe.convert_ids_to_tokens([558, 559]) == ["<|startoftext|>", "<|endoftext|>"]
    assert bpe.pad_token_id == bpe.eos_token_id == 559 and bpe.model_max_length == 77


def test_merges_are_those_of_plain_byte_pair_encoding(bpe_folder):
    words = Counter()
    for caption in CAPTIONS:
        words.update((*word[:-1], word[-1] + "</w>") for word in caption.replace(".", " .").split())
    for line in (bpe_folder / "merges.txt").read_text().splitlines()[1:]:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        merge = tuple(line.split())
        assert pairs[merge] == max(pairs.values())
        words = Counter({_merged(word, merge): count for word, count in words.items()})


def _merged(word, merge):
    tokens = []
    for token in word:
        if tokens and (tokens[-1], token) == merge:
            tokens[-1] += token
        else:
            tokens.append(token)
    return tuple(tokens)


def test_clip_tokenizer_agrees_with_openais_algorithm_on_its_files(bpe_folder, bpe, tmp_path):
    """open_clip's SimpleTokenizer is OpenAI's code: given our merges, it must split every word as our folder does."""
    vocabulary = tmp_path / "merges.txt.gz"
    # SimpleTokenizer reads the merges from the second line on, and as many as the original vocabulary has
    vocabulary.write_bytes(gzip.compress((bpe_folder / "merges.txt").read_bytes().rstrip()))
    reference = open_clip.tokenizer.SimpleTokenizer(bpe_path=str(vocabulary))
    for text in CAPTIONS + ODD:
        assert bpe(text, add_special_tokens=False).input_ids == reference.encode(text)


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_clip_tokenizer_knows_every_text(bpe, text):
    assert bpe.unk_token_id not in bpe(text.replace("|", ""), add_special_tokens=False).input_ids


def test_the_two_tokenizers_split_words_differently(wordpiece_folder, bpe):
    wordpiece = BertTokenizer.from_pretrained(wordpiece_folder)
    tokens = {w: [token.removeprefix("##") for token in wordpiece.tokenize(w)] for w in WORDS}
    assert any(tokens[w] != [token.removesuffix("</w>") for token in bpe.tokenize(w)] for w in WORDS)


@pytest.mark.parametrize(("train", "size"), [(train_wordpiece, 120), (train_clip_bpe, 560)])
def test_vocabulary_depends_on_the_texts_only(train, size, tmp_path):
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    assert files(train(CAPTIONS, size, tmp_path / "a")) == files(train(shuffled, size, tmp_path / "b"))


@pytest.mark.parametrize("train", [train_wordpiece, train_clip_bpe])
def test_vocabulary_without_room_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="ids are needed"):
        train(CAPTIONS, 40, tmp_path)


# ---- CLIP


def test_open_clip_opens_the_folder_as_saved(model, bpe, tmp_path):
    clip.save(model, tmp_path, bpe)
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert type(loaded) is open_clip.CLIP
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.state_dict()[name].half().float(), rtol=0, atol=0)
    with safe_open(tmp_path / "open_clip_model.safetensors", "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float16}  # noqa: SIM118
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    expected = torch.stack([preprocess(Image.fromarray(picture)) for picture in pictures])
    torch.testing.assert_close(clip.clip_pixels(pictures), expected, rtol=0, atol=1e-6)
    assert 1.2e6 < sum(p.numel() for p in loaded.parameters()) < 1.6e6


def test_open_clips_tokenizer_gives_the_generators_ids(model, bpe, tmp_path):
    clip.save(model, tmp_path, bpe)
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    assert torch.equal(tokenize(CAPTIONS[:20] + ODD), padded(bpe, CAPTIONS[:20] + ODD))


@torch.no_grad()
def test_text_encoder_equals_open_clips_tower(model, bpe, tmp_path):
    clip.text_encoder(model, bpe).save_pretrained(tmp_path)
    encoder = CLIPTextModel.from_pretrained(tmp_path)
    token_features = []
    model.ln_final.register_forward_hook(lambda module, given, result: token_features.append(result))
    ids = padded(bpe, CAPTIONS[:8] + ODD)
    pooled = model.encode_text(ids)
    ours = encoder(ids)
    torch.testing.assert_close(ours.last_hidden_state, token_features[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.pooler_output @ model.text_projection, pooled, rtol=0, atol=1e-4)


@torch.no_grad()
def test_short_sentences_encode_as_padded_ones(model, bpe):
    ids = padded(bpe, CAPTIONS[:8])
    longest = int((ids == bpe.eos_token_id).int().argmax(-1).max()) + 1
    assert longest < 77
    torch.testing.assert_close(clip.encode_text(model, ids[:, :longest]), model.encode_text(ids), rtol=0, atol=1e-4)


def test_mismatched_tokenizer_is_refused(bpe, tmp_path):
    smaller = clip.build(len(bpe) - 1)
    with pytest.raises(ValueError, match=r"559 tokens, the tokenizer has 560"):
        clip.save(smaller, tmp_path, bpe)
    with pytest.raises(ValueError, match=r"build\(len\(tokenizer\)\)"):
        clip.text_encoder(smaller, bpe)


# ---- training

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def draw_flat(rng, n):
    names = [list(COLOURS)[i % 4] for i in range(n)]
    pictures = np.stack([np.full((64, 64, 3), COLOURS[name], np.uint8) for name in names])
    return pictures, [f"a {name} bird" for name in names]


@torch.no_grad()
def test_recipe_loss_is_open_clips(bpe):
    torch.manual_seed(0)
    recipe = clip.ClipRecipe("clip-web", draw_flat, bpe)
    recipe.batch_size = 6
    batch = recipe.batch(np.random.default_rng(0), step=0)
    image = recipe.model.encode_image(batch["pixel_values"], normalize=True)
    text = recipe.model.encode_text(padded(bpe, draw_flat(None, 6)[1]), normalize=True)
    expected = ClipLoss()(image, text, recipe.model.logit_scale.exp())
    torch.testing.assert_close(recipe.loss(batch, step=0)["loss"], expected)


def test_recipe_learns_which_caption_is_whose(bpe, tmp_path):
    torch.manual_seed(0)
    recipe = clip.ClipRecipe("clip-web", draw_flat, bpe)
    recipe.batch_size = 4
    optimiser = torch.optim.AdamW(recipe.parameters(), lr=recipe.learning_rate)
    for step in range(15):
        out = recipe.loss(recipe.batch(np.random.default_rng(step), step), step)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        recipe.after_step(step)
    assert out["accuracy"] == 1 and out["loss"] < 0.3
    recipe.export(tmp_path)
    assert open_clip.create_model(f"local-dir:{tmp_path}").vocab_size == len(bpe)


def test_text_tower_takes_back_the_encoder_that_it_gave(model, bpe):
    torch.manual_seed(1)
    other = clip.build(len(bpe)).eval()
    image_projection = other.visual.proj.clone()
    clip.load_text_encoder(other, clip.text_encoder(model, bpe))
    ids = padded(bpe, CAPTIONS[:8])
    with torch.no_grad():
        ours, theirs = clip.encode_text(model, ids), clip.encode_text(other, ids)
    other.text_projection.data = model.text_projection.data  # not the encoder's
    assert not torch.allclose(ours, theirs, atol=1e-3) and torch.equal(other.visual.proj, image_projection)
    torch.testing.assert_close(clip.encode_text(other, ids), ours)


def test_second_half_of_a_rotation_batch_is_scenes_in_four_rotations():
    images, captions = rotation_batch(np.random.default_rng(0), 16)
    assert images.shape == (16, 64, 64, 3) and len(captions) == 16
    graphs = [parse(caption) for caption in captions[8:]]
    for first in (0, 4):
        four = graphs[first : first + 4]
        assert all(graph.things == four[0].things for graph in four)
        assert len(set(captions[8 + first :][:4])) == 4
        assert len({image.tobytes() for image in images[8 + first :][:4]}) == 4
    with pytest.raises(ValueError, match="multiple of 8"):
        rotation_batch(np.random.default_rng(0), 12)


def test_embeddings_learn_what_rotations_change(bpe):
    torch.manual_seed(0)
    recipe = clip.ClipLayoutRecipe(bpe)
    recipe.batch_size = 16
    batch = recipe.batch(np.random.default_rng(0), 0)
    optimiser = torch.optim.AdamW(recipe.parameters(), lr=recipe.learning_rate)
    for step in range(34):
        out = recipe.loss(batch, step)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        if step == 0:
            assert min(out["image_layout"], out["text_layout"]) > 0.9  # 1 for a constant prediction
    out = recipe.loss(batch, 0)
    assert max(out["image_layout"], out["text_layout"]) < 0.5
    image, text = clip.embed(recipe.model, batch)
    torch.testing.assert_close(
        out["loss"], recipe.contrastive_loss(image, text)["loss"] + out["image_layout"] + out["text_layout"]
    )
    pixels = F.avg_pool2d(batch["pixel_values"], 8).flatten(1)
    target = torch.cat([four - four.mean(0) for four in (pixels[8:12], pixels[12:])])
    predicted = torch.cat(
        [recipe.text_layout_head((four - four.mean(0)) * 128**0.5) for four in (text[8:12], text[12:])]
    )
    expected = (predicted - target).square().sum() / target.square().sum()
    torch.testing.assert_close(out["text_layout"], expected)


def test_temperature_never_passes_a_hundred(bpe):
    recipe = clip.ClipRecipe("clip-web", draw_flat, bpe)
    with torch.no_grad():
        recipe.model.logit_scale.fill_(9.0)
    recipe.after_step(0)
    assert recipe.model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_layouts_are_predicted_from_the_end_of_captions_and_learned(tmp_path, bpe):
    bank = tmp_path / "latents.safetensors"
    latents = torch.randn(60, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    save_file({"latents": latents}, bank)
    torch.manual_seed(0)
    recipe = SdTextRecipe(None, clip.text_encoder(clip.build(len(bpe)), bpe), bpe, bank)
    recipe.batch_size = 16
    batch = recipe.batch(np.random.default_rng(0), 0)
    index = np.random.default_rng(0).integers(60, size=16)
    expected = F.avg_pool2d(latents.float() / latents.float().std(), 2)[index]
    torch.testing.assert_close(batch["layouts"], expected)
    assert (batch["input_ids"][:, 1] != bpe.eos_token_id).all()  # no caption is empty
    first = recipe.loss(batch, 0)["loss"]
    with torch.no_grad():  # tokens after the end do not matter
        longer = torch.cat([batch["input_ids"], batch["input_ids"][:, -1:]], dim=1)
        torch.testing.assert_close(recipe.predict_layout(longer), recipe.predict_layout(batch["input_ids"]))
    optimizer = torch.optim.Adam(recipe.parameters(), lr=3e-3)
    for _ in range(25):
        loss = recipe.loss(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first
