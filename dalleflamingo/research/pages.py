"""The parts of a results page in Markdown, and the sentences that every page begins with."""

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from dalleflamingo import registry
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.runs import write_whole

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
SHIPPED = ROOT / "docs" / "results"
BESIDE_THE_PAPER = "; the paper's values stand beside ours to compare their direction, not their size"


def cell(interval: Interval, digits: int, signed: bool = False) -> str:
    """A value with its interval, as text.

    Args:
        interval: the value.
        digits: after the decimal point.
        signed: with a plus sign, as of a difference.
    """
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def frame_table(frame: pd.DataFrame) -> str:
    """A table in Markdown of a data frame of texts."""
    return table(list(frame), frame.to_numpy().tolist())


def measured_on(dataset: str, unlike: str = "") -> str:
    """The sentence that a page begins with.

    Args:
        dataset: its name in the registry.
        unlike: what else a result in the miniature has to say, behind a comma.
    """
    if not registry.entry_of(dataset).shipped:
        return f"Measured on {dataset}."
    return (
        "**Measured in the miniature**, with small models trained on a drawn world. It is no result on COCO or NoCaps"
        f"{unlike}."
    )


def made_by(command: str, commit: str) -> str:
    """How the numbers of a page can be made again."""
    return f"Made by `{command}` at commit `{commit}`. Brackets are 95 % intervals by a paired bootstrap over images."


def write_page(path: Path, parts: Iterable[str]) -> None:
    """Write the parts of a page that are not empty, a blank line between them."""
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def current_commit(repository: Path = ROOT) -> str:
    """The commit that measures; "-dirty" behind it where package, benchmarks or data are no longer as it has them.

    Args:
        repository: the root of the checkout.
    """
    made_by = [str(repository / name) for name in ("dalleflamingo", "benchmarks", "data")]
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=repository, capture_output=True, check=True, text=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", *made_by])
        )
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"
    return f"{commit}-dirty" if changed else commit
