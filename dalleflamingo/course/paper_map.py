"""Where each part of the paper is in the course: read from the texts of notebooks, documents, package and tests.

A *reference* is what the texts say of the paper: "§4.1", "App. G", "Eqs. 1–5", "loss (2)", "Tables 3 to 5", "Figure 4".
One that follows a year, as in "Ho et al. 2020, Eq. 7", is to another paper and left out; 2023 is this paper's year.

* A notebook refers where a cell does, a document where a section does.
* The package refers where the docstring of a module, class or function does.
* A file of tests belongs to a part of the paper if a docstring in it refers to the part. Besides, each docstring of the
  package brings the file that tests most what it describes: the class or function or, of a module's docstring, any
  public class or function of the module. The number counts the tests of that file whose code names it.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

PARTS = {  # parts of the paper, in its order, in our words
    "§1": "Introduction: two models that talk",
    "§3": "Findings, with frozen models",
    "§3.1": "The two tasks; similarities",
    "§3.2": "Metrics and data sets",
    "§3.3": "Insights I and II",
    "§4": "Cycle finetuning",
    "§4.1": "Image → text → image: captions through the bridge",
    "§4.2": "Text → image → text: one-step clean images",
    "§4.3": "The whole objective",
    "§5": "Setup of finetuning: data, what is trained, cost",
    "§6": "Results of finetuning; the losses, ablated",
    "§7": "Limitations, open questions",
    "Eq. 1": "The captioner's loss on labels",
    "Eq. 2": "The image's reconstruction, through the bridge",
    "Eq. 3": "The generator's loss on labels",
    "Eq. 4": "The caption's reconstruction, through x̂",
    "Eq. 5": "The sum of the four losses",
    "Table 1": "Ranked captions against random ones",
    "Table 2": "Ranked images against random ones",
    "Table 3": "Captioning after cycle finetuning",
    "Table 4": "Generation after cycle finetuning",
    "Table 5": "Without labels, without reconstruction",
    "Table 6": "Nucleus p",
    "Table 7": "Top-k sampling, temperature",
    "Table 8": "Other models",
    "Table 9": "Which losses train the captioner",
    "Fig. 1": "The two tasks",
    "Fig. 2": "The two tasks with their models",
    "Fig. 3": "Caption metrics by rank of the image",
    "Fig. 4": "Image metrics by rank of the text",
    "Fig. 5": "Examples of both tasks",
    "Fig. 6": "The training framework",
    "Fig. 9": "Number of candidates",
    "App. A": "Similarities, models, settings",
    "App. B": "Nucleus p",
    "App. C": "Sampling methods",
    "App. D": "Number of candidates",
    "App. F": "Other models",
    "App. G": "From one tokenizer to the other",
    "App. H": "The losses, discussed",
    "App. I": "Ablations",
}
_KINDS = {"§": "§", "eq": "Eq. ", "tab": "Table ", "fig": "Fig. ", "app": "App. ", "los": "Eq. "}
_NUMBER = r"\(?(?:\d+(?:\.\d+)?|[A-J](?:\.\d+)?)\b\)?"
_REFERENCE = re.compile(
    rf"(§|\b(?:Eqs?\.|Equations?|Tables?|Figs?\.|Figures?|App\.|Appendix|Appendices|[Ll]oss(?:es)?(?= \()))\s*"
    rf"({_NUMBER}(?:(?:, and |, | and | or | to |–){_NUMBER})*)"
)
_OTHER_WORK = re.compile(r"\b(?!2023)(?:19|20)\d\d\)?[,:] $")  # directly before a reference


@dataclass(frozen=True)
class Mention:
    """A text that refers to the paper.

    Attributes:
        kind: "notebooks", "documents", "package" or "tests".
        name: for a reader.
        path: of its file, from the repository's root.
        anchor: of its page; "" for its top.
    """

    kind: str
    name: str
    path: str
    anchor: str = ""


@dataclass
class Definition:
    """A docstring's owner: a module, class or function.

    Attributes:
        name: with its module's, without the package's.
        line: where it begins.
        docstring: its own.
        names: that a test uses which tests it.
    """

    name: str
    line: int
    docstring: str
    names: frozenset[str] = field(default_factory=frozenset)


def references(text: str) -> set[str]:
    """The parts of the paper that a text refers to; keys of `PARTS`.

    Args:
        text: prose.
    """
    found = set()
    for match in _REFERENCE.finditer(text):
        if not _OTHER_WORK.search(text[: match.start()]):
            kind = _KINDS[re.match("§|eq|tab|fig|app|los", match[1].lower())[0]]
            found |= {f"{kind}{number}" for number in _expanded(match[2], kind)}
    return found & PARTS.keys()


def _expanded(numbers: str, kind: str) -> Iterator[str]:
    """ "1–3 and 5" -> 1, 2, 3, 5; an appendix without the number of its section."""
    for first, last in re.findall(rf"({_NUMBER})(?:(?: to |–)({_NUMBER}))?", numbers):
        first, last = first.strip("()"), last.strip("()")
        if kind == "App. ":
            yield first[0]
        elif last.isdecimal() and first.isdecimal():
            yield from map(str, range(int(first), int(last) + 1))
        else:
            yield from filter(None, (first, last))


def in_notebook(path: str, notebook: nbformat.NotebookNode) -> Iterator[tuple[str, Mention]]:
    """Part of the paper -> where a notebook refers to it.

    Args:
        path: from the repository's root.
        notebook: with ids on its cells.
    """
    title = section = ""
    for cell in notebook.cells:
        headings = re.findall(r"(?m)^#{1,2} (.+)$", cell.source) if cell.cell_type == "markdown" else []
        section = headings[-1] if headings else section
        title = title or section
        name = title if section == title else f"{title} › {section}"
        for part in references(cell.source):
            yield part, Mention("notebooks", name, path, f"cell-{cell.id}")


def in_document(path: str, title: str, sections: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, Mention]]:
    """Part of the paper -> where a document refers to it.

    Args:
        path: from the repository's root.
        title: of its page.
        sections: of its page, as `search.sections` returns them.
    """
    for number, (identifier, heading, text) in enumerate(sections):
        name = f"{title} › {heading}" if number else title
        for part in references(f"{heading}. {text}"):
            yield part, Mention("documents", name, path, identifier)


def definitions(source: str, module: str) -> list[Definition]:
    """All that has a docstring in a module.

    Args:
        source: its code.
        module: its name, without the package's.
    """
    tree = ast.parse(source)
    kinds = (ast.ClassDef, ast.FunctionDef)
    public = frozenset(node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_"))
    found = [Definition(module, 1, ast.get_docstring(tree) or "", public)]

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef, prefix: str) -> None:
        for child in node.body:
            if isinstance(child, kinds):
                name = f"{prefix}.{child.name}"
                found.append(Definition(name, child.lineno, ast.get_docstring(child) or "", frozenset({child.name})))
                visit(child, name)

    visit(tree, module)
    return found


@dataclass(frozen=True)
class FileOfTests:
    """A file of tests.

    Attributes:
        path: from the repository's root.
        imports: names of the package's modules and of all that is imported from the package.
        uses: name of a test -> names that its code mentions.
        docstrings: name of a test -> its docstring; "" -> the file's.
    """

    path: str
    imports: frozenset[str]
    uses: Mapping[str, frozenset[str]]
    docstrings: Mapping[str, str]

    @classmethod
    def of(cls, path: str, source: str) -> "FileOfTests":
        """Of a file's code.

        Args:
            path: from the repository's root.
            source: the code.
        """
        tree = ast.parse(source)
        imports = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dalleflamingo"):
                module = node.module.removeprefix("dalleflamingo").removeprefix(".")
                imports |= {module} | {f"{module}.{alias.name}".strip(".") for alias in node.names}
        tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        uses = {test.name: frozenset(_names_in(test)) for test in tests}
        docstrings = {test.name: ast.get_docstring(test) or "" for test in tests}
        return cls(path, frozenset(imports), uses, docstrings | {"": ast.get_docstring(tree) or ""})

    def testing(self, definition: Definition, module: str) -> set[str]:
        """The names of the tests that use what a docstring describes.

        Args:
            definition: what it describes.
            module: that defines it.
        """
        if module not in self.imports and not self.imports & definition.names:  # the latter by the front door
            return set()
        return {test for test, names in self.uses.items() if names & definition.names}


def _names_in(test: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(test):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def in_code(root: Path) -> Iterator[tuple[str, Mention]]:
    """Part of the paper -> where the package refers to it, and which tests belong to that.

    Args:
        root: of the repository.
    """
    files = [
        FileOfTests.of(f"tests/{path.name}", path.read_text("utf-8")) for path in sorted(root.glob("tests/test_*.py"))
    ]
    tests: dict[tuple[str, str], set[str]] = {}
    others = (path for path in (root / "dalleflamingo").rglob("*.py") if path.name != Path(__file__).name)
    for path in sorted(others):  # this module names references as examples only
        relative = path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts[1:])
        for definition in definitions(path.read_text("utf-8"), module):
            for part in references(definition.docstring):
                yield part, Mention("package", definition.name, relative.as_posix(), f"line-{definition.line}")
                most = max(files, key=lambda file: len(file.testing(definition, module)))
                tests.setdefault((part, most.path), set()).update(most.testing(definition, module))
    for file in files:
        for test, docstring in file.docstrings.items():
            for part in references(docstring):
                tests.setdefault((part, file.path), set()).update([test] if test else file.uses)
    for (part, path), names in tests.items():
        if names:
            count = "1 test" if len(names) == 1 else f"{len(names)} tests"
            yield part, Mention("tests", f"{Path(path).stem} ({count})", path)


def paper_map(mentions: Iterable[tuple[str, Mention]]) -> dict[str, dict[str, list[Mention]]]:
    """Part of the paper -> kind -> where, in the order of the paper; parts that nothing refers to are left out.

    Args:
        mentions: of `in_notebook`, `in_document` and `in_code`. Of equal names the first is kept.
    """
    found: dict[str, dict[str, dict[str, Mention]]] = {part: {} for part in PARTS}
    for part, mention in mentions:
        found[part].setdefault(mention.kind, {}).setdefault(mention.name, mention)
    return {part: {kind: list(of.values()) for kind, of in kinds.items()} for part, kinds in found.items() if kinds}
