"""Every diagram is in a notebook, says what it shows, stands on its own, and can be read on a phone."""

import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dalleflamingo.course import diagrams

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SVG = "{http://www.w3.org/2000/svg}"
COLUMN = 358  # pixels of the page's column on a phone that is 390 pixels wide
files = pytest.mark.parametrize("file", sorted(diagrams.FOLDER.iterdir()), ids=lambda file: file.stem)


def image(shown) -> dict[str, str]:
    """Attributes of the only tag."""
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(shown.data)
    [(tag, attributes)] = tags
    assert tag == "img"
    return attributes


def test_the_notebooks_show_every_diagram_and_no_other():
    cells = [cell for path in NOTEBOOKS.glob("*.ipynb") for cell in json.loads(path.read_text("utf-8"))["cells"]]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    shown = re.findall(r'diagrams\.show\("(\w+)"\)', code)
    assert sorted(shown) == sorted(file.stem for file in diagrams.FOLDER.iterdir())


def test_a_diagram_is_one_image_with_its_title_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(diagrams, "FOLDER", tmp_path)
    text = '<svg xmlns="http://www.w3.org/2000/svg" width="476"><title>a "b" &lt;i&gt; x̂</title></svg>'
    (tmp_path / "one.svg").write_text(text, encoding="utf-8")
    attributes = image(diagrams.show("one"))
    assert attributes["alt"] == 'a "b" <i> x̂' and attributes["width"] == "476"
    kind, _, data = attributes["src"].partition(";base64,")
    assert kind == "data:image/svg+xml" and b64decode(data).decode() == text


@files
def test_the_title_is_one_sentence(file):
    title = ElementTree.parse(file).getroot().findtext(f"{SVG}title")
    assert title[0].isupper() and title.endswith(".") and title.count(". ") == 0


@files
def test_text_is_twelve_pixels_high_on_a_phone(file):
    root = ElementTree.parse(file).getroot()
    width = float(root.get("width"))
    assert root.get("viewBox").split()[2] == root.get("width")
    sizes = [float(size) for size in re.findall(r"font(?:-size)?[:=]\s*\"?([\d.]+)", file.read_text("utf-8"))]
    assert sizes and min(sizes) * COLUMN / width >= 12


@files
def test_a_diagram_has_a_white_ground_and_loads_nothing(file):
    root = ElementTree.parse(file).getroot()
    first = next(element for element in root if element.tag not in (f"{SVG}title", f"{SVG}style", f"{SVG}defs"))
    assert first.attrib == {"width": root.get("width"), "height": root.get("height"), "fill": "#fff"}
    known = {f"#{element.get('id')}" for element in root.iter() if element.get("id")}
    text = file.read_text("utf-8")
    links = re.findall(r"(?:href=\"|src=\"|url\()([^\")]+)", text)
    assert set(links) <= known and "@import" not in text and "<script" not in text
