"""Several processes at one run: their shares, and the folder that they leave against that of a single process."""

import subprocess
import sys
from pathlib import Path

import fakes
import pytest
from worker_run import journey

from dalleflamingo import reconstruct
from dalleflamingo.datasets import DatasetError
from dalleflamingo.evaluation import workers
from dalleflamingo.evaluation.workers import CHUNK, Worker, run_together
from dalleflamingo.runs import RunFolderError, hold
from dalleflamingo.sources.own_files import read_captions

N = 51
SCRIPT = Path(__file__).with_name("worker_run.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """51 images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    fakes.dataset(folder, N)
    (folder / "20.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """The run folder of a single process that knows of no others."""
    folder, usual = tmp_path_factory.mktemp("alone"), journey()
    reconstruct.image_text_image(
        fakes.dataset(images, N), usual.captioner, usual.generator, usual.similarities, folder, fakes.SETTINGS
    )
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """The table, what was skipped and all images."""
    paths = [folder / "candidates.parquet", folder / "skipped.json", *sorted((folder / "images").iterdir())]
    return {path.name: path.read_bytes() for path in paths}


def start(out: Path, images: Path, worker: str, death: int = 0) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, out, images, str(N), worker, str(death)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize("n", [1, CHUNK, CHUNK + 1, N])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_whole_chunks_and_together_everything(n, count, tmp_path):
    data = fakes.dataset(tmp_path / "mine", n)
    chunks = [list(data[start : start + CHUNK]) for start in range(0, n, CHUNK)]
    for number in range(1, count + 1):
        share = Worker(number, count).share(data)
        expected = [example for chunk in chunks[number - 1 :: count] for example in chunk]
        assert (list(share), len(share)) == (expected, len(expected))
        assert [share[i] for i in range(len(share))] == expected == list(share[:])


def test_the_share_of_a_streamed_file_is_streamed(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("".join(f"thing number {i}\n" for i in range(30)))
    share = Worker(2, 3).share(read_captions(file))
    assert [one.references[0] for one in share] == [f"thing number {i}" for i in range(8, 16)]
    assert not isinstance(share.examples, tuple)


def test_two_processes_leave_what_one_leaves(alone, images, tmp_path):
    both = [start(tmp_path, images, worker) for worker in ("1/2", "2/2")]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert files(tmp_path) == files(alone)
    assert not list((tmp_path / "workers").glob("*-of-*"))


def test_a_killed_worker_goes_on_and_the_table_is_the_same(alone, images, tmp_path):
    killed = start(tmp_path, images, "2/2", death=40)
    killed.communicate()
    assert killed.returncode == -9
    said = start(tmp_path, images, "1/2").communicate()[0]
    assert "worker 1-of-2 is ready; not yet: 2-of-2" in said and not (tmp_path / "candidates.parquet").exists()
    said = start(tmp_path, images, "2/2").communicate()[0]
    assert "8 were there already" in said  # its first chunk: 8 images with 3 candidates
    assert files(tmp_path) == files(alone)


def test_the_same_command_finds_everything_made(images, tmp_path):
    data, generator = fakes.dataset(images, N), fakes.Generator()
    for worker in (Worker(1, 2), Worker(2, 2), Worker(1, 2), Worker(2, 2), Worker()):
        run_together(journey(generator=generator), data, tmp_path, worker)
    assert sum(len(call["captions"]) for call in generator.calls) == 3 * (N - 1)


def test_a_single_process_takes_over_what_several_have_finished(alone, images, tmp_path):
    data, generator = fakes.dataset(images, N), fakes.Generator()
    assert run_together(journey(generator=generator), data, tmp_path, Worker(2, 3)) is None
    with pytest.raises(RunFolderError, match="holds shares of 3 workers, and this is one of 2: start 3 again"):
        run_together(journey(), data, tmp_path, Worker(1, 2))
    assert len(run_together(journey(generator=generator), data, tmp_path, Worker())) == 3 * (N - 1)
    assert sum(len(call["captions"]) for call in generator.calls) == 3 * (N - 1)
    assert files(tmp_path) == files(alone)


def test_a_share_that_cannot_be_read_at_all_is_skipped(tmp_path):
    data = fakes.dataset(tmp_path / "mine", 3 * CHUNK)
    for example in data[CHUNK : 2 * CHUNK]:
        example.path.write_bytes(b"no image")
    tables = [run_together(journey(), data, tmp_path / "run", Worker(i, 4)) for i in (1, 2, 3, 4)]
    assert tables[:3] == [None] * 3 and len(tables[3]) == 3 * 2 * CHUNK
    for example in data:
        example.path.write_bytes(b"no image")
    run_together(journey(), data, tmp_path / "nothing", Worker(1, 2))
    with pytest.raises(DatasetError, match="not one of 24 images"):
        run_together(journey(), data, tmp_path / "nothing", Worker(2, 2))


def test_a_run_with_other_settings_is_refused_before_anything_is_made(images, tmp_path):
    data, generator = fakes.dataset(images, 4), fakes.Generator()
    run_together(journey(), data, tmp_path, Worker())
    other = journey(captioner=fakes.Captioner(temper="odd"), generator=generator)
    with pytest.raises(RunFolderError, match="other settings"):
        run_together(other, data, tmp_path, Worker(1, 2))
    assert generator.calls == []


def test_a_single_process_takes_over_no_share_with_other_settings(images, tmp_path):
    data = fakes.dataset(images, 20)
    run_together(journey(), data, tmp_path, Worker(1, 2))
    with pytest.raises(RunFolderError, match="other settings"):
        run_together(journey(captioner=fakes.Captioner(temper="odd")), data, tmp_path, Worker())


def test_while_another_process_is_at_work_there_a_worker_ends_in_peace(images, tmp_path, capsys, monkeypatch):
    data = fakes.dataset(images, 20)
    run_together(journey(), data, tmp_path, Worker(1, 2))

    def held_elsewhere(folder):
        if folder == tmp_path:
            raise RunFolderError("another process is at work")
        return hold(folder)

    monkeypatch.setattr(workers, "hold", held_elsewhere)
    assert run_together(journey(), data, tmp_path, Worker(2, 2)) is None
    assert "worker 2-of-2 is ready; another process is at work" in capsys.readouterr().out


def test_a_drive_without_hard_links(alone, images, tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError

    monkeypatch.setattr(workers.os, "link", refuse)
    for worker in (Worker(1, 2), Worker(2, 2)):
        run_together(journey(), fakes.dataset(images, N), tmp_path, worker)
    assert files(tmp_path) == files(alone)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", ""])
def test_a_worker_that_does_not_exist_is_refused(text):
    with pytest.raises(ValueError, match="give its number and how many there are"):
        Worker.named(text)


def test_launched_processes_are_numbered_within_their_machine():
    launched = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert Worker().launched({}) == Worker()
    assert Worker().launched(launched) == Worker(2, 4)
    everyone = [Worker(m, 2).launched({"RANK": str(r), "WORLD_SIZE": "4"}) for m in (1, 2) for r in range(4)]
    assert everyone == [Worker(i, 8) for i in range(1, 9)]


def test_each_launched_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(workers, "find_device", lambda: "cuda")
    monkeypatch.setattr(workers.torch.cuda, "set_device", taken.append)
    Worker().launched({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    Worker(2, 4).launched({})  # by --worker alone: which one it sees, CUDA_VISIBLE_DEVICES says
    assert taken == [1]
