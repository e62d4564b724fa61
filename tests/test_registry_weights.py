import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dalleflamingo.captioner import Captioner
from dalleflamingo.generator import Generator
from dalleflamingo.registry import RegistryError, loading
from dalleflamingo.similarity import ClipImage, Dino

DAMAGES = {"empty": b"", "cut": None, "other": b"[]", "null": b"null", "NUL": b"\0" * 50, "no text": b"\xff\xfe" * 30}
MODELS = [(tiny.blip, Captioner), (tiny.stable_diffusion, Generator), (tiny.clip, ClipImage), (tiny.dino, Dino)]


@pytest.fixture(params=MODELS, ids=lambda pair: pair[1].__name__)
def model(request, tmp_path):
    make, loader = request.param
    return make(tmp_path), loader


def test_truncated_weights_are_named_with_their_remedy(model):
    folder, loader = model
    file = sorted(folder.rglob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RegistryError) as error:
        loader.from_pretrained(str(folder))
    assert f"{file} (" in str(error.value) and "cut short" in str(error.value)
    assert f"git checkout -- {file}" in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_names_its_folder_whatever_the_library_says(model, damage):
    """Each library has errors of its own for it: JSONDecodeError, KeyError, TypeError, OSError over three lines …"""
    folder, loader = model
    files = [file for file in folder.rglob("*.json") if "config" in file.name and "generation" not in file.name]
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if DAMAGES[damage] is None else DAMAGES[damage])
        with pytest.raises(RegistryError) as caught:
            loader.from_pretrained(str(folder))
        assert str(caught.value).startswith(f"{folder} cannot be loaded (") and len(str(caught.value).splitlines()) == 1
        assert f"git checkout -- {folder}; else copy or download it again" in str(caught.value)
        file.write_bytes(whole)
    loader.from_pretrained(str(folder))


@pytest.mark.parametrize("loader", [Captioner, Generator, Dino])
def test_a_model_that_is_neither_here_nor_within_reach_is_named(loader):
    with pytest.raises(
        RegistryError, match="nobody/no-such-model is not on this machine, and cannot be downloaded: .*"
    ):
        loader.from_pretrained("nobody/no-such-model")


@pytest.mark.parametrize(
    ("make", "loader", "files"),
    [
        (tiny.blip, Captioner, ["vocab.txt", "tokenizer.json"]),
        (tiny.blip2, Captioner, ["vocab.json", "merges.txt", "tokenizer.json"]),
        (
            tiny.stable_diffusion,
            Generator,
            ["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json"],
        ),
    ],
    ids=["blip", "blip2", "sd"],
)
def test_a_model_without_its_tokenizers_files_is_refused(tmp_path, make, loader, files):
    """As an interrupted download leaves it; transformers makes an empty vocabulary, which reads every word as [UNK]."""
    folder = make(tmp_path)
    removed = [folder / file for file in files if (folder / file).exists()]
    assert removed
    for file in removed:
        file.unlink()
    with pytest.raises(RegistryError, match=f"^{folder} cannot be loaded .*; else copy or download it again$"):
        loader.from_pretrained(str(folder))


def test_what_is_not_the_models_fault_passes_unchanged():
    """A full disk, a full memory, our own words: wrapped in a remedy for damaged models they would mislead."""
    for error in (
        OSError(28, "No space left on device"),
        MemoryError(),
        torch.OutOfMemoryError(),
        RegistryError("own"),
    ):
        with pytest.raises(type(error)) as caught, loading("nobody/model"):
            exec("raise error", {"error": error})
        assert caught.value is error


@pytest.mark.parametrize("problem", [OSError("You are not in the authorized list.\nVisit ..."), KeyError("model_type")])
def test_what_a_hub_answers_is_told_in_one_line(problem):
    with pytest.raises(RegistryError, match="nobody/model cannot be loaded .*licence must be accepted first") as caught:
        with loading("nobody/model"):
            exec("raise problem", {"problem": problem})
    assert len(str(caught.value).splitlines()) == 1


def test_folder_without_safetensors_is_refused_though_it_holds_a_pickle(model):
    folder, loader = model
    for file in folder.rglob("*.safetensors"):
        torch.save({}, file.with_suffix(".bin"))
        file.unlink()
    with pytest.raises(RegistryError, match="no .safetensors file"):
        loader.from_pretrained(str(folder))


def test_weights_stored_in_half_precision_are_computed_in_float32(model):
    folder, loader = model
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(halves, file, metadata={"format": "pt"})
    loaded = loader.from_pretrained(str(folder))
    modules = [part for part in vars(loaded).values() if isinstance(part, torch.nn.Module)]
    if loader is Generator:
        modules = [loaded.pipeline.unet, loaded.pipeline.vae, loaded.pipeline.text_encoder]
    assert {weight.dtype for module in modules for weight in module.parameters()} == {torch.float32}
