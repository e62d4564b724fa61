"""A process that starts runs which SIGKILL ends at random moments; `test_reconstruct` reads its record.

    python killed_run.py FOLDER IMAGES KILLS SEED

It makes both journeys, by the functions `run` and `run_texts` of `fakes`, in FOLDER/run and FOLDER/run_texts.

A moment is a number of generated images and some milliseconds after them, so that on a fast and on a busy machine alike
a run dies midway: before its first image, while generating, saving, or writing a part.
"""

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import fakes
import pyarrow as pa
import pyarrow.parquet as pq
from forked import fork


class Death:
    """SIGKILL for this process, `seconds` after it has generated so many images."""

    def __init__(self, images: int, seconds: float):
        self.images, self.seconds = images, seconds
        if images == 0:
            self._come()

    def __call__(self) -> None:
        self.images -= 1
        if self.images == 0:
            self._come()

    def _come(self) -> None:
        threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def kept(run_folder: Path) -> set[int]:
    """Image ids in whole parts, read without the code under test."""
    ids = set()
    for path in (run_folder / "parts").glob("*.parquet"):
        try:
            ids |= set(pq.read_table(path, columns=["image_id"])["image_id"].to_pylist())
        except pa.ArrowException:
            continue
    return ids


def attempt(way: Callable, run_folder: Path, images: Path, log: Path, moment: tuple[int, float] | None) -> dict:
    """One run, killed at the moment unless it ends before; what it found and what it did again."""
    before = kept(run_folder)
    log.touch()

    def work() -> None:
        way(run_folder, images, log=log, delay=0.004, on_draw=Death(*moment) if moment else lambda: None)

    child = fork(work)
    _, status = os.waitpid(child, 0)
    again = sorted(before & {int(line) for line in log.read_text().split()})
    return {"kept": len(before), "again": again, "status": os.waitstatus_to_exitcode(status)}


def main(folder: Path, images: Path, kills: int, seed: int) -> None:
    record = {}
    for way in (fakes.run, fakes.run_texts):
        rng = random.Random(seed)
        moments = [(rng.randint(0, 11), rng.uniform(0, 0.02)) for _ in range(kills)]
        record[way.__name__] = [
            attempt(way, folder / way.__name__, images, folder / f"{way.__name__}-{i}.txt", moment)
            for i, moment in enumerate([*moments, None])
        ]
    print("RECORD " + json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
