"""A process that is one worker of a run with the models of `fakes`; `test_workers` starts several.

    python worker_run.py OUT IMAGES N I/COUNT [DEATH]

With DEATH, SIGKILL ends it after so many generated images.
"""

import os
import signal
import sys
from pathlib import Path

import fakes

from dalleflamingo.evaluation.workers import Worker, run_together
from dalleflamingo.reconstruct import ImageTextImage


def journey(on_draw=lambda: None, **models) -> ImageTextImage:
    similarities = [fakes.MeanColour(), fakes.Corner()]
    models = {"captioner": fakes.Captioner(), "generator": fakes.Generator(0, on_draw)} | models
    return ImageTextImage(similarities=similarities, settings=fakes.SETTINGS, **models)


def main(out: str, images: str, n: str, worker: str, death: str = "0") -> None:
    left = int(death)

    def die() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    run_together(journey(die), fakes.dataset(Path(images), int(n)), Path(out), Worker.named(worker))


if __name__ == "__main__":
    main(*sys.argv[1:])
