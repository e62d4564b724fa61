"""The command draws what the README shows, and chooses its picture without looking at captions."""

import dataclasses

import fakes
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dalleflamingo import profiles, reconstruct, registry
from dalleflamingo.research import readme_figures


class Clip(fakes.MeanColour):
    name = "clip"


@pytest.fixture
def dataset(tmp_path):
    """Twenty-four pictures that have scenes."""
    plain = fakes.dataset(tmp_path / "pictures", n=24)
    scene = {"ground": "sand", "things": [{"kind": "cat", "colour": "red", "size": "small", "x": 30, "y": 30}]}
    examples = tuple(dataclasses.replace(example, extra={"scene": scene}) for example in plain)
    return dataclasses.replace(plain, examples=examples)


def test_both_figures_are_written_where_the_command_says(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setattr(registry, "dataset", lambda name: dataset)
    monkeypatch.setattr(reconstruct, "load_models", lambda _: (fakes.Captioner(), fakes.Generator(), [Clip()]))
    assert readme_figures.main([str(tmp_path / "docs")]) == 0
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["ranked.png", "world.png"]
    for path in (tmp_path / "docs").iterdir():
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    assert str(tmp_path / "docs") in capsys.readouterr().out


def test_the_ranked_picture_is_the_one_with_the_widest_spread():
    likeness = [("a", 0.9), ("a", 0.8), ("b", 0.1), ("b", 0.6), ("c", 0.5), ("c", 0.9)]
    ids = {"a": 3, "b": 1, "c": 2}
    table = pd.DataFrame([dict(image_id=ids[name], clip=value, caption="x") for name, value in likeness])
    assert readme_figures.most_different(table) == 1


def test_missing_weights_are_answered_with_how_to_get_them(tmp_path, dataset, monkeypatch, capsys):
    def nowhere(profile: profiles.Profile):
        raise registry.RegistryError("there are no weights: run `git checkout`")

    monkeypatch.setattr(registry, "dataset", lambda name: dataset)
    monkeypatch.setattr(reconstruct, "load_models", nowhere)
    with pytest.raises(SystemExit) as stopped:
        readme_figures.main([str(tmp_path / "docs")])
    assert stopped.value.code == 2 and "git checkout" in capsys.readouterr().err
