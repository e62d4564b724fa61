"""Caption metrics against pycocoevalcap, published scores and hand-made cases."""

import importlib
import json
import os
import subprocess
import zipfile
from collections import Counter
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu as StockBleu
from pycocoevalcap.cider.cider import Cider as StockCider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from dalleflamingo import registry
from dalleflamingo.evaluation import caption_metrics, caption_tokenizer, ngrams
from dalleflamingo.evaluation.caption_metrics import SPICE_FOLDER
from dalleflamingo.evaluation.text_encoders import ClipText, Sbert
from dalleflamingo.miniature import scene_graph
from dalleflamingo.similarity import ClipImage, Encoder

needs_java = pytest.mark.skipif(caption_tokenizer.default_tokenizer() != caption_tokenizer.PTB, reason="no Java")

REFERENCES = {
    7: ["A red bird sits on a boat.", "a bird on the blue boat", "There's a bird, sitting on a boat!"],
    "b": ["two cats near a house", "A cat and another cat stand by a house."],
    9: ["a kite above the trees"],
}
PREDICTIONS = {9: "a kite flies above a tree", 7: "a red bird on a boat", "b": "a dog"}


def stock(scorer, references, predictions):
    """pycocoevalcap's own value and per-item scores, on captions whose words are split already."""
    keys = list(predictions)
    gold = {i: references[key] for i, key in enumerate(keys)}
    return scorer.compute_score(gold, {i: [predictions[key]] for i, key in enumerate(keys)})


@pytest.fixture
def without_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    caption_tokenizer.default_tokenizer.cache_clear()
    yield tmp_path
    caption_tokenizer.default_tokenizer.cache_clear()


def published(real_data):
    folder = real_data / "magic-predictions"
    records = json.loads((folder / "magic_result.json").read_text())
    scores = json.loads((folder / "expected_scores.json").read_text())["magic_result.json"]
    references = {record["image_name"]: record["captions"] for record in records}
    return references, {record["image_name"]: record["prediction"] for record in records}, scores


@needs_java
def test_published_system_gets_its_published_scores(real_data):
    references, predictions, expected = published(real_data)
    scores = caption_metrics.evaluate(references, predictions)
    for order in range(1, 5):
        assert round(scores[f"BLEU-{order}"].value, 3) == expected[f"Bleu_{order}"]
    assert round(scores["CIDEr"].value, 3) == expected["CIDEr"]
    assert round(scores["ROUGE-L"].value, 3) == expected["ROUGE_L"]
    assert scores["CIDEr"].n == expected["images"] and scores["CIDEr"].tokenizer == caption_tokenizer.PTB

    ids, captions = list(predictions), list(predictions.values())
    per_item = [scores["CIDEr"].per_item[i] for i in ids]
    np.testing.assert_allclose(ngrams.Cider(references).score(ids, captions), per_item, atol=1e-6)
    bleu = ngrams.BleuTable(references, ids, captions)
    stats = expected["bleu_stats"]
    counted = [stats["testlen"], stats["reflen"], *stats["guess"], *stats["correct"]]
    assert bleu.statistics.sum(axis=0).tolist() == counted


@needs_java
def test_without_java_published_scores_come_out_to_the_third_digit(real_data):
    references, predictions, expected = published(real_data)
    split = caption_tokenizer.tokenize(references, caption_tokenizer.PYTHON)
    guess = dict(
        zip(
            predictions,
            caption_tokenizer.tokenize({0: list(predictions.values())}, caption_tokenizer.PYTHON)[0],
            strict=True,
        )
    )
    assert stock(StockCider(), split, guess)[0] == pytest.approx(expected["CIDEr"], abs=1e-3)
    real = caption_tokenizer.tokenize(references, caption_tokenizer.PTB)
    same = [a == b for i in references for a, b in zip(real[i], split[i], strict=True)]
    assert len(same) > 24_000 and np.mean(same) > 0.999


