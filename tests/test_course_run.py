"""`python -m dalleflamingo course` on three small notebooks of our own."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.kernelspec import KernelSpecManager

from dalleflamingo.course import run, site

ROOT = Path(__file__).resolve().parent.parent


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook whose first cell is markdown and whose others are code."""
    markdown, code = nbformat.v4.new_markdown_cell(cells[0]), map(nbformat.v4.new_code_cell, cells[1:])
    nbformat.write(nbformat.v4.new_notebook(cells=[markdown, *code]), path)
    return path


def command(*arguments: object) -> dict:
    """Arguments for `subprocess` that run the course from a checkout, whether or not the package is installed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "OMP_", "DALLE"))}
    return {
        "args": [sys.executable, "-m", "dalleflamingo", "course", *map(str, arguments)],
        "env": environment | {"PYTHONPATH": str(ROOT)},
        "text": True,
    }


@pytest.fixture(scope="module")
def course_run(tmp_path_factory):
    """(finished process, output folder) of a run in profile smoke over a good, a failing and a dying notebook."""
    folder = tmp_path_factory.mktemp("course")
    child = 'subprocess.run([sys.executable, "-c", "import time; x = bytes(b\'1\') * 400_000_000; time.sleep(5)"])'
    names = ("DALLEFLAMINGO_PROFILE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    save = 'open(os.environ["DALLEFLAMINGO_OUTPUT"] + "/figures/one.png", "w").close()'
    (folder / "pictures").mkdir()
    (folder / "pictures/one.png").write_bytes(b"no more than bytes")
    paragraphs = [
        "# A <i>title</i>",
        "![one](pictures/one.png) ![none](pictures/missing.png)",
        "<details><summary>Solution</summary>",
        "```python\nreturn answer\n```\n</details>",
    ]
    notebooks = [
        write_notebook(
            folder / "0_good.ipynb",
            "\n\n".join(paragraphs),
            f"import os, subprocess, sys; {child}",
            save,
            f"[os.environ[name] for name in {names}]",
        ),
        write_notebook(folder / "1_fails.ipynb", "# Fails", "x = 1", "print('before')", "y = x / 0", "z = 1"),
        write_notebook(folder / "2_dies.ipynb", "# Dies", "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"),
    ]
    arguments = command("--profile", "smoke", "--workers", 2, "--out", folder / "build", *notebooks)
    return subprocess.run(**arguments, capture_output=True), folder / "build"


def test_every_notebook_leaves_a_page_and_its_executed_self(course_run):
    _, out = course_run
    for name in ("0_good", "1_fails", "2_dies"):
        assert f"{name}.html" in (out / "site/index.html").read_text()
        assert "without executing" not in (out / f"site/{name}.html").read_text()
    executed = nbformat.read(out / "0_good.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0]["data"]["text/plain"] == "['smoke', '1', '1']"
    assert (out / "figures" / "one.png").exists()
    assert not list(out.rglob("*.part"))


def test_a_failing_notebook_names_its_cell_and_the_others_still_run(course_run):
    run, out = course_run
    good, fails, dies = sorted(run.stdout.splitlines()[1:4])  # they are reported as they end
    assert "FAILED" not in good
    assert "code cell 3 (y = x / 0): ZeroDivisionError: division by zero" in fails
    assert "code cell 2 (os.kill" in dies and "the kernel died" in dies
    assert run.returncode == 1
    assert "before" in (out / "site/1_fails.html").read_text()


def test_peak_memory_counts_the_children_of_the_kernel(course_run):
    _, out = course_run
    good, fails, _ = json.loads((out / "course.json").read_text())["notebooks"]
    assert good["peak_bytes"] - fails["peak_bytes"] > 350e6


def test_a_page_hides_what_is_to_be_opened_and_has_its_pictures_inside(course_run):
    _, out = course_run
    page = (out / "site/0_good.html").read_text()
    [hidden] = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", page, re.DOTALL)
    assert "return" in hidden and "answer" in hidden
    picture = base64.b64encode((out.parent / "pictures/one.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{picture}"' in page and 'src="pictures/missing.png"' in page


def test_the_index_names_a_notebook_by_its_title_in_plain_text(course_run):
    _, out = course_run
    page = (out / "site/index.html").read_text()
    assert ">A title</a>" in page and "<i>title" not in page


def test_the_index_keeps_the_order_of_the_course(course_run):
    _, out = course_run
    record = json.loads((out / "course.json").read_text())
    assert [entry["notebook"] for entry in record["notebooks"]] == ["0_good", "1_fails", "2_dies"]
    page = (out / "site/index.html").read_text()
    assert page.index("0_good.html") < page.index("1_fails.html") < page.index("2_dies.html")


def plant_kernel(folder: Path) -> Path:
    """A kernelspec called python3 that would run something else, in a data folder of Jupyter's; returns that folder."""
    spec = {"argv": [sys.executable, "-c", "raise SystemExit('planted')"], "display_name": "?", "language": "python"}
    (folder / "kernels/python3").mkdir(parents=True)
    (folder / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    return folder


# variable -> where a kernelspec is planted that Jupyter would find by it before the environment's
PLANTED = {"JUPYTER_PATH": ".", "JUPYTER_DATA_DIR": ".", "HOME": ".local/share/jupyter"}


def with_planted_kernel(folder: Path, variable: str) -> dict[str, str]:
    plant_kernel(folder / PLANTED[variable])
    return {variable: str(folder), "JUPYTER_PREFER_ENV_PATH": "0"}


ASK = "import sys; assert sys.prefix == {!r}, sys.prefix"


@pytest.mark.parametrize("variable", PLANTED)
def test_the_course_runs_in_its_own_python_whatever_kernel_stands_on_the_path(tmp_path, monkeypatch, variable):
    for name in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in with_planted_kernel(tmp_path / "elsewhere", variable).items():
        monkeypatch.setenv(name, value)
    notebook = write_notebook(tmp_path / "asks.ipynb", "# Asks", ASK.format(sys.prefix))
    assert "raise SystemExit('planted')" in KernelSpecManager().get_kernel_spec("python3").argv
    [outcome] = run.run_course([notebook], tmp_path / "build", "smoke", workers=1)
    assert outcome.failure is None


@pytest.mark.parametrize("variable", ["JUPYTER_PATH", "JUPYTER_DATA_DIR"])
def test_notebooks_are_tested_in_the_python_that_tests_them(tmp_path, variable):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    notebook = write_notebook(tmp_path / "asks.ipynb", "# Asks", ASK.format(sys.prefix))
    content = nbformat.read(notebook, as_version=4)
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(content, notebook)
    environment = os.environ | with_planted_kernel(tmp_path / "elsewhere", variable)
    arguments = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--nbmake", str(notebook)]
    if variable == "JUPYTER_DATA_DIR":
        environment.pop("JUPYTER_PATH", None)
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_two_workers_run_two_notebooks_at_a_time(tmp_path):
    cells = (
        "import pathlib, time",
        "pathlib.Path({own!r}).touch()",
        "while not pathlib.Path({other!r}).exists(): time.sleep(0.1)",
    )
    paths = []
    for own, other in (("a", "b"), ("b", "a")):  # each waits for the other, so that one after another they never end
        code = [cell.format(own=str(tmp_path / own), other=str(tmp_path / other)) for cell in cells]
        paths.append(write_notebook(tmp_path / f"{own}.ipynb", "# Waits", *code))
    outcomes = run.run_course(paths, tmp_path / "build", "smoke", workers=2)
    assert [(outcome.notebook, outcome.failure) for outcome in outcomes] == [("a", None), ("b", None)]


def test_the_notebook_that_took_longest_last_time_starts_first(tmp_path, capsys):
    paths = [write_notebook(tmp_path / f"{name}.ipynb", "# Short", "1 + 1") for name in "abc"]
    (tmp_path / "build").mkdir()
    record = {"profile": "smoke", "notebooks": [{"notebook": "a", "seconds": 1}, {"notebook": "b", "seconds": 2}]}
    (tmp_path / "build/course.json").write_text(json.dumps(record))
    outcomes = run.run_course(paths, tmp_path / "build", "smoke", workers=1)
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["c", "b", "a"]  # c was never timed
    assert [outcome.notebook for outcome in outcomes] == ["a", "b", "c"]


def test_a_run_of_one_notebook_keeps_the_others_of_its_profile(tmp_path):
    paths = [write_notebook(tmp_path / f"{name}.ipynb", "# Short", "1 + 1") for name in "ab"]
    for chosen, profile in (([paths[1]], "smoke"), ([paths[0]], "smoke"), ([paths[1]], "mini")):
        run.run_course(chosen, tmp_path / "build", profile, workers=1)
        record = json.loads((tmp_path / "build/course.json").read_text())
        names = [entry["notebook"] for entry in record["notebooks"]]
        assert names == {"smoke": ["b"] if chosen == [paths[1]] else ["a", "b"], "mini": ["b"]}[record["profile"]]


def quick_and_endless(folder: Path) -> list[Path]:
    """A notebook that is done at once, and one that waits 10 minutes unless there is a file `go` in its folder."""
    wait = f"import pathlib, time; time.sleep(0 if pathlib.Path({str(folder / 'go')!r}).exists() else 600)"
    return [
        write_notebook(folder / "0.ipynb", "# First", "1 + 1"),
        write_notebook(folder / "1.ipynb", "# Second", wait),
    ]


def stop_in_second_notebook(arguments: dict, number: signal.Signals) -> tuple[int, str]:
    """Send a signal once the first notebook is done; the exit status and what the course wrote from then on."""
    with subprocess.Popen(**arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as course:
        course.stdout.readline()
        assert course.stdout.readline().startswith("0 ")  # the first notebook is done
        while not (children := psutil.Process(course.pid).children(recursive=True)):
            time.sleep(0.1)
        course.send_signal(number)
        rest = course.stdout.read()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone and not alive
    return course.returncode, rest


def test_a_killed_run_ends_its_kernel_keeps_whole_files_and_can_be_run_again(tmp_path):
    arguments = command("--profile", "smoke", "--workers", 2, "--out", tmp_path / "build", *quick_and_endless(tmp_path))
    stop_in_second_notebook(arguments, signal.SIGKILL)
    nbformat.read(tmp_path / "build" / "0.ipynb", as_version=4)

    (tmp_path / "go").touch()
    rerun = subprocess.run(**arguments, capture_output=True)
    assert rerun.returncode == 0 and "2 of 2 notebooks ran to their end" in rerun.stdout


def test_an_interrupted_run_ends_its_kernels_and_says_what_is_kept(tmp_path):
    arguments = command("--profile", "smoke", "--workers", 2, "--out", tmp_path / "build", *quick_and_endless(tmp_path))
    status, rest = stop_in_second_notebook(arguments, signal.SIGINT)
    assert status == 130
    assert f"1 of 2 notebooks ran to their end and are kept in {tmp_path / 'build'}" in rest
    assert "stopped: 1 in" in rest
    executed, waiting = ((tmp_path / "build/site" / name).read_text() for name in ("0.html", "1.html"))
    assert "without executing" not in executed and "without executing" in waiting


def test_downloaded_models_may_reach_their_hub_and_run_one_notebook_at_a_time(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in run.environment("colab", tmp_path)
    assert run.environment("mini", tmp_path)["HF_HUB_OFFLINE"] == "1"
    assert run.default_workers("colab") == 1 <= run.default_workers("mini") <= 4


WRONG = [
    (["--profile", "huge", __file__], "smoke, mini, colab, paper"),
    (["nowhere.ipynb"], "those of the course are in"),
    (["--workers", "0"], "at least one notebook"),
]


@pytest.mark.parametrize(("arguments", "answer"), WRONG)
def test_a_wrong_argument_is_answered_with_the_right_ones(tmp_path, capsys, arguments, answer):
    with pytest.raises(SystemExit) as stopped:
        run.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert answer in capsys.readouterr().err


ROUNDED = [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (119.7, "2 min 00 s")]


@pytest.mark.parametrize(("seconds", "text"), ROUNDED)
def test_a_time_is_never_sixty_seconds(seconds, text):
    assert site.minutes(seconds) == text
