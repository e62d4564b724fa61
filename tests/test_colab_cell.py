"""The first cell of the notebooks, on a Colab that is faked: nothing is cloned, installed or made a second time."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from own_git import git
from PIL import Image

import dalleflamingo
from dalleflamingo import course, profiles
from dalleflamingo.course import colab
from dalleflamingo.profiles import PROFILES

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = "https://github.com/someone/course"
T4 = "choose Runtime > Change runtime type > T4 GPU"
RUN = """
    import os, sys
    import google.colab
    import IPython.display

    IPython.display.display = lambda figure: figure.savefig("shown.png")
    exec(open("cell.py", encoding="utf-8").read())
    import dalleflamingo
    from dalleflamingo import course

    print("imported from", dalleflamingo.__file__)
    print("profile", os.environ["DALLEFLAMINGO_PROFILE"])
    print("run folder", course.run_folder("04_insight_1"))
"""
FAKES = {  # without google/__init__.py, so that google.protobuf stays in sight
    "google/colab/__init__.py": "",
    "google/colab/drive.py": """
        from pathlib import Path

        def mount(where):
            Path(where, "MyDrive").mkdir(parents=True)
            print("mounted", where)
    """,
    "pip/__init__.py": "",
    "pip/__main__.py": """
        import json, sys

        with open("pip.jsonl", "a") as log:
            log.write(json.dumps(sys.argv[1:]) + chr(10))
    """,
}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")


@pytest.fixture
def runtime(tmp_path) -> Path:
    """The folder /content of a fresh runtime, and beside it the repository with one release."""
    content, source = tmp_path / "content", tmp_path / "source"
    content.mkdir()
    write(tmp_path / "fakes", FAKES)
    shutil.copytree(ROOT / "dalleflamingo", source / "dalleflamingo", ignore=shutil.ignore_patterns("__pycache__"))
    module = source / "dalleflamingo/course/colab.py"
    module.write_text(module.read_text(encoding="utf-8").replace("/content", str(content)), encoding="utf-8")
    git(source, "init", "--quiet")
    git(source, "add", "--all")
    git(source, "commit", "--quiet", "-m", "release")
    git(source, "tag", colab.TAG)
    git(tmp_path, "clone", "--quiet", "--bare", source, tmp_path / "public.git")
    return content


def run_cell(content: Path, address: str, drive: bool = False) -> subprocess.CompletedProcess:
    """Run the first cell of notebook 04 in a new process, as after a restart."""
    source = "".join(colab.first_cell("04_image_text_image", address)["source"]).replace("/content", str(content))
    if drive:
        assert source.count("keep_runs_in_drive = False") == 1
        source = source.replace("keep_runs_in_drive = False", "keep_runs_in_drive = True")
    write(content, {"run.py": RUN})
    (content / "cell.py").write_text(source, encoding="utf-8")
    variables = {key: value for key, value in os.environ.items() if not key.startswith("DALLEFLAMINGO")}
    variables["DALLEFLAMINGO_DATA"] = os.environ.get("DALLEFLAMINGO_DATA") or str(ROOT / "data")
    variables |= {
        "PYTHONPATH": str(content.parent / "fakes"),
        "COLAB_RELEASE_TAG": "x",
        "LC_ALL": "C.UTF-8",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run([sys.executable, "run.py"], cwd=content, env=variables, capture_output=True, text=True)


def test_one_cell_leads_to_the_first_ranked_image_and_after_a_restart_repeats_nothing(runtime):
    clone, public = runtime / "dalleflamingo-course", runtime.parent / "public.git"
    first = run_cell(runtime, f"file://{public}")
    assert first.returncode == 0, first.stderr
    said = first.stdout.splitlines()
    assert "Fetching" in first.stdout and T4 in first.stdout and "profile mini" in said
    assert "Notebook 04_image_text_image downloads nothing." in said
    assert any(line.startswith("Runs are lost when Colab disconnects: tick keep_runs_in_drive") for line in said)
    assert f"imported from {clone / 'dalleflamingo/__init__.py'}" in said and "mounted" not in first.stdout
    installed = [["install", "--quiet", "--editable", f"{clone}[colab]"]]
    pip = runtime / "pip.jsonl"
    assert [json.loads(line) for line in pip.read_text().splitlines()] == installed
    table = pd.read_parquet(clone / "runs/first/candidates.parquet")
    assert len(table) == PROFILES["mini"].candidates and table["clip"].notna().all()
    with Image.open(runtime / "shown.png") as shown:
        assert shown.width > 5 * 64  # five images side by side

    made = {path: path.stat().st_mtime_ns for path in (clone / "runs/first/images").iterdir()}
    public.rename(runtime.parent / "gone.git")
    second = run_cell(runtime, f"file://{public}", drive=True)
    assert second.returncode == 0, second.stderr
    said = second.stdout.splitlines()
    assert [json.loads(line) for line in pip.read_text().splitlines()] == installed
    assert made == {path: path.stat().st_mtime_ns for path in (clone / "runs/first/images").iterdir()}
    kept = runtime / f"drive/MyDrive/dalleflamingo-{dalleflamingo.__version__}"
    assert f"mounted {runtime / 'drive'}" in said and f"run folder {kept / 'mini/04_insight_1'}" in said
    assert "profile mini" in said
    assert not any(word in second.stdout for word in ("Fetching", "Installing", "Runs are lost"))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "Make course.zip"),
        ("file:///nowhere.git", "'/nowhere.git' does not appear to be a git repository"),
    ],
)
def test_where_the_course_cannot_be_had_the_cell_says_why(tmp_path, address, reason):
    write(tmp_path / "fakes", FAKES)
    content = tmp_path / "content"
    content.mkdir()
    done = run_cell(content, address)
    assert done.returncode and reason in done.stderr
    assert not (content / "dalleflamingo-course").exists()


def test_without_an_address_the_course_comes_from_the_learners_own_archive(runtime):
    module = {"dalleflamingo/course/colab.py": "def begin(*given): print('begun', *given)"}
    source = runtime.parent / "stub"
    write(source, {"dalleflamingo/__init__.py": "", "dalleflamingo/course/__init__.py": "run_folder = str", **module})
    git(source, "init", "--quiet")
    git(source, "add", "--all")
    git(source, "commit", "--quiet", "-m", "copy")
    git(source, "archive", "-o", runtime / "course.zip", "HEAD")
    done = run_cell(runtime, "")
    assert "begun 04_image_text_image False" in done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("address", ["", ADDRESS])
def test_elsewhere_the_cell_does_nothing(tmp_path, monkeypatch, capsys, address):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    path, variables = list(sys.path), dict(os.environ)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    exec("".join(colab.first_cell("00_the_question", address)["source"]), {})
    assert (sys.path, dict(os.environ), capsys.readouterr().out) == (path, variables, "")


# ── what the cell calls ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A runtime with a T4, and nothing downloaded yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (14 * 2**30, 15 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch, tmp_path) -> None:
    for variable in (profiles.VARIABLE, course.RUNS):
        monkeypatch.setenv(variable, "x")  # so that what a test sets is taken back
        monkeypatch.delenv(variable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_with_a_gpu_the_profile_is_colab_unless_another_is_named(gpu, monkeypatch, capsys):
    assert colab.choose_profile().name == os.environ[profiles.VARIABLE] == "colab"
    assert "Tesla T4" in capsys.readouterr().out
    monkeypatch.setenv(profiles.VARIABLE, "mini")
    assert colab.choose_profile().name == "mini"


def test_what_will_be_downloaded_is_said_with_size_and_time(gpu):
    real = PROFILES["colab"]
    said = colab.downloads("04_image_text_image", real)
    for model in ("blip-large 1,879 MB", "sd-v1-4 2,133 MB", "clip-vit-l-14 1,710 MB", "dino-vitb8 343 MB"):
        assert model in said
    assert "will download 6.2 GB" in said and "photographs of nocaps, at most 96 MB" in said
    assert said.endswith("about 2 minutes at 50 MB/s.")
    trained = colab.downloads("06_cycle_finetuning", real)
    assert "sd-v1-4 4,265 MB" in trained and "photographs of coco, at most 130 MB" in trained and "dino" not in trained
    assert colab.downloads("02_tokenizer_mapping", real) == "Notebook 02_tokenizer_mapping downloads nothing."
    assert all("downloads nothing" in colab.downloads(path.stem, PROFILES["mini"]) for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_the_models_and_data_that_are_listed(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    opened_by = {
        "load_models(profile)": {"captioner", "generator", "clip", "dino"},
        "load_cycle(": {"captioner", "generator", "coco"},
        "load_dataset(profile.dataset)": {"dataset"},
        "source_of(profile.clip": {"clip"},
        "ImageEvaluators.of(profile": {"inception"},
    }
    assert set().union(*(fields for call, fields in opened_by.items() if call in code)) == colab.OPENS[path.stem]


@pytest.fixture
def pip(monkeypatch, tmp_path) -> SimpleNamespace:
    """In place of pip and of the installed packages: what pip answers, what was there and what is there afterwards."""
    faked = SimpleNamespace(returncode=0, stderr="", versions=[{"numpy": "2.0", "torch": "2.8"}] * 2, runs=0)

    def run(*_, **__) -> SimpleNamespace:
        faked.runs += 1
        return faked

    monkeypatch.setattr(colab, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(colab, "_versions", lambda: faked.versions[faked.runs])
    return faked


def test_an_install_that_fails_is_told_and_tried_again(pip):
    pip.returncode, pip.stderr = 1, "No space left on device"
    with pytest.raises(RuntimeError, match="No space left on device"):
        colab.install()
    pip.returncode, pip.runs = 0, 0
    colab.install()
    colab.install()
    assert pip.runs == 1


def test_a_package_of_colabs_that_pip_replaced_asks_for_a_restart(pip, capsys):
    pip.versions = [{"numpy": "2.0", "torch": "2.8"}, {"numpy": "2.4", "torch": "2.8", "POT": "0.9.6"}]
    colab.install()
    said = capsys.readouterr().out
    assert "pip replaced numpy 2.0 by 2.4: choose Runtime > Restart session" in said


def test_a_kept_run_folder_is_the_profiles_own_and_otherwise_a_new_one(tmp_path, monkeypatch):
    temporary = {course.run_folder("04_insight_1") for _ in range(2)}
    assert len(temporary) == 2 and all(folder.is_dir() for folder in temporary)
    for folder in temporary:
        folder.rmdir()
    monkeypatch.setenv(course.RUNS, str(tmp_path))
    assert course.run_folder("04_insight_1") == course.run_folder("04_insight_1") == tmp_path / "mini/04_insight_1"
    monkeypatch.setenv(profiles.VARIABLE, "smoke")
    assert course.run_folder("04_insight_1") == tmp_path / "smoke/04_insight_1"
    assert (tmp_path / "smoke/04_insight_1").is_dir()


# ── badges ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_badges_come_and_go_with_the_setting(tmp_path):
    for path in [*NOTEBOOKS, ROOT / "README.md"]:
        shutil.copy(path, tmp_path)
    copies, readme = sorted(tmp_path.glob("*.ipynb")), tmp_path / "README.md"

    def texts() -> list[str]:
        return [path.read_text(encoding="utf-8") for path in [*copies, readme]]

    colab.write_badges(copies, readme, "")
    without = texts()
    assert not any("Open in Colab" in text for text in without)
    colab.write_badges(copies, readme, ADDRESS)
    once = texts()
    for text, name in zip(once, [path.stem for path in [*copies, copies[0]]], strict=True):
        page = f"https://colab.research.google.com/github/someone/course/blob/{colab.TAG}/notebooks/{name}.ipynb"
        assert text.count("[![Open in Colab](") == text.count(f"]({page})") == 1
    for path in copies:
        title, *others = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert "".join(title["source"]).splitlines()[2].startswith("[![Open in Colab]")
        [first] = [cell for cell in others if cell["id"] == colab.CELL]
        lines = "".join(first["source"]).splitlines()
        assert f'"{ADDRESS}"' in "\n".join(lines) and len(lines) <= 20 and max(map(len, lines)) <= 88
    colab.write_badges(copies, readme, ADDRESS)
    assert texts() == once
    colab.write_badges(copies, readme, "")
    assert texts() == without


@pytest.mark.parametrize("address", ["https://gitlab.com/a/b", "https://github.com/a", "git@github.com:a/b"])
def test_an_address_that_colab_cannot_open_is_refused(address):
    with pytest.raises(ValueError, match="alone"):
        colab.with_badge("# Title\n", "00_the_question", address)
    assert "someone/course/blob" in colab.with_badge("# Title\n", "00_the_question", f"{ADDRESS}.git")


def test_the_address_is_the_repository_of_project_urls(tmp_path, monkeypatch):
    find = dalleflamingo.repository.__wrapped__
    found = tmp_path / "dalleflamingo-9.dist-info/METADATA"
    found.parent.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for lines, address in (
        ("", ""),
        (f"Project-URL: Repository, {ADDRESS}\nProject-URL: Docs, https://x.org\n", ADDRESS),
    ):
        found.write_text(f"Metadata-Version: 2.1\nName: dalleflamingo\nVersion: 9\n{lines}")
        assert find() == address