@needs_java
@pytest.mark.parametrize(
    "caption",
    [
        "A man, can't ride.",
        'Café #3 & co. cannot: (two) "x" [a] 1/2 — it\'s 7:30 a.m.!',
        "don't you'll they're I'm",
        "o'clock rock'n'roll black-and-white and/or $5.50 1,000 …",
        "...",
        "the dogs' bowls",
        "U.S. Mr. Smith",
    ],
)
def test_words_are_those_of_pycocoevalcaps_tokenizer(caption):
    expected = PTBTokenizer().tokenize({0: [{"caption": caption}]})
    assert caption_tokenizer.tokenize({0: [caption]}, caption_tokenizer.PTB) == expected


@pytest.mark.parametrize(
    ("caption", "split"),
    [
        ("A man, can't ride.", "a man ca n't ride"),
        ("It's Mr. Smith's black-and-white U.S. cat!", "it 's mr. smith 's black-and-white u.s. cat"),
        (
            "cannot (two) \N{LEFT DOUBLE QUOTATION MARK}x\N{RIGHT DOUBLE QUOTATION MARK} 7:30 1,000",
            "can not -lrb- two -rrb- x 7:30 1,000",
        ),
        ("we\N{RIGHT SINGLE QUOTATION MARK}ll go at 5 o'clock", "we 'll go at 5 o'clock"),
        ("...", ""),
    ],
)
def test_imitated_words_are_those_of_the_ptb_tokenizer(caption, split):
    assert caption_tokenizer.tokenize({0: [caption]}, caption_tokenizer.PYTHON) == {0: [split]}
    if caption_tokenizer.default_tokenizer() == caption_tokenizer.PTB:
        assert caption_tokenizer.tokenize({0: [caption]}, caption_tokenizer.PTB) == {0: [split]}


@pytest.mark.parametrize("tokenizer", [pytest.param(caption_tokenizer.PTB, marks=needs_java), caption_tokenizer.PYTHON])
def test_line_breaks_and_empty_captions_never_shift_the_others(tokenizer):
    captions = {"a": ["one\ntwo", "", "three\r\nfour"], "b": ["five\u2028six\x0bseven\x85eight"], "c": ["nine", " "]}
    assert caption_tokenizer.tokenize(captions, tokenizer) == {
        "a": ["one two", "", "three four"],
        "b": ["five six seven eight"],
        "c": ["nine", ""],
    }


@needs_java
def test_words_do_not_depend_on_the_locale(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=US-ASCII")
    assert caption_tokenizer.tokenize({0: ["Ein Café, 東京"]}, caption_tokenizer.PTB) == {0: ["ein café 東京"]}


@needs_java
def test_all_captions_cost_one_java_process(monkeypatch):
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    caption_tokenizer.tokenize({i: [f"caption {i}"] * 3 for i in range(700)}, caption_tokenizer.PTB)
    assert len(calls) == 1


def test_failing_java_is_an_error_not_an_empty_caption(monkeypatch, tmp_path):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho out of heap >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="exit status 1.*out of heap"):
        caption_tokenizer.tokenize({0: ["a cat"]}, caption_tokenizer.PTB)


def test_missing_java_is_said_and_named_in_the_score(without_java):
    with pytest.warns(UserWarning, match="no Java found.*install"):
        score = caption_metrics.cider(REFERENCES, PREDICTIONS)
    assert score.tokenizer == caption_tokenizer.PYTHON and score.value > 0 and caption_tokenizer.PYTHON in str(score)


def test_java_that_only_advertises_itself_is_no_java(without_java):
    stub = without_java / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    with pytest.warns(UserWarning, match="no Java found"):
        assert caption_tokenizer.default_tokenizer() == caption_tokenizer.PYTHON


