"""Damaged files of every kind that a user gives: an answer in words, no traceback, no hang, and nothing lost.

Each kind of file is damaged in a hundred ways by seeds. A file that is still read is no failure.
"""

import contextlib
import faulthandler
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import fakes
import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image
from test_command_line import models  # noqa: F401, a fixture
from test_shards import tar

from dalleflamingo import __main__ as command_line
from dalleflamingo.captioner import Captioner
from dalleflamingo.datasets import DatasetError, UnreadableImage
from dalleflamingo.registry import RegistryError
from dalleflamingo.sources import models as profile_models
from dalleflamingo.sources.annotations import read_coco
from dalleflamingo.sources.own_files import read_pairs
from dalleflamingo.sources.shards import read_shards

SEEDS = range(100)  # of each kind
LIMIT = 60  # seconds for one file
STATUSES = (0, 2)  # done, or refused in one line; 1 would be a fault of the program


def damaged(content: bytes, seed: int) -> bytes:
    """The content cut, or with a stretch flipped, zeroed, doubled, left out, or replaced by digits or by noise."""
    rng = np.random.default_rng(seed)
    start = int(rng.integers(len(content)))
    stretch = content[start : start + int(rng.integers(1, 1 + min(64, len(content))))]
    instead = (
        bytes(byte ^ 1 << int(rng.integers(8)) for byte in stretch),
        bytes(len(stretch)),
        stretch * 2,
        b"",
        b"9" * len(stretch),
        rng.bytes(len(stretch)),
    )
    way = int(rng.integers(1 + len(instead)))
    return content[:start] if way == len(instead) else content[:start] + instead[way] + content[start + len(stretch) :]


class Hang(BaseException):
    """Not an Exception, which readers of damaged files catch."""


