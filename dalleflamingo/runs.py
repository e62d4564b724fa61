"""A run folder: finished work on disk, in whole parts, so that a run killed at any moment continues where it stopped.

    run.json            the settings; another run does not mix its rows into this folder
    parts/00000.parquet rows of a few examples, written after all their images
    images/*.png
    scores/clip …/00000.parquet  scores of those rows by one similarity; another adds its own, without generating again
    candidates.parquet  the table, at the end
    skipped.json        inputs that could not be read, at the end

A file appears under its name only when it is complete: it is written beside it and renamed. `hold` keeps a second
process out of a folder, `fingerprint` tells a run whether its models are still the same, `derive_seed` gives each
candidate its own seed, and `Checkpoint` keeps the state of a training run.
"""

import errno
import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

SOURCE = ["image_id", "digest"]  # columns that say what a row was made from: an example, and its content at that time
_ROW = [*SOURCE, "candidate"]  # identifies a row
_SCORES = pa.schema({"image_id": pa.int64(), "digest": pa.string(), "candidate": pa.int64(), "score": pa.float64()})
_LAYOUT = 2  # of run.json and the parts; 1 had no digests
_PER_TENSOR = 64  # values of each tensor that go into a model's fingerprint; training changes every tensor
WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # of some network drives


class RunFolderError(ValueError):
    """The folder cannot be used, or belongs to another run; the message says why and what to do."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Create a run's folder, and let no other process and no other thread hold it meanwhile.

    The lock is the kernel's: it ends with the process that has it, however that ends. The thread that holds a folder
    may hold it again. On a drive without locks a printed line asks the user to take care.

    Raises:
        RunFolderError: another process is at work there, or the folder cannot be created or written to.
    """
    lock = FileLock(Path(folder).resolve() / ".lock", timeout=0, is_singleton=True, fallback_to_soft=False)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunFolderError(f"another process is at work in {folder}: wait for it, or give another folder") from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            problem = "it is a file" if os.path.isfile(folder) else error.strerror or error
            raise RunFolderError(f"{folder} cannot hold a run ({problem}): give a folder to write to") from error
        print(f"{folder} is on a drive without file locks: let no second process work there")
    try:
        yield
    finally:
        lock.release()


class RunFolder:
    """A folder of one run, new or to be continued.

    Args:
        folder: the run's folder; created if missing.
        settings: all settings that the rows depend on, as JSON values; kept with the first rows, so that a run whose
            settings a model or scheduler refuses leaves the folder free.
        schema: columns of the rows; (image_id, digest, candidate) identifies a row, `digest` being that of the content
            that it was made from; `image` is the path of its generated image.
    Raises:
        RunFolderError: the folder was made with other settings or by another version, or its name is not UTF-8.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], schema: pa.Schema):
        self.folder, self.schema = Path(folder), schema
        self.settings = json.loads(json.dumps(settings))
        try:
            str(folder).encode()
        except UnicodeEncodeError as error:  # a name that is no UTF-8: the file system takes it, pyarrow does not
            raise RunFolderError(f"{printable(folder)} is not in UTF-8: give another run_folder") from error
        for name in ("parts", "images"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._agree()

    def save_image(self, name: str, image: Image) -> str:
        """Save a generated image as `images/NAME.png`; returns that path, relative to the folder."""
        relative = f"images/{name}.png"
        write_whole(self.folder / relative, lambda path: image.save(path, format="PNG"))
        return relative

    def add(self, rows: list[dict]) -> None:
        """Write rows as a new part; their images must have been saved before."""
        path = self.folder / "run.json"
        if not path.exists():
            record = json.dumps({"layout": _LAYOUT, "settings": self.settings}, indent=1)
            write_whole(path, lambda part: part.write_text(record + "\n"))
        _add_part(self.folder / "parts", pa.Table.from_pylist(rows, self.schema))

    def rows(self) -> pd.DataFrame:
        """All rows of examples whose images all exist. A damaged part is deleted, and a printed line says so."""
        rows = _read_parts(self.folder / "parts", self.schema)
        images = {f"images/{path.name}" for path in (self.folder / "images").glob("*.png")}
        exists = rows.assign(exists=rows.image.isin(images))
        whole = rows[exists.groupby(SOURCE).exists.transform("all").astype(bool)]
        return whole.reset_index(drop=True)

    def add_scores(self, key: str, rows: Sequence[Mapping], values: Sequence[float]) -> None:
        """Write the scores of rows as a new part; `key` names the similarity, `values` has one number for each row."""
        ids = [{name: row[name] for name in _ROW} for row in rows]
        scored = [row | {"score": value} for row, value in zip(ids, values, strict=True)]
        folder = self._scores(key)
        folder.mkdir(parents=True, exist_ok=True)
        _add_part(folder, pa.Table.from_pylist(scored, _SCORES))

    def scores(self, key: str) -> pd.DataFrame:
        """The scores that the similarity `key` has given so far: columns image_id, digest, candidate, score."""
        return _read_parts(self._scores(key), _SCORES)

    def finish(self, table: pd.DataFrame, skipped: list[dict]) -> Path:
        """Write the table, rows with a column per similarity, and the skipped inputs; returns the table's path."""
        write_whole(self.folder / "skipped.json", lambda path: path.write_text(json.dumps(skipped, indent=1) + "\n"))
        similarities = [pa.field(name, pa.float64()) for name in table if name not in self.schema.names]
        arrow = pa.Table.from_pandas(table, pa.schema([*self.schema, *similarities]), preserve_index=False)
        write_whole(self.folder / "candidates.parquet", lambda path: pq.write_table(arrow, path))
        return self.folder / "candidates.parquet"

    def _scores(self, key: str) -> Path:
        return self.folder / "scores" / quote(key, safe=" ")

    def _agree(self) -> None:
        there = read_settings(self.folder / "run.json", lambda run: (dict(run["settings"]), run.get("layout", 1)))
        if there is None:
            if _parts(self.folder / "parts"):
                raise RunFolderError(f"{self.folder} holds parts of a run but no run.json: give another run_folder")
            return
        settings, layout = there
        if layout != _LAYOUT:
            raise RunFolderError(
                f"{self.folder} has layout {layout!r} and this version writes {_LAYOUT}, whose rows say which content "
                "they were made from: keep it for its table and its images, and give another run_folder"
            )
        if lines := differences(settings, self.settings):
            raise RunFolderError(
                f"{self.folder} holds a run with other settings:\n{lines}\nGive another run_folder, or delete this "
                "one to start again. (The code after a model's name is a digest of its weights and settings.)"
            )


