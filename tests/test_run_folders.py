"""Run folders under bad conditions: two processes, SIGKILL, a full disk, damaged files, folders that cannot be used."""

import errno
import fcntl
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import fakes
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from fakes import image_text_image
from forked import fork
from safetensors.torch import load_file, save_file
from test_miniature_train import LineRecipe
from test_runs import SCHEMA, recipe, row, train

from dalleflamingo import datasets, runs
from dalleflamingo.evaluation.cycle_reporting import read_log
from dalleflamingo.miniature.training import train as training
from dalleflamingo.runs import RunFolder, RunFolderError, append_row, hold


def wait_for(path: Path) -> None:
    deadline = time.time() + 60
    while not path.exists():
        assert time.time() < deadline
        time.sleep(0.005)


def models():
    return fakes.Captioner(), fakes.Generator(), [fakes.MeanColour(), fakes.Corner()]


# ── one process at a time ────────────────────────────────────────────────────────────────────────────────────────────


def test_of_two_processes_one_is_refused_and_the_other_loses_nothing(tmp_path):
    expected = fakes.run(tmp_path / "alone", tmp_path / "pictures")
    answers = [tmp_path / "0.txt", tmp_path / "1.txt"]

    def work(answer, other):
        try:  # the one that is at work waits until the other has its answer
            table = fakes.run(tmp_path / "run", tmp_path / "pictures", on_draw=lambda: wait_for(other))
            answer.write_text(f"{len(table)} rows")
        except RunFolderError as error:
            answer.write_text(str(error))

    first = fork(lambda: work(*answers))
    wait_for(tmp_path / "run/.lock")
    second = fork(lambda: work(*reversed(answers)))
    for child in (first, second):
        os.waitpid(child, 0)
    refused, done = sorted((answer.read_text() for answer in answers), key=lambda answer: answer.endswith("rows"))
    assert done == "30 rows"
    assert refused == f"another process is at work in {tmp_path / 'run'}: wait for it, or give another folder"
    assert pd.read_parquet(tmp_path / "run/candidates.parquet").equals(expected)


@pytest.mark.parametrize("other_name", [False, True])
def test_sigkill_leaves_no_lock_behind(tmp_path, other_name):
    run, same = tmp_path / "run", tmp_path / "link" if other_name else tmp_path / "run"

    def work():
        with hold(run):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = fork(work)
    wait_for(tmp_path / "held")
    if other_name:
        same.symlink_to(run)
    for _ in range(2):  # a refusal does not weaken the lock
        with pytest.raises(RunFolderError, match="another process is at work"):
            image_text_image(fakes.dataset(tmp_path / "pictures"), *models(), same)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(image_text_image(fakes.dataset(tmp_path / "pictures"), *models(), same)) == 30


def test_a_thread_may_hold_a_folder_twice_and_another_may_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = []

    def other():
        try:
            with hold(tmp_path / "run"):
                answers.append("held")
        except RunFolderError as error:
            answers.append(str(error))

    def ask() -> str:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return answers.pop()

    with hold(tmp_path / "run"):
        with hold(Path("run")):
            assert "another process is at work" in ask()
        assert "another process is at work" in ask()  # the inner one has not given it back
    assert ask() == "held"
    with pytest.raises(KeyboardInterrupt), hold(tmp_path / "run"):
        raise KeyboardInterrupt
    assert ask() == "held"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], ids=errno.errorcode.get)
