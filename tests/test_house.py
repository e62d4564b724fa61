"""The rules of the project: one list of pins, the order of imports, clean notebooks, small files, links that exist."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dalleflamingo import repository
from dalleflamingo.course import colab

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted((ROOT / "dalleflamingo").rglob("*.py"))
CUDA = re.compile(r"^(nvidia|cuda|triton)\b")  # torch pins these itself, and only where there is CUDA


# ── the environment ──────────────────────────────────────────────────────────────────────────────────────────────────


def pins() -> dict[str, str]:
    """{canonical name: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in split}


def direct_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lists = (PROJECT["dependencies"], *(extras[name] for name in ("browser", "colab", "course", "test")))
    return [one for listed in lists for one in map(Requirement, listed) if one.name != PROJECT["name"]]


def closure(roots: list[Requirement]) -> set[str]:
    """Names of all that `roots` bring along on Python 3.11, 3.12 and 3.13, from the installed packages' own words."""
    seen, queue = set(), [(root.name, frozenset(root.extras)) for root in roots]
    while queue:
        name, extras = queue.pop()
        if (canonicalize_name(name), extras) in seen:
            continue
        seen.add((canonicalize_name(name), extras))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another Python version, so not installed here
            continue
        for requirement in map(Requirement, requires):
            if any(_applies(requirement, extra, minor) for extra in extras | {""} for minor in (11, 12, 13)):
                queue.append((requirement.name, frozenset(requirement.extras)))
    return {name for name, _ in seen}


def _applies(requirement: Requirement, extra: str, minor: int) -> bool:
    python = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0", "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(python)


def pip_arguments_of_make() -> list[str]:
    lines = (ROOT / "Makefile").read_text().splitlines()
    [line] = [line for line in lines if "-m pip install" in line and "--constraint" in line]
    return shlex.split(line.split("pip install")[1].replace("--only-binary=:all:", ""))


def test_conda_and_make_install_the_same_list():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [from_pip] = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert [word for line in from_pip for word in line.split()] == pip_arguments_of_make()

    from_conda = {entry.split()[0]: entry for entry in dependencies if isinstance(entry, str)}
    assert set(from_conda) == {"python", "pip", "openjdk"}, "a library that conda brings would not have its pin"
    assert from_conda["python"] == f"python {PROJECT['requires-python']}"


def test_every_requirement_has_a_pin_that_it_allows():
    pinned = pins()
    for requirement in direct_requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the pin, {version}"


def test_pins_cover_all_that_comes_along_and_nothing_else():
    needed = {name for name in closure(direct_requirements()) if not CUDA.match(name)}
    of_playwright = {"greenlet"}  # by its own words, which are not here before `make test-browser` has installed it
    assert set(pins()) == needed | of_playwright


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not in the environment that make makes")
def test_this_environment_holds_the_pinned_versions():
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    wrong = {name: (installed[name], pin) for name, pin in pins().items() if installed.get(name, pin) != pin}
    assert not wrong, f"(installed, pinned): {wrong}"


def test_a_library_without_data_says_how_to_get_it(tmp_path):
    shutil.copytree(ROOT / "dalleflamingo", tmp_path / "dalleflamingo")  # as `pip install .` does: no data beside it
    outside = {key: value for key, value in os.environ.items() if key != "DALLEFLAMINGO_DATA"}
    outside["PYTHONPATH"] = str(tmp_path)
    script = "import dalleflamingo.registry as r; print(r.__file__, flush=True); r.locate('miniature/blip')"
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=outside, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.startswith(str(tmp_path))
    assert "RegistryError" in run.stderr and "git clone" in run.stderr and "DALLEFLAMINGO_DATA" in run.stderr


def test_an_installed_library_has_every_file_that_is_not_code():
    package = ROOT / "dalleflamingo"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {path for pattern in patterns["dalleflamingo"] for path in package.glob(pattern)}
    data = {path for path in files_under_git() if path.is_relative_to(package) and path.suffix != ".py"}
    assert data and data == installed & data


# ── the code ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", [["check", "--output-format=concise"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(command):
    run = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


