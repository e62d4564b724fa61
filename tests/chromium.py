"""The Chromium of this machine, driven by Playwright, which downloads none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="without the extra `browser`")
PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MARKS = [pytest.mark.browser, pytest.mark.skipif(PATH is None, reason="without Chromium")]
PATIENCE = 120_000  # milliseconds: a busy machine is slow


@contextmanager
def opened() -> Iterator["sync_api.Browser"]:
    """A browser without a window."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        yield browser
        browser.close()