def test_scores_are_pycocoevalcaps_whatever_the_order_and_type_of_ids():
    scores = caption_metrics.evaluate(REFERENCES, PREDICTIONS)
    gold = caption_tokenizer.tokenize(REFERENCES)
    guess = dict(zip(PREDICTIONS, caption_tokenizer.tokenize({0: list(PREDICTIONS.values())})[0], strict=True))
    cider, each = stock(StockCider(), gold, guess)
    assert scores["CIDEr"].value == pytest.approx(cider) and list(scores["CIDEr"].per_item) == list(PREDICTIONS)
    assert list(scores["CIDEr"].per_item.values()) == pytest.approx(list(each))
    bleus, each = stock(StockBleu(4), gold, guess)
    for order in range(1, 5):
        assert scores[f"BLEU-{order}"].value == pytest.approx(bleus[order - 1])
        assert list(scores[f"BLEU-{order}"].per_item.values()) == pytest.approx(list(each[order - 1]))
    assert all(score.n == 3 for score in scores.values())


# Few words, so that n-grams repeat, are shared between images and clip; lengths down to none.
text = st.lists(st.sampled_from("a the red blue cat boat on".split()), max_size=7).map(" ".join)
corpora = st.lists(st.tuples(st.lists(text.filter(bool), min_size=1, max_size=4), text), min_size=2, max_size=8)


@settings(deadline=None, max_examples=80)
@given(corpora, st.randoms(use_true_random=False))
def test_any_resample_scores_as_pycocoevalcap_scores_that_corpus(corpus, random):
    references = {f"i{n}": refs for n, (refs, _) in enumerate(corpus)}
    ids = list(references) * 2  # two candidates an image: its own and another's
    captions = [caption for _, caption in corpus] + [corpus[n - 1][1] for n in range(len(corpus))]
    drawn = random.choices(range(len(corpus)), k=len(corpus))
    rows = np.array([drawn, [n + len(corpus) for n in drawn]])  # (2, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "default_tokenizer", lambda: caption_tokenizer.PYTHON)
        cider = ngrams.Cider(references).table(ids, captions)
        bleu = ngrams.BleuTable(references, ids, captions)
    gold = [references[f"i{n}"] for n in drawn]
    for picks, cider_value, bleu_values in zip(rows, cider.corpus(rows), bleu.corpus(rows), strict=True):
        guess = [captions[row] for row in picks]
        expected, _ = stock(StockCider(), gold, dict(enumerate(guess)))
        assert cider_value == pytest.approx(expected, abs=1e-6)
        assert bleu_values == pytest.approx(stock(StockBleu(4), gold, dict(enumerate(guess)))[0], abs=1e-9)
    own = {f"i{n}": captions[n] for n in range(len(corpus))}
    assert cider.scores()[: len(corpus)] == pytest.approx(stock(StockCider(), references, own)[1], abs=1e-6)
    assert bleu.scores()[: len(corpus)].T == pytest.approx(np.array(stock(StockBleu(4), references, own)[1]), abs=1e-9)


