"""Executed notebooks as pages that need no network: `make course` leaves them in build/.

A page is one file. Its formulas are MathML, its images are inside and have their captions as alternative texts, and
links to notebooks lead to their pages. Everything that a model or a file wrote is escaped.
"""

import base64
import html
import mimetypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import jinja2
import mistune
import nbformat
from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

_TEMPLATES = Path(__file__).with_name("pages")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_STYLE_OF_PANDAS = re.compile(r'<style (scoped|type="text/css")>.*?</style>', re.DOTALL)  # of its tables and Styler's
_LIGHT, _DARK = (HtmlFormatter(nowrap=True, style=name, nobackground=True) for name in ("tango", "github-dark"))
_PLAIN = {  # what the converter does not know -> the same in its words
    r"\#": "#",
    r"\bigl": "",
    r"\bigr": "",
    r"\lVert": r"\Vert",
    r"\rVert": r"\Vert",
    "{aligned}": "{align*}",
}


@dataclass(frozen=True)
class Link:
    """A page of the course, as other pages name it.

    Attributes:
        title: its heading.
        address: relative to the pages' folder.
    """

    title: str
    address: str


def render_page(notebook: nbformat.NotebookNode, folder: Path, before: Link | None, after: Link | None) -> str:
    """An executed notebook as a page.

    Args:
        notebook: with its outputs.
        folder: that the notebook's relative paths start from.
        before: the page before it.
        after: the page after it.
    """
    renderer = PageRenderer(folder)
    markdown = mistune.create_markdown(renderer=renderer, plugins=["table", "strikethrough", "math"])
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cells.append({"kind": "text", "html": markdown(cell.source)})
        elif cell.cell_type == "code":
            code = highlight(cell.source, PythonLexer(), _LIGHT)
            cells.append({"kind": "code", "html": code, "outputs": list(map(render_output, joined(cell.outputs)))})
    title = renderer.headings[0][1] if renderer.headings else "dalleflamingo"
    sections = [(identifier, text) for level, text, identifier in renderer.headings if level == 2]
    return _render(
        "notebook.html",
        title=title,
        sections=sections,
        cells=[cell for cell in cells if cell["kind"] == "text" or cell["html"].strip()],
        before=before,
        after=after,
    )


def render_index(profile: str, rows: Sequence[Mapping[str, object]]) -> str:
    """The page that links all others.

    Args:
        profile: that the notebooks were executed in.
        rows: link, time, memory and end of each notebook.
    """
    return _render("index.html", title="dalleflamingo", profile=profile, rows=rows)


def _render(template: str, **values: object) -> str:
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True)
    styles = {"light": _LIGHT.get_style_defs(".code"), "dark": _DARK.get_style_defs(".code")}
    return templates.get_template(template).render(**styles, **values)


class PageRenderer(mistune.HTMLRenderer):
    """Markdown of the notebooks to HTML.

    Args:
        folder: that relative paths start from.

    Attributes:
        headings: (level, text, identifier) of each heading so far.
    """

    def __init__(self, folder: Path):
        super().__init__(escape=False)  # the notebooks' own HTML, such as folded hints
        self.folder = folder
        self.headings: list[tuple[int, str, str]] = []

    def heading(self, text: str, level: int, **attrs: object) -> str:
        """A heading that can be linked to."""
        plain = html.unescape(re.sub("<[^>]+>", "", text))
        identifier = re.sub(r"[^\w]+", "-", plain.lower()).strip("-")
        self.headings.append((level, plain, identifier))
        return f'<h{level} id="{identifier}">{text}</h{level}>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """A link; one to a notebook leads to its page."""
        parts = urlsplit(url)
        if not parts.scheme and parts.path.endswith(".ipynb"):
            url = parts._replace(path=f"{Path(parts.path).stem}.html").geturl()
        return super().link(text, url, title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        """An image of the repository, inside the page."""
        file = self.folder / url
        if not urlsplit(url).scheme and file.is_file():
            kind = mimetypes.guess_type(file.name)[0]
            url = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        return f'<img src="{html.escape(url)}" alt="{html.escape(text)}">'

    def block_code(self, code: str, info: str | None = None) -> str:
        """Code, in colour where it is Python."""
        text = highlight(code, PythonLexer(), _LIGHT) if info == "python" else html.escape(code)
        return f'<pre class="code">{text}</pre>\n'

    def block_math(self, text: str) -> str:
        """A formula on lines of its own."""
        return f'<div class="formula">{mathml(text, "block")}</div>\n'

    def inline_math(self, text: str) -> str:
        """A formula in a line."""
        return mathml(text, "inline")


def mathml(tex: str, display: str) -> str:
    """A formula as MathML, which browsers show without a script or a font of ours.

    Args:
        tex: without dollar signs.
        display: "block" or "inline".
    """
    for ours, theirs in _PLAIN.items():
        tex = tex.replace(ours, theirs)
    tex = re.sub(r"\\text\w*\{[^}]*\}", lambda words: html.escape(words[0], quote=False), tex)  # it escapes none
    return convert(tex.strip(), display=display)


# ── outputs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def joined(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs without progress, and pieces of one stream put together."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}) or _is_progress(output):
            continue
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1] = nbformat.NotebookNode(kept[-1] | {"text": kept[-1]["text"] + output.text})
        else:
            kept.append(output)
    return kept


def _is_progress(output: nbformat.NotebookNode) -> bool:
    return output.output_type == "stream" and output.name == "stderr"


def render_output(output: nbformat.NotebookNode) -> str:
    """An output of a cell as HTML.

    Args:
        output: of `joined`.
    """
    if output.output_type == "stream":
        return f"<pre>{html.escape(_ANSI.sub('', output.text).rstrip())}</pre>"
    if output.output_type == "error":
        return f'<pre class="error">{html.escape(_ANSI.sub("", chr(10).join(output.traceback)))}</pre>'
    if image := output.data.get("image/png"):
        text = output.metadata.get("image/png", {}).get("alt", "")
        return f'<img src="data:image/png;base64,{image.strip()}" alt="{html.escape(text)}">'
    if table := output.data.get("text/html"):
        return f'<div class="wide">{_STYLE_OF_PANDAS.sub("", table)}</div>'
    return f"<pre>{html.escape(output.data.get('text/plain', ''))}</pre>"
