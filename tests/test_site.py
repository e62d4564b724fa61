"""The whole site: every link leads somewhere, no page asks another host, and all of it can be read by everybody."""

import json
import posixpath
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import built_site
import pytest
import yaml
from pygments import lex
from pygments.lexers import PythonLexer
from pygments.token import Whitespace

from dalleflamingo import __version__
from dalleflamingo.course import site
from dalleflamingo.course.markdown import DARK, LIGHT

ROOT = built_site.ROOT
LANDMARKS = {"header", "main", "nav"}


@dataclass
class Read(HTMLParser):
    """What a page holds."""

    text: str
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)  # what a browser fetches without being asked
    images: list[dict] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    prose: str = ""

    def __post_init__(self):
        super().__init__()
        self._silent = 0
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self._silent += tag in {"script", "style", "code", "pre"}
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" and "href" in values else []
        self.links += [values["action"]] if tag == "form" else []
        self.loads += [values[name] for name in ("src", "srcset", "poster", "data") if name in values]
        self.loads += [values["href"]] if tag == "link" else []
        self.images += [values] if tag == "img" else []

    def handle_endtag(self, tag):
        self._silent -= tag in {"script", "style", "code", "pre"}

    def handle_data(self, data):
        self.prose += "" if self._silent else data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return built_site.build(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def pages(folder) -> dict[str, Read]:
    files = sorted(folder.rglob("*.html"))
    return {file.relative_to(folder).as_posix(): Read(file.read_text(encoding="utf-8")) for file in files}


def test_the_site_holds_every_notebook_document_and_result(pages):
    notebooks = {f"{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")}
    documents = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    others = {"index.html", "paper.html", "search.html", "readme.html", "data/miniature/readme.html"}
    expected = notebooks | {path.as_posix().replace("README", "readme") for path in documents} | others
    assert {address for address in pages if not address.startswith("source/")} == expected


def test_every_link_and_anchor_leads_somewhere(folder, pages):
    for address, page in pages.items():
        assert page.links
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https", f"{address} links {link}"
                continue
            to = posixpath.normpath(
                posixpath.join(posixpath.dirname(address), unquote(parts.path) or Path(address).name)
            )
            assert (folder / to).is_file(), f"{address} links {link}, which is not there"
            assert not to.endswith((".md", ".ipynb")) or to == address.replace(".html", ".ipynb"), f"{address}: {link}"
            if parts.fragment:
                assert unquote(parts.fragment) in pages[to].ids, f"{address} links {link}: no such anchor"


def test_no_page_loads_anything_from_elsewhere(pages):
    for address, page in pages.items():
        scripts = [load for load in page.loads if not load.startswith("data:image/")]
        assert scripts == (["search-index.js", "search.js"] if address == "search.html" else []), address
        assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|sendBeacon", page.text.split("<body>")[0]), address


def test_no_formula_is_raw(pages):
    for address, page in pages.items():
        if not address.startswith("source/"):
            assert not re.search(r"\$\$|\$[^$\n]+\$|\\(frac|text|mathbb|bar)", page.prose), address


def test_every_page_has_its_landmarks_a_language_one_heading_and_unlike_ids(pages):
    for address, page in pages.items():
        assert '<html lang="en">' in page.text and LANDMARKS <= set(page.tags), address
        assert page.tags.count("h1") == 1, address
        assert page.text.count("<title></title>") == 0 and page.text.count('name="viewport"') == 1
        assert len(page.ids) == len(set(page.ids)), f"{address}: {sorted(i for i in page.ids if page.ids.count(i) > 1)}"


def test_every_image_has_words(pages):
    assert sum(len(page.images) for page in pages.values()) > 50
    for address, page in pages.items():
        assert all(len(image.get("alt", "")) > 5 for image in page.images), address
        texts = [image["alt"] for image in page.images if address.startswith("results/")]
        assert len(texts) == len(set(texts)), f"{address}: two figures with the same words"


def test_all_pages_but_sources_form_one_sequence(pages):
    seen, address = [], "index.html"
    while address:
        seen.append(address)
        after = re.search(r'href="([^"]+)" rel="next"', pages[address].text)
        address = after and posixpath.normpath(posixpath.join(posixpath.dirname(address), after[1]))
    assert set(seen) == {page for page in pages if not page.startswith("source/")} - {"search.html"}
    assert seen[1].startswith("00_") and seen.index("scoreboard.html") < seen.index("results/insight-1.html")