@pytest.fixture
def corenlp(monkeypatch, tmp_path):
    """A folder in CoreNLP's place, and a function that puts a `java` of some version first on PATH."""
    monkeypatch.setattr(caption_metrics, "SPICE_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def install(version: str, modules: str = "java.base jdk.scripting.nashorn") -> None:
        java, printed = tmp_path / "java", f'openjdk version "{version}"'
        java.write_text(f"#!/bin/sh\n[ $1 = -version ] && echo '{printed}' >&2 || echo {modules}\n")
        java.chmod(0o755)

    return tmp_path, install


def test_spice_without_its_files_or_its_java_says_what_to_install(corenlp):
    folder, install = corenlp
    install("11.0.2")
    needed = r"corenlp-3.6.0.jar and .*models.jar in .*: run `python -m .*get_stanford_models.*scene_graph_f1"
    with pytest.raises(caption_metrics.MetricUnavailable, match=needed):
        caption_metrics.spice(REFERENCES, PREDICTIONS)
    for file in caption_metrics.CORENLP:
        assert not caption_metrics.spice_available()
        (folder / file).touch()
    trimmed = "java.base java.scripting"
    for java, message in (
        (("1.7.0_80",), "Java 7 is here: install"),
        (("15.0.1",), "Java 15 is here: install"),
        (("17.0.15", trimmed), "Java 17 is here: install"),
        (("11.0.13", trimmed), "Java 11 is here, without jdk.scripting.nashorn: install"),
    ):
        install(*java)
        assert not caption_metrics.spice_available()
        with pytest.raises(caption_metrics.MetricUnavailable, match=f"Java 8 to 14.*; {message} .*openjdk=11"):
            caption_metrics.spice(REFERENCES, PREDICTIONS)
    for java in (("1.8.0_392", "no such option"), ("11.0.2",), ("14.0.2",)):
        install(*java)
        assert caption_metrics.spice_available()


def test_the_command_that_spices_error_names_puts_its_files_where_it_looks_for_them(monkeypatch, corenlp):
    """pycocoevalcap's own command, with a small file in the place of Stanford's."""
    stanford = importlib.import_module("pycocoevalcap.spice.get_stanford_models")
    folder, _ = corenlp
    parts = SPICE_FOLDER.relative_to(Path(stanford.__file__).parent)  # read before the fixture moved it
    monkeypatch.setattr(caption_metrics, "SPICE_FOLDER", folder / parts)
    monkeypatch.setattr(stanford, "SPICEDIR", str(folder))
    (folder / parts).mkdir()

    def download(url, reporthook):
        assert url.endswith("stanford-corenlp-full-2015-12-09.zip")
        with zipfile.ZipFile(folder / "it.zip", "w") as file:
            for name in caption_metrics.CORENLP:
                file.writestr(f"stanford-corenlp-full-2015-12-09/{name}", "")
        return folder / "it.zip", {}

    monkeypatch.setattr(stanford, "urlretrieve", download)
    stanford.get_stanford_models()
    assert "corenlp" not in caption_metrics.missing_for_spice()
    (folder / parts / caption_metrics.CORENLP[1]).unlink()  # where one file is there, the command does nothing
    stanford.get_stanford_models()
    assert f"delete {caption_metrics.CORENLP[0]} there and run" in caption_metrics.missing_for_spice()


@pytest.mark.parametrize(
    "failure", [subprocess.CalledProcessError(1, "java"), PermissionError("cache"), json.JSONDecodeError("no", "", 0)]
)
def test_a_spice_that_fails_is_unavailable_and_says_why(monkeypatch, failure):
    def compute(self, gold, guess):
        raise failure

    monkeypatch.setattr(caption_metrics, "missing_for_spice", lambda: "")
    monkeypatch.setattr(caption_metrics.stock_spice.Spice, "__init__", lambda self: None)
    monkeypatch.setattr(caption_metrics.stock_spice.Spice, "compute_score", compute)
    with pytest.raises(caption_metrics.MetricUnavailable, match=f"failed on 3 .*{type(failure).__name__}.*8 GiB"):
        caption_metrics.spice(REFERENCES, PREDICTIONS)


@pytest.mark.skipif(not caption_metrics.spice_available(), reason=caption_metrics.missing_for_spice())
def test_spice_of_a_reference_is_1_and_of_other_things_0():
    same = caption_metrics.spice({1: ["a red bird sits on a boat"]}, {1: "a red bird sits on a boat"})
    other = caption_metrics.spice({1: ["a red bird sits on a boat"]}, {1: "two dogs"})
    assert (same.value, other.value) == (1, 0)


def test_spice_hands_its_scores_back_under_the_callers_ids(monkeypatch):
    def compute(self, gold, guess):
        assert sorted(gold) == sorted(guess) == [0, 1, 2]
        return 0.5, [{"All": {"f": len(guess[i][0].split()) / 10}} for i in sorted(gold)]

    monkeypatch.setattr(caption_metrics, "missing_for_spice", lambda: "")
    monkeypatch.setattr(caption_metrics.stock_spice.Spice, "__init__", lambda self: None)
    monkeypatch.setattr(caption_metrics.stock_spice.Spice, "compute_score", compute)
    score = caption_metrics.spice(REFERENCES, PREDICTIONS)
    assert score.value == 0.5 and score.per_item == {9: 0.6, 7: 0.6, "b": 0.2}


class Letters(Encoder):
    """A text's vector: how often it has each of five letters. Logs what it embeds."""

    def __init__(self):
        self.embedded = []

    def embed(self, items):
        self.embedded.append(list(items))
        return torch.tensor([[float(text.count(letter)) for letter in "abort"] for text in items])


@given(
    references=st.lists(st.lists(st.text("abort", min_size=1, max_size=4), min_size=1, max_size=4), min_size=1),
    at_once=st.integers(1, 5),
    data=st.data(),
)
def test_reference_similarity_is_the_mean_cosine_and_embeds_a_text_once(references, at_once, data):
    written = data.draw(st.lists(st.tuples(st.integers(0, len(references) - 1), st.text("abort", min_size=1))))
    written = [(0, "rat"), *written]
    encoder = Letters()
    with mock.patch.object(caption_metrics, "EMBEDDED_AT_ONCE", at_once):
        found = caption_metrics.reference_similarity(encoder, dict(enumerate(references)), *zip(*written, strict=True))
    vectors = Letters()
    expected = [
        torch.cosine_similarity(vectors.embed([caption]), vectors.embed(references[i]).double()).mean().item()
        for i, caption in written
    ]
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(map(len, encoder.embedded)) <= at_once
    named = {i for i, _ in written}
    once = Counter(chain.from_iterable(encoder.embedded))
    assert once == Counter({text for i in named for text in references[i]}) + Counter({text for _, text in written})


def test_reference_similarity_by_sbert_is_1_of_the_reference_and_falls_with_the_meaning():
    sbert = Sbert.from_pretrained(**registry.source_of("sbert", "cpu"))
    captions = ["a kite above the trees", "a kite flies over a forest", "two cats near a house"]
    same, near, far = caption_metrics.reference_similarity(sbert, REFERENCES, [9, 9, 9], captions)
    assert same == pytest.approx(1, abs=1e-6) and same > near > 0.6 > 0.3 > far


def test_reference_similarity_needs_references_of_every_image():
    with pytest.raises(ValueError, match=r"no references for 1 of the images, such as \[2\]"):
        caption_metrics.reference_similarity(Letters(), {1: ["a bat"], 2: []}, [1, 2], ["a bat", "a rat"])
    with pytest.raises(ValueError, match="1 image ids for 2 captions"):
        caption_metrics.reference_similarity(Letters(), {1: ["a bat"]}, [1], ["a bat", "a rat"])


def test_clip_score_of_given_features():
    images = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    captions = torch.tensor([[[3.0, 4.0], [-1.0, 0.0]], [[0.0, 5.0], [1.0, 0.0]]])  # cosines .6, −1 and 0, 1
    expected = torch.tensor([[1.5, 0.0], [0.0, 2.5]])
    torch.testing.assert_close(caption_metrics.clip_score(images, captions), expected)
    torch.testing.assert_close(caption_metrics.clip_score(images, captions, weight=1), expected / 2.5)


@pytest.mark.skipif(
    not isinstance(try_to_load_from_cache("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"), str),
    reason="CLIP ViT-B/32 is not on this machine",
)
@pytest.mark.parametrize(("kind", "published"), [("good", 0.8584), ("bad", 0.7153)])
def test_clip_score_of_its_authors_example_is_the_published_one(real_data, kind, published):
    folder, hub = real_data / "clipscore-example", "timm/vit_base_patch32_clip_224.openai"
    captions = json.loads((folder / f"{kind}_captions.json").read_text())
    images = ClipImage.from_pretrained(hub).embed([Image.open(folder / f"images/{name}.jpg") for name in captions])
    text = ClipText.from_pretrained(hub).embed([f"A photo depicts {caption}" for caption in captions.values()])
    assert caption_metrics.clip_score(images, text[:, None]).mean().item() == pytest.approx(published, abs=2e-3)


def test_score_of_a_candidate_does_not_depend_on_the_other_candidates():
    cider = ngrams.Cider(REFERENCES)
    ids = [7, 7, 9, "b", 7, 9, 7]  # the last two: the same caption twice for one image, once for another
    captions = ["a bird", "a red bird on a boat", "a kite", "two cats", "a boat", "a bird", "a bird"]
    together = cider.score(ids, captions)
    apart = [cider.score([i], [caption])[0] for i, caption in zip(ids, captions, strict=True)]
    assert together == pytest.approx(apart, abs=1e-12) and together[1] > together[0] > 0


def test_few_images_are_scored_with_the_rarity_of_a_larger_corpus():
    corpus = ngrams.Cider(REFERENCES)
    alone = caption_metrics.cider({7: REFERENCES[7]}, {7: PREDICTIONS[7]}, document_frequencies=corpus)
    assert alone.value == pytest.approx(caption_metrics.cider(REFERENCES, PREDICTIONS).per_item[7])
    with pytest.warns(UserWarning, match="one image is 0 by definition"):
        assert caption_metrics.cider({7: REFERENCES[7]}, {7: PREDICTIONS[7]}).value == 0
    with pytest.warns(UserWarning, match="one image is 0 by definition"):
        assert ngrams.Cider({7: REFERENCES[7]}).score([7], [PREDICTIONS[7]]) == 0


def test_empty_caption_scores_zero():
    scores = caption_metrics.evaluate(REFERENCES, PREDICTIONS | {9: ""})
    assert scores["CIDEr"].per_item[9] == 0 and scores["BLEU-1"].per_item[9] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("references", "predictions", "error", "message"),
    [
        (REFERENCES, {}, ValueError, "no predictions"),
        (
            REFERENCES,
            PREDICTIONS | {8: "a cat", "9": "a cat"},
            ValueError,
            r"no references for 2.*\[8, '9'\].*same.*type",
        ),
        (REFERENCES, {7: "a bird"}, ValueError, r"no prediction for 2 of 3.*\['b', 9\].*for i in predictions"),
        (REFERENCES | {7: []}, PREDICTIONS, ValueError, "7 has no caption"),
        (REFERENCES | {7: "a bird"}, PREDICTIONS, TypeError, "7 are one string.*list"),
        (REFERENCES, PREDICTIONS | {7: None}, TypeError, "7 is None"),
        (REFERENCES, PREDICTIONS | {7: ["a bird"]}, TypeError, r"7 is \['a bird'\] \(list\)"),
        ({7: ["."]}, {7: "a"}, ValueError, "no reference holds a word"),
    ],
)
def test_mismatched_captions_are_named(references, predictions, error, message):
    with pytest.raises(error, match=message):
        caption_metrics.evaluate(references, predictions)


