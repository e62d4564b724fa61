"""Pages that need no network: formulas, links, images with words, and nothing that a model could inject."""

import base64
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from dalleflamingo.course import front_page, search, show, site
from dalleflamingo.course.markdown import mathml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def page_of(*cells: nbformat.NotebookNode, before: site.Page | None = None, after: site.Page | None = None) -> str:
    """A notebook's page, as if it were among those of the course."""
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    page = site.Site([], Path()).notebook_page(ROOT / "notebooks" / "one.ipynb", notebook)
    return site.render(page, before, after)


def main_of(page: str) -> str:
    [content] = re.findall(r"<main.*?</main>", page, re.DOTALL)
    return content


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

LINKS = {  # in a notebook -> on its page
    "00_the_question.ipynb": "00_the_question.html",
    "00_the_question.ipynb#part": "00_the_question.html#part",
    "../docs/results/insight-1.md": "results/insight-1.html",
    "../docs/protocol.md#data": "protocol.html#data",
    "../README.md": "readme.html",
    "../dalleflamingo/bridge.py": "source/dalleflamingo/bridge.py.html",
    "../docs/results/nucleus.csv": "files/docs/results/nucleus.csv",
    "../LICENSE": "files/LICENSE.txt",
    "https://x.org/y.ipynb": "https://x.org/y.ipynb",
    "#here": "#here",
    "missing.md": "missing.md",
}


@pytest.mark.parametrize("written", LINKS)
def test_links_to_files_of_the_repository_lead_to_their_pages_and_others_stay(written):
    assert f'<a href="{LINKS[written]}">a</a>' in page_of(text(f"[a]({written})"))


def test_a_cell_for_colab_and_an_image_of_another_host_are_left_out():
    own, setting_up = code("x = 1"), code("import shutil")
    setting_up.metadata["tags"] = ["remove-cell"]
    page = page_of(text("# One\n\n[![Open it](https://x.org/badge.svg)](https://x.org/one)"), setting_up, own)
    assert '<a href="https://x.org/one">Open it</a>' in page and "badge.svg" not in page
    assert "shutil" not in page and page.count('<pre class="code">') == 1


def test_links_between_documents_are_relative_to_their_pages():
    page = site.render(site.Site([], Path()).document_page("docs/results/insight-1.md"))
    assert 'href="../protocol.html"' in page and 'href="../files/docs/results/insight-1.parquet"' in page
    assert 'href="../index.html"' in page and 'action="../search.html"' in page


def test_a_page_leads_to_its_neighbours_and_back():
    zero, two = (
        site.Page(f"{name}.html", title, "document.html", {}) for name, title in (("0", "Zero <b>"), ("2", "Two"))
    )
    page = page_of(text("# One"), before=zero, after=two)
    assert 'href="0.html" rel="prev"' in page and 'href="2.html" rel="next"' in page and 'href="index.html"' in page
    assert "Zero &lt;b&gt;" in page and "Zero <b>" not in page


def test_sections_can_be_linked_to_also_where_two_have_one_name():
    page = page_of(text("# Title"), text("## 1 · First one"), text("## Hint"), text("## Hint"))
    assert '<h2 id="1-first-one">' in page and page.index('href="#1-first-one"') < page.index('<h2 id="1-first-one">')
    assert '<h2 id="hint">' in page and '<h2 id="hint-1">' in page


def test_figures_of_the_course_bring_their_words():
    figure = show.row([Image.new("RGB", (64, 64))], ["a red cat\non the grass"], "What to see.", ["input"])
    data, metadata = DisplayFormatter().format(figure)
    output = nbformat.v4.new_output("display_data", {"image/png": data["image/png"]}, metadata=metadata)
    page = page_of(code("show.row(…)", output))
    width, height = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size
    assert f'alt="input · a red cat on the grass · What to see." width="{width}" height="{height}"' in page


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
    page = main_of(page_of(code(f"print('{evil}')", stream, result, picture, error)))
    assert "<script" not in page and page.count("&lt;script&gt;") == 5 and "\x1b" not in page


def test_progress_is_left_out_and_a_stream_is_one_block():
    bar = nbformat.v4.new_output("stream", name="stderr", text="Loading weights:  50%|████")
    widget = nbformat.v4.new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar"}
    )
    pieces = [nbformat.v4.new_output("stream", name="stdout", text=part) for part in ("one\n", "two\n")]
    page = page_of(code("x", bar, widget, *pieces))
    assert "Loading" not in page and ">bar<" not in page and ">one\ntwo</pre>" in page


def html_output(html: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("execute_result", {"text/html": html, "text/plain": "t"})


def test_tables_of_pandas_keep_their_cells_and_lose_their_style():
    table = "<div><style scoped>.x {}</style><table><tr><td>0.5</td></tr></table></div>"
    page = page_of(code("frame", html_output(table)))
    assert "<td>0.5</td>" in page and ".x {}" not in page


def test_interactive_figures_keep_their_style_and_script():
    figure = '<figure><style>.y {}</style><input type="range" aria-label="t"><script>const t = 1 < 2</script></figure>'
    assert figure in page_of(code("figure", html_output(figure)))


def test_a_notebook_that_was_not_executed_says_so():
    cell = code("1 + 1")
    assert "without executing" in page_of(text("# Title"), cell)
    cell.execution_count = 1
    assert "without executing" not in page_of(text("# Title"), cell)


# ── search and front page ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_index_holds_the_words_of_each_section_and_of_its_images():
    page = '<h1 id="a">Title</h1>One &lt;b&gt;<h2 id="b">Part</h2><td>Two<td>a <img alt="cat"><script>no</script>'
    assert search.sections(page) == [("a", "Title", "One <b>"), ("b", "Part", "Two a cat")]
    script = search.index_script({"x.html": ("Title", page)})
    entries = json.loads(script.removeprefix("const SEARCH_INDEX = ").removesuffix(";\n"))
    assert [entry["address"] for entry in entries] == ["x.html#a", "x.html#b"]


def test_a_row_of_the_forest_plot_has_its_zero_in_the_middle_and_its_farther_end_at_an_edge():
    row = front_page.Effect(1, "CLIP", "gain", 1.0, -1.0, 4.0, 10, "undecided")
    assert [row.position(value) for value in (-4.0, 0.0, 1.0, 4.0)] == [0.0, 50.0, 62.5, 100.0]
    against = front_page.Effect(1, "CLIP", "gain", -1.0, -4.0, 1.0, 10, "undecided")
    assert [against.position(value) for value in (-4.0, 1.0)] == [0.0, 62.5]
    certain = front_page.Effect(14, "", "cost", -0.5, -0.5, -0.5, 1, "does not hold")
    assert certain.position(certain.value) == 0.0 and certain.number == "-0.5 [-0.5, -0.5]"


def test_the_front_page_takes_its_figures_from_pages_that_show_them(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"bytes")
    (tmp_path / "results" / "page.md").write_text("![What to see](../figures/a.png)")
    figure, text = front_page.picture(tmp_path, "page.md", "a.png")
    assert text == "What to see" and 'alt="What to see"' in figure and base64.b64encode(b"bytes").decode() in figure
    with pytest.raises(ValueError, match=r"docs/results/page.md shows no b.png"):
        front_page.picture(tmp_path, "page.md", "b.png")
