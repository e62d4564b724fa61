"""What all tests share.

An environment without the user's own settings, one thread a process, the same random state, the folder of real data,
and a count of the tests that lacked it.
"""

import os
import random
from pathlib import Path

import hypothesis
import pytest

VARIABLE = "DALLEFLAMINGO_REAL_DATA"
ABSENT = "real data absent"

# Before any test imports torch or transformers, which read these once; processes that a test starts inherit them. With
# one thread each, as many tests run at a time as there are cores, and sums have the same last digit on every machine.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ["HF_HUB_OFFLINE"] = "1"
# What a user has set for runs of their own is no part of what is tested: their data and run folders, a proxy before the
# servers of these tests, the repository of a git hook.
TAKEN = {VARIABLE, "DALLEFLAMINGO_DATA", "DALLEFLAMINGO_PROFILE", "DALLEFLAMINGO_OUTPUT"}
for name in {name for name in os.environ if name.startswith("DALLEFLAMINGO_")} - TAKEN:
    del os.environ[name]
for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
    os.environ.pop(name, None)
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))
# How fast a machine is says nothing about the code; in CI the same examples every time, so that red means a change.
hypothesis.settings.register_profile("course", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("course")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test begins with the same global random state, whatever ran before it in its process."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that DALLEFLAMINGO_REAL_DATA names; without it the test is skipped and counted.

    It holds `coco-karpathy`, `coco-photos`, `nocaps`, `magic-predictions` and `colab`.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"{ABSENT}: {VARIABLE} is not set")
    if not Path(named).is_dir():
        pytest.fail(f"{VARIABLE}={named!r} is not a folder: name the folder of real data, or unset it")
    return Path(named).resolve()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if ABSENT in str(report.longrepr)]
    if skipped:
        terminalreporter.section("real data")
        terminalreporter.line(
            f"{len(skipped)} tests on real data did NOT run: {VARIABLE} is not set. It names a folder that holds "
            "coco-karpathy, coco-photos, nocaps, magic-predictions and colab."
        )