@contextlib.contextmanager
def no_hang():
    def stop(*_):
        raise Hang(f"it took more than {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.alarm(LIMIT)
        # a hang in C is not interrupted by a signal
        faulthandler.dump_traceback_later(2 * LIMIT, exit=True, file=sys.__stderr__)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(*arguments: object, capsys: pytest.CaptureFixture) -> int:
    """The exit status of a command, which says in words what is wrong."""
    return answer_and_output(*arguments, capsys=capsys)[0]


def answer_and_output(*arguments: object, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """The exit status and what the command printed."""
    with no_hang():
        try:
            status = command_line.main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code
    printed, error = capsys.readouterr()
    assert status in STATUSES, error
    assert "Traceback" not in error and (status == 0 or error.strip())
    return status, printed


def test_the_damage_differs_and_is_damage():
    content = bytes(range(256)) * 4
    found = [damaged(content, seed) for seed in SEEDS]
    assert len(set(found)) > 95 and sum(one != content for one in found) > 95


CAPTIONS: dict[str, Callable[[list[str]], str]] = {
    ".txt": "\n".join,
    ".json": json.dumps,
    ".jsonl": lambda captions: "\n".join(json.dumps({"caption": caption}) for caption in captions),
    ".csv": lambda captions: "id,caption\n" + "\n".join(f'{i},"{caption}"' for i, caption in enumerate(captions)),
}


@pytest.mark.usefixtures("models")
def test_captions(tmp_path, capsys):
    captions = ["a red cat on the grass", "a blue boat, left of a kite", "two dogs"]
    statuses = []
    for seed in SEEDS:
        suffix = list(CAPTIONS)[seed % len(CAPTIONS)]
        file = tmp_path / f"{seed}{suffix}"
        file.write_bytes(damaged(CAPTIONS[suffix](captions).encode(), seed))
        statuses.append(answer("reconstruct", file, "--out", tmp_path / "runs" / str(seed), capsys=capsys))
    assert set(statuses) == set(STATUSES)  # some are read, some are not


def test_annotations(tmp_path):
    whole = {
        "images": [{"id": i, "file_name": f"{i}.png", "domain": "in-domain"} for i in range(3)],
        "annotations": [{"id": i, "image_id": i % 3, "caption": "a red cat"} for i in range(5)],
    }
    refused = 0
    for seed in SEEDS:
        file = tmp_path / f"{seed}.json"
        file.write_bytes(damaged(json.dumps(whole).encode(), seed))
        with no_hang():
            try:
                read_coco(file, tmp_path)
            except ValueError as error:  # `DatasetError`, which names the file
                assert file.name in str(error)
                refused += 1
    assert 30 < refused < 100


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tar", "tar.gz"])
def test_images_with_captions(tmp_path, kind):
    """Read, or refused by name; an image that is damaged is found when it is opened."""
    images = sorted(example.path for example in fakes.dataset(tmp_path / "mine", 3))
    names = [path.name for path in images]
    if kind.startswith("tar"):
        members = [(path.name, path.read_bytes()) for path in images] + [("z.png", images[0].read_bytes())]
        members.append(("z.json", json.dumps({"captions": ["a red cat", "a boat"], "image_id": 7})))
        whole = tar(tmp_path / "whole", members, "w:gz" if kind == "tar.gz" else "w").read_bytes()
        if kind == "tar":
            whole = whole.rstrip(b"\0") + bytes(2048)  # fewer of the zeros, where damage is none
    elif kind == "csv":
        whole = ("image,captions\n" + "".join(f'{name},"a cat, asleep"\n' for name in names)).encode()
    else:
        whole = "".join(json.dumps({"image": name, "captions": ["a", "b"]}) + "\n" for name in names).encode()
    refused = 0
    for seed in SEEDS:
        file = tmp_path / "mine" / f"{seed}.{kind}"
        file.write_bytes(damaged(whole, seed))
        with no_hang():
            try:
                dataset = read_shards(file, tmp_path / str(seed)) if kind.startswith("tar") else read_pairs(file)
                assert len({example.image_id for example in dataset}) == len(dataset) > 0
                for example in dataset:
                    with contextlib.suppress(UnreadableImage):
                        dataset.open(example)
            except DatasetError as error:
                assert file.stem in str(error) and str(error).isprintable(), error
                refused += 1
    assert 5 < refused <= 100


@pytest.mark.usefixtures("models")
def test_images(tmp_path, capsys):
    """The others of the folder are described all the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 3), np.uint8)
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM")
    for kind in kinds:
        folder = tmp_path / kind
        fakes.dataset(folder, 1)
        Image.fromarray(pixels).save(tmp_path / "whole", format=kind)
        content = (tmp_path / "whole").read_bytes()
        for seed in SEEDS[: 1 + len(SEEDS) // len(kinds)]:
            (folder / f"odd-{seed}.png").write_bytes(damaged(content, seed))
        status, printed = answer_and_output("reconstruct", folder, "--out", tmp_path / f"run-{kind}", capsys=capsys)
        assert status == 0
        table = pd.read_parquet(tmp_path / f"run-{kind}/candidates.parquet")
        skipped = json.loads((tmp_path / f"run-{kind}/skipped.json").read_text())
        assert {"0.png"} <= set(table.file) and all(one["reason"] for one in skipped)
        told = {*table.file, *(Path(one["path"]).name for one in skipped)}
        silent = {path.name for path in folder.iterdir()} - told
        assert all(name in printed for name in silent)  # left out, which is said before the run begins


def test_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    tiny.blip(tmp_path / "whole")
    files = sorted(path for path in (tmp_path / "whole").iterdir() if path.suffix in (".safetensors", ".json"))
    folder, refused = tmp_path / "model", 0
    folder.mkdir()
    whole = {path.name: path.read_bytes() for path in files}
    for path in (tmp_path / "whole").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for seed in SEEDS:
        name = "model.safetensors" if seed % 2 else files[seed // 2 % len(files)].name
        content = whole[name]
        # the header of a safetensors file is what can be read wrongly; other numbers are other weights
        head = content[:2000] if name == "model.safetensors" else content
        (folder / name).write_bytes(damaged(head, seed) + content[len(head) :])
        with no_hang():
            try:
                Captioner.from_pretrained(str(folder))
            except (RegistryError, ValueError) as error:
                assert str(folder) in str(error), error
                assert "copy or download it again" in str(error) or "holds a model of type" in str(error), error
                refused += 1
        (folder / name).write_bytes(content)
    assert refused > 30
    Captioner.from_pretrained(str(folder))


@pytest.mark.usefixtures("models")
def test_run_folders(tmp_path, capsys):
    """What a damaged part held is made again, what other parts hold is not, and the table is the same in the end."""
    source, run = tmp_path / "mine", tmp_path / "run"
    fakes.dataset(source, 20)
    command = ("reconstruct", source, "--out", run)
    assert answer(*command, capsys=capsys) == 0
    expected = pd.read_parquet(run / "candidates.parquet")
    files = sorted(path for path in run.rglob("*") if path.suffix in (".parquet", ".json"))
    whole = {path: path.read_bytes() for path in files}
    assert {path.name for path in files} >= {"run.json", "skipped.json", "candidates.parquet", "00000.parquet"}
    for seed in SEEDS:
        path = files[seed % len(files)]
        path.write_bytes(damaged(whole[path], seed))
        if answer(*command, capsys=capsys) == 2:
            assert path.name == "run.json"  # settings that cannot be read could be any
            path.write_bytes(whole[path])
            assert answer(*command, capsys=capsys) == 0
        pd.testing.assert_frame_equal(pd.read_parquet(run / "candidates.parquet"), expected)
        for file, content in whole.items():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)


def test_configurations(tmp_path, capsys, monkeypatch):
    """One that cannot be read trains nothing and leaves no folder."""
    monkeypatch.setenv("DALLEFLAMINGO_PROFILE", "smoke")
    began = []

    def train(*_, **__):
        began.append(True)
        raise RegistryError("far enough")

    monkeypatch.setattr(profile_models, "load_cycle", train)
    whole = {"steps": 3, "learning_rate": 1e-4, "losses": {"caption": 1.0}, "schedule": "joint", "seed": 7}
    for seed in SEEDS:
        file = tmp_path / f"{seed}.json"
        file.write_bytes(damaged(json.dumps(whole).encode(), seed))
        began.clear()
        run = tmp_path / "runs" / str(seed)
        assert answer("cycle", "--run", run, "--config", file, "--tracker", "none", capsys=capsys) == 2
        assert began or not run.exists()