def test_the_search_knows_every_page(folder, pages):
    script = (folder / "search-index.js").read_text(encoding="utf-8")
    entries = json.loads(script.removeprefix("const SEARCH_INDEX = ").removesuffix(";\n"))
    assert {entry["address"].split("#")[0] for entry in entries} >= set(pages) - {"search.html"}
    for entry in entries:
        address, _, anchor = entry["address"].partition("#")
        assert not anchor or anchor in pages[address].ids
    [found] = [entry["address"] for entry in entries if entry["section"] == "soft prompt"]
    assert found == "glossary.html#soft-prompt"


def test_the_front_page_shows_every_claim_and_how_the_notebooks_ran(pages):
    rows = json.loads((ROOT / "docs/results/claims.json").read_text(encoding="utf-8"))["claims"]
    index = pages["index.html"].text
    of_insights = sum(row["claim"] <= 4 for row in rows)  # which stand beside their insight, too
    assert index.count('class="track') == len(rows) + of_insights
    assert (
        index.count("not executed") == 1 and index.count("1 min 01 s") == len(list(ROOT.glob("notebooks/*.ipynb"))) - 1
    )
    assert "failed in code cell 1 (x): &lt;b&gt;" in index
    gallery = json.loads((ROOT / "docs/figures/gallery/gallery.json").read_text(encoding="utf-8"))
    shown = gallery["image_text_image"] + gallery["text_image_text"]
    assert index.count('class="rank"') == sum(len(one["candidates"]) for one in shown)


def test_the_map_leads_from_the_paper_to_cells_code_and_tests(pages):
    rows = re.findall(r'<tr id="([^"]+)">(.*?)</tr>', pages["paper.html"].text, re.DOTALL)
    found = {name: Read(row).links for name, row in rows}
    equation = found["eq-2"]
    assert any(link.startswith("06_cycle_finetuning.html#cell-") for link in equation)
    assert any(link.startswith("source/dalleflamingo/cycle_losses.py.html#line-") for link in equation)
    assert "source/tests/test_cycle_losses.py.html" in equation


# ── what a page says ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_term_of_the_glossary_is_used_in_the_notebook_that_it_names():
    source = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"(?m)^### ([^,(\n]+).*\n\n.+\[Notebook (\d\d)\]\(\.\./notebooks/(.+)\)$", source)
    assert len(terms) == source.count("\n### ") > 40
    for term, number, name in terms:
        cells = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
        words = " ".join(" ".join("".join(cell["source"]) for cell in cells).lower().split())
        assert name.startswith(number) and term.strip().lower() in words, f"{name} does not say {term}"


def test_the_citation_is_the_same_everywhere(pages):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    index = " ".join(pages["index.html"].text.split())
    [paper], [authors] = citation["references"], citation["authors"]
    assert citation["version"] == __version__ and f"version {__version__}" in index
    assert citation["title"] in re.sub("<[^>]+>", "", index) and authors["name"] in index
    names = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    for value in (names, paper["title"], paper["collection-title"], f"{paper['start']}--{paper['end']}", paper["year"]):
        assert str(value) in index


# ── contrast ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it, of a colour as #rgb or #rrggbb."""
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def palettes() -> list[dict[str, str]]:
    """The colours of the light and of the dark scheme."""
    style = (Path(site.__file__).with_name("pages") / "style.css").read_text(encoding="utf-8")
    return [dict(re.findall(r"--(\w+): (#\w+)", rule)) for rule in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]


def test_black_on_white_has_the_greatest_contrast():
    assert contrast("#000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_text_stands_out_from_every_ground(palette):
    for ground in ("ground", "box", "note"):
        for ink in ("text", "quiet", "link", "holds", "fails", "open"):
            assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)


@pytest.mark.parametrize(
    ("palette", "formatter"), list(zip(palettes(), (LIGHT, DARK), strict=True)), ids=["light", "dark"]
)
def test_code_stands_out_in_every_colour(palette, formatter):
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "dalleflamingo").glob("*.py")]
    kinds = {kind for source in sources for kind, _ in lex(source, PythonLexer())} - {Whitespace}
    for kind in kinds:
        colour = formatter.style.style_for_token(kind)["color"] or palette["text"].lstrip("#")
        assert contrast(colour, palette["box"]) >= 4.5, kind
