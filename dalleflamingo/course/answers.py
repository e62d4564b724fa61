"""A learner's answers survive an update of the course: `python -m dalleflamingo answers save`, and then `restore`.

    python -m dalleflamingo answers save       # what you wrote into the exercises, to answers/NOTEBOOK.json
    git stash && git pull                      # the course, updated; git keeps all other changes, too
    python -m dalleflamingo answers restore    # and back into the exercises, which are known by the ids of their cells

Git knows how an exercise was given: its cell in the last commit that the learner's branch shares with the published
one, or in the last commit where nothing is published. An answer is what differs from that between the cell's first
line, `# Exercise …`, and its check. These two belong to the course and are updated with it.

No answer is overwritten. Where one has changed since it was saved, the older file is kept as NOTEBOOK.1.json,
NOTEBOOK.2.json, …; an exercise that holds another answer than the saved one is left as it is; the answer to an exercise
that is gone stays in its file.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from dalleflamingo.commands.parsers import command_parser
from dalleflamingo.runs import write_whole

ROOT = Path(__file__).resolve().parents[2]
_PARTS = re.compile(r"(?P<title># Exercise[^\n]*\n)?(?P<answer>.*?)(?P<check>\n+(?:\w+ = )?checks\..*)?", re.DOTALL)
_OLDER = re.compile(r".*\.\d+")  # stem of a file of answers that a newer one replaced


class AnswersError(ValueError):
    """A file cannot be read; the message names it, and says what to do."""


@dataclass(frozen=True)
class Exercise:
    """The source of an exercise's cell, in three parts.

    Attributes:
        title: its first line with a line break, `# Exercise 1 · …`; "" where the learner removed it.
        answer: what the learner writes.
        check: the call that looks at the answer, with the empty lines before it; "" where there is none.
    """

    title: str
    answer: str
    check: str

    @classmethod
    def of(cls, source: str) -> "Exercise":
        """The parts of a cell."""
        return cls(**{name: part or "" for name, part in _PARTS.fullmatch(source).groupdict().items()})

    def answered(self, answer: str) -> str:
        """The source of the cell with another answer.

        Args:
            answer: in place of this one.
        """
        return self.title + answer + self.check


@dataclass
class Report:
    """What was done.

    Attributes:
        done: lines about what was saved or put back.
        left: lines about what was not, and why.
    """

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def save(root: Path) -> Report:
    """Write the answers in all notebooks to their files.

    Args:
        root: of the repository, with the folders `notebooks` and `answers`.
    """
    report = Report()
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        try:
            _save_notebook(root, path, report)
        except AnswersError as error:
            report.left.append(str(error))
    if not report.done:
        report.done.append("No exercise differs from how it was given, so there is nothing to save.")
    return report


def _save_notebook(root: Path, path: Path, report: Report) -> None:
    given, sources = as_given(root, path), _sources(read_json(path), path)
    found = {cell: Exercise.of(sources[cell]).answer for cell in given if cell in sources}
    answers = {cell: answer for cell, answer in found.items() if not _same(answer, given[cell].answer)}
    if not answers:
        return
    file = root / "answers" / f"{path.stem}.json"
    saved = read_answers(file) if file.exists() else {}
    report.done.append(f"{file.relative_to(root)}: {len(answers)} of {len(given)} exercises have an answer of yours")
    if any(not _same(saved.get(cell, answer), answer) for cell, answer in answers.items()):
        names = (file.with_name(f"{path.stem}.{number}.json") for number in count(1))
        older = file.rename(next(name for name in names if not name.exists()))
        report.done.append(f"    not all are as they were saved before; these are kept in {older.relative_to(root)}")
    file.parent.mkdir(exist_ok=True)
    _write(file, {cell: answer.split("\n") for cell, answer in (saved | answers).items()})


def restore(root: Path) -> Report:
    """Put saved answers back into exercises that are as they were given.

    Args:
        root: of the repository.
    """
    report = Report()
    for file in sorted((root / "answers").glob("*.json")):
        if not _OLDER.fullmatch(file.stem):
            try:
                _restore_notebook(root, file, report)
            except AnswersError as error:
                report.left.append(str(error))
    if not report.done and not report.left:
        report.done.append("There are no saved answers; `answers save` writes them.")
    return report


def _restore_notebook(root: Path, file: Path, report: Report) -> None:
    path, kept = root / "notebooks" / f"{file.stem}.ipynb", f"its saved answer stays in {file.relative_to(root)}"
    answers = read_answers(file)
    if not path.exists():
        raise AnswersError(f"{path.name} is no longer part of the course: {kept}")
    notebook = read_json(path)
    sources, given, put, there = _sources(notebook, path), as_given(root, path), {}, 0
    for cell, answer in answers.items():
        if cell not in given or cell not in sources:
            first_line = answer.strip().partition("\n")[0]
            report.left.append(f"{path.name}: the exercise of `{first_line}` (cell {cell}) is gone; {kept}")
            continue
        present, exercise = Exercise.of(sources[cell]).answer, given[cell]
        if _same(present, answer):
            there += 1
        elif _same(present, exercise.answer):
            put[cell] = exercise.answered(answer)
        else:
            title = exercise.title.strip("# \n").partition(" · ")[0]
            report.left.append(f"{path.name}: {title} (cell {cell}) holds another answer, which is kept; {kept}")
    for cell in notebook["cells"]:
        if cell["id"] in put:
            cell["source"] = put[cell["id"]].splitlines(keepends=True)
    if put:
        _write(path, notebook)
    report.done.append(f"{path.name}: of {len(answers)} saved answers {len(put)} put back, {there} there already")


def as_given(root: Path, path: Path) -> dict[str, Exercise]:
    """Cell id -> exercise of a notebook as the course gave it.

    Args:
        root: of the repository.
        path: of the notebook, which may have changed since.
    Raises:
        AnswersError: this is no clone, git is not installed, or it does not know the notebook.
    """
    published = _git(root, "merge-base", "HEAD", "@{upstream}") or "HEAD"
    text = _git(root, "show", f"{published.strip()}:notebooks/{path.name}")
    if text is None:
        raise AnswersError(
            f"{path.name}: git does not know how it was given; answers are found in a clone of the course, by git"
        )
    sources = _sources(json.loads(text), path)
    return {cell: Exercise.of(source) for cell, source in sources.items() if source.startswith("# Exercise")}


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or is not installed."""
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def read_json(path: Path) -> dict:
    """The object in a notebook or a file of answers.

    Args:
        path: of the file.
    Raises:
        AnswersError: the file holds none.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
    except ValueError as error:
        why = "git left the marks of a conflict in it" if "<<<<<<<" in text else str(error)
        raise AnswersError(f"{path} is damaged ({why}): repair it or move it away; it was not touched") from error
    if not isinstance(found, dict):
        raise AnswersError(f"{path} is damaged (no JSON object): repair it or move it away; it was not touched")
    return found


def read_answers(file: Path) -> dict[str, str]:
    """Cell id -> answer.

    Args:
        file: that `save` wrote.
    Raises:
        AnswersError: it is damaged.
    """
    answers = read_json(file)
    if not all(isinstance(lines, list) and all(isinstance(line, str) for line in lines) for lines in answers.values()):
        raise AnswersError(
            f"{file} is damaged (an answer is no list of lines): repair it or move it away; it was not touched"
        )
    return {cell: "\n".join(lines) for cell, lines in answers.items()}


def _sources(notebook: dict, path: Path) -> dict[str, str]:
    """Cell id -> source of the code cells; `path` is for the message."""
    try:
        sources = {cell["id"]: (cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]}
    except (KeyError, TypeError) as error:
        raise AnswersError(
            f"{path} is no notebook with ids of cells ({error!r}): repair it or move it away; it was not touched"
        ) from error
    return {cell: source for cell, (kind, source) in sources.items() if kind == "code"}


def _same(one: str, other: str) -> bool:
    return one.strip() == other.strip()


def _write(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Keep what you wrote into the exercises while the course is updated."""
    parser = command_parser("answers", main.__doc__)
    parser.add_argument("action", choices=("save", "restore"), help="into answers/, or back into the notebooks")
    report = {"save": save, "restore": restore}[parser.parse_args(arguments).action](ROOT)
    for line in report.done:
        print(line)
    for line in report.left:
        print(line, file=sys.stderr)
    return 2 if report.left else 0
