"""Files from their public addresses: resumed, verified, and fetched politely.

A file has its name only when it is whole. Until then its bytes are in NAME.part, and what the server calls that version
(ETag or Last-Modified) in NAME.part.json. A process that is killed leaves both, and the next one asks for the rest of
the same version (RFC 9110: Range with If-Range). What arrived is checked for its size, its sha256 where one is known,
and its content; what does not pass is deleted and fetched again.
"""

import hashlib
import json
import os
import queue
import random
import shutil
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock, Timeout
from huggingface_hub import constants
from tqdm.auto import tqdm

from dalleflamingo import __version__
from dalleflamingo.registry import RegistryError, ask
from dalleflamingo.runs import WITHOUT_LOCKS, printable, write_whole

PARALLEL = 4  # files at a time
TRIES = 6  # in succession that bring nothing new
BAD = 3  # tries of a file that arrives whole but is not what it should be
PAUSE, LONGEST = 1.0, 120.0  # seconds before the second try, doubled each time; a longer wait is left to the user
CONNECT, READ = 5.0, 20.0  # seconds to connect, and without a byte
LATELY = 30.0  # seconds
HOPELESS = 8  # files that cannot be had, before any can: the server has other things to tell
_LOCKS = 64  # in a folder; a file's is chosen by its name
_LISTED = 3  # files that an error names itself
_reached: dict[str, float] = {}  # server -> when it last answered this process


class DownloadError(RegistryError):
    """Files could not be fetched; the message says why, what is kept, and what to do."""


@dataclass(frozen=True)
class Remote:
    """A file to fetch.

    Attributes:
        url: its address.
        path: where it will be; its folder is made.
        check: given what arrived, raises ValueError with what is wrong with it.
        sha256: of what is at the address, where it is published.
        member: of a ZIP archive at the address, the name of the one file in it that is wanted; "": the address is the
            file's own.
    """

    url: str
    path: Path
    check: Callable[[Path], object]
    sha256: str | None = None
    member: str = ""


def download(files: Sequence[Remote], what: str, remedy: str = "", megabytes: float | None = None) -> dict[Path, str]:
    """Fetch those of the files that are not there yet, a few at a time.

    Processes that fetch into the same folder at once share the work. An interrupted call goes on where it was.

    Args:
        files: to have in the end.
        what: they are, for people.
        remedy: what else a user can do than try again, a clause of errors.
        megabytes: of a file, roughly; None: unknown.
    Returns:
        path -> reason, of the files that their server has not, or not in a usable form: {} where all is well.
    Raises:
        DownloadError: the network or a server is out of reach, or the process is told to stay offline.
    """
    missing = [file for file in files if not file.path.is_file()]
    if not missing:
        return {}
    try:
        _require_network(missing[0].url)
        if _worth_telling(missing, megabytes):
            print(announcement(missing, len(files), what, megabytes))
        return _fetch(missing, what, megabytes, hopeful=len(missing) < len(files))
    except _Unavailable as error:
        raise DownloadError(_advice(str(error), files, what, remedy)) from error


def _worth_telling(missing: Sequence[Remote], megabytes: float | None) -> bool:
    return len(missing) > 1 or not megabytes  # a training run opens photographs one by one


def announcement(missing: Sequence[Remote], of: int, what: str, megabytes: float | None) -> str:
    """What is about to be fetched, in one line: how many files, how much, from where, to where."""
    servers = ", ".join(sorted({_server(file.url) for file in missing}))
    size = f"about {max(1, round(megabytes * len(missing))):,} MB" if megabytes else "of unknown size"
    return f"{what}: {len(missing)} of {of} to fetch, {size}, from {servers} into {printable(_folder(missing))}"


