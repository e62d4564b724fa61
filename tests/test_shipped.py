"""What lies in data/miniature: opened by the stock libraries, whole, in float32, and as good as the MANIFEST says."""

import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import AutoModelForImageTextToText, AutoProcessor, ViTModel

from dalleflamingo import registry
from dalleflamingo.bridge import Bridge
from dalleflamingo.captioner import Captioner
from dalleflamingo.evaluation.verification import verify
from dalleflamingo.generator import Generator
from dalleflamingo.miniature.image_score import score_in_place, total
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.miniature.scene_graph import f1
from dalleflamingo.research import fresh, gates
from dalleflamingo.vocabulary import VocabularyMap

MODELS = ("blip", "blip-large", "blip2", "sd", "lafite", "clip", "dino", "recogniser", "inception")


def manifest():
    return json.loads((registry.data_root() / "miniature/MANIFEST.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_the_manifest(name):
    verify(f"miniature/{name}")
    entry = manifest()["models"][name]
    assert {"seed", "command", "hardware", "minutes", "curve", "parameters"} <= entry.keys()
    assert entry["curve"]


def test_stock_pipeline_opens_and_draws():
    pipeline = StableDiffusionPipeline.from_pretrained(registry.locate("miniature/sd"))
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    picture = pipeline("a red car on the sand", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all()


def test_pictures_from_a_caption_and_from_its_one_hot_bridge_are_identical():
    captioner = Captioner.from_pretrained(registry.locate("miniature/blip"))
    generator = Generator.from_pretrained(registry.locate("miniature/sd"))
    source, target = captioner.processor.tokenizer, generator.pipeline.tokenizer
    captions = ["a red cat to the left of a blue boat on the grass", "two purple mushrooms at night"]
    ids = source(captions, padding=True, return_tensors="pt").input_ids[:, 1:]
    bridge = Bridge(VocabularyMap.learn(source, target, captions), generator.pipeline.text_encoder)
    with torch.no_grad():
        states = bridge(F.one_hot(ids, len(source)).float(), ids, captions)
    drawn, crossed = generator.render(captions, [3, 4], steps=4), generator.render(states, [3, 4], steps=4)
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in crossed]


@pytest.mark.parametrize("name", ["blip", "blip-large", "blip2"])
def test_stock_transformers_opens_a_captioner_and_describes(name):
    folder = registry.locate(f"miniature/{name}")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    scenes = fresh.scenes(20, seed=gates.SEED)
    inputs = processor(images=fresh.draw_all(scenes), return_tensors="pt")
    with torch.no_grad():
        said = processor.batch_decode(model.generate(**inputs, max_new_tokens=60), skip_special_tokens=True)
    # captions of one's own pictures must fit them far better than captions of others' pictures
    own = np.mean([f1(caption, scene) for caption, scene in zip(said, scenes, strict=True)])
    others = np.mean([f1(caption, scene) for caption, scene in zip(said[1:] + said[:1], scenes, strict=True)])
    assert own > others + 0.2


def test_stock_open_clip_and_vit_open():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{registry.locate('miniature/clip')}")
    assert next(model.parameters()).dtype == torch.float32
    vit = ViTModel.from_pretrained(registry.locate("miniature/dino"), add_pooling_layer=False)
    assert vit.dtype == torch.float32


def test_the_recogniser_is_as_good_as_its_gate_says():
    recogniser = Recogniser.from_pretrained(registry.locate("miniature/recogniser")).eval()
    scenes = fresh.scenes(100, seed=gates.SEED)
    score = total(map(score_in_place, recogniser.find(fresh.draw_all(scenes)), scenes))
    assert score.right / score.things >= 0.95


def test_every_gate_in_the_manifest_has_its_interval_and_n():
    measured = manifest()["gates"]
    assert {gate["model"] for gate in measured} == set(gates.MODELS)
    for gate in measured:
        assert gate["low"] <= gate["value"] <= gate["high"]
        # images that show both things of a relation may be few; data/miniature is weighed whole
        assert gate["n"] >= 60 or "relation right where both" in gate["what"] or gate["model"] == "data"