def test_candidates_of_unknown_images_are_named():
    cider = ngrams.Cider(REFERENCES)
    with pytest.raises(ValueError, match=r"no references for 1.*\[8\].*3 images"):
        cider.score([7, 8, 8], ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 image ids for 1 captions"):
        cider.score([7, 8], ["a"])
    with pytest.raises(TypeError, match=r"a caption of 'candidates' is \['a'\] \(list\)"):
        cider.score([7, 9], ["a", ["a"]])
    with pytest.raises(ValueError, match="no references: give"):
        ngrams.Cider({})
    with pytest.raises(ValueError, match="different images"):
        cider.table([7, 9], ["a bird", "a kite"]).corpus(np.array([[0], [1]]))


def test_scene_graph_f1_is_one_for_the_truth_and_less_for_each_wrong_fact():
    scene = scene_graph.Scene("grass", (scene_graph.Thing("cat", "red", "small", 20, 20),))
    captions = ["a small red cat on the grass", "a small blue cat on the grass", "a large blue boat on the water"]
    scores = scene_graph.scene_graph_f1(captions, [scene] * 3)
    assert scores[0] == 1 and scores[0] > scores[1] > scores[2] == 0
    with pytest.raises(ValueError, match="shorter"):
        scene_graph.scene_graph_f1(captions, [scene])
