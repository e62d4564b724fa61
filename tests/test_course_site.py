"""Pages that need no network: formulas, links, images with words, and nothing that a model could inject."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from dalleflamingo.course import show, site
from dalleflamingo.course.run import neighbours
from dalleflamingo.course.site import Link, mathml, render_page

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def page_of(*cells: nbformat.NotebookNode, before: Link | None = None, after: Link | None = None) -> str:
    return render_page(nbformat.v4.new_notebook(cells=list(cells)), ROOT / "notebooks", before, after)


def text(source: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(source)


def code(source: str, *outputs: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


# ── formulas ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_formula_of_the_course_stays_raw(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        source = re.sub(r"```.*?```|`[^`]*`", "", "".join(cell["source"]), flags=re.DOTALL)
        for block, inline in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", source, re.DOTALL):
            formula = mathml(block or inline, "block" if block else "inline")
            assert not re.search(r"\\|&(?!#?\w+;)|>\$<", formula), block or inline
            ElementTree.fromstring(formula)  # whole


def test_formulas_stand_in_the_page_as_mathml_and_dollars_in_code_stay():
    page = page_of(text("For $x_i$ we have\n\n$$a = \\frac{b}{c}$$\n\nand `$HOME`."))
    assert page.count("<math") == 2 and "<mfrac>" in page and "<code>$HOME</code>" in page
    assert "$x_i$" not in page and "$$" not in page


# ── links and images ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_links_to_notebooks_lead_to_their_pages_and_other_links_stay():
    page = page_of(text("[a](04_image.ipynb) [b](04_image.ipynb#part) [c](https://x.org/y.ipynb) [d](#here)"))
    for address in ("04_image.html", "04_image.html#part", "https://x.org/y.ipynb", "#here"):
        assert f'href="{address}"' in page


def test_a_page_leads_to_its_neighbours_and_back():
    page = page_of(text("# One"), before=Link("Zero <b>", "0.html"), after=Link("Two", "2.html"))
    assert 'href="0.html" rel="prev"' in page and 'href="2.html" rel="next"' in page and 'href="index.html"' in page
    assert "Zero &lt;b&gt;" in page and "Zero <b>" not in page


def test_neighbours_follow_the_order_of_the_course():
    found = neighbours(NOTEBOOKS)
    first, second, *_, last = NOTEBOOKS
    assert found[first][0] is None and found[last][1] is None
    assert found[second][0].address == f"{first.stem}.html" and found[first][1].address == f"{second.stem}.html"
    assert found[second][0].title.startswith("00 · ")


def test_sections_can_be_linked_to():
    page = page_of(text("# Title"), text("## 1 · First one"), text("## 2 · Second"), text("## 3 · Third"))
    assert '<h2 id="1-first-one">' in page and 'href="#1-first-one"' in page
    assert page.index('href="#1-first-one"') < page.index('<h2 id="1-first-one">')


def test_figures_of_the_course_bring_their_words():
    figure = show.row([Image.new("RGB", (64, 64))], ["a red cat\non the grass"], "What to see.", ["input"])
    data, metadata = DisplayFormatter().format(figure)
    output = nbformat.v4.new_output("display_data", {"image/png": data["image/png"]}, metadata=metadata)
    page = page_of(code("show.row(…)", output))
    assert 'alt="input · a red cat on the grass · What to see."' in page


def test_charts_name_their_axes_in_words():
    interval = show.Interval(0.5, 0.4, 0.6, 10, None)
    _, metadata = DisplayFormatter().format(show.lines({"clip": {0.0: interval, 1.0: interval}}, "F1", "step", "Look."))
    assert metadata["image/png"]["alt"] == "F1 (better ↑) · step · Look."


# ── outputs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_models_write_is_escaped():
    evil = "<script>alert(1)</script>"
    stream = nbformat.v4.new_output("stream", name="stdout", text=evil)
    result = nbformat.v4.new_output("execute_result", {"text/plain": evil})
    picture = nbformat.v4.new_output("display_data", {"image/png": "AAAA"}, metadata={"image/png": {"alt": f'"{evil}'}})
    error = nbformat.v4.new_output("error", ename="E", evalue=evil, traceback=[f"\x1b[31m{evil}\x1b[0m"])
    page = page_of(code(f"print('{evil}')", stream, result, picture, error))
    assert "<script" not in page and page.count("&lt;script&gt;") == 5 and "\x1b" not in page


def test_progress_is_left_out_and_a_stream_is_one_block():
    bar = nbformat.v4.new_output("stream", name="stderr", text="Loading weights:  50%|████")
    widget = nbformat.v4.new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    )
    pieces = [nbformat.v4.new_output("stream", name="stdout", text=part) for part in ("one\n", "two\n")]
    page = page_of(code("x", bar, widget, *pieces))
    assert "Loading" not in page and ">bar<" not in page and "<pre>one\ntwo</pre>" in page


def test_tables_of_pandas_keep_their_cells_and_lose_their_style():
    table = "<div><style scoped>.x {}</style><table><tr><td>0.5</td></tr></table></div>"
    page = page_of(code("frame", nbformat.v4.new_output("execute_result", {"text/html": table, "text/plain": "t"})))
    assert "<td>0.5</td>" in page and ".x {}" not in page


def test_the_index_escapes_what_a_notebook_says():
    row = {"link": Link("A <i>title</i>", "a.html"), "time": "1 s", "memory": "1 GiB", "end": "failed in <b>"}
    page = site.render_index("mini", [row])
    assert "A &lt;i&gt;title&lt;/i&gt;" in page and "failed in &lt;b&gt;" in page


def test_pages_ask_no_other_host():
    page = page_of(text("# Title\n\n$x$"), code("1 + 1", nbformat.v4.new_output("execute_result", {"text/plain": "2"})))
    outside = set(re.findall(r'(?:src|href)="?(https?://[^">\s]+)', page)) | set(re.findall(r"@import|url\(", page))
    assert not outside and "<script" not in page
