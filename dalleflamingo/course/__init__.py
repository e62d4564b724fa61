"""What a learner meets: notebooks, figures, checks of the exercises, the site; and where the runs of notebooks are."""

import os
import tempfile
from pathlib import Path

RUNS = "DALLEFLAMINGO_RUNS"


def run_folder(name: str) -> Path:
    """A folder for a run of a notebook, which is there afterwards.

    Args:
        name: of the run; each run of the course has its own.
    Returns:
        a new temporary folder; or, where DALLEFLAMINGO_RUNS names a folder that stays, NAME in the current profile's
        folder there, in which the run goes on.
    Raises:
        ValueError: as `profiles.current`.
    """
    from dalleflamingo import profiles  # which imports torch; the modules of this package do without

    if not (runs := os.environ.get(RUNS)):
        return Path(tempfile.mkdtemp(prefix=f"{name}-"))
    folder = Path(runs).expanduser() / profiles.current().name / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