def imports_of(path: Path) -> set[str]:
    """Modules of this package that `path` imports, anywhere in it."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found & {name_of(module) for module in MODULES}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_run_one_way():
    graph = {name_of(path): imports_of(path) - {name_of(path)} for path in MODULES if path.name != "__init__.py"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


# each imports itself and those before it
LAYERS = ("core", "adapters", "sources", "evaluation", "commands", "miniature", "course", "research")
CORE = (
    "settings profiles runs datasets registry tokens denoising generator similarity decoding vocabulary captioner "
    "bridge reconstruct cycle_losses cycle"
).split()  # each imports those before it


def layer_of(module: str) -> int:
    """The position of a module in `LAYERS`; the command line and the front door come after all of them."""
    parts = module.split(".")[1:]
    if parts in ([], ["__main__"]):
        return len(LAYERS)
    return LAYERS.index(parts[0]) if parts[0] in LAYERS else 0


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "dalleflamingo")))
def test_a_module_imports_only_what_comes_before_it(path):
    own = name_of(path)
    for name in imports_of(path) - {own, "dalleflamingo"}:
        assert layer_of(name) <= layer_of(own), f"{own} imports {name}, of a later layer"
        if layer_of(own) == layer_of(name) == 0:
            first, second = (module.removeprefix("dalleflamingo.") for module in (name, own))
            assert CORE.index(first) < CORE.index(second), (
                f"{own} imports {name}, which comes later in the reading order"
            )
        if ".training" in name:
            assert ".training" in own, f"{own} imports {name}, which is for the command line and tests only"


def test_a_lock_is_the_kernels_and_ends_with_its_process():
    """Where the drive has no locks, filelock would take a file for one, which stays when the process is killed."""
    calls = [
        (path.name, {argument.arg: argument.value for argument in node.keywords})
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "FileLock"
    ]
    soft = [name for name, given in calls if getattr(given.get("fallback_to_soft"), "value", True)]
    assert len(calls) >= 6 and soft == []


def test_the_core_is_small():
    core = [path for path in MODULES if path.parent.name == "dalleflamingo" and not path.name.startswith("__")]
    assert sorted(path.stem for path in core) == sorted(CORE) and len(core) <= 16
    assert sum(len(path.read_text().splitlines()) for path in core) <= 4000


def files_under_git() -> list[Path]:
    """Tracked files, and new ones that git would take."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout ({error})")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def lines_with(pattern: str, files: list[Path]) -> list[str]:
    """Every line that the pattern is found in, as FILE:NUMBER; this file is left out."""
    found = []
    for file in files:
        if file.suffix in {".py", ".md", ".ipynb", ".yml", ".toml", ""} and file != Path(__file__).resolve():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            numbers = (number for number, line in enumerate(lines, start=1) if re.search(pattern, line))
            found += [f"{file.relative_to(ROOT)}:{number}" for number in numbers]
    return found


def test_there_is_one_command_line():
    assert not lines_with(r"-m dalleflamingo\.", files_under_git())


def test_no_merge_left_its_marks():
    assert not lines_with(r"^(<{7}|>{7}) ", files_under_git())


def test_only_the_registry_knows_the_miniature_by_its_name():
    assert not lines_with(r"startswith\(.miniature/", [path for path in MODULES if path.name != "registry.py"])


def test_almost_all_code_is_formatted_by_ruff():
    assert len(lines_with(r"fmt: (skip|off)", files_under_git())) <= 10


