"""Several processes at one run: each makes a share of the images in a folder of its own, the last one puts it together.

    accelerate launch -m dalleflamingo reconstruct photos --out OUT      one process a GPU of this machine
    python -m dalleflamingo reconstruct photos --out OUT --worker 2/4    the second of four, on any machine

    OUT/workers/2-of-4/   the run folder of the second; what it has finished is kept there until all have
    OUT/                  in the end, the run folder that a single process would have left

The processes share nothing but the folder OUT, and never write to the same file. Which of them is the last one shows in
the files named `finished`, so none waits for another. A share consists of whole chunks, so every model gets the batches
that a single process would give it: on the same kind of machine the table is the same to the bit.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch
from filelock import FileLock

from dalleflamingo.datasets import Dataset, DatasetError, Example, UnreadableImage
from dalleflamingo.profiles import find_device
from dalleflamingo.reconstruct import Journey, run_journey
from dalleflamingo.runs import RunFolder, RunFolderError, hold, printable, write_whole

CHUNK = 8  # images finished together
_FOLDER, _FINISHED = "workers", "finished"


@dataclass(frozen=True)
class EveryNthChunk(Sequence[Example]):
    """Examples of the chunks `first`, `first` + n, …; read when they are asked for, as a streamed data set's are."""

    examples: Sequence[Example]
    first: int
    n: int

    @property
    def starts(self) -> range:
        """Where the chunks begin in `examples`."""
        return range(self.first * CHUNK, len(self.examples), self.n * CHUNK)

    def __len__(self) -> int:
        beyond = max(0, self.starts[-1] + CHUNK - len(self.examples)) if self.starts else 0
        return len(self.starts) * CHUNK - beyond

    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self[i] for i in range(len(self))[index])
        chunk, i = divmod(range(len(self))[index], CHUNK)
        return self.examples[self.starts[chunk] + i]

    def __iter__(self) -> Iterator[Example]:
        for start in self.starts:
            yield from self.examples[start : start + CHUNK]


