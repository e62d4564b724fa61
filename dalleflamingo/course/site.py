"""The course as a static site: `python -m dalleflamingo site` makes it of the notebooks that `course` executed.

    index.html          the question, a gallery, both insights, every verdict, all pages
    NAME.html           a notebook as it was executed; NAME.ipynb is there to be downloaded
    scoreboard.html …   the documents of docs/ and the README files
    paper.html          where each part of the paper is in notebooks, documents, package and tests
    source/             modules and tests that a page leads to
    files/              other files that a page leads to, such as tables of results
    search.html         finds words on all pages, by search.js and search-index.js

The site opens from a disk or any web server and asks no other host for anything. A page holds its images and formulas.
"""

import ast
import html
import json
import posixpath
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jinja2
import nbformat
from pygments import highlight
from pygments.lexers import PythonLexer

from dalleflamingo import __version__
from dalleflamingo.commands.parsers import command_parser
from dalleflamingo.course import paper_map, search
from dalleflamingo.course.front_page import front_page, summaries
from dalleflamingo.course.markdown import DARK, LIGHT, PageRenderer
from dalleflamingo.course.notebook_page import is_executed, render_cells
from dalleflamingo.runs import write_whole

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
_TEMPLATES = Path(__file__).with_name("pages")
_FIRST = ("README.md", *(f"docs/{name}.md" for name in ("scoreboard", "protocol", "numbers", "definitions")))
_LAST = tuple(f"docs/{name}.md" for name in ("glossary", "reading"))
_MENU = {  # address -> what the head of every page calls it
    "index.html#notebooks": "Notebooks",
    "scoreboard.html": "Scoreboard",
    "index.html#results": "Results",
    "paper.html": "Paper → code",
    "glossary.html": "Glossary",
}
_HEADER, _FOOTER = "<!-- page -->", "<!-- end -->"  # around what the search finds


@dataclass
class Page:
    """A page of the site.

    Attributes:
        address: from the site's folder.
        title: its heading.
        template: of the folder `pages`.
        values: of the template.
        ordered: whether it has a page before and after it.
    """

    address: str
    title: str
    template: str
    values: dict[str, object]
    ordered: bool = True


