"""Notebooks 06 and 08 in profile colab, with tiny untrained models under the real names: the cells run to their end."""

import dataclasses
import json
from pathlib import Path

import matplotlib
import pytest
import tiny
import tiny_cycle

import dalleflamingo
from dalleflamingo import course, profiles, registry
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation.similarities import PairSimilarity
from dalleflamingo.sources import registered

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TINY = {"blip-large": "blip", "sd-v1-4": "sd", "clip-vit-l-14": "clip", "dino-vitb8": "dino"}


@pytest.fixture
def colab(tmp_path, monkeypatch) -> profiles.Profile:
    """Profile colab, in which the real names stand for tiny models and 32 images, generated at 32 pixels."""
    matplotlib.use("agg")
    tiny_cycle.save_models(tmp_path)
    for name, make in (("clip", tiny.clip), ("dino", tiny.dino)):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    examples = []
    for i, image in enumerate(tiny.pictures(32)):
        image.save(tmp_path / f"{i}.png")
        examples.append(Example(i, tmp_path / f"{i}.png", (tiny_cycle.TEXTS[i % len(tiny_cycle.TEXTS)],)))
    profile = dataclasses.replace(profiles.PROFILES["colab"], image_size=tiny.SIZE, dino_size=tiny.SIZE, steps=20)
    monkeypatch.setattr(registry, "source_of", lambda name, _="cpu": {"name_or_path": str(tmp_path / TINY[name])})
    monkeypatch.setattr(registered, "load_dataset", lambda *_: Dataset("tiny", examples))
    monkeypatch.setattr(course, "run_folder", lambda name: tmp_path / name)
    replaced = {
        "current_profile": lambda: profile,
        "load_dataset": registered.load_dataset,
        "load_text_similarities": lambda *_: [PairSimilarity("text_clip", lambda one, other: float(one == other))],
    }
    for name, value in replaced.items():
        monkeypatch.setattr(dalleflamingo, name, value)
    monkeypatch.setenv(profiles.VARIABLE, "colab")
    monkeypatch.chdir(NOTEBOOKS)
    return profile


def executed(notebook: str, until: str | None = None) -> dict[str, object]:
    """The names that a notebook's code cells leave, of those before the cell `until`."""
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["id"] == until:
            break
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    return names


def test_the_losses_by_hand_are_the_packages_in_parts_of_a_batch_and_at_the_profiles_size(colab):
    """The cells assert it; eight parts, and x̂ decoded smaller than the generator's own size."""
    names = executed("06_cycle_finetuning", "cell-24")
    config = names["config"]
    assert config.accumulation == 8 and config.losses.decoded_size == 256 and config.checkpointing
    assert all(norm > 0 for norm in names["norms"]["(2) image → text → image"].values())


def test_notebook_08_runs_with_other_models_under_the_real_names(colab):
    names = executed("08_the_real_models")
    assert names["profile"] is colab and set(names["cells"]["captioner"]) == {"BLIP (ViT-L)"}
