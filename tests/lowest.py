"""The lower ends of the ranges in pyproject.toml, as constraints for pip: `make test-lowest` installs these.

torch and torchvision are left out: they are large, and an environment keeps those that it has.
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
LEFT_OUT = ("torch", "torchvision")


def lowest(requirements: list[str]) -> list[str]:
    """A line NAME==VERSION for every requirement that has a lower bound or is pinned."""
    bounds = (re.match(r"([\w.-]+)[>=]=([\w.]+)", requirement) for requirement in requirements)
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound and bound[1] not in LEFT_OUT]


if __name__ == "__main__":
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    print(*lowest(project["dependencies"] + project["optional-dependencies"]["colab"]), sep="\n")
