import os

os.environ["HF_HUB_OFFLINE"] = "1"

import math

import open_clip
import pytest
import tiny
import torch
from torchvision.transforms import Compose, Resize
from transformers import AutoImageProcessor, ViTModel

from dalleflamingo import similarity
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.similarity import ClipImage, Dino, cosine_similarity

PHOTOS = tiny.pictures(similarity.BATCH + 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {make.__name__: str(make(tmp_path_factory.mktemp(make.__name__))) for make in (tiny.clip, tiny.dino)}


@pytest.fixture(scope="module", params=[ClipImage, Dino], ids=lambda kind: kind.name)
def encoder(request, folders):
    return request.param.from_pretrained(folders[request.param.name])


# Cosine


def test_cosine_is_that_of_the_angle():
    degrees = torch.tensor([0.0, 60.0, 90.0, 180.0])
    candidates = torch.stack([torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))], dim=-1)
    lengths = torch.tensor([1.0, 7.0, 0.1, 3.0])[:, None]
    found = cosine_similarity(torch.tensor([[2.0, 0.0]]), (lengths * candidates)[None])
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5, 0.0, -1.0]]), atol=1e-6, rtol=0)


def test_cosine_compares_each_source_with_its_own_candidates():
    source, candidates = torch.randn(3, 5), torch.randn(3, 4, 5)
    found = cosine_similarity(source, candidates)
    for b in range(3):
        for k in range(4):
            dot = sum(x * y for x, y in zip(source[b].tolist(), candidates[b, k].tolist(), strict=True))
            assert math.isclose(found[b, k], dot / source[b].norm() / candidates[b, k].norm(), abs_tol=1e-5)


def test_embeddings_of_two_encoders_are_refused():
    with pytest.raises(ValueError, match="source embeds into 24 dimensions, candidates into 16.*same encoder"):
        cosine_similarity(torch.ones(2, 24), torch.ones(2, 3, 16))


@pytest.mark.parametrize("candidates", [(3, 4, 5), (2, 5), (2, 5, 4, 5)], ids=str)
def test_candidates_of_another_shape_are_refused(candidates):
    with pytest.raises(ValueError, match=r"source is \(2, 5\).*expected"):
        cosine_similarity(torch.ones(2, 5), torch.ones(candidates))


# Encoders


def test_clip_equals_open_clips_own_image_embedding(folders):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folders['clip']}")
    with torch.no_grad():
        expected = model.eval().encode_image(torch.stack([preprocess(photo) for photo in PHOTOS]))
    found = ClipImage.from_pretrained(folders["clip"]).embed(PHOTOS)
    assert found.shape == (len(PHOTOS), 24)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image_size", [None, 48])
def test_dino_equals_the_stock_models_cls_token(folders, image_size):
    model = ViTModel.from_pretrained(folders["dino"], dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folders["dino"])
    size = {"height": image_size or tiny.SIZE, "width": image_size or tiny.SIZE}
    pixel_values = processor(PHOTOS, size=size, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = model(pixel_values, interpolate_pos_encoding=image_size is not None).last_hidden_state
    dino = Dino.from_pretrained(folders["dino"], image_size=image_size)
    assert dino.image_size == size["height"]
    found = dino.embed(PHOTOS)
    assert found.shape == (len(PHOTOS), 16)
    torch.testing.assert_close(found, states[:, 0], atol=1e-5, rtol=1e-5)


def test_embedding_does_not_depend_on_the_batch(encoder):
    together = encoder.embed(PHOTOS)
    assert together.dtype == torch.float32 and together.device.type == "cpu" and not together.requires_grad
    alone = torch.cat([encoder.embed([photo]) for photo in PHOTOS])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.embed(PHOTOS[::-1]).flip(0), together, atol=1e-5, rtol=1e-5)


def test_an_image_is_most_similar_to_itself(encoder):
    embeddings = encoder.embed(PHOTOS)
    alike = cosine_similarity(embeddings, embeddings.expand(len(PHOTOS), -1, -1))
    assert alike.argmax(-1).tolist() == list(range(len(PHOTOS)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_mode_are_read_as_rgb(encoder, mode):
    photo = PHOTOS[0].convert(mode)
    torch.testing.assert_close(encoder.embed([photo]), encoder.embed([photo.convert("RGB")]))


def test_nothing_to_embed_is_refused(encoder):
    with pytest.raises(ValueError, match="nothing to embed"):
        encoder.embed([])


# What a run notes


def test_fingerprint_changes_with_weights_and_with_nothing_that_changes_no_embedding(folders, encoder, monkeypatch):
    before = encoder.fingerprint()
    encoder._private = encoder.note = "new"
    encoder.embed(PHOTOS[:3])
    monkeypatch.setattr(similarity, "BATCH", 2)
    assert encoder.fingerprint() == before
    other = type(encoder).from_pretrained(folders[encoder.name])
    assert other.fingerprint() == before
    with torch.no_grad():
        next(other.model.parameters()).flatten()[0] += 1e-3
    assert other.fingerprint() != before


def test_fingerprint_changes_with_the_size_that_images_are_resized_to(folders):
    small, large = (Dino.from_pretrained(folders["dino"], image_size=size) for size in (None, 48))
    assert small.fingerprint() != large.fingerprint()
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folders['clip']}")
    other = Compose([Resize(16), *preprocess.transforms])
    assert ClipImage(model, preprocess).fingerprint() != ClipImage(model, other).fingerprint()


def test_fingerprint_of_ones_own_similarity_is_its_name_and_version():
    def brightness(source, other):
        return 1.0

    mine = PairSimilarity("brightness", brightness)
    assert mine.fingerprint() == PairSimilarity("brightness", lambda a, b: 2.0).fingerprint()
    others = [PairSimilarity("brightness", brightness, version="2"), PairSimilarity("hue", brightness)]
    assert len({similarity.fingerprint() for similarity in [mine, *others]}) == 3


# CLIP by hub id


def test_published_clip_is_pinned_and_has_its_own_activation(monkeypatch):
    asked = []
    monkeypatch.setattr(similarity, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or "weights.safetensors")
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *a, **k: asked.append((a, k)) or (None,) * 3)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: None)
    similarity.load_clip("timm/vit_large_patch14_clip_224.openai", revision="abc")
    assert asked == [
        (("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"), {"revision": "abc"}),
        (("ViT-L-14",), {"pretrained": "weights.safetensors", "force_quick_gelu": True}),
    ]


def test_unknown_clip_is_named():
    with pytest.raises(ValueError, match="'no/such-clip' is neither a folder nor"):
        ClipImage.from_pretrained("no/such-clip")
