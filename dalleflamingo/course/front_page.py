"""What the site's front page shows. Every number and image is read from a file of docs/ that a command made."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dalleflamingo.course.markdown import data_address, image_tag
from dalleflamingo.course.show import label

_OVER_ALL = "all"  # `ranked_by` of a claim that no single similarity ranks


@dataclass(frozen=True)
class Effect:
    """A claim's primary effect, as a row of the forest plot.

    Attributes:
        claim: its number.
        by: the similarity that ranks; "" where none does.
        what: the effect in words.
        value: in the unit of `what`; a positive one supports the paper.
        low: of the 95 % interval.
        high: of it.
        n: images or captions.
        verdict: "holds", "does not hold" or "undecided".
    """

    claim: int
    by: str
    what: str
    value: float
    low: float
    high: float
    n: int
    verdict: str

    @property
    def number(self) -> str:
        """Value and interval in three digits."""
        return f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"

    def position(self, value: float) -> float:
        """Where a value lies, in per cent of the plot's width: 0 in the middle, the interval's farther end at an edge.

        Args:
            value: within the interval.
        """
        farthest = max(abs(self.low), abs(self.high)) or 1.0
        return round(50 + 50 * value / farthest, 1)


def effects(claims: Path) -> list[Effect]:
    """The rows of claims.json.

    Args:
        claims: its path.
    """
    return [
        Effect(
            claim=row["claim"],
            by="" if row["ranked_by"] == _OVER_ALL else label(row["ranked_by"]),
            what=row["what"],
            value=row["effect"],
            **{name: row[name] for name in ("low", "high", "n", "verdict")},
        )
        for row in json.loads(claims.read_text(encoding="utf-8"))["claims"]
    ]


def gallery(folder: Path) -> dict:
    """gallery.json, with each image inside.

    Args:
        folder: that holds it and its images.
    """

    def with_image(entry: Mapping) -> dict:
        return {**entry, "image": data_address(folder / entry["image"])} if "image" in entry else dict(entry)

    content = json.loads((folder / "gallery.json").read_text(encoding="utf-8"))
    for journey in ("image_text_image", "text_image_text"):
        content[journey] = [
            with_image(entry) | {"candidates": list(map(with_image, entry["candidates"]))} for entry in content[journey]
        ]
    return content


def picture(docs: Path, page: str, name: str) -> tuple[str, str]:
    """A figure as HTML, and the text that a page of results gives it.

    Args:
        docs: the folder of documents.
        page: name of the page in docs/results.
        name: file name of the figure in docs/figures.
    Raises:
        ValueError: the page does not show that figure.
    """
    source = (docs / "results" / page).read_text(encoding="utf-8")
    found = re.search(rf"!\[([^\]]+)\]\(\.\./figures/{re.escape(name)}\)", source)
    if found is None:
        raise ValueError(f"docs/results/{page} shows no {name}: which page does? `picture` is called with its name")
    return image_tag(data_address(docs / "figures" / name), found[1]), found[1]


def summaries(readme: str) -> dict[str, str]:
    """Name of a notebook -> what it shows, of the README's table.

    Args:
        readme: in Markdown.
    """
    return dict(re.findall(r"(?m)^\| \[[^\]]+\]\(notebooks/(\w+)\.ipynb\) \| (.+?) \|$", readme))


def front_page(docs: Path) -> dict[str, object]:
    """What index.html takes beside the lists of pages.

    Args:
        docs: the folder of documents.
    """
    rows = effects(docs / "results" / "claims.json")
    return {
        "gallery": gallery(docs / "figures" / "gallery"),
        "effects": rows,
        "insight_1": _of_claims(rows, (1, 2)),
        "insight_2": _of_claims(rows, (3, 4)),
        "captions_by_rank": picture(docs, "insight-1.md", "rank_curve_f1.png"),
        "images_by_rank": picture(docs, "insight-2.md", "rank_curve_texts_found.png"),
    }


def _of_claims(rows: Sequence[Effect], numbers: Sequence[int]) -> list[Effect]:
    return [row for row in rows if row.claim in numbers]