def write_shared(path: Path, text: str) -> None:
    """Write a text as a whole where other processes may be writing it, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class _Unavailable(Exception):
    """No file can be had now."""


class _NotServed(Exception):
    """This file cannot be had, and trying again would not help."""


class _Failed(Exception):
    """A try that failed. `of_server`: others would fail too; `corrupt`: it brought something, but not the file."""

    def __init__(self, reason: str, of_server: bool = False, corrupt: bool = False, wait: float = 0.0):
        super().__init__(reason)
        self.of_server, self.corrupt, self.wait = of_server, corrupt, wait


def _fetch(missing: Sequence[Remote], what: str, megabytes: float | None, hopeful: bool) -> dict[Path, str]:
    todo, done, stop = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    for file in missing:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        todo.put(file)
    failed, total = {}, int(megabytes * len(missing) * 1e6) if megabytes else None
    silent = not _worth_telling(missing, megabytes)
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=silent) as bar:
        for _ in range(min(PARALLEL, len(missing))):  # daemons: an interrupted process does not wait for a slow server
            threading.Thread(target=_work, args=(todo, done, stop, bar.update), daemon=True).start()
        try:
            for number in range(1, len(missing) + 1):
                file, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                if result:
                    failed[file.path] = result
                    bar.write(f"{printable(file.path.name)} cannot be had from {file.url}: {result}")
                if len(failed) == number == HOPELESS and not hopeful:
                    raise _Unavailable(
                        f"not one of the first {number} files can be had, the last because of this: {result}. Is the "
                        "network behind a page to log in to?"
                    )
                bar.set_postfix_str(f"{number} of {len(missing)} files")
        finally:
            stop.set()
    return failed


def _work(todo: queue.SimpleQueue, done: queue.SimpleQueue, stop: threading.Event, progress: Callable) -> None:
    """Fetch files until none is left; for each, what went wrong, or None."""
    with _session() as session:
        while not stop.is_set():
            try:
                file = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((file, _bring(session, file, stop, progress)))
            except BaseException as error:  # for the thread that asked
                done.put((file, error))


def _session() -> requests.Session:
    session = requests.Session()
    session.headers["User-Agent"] = f"dalleflamingo/{__version__} (a course; {requests.utils.default_user_agent()})"
    session.headers["Accept-Encoding"] = "identity"  # sizes and ranges count the bytes of the file itself
    return session


def _bring(session: requests.Session, file: Remote, stop: threading.Event, progress: Callable) -> str | None:
    """Fetch one file, with as many tries as it takes; why that is of no use, or None."""
    part = _part(file)
    with _alone(file.path, stop):
        if file.path.is_file():  # another process has fetched it meanwhile
            return None
        failures, bad, furthest = 0, 0, 0
        while True:
            try:
                _transfer(session, file, stop, progress)
                return _finish(file)
            except _NotServed as error:
                return str(error)
            except _Failed as error:
                size = part.stat().st_size if part.is_file() else 0
                bad += error.corrupt
                failures = 1 if size > furthest else failures + 1  # a slow line may break as often as it likes
                furthest = max(furthest, size)
                if error.wait > LONGEST or (failures >= TRIES and error.of_server):
                    raise _Unavailable(str(error)) from error
                if failures >= TRIES or bad >= BAD:
                    return f"{error}; given up after {max(failures, bad)} tries"
                pause = min(LONGEST, PAUSE * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
                if stop.wait(max(error.wait, pause)):
                    raise _Unavailable("interrupted") from error


def _transfer(session: requests.Session, file: Remote, stop: threading.Event, progress: Callable) -> None:
    """Bring what is missing of a file's bytes into its part, in one request."""
    part, record = _part(file), _record(file)
    have = part.stat().st_size if part.is_file() else 0
    known = _read_record(record, file.url) if have else {}
    version = known.get("version")
    headers = {"Range": f"bytes={have}-", "If-Range": version} if version else {}
    try:
        response = session.get(file.url, headers=headers, stream=True, timeout=(CONNECT, READ))
    except requests.Timeout as error:
        raise _Failed(f"no answer ({_told(error)})", isinstance(error, requests.ConnectTimeout)) from error
    except requests.ConnectionError as error:
        raise _Failed(f"no connection ({_told(error)})", of_server=not _was_cut(error)) from error
    except (requests.RequestException, ValueError) as error:  # an address or a redirection that leads nowhere
        raise _NotServed(_told(error)) from error
    with response:
        _reached[_server(file.url)] = time.monotonic()
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        if response.status_code == 416 and version and _range(response)[1] == have:
            return  # it was whole already
        resumed = response.status_code == 206 and bool(version)
        if resumed:
            same = _version(response) in (None, version) and known.get("size") in (None, _range(response)[1])
            if encoded or not same or _range(response)[0] != have:
                _forget(file)
                raise _Failed("its server sent another part or version than was asked for")
        elif response.status_code != 200:
            _refuse(file, response)
        size = _range(response)[1] if resumed else _content_length(response)
        size = None if encoded else size
        if not resumed:  # emptied before the new version is noted, so that no kill can leave one with the other's bytes
            have = 0
            part.write_bytes(b"")
            new = {"url": file.url, "version": None if encoded else _version(response), "size": size}
            write_whole(record, lambda path: path.write_text(json.dumps(new)))
        try:
            with part.open("ab") as output:
                for chunk in response.iter_content(1 << 14):
                    if stop.is_set():
                        raise _Unavailable("interrupted")
                    output.write(chunk)
                    have += len(chunk)
                    progress(len(chunk))
        except requests.RequestException as error:
            raise _Failed(f"the transfer broke off after {have:,} bytes of {_size(size)} ({_told(error)})") from error
    if size is not None and have != size:
        raise _Failed(f"its server announces {size:,} bytes and sent {have:,}")