def test_a_drive_without_locks_is_used_with_a_word_of_warning(tmp_path, monkeypatch, capsys, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        assert len(fakes.run(tmp_path / "run", tmp_path / "pictures")) == 30
        out = capsys.readouterr().out
        assert f"{tmp_path / 'run'} is on a drive without file locks: let no second process work there" in out


def test_an_error_inside_is_not_taken_for_one_of_the_folder(tmp_path):
    with pytest.raises(OSError, match="of the network") as caught, hold(tmp_path):
        raise OSError(errno.ENOLCK, "of the network")
    assert not isinstance(caught.value, RunFolderError)


def test_training_a_model_in_a_folder_that_is_at_work_is_refused(tmp_path):
    def work():
        with hold(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = fork(work)
    wait_for(tmp_path / "held")
    with pytest.raises(RunFolderError, match="another process is at work"):
        training.train(LineRecipe(), tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert training.train(LineRecipe(), tmp_path) > 0


# ── folders that cannot be used ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("file", "it is a file"),
        ("file/run", "Not a directory"),
        ("n" * 300, "File name too long"),
        ("full/run", "No space left on device"),
        ("read-only", "Read-only file system"),
        ("link", "File exists"),
    ],
)
def test_a_folder_that_cannot_hold_a_run_is_named(tmp_path, monkeypatch, place, problem):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    make, number = Path.mkdir, errno.ENOSPC if "full" in place else errno.EROFS

    def mkdir(path, *arguments, **options):
        if {"full", "read-only"} & set(path.parts):
            raise OSError(number, os.strerror(number), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(RunFolderError, match=rf"{place} cannot hold a run \({problem}\): give a folder to write to"):
        fakes.run(tmp_path / place, tmp_path / "pictures")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o500)
    with pytest.raises(RunFolderError, match="Permission denied"):
        fakes.run(tmp_path / "run", tmp_path / "pictures")


def test_a_kept_image_that_is_damaged_is_named_with_a_remedy_that_helps(tmp_path):
    expected = fakes.run(tmp_path / "run", tmp_path / "pictures")
    image = tmp_path / "run" / expected.image[4]
    image.write_bytes(image.read_bytes()[:60])
    captioner, generator, _ = models()
    other = [fakes.MeanColour(), fakes.Corner()]
    other[1].name = "another"
    arguments = fakes.dataset(tmp_path / "pictures"), captioner, generator, other, tmp_path / "run"
    with pytest.raises(datasets.UnreadableImage, match=f"{image}: .*; delete it, and the same call makes it again"):
        image_text_image(*arguments)
    image.unlink()
    table = image_text_image(*arguments)
    assert table.drop(columns="another").equals(expected.drop(columns="corner"))
    assert table.another.tolist() == expected.corner.tolist() and sum(map(len, captioner.batches)) == 1


# ── a run has begun when something of it is kept ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fails", ["sample", "render"])
def test_settings_that_a_model_refuses_leave_the_folder_to_others(tmp_path, fails):
    captioner, generator, similarities = models()

    def refuses(*arguments):
        raise ValueError("not so")

    setattr(captioner if fails == "sample" else generator, fails, refuses)
    pictures = fakes.dataset(tmp_path / "pictures")
    with pytest.raises(ValueError, match="not so"):
        image_text_image(pictures, captioner, generator, similarities, tmp_path / "run", seed=1)
    assert not (tmp_path / "run/run.json").exists()
    assert len(image_text_image(pictures, *models(), tmp_path / "run", seed=2)) == 30
    with pytest.raises(RunFolderError, match="seed: 2 there, 1 now"):
        image_text_image(pictures, *models(), tmp_path / "run", seed=1)


def test_a_training_that_fails_at_once_may_begin_again_with_another_seed(tmp_path):
    bad = LineRecipe()
    bad.loss = lambda batch, step: {"loss": torch.tensor(float("nan"))}
    with pytest.raises(FloatingPointError):
        training.train(bad, tmp_path, seed=1)
    assert training.train(LineRecipe(), tmp_path, seed=2) > 0
    assert json.loads((tmp_path / "training.json").read_text())["seed"] == 2


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────

FULL = Path("/dev/full")  # every write to it fails as on a full disk


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize(
    "file",
    ["run.json", "parts/00001.parquet", "image", "candidates.parquet", "skipped.json"],
)
def test_a_full_disk_costs_nothing_that_was_finished(tmp_path, file):
    expected = fakes.run(tmp_path / "alone", tmp_path / "pictures")
    part = tmp_path / "run" / f"{expected.image[0] if file == 'image' else file}.part"
    part.parent.mkdir(parents=True)
    part.symlink_to(FULL)
    with pytest.raises(OSError, match="No space left on device"):
        fakes.run(tmp_path / "run", tmp_path / "pictures")
    part.unlink(missing_ok=True)
    kept = len(list((tmp_path / "run/parts").glob("*.parquet")))
    captioner, generator, similarities = models()
    table = image_text_image(fakes.dataset(tmp_path / "pictures"), captioner, generator, similarities, tmp_path / "run")
    assert table.equals(expected) and sum(map(len, captioner.batches)) == max(0, 10 - 3 * kept)


def test_a_checkpoint_that_finds_no_room_leaves_the_older_one(tmp_path):
    train(recipe(0.5), tmp_path, 0, 2)
    before = (tmp_path / "state.safetensors").read_bytes()

    def work():
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        try:
            train(recipe(0.5), tmp_path, 2, 4)
        except Exception as error:
            (tmp_path / "answer.txt").write_text(str(error))

    os.waitpid(fork(work), 0)
    assert "File too large" in (tmp_path / "answer.txt").read_text()
    assert (tmp_path / "state.safetensors").read_bytes() == before
    train(recipe(0.5), tmp_path, 2, 4)


# ── damaged files ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_that_is_cut_anywhere_is_named_and_left_as_it_is(tmp_path):
    checkpoint = train(recipe(0.5), tmp_path, 0, 2)
    whole = checkpoint.file.read_bytes()
    for size in range(len(whole)):
        checkpoint.file.write_bytes(whole[:size])
        with pytest.raises(
            RunFolderError, match=rf"state.safetensors \({size:,} bytes\) is damaged.* put a whole copy"
        ):
            checkpoint.load()
        assert checkpoint.file.stat().st_size == size
    checkpoint.file.write_bytes(whole)
    assert checkpoint.load() == (2, 2.0)


@pytest.mark.parametrize("change", ["metadata", "tensor", "shape", "average", "folder"])
def test_a_checkpoint_of_something_else_is_named(tmp_path, change):
    checkpoint = train(recipe(0.5), tmp_path, 0, 2)
    tensors, done = load_file(checkpoint.file), {"step": "2", "minutes": "2.0", "followed": "2"}
    if change == "metadata":
        done = None
    elif change == "shape":
        tensors["net.0.weight"] = torch.zeros(2, 2)
    elif change in ("tensor", "average"):
        del tensors["net.0.weight" if change == "tensor" else "average.0"]
    save_file(tensors, checkpoint.file, done)
    if change == "folder":
        checkpoint.file.unlink()
        checkpoint.file.mkdir()
    with pytest.raises(RunFolderError, match=r"is damaged, cut short or of another model \(.+\)"):
        checkpoint.load()


def rows_of(count: int) -> list[dict]:
    return [{"step": step, "loss": step / 8} for step in range(count)]


def test_a_log_that_is_cut_anywhere_keeps_its_whole_lines_and_is_continued(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    for one in rows_of(4):
        append_row(file, one)
    whole = file.read_bytes()
    for size in range(len(whole) + 1):
        for tail in (b"", b"\0", b"\0" * 700):
            file.write_bytes(whole[:size] + tail)
            lines = whole[:size].count(b"\n") + (whole[size : size + 1] == b"\n" and not tail)
            assert read_log(tmp_path) == rows_of(lines)
            append_row(file, {"step": 9})
            assert read_log(tmp_path) == [*rows_of(lines), {"step": 9}], (size, tail)
    assert f"{file}: line 4 is damaged, and left out" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b"[1]", b"7", b'{"loss": 1}', b'{"step": "x"}', b"\xff\xfe", b'{"step": Infinity}'])