@dataclass
class Site:
    """The pages and files of one build.

    Args:
        notebooks: the notebooks' files, in order.
        executed: the folder of executed notebooks and course.json, as `course` leaves them.

    Attributes:
        pages: in reading order.
        files: address -> file that is copied.
        sources: files of Python that a page leads to, from the repository's root.
    """

    notebooks: Sequence[Path]
    executed: Path
    pages: list[Page] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)

    def build(self, out: Path) -> None:
        """Write all pages and files.

        Args:
            out: the site's folder; created if missing. Pages of an earlier build are replaced.
        """
        record = read_record(self.executed)
        mentions = []
        read = {path: self._read(path, record) for path in self.notebooks}
        notebooks = [self.notebook_page(path, notebook) for path, notebook in read.items()]
        for path, notebook in read.items():
            mentions += paper_map.in_notebook(f"notebooks/{path.name}", notebook)
        documents = {path: self.document_page(path) for path in _documents()}
        for path, page in documents.items():
            mentions += paper_map.in_document(path, page.title, search.sections(page.values["body"]))
        mentions += paper_map.in_code(ROOT)
        results = [page for path, page in documents.items() if path.startswith("docs/results/")]
        texts = [page for path, page in documents.items() if not path.startswith("docs/results/")]
        paper = self._paper_page(paper_map.paper_map(mentions))
        groups = {"notebooks": _rows(notebooks, record), "documents": [*texts, paper], "results": results}
        about = {"profile": record.get("profile"), "version": __version__}
        front = {"groups": groups, **about, **front_page(ROOT / "docs")}
        self.pages = [
            Page("index.html", "Do DALL-E and Flamingo understand each other?", "index.html", front),
            *notebooks,
            *texts,
            paper,
            *results,
            *map(_source_page, sorted(self.sources)),
            Page("search.html", "Search", "search.html", {}, ordered=False),
        ]
        self._write(out)

    def _read(self, path: Path, record: dict) -> nbformat.NotebookNode:
        """The notebook as it was executed, or as it is where it was not."""
        names = {entry["notebook"] for entry in record["notebooks"]}
        return nbformat.read(self.executed / path.name if path.stem in names else path, as_version=4)

    def notebook_page(self, path: Path, notebook: nbformat.NotebookNode) -> Page:
        """The page of a notebook.

        Args:
            path: of its file, which can be downloaded.
            notebook: its cells, with outputs where it was executed.
        """
        address = f"{path.stem}.html"
        renderer = PageRenderer(path.parent, partial(self.resolve, _relative(path), address))
        cells = render_cells(notebook, renderer.markdown())
        self.files[path.name] = path
        values = {
            "cells": cells,
            "sections": renderer.sections,
            "download": path.name,
            "executed": is_executed(notebook),
        }
        return Page(address, renderer.title or path.stem, "notebook.html", values)

    def document_page(self, path: str) -> Page:
        """The page of a Markdown file.

        Args:
            path: from the repository's root.
        """
        address = _page_address(path)
        renderer = PageRenderer((ROOT / path).parent, partial(self.resolve, path, address))
        body = renderer.markdown()((ROOT / path).read_text(encoding="utf-8"))
        title = "The course and its commands" if path == "README.md" else renderer.title
        return Page(address, title, "document.html", {"body": body})

    def _paper_page(self, found: dict[str, dict[str, list[paper_map.Mention]]]) -> Page:
        address = "paper.html"
        rows = []
        for part, kinds in found.items():
            links = {kind: [self._link(address, mention) for mention in mentions] for kind, mentions in kinds.items()}
            rows.append({"part": part, "title": paper_map.PARTS[part], "links": links})
        values = {"rows": rows, "missing": [part for part in paper_map.PARTS if part not in found]}
        return Page(address, "Paper → notebook cell → module → test", "paper.html", values)

    def _link(self, address: str, mention: paper_map.Mention) -> tuple[str, str]:
        """Name and address of a mention, as a page links it."""
        return mention.name, self._found(address, mention.path, mention.anchor)

    def resolve(self, source: str, address: str, url: str) -> str:
        """Where a link of a page leads; the file that it leads to becomes part of the site.

        Args:
            source: file of the page, from the repository's root.
            address: of the page.
            url: as it is written there; other hosts, and files that are not in the repository, stay as they are.
        """
        parts = urlsplit(url)
        if parts.scheme or parts.netloc or not parts.path:
            return url
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(parts.path)))
        return self._found(address, path, parts.fragment) if (ROOT / path).is_file() else url

    def _found(self, address: str, path: str, fragment: str) -> str:
        to = _page_address(path)
        if path.endswith(".py"):
            self.sources.add(path)
        elif to.startswith("files/"):
            self.files[to] = ROOT / path
        relative = posixpath.relpath(to, posixpath.dirname(address) or ".")
        return f"{relative}#{fragment}" if fragment else relative

    def _write(self, out: Path) -> None:
        ordered = [page for page in self.pages if page.ordered]
        before = dict(zip((page.address for page in ordered[1:]), ordered, strict=False))
        after = dict(zip((page.address for page in ordered), ordered[1:], strict=False))
        index = {}
        for page in self.pages:
            text = render(page, before.get(page.address), after.get(page.address))
            _write(out / page.address, text)
            body = text.partition(_HEADER)[2].partition(_FOOTER)[0]
            index[page.address] = (page.title, page.values.get("about", body))  # of code, its docstring is enough
        _write(out / "search-index.js", search.index_script(index))
        for address, file in {**self.files, "search.js": _TEMPLATES / "search.js"}.items():
            (out / address).parent.mkdir(parents=True, exist_ok=True)
            write_whole(out / address, lambda part, file=file: shutil.copyfile(file, part))


def render(page: Page, before: Page | None = None, after: Page | None = None) -> str:
    """A page as HTML.

    Args:
        page: any.
        before: the page before it.
        after: the page after it.
    """
    link = _linker(page.address)
    values = {"page": page, "before": before, "after": after, "link": link, "menu": _MENU, **page.values}
    return _templates().get_template(page.template).render(begin=_HEADER, end=_FOOTER, **values)


def _linker(address: str) -> Callable[[str], str]:
    """From an address in the site to that address as this page links it."""
    folder = posixpath.dirname(address) or "."
    return lambda to: "#".join([posixpath.relpath(to.partition("#")[0], folder), *to.split("#")[1:]])


@cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    templates.globals |= {"light": LIGHT.get_style_defs(".code"), "dark": DARK.get_style_defs(".code")}
    return templates


