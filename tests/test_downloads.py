"""Downloads against a server that fails: nothing corrupt is ever used, what was interrupted goes on."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import failing_server
import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from dalleflamingo import registry
from dalleflamingo.registry import RegistryError
from dalleflamingo.sources import downloads, remote
from dalleflamingo.sources.downloads import DownloadError, Remote, download

ROOT = Path(__file__).parents[1]


def jpeg(seed: int = 0, side: int = 200) -> bytes:
    """A JPEG of noise: 40 kB at 200 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


PHOTOGRAPH = jpeg()
IS_JPEG = partial(remote.require_image, (200, 200), True)


@pytest.fixture
def server(monkeypatch):
    """A failing server, and a client that waits for milliseconds where it waits for seconds."""
    for name, value in dict(PAUSE=0.01, READ=20.0, CONNECT=20.0).items():
        monkeypatch.setattr(downloads, name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "_reached", {})
    with failing_server.Server() as running:
        running.files["/a.jpg"] = PHOTOGRAPH
        yield running
        running.shutdown()


def photograph(server, folder: Path, name: str = "a.jpg", **changes) -> Remote:
    return Remote(f"{server.url}/{name}", folder / name, **{"check": IS_JPEG} | changes)


def left(folder: Path) -> set[str]:
    """Files in a folder but locks."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".lock")}


def test_a_file_arrives_as_it_is_and_is_not_fetched_twice(server, tmp_path):
    file = photograph(server, tmp_path / "new" / "folder")
    assert download([file], "photographs") == {}
    assert file.path.read_bytes() == PHOTOGRAPH and left(file.path.parent) == {"a.jpg"}
    assert download([file], "photographs") == {} and len(server.requests) == 1
    [headers] = server.asked("/a.jpg")
    assert headers["User-Agent"].startswith("dalleflamingo/") and headers["Accept-Encoding"] == "identity"


FAULTS = [500, 502, 503, 504, 429, 408, "close", "stall", "cut", "stall in the middle", "longer", "shorter", "web page"]
FAULTS += ["size unknown, cut", "other bytes", "redirect"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("times", [1, 2])
def test_a_fault_that_passes_costs_only_time(server, tmp_path, monkeypatch, fault, times):
    server.plan["/a.jpg"] = [fault] * times
    if "stall" in str(fault):
        monkeypatch.setattr(downloads, "READ", 0.4)
    file = photograph(server, tmp_path)
    assert download([file], "photographs") == {}
    assert file.path.read_bytes() == PHOTOGRAPH and left(tmp_path) == {"a.jpg"}
    once_more = fault == "longer"  # the rest of what was announced is asked for
    assert len(server.asked("/a.jpg")) in (times + 1, times + 1 + once_more)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_leaves_no_file_under_the_name(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(downloads, "TRIES", 3)
    monkeypatch.setattr(downloads, "READ", 0.2)
    server.plan["/a.jpg"] = [fault] * 100
    server.ranges = fault != "cut"  # one that sends half of the rest each time arrives in the end
    file = photograph(server, tmp_path)
    if fault in (503, 429):
        with pytest.raises(DownloadError, match=f"answers {fault}.*0 of 1 files are here"):
            download([file], "photographs")
    else:
        [reason] = download([file], "photographs").values()
        assert "tries" in reason or "redirect" in reason.lower()
    assert not file.path.exists()
    server.plan["/a.jpg"], server.ranges = [], True
    assert download([file], "photographs") == {} and file.path.read_bytes() == PHOTOGRAPH


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 204])
def test_what_a_server_does_not_have_is_asked_for_once_and_the_others_come(server, tmp_path, status):
    server.files["/b.jpg"] = jpeg(1)
    server.plan["/a.jpg"] = [status] * 9
    a, b = (photograph(server, tmp_path, name) for name in ("a.jpg", "b.jpg"))
    lost = download([a, b], "photographs")
    assert list(lost) == [a.path] and str(status) in lost[a.path]
    assert len(server.asked("/a.jpg")) == 1 and b.path.read_bytes() == jpeg(1) and left(tmp_path) == {"b.jpg"}


@given(cuts=st.lists(st.floats(0, 1), max_size=5), tags=st.booleans(), ranges=st.booleans())
def test_wherever_it_is_cut_the_same_bytes_arrive(tmp_path_factory, cuts, tags, ranges):
    with pytest.MonkeyPatch.context() as patch, failing_server.Server() as server:
        patch.setattr(downloads, "PAUSE", 0.001)
        patch.setattr(downloads, "TRIES", 20)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        server.files["/a.jpg"], server.tags, server.ranges = PHOTOGRAPH, tags, ranges
        folder = tmp_path_factory.mktemp("cuts")
        for number, cut in enumerate(cuts):  # each call is stopped by a fault of its own, then the next goes on
            server.cut_at, server.plan["/a.jpg"] = cut, ["cut"] * (number % 2 + 1)
            if number == len(cuts) - 1:
                download([photograph(server, folder)], "photographs")
        download([photograph(server, folder)], "photographs")
        assert (folder / "a.jpg").read_bytes() == PHOTOGRAPH and left(folder) == {"a.jpg"}
        server.shutdown()


def test_the_rest_is_asked_for_with_the_version_it_must_be_of(server, tmp_path):
    server.plan["/a.jpg"], server.cut_at = ["cut"], 0.9
    download([photograph(server, tmp_path)], "photographs")
    first, second = server.asked("/a.jpg")
    assert "Range" not in first
    have = int(second["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 0.5 * len(PHOTOGRAPH) < have < len(PHOTOGRAPH)
    assert second["If-Range"] == f'"{hashlib.md5(PHOTOGRAPH).hexdigest()}"'


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("other", [jpeg(7), jpeg(7, side=190)])
def test_a_file_that_changes_between_two_requests_is_never_mixed(server, tmp_path, monkeypatch, other, honest):
    """Nor where the server ignores If-Range and sends the rest of the new version."""
    if not honest:
        monkeypatch.setattr(failing_server.Handler, "headers", property(_without_if_range, _set_headers), raising=False)
    server.plan["/a.jpg"], server.changed["/a.jpg"], server.cut_at = ["cut and change"], other, 0.7
    file = photograph(server, tmp_path, check=partial(remote.require_image, None, True))
    assert download([file], "photographs") == {} and file.path.read_bytes() == other


def _set_headers(handler, headers) -> None:
    del headers["If-Range"]
    handler.__dict__["kept"] = headers


def _without_if_range(handler):
    return handler.__dict__["kept"]


def test_without_a_version_nothing_is_appended(server, tmp_path):
    server.tags, server.plan["/a.jpg"] = False, ["cut"]
    download([photograph(server, tmp_path)], "photographs")
    assert all("Range" not in headers for headers in server.asked("/a.jpg")) and len(server.requests) == 2


def test_a_part_of_another_address_is_not_continued(server, tmp_path):
    server.files["/other.jpg"] = jpeg(3)
    server.plan["/other.jpg"] = [404]
    part = tmp_path / "a.jpg.part"
    part.write_bytes(jpeg(3)[:20_000])
    known = {"url": f"{server.url}/other.jpg", "version": f'"{hashlib.md5(PHOTOGRAPH).hexdigest()}"', "size": None}
    (tmp_path / "a.jpg.part.json").write_text(json.dumps(known))
    download([photograph(server, tmp_path)], "photographs")
    assert (tmp_path / "a.jpg").read_bytes() == PHOTOGRAPH


@pytest.mark.parametrize("record", ["", "[]", "{}", "not JSON", None])
@pytest.mark.parametrize("part", [b"", b"something else", PHOTOGRAPH, PHOTOGRAPH + b"more"])
def test_whatever_a_killed_process_left_the_right_bytes_arrive(server, tmp_path, record, part):
    (tmp_path / "a.jpg.part").write_bytes(part)
    if record is not None:
        (tmp_path / "a.jpg.part.json").write_text(record)
    assert download([photograph(server, tmp_path)], "photographs") == {}
    assert (tmp_path / "a.jpg").read_bytes() == PHOTOGRAPH and left(tmp_path) == {"a.jpg"}


def test_a_part_that_was_whole_already_is_checked_and_taken(server, tmp_path):
    (tmp_path / "a.jpg.part").write_bytes(PHOTOGRAPH)
    known = {"url": f"{server.url}/a.jpg", "version": f'"{hashlib.md5(PHOTOGRAPH).hexdigest()}"', "size": None}
    (tmp_path / "a.jpg.part.json").write_text(json.dumps(known))
    assert download([photograph(server, tmp_path)], "photographs") == {} and len(server.requests) == 1
    assert (tmp_path / "a.jpg").read_bytes() == PHOTOGRAPH


def test_another_sha256_is_refused(server, tmp_path):
    right = hashlib.sha256(PHOTOGRAPH).hexdigest()
    [reason] = download([photograph(server, tmp_path, sha256="0" * 64)], "photographs").values()
    assert f"its sha256 is {right}, expected 000" in reason and left(tmp_path) == set()
    assert download([photograph(server, tmp_path, sha256=right)], "photographs") == {}


@pytest.mark.parametrize("told", ["1", "date"])
def test_a_server_that_asks_to_wait_is_waited_for(server, tmp_path, told):
    from email.utils import formatdate

    server.retry_after = formatdate(time.time() + 2, usegmt=True) if told == "date" else told
    server.plan["/a.jpg"] = [503]
    began = time.monotonic()
    assert download([photograph(server, tmp_path)], "photographs") == {}
    assert 0.9 < time.monotonic() - began < 5


@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_server_that_asks_to_wait_for_an_hour_is_left_in_peace(server, tmp_path, status):
    server.retry_after, server.plan["/a.jpg"] = "3600", [status] * 9
    with pytest.raises(DownloadError, match=f"answers {status} .*asks to wait 3,600 seconds.*give the same command"):
        download([photograph(server, tmp_path)], "photographs")
    assert len(server.requests) == 1


def test_waits_grow_and_differ(server, tmp_path, monkeypatch):
    waits, stop = [], threading.Event()
    monkeypatch.setattr(downloads, "PAUSE", 1.0)
    stop.wait = lambda seconds: waits.append(seconds) or False
    server.plan["/a.jpg"] = [500] * 5
    with downloads._session() as session:
        assert downloads._bring(session, photograph(server, tmp_path), stop, lambda _: None) is None
    for number, wait in enumerate(waits):
        assert 2**number / 2 <= wait <= 2**number
    assert len(waits) == 5 and len({wait / 2**number for number, wait in enumerate(waits)}) == 5


def test_four_at_a_time_and_all_arrive(server, tmp_path, capsys):
    names = [f"{number}.jpg" for number in range(20)]
    server.files |= {f"/{name}": jpeg(number) for number, name in enumerate(names)}
    server.pace = 0.02
    assert download([photograph(server, tmp_path, name) for name in names], "photographs", megabytes=0.3) == {}
    assert 2 <= server.most_at_once <= 4
    assert all((tmp_path / name).read_bytes() == server.files[f"/{name}"] for name in names)
    said = capsys.readouterr().out
    assert said.startswith(
        f"photographs: 20 of 20 to fetch, about 6 MB, from {server.url.removeprefix('http://')} into"
    )
    download([photograph(server, tmp_path, name) for name in (*names, "a.jpg")], "photographs")
    assert "photographs: 1 of 21 to fetch, of unknown size" in capsys.readouterr().out


def test_a_server_with_nothing_but_web_pages_is_left_soon(server, tmp_path):
    names = [f"{number}.jpg" for number in range(200)]
    server.files |= dict.fromkeys([f"/{name}" for name in names], b"<!DOCTYPE html>Log in.")
    with pytest.raises(DownloadError, match="not one of the first 8 files .*<!DOCTYPE.*log in.*missing.txt lists"):
        download([photograph(server, tmp_path, name) for name in names], "photographs")
    assert len(server.requests) < 60
    listed = (tmp_path / "missing.txt").read_text().splitlines()
    assert listed[7] == f"{server.url}/7.jpg to {tmp_path / '7.jpg'}" and len(listed) == 200


def test_where_others_are_there_lost_ones_stop_nothing(server, tmp_path):
    files = [photograph(server, tmp_path, name) for name in ("a.jpg", *(f"{number}.jpg" for number in range(12)))]
    download(files[:1], "photographs")
    assert len(download(files, "photographs")) == 12


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/a.jpg", "nonsense", "http://", "http://[", "http:///a.jpg"]
)
def test_an_address_that_is_none_is_that_files_fault(server, tmp_path, url):
    server.files["/b.jpg"] = PHOTOGRAPH
    wrong = Remote(url, tmp_path / "wrong.jpg", IS_JPEG)
    lost = download([photograph(server, tmp_path), wrong], "photographs")
    assert list(lost) == [wrong.path] and left(tmp_path) == {"a.jpg"}


# ── out of reach ─────────────────────────────────────────────────────────────────────────────────────────────────────


OFFLINE = {
    "refused": "http://127.0.0.1:9/a.jpg",
    "no such name": "http://no-such-host.invalid/a.jpg",
    "no route": "http://[100::1]/a.jpg",
}


@pytest.mark.parametrize("url", OFFLINE.values(), ids=list(OFFLINE))
def test_out_of_reach_is_said_within_ten_seconds_with_what_to_do(tmp_path, monkeypatch, url):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    with pytest.raises(DownloadError) as refusal:
        download([Remote(url, tmp_path / "a.jpg", IS_JPEG)], "photographs of x", "name your copy in DALLEFLAMINGO_X")
    assert time.monotonic() - began < 10
    message = str(refusal.value)
    for part in ("cannot be reached", "0 of 1 files are here", "same command", "or name your copy", "by hand " + url):
        assert part in message
    assert isinstance(refusal.value, RegistryError)


@pytest.mark.parametrize("hangs", ["getaddrinfo", "connect"])
def test_a_network_that_swallows_everything_is_said_within_ten_seconds(tmp_path, monkeypatch, hangs):
    import socket

    def connect(own: socket.socket, _) -> None:
        time.sleep(own.gettimeout())
        raise TimeoutError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "_reached", {})
    if hangs == "getaddrinfo":  # as where packets to the name server are dropped
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    else:  # as where an address has many numbers and none answers
        many = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"10.255.255.{n}", 80)) for n in range(9)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: many)
        monkeypatch.setattr(socket.socket, "connect", connect)
    began = time.monotonic()
    with pytest.raises(DownloadError, match="slow.example cannot be reached"):
        download([Remote("http://slow.example/a.jpg", tmp_path / "a.jpg", IS_JPEG)], "photographs")
    assert time.monotonic() - began < 10


def test_a_server_that_is_slow_is_not_out_of_reach(server, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "PATIENCE", 2.0)
    monkeypatch.setattr(failing_server.Handler, "do_HEAD", lambda own: time.sleep(3))
    assert not isinstance(registry.ask(server.url), int) and not registry.answers(server.url)
    assert download([photograph(server, tmp_path)], "photographs") == {}


def test_an_error_of_the_network_names_what_led_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads, "_reached", {})
    with pytest.raises(DownloadError, match=r"127.0.0.1:9 cannot be reached \(ConnectionRefusedError: .{0,60}\)\."):
        download([Remote("http://127.0.0.1:9/a.jpg", tmp_path / "a.jpg", IS_JPEG)], "photographs")


def test_told_to_stay_offline_nothing_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE and connect"):
        download([photograph(server, tmp_path)], "photographs")
    assert not server.requests
    (tmp_path / "a.jpg").write_bytes(PHOTOGRAPH)
    assert download([photograph(server, tmp_path)], "photographs") == {}


def test_a_server_that_is_gone_in_the_middle_ends_it_and_what_came_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TRIES", 2)
    names = [f"{number}.jpg" for number in range(30)]
    server.files |= {f"/{name}": PHOTOGRAPH for name in names}
    files = [photograph(server, tmp_path, name) for name in names]
    came = download(files[:5], "photographs")
    monkeypatch.setattr(downloads, "_session", lambda: _Gone())
    with pytest.raises(DownloadError, match="no connection .*5 of 30 files are here"):
        download(files, "photographs")
    monkeypatch.undo()
    assert came == {} and {path.name for path in tmp_path.glob("*.jpg")} == set(names[:5])


class _Gone:
    """A session after the network is gone."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def get(self, *_, **__):
        import requests

        raise requests.ConnectionError("Network is unreachable")