def _refuse(file: Remote, response: requests.Response) -> None:
    """Raise what an answer without the file means."""
    status, told = response.status_code, f"its server answers {response.status_code} {response.reason or ''}".rstrip()
    if status == 416:
        _forget(file)
        raise _Failed(told)
    if status in (408, 425, 429) or status >= 500:
        wait = _retry_after(response)
        told += f" and asks to wait {wait:,.0f} seconds" if wait else ""
        raise _Failed(told, of_server=status in (429, 503), wait=wait)
    raise _NotServed(told)


def _finish(file: Remote) -> None:
    """Check what arrived, and give it its name."""
    part, whole = _part(file), _part(file)
    try:
        if file.sha256 and (found := _sha256(part)) != file.sha256:
            raise ValueError(f"its sha256 is {found}, expected {file.sha256}")
        if file.member:
            whole = file.path.with_name(file.path.name + ".whole")
            _unpack(part, file.member, whole)
        file.check(whole)
    except (ValueError, zipfile.BadZipFile) as error:
        _forget(file)
        raise _Failed(f"what arrived is not usable: {error}", corrupt=True) from error
    with whole.open("rb+") as written:
        os.fsync(written.fileno())
    os.replace(whole, file.path)
    _forget(file)


def _unpack(archive: Path, member: str, path: Path) -> None:
    """Write one file of a ZIP archive, whose checksum zipfile compares."""
    with zipfile.ZipFile(archive) as opened, path.open("wb") as output:
        try:
            with opened.open(member) as source:
                shutil.copyfileobj(source, output)
        except (KeyError, zlib.error, EOFError) as error:
            raise ValueError(f"a ZIP archive without a whole {member} ({error})") from error


def _server(url: str) -> str:
    try:
        return urlsplit(url).netloc or "nowhere"
    except ValueError:
        return "nowhere"


def _part(file: Remote) -> Path:
    return file.path.with_name(file.path.name + ".part")


def _record(file: Remote) -> Path:
    return file.path.with_name(file.path.name + ".part.json")


