"""`import dalleflamingo` is instant, and every name of the front door leads somewhere."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dalleflamingo
from dalleflamingo.commands import reconstruct

ROOT = Path(__file__).parent.parent


def test_every_name_is_the_one_of_its_module():
    for name in dalleflamingo.__all__:
        found = getattr(dalleflamingo, name)
        own = {"current_profile": "current"}.get(name, name)
        assert callable(found) and found is getattr(importlib.import_module(found.__module__), own), name
    namespace = {}
    exec("from dalleflamingo import *", namespace)
    assert set(dalleflamingo.__all__) <= set(namespace)


def imported_by_readers() -> set[str]:
    """Names that the notebooks, the README and the docstrings that users see import from `dalleflamingo`."""
    sources = [
        "".join(line for line in cell["source"] if not line.startswith(("%", "!")))
        for file in sorted((ROOT / "notebooks").glob("*.ipynb"))
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    sources += re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    sources += re.findall(
        r"^ *(from dalleflamingo import .*)", f"{dalleflamingo.__doc__}\n{reconstruct.main.__doc__}", re.M
    )
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "dalleflamingo"]
    return {alias.name for node in imports for alias in node.names}


def test_what_the_course_imports_from_here_is_exported():
    names = imported_by_readers()
    assert {"CycleConfig", "PairSimilarity", "select", "rank", "registry"} <= names  # of notebooks, README, docstrings
    modules = {module.name for module in pkgutil.iter_modules(dalleflamingo.__path__)}
    assert names <= {*dalleflamingo.__all__, *modules}


def test_modules_are_attributes_and_all_is_listed():
    modules = {module.name for module in pkgutil.iter_modules(dalleflamingo.__path__)} - {"__main__"}
    assert {"registry", "profiles", "evaluation"} <= modules
    assert {*modules, *dalleflamingo.__all__, "__version__"} <= set(dir(dalleflamingo))
    for name in modules:
        assert getattr(dalleflamingo, name) is sys.modules[f"dalleflamingo.{name}"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("load_model", "did you mean 'load_models'"),
        ("regsitry", "did you mean 'registry'"),
        ("zzz", "it has Bridge, Captioner, "),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(name, message):
    with pytest.raises(AttributeError, match=f"dalleflamingo has no '{name}': {message}"):
        getattr(dalleflamingo, name)
    with pytest.raises(ImportError):
        exec(f"from dalleflamingo import {name}")


def test_importing_it_imports_nothing_heavy_and_using_a_name_does():
    script = (
        "import sys, dalleflamingo\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas'}\n"
        "dir(dalleflamingo)\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "from dalleflamingo import Interval\n"
        "from dalleflamingo.evaluation import intervals\n"
        "assert intervals.Interval is Interval is vars(dalleflamingo)['Interval'] and 'numpy' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
