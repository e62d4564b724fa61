"""Notebook 01 in JupyterLab in Chromium: all cells, a slider, a wrong and a right answer. `make test-browser`."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import chromium
import exercises
import pytest

pytestmark = chromium.MARKS
[NOTEBOOK] = [path for path in exercises.NOTEBOOKS if path.stem.startswith("01_")]
WRONG = "probabilities.sort(descending=True)"  # in the solution; ascending, the least likely tokens are kept
SETTINGS = {  # the whole notebook is in the page, not only the cells on the screen; no news from a server
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Where a JupyterLab of its own opens a copy of the notebook."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(NOTEBOOK, folder)
    for name, values in SETTINGS.items():
        path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"JUPYTERLAB_SETTINGS_DIR": folder / "settings", "JUPYTER_CONFIG_DIR": folder / "config"}
    own |= {"DALLEFLAMINGO_PROFILE": "smoke", "DALLEFLAMINGO_OUTPUT": folder / "output"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}"]
    command += [f"--ServerApp.port={port}", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in own.items()}, stdout=log, stderr=log)
    _wait_for(f"http://127.0.0.1:{port}/api", server, folder / "log.txt")
    yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK.name}"
    server.terminate()
    server.wait(60)


def _wait_for(api: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            urlopen(api).close()
        except URLError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"JupyterLab did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def page(address) -> Iterator["chromium.sync_api.Page"]:
    """The notebook after `Run All Cells`."""
    with chromium.opened() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(chromium.PATIENCE)
        page.goto(address)
        page.get_by_text("Kernel status: Idle").first.wait_for(state="attached")
        page.locator(".jp-CodeCell").nth(20).wait_for(state="attached")
        _run_all_cells(page)
        done = """() => {
            const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")];
            return prompts.length > 20 && /\\[\\d+\\]/.test(prompts.at(-1).textContent);
        }"""  # one after another, so that the last number is the end
        page.wait_for_function(done, timeout=5 * chromium.PATIENCE)
        yield page


def _run_all_cells(page: "chromium.sync_api.Page") -> None:
    """By the menu, which does nothing before the notebook and its kernel have found each other."""
    asked = page.locator(".jp-CodeCell .jp-InputPrompt", has_text=re.compile(r"\[[*\d]")).first
    for _ in range(20):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            asked.wait_for(state="attached", timeout=chromium.PATIENCE / 20)
        except chromium.sync_api.TimeoutError:
            continue
        return
    pytest.fail("JupyterLab does not run the cells")


def test_every_cell_runs_and_every_image_is_shown(page):
    assert page.locator(".jp-OutputArea-output", has_text="Traceback").count() == 0
    assert page.evaluate("[...document.querySelectorAll('.jp-OutputArea img')].every((one) => one.naturalWidth > 0)")
    assert page.locator(".jp-OutputArea img").count() > 8


def test_a_slider_changes_the_generated_image(page):
    widget = page.locator(".jp-OutputArea", has=page.get_by_text("guidance scale")).last
    image = widget.locator("img").last
    before = image.get_attribute("src")
    widget.get_by_role("slider").first.press("ArrowRight")
    changed = "([image, before]) => image.isConnected && image.src !== before"
    shown = widget.locator(f"img:not([src='{before}'])").last
    shown.wait_for()
    assert page.evaluate(changed, [shown.element_handle(), before]) and shown.evaluate("(one) => one.naturalWidth") > 0


@pytest.mark.parametrize("right", [False, True], ids=["wrong", "right"])
def test_an_answer_that_is_typed_is_judged(page, right):
    exercise = exercises.of(NOTEBOOK)[0]
    assert WRONG in exercise.solved
    source = exercise.solved if right else exercise.solved.replace(WRONG, "probabilities.sort()")
    cell = page.locator(".jp-CodeCell", has_text="# Exercise 1 ")
    cell.locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(source)
    page.keyboard.press("Control+Enter")
    said = cell.locator(".jp-OutputArea-output", has_text="Right" if right else "Not yet")
    said.wait_for()
    assert "Traceback" not in said.inner_text()
