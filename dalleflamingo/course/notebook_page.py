"""The cells of a notebook as HTML. Everything that a model or a file wrote is escaped."""

import html
import re
from collections.abc import Callable, Sequence

import nbformat
from pygments import highlight
from pygments.lexers import PythonLexer

from dalleflamingo.course.markdown import LIGHT, image_tag

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PANDAS_STYLE = re.compile(r'<style (scoped|type="text/css")>.*?</style>', re.DOTALL)  # of its tables and Styler's
_WIDGET = "application/vnd.jupyter.widget-view+json"


def render_cells(notebook: nbformat.NotebookNode, markdown: Callable[[str], str]) -> list[dict]:
    """Its cells, as notebook.html takes them; empty code cells and those with Jupyter Book's tag are left out.

    Args:
        notebook: with or without outputs.
        markdown: Markdown to HTML.
    """
    cells = []
    for cell in notebook.cells:
        if "remove-cell" in cell.metadata.get("tags", []):
            continue
        if cell.cell_type == "markdown":
            cells.append({"id": cell.get("id"), "kind": "text", "html": markdown(cell.source)})
        elif cell.cell_type == "code" and cell.source.strip():
            code = highlight(cell.source, PythonLexer(), LIGHT)
            outputs = list(map(render_output, joined(cell.outputs)))
            cells.append({"id": cell.get("id"), "kind": "code", "html": code, "outputs": outputs})
    return cells


def is_executed(notebook: nbformat.NotebookNode) -> bool:
    """Whether any of its cells has run."""
    return any(cell.get("execution_count") for cell in notebook.cells)


def joined(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs without progress, and pieces of one stream put together."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if _WIDGET in output.get("data", {}) or _is_progress(output):
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

    An HTML output is taken as it is, with its scripts: tables of pandas, which escapes its cells, and the course's
    interactive figures. A table loses the style that pandas brings.

    Args:
        output: of `joined`.
    """
    if output.output_type == "stream":
        return _pre(output.text.rstrip())
    if output.output_type == "error":
        return _pre("\n".join(output.traceback), "error")
    if image := output.data.get("image/png"):
        text = output.metadata.get("image/png", {}).get("alt", "")
        return image_tag(f"data:image/png;base64,{image.strip()}", text)
    if table := output.data.get("text/html"):
        return f'<div class="wide">{_PANDAS_STYLE.sub("", table)}</div>'
    return _pre(output.data.get("text/plain", ""))


def _pre(text: str, kind: str = "text") -> str:
    return f'<pre class="{kind}">{html.escape(_ANSI.sub("", text))}</pre>'