def read_record(executed: Path) -> dict:
    """course.json, without the notebooks whose files are gone.

    Args:
        executed: the folder that `course` leaves; without a record nothing was executed.
    """
    try:
        record = json.loads((executed / "course.json").read_text(encoding="utf-8"))
        there = [entry for entry in record["notebooks"] if (executed / f"{entry['notebook']}.ipynb").is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        return {"notebooks": []}
    return record | {"notebooks": there}


def _rows(notebooks: Sequence[Page], record: dict) -> list[dict]:
    """A row of the front page for each notebook: its page, what it shows, and how its execution went."""
    told = summaries((ROOT / "README.md").read_text(encoding="utf-8"))
    runs = {f"{entry['notebook']}.html": entry for entry in record["notebooks"]}
    return [
        {"page": page, "summary": told.get(Path(page.address).stem, ""), "run": _told(runs.get(page.address))}
        for page in notebooks
    ]


def _told(entry: dict | None) -> dict[str, str] | None:
    """Time, memory and end of an execution in words; None where there was none."""
    if entry is None:
        return None
    end = "" if entry["failure"] is None else f"failed in {entry['failure']}"
    return {"time": minutes(entry["seconds"]), "memory": f"{entry['peak_bytes'] / 2**30:.1f} GiB", "end": end}


def minutes(seconds: float) -> str:
    """A time for a person.

    Args:
        seconds: of it.
    """
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02d} s" if whole else f"{rest} s"


def _source_page(path: str) -> Page:
    """The code of a module or a test, each line with an anchor."""
    source = (ROOT / path).read_text(encoding="utf-8")
    lines = highlight(source, PythonLexer(stripnl=False), LIGHT).splitlines()
    about = html.escape(ast.get_docstring(ast.parse(source)) or "")
    values = {"lines": lines, "about": f"<h1>{path}</h1><p>{about}</p>"}
    return Page(_page_address(path), path, "source.html", values, ordered=False)


def _documents() -> list[str]:
    """The README and all documents, in reading order, from the repository's root."""
    found = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "data").glob("*/README.md")]
    paths = sorted(map(_relative, found), key=lambda path: (path.startswith("docs/results/"), path))
    middle = [path for path in paths if path not in _FIRST + _LAST]
    return [*(path for path in _FIRST if path in paths), *middle, *(path for path in _LAST if path in paths)]


def _relative(path: Path) -> str:
    """A file from the repository's root; a notebook from elsewhere as if it were among those of the course."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else f"notebooks/{path.name}"


def _page_address(path: str) -> str:
    """Where a file of the repository is in the site.

    Args:
        path: from the repository's root.
    """
    file = Path(path)
    if file.suffix == ".ipynb":
        return f"{file.stem}.html"
    if file.suffix == ".md":
        return path.removeprefix("docs/").removesuffix(".md").replace("README", "readme") + ".html"
    if file.suffix == ".py":
        return f"source/{path}.html"
    return f"files/{path}" if file.suffix else f"files/{path}.txt"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def build(executed: Path, out: Path, others: Sequence[Path] = ()) -> None:
    """Make the site.

    Args:
        executed: the folder that `course` leaves.
        out: the site's folder.
        others: notebooks beside those of the course, or in place of one of the same name.
    Raises:
        FileNotFoundError: the package was installed without notebooks and documents.
    """
    if not (ROOT / "docs").is_dir():
        raise FileNotFoundError(f"{ROOT} has no docs: the installed package has none, clone the repository")
    files = {path.name: path for path in [*NOTEBOOKS.glob("*.ipynb"), *others]}
    Site([files[name] for name in sorted(files)], executed).build(out)


def main(arguments: list[str] | None = None) -> int:
    """Make the site of the notebooks that `course` executed, and of the documents."""
    parser = command_parser("site", main.__doc__)
    parser.add_argument(
        "--executed", type=Path, default=Path("build"), help="folder that `course` left; default: build"
    )
    parser.add_argument("--out", type=Path, help="folder of the site; default: site in that folder")
    options = parser.parse_args(arguments)
    out = options.out or options.executed / "site"
    build(options.executed, out)
    names = {entry["notebook"] for entry in read_record(options.executed)["notebooks"]}
    missing = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem not in names]
    if missing:
        print(
            f"Not executed, so without outputs: {', '.join(missing)}. `python -m dalleflamingo course` executes them."
        )
    print(f"Open {(out / 'index.html').resolve()} in a browser.")
    return 0
