"""The exercises of the notebooks, with what is folded below them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from dalleflamingo.course.answers import Exercise

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
TITLE = re.compile(r"# Exercise (\d+) · difficulty [1-5]/5 · importance [1-5]/5 · \d+ minutes( · \w[\w ]*)?\n")


@dataclass(frozen=True)
class Given:
    """An exercise as a notebook gives it.

    Attributes:
        cell: id of its cell.
        source: of that cell.
        heading: the last one above it.
        folded: summary -> what is folded under it, between this cell and the next code cell.
    """

    cell: str
    source: str
    heading: str
    folded: dict[str, str]

    @property
    def solution(self) -> str:
        """The code of the solution."""
        [code] = re.findall(r"```python\n(.*?)\n```", self.folded["Solution"], re.DOTALL)
        return code

    @property
    def solved(self) -> str:
        """The source of the cell with the solution in place of the answer."""
        return Exercise.of(self.source).answered(self.solution)


def of(path: Path) -> list[Given]:
    """The exercises of a notebook, in order."""
    found, heading = [], ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            last = Given(cell["id"], source, heading, {})
            found += [last] if source.startswith("# Exercise") else []
        else:
            if found and found[-1] is last:
                pattern = r"<details><summary>(.*?)</summary>\n(.*?)\n</details>"
                last.folded.update(re.findall(pattern, source, re.DOTALL))
            heading = (re.findall(r"(?m)^### .*$", source) or [heading])[-1]
    return found