def _read_record(record: Path, url: str) -> dict:
    """What is known of the version that a part is of; {} where that is nothing, or of another address."""
    try:
        known = json.loads(record.read_text())
        return known if known["url"] == url else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _forget(file: Remote) -> None:
    _part(file).unlink(missing_ok=True)
    _record(file).unlink(missing_ok=True)


def _version(response: requests.Response) -> str | None:
    """What If-Range may be asked with: a strong ETag, or else the time of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _content_length(response: requests.Response) -> int | None:
    told = response.headers.get("Content-Length", "")
    return int(told) if told.isdecimal() else None


def _range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and whole size of a Content-Range such as "bytes 5-9/10" or "bytes */10"."""
    told, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    first = told.partition("-")[0]
    return int(first) if first.isdecimal() else None, int(size) if size.isdecimal() else None


def _retry_after(response: requests.Response) -> float:
    """Seconds that a server asks to wait, given as a number or as a date; 0: it does not ask."""
    told = response.headers.get("Retry-After", "").strip()
    if told.isdecimal():
        return float(told)
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a zone
        return 0.0


def _was_cut(error: BaseException | None) -> bool:
    """Whether a connection had been made and broke, so that it is of this file and not of the network."""
    cut = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, HTTPException)
    return error is not None and (isinstance(error, cut) or _was_cut(error.__cause__ or error.__context__))


def _told(error: BaseException) -> str:
    """What led to an error; requests and urllib3 wrap it in texts of their own."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _size(size: int | None) -> str:
    return "an unknown number" if size is None else f"{size:,}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _alone(path: Path, stop: threading.Event) -> Iterator[None]:
    """Let no other process and no other thread fetch that file meanwhile; the lock ends with the process."""
    number = hashlib.blake2b(os.fsencode(path.name), digest_size=1).digest()[0] % _LOCKS
    lock = FileLock(path.with_name(f".lock-{number:02d}"), timeout=1, fallback_to_soft=False)
    while True:
        try:
            lock.acquire()
        except Timeout:
            if not stop.is_set():
                continue
            raise _Unavailable("interrupted") from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        break
    try:
        yield
    finally:
        lock.release()


def _require_network(url: str) -> None:
    """Raise `_Unavailable` where a server is out of reach, or the process is told to stay offline."""
    server = _server(url)
    if constants.HF_HUB_OFFLINE:
        raise _Unavailable("HF_HUB_OFFLINE is set")
    if time.monotonic() - _reached.get(server, -LATELY) < LATELY:
        return
    answer = ask(url)
    is_slow = isinstance(answer, requests.ReadTimeout)
    if isinstance(answer, (requests.ConnectionError, TimeoutError)) and not is_slow and not _was_cut(answer):
        raise _Unavailable(f"{server} cannot be reached ({_told(answer)})") from answer
    _reached[server] = time.monotonic()


def _advice(problem: str, files: Sequence[Remote], what: str, remedy: str) -> str:
    """The message of a DownloadError. More than a few missing files are listed in a file."""
    missing, folder = [file for file in files if not file.path.is_file()], _folder(files)
    rows = [f"{file.member + ' of ' if file.member else ''}{file.url} to {printable(file.path)}" for file in missing]
    by_hand = "; ".join(rows)
    if len(missing) > _LISTED:
        write_shared(folder / "missing.txt", "\n".join(rows) + "\n")
        by_hand = f"what {printable(folder / 'missing.txt')} lists, each to the path beside it"
    again = "unset HF_HUB_OFFLINE and connect" if constants.HF_HUB_OFFLINE else "connect, or wait a little"
    other = f"; or {remedy}" if remedy else ""
    return (
        f"{what}: {problem}. {len(files) - len(missing)} of {len(files)} files are here, and what arrived of others is "
        f"kept: {again}, and give the same command again{other}; or fetch by hand {by_hand}"
    )


def _folder(files: Sequence[Remote]) -> Path:
    return Path(os.path.commonpath([file.path.parent for file in files]))