@dataclass(frozen=True)
class Worker:
    """One of several processes: number 1 … count."""

    number: int = 1
    count: int = 1

    @staticmethod
    def named(text: str) -> "Worker":
        """From "2/4". Raises ValueError: it is no such pair."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ValueError(f"worker {text!r}: give its number and how many there are, such as 2/4")
        return Worker(number, count)

    def launched(self, environment: Mapping[str, str]) -> "Worker":
        """This worker among those that `accelerate launch` or `torchrun` made of it; each takes a GPU of its own."""
        if "LOCAL_RANK" in environment and find_device() == "cuda":
            torch.cuda.set_device(int(environment["LOCAL_RANK"]))
        rank, size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
        return Worker((self.number - 1) * size + rank + 1, self.count * size)

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"

    def share(self, dataset: Dataset) -> Dataset:
        """Every `count`-th chunk of the data set."""
        return replace(dataset, examples=EveryNthChunk(dataset.examples, self.number - 1, self.count))


@contextmanager
def in_turn(out: Path, worker: Worker) -> Iterator[None]:
    """One worker after another: for what all of them would write to the run folder."""
    if worker.count == 1:
        yield
        return
    (out / _FOLDER).mkdir(parents=True, exist_ok=True)
    with FileLock(out / _FOLDER / ".lock", fallback_to_soft=False):
        yield


def run_together(journey: Journey, dataset: Dataset, out: Path, worker: Worker) -> pd.DataFrame | None:
    """Make this worker's share; the last one to be ready puts the whole run together.

    Killed and started again, a worker goes on where it was. A single process takes over what several have finished.

    Args:
        journey: the same for all workers.
        dataset: likewise, the whole of it.
        out: the run folder, on a drive that all workers see.
        worker: this process.
    Returns:
        the table of the whole run, as of `reconstruct.run_journey`; None if other workers are not ready yet.
    Raises:
        RunFolderError: the folder holds a run with other settings, or shares of another number of workers; or another
            process has this worker's number.
    """
    open_run(journey, dataset, out)  # refuses another run before a share is made
    _refuse_other_counts(out, worker)
    workers = [Worker(i + 1, worker.count) for i in range(worker.count)]
    if worker.count > 1 and not _is_finished(out / _FOLDER, journey, dataset):
        _make_share(journey, dataset, out, worker)
        waiting = [one for one in workers if not _is_finished(_folder(out, one), journey, one.share(dataset))]
        if waiting:
            print(f"worker {worker} is ready; not yet: {', '.join(map(str, waiting))}")
            return None
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(out))
        except RunFolderError as error:
            if worker.count == 1:
                raise
            print(f"worker {worker} is ready; {error}")  # the process puts the shares together
            return None
        return _put_together(journey, dataset, out)


def open_run(journey: Journey, dataset: Dataset, run_folder: Path) -> RunFolder:
    """The run folder of a journey. Raises RunFolderError: it holds a run with other settings."""
    return RunFolder(run_folder, {"dataset": dataset.name} | journey.identity(), pa.schema(journey.columns))


def _make_share(journey: Journey, dataset: Dataset, out: Path, worker: Worker) -> None:
    share, folder = worker.share(dataset), _folder(out, worker)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if len(share):
            run_journey(journey, share, folder, CHUNK)
    except UnreadableImage:
        raise  # a generated one
    except DatasetError as error:  # of the whole share nothing can be read: of the whole data set perhaps something
        print(f"worker {worker}: {error}")
    _mark(folder, journey, share)


def _put_together(journey: Journey, dataset: Dataset, out: Path) -> pd.DataFrame:
    shares = sorted(path for path in (out / _FOLDER).glob("*-of-*") if path.is_dir())
    for share in shares:
        with hold(share):  # a single process takes over no share that is being made
            open_run(journey, dataset, share)  # nor one that was made with other settings
            _take_over(share, out)
    table = run_journey(journey, dataset, out, CHUNK)
    if shares:
        _mark(out / _FOLDER, journey, dataset)
    for share in shares:
        shutil.rmtree(share)
    return table


def _take_over(share: Path, out: Path) -> None:
    """Link a share's files into the whole run: settings and images before rows, as a run writes them."""
    for file in chain(share.glob("run.json"), (share / "images").glob("*.png")):
        _link(file, out / file.relative_to(share))
    for folder in [share / "parts", *(share / "scores").glob("*")]:
        target = out / folder.relative_to(share)
        target.mkdir(parents=True, exist_ok=True)
        first = max((int(path.stem) for path in target.glob("*.parquet")), default=-1) + 1
        for number, part in enumerate(sorted(folder.glob("*.parquet")), start=first):
            _link(part, target / f"{number:05d}.parquet")


def _link(file: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        os.link(file, target)
    except OSError:  # a drive without hard links
        write_whole(target, lambda part: shutil.copyfile(file, part))


def _refuse_other_counts(out: Path, worker: Worker) -> None:
    """A single process may go on with the shares of any number of workers."""
    for folder in (out / _FOLDER).glob("*-of-*"):
        count = folder.name.rpartition("-")[2]
        if worker.count > 1 and count != str(worker.count):
            raise RunFolderError(
                f"{printable(out)} holds shares of {count} workers, and this is one of {worker.count}: start {count} "
                "again, or a single process without --worker, which goes on with what they have finished"
            )


def _folder(out: Path, worker: Worker) -> Path:
    return out / _FOLDER / str(worker)


def _is_finished(folder: Path, journey: Journey, dataset: Dataset) -> bool:
    try:
        return (folder / _FINISHED).read_text(encoding="ascii") == _digest(journey, dataset)
    except FileNotFoundError:  # or taken over meanwhile
        return False


def _mark(folder: Path, journey: Journey, dataset: Dataset) -> None:
    digest = _digest(journey, dataset)
    write_whole(folder / _FINISHED, lambda part: part.write_text(digest, encoding="ascii"))


def _digest(journey: Journey, dataset: Dataset) -> str:
    """Of all that a share depends on: settings, similarities and the ids of its images."""
    similarities = [[one.name, one.fingerprint()] for one in journey.similarities]
    digest = hashlib.blake2b(json.dumps([dataset.name, journey.identity(), similarities]).encode(), digest_size=16)
    for example in dataset:
        digest.update(f"{example.image_id} ".encode())
    return digest.hexdigest()
