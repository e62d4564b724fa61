"""The index of the site's search: the text of every section of every page, in a script that search.html loads.

A page that was opened from a disk may load a script but not a file of data, so the index is a script.
"""

import json
from collections.abc import Mapping
from html.parser import HTMLParser

_HEADINGS = {"h1", "h2", "h3"}
_BLOCKS = {"br", "details", "div", "figcaption", "li", "ol", "p", "pre", "summary", "td", "th", "tr", "ul"}
_SILENT = {"script", "style", "nav", "header", "footer", "form"}


class SectionReader(HTMLParser):
    """Cuts the text of a page at its headings.

    Attributes:
        sections: [identifier of the heading, heading, text] of each section.
    """

    def __init__(self):
        super().__init__()
        self.sections: list[list[str]] = [["", "", ""]]
        self._silent, self._in_heading = 0, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._silent += tag in _SILENT
        if self._silent:
            return
        if tag in _HEADINGS and values.get("id"):
            self.sections.append([values["id"], "", ""])
        self._in_heading |= tag in _HEADINGS
        if tag in _BLOCKS:  # words of two of them are no single word
            self.handle_data(" ")
        if tag == "img":
            self.handle_data(f" {values.get('alt') or ''} ")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in _SILENT
        self._in_heading &= tag not in _HEADINGS

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.sections[-1][1 if self._in_heading else 2] += data


def sections(page: str) -> list[tuple[str, str, str]]:
    """The sections of a page: (identifier, heading, text), those that are empty left out.

    Args:
        page: HTML.
    """
    reader = SectionReader()
    reader.feed(page)
    tidied = [
        (identifier, " ".join(head.split()), " ".join(text.split())) for identifier, head, text in reader.sections
    ]
    return [section for section in tidied if section[1] or section[2]]


def index_script(pages: Mapping[str, tuple[str, str]]) -> str:
    """The script that search.html loads.

    Args:
        pages: address -> (title, HTML of what is between header and footer).
    """
    entries = [
        {
            "page": title,
            "section": heading,
            "address": f"{address}#{identifier}" if identifier else address,
            "text": text,
        }
        for address, (title, page) in pages.items()
        for identifier, heading, text in sections(page)
    ]
    return f"const SEARCH_INDEX = {json.dumps(entries, ensure_ascii=False, separators=(',', ':'))};\n"
