"""Markdown of notebooks and documents as HTML that needs no network: formulas are MathML, images are inside."""

import base64
import html
import mimetypes
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mistune
from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

# Both styles have a contrast of 4.5 : 1 or more on the ground of code.
LIGHT, DARK = (HtmlFormatter(nowrap=True, style=name, nobackground=True) for name in ("xcode", "github-dark"))
_PLAIN = {  # what the converter does not know -> the same in its words
    r"\#": "#",
    r"\bigl": "",
    r"\bigr": "",
    r"\lVert": r"\Vert",
    r"\rVert": r"\Vert",
    "{aligned}": "{align*}",
}


class PageRenderer(mistune.HTMLRenderer):
    """Renders the Markdown of one page.

    Args:
        folder: that relative paths start from.
        resolve: address in the Markdown -> address on the page.

    Attributes:
        headings: (level, text, identifier) of each heading so far.
    """

    def __init__(self, folder: Path, resolve: Callable[[str], str]):
        super().__init__(escape=False)  # the course's own HTML, such as folded hints
        self.folder, self.resolve = folder, resolve
        self.headings: list[tuple[int, str, str]] = []

    def markdown(self) -> mistune.Markdown:
        """A function from Markdown to HTML by this renderer."""
        return mistune.create_markdown(renderer=self, plugins=["table", "strikethrough", "math"])

    @property
    def title(self) -> str:
        """The first heading; "" before there is one."""
        return self.headings[0][1] if self.headings else ""

    @property
    def sections(self) -> list[tuple[str, str]]:
        """(identifier, text) of the headings of level 2."""
        return [(identifier, text) for level, text, identifier in self.headings if level == 2]

    def heading(self, text: str, level: int, **attrs: object) -> str:
        """A heading that can be linked to; one that occurs again gets a number."""
        plain = html.unescape(re.sub("<[^>]+>", "", text))
        identifier = stem = re.sub(r"[^\w]+", "-", plain.lower()).strip("-")
        number = 0
        while identifier in (known for _, _, known in self.headings):
            number += 1
            identifier = f"{stem}-{number}"
        self.headings.append((level, plain, identifier))
        return f'<h{level} id="{identifier}">{text}</h{level}>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """A link; one to a file of the repository leads to its page."""
        return super().link(text, self.resolve(url), title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        """An image of the repository, inside the page; of one on another host, such as a badge, its text."""
        if urlsplit(url).scheme:
            return text
        file = self.folder / unquote(url)
        address = data_address(file) if file.is_file() else url
        return image_tag(address, html.unescape(text))

    def block_code(self, code: str, info: str | None = None) -> str:
        """Code, in colour where it is Python."""
        text = highlight(code, PythonLexer(), LIGHT) if info == "python" else html.escape(code)
        return f'<pre class="code">{text}</pre>\n'

    def table(self, text: str) -> str:
        """A table that scrolls in a box of its own where it is wider than the page."""
        return f'<div class="wide"><table>\n{text}</table></div>\n'

    def block_math(self, text: str) -> str:
        """A formula on lines of its own."""
        return f'<div class="formula">{mathml(text, "block")}</div>\n'

    def inline_math(self, text: str) -> str:
        """A formula in a line."""
        return mathml(text, "inline")


def data_address(file: Path) -> str:
    """The content of a file as an address.

    Args:
        file: an image.
    """
    kind = mimetypes.guess_type(file.name)[0]
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def image_tag(address: str, text: str) -> str:
    """An image in a box of its own, in which it scrolls where a phone would make its labels too small to be read.

    Args:
        address: of the image.
        text: what it shows.
    """
    size = ""
    if address.startswith("data:image/png;base64,"):
        header = base64.b64decode(address.partition(",")[2][:32])
        width, height = (int.from_bytes(header[start : start + 4], "big") for start in (16, 20))  # as PNG defines it
        size = f' width="{width}" height="{height}" style="--natural: {width}px"'
    return f'<span class="picture"><img src="{html.escape(address)}" alt="{html.escape(text)}"{size}></span>'


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
