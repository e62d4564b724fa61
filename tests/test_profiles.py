"""Profiles: the word in the environment decides, and every profile can be served by the registry."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dalleflamingo import profiles, reconstruct, registry


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


def test_numbers_are_those_that_the_course_promises():
    sizes = {p.name: (p.images, p.candidates, p.steps) for p in profiles.PROFILES.values()}
    assert sizes == {"smoke": (4, 2, 4), "mini": (24, 5, 20), "colab": (24, 5, 50), "paper": (4500, 10, 50)}
    assert {p.guidance_scale for p in profiles.PROFILES.values() if p.captioner == "blip-large"} == {7.5}


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda profile: profile.name)
def test_every_name_in_a_profile_is_registered_as_what_it_is_used_for(profile):
    kinds = {
        "captioner": "captioner",
        "other_captioner": "captioner",
        "generator": "generator",
        "clip": "image similarity",
        "dino": "image similarity",
        "dataset": "data set",
        "coco": "data set",
    }
    if profile.other_generator:
        kinds["other_generator"] = "generator"
    for attribute, kind in kinds.items():
        assert registry.ENTRIES[getattr(profile, attribute)].kind == kind


@pytest.mark.parametrize("profile", profiles.PROFILES.values(), ids=lambda profile: profile.name)
def test_a_profile_is_of_one_scale(profile):
    names = [profile.captioner, profile.other_captioner, profile.generator, profile.clip, profile.dino, profile.dataset]
    assert len({name.startswith("miniature/") for name in names}) == 1


def test_the_real_models_are_used_as_the_paper_uses_them(monkeypatch):
    """DDPM, DINO at 384 pixels, the captioner behind the words it was finetuned behind (§3.1, App. A and G)."""
    asked = {}
    for kind in ("Captioner", "Generator", "ClipImage", "Dino"):
        loader = SimpleNamespace(from_pretrained=lambda kind=kind, **options: asked.update({kind: options}))
        monkeypatch.setattr(reconstruct, kind, loader)
    monkeypatch.setattr(registry, "locate", lambda name: name)
    reconstruct.load_models(profiles.PROFILES["paper"])
    assert asked["Generator"]["scheduler"] == "DDPM" and asked["Dino"]["image_size"] == 384
    assert asked["Captioner"]["prompt"] == "a picture of"
    assert all(asked[kind]["revision"] for kind in asked)
    reconstruct.load_models(profiles.PROFILES["paper"], "DDIM")
    assert asked["Generator"]["scheduler"] == "DDIM"
    reconstruct.load_models(profiles.PROFILES["mini"])
    assert asked["Generator"]["scheduler"] is asked["Dino"]["image_size"] is None and not asked["Captioner"]["prompt"]


def test_half_precision_is_for_the_gpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profiles.PROFILES["colab"].device == "cpu"
    assert profiles.PROFILES["colab"].torch_dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert profiles.PROFILES["colab"].device == "cuda"
    assert profiles.PROFILES["colab"].torch_dtype == torch.float16
    assert profiles.PROFILES["mini"].torch_dtype == torch.float32


def test_a_profile_cannot_be_changed_in_place_but_can_be_copied_with_a_change():
    mini = profiles.PROFILES["mini"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        mini.images = 1000
    assert dataclasses.replace(mini, images=2).images == 2 and mini.images == 24
