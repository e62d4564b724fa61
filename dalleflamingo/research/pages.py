"""The parts of a results page in Markdown: cells with intervals, tables, where it was measured and by which commit."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from dalleflamingo.intervals import Interval


def cell(interval: Interval, digits: int, signed: bool = False) -> str:
    """A figure with its interval, as text."""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_on(dataset: str) -> str:
    """How a page begins."""
    return "**Measured in the miniature**" if dataset.startswith("miniature/") else f"Measured on {dataset}"


def current_commit() -> str:
    """The commit that measures; "-dirty" behind it where package, benchmarks or data are no longer as it has them."""
    package = Path(__file__).resolve().parents[1]
    made_by = [str(package), *(str(package.parent / name) for name in ("benchmarks", "data"))]
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=package, capture_output=True, check=True, text=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", *made_by])
        )
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"
    return f"{commit}-dirty" if changed else commit


def write_whole(path: Path, write_to: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    write_to(part)
    os.replace(part, path)
