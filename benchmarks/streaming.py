"""Peak memory of reading a million captions against ten thousand: a data set's examples stay in their file.

    python benchmarks/streaming.py

Each number is of a process of its own that opens the file, goes through all examples once and asks for some again, as a
run does. Prints a table in Markdown: MiB at the peak, the ratio, and what a caption or image takes beyond the smaller
file. `import torch` and the rest of the package are in every number. No model is loaded: what a run keeps of its
candidates is not measured here.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dalleflamingo.sources.own_files import read_captions, read_pairs

WORDS = "red blue green small large kite boat dog house tree left right of above a the near flying old river".split()
FEW = 10_000


def captions(n: int) -> Iterable[str]:
    """n captions, of which no two are equal."""
    dice = random.Random(0)
    return (f"{' '.join(dice.choices(WORDS, k=10))} {i}" for i in range(n))


def write_text(path: Path, n: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{caption}\n" for caption in captions(n))


def write_json_lines(path: Path, n: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"caption": caption}) + "\n" for caption in captions(n))


def write_table(path: Path, n: int) -> None:
    """A row for each caption, five rows an image."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([f"{i // 5:07d}.jpg", caption] for i, caption in enumerate(captions(n)))


KINDS: dict[str, tuple[str, Callable[[Path, int], None], Callable]] = {
    "captions, a line each": ("txt", write_text, read_captions),
    "captions in JSON Lines": ("jsonl", write_json_lines, read_captions),
    "captions in a table": ("csv", write_table, read_captions),
    "images in a table, 5 captions each": ("csv", write_table, read_pairs),
}


def peak() -> float:
    """MiB that this process had at most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def read(kind: str, path: Path) -> None:
    """Go through the file's examples; prints how many they are, how many captions, and the peak."""
    dataset = KINDS[kind][2](path)
    ids, found = array("q"), 0
    for example in dataset:
        ids.append(example.image_id)
        found += len(example.references)
    for start in range(0, len(dataset), len(dataset) // 100):
        assert [one.image_id for one in dataset[start : start + 8]] == ids[start : start + 8].tolist()
    used = peak()
    assert len(np.unique(np.frombuffer(ids, np.int64))) == len(dataset)
    print(len(dataset), found, used)


def measure(kind: str, n: int) -> tuple[int, float]:
    """Examples, and the peak in MiB of reading n captions in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"many.{KINDS[kind][0]}"
        KINDS[kind][1](path, n)
        command = [sys.executable, __file__, "--read", kind, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    examples, found, used = done.stdout.split()
    assert int(found) == n
    return int(examples), float(used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=1_000_000, help="of the larger file; default: %(default)s")
    parser.add_argument("--read", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read[0], Path(options.read[1]))
        return
    print(f"| file | examples | {FEW:,} captions | {options.captions:,} captions | ratio | bytes more an example |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in KINDS:
        (fewer, low), (examples, high) = measure(kind, FEW), measure(kind, options.captions)
        more = (high - low) * 2**20 / (examples - fewer)
        print(f"| {kind} | {examples:,} | {low:.0f} MiB | {high:.0f} MiB | {high / low:.2f} | {more:.0f} |", flush=True)


if __name__ == "__main__":
    main()