def read_settings(path: Path, settings_of: Callable = dict) -> dict | None:
    """`settings_of` what a run's JSON file holds, its settings; None if there is no file yet.

    Raises:
        RunFolderError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return settings_of(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise RunFolderError(
            f"{path} is not the settings of a run ({type(error).__name__}: {error}): give another run_folder"
        ) from error


def differences(there: Mapping[str, object], now: Mapping[str, object]) -> str:
    """A line for each setting in which two runs differ; nothing where they agree."""
    differing = [key for key in now | there if now.get(key) != there.get(key)]
    return "\n".join(f"  {key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in differing)


def fingerprint(
    name: str,
    *,
    modules: Iterable[torch.nn.Module] = (),
    settings: Mapping[str, object] | None = None,
    version: int | str = 1,
) -> str:
    """A model's name and a digest, by which a run notices that it is being continued with another model.

    Args:
        name: for people, such as "ClipImage".
        modules: hold the weights that results depend on. The digest covers each parameter's and buffer's name in its
            module, its shape and its first 64 values.
        settings: JSON values that results depend on, such as an image size or a scheduler's configuration.
        version: change it when a change of code changes results.
    Returns:
        for example "ClipImage 3f2a9c0d5b6e7f81".
    Raises:
        TypeError: `settings` contains something that is not a JSON value.
    """
    plain = json.dumps([version, dict(settings or {})], sort_keys=True)
    digest = hashlib.blake2b(plain.encode(), digest_size=8)
    for i, module in enumerate(modules):
        for key, tensor in chain(module.named_parameters(), module.named_buffers()):
            digest.update(f"{i} {key} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().flatten()[:_PER_TENSOR].float().cpu().numpy().tobytes())
    return f"{name} {digest.hexdigest()}"


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if path.stem.isdigit())


def _add_part(folder: Path, table: pa.Table) -> None:
    number = max((int(path.stem) for path in _parts(folder)), default=-1) + 1
    write_whole(folder / f"{number:05d}.parquet", lambda path: pq.write_table(table, path, write_page_checksum=True))


def _read_parts(folder: Path, schema: pa.Schema) -> pd.DataFrame:
    """The rows of all whole parts; if a row occurs twice, the later one."""
    tables = [schema.empty_table(), *(table for path in _parts(folder) if (table := _read(path, schema)) is not None)]
    return pa.concat_tables(tables).to_pandas().drop_duplicates(_ROW, keep="last", ignore_index=True)


def _read(path: Path, schema: pa.Schema) -> pa.Table | None:
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        table.validate(full=True)
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, LookupError, ValueError, OSError) as error:
        # of the disk, the permissions, the memory or this pyarrow, not of the content
        if getattr(error, "errno", None) or isinstance(error, MemoryError) or not pa.Codec.is_available("snappy"):
            raise
        print(f"{printable(path)} is damaged ({error}); what it held is computed again")
        path.unlink()
        return None


def derive_seed(*parts: int | str) -> int:
    """One seed from whole numbers and strings, the same on every machine and in every Python.

    Returns:
        an int in [0, 2**31). Different parts, or the same in another order, give unrelated seeds; 1 and "1" differ.
    Raises:
        TypeError: for a part that is neither; a float's last digits may differ between machines.
    """
    plain = []
    for part in parts:
        try:
            plain.append(part if isinstance(part, str) else int(operator.index(part)))
        except TypeError:
            raise TypeError(
                f"a seed is derived from whole numbers and strings; got {part!r} ({type(part).__name__}): "
                "pass it as a string with as many digits as matter"
            ) from None
    digest = hashlib.blake2b(json.dumps(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def printable(text: object) -> str:
    """A path or text for people: control characters, and bytes of a file's name that are no UTF-8, are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it appears under its name only when it is complete, replacing an older one.

    Args:
        path: the file's final path; its folder must exist.
        write: writes the file to the path that it is given.
    """
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append a row to a log, on a line of its own even where a kill or a full disk has cut the last line."""
    with path.open("ab+") as log:
        cut = log.tell() and log.seek(-1, os.SEEK_END) >= 0 and log.read() != b"\n"
        log.write(b"\n" * bool(cut) + json.dumps(row).encode() + b"\n")


