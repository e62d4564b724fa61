import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dalleflamingo.captioner import Captioner
from dalleflamingo.generator import Generator
from dalleflamingo.registry import RegistryError
from dalleflamingo.similarity import ClipImage, Dino

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