def test_a_full_disk_is_no_fault_of_the_server(server, tmp_path, monkeypatch):
    import errno

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        download([photograph(server, tmp_path, check=full)], "photographs")
    assert not (tmp_path / "a.jpg").exists()


# ── killed, and together ─────────────────────────────────────────────────────────────────────────────────────────────

FETCH = """
import sys
from pathlib import Path
from functools import partial
from dalleflamingo.sources import downloads, remote
check = partial(remote.require_image, (200, 200), True)
url, folder, *names = sys.argv[1:]
downloads.PAUSE = 0.01
files = [downloads.Remote(f"{url}/{name}", Path(folder) / name, check) for name in names]
print(downloads.download(files, "photographs"), flush=True)
"""


def fetching(server, folder: Path, names: list[str]) -> subprocess.Popen:
    """Another process that fetches."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(FETCH), server.url, str(folder), *names]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@contextmanager
def interrupting(condition: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C as soon as a condition holds."""
    main, over = threading.main_thread().ident, threading.Event()

    def wait_and_interrupt() -> None:
        while not over.wait(0.005):
            if condition():
                return signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=wait_and_interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_killed_process_leaves_no_wrong_file_and_the_next_goes_on(server, tmp_path):
    names = [f"{number}.jpg" for number in range(6)]
    server.files |= {f"/{name}": jpeg(number) for number, name in enumerate(names)}
    server.pace = 0.2
    process = fetching(server, tmp_path, names)
    parts = lambda: [path for path in tmp_path.glob("*.part") if path.stat().st_size > 1000]  # noqa: E731
    wait_for(lambda: len(parts()) >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = [path.name.removesuffix(".part") for path in parts()]
    whole = {path.name for path in tmp_path.glob("*.jpg")}
    assert all((tmp_path / name).read_bytes() == server.files[f"/{name}"] for name in whole)
    server.pace, before = 0.0, len(server.requests)
    assert download([photograph(server, tmp_path, name) for name in names], "photographs") == {}
    assert all((tmp_path / name).read_bytes() == server.files[f"/{name}"] for name in names)
    asked = dict(server.requests[before:])
    assert begun and all("Range" in asked[f"/{name}"] for name in begun) and not set(asked) & {f"/{n}" for n in whole}
    assert left(tmp_path) == set(names)


def test_two_processes_share_the_work(server, tmp_path):
    names = [f"{number}.jpg" for number in range(24)]
    server.files |= {f"/{name}": jpeg(number) for number, name in enumerate(names)}
    server.pace = 0.05
    both = [fetching(server, tmp_path, names), fetching(server, tmp_path, names[::-1])]
    said = [process.communicate(timeout=120) for process in both]
    assert [out.splitlines()[-1] for out, _ in said] == ["{}", "{}"], said
    assert sorted(path for path, _ in server.requests) == sorted(f"/{name}" for name in names)  # each file once
    assert all((tmp_path / name).read_bytes() == server.files[f"/{name}"] for name in names)
    assert left(tmp_path) == set(names)


def test_interrupted_its_threads_ask_for_no_more(server, tmp_path):
    names = [f"{number}.jpg" for number in range(40)]
    server.files |= {f"/{name}": jpeg(number) for number, name in enumerate(names)}
    server.pace = 0.1
    with (
        pytest.raises(KeyboardInterrupt),
        interrupting(lambda: len(server.requests) == 2 * server.at_once == 2 * downloads.PARALLEL),
    ):
        download([photograph(server, tmp_path, name) for name in names], "photographs")
    asked, came = len(server.requests), set(tmp_path.glob("*.jpg"))
    wait_for(lambda: not [one for one in threading.enumerate() if one.name.endswith("(_work)")])
    assert len(server.requests) == asked < 40 and set(tmp_path.glob("*.jpg")) == came
    server.pace = 0.0
    assert download([photograph(server, tmp_path, name) for name in names], "photographs") == {}


def test_interrupted_it_returns_at_once(server, tmp_path, monkeypatch):
    server.plan["/a.jpg"] = ["stall"] * 9
    monkeypatch.setattr(downloads, "READ", 60)
    server.stall = 60.0  # seconds
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupting(lambda: server.requests):
        download([photograph(server, tmp_path)], "photographs")
    assert time.monotonic() - began < 30


# ── what arrived ─────────────────────────────────────────────────────────────────────────────────────────────────────


@given(length=st.integers(0, len(PHOTOGRAPH) - 1), tolerant=st.booleans())
def test_a_jpeg_that_is_cut_anywhere_is_no_image(tmp_path_factory, length, tolerant):
    """Nor where other code has told Pillow to accept truncated images."""
    path = tmp_path_factory.getbasetemp() / "cut.jpg"
    path.write_bytes(PHOTOGRAPH[:length])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
        with pytest.raises(ValueError, match="no whole image|without its end"):
            remote.require_image(None, True, path)


@pytest.mark.parametrize("lacking", [1, 2, 3, 10])
@pytest.mark.parametrize("tolerant", [True, False])
def test_a_jpeg_with_a_thumbnail_that_lacks_its_last_bytes_is_no_image(tmp_path, monkeypatch, lacking, tolerant):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    small, whole = jpeg(1, side=24), PHOTOGRAPH
    thumbnail = b"\xff\xe1" + (2 + 6 + len(small)).to_bytes(2, "big") + b"Exif\0\0" + small  # has an end of its own
    content = whole[:2] + thumbnail + whole[2:]
    (tmp_path / "a.jpg").write_bytes(content)
    remote.require_image((200, 200), True, tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(content[:-lacking])
    with pytest.raises(ValueError, match="no whole image|without its end"):
        remote.require_image((200, 200), True, tmp_path / "a.jpg")


def test_an_image_of_another_kind_or_size_is_not_what_was_promised(tmp_path):
    path = tmp_path / "a.jpg.part"
    Image.new("RGB", (30, 20)).save(path, "PNG")
    with pytest.raises(ValueError, match="in the format PNG, expected JPEG"):
        remote.require_image(None, True, path)
    remote.require_image((30, 20), False, path)
    remote.require_image((20, 30), False, path)  # before its EXIF tag turns it
    with pytest.raises(ValueError, match="30 × 20 pixels, expected 640 × 480"):
        remote.require_image((640, 480), False, path)


def archive(content: bytes, name: str = "dataset.json") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("../evil.json", b"{}")
        opened.writestr(name, content)
    return buffer.getvalue()


def test_of_an_archive_only_the_wanted_file_is_kept(server, tmp_path):
    content = json.dumps({"images": []}).encode()
    server.files["/all.zip"] = archive(content)
    file = Remote(
        f"{server.url}/all.zip",
        tmp_path / "in" / "dataset.json",
        partial(remote.require_list, "images"),
        member="dataset.json",
    )
    assert download([file], "captions") == {} and file.path.read_bytes() == content
    assert left(tmp_path / "in") == {"dataset.json"} and not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("how", ["flipped", "cut", "other name", "no archive", "not JSON", "no list"])
def test_a_damaged_archive_is_not_used(server, tmp_path, how):
    content = json.dumps({"images": [], "filler": "x" * 1000}).encode()
    whole = {
        "flipped": archive(content).replace(b"xxxx", b"xxxy", 1),
        "cut": archive(content)[:-200],
        "other name": archive(content, "else.json"),
        "no archive": content,
        "not JSON": archive(b"<html>"),
        "no list": archive(b"[]"),
    }
    server.files["/all.zip"] = whole[how]
    check = partial(remote.require_list, "images")
    file = Remote(f"{server.url}/all.zip", tmp_path / "dataset.json", check, member="dataset.json")
    [reason] = download([file], "captions").values()
    assert "what arrived is not usable" in reason and not file.path.exists()
