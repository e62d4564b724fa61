"""Profiles: the word in the environment decides, and every profile can be served by the registry."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dalleflamingo import profiles, registry
from dalleflamingo.sources import models


def test_profile_is_mini_unless_the_environment_names_another(monkeypatch):
    monkeypatch.delenv("DALLEFLAMINGO_PROFILE", raising=False)
    assert profiles.current().name == "mini"
    monkeypatch.setenv("DALLEFLAMINGO_PROFILE", "")
    assert profiles.current().name == "mini"
    monkeypatch.setenv("DALLEFLAMINGO_PROFILE", "colab")
    assert profiles.current().name == "colab"


def test_unknown_profile_is_refused_with_the_names_of_all(monkeypatch):
    monkeypatch.setenv("DALLEFLAMINGO_PROFILE", "maxi")
    with pytest.raises(ValueError, match="'maxi' is not a profile: set it to one of smoke, mini, colab, paper"):
        profiles.current()


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda profile: profile.name)
def test_every_name_in_a_profile_is_registered_as_what_it_is_used_for(profile):
    kinds = {
        "captioner": [profile.captioner, *profile.captioners, profile.other_captioner],
        "generator": [profile.generator, profile.other_generator],
        "image similarity": [profile.clip, profile.dino],
        "judge": [profile.inception, profile.judge],
        "data set": [profile.dataset, profile.coco],
    }
    for kind, names in kinds.items():
        assert {registry.ENTRIES[name].kind for name in names if name} == {kind}


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda profile: profile.name)
def test_a_profile_is_of_one_scale(profile):
    values = [value for name, value in vars(profile).items() if name != "name"]
    names = [value for value in values if isinstance(value, str) and value in registry.ENTRIES]
    assert len(names) >= 8 and len({registry.ENTRIES[name].shipped for name in (*names, *profile.captioners)}) == 1
    assert profile.captioners[0] == profile.captioner


def test_the_real_models_are_used_as_the_paper_uses_them(monkeypatch):
    """DDPM, DINO at 384 pixels, the captioner behind the words it was finetuned behind (§3.1, App. A and G)."""
    asked = {}
    for kind in ("Captioner", "Generator", "ClipImage", "Dino"):
        loader = SimpleNamespace(from_pretrained=lambda kind=kind, **options: asked.update({kind: options}))
        monkeypatch.setattr(models, kind, loader)
    monkeypatch.setattr(registry, "locate", lambda name: name)
    models.load_models(profiles.PROFILES["paper"])
    assert asked["Generator"]["scheduler"] == "DDPM" and asked["Dino"]["image_size"] == 384
    assert asked["Captioner"]["prompt"] == "a picture of" and asked["Captioner"]["decoding"]["num_beams"] == 3
    assert all(asked[kind]["revision"] for kind in asked)
    models.load_captioner(profiles.PROFILES["paper"], profiles.PROFILES["paper"].other_captioner)
    assert asked["Captioner"]["prompt"] == "a photo of" and asked["Captioner"]["decoding"]["num_beams"] == 5
    models.load_models(profiles.PROFILES["paper"], "DDIM")
    assert asked["Generator"]["scheduler"] == "DDIM"
    models.load_models(profiles.PROFILES["mini"])
    assert asked["Generator"]["scheduler"] is asked["Dino"]["image_size"] is None and not asked["Captioner"]["prompt"]


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "dtype"),
    [
        (False, False, "cpu", torch.float32),
        (False, True, "mps", torch.float32),
        (True, False, "cuda", torch.float16),
        (True, True, "cuda", torch.float16),
    ],
)
def test_half_precision_is_for_cuda_only(monkeypatch, cuda, mps, device, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    colab = profiles.PROFILES["colab"]
    assert (profiles.find_device(), colab.device, colab.torch_dtype) == (device, device, dtype)
    assert profiles.PROFILES["mini"].torch_dtype == torch.float32 and "precision" not in profiles.PROFILES["mini"].cycle


def test_only_one_place_chooses_the_device():
    """`find_device` and `new_accelerator`; what else asks torch would disagree with them on some machine."""
    asks = re.compile(r"(cuda|mps|accelerator)\.is_available|current_accelerator|\bAccelerator\(")
    package, found = Path(profiles.__file__).parent, []
    for path in package.rglob("*.py"):
        found += [(path.name, match.group()) for match in asks.finditer(path.read_text(encoding="utf-8"))]
    assert sorted(found) == [
        ("accelerators.py", "Accelerator("),
        ("profiles.py", "cuda.is_available"),
        ("profiles.py", "mps.is_available"),
    ]


def test_a_profile_cannot_be_changed_in_place_but_can_be_copied_with_a_change():
    mini = profiles.PROFILES["mini"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        mini.images = 1000
    for settings in (mini.cycle, mini.cycle["losses"]):
        with pytest.raises(TypeError, match="does not support item assignment"):
            settings["steps"] = 1
    assert dataclasses.replace(mini, images=2).images == 2 and mini.images == 24
    assert len({mini, dataclasses.replace(mini), profiles.PROFILES["smoke"]}) == 2
