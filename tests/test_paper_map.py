"""The map from the paper to the course finds what texts refer to, and leaves out what they say of other papers."""

import nbformat
import pytest

from dalleflamingo.course import paper_map
from dalleflamingo.course.paper_map import FileOfTests, references

TEXTS = {
    "§3.1 and §4.2": {"§3.1", "§4.2"},
    "Eqs. 1–3, Eq. (5)": {"Eq. 1", "Eq. 2", "Eq. 3", "Eq. 5"},
    "Eqs. 1 to 3": {"Eq. 1", "Eq. 2", "Eq. 3"},
    "losses (2) and (4); loss (1)": {"Eq. 1", "Eq. 2", "Eq. 4"},
    "the loss is 1": set(),
    "Tables 3, 4, 5 and 9": {"Table 3", "Table 4", "Table 5", "Table 9"},
    "Figures 4 and 9, Table 2": {"Fig. 4", "Fig. 9", "Table 2"},
    "App. A.1, Appendices G and H": {"App. A", "App. G", "App. H"},
    "ICCV 2023), §1": {"§1"},
    "Ho et al. 2020, Eq. 3": set(),
    "Caron et al. 2021, §4.1; the tasks of §3.1": {"§3.1"},
    "Dhariwal & Nichol 2021, §3: as they do": set(),
    "Table 2, 500 images": {"Table 2"},
    "Table 77": set(),
}


@pytest.mark.parametrize("text", TEXTS)
def test_references_are_read_as_people_write_them(text):
    assert references(text) == TEXTS[text]


def test_a_cell_is_found_in_its_section():
    cells = [nbformat.v4.new_markdown_cell(source) for source in ("# 01 · Title", "## 1 · Part\n\nTable 1", "Fig. 3")]
    for cell, name in zip(cells, "abc", strict=True):
        cell.id = name
    found = dict(paper_map.in_notebook("notebooks/x.ipynb", nbformat.v4.new_notebook(cells=cells)))
    assert {part: (mention.name, mention.anchor) for part, mention in found.items()} == {
        "Table 1": ("01 · Title › 1 · Part", "cell-b"),
        "Fig. 3": ("01 · Title › 1 · Part", "cell-c"),
    }


MODULE = '''"""Losses (§4.2)."""
def loss():
    """Eq. 1."""
def other():
    pass
'''
TESTS = '''"""Of losses."""
from dalleflamingo.losses import loss, other
def test_one():
    assert loss() == 1
def test_two():
    """Table 9: something."""
    assert other() == 1
def helper():
    return loss()
'''


def test_a_test_belongs_to_what_its_code_names(tmp_path):
    for path, text in {"dalleflamingo/losses.py": MODULE, "tests/test_losses.py": TESTS}.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    found = paper_map.paper_map(paper_map.in_code(tmp_path))
    names = {part: {kind: [one.name for one in of] for kind, of in kinds.items()} for part, kinds in found.items()}
    assert names == {
        "§4.2": {"package": ["losses"], "tests": ["test_losses (2 tests)"]},
        "Eq. 1": {"package": ["losses.loss"], "tests": ["test_losses (1 test)"]},
        "Table 9": {"tests": ["test_losses (1 test)"]},
    }
    [mention] = found["Eq. 1"]["package"]
    assert (mention.path, mention.anchor) == ("dalleflamingo/losses.py", "line-2")


def test_a_name_that_was_not_imported_is_another(tmp_path):
    own = FileOfTests.of("tests/test_x.py", "from elsewhere import loss\ndef test_one():\n    loss()\n")
    [_, definition, *_] = paper_map.definitions(MODULE, "losses")
    assert definition.name == "losses.loss" and not own.testing(definition, "losses")