# ── the notebooks ────────────────────────────────────────────────────────────────────────────────────────────────────


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_the_course_begins_with_the_question_and_holds_insight_one():
    assert {"00_the_question", "02_tokenizer_mapping", "04_image_text_image"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    for number, cell in enumerate(code_cells(path), start=1):
        assert cell["outputs"] == [] and cell["execution_count"] is None, f"code cell {number} has outputs"
        assert "execution" not in cell["metadata"], f"code cell {number} has the times of a run"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_asserts_its_values(path):
    code = "\n".join(re.sub(r"(?m)^\s*[%!].*$", "", source(cell)) for cell in code_cells(path))
    asserts = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
    assert any(not isinstance(node.test, ast.Constant) for node in asserts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_cells_fit_a_screen(path):
    for number, cell in enumerate(code_cells(path), start=1):
        lines = source(cell).splitlines()
        assert len(lines) <= 20, f"code cell {number} has {len(lines)} lines"
        assert max(map(len, lines), default=0) <= 88, f"code cell {number}: {max(lines, key=len)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_the_first_cell_and_the_badge_of_the_setting(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    remedy = "run `python -m dalleflamingo course --badges`"
    assert notebook == colab.prepared(notebook, path.stem, repository()), remedy
    assert code_cells(path)[0] == colab.first_cell(path.stem, repository())


def test_readme_has_the_badge_of_the_setting_and_nothing_else_names_a_repository():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == colab.with_badge(readme, NOTEBOOKS[0].stem, repository())
    if not repository():
        assert not lines_with(r"github\.com/dalleflamingo", files_under_git())


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not in the environment that make makes")
def test_the_setting_is_that_of_pyproject():
    assert repository() == PROJECT.get("urls", {}).get("Repository", "")


def test_each_run_of_a_notebook_has_a_folder_of_its_own():
    names = []
    for path in NOTEBOOKS:
        code = "\n".join(map(source, code_cells(path)))
        assert "tempfile" not in code, "course.run_folder makes a folder that can be kept"
        own = re.findall(r'course\.run_folder\("(.*?)"\)', code)
        assert all(name.startswith(f"{path.stem[:2]}_") for name in own)
        names += own
    assert len(names) == len(set(names)) >= 5


def headings(path: Path) -> list[str]:
    """Of the markdown cells, code blocks left out."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    return re.findall(r"(?m)^#+ .*$", re.sub(r"(?ms)^```.*?^```", "", text))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_imports_from_the_front_door(path):
    code = "\n".join(map(source, code_cells(path)[1:]))  # without the cell for Colab
    imports = re.findall(r"(?m)^\s*(?:from|import) dalleflamingo\b.*", code)
    assert len(imports) <= 6, imports


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_headings_have_one_style(path):
    title, *others = headings(path)
    assert title.startswith(f"# {path.stem[:2]} · ")
    sections = [heading for heading in others if heading.startswith("## ")]
    assert sections[-1] == "## What you know now"
    for number, section in enumerate(sections[:-1], start=1):
        assert section.startswith(f"## {number} · ")
    exercises = [heading for heading in others if "Exercise" in heading]
    for number, exercise in enumerate(exercises, start=1):
        assert exercise.startswith(f"### Exercise {number} · ")


@pytest.mark.parametrize(("path", "following"), pairwise(NOTEBOOKS), ids=lambda path: path.stem)
def test_notebook_ends_with_a_link_to_the_next(path, following):
    last = json.loads(path.read_text(encoding="utf-8"))["cells"][-1]
    title = headings(following)[0].removeprefix("# ").replace(" · ", " ", 1)
    link = f"**Next:** [{title}]({following.name})"
    assert any(line.startswith(link) for line in source(last).splitlines()), f"no line {link}"


# ── the files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_file_is_above_16_mb_and_all_data_within_48_mb():
    sizes = {path.relative_to(ROOT): path.stat().st_size / 1e6 for path in files_under_git()}
    assert not {path: size for path, size in sizes.items() if size > 16}
    assert sum(size for path, size in sizes.items() if path.parts[0] == "data") <= 48


def test_links_of_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        targets = re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
        for target in {link.split("#")[0] for pair in targets for link in pair}:
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links {target}, which is not there"


# ── the summary ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_skipped_real_data_is_counted(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    tests = "def test_a(real_data): pass\n\ndef test_b(real_data): pass\n\ndef test_c(): pass\n"
    (tmp_path / "test_three.py").write_text(tests)
    without = {key: value for key, value in os.environ.items() if key != "DALLEFLAMINGO_REAL_DATA"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    run = subprocess.run(command, env=without, cwd=tmp_path, capture_output=True, text=True)
    assert "2 tests on real data did NOT run" in run.stdout
    assert "1 passed, 2 skipped" in run.stdout.splitlines()[-1]
