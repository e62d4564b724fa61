"""How many threads the miniature's models should compute with, on a calm machine and beside other work.

    python benchmarks/threads.py --repeats 3

Small operations wait for each other at a barrier after every step, so a second thread gains little where nothing else
runs, and loses much where its core is taken away. Prints a table in Markdown: seconds of each work with one and with
two threads, calm and beside two processes that only count, median and range of the repeats. The settings alternate
within each repeat, so whatever else the machine does meets all of them alike: compare the columns of one table, not two
tables. The results themselves are the same captions and images in every cell, up to the last digits of floats.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product

import torch
from tqdm.auto import tqdm

from dalleflamingo import decoding, profiles, registry
from dalleflamingo.captioner import Captioner
from dalleflamingo.generator import Generator
from dalleflamingo.research.baselines import log_likelihood
from dalleflamingo.sources import registered

THREADS, LOADS = (1, 2), ("calm", "busy")
Work = Callable[[], object]


def works() -> dict[str, Work]:
    """Name -> a call that does it, for everything that takes a while in the course."""
    profile = profiles.PROFILES["mini"]
    dataset = registered.load_dataset(profile.dataset).subset(16)
    images = [dataset.open(example) for example in dataset]
    captioner = Captioner.from_pretrained(registry.locate(profile.captioner))
    generator = Generator.from_pretrained(registry.locate(profile.generator))
    seeds = [range(10 * i, 10 * i + 10) for i in range(len(images))]
    captions = captioner.describe(images) * 4
    return {
        "160 captions, sampled": lambda: captioner.sample(images, seeds),
        "16 captions, beam search": lambda: captioner.describe(images),
        "64 log-likelihoods": lambda: log_likelihood(captioner, images * 4, captions),
        "64 images, 20 steps": lambda: generator.render(captions, range(64), 20, profile.guidance_scale, 32),
    }


@contextmanager
def other_work(processes: int) -> Iterator[None]:
    """So many processes beside this one, each of which keeps a core busy."""
    with ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        time.sleep(0.5 * bool(processes))  # until they run
        yield


def seconds(work: Work, threads: int) -> float:
    """Seconds of the work with so many threads."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(repeats: int) -> dict[tuple[str, str, int], list[float]]:
    """(work, load, threads) -> seconds of each repeat."""
    decoding.SMALL_MODEL = 0  # so that decoding takes the number of threads that it is given
    todo = works()
    found = {(name, *setting): [] for name in todo for setting in product(LOADS, THREADS)}
    for work in todo.values():
        seconds(work, threads=1)  # the first call of each also sets things up
    for _, load in tqdm(list(product(range(repeats), LOADS))):
        with other_work(2 if load == "busy" else 0):
            for (name, work), threads in product(todo.items(), THREADS):
                found[name, load, threads].append(seconds(work, threads))
                tqdm.write(f"{name}, {load}, {threads}: {found[name, load, threads][-1]:.2f} s", file=sys.stderr)
    return found


def table(found: dict[tuple[str, str, int], list[float]]) -> str:
    """A row for each work, a column for each setting: median seconds, and the fastest and slowest repeat."""
    settings = list(product(LOADS, THREADS))
    head = ["work", *(f"{load}, {threads} thread{'s' * (threads > 1)}" for load, threads in settings)]
    rows = [head, ["---"] * len(head)]
    for name in dict.fromkeys(name for name, *_ in found):
        times = [found[name, load, threads] for load, threads in settings]
        rows.append([name, *(f"{statistics.median(t):.2f} s ({min(t):.2f} … {max(t):.2f})" for t in times)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="times that each setting is measured (default: 3)")
    repeats = parser.parse_args().repeats
    load = os.getloadavg()[0]
    print(table(measure(repeats)))
    print(f"\nMedian (fastest … slowest) of {repeats}, on {os.cpu_count()} cores; load {load:.1f} before the first.")


if __name__ == "__main__":
    main()