def test_a_line_that_is_no_row_is_left_out(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 1}\n')
    assert read_log(tmp_path) == [{"step": 0}, {"step": 1}]


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"log.jsonl is missing: train first"):
        read_log(tmp_path)


def test_a_training_goes_on_behind_a_damaged_log(tmp_path):
    for name in ("whole", "cut"):
        half = LineRecipe()
        half.steps = 30
        training.train(half, tmp_path / name, checkpoint_every=10)
    log = tmp_path / "cut/log.jsonl"
    log.write_bytes(log.read_bytes()[:-9] + b"\0" * 9)
    assert training.steps_done(tmp_path / "cut") == 30  # of the checkpoint, whatever the log says
    for name in ("whole", "cut"):
        training.train(LineRecipe(), tmp_path / name, checkpoint_every=10)
    steps = [[line["step"] for line in read_log(tmp_path / name)] for name in ("whole", "cut")]
    assert steps == [[10, 20, 30, 40, 50, 60], [10, 20, 40, 50, 60]]
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"settings": 3}', b'{"settings": {', b"\0\0", b"\xff"])
def test_damaged_settings_are_named(tmp_path, content):
    run = RunFolder(tmp_path, {"seed": 0}, SCHEMA)
    run.add([row(run, 3, 0)])
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"run.json is not the settings of a run .* give another run_folder"):
        RunFolder(tmp_path, {"seed": 0}, SCHEMA)
    (tmp_path / "training.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"training.json is not the settings of a run"):
        training.train(LineRecipe(), tmp_path)


@pytest.mark.parametrize("damage", ["cut", "nul", "other", "type", "empty"])
def test_a_damaged_part_is_made_again(tmp_path, capsys, damage):
    expected = fakes.run(tmp_path / "run", tmp_path / "pictures")
    part = tmp_path / "run/parts/00001.parquet"
    whole = part.read_bytes()
    if damage in ("other", "type"):
        other = pd.read_parquet(part)
        other = other.drop(columns="seed") if damage == "other" else other.assign(seed="one")
        other.to_parquet(part)
    else:
        part.write_bytes({"cut": whole[:-9], "nul": whole[:90] + b"\0" * (len(whole) - 90), "empty": b""}[damage])
    assert fakes.run(tmp_path / "run", tmp_path / "pictures").equals(expected)
    assert f"{part} is damaged" in capsys.readouterr().out


def test_no_changed_bit_gives_another_row(tmp_path):
    """Of rows and of scores: what a damaged part still gives was in it; the rest is computed again."""
    fakes.run(tmp_path / "run", tmp_path / "pictures")
    parts = [tmp_path / "run/parts/00001.parquet", *(tmp_path / "run/scores").rglob("00001.parquet")]
    assert len(parts) == 3
    for part in parts:
        whole, expected = part.read_bytes(), pq.read_table(part)
        refused = 0
        for position in range(0, len(whole), 5):
            changed = whole[position] ^ 1 << position % 8
            part.write_bytes(whole[:position] + bytes([changed]) + whole[position + 1 :])
            found = runs._read(part, expected.schema)
            refused += found is None
            assert found is None or found.equals(expected.slice(0, len(found))), position
        assert refused > len(whole) / 5 / 4