class Checkpoint:
    """Modules, optimizer state and moving average of the weights, in one file that is replaced as a whole.

    Args:
        run: the run's folder.
        recipe: has `modules` {name: module}, `parameters()` (those that are trained) and `average` (the decay of their
            moving average; 0: none).
        optimizer: of `recipe.parameters()`; None to read weights only.
        scaler: of the loss in half precision, if there is one; its scale and its count of good steps are kept too.
    """

    def __init__(
        self,
        run: Path,
        recipe,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        from diffusers.training_utils import EMAModel  # slow to import, and only training needs it

        self.file, self.modules = run / "state.safetensors", recipe.modules
        self.optimizer, self.scaler = optimizer, scaler
        self.parameters = list(recipe.parameters())
        self.average = EMAModel(self.parameters, decay=recipe.average, foreach=True) if recipe.average else None

    def follow(self) -> None:
        """Let the moving average follow the weights after a step, faster at first; see `EMAModel.get_decay`."""
        if self.average:
            self.average.step(self.parameters)

    def use_average(self) -> None:
        """Replace the weights by their moving average, if there is one."""
        if self.average:
            self.average.copy_to(self.parameters)

    def save(self, step: int, minutes: float) -> None:
        """Save the state after `step` steps and `minutes` of training, replacing the last checkpoint."""
        states = {name: module.state_dict() for name, module in self.modules.items()}
        states |= {f"optimizer.{i}": self.optimizer.state[p] for i, p in enumerate(self.parameters)}
        if self.average:
            states["average"] = {str(i): value for i, value in enumerate(self.average.shadow_params)}
        tensors = {
            f"{name}.{key}": value.detach().clone(memory_format=torch.contiguous_format)
            for name, state in states.items()
            for key, value in state.items()
        }
        followed = self.average.optimization_step if self.average else 0
        done = {"step": str(step), "minutes": str(minutes), "followed": str(followed)}
        done |= {"scaler": json.dumps(self.scaler.state_dict())} if self.scaler else {}
        write_whole(self.file, lambda path: save_file(tensors, path, metadata=done))

    def load(self) -> tuple[int, float]:
        """Load the saved state; returns its steps and minutes, or (0, 0.0) if there is no checkpoint.

        Raises:
            RunFolderError: the file is damaged or cut short, or of other modules.
        """
        if not self.file.exists():
            return 0, 0.0
        try:
            return self._load()
        except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError, OSError) as error:
            of_the_file = not getattr(error, "errno", None) or self.file.is_dir()
            if not of_the_file or "CUDA" in str(error) or "allocate" in str(error):
                raise  # of the disk, the permissions, the memory or the GPU: the file may be whole
            raise RunFolderError(
                f"{self.file} ({self.file.stat().st_size:,} bytes) is damaged, cut short or of another model ("
                f"{str(error).partition(chr(10))[0]}): put a whole copy in its place, or delete it to train from the "
                "start"
            ) from error

    def _load(self) -> tuple[int, float]:
        tensors = load_file(self.file)

        def state(name: str) -> dict[str, torch.Tensor]:
            return {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")}

        for name, module in self.modules.items():
            module.load_state_dict(state(name))
        for i, parameter in enumerate(self.parameters if self.optimizer else []):
            if moments := state(f"optimizer.{i}"):
                self.optimizer.state[parameter] = moments
        with safe_open(self.file, "pt") as file:
            done = file.metadata()
        if self.scaler and "scaler" in done:
            self.scaler.load_state_dict(json.loads(done["scaler"]))
        if self.average:
            values = [tensors[f"average.{i}"].to(p.device) for i, p in enumerate(self.parameters)]
            self.average.load_state_dict({"shadow_params": values, "optimization_step": int(done["followed"])})
        return int(done["step"]), float(done["minutes"])
