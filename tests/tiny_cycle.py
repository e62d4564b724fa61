"""Runs of cycle finetuning with tiny models; by itself, runs in processes of their own, which `test_cycle` reads.

    python tiny_cycle.py MODELS FOLDER THREADS

It imports torch once, and then forks: a run in FOLDER/killed that SIGKILL ends three times; and, for each of the
settings of `MAX_TIMESTEPS`, a run in FOLDER/two-SETTING that two processes share.
"""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from forked import fork

from dalleflamingo import runs
from dalleflamingo.captioner import Captioner
from dalleflamingo.cycle import CycleConfig, build_cycle, train_cycle
from dalleflamingo.cycle_losses import Cycle, Losses
from dalleflamingo.datasets import Dataset, Example
from dalleflamingo.evaluation.cycle_reporting import tracked
from dalleflamingo.generator import Generator

TEXTS = ["a red bird on the boat", "two blue cats", "a tree and a house", "the green kite flies", "a small cat sits"]
NAMES = ("miniature/blip", "miniature/sd", "miniature/coco")  # which the tiny models stand for
SMALL = CycleConfig(*NAMES, steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2)
MAX_TIMESTEPS = (1.0, 0.3)  # of the second, some process has no image that is early enough while another has
KILLED_AT = (1, 3, 5)  # steps


def save_models(folder: Path) -> Path:
    """A captioner, a generator and six images with two captions each, in folders."""
    for name, make in (("blip", tiny.blip), ("sd", tiny.stable_diffusion)):
        (folder / name).mkdir(parents=True)
        make(folder / name)
    for i, image in enumerate(tiny.pictures(6)):
        image.save(folder / f"{i}.png")
    return folder


def dataset(folder: Path) -> Dataset:
    return Dataset("tiny", [Example(i, folder / f"{i}.png", (TEXTS[i % 5], TEXTS[(i + 2) % 5])) for i in range(6)])


def models(folder: Path) -> tuple[Captioner, Generator]:
    return Captioner.from_pretrained(str(folder / "blip")), Generator.from_pretrained(str(folder / "sd"))


def build(config: CycleConfig, folder: Path) -> tuple:
    return build_cycle(config, *models(folder), dataset(folder))


def run(config: CycleConfig, folder: Path, run_folder: Path, accelerator: Accelerator | None = None, **more) -> Cycle:
    """Train the models of `folder`; returns what came out."""
    cycle, *others = build(config, folder)
    train_cycle(config, cycle, *others, run_folder, accelerator or Accelerator(cpu=True), **more)
    return cycle


def killed(folder: Path, run_folder: Path, step: int) -> bool:
    """A run that SIGKILL ends when it has logged a step; False where it ended before."""
    log, append_row = run_folder / "log.jsonl", runs.append_row

    def append_and_wait(path: Path, row: dict) -> None:
        append_row(path, row)
        if row["step"] == step:
            time.sleep(600)

    def work() -> None:
        runs.append_row = append_and_wait  # in the child alone
        run(SMALL, folder, run_folder)

    child = fork(work)
    while not (log.exists() and f'"step": {step}' in log.read_text()):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def shared(folder: Path, run_folder: Path, max_timestep: float) -> list[int]:
    """A run by two processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    config = dataclasses.replace(SMALL, losses=Losses(max_timestep=max_timestep))

    def work(rank: str) -> None:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        run(config, folder, run_folder, tracked("none", run_folder, config))

    children = [fork(lambda rank=rank: work(rank)) for rank in "01"]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: Path, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)  # the same bits want the same threads
    record = {"killed": [killed(folder, out / "killed", step) for step in KILLED_AT]}
    for max_timestep in MAX_TIMESTEPS:
        record[f"two-{max_timestep}"] = shared(folder, out / f"two-{max_timestep}", max_timestep)
    print("RECORD " + json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
