"""`python -m dalleflamingo course` on three small notebooks of our own."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from dalleflamingo.course import run

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
    child = 'subprocess.run([sys.executable, "-c", "import time; x = bytes(b\'1\') * 400_000_000; time.sleep(1.5)"])'
    names = ("DALLEFLAMINGO_PROFILE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    save = 'open(os.environ["DALLEFLAMINGO_OUTPUT"] + "/figures/one.png", "w").close()'
    (folder / "pictures").mkdir()
    (folder / "pictures/one.png").write_bytes(b"no more than bytes")
    text = "\n\n".join([
        "# A <i>title</i>", "![one](pictures/one.png) ![none](pictures/missing.png)",
        "<details><summary>Solution</summary>", "```python\nreturn answer\n```\n</details>",
    ])  # fmt: skip
    notebooks = [
        write_notebook(
            folder / "0_good.ipynb",
            text,
            f"import os, subprocess, sys; {child}",
            save,
            f"[os.environ[name] for name in {names}]",
        ),
        write_notebook(folder / "1_fails.ipynb", "# Fails", "x = 1", "print('before')", "y = x / 0", "z = 1"),
        write_notebook(folder / "2_dies.ipynb", "# Dies", "import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"),
    ]
    arguments = command("--profile", "smoke", "--out", folder / "build", *notebooks)
    return subprocess.run(**arguments, capture_output=True), folder / "build"


def test_every_notebook_leaves_a_page_and_its_executed_self(course_run):
    _, out = course_run
    for name in ("0_good", "1_fails", "2_dies"):
        assert f"{name}.html" in (out / "index.html").read_text()
        assert (out / f"{name}.html").stat().st_size > 10_000
    executed = nbformat.read(out / "0_good.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0]["data"]["text/plain"] == "['smoke', '1', '2']"
    assert (out / "figures" / "one.png").exists()
    assert not list(out.rglob("*.part"))


def test_a_failing_notebook_names_its_cell_and_the_others_still_run(course_run):
    run, out = course_run
    _, good, fails, dies = run.stdout.splitlines()[:4]
    assert "FAILED" not in good
    assert "code cell 3 (y = x / 0): ZeroDivisionError: division by zero" in fails
    assert "code cell 2 (os.kill" in dies and "the kernel died" in dies
    assert run.returncode == 1
    assert "before" in (out / "1_fails.html").read_text()


def test_peak_memory_counts_the_children_of_the_kernel(course_run):
    _, out = course_run
    good, fails, _ = json.loads((out / "course.json").read_text())["notebooks"]
    assert good["peak_bytes"] - fails["peak_bytes"] > 350e6


def test_a_page_hides_what_is_to_be_opened_and_has_its_pictures_inside(course_run):
    _, out = course_run
    page = (out / "0_good.html").read_text()
    [hidden] = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", page, re.DOTALL)
    assert "return" in hidden and "answer" in hidden
    picture = base64.b64encode((out.parent / "pictures/one.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{picture}"' in page and 'src="pictures/missing.png"' in page


def test_what_a_notebook_says_is_escaped_on_the_index_page(course_run):
    _, out = course_run
    assert "A &lt;i&gt;title&lt;/i&gt;" in (out / "index.html").read_text()


def test_a_killed_run_ends_its_kernel_keeps_whole_files_and_can_be_run_again(tmp_path):
    first = write_notebook(tmp_path / "0.ipynb", "# First", "1 + 1")
    again = f"import pathlib, time; time.sleep(0 if pathlib.Path({str(tmp_path / 'go')!r}).exists() else 600)"
    second = write_notebook(tmp_path / "1.ipynb", "# Second", again)
    arguments = command("--profile", "smoke", "--out", tmp_path / "build", first, second)

    with subprocess.Popen(**arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        run.stdout.readline()
        assert run.stdout.readline().startswith("0 ")  # the first notebook is done
        while not (children := psutil.Process(run.pid).children()):
            time.sleep(0.1)
        run.send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone and not alive
    nbformat.read(tmp_path / "build" / "0.ipynb", as_version=4)

    (tmp_path / "go").touch()
    rerun = subprocess.run(**arguments, capture_output=True)
    assert rerun.returncode == 0 and "2 of 2 notebooks ran to their end" in rerun.stdout


def test_real_models_may_reach_their_hub_and_miniature_ones_may_not(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in run.environment("colab", tmp_path)
    assert run.environment("mini", tmp_path)["HF_HUB_OFFLINE"] == "1"


WRONG = [
    (["--profile", "huge", __file__], "smoke, mini, colab, paper"),
    (["nowhere.ipynb"], "those of the course are in"),
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
    assert run._minutes(seconds) == text
