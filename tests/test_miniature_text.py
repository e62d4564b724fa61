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

from dalleflamingo.miniature.corpora import hard_negative_batch, texts
from dalleflamingo.miniature.scene_graph import COLOURS, SIZES, parse
from dalleflamingo.miniature.training import clip
from dalleflamingo.miniature.training.attributes import (
    NOTHING,
    attribute_head,
    attribute_loss,
    attributes_at_names,
)
from dalleflamingo.miniature.training.sd import ATTRIBUTE_WEIGHT
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

FLAT = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def draw_flat(rng, n):
    names = [list(FLAT)[i % 4] for i in range(n)]
    pictures = np.stack([np.full((64, 64, 3), FLAT[name], np.uint8) for name in names])
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


def test_second_half_of_a_batch_is_groups_of_eight_that_differ_in_single_facts():
    images, captions = hard_negative_batch(np.random.default_rng(0), 64)
    assert images.shape == (64, 64, 64, 3) and len(captions) == 64
    graphs = [parse(caption) for caption in captions[32:]]
    for first in range(0, 32, 8):
        group = graphs[first : first + 8]
        assert all(graph.things == group[0].things and graph.ground == group[0].ground for graph in group[:4])
        assert len({image.tobytes() for image in images[32 + first :][:8]}) == 8
        kind, colour, ground, exchanged = group[4:]
        kinds, colours = ([getattr(thing, what) for thing in group[0].things] for what in ("kind", "colour"))
        assert sum(thing.kind != before for thing, before in zip(kind.things, kinds, strict=True)) == 1
        assert sum(thing.colour != before for thing, before in zip(colour.things, colours, strict=True)) == 1
        assert ground.things == group[0].things and (ground.ground != group[0].ground or ground.ground is None)
        assert [thing.kind for thing in exchanged.things] == kinds
        assert [thing.colour for thing in exchanged.things] != colours
    with pytest.raises(ValueError, match="multiple of 16"):
        hard_negative_batch(np.random.default_rng(0), 24)


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
    rotations = slice(8, 12)  # of the only group; its others have wrong facts
    target = pixels[rotations] - pixels[rotations].mean(0)
    predicted = recipe.text_layout_head((text[rotations] - text[rotations].mean(0)) * 128**0.5)
    expected = (predicted - target).square().sum() / target.square().sum()
    torch.testing.assert_close(out["text_layout"], expected)


def test_temperature_never_passes_a_hundred(bpe):
    recipe = clip.ClipRecipe("clip-web", draw_flat, bpe)
    with torch.no_grad():
        recipe.model.logit_scale.fill_(9.0)
    recipe.after_step(0)
    assert recipe.model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


@pytest.fixture(scope="module")
def world_bpe(tmp_path_factory):
    """A tokenizer of the world's captions, which other tokenizers split into too many tokens for the encoder."""
    return CLIPTokenizer.from_pretrained(train_clip_bpe(texts(1000), 800, tmp_path_factory.mktemp("world")))


def test_layouts_are_predicted_from_the_end_of_captions_and_learned(tmp_path, world_bpe):
    bank = tmp_path / "latents.safetensors"
    latents = torch.randn(60, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    save_file({"latents": latents}, bank)
    torch.manual_seed(0)
    recipe = SdTextRecipe(None, clip.text_encoder(clip.build(len(world_bpe)), world_bpe), world_bpe, bank)
    recipe.batch_size = 16
    batch = recipe.batch(np.random.default_rng(0), 0)
    index = np.random.default_rng(0).integers(60, size=16)
    expected = F.avg_pool2d(latents.float() / latents.float().std(), 2)[index]
    torch.testing.assert_close(batch["layouts"], expected)
    assert (batch["input_ids"][:, 1] != world_bpe.eos_token_id).all()  # no caption is empty
    first = recipe.loss(batch, 0)
    with torch.no_grad():  # tokens after the end do not matter
        ids, longer = batch["input_ids"], torch.cat([batch["input_ids"], batch["input_ids"][:, -1:]], dim=1)
        layouts = [recipe.predict_layout(recipe.text_encoder(i).last_hidden_state, i) for i in (longer, ids)]
        torch.testing.assert_close(*layouts)
    torch.testing.assert_close(first["loss"], first["layout"] + ATTRIBUTE_WEIGHT * first["attributes"])
    optimizer = torch.optim.Adam(recipe.parameters(), lr=3e-3)
    for _ in range(25):
        losses = recipe.loss(batch, 0)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["layout"] < 0.5 * first["layout"] and losses["attributes"] < 0.5 * first["attributes"]


def test_attributes_stand_at_the_last_token_of_names(world_bpe):
    captions = [
        "a small red cat left of a party balloon with a blue key over the cat",
        "balloon",
        "a large handbell",
    ]
    ids = world_bpe(captions, padding=True, return_tensors="pt").input_ids
    colours, sizes = attributes_at_names(captions, world_bpe, ids.shape[1])
    said = {}
    for i, caption in enumerate(captions):
        for position in (colours[i] != NOTHING).logical_or(sizes[i] != NOTHING).nonzero().flatten().tolist():
            start = world_bpe(caption).token_to_chars(position).start
            said.setdefault(i, []).append(
                (caption[start:].split()[0], *(values[i, position].item() for values in (colours, sizes)))
            )
    red, blue, small, large = COLOURS.index("red"), COLOURS.index("blue"), SIZES.index("small"), SIZES.index("large")
    assert len(said[0]) == 3 and [(c, s) for _, c, s in said[0]] == [(red, small), (blue, NOTHING), (red, small)]
    assert 1 not in said and [(c, s) for _, c, s in said[2]] == [(NOTHING, large)]
    cut = attributes_at_names(captions, world_bpe, 4)
    assert cut.shape == (2, 3, 4) and torch.equal(cut[:, :, :3], torch.stack([colours, sizes])[:, :, :3])


def test_loss_of_attributes_is_the_mean_over_those_that_are_said():
    head, states = attribute_head(6), torch.randn(2, 3, 6)
    attributes = torch.full((2, 2, 3), NOTHING)
    assert attribute_loss(head, states, attributes) == 0
    attributes[0, 0, 1], attributes[1, 0, 1], attributes[1, 1, 2] = 5, 1, 0
    logits = head(states)
    expected = [
        logits[0, 1, :8].log_softmax(0)[5],
        logits[0, 1, 8:].log_softmax(0)[1],
        logits[1, 2, 8:].log_softmax(0)[0],
    ]
    torch.testing.assert_close(attribute_loss(head, states, attributes), -sum(expected) / 3)
