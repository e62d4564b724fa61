"""A process that starts runs and kills them with SIGKILL at random moments; `test_reconstruct` reads its record.

    python killed_run.py RUN_FOLDER PICTURES KILLS SEED
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import fakes
import pyarrow as pa
import pyarrow.parquet as pq


def kept(run_folder: Path) -> set[int]:
    """Image ids in whole parts, read without the code under test."""
    ids = set()
    for path in (run_folder / "parts").glob("*.parquet"):
        try:
            ids |= set(pq.read_table(path, columns=["image_id"])["image_id"].to_pylist())
        except pa.ArrowException:
            continue
    return ids


def main(run_folder: Path, pictures: Path, kills: int, seed: int) -> None:
    rng, record = random.Random(seed), []
    for attempt in range(kills + 1):
        before, log = kept(run_folder), run_folder.with_name(f"captioned-{attempt}.txt")
        log.touch()
        child = os.fork()
        if child == 0:
            fakes.run(run_folder, pictures, log=log, delay=0.004)
            os._exit(0)
        if attempt < kills:
            time.sleep(rng.uniform(0.02, 0.6))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        again = sorted(before & {int(line) for line in log.read_text().split()})
        killed = os.WIFSIGNALED(status)
        record.append({"kept": len(before), "again": again, "killed": killed, "status": status})
    print("RECORD " + json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
