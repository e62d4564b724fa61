"""The cards of the miniature: every model has one, and it says what MANIFEST.json says."""

import json
import tomllib

import pytest
import yaml

from dalleflamingo import registry
from dalleflamingo.miniature.corpora import annotation_files, data_folder
from dalleflamingo.research import cards

TEXTS = tomllib.loads(cards._TEXTS.read_text(encoding="utf-8"))
GATE = {
    "model": "blip",
    "what": "captions that say nothing false",
    "value": 0.125,
    "low": 0.1,
    "high": 0.15,
    "n": 7,
    "floor": None,
    "goal": [0.5, 0.8],
}
MANIFEST = {
    "models": {
        "blip-web": {
            "command": "train blip-web",
            "parameters": 1234567,
            "minutes": 9.6,
            "hardware": "a core",
            "stage_of": "blip",
        },
        "blip": {
            "command": "train blip",
            "parameters": 7,
            "minutes": 1.2,
            "hardware": "a core",
            "earlier": [{"minutes": 3.0}, {"minutes": 4.0}],
        },
    },
    "files": {"blip/model.safetensors": {"bytes": 2_000_000}, "blip-large/model.safetensors": {"bytes": 5_000_000}},
    "gates": [GATE, GATE | {"model": "blip-large", "value": 0.875}],
}


def test_every_shipped_model_has_a_card_and_no_other():
    models = {e.name for e in registry.ENTRIES.values() if e.shipped and e.kind != "data set"}
    assert {f"miniature/{name}" for name in TEXTS if name != "corpora"} == models


def test_a_card_has_its_own_stages_size_and_gates():
    card = cards.model_card("blip", TEXTS["blip"], MANIFEST)
    head, body = card.split("---\n")[1:3]
    assert yaml.safe_load(head)["license"] == "mit" and yaml.safe_load(head)["library_name"] == "transformers"
    assert "2.0 MB" in body and "0.125" in body and "0.875" not in body
    assert "`train blip-web`: 1,234,567 trained parameters, 10 minutes on a core" in body
    assert "`train blip`: 7 trained parameters, 1 minutes, after 7 minutes of earlier runs on a core" in body
    assert body.index("train blip-web") < body.index("`train blip`")


def test_the_card_of_the_corpora_counts_what_is_there():
    files = annotation_files()
    card = cards.data_card(TEXTS["corpora"], files)
    for name, file in files.items():
        corpus = json.loads(file.read_text())
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:3] == [f"{len(corpus['images']):,}", f"{len(corpus['annotations']):,}"]
        words = [len(entry["caption"].split()) for entry in corpus["annotations"]]
        assert float(cells[4]) == pytest.approx(sum(words) / len(words), abs=0.051)
        low, high = map(int, cells[5].split(" to "))
        inside = sum(low <= count <= high for count in words) / len(words)
        assert 0.88 < inside and min(words) <= low < high <= max(words)


def test_the_shipped_cards_are_those_that_the_command_writes():
    manifest = json.loads((data_folder() / "MANIFEST.json").read_text())
    for name, text in TEXTS.items():
        if name == "corpora":
            written = (data_folder() / "README.md").read_text(encoding="utf-8")
            assert written == cards.data_card(text, annotation_files())
        else:
            written = (data_folder() / name / "README.md").read_text(encoding="utf-8")
            assert written == cards.model_card(name, text, manifest)
