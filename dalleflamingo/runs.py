"""A run folder: finished work on disk, in whole parts, so that a run killed at any moment goes on where it was.

    run.json            the settings; another run does not mix its rows into this folder
    parts/00000.parquet rows of a few images, written when all their pictures are
    pictures/*.png
    scores/clip …/00000.parquet  of those rows by one similarity; another adds its own, and nothing is made again
    candidates.parquet  the table, at the end
    skipped.json        inputs that could not be read, at the end

A file appears under its name only when it is complete: it is written beside it and renamed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL.Image import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_ROW = ["image_id", "candidate"]  # what names a row
_SCORES = pa.schema({"image_id": pa.int64(), "candidate": pa.int64(), "score": pa.float64()})
_PER_TENSOR = 64  # values of each weight tensor that go into a model's digest; training changes every tensor


class RunFolderError(ValueError):
    """The folder belongs to another run; the message says how the two differ and what to do."""


class RunFolder:
    """A folder of one run, new or to be continued.

    Args:
        settings: JSON values that every row depends on.
        schema: columns of the rows; (image_id, candidate) names a row.
    Raises:
        RunFolderError: the folder was made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], schema: pa.Schema):
        self.folder, self.schema = Path(folder), schema
        for name in ("parts", "pictures"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._agree(settings)

    def save_image(self, name: str, picture: Image) -> str:
        """Save as PNG; returns the path relative to the folder."""
        relative = f"pictures/{name}.png"
        _whole(self.folder / relative, lambda path: picture.save(path, format="PNG"))
        return relative

    def add(self, rows: list[dict]) -> None:
        """Keep rows as a new part; their pictures must have been saved."""
        _add_part(self.folder / "parts", pa.Table.from_pylist(rows, self.schema))

    def rows(self) -> pd.DataFrame:
        """All kept rows whose pictures are there. A damaged part is removed, with a line that says so."""
        rows = _read_parts(self.folder / "parts", self.schema)
        pictures = {f"pictures/{path.name}" for path in (self.folder / "pictures").glob("*.png")}
        whole = rows[rows.picture.isin(pictures).groupby(rows.image_id).transform("all").astype(bool)]
        return whole.reset_index(drop=True)

    def add_scores(self, key: str, rows: Sequence[Mapping], values: Sequence[float]) -> None:
        """Keep what the similarity `key` gives to rows, as a new part."""
        ids = [{name: row[name] for name in _ROW} for row in rows]
        scored = [row | {"score": value} for row, value in zip(ids, values, strict=True)]
        folder = self._scores(key)
        folder.mkdir(parents=True, exist_ok=True)
        _add_part(folder, pa.Table.from_pylist(scored, _SCORES))

    def scores(self, key: str) -> pd.DataFrame:
        """What the similarity `key` gave so far: columns image_id, candidate, score."""
        return _read_parts(self._scores(key), _SCORES)

    def finish(self, table: pd.DataFrame, skipped: list[dict]) -> Path:
        """Write the table, rows with a column for each similarity, and the skipped inputs; returns the table's path."""
        _whole(self.folder / "skipped.json", lambda path: path.write_text(json.dumps(skipped, indent=1) + "\n"))
        similarities = [pa.field(name, pa.float64()) for name in table if name not in self.schema.names]
        arrow = pa.Table.from_pandas(table, pa.schema([*self.schema, *similarities]), preserve_index=False)
        _whole(self.folder / "candidates.parquet", lambda path: pq.write_table(arrow, path))
        return self.folder / "candidates.parquet"

    def _scores(self, key: str) -> Path:
        return self.folder / "scores" / quote(key, safe=" ")

    def _agree(self, settings: Mapping[str, object]) -> None:
        path = self.folder / "run.json"
        now = json.loads(json.dumps(settings))
        if path.exists():
            there = _load_settings(path)
            if lines := differences(there, now):
                raise RunFolderError(
                    f"{self.folder} holds a run with other settings:\n{lines}\nGive another run_folder, or delete this "
                    "one to start again. (The code after a model's class is a digest of its weights.)"
                )
        elif _parts(self.folder / "parts"):
            raise RunFolderError(f"{self.folder} holds parts but no run.json to say of which run: give another folder")
        else:
            _whole(path, lambda part: part.write_text(json.dumps({"settings": now}, indent=1) + "\n"))


def differences(there: Mapping[str, object], now: Mapping[str, object]) -> str:
    """A line for each setting in which two runs differ; nothing where they agree."""
    differing = [key for key in now | there if now.get(key) != there.get(key)]
    return "\n".join(f"  {key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in differing)


def describe(model: object) -> str:
    """A model's class and a digest of its weights and settings, so that a run is not continued by a retrained model."""
    digest = hashlib.blake2b(digest_size=8)
    for key, value in sorted(vars(model).items()):
        for name, part in getattr(value, "components", {key: value}).items():  # a diffusers pipeline has components
            if isinstance(part, torch.nn.Module):
                for parameter_name, tensor in part.named_parameters():
                    digest.update(f"{name}.{parameter_name}{tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().flatten()[:_PER_TENSOR].float().cpu().numpy().tobytes())
            elif isinstance(part, torch.Tensor):
                digest.update(part.cpu().numpy().tobytes())
            elif hasattr(part, "add_noise"):  # a scheduler
                config = {setting: part.config[setting] for setting in part.config if not setting.startswith("_")}
                digest.update(f"{type(part).__name__}{json.dumps(config, sort_keys=True, default=str)}".encode())
            elif isinstance(part, (str, int, float, bool)):
                digest.update(f"{name}={part!r}".encode())
            elif code := getattr(part, "__code__", None):  # a function of one's own, which may be written anew
                digest.update(code.co_code + repr((code.co_names, code.co_consts)).encode())
    return f"{type(model).__name__} {digest.hexdigest()}"


def _load_settings(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text())["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} is not the settings of a run ({type(error).__name__}: {error}): give another run_folder"
        ) from error


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if path.stem.isdigit())


def _add_part(folder: Path, table: pa.Table) -> None:
    number = max((int(path.stem) for path in _parts(folder)), default=-1) + 1
    _whole(folder / f"{number:05d}.parquet", lambda path: pq.write_table(table, path))


def _read_parts(folder: Path, schema: pa.Schema) -> pd.DataFrame:
    """The rows of all whole parts; of a row that was made twice, the later."""
    tables = [schema.empty_table(), *(table for path in _parts(folder) if (table := _read(path)) is not None)]
    return pa.concat_tables(tables).to_pandas().drop_duplicates(_ROW, keep="last", ignore_index=True)


def _read(path: Path) -> pa.Table | None:
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk or the permissions, not the content
            raise
        print(f"{path} is damaged ({error}); its images are made again")
        path.unlink()
        return None


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


class Checkpoint:
    """Modules, optimizer moments and moving average of the weights, in one file that is replaced as a whole.

    Args:
        run: folder of the run.
        recipe: names the modules, the trained parameters and the average's decay (0 for none).
        optimizer: of `recipe.parameters()`; None to read weights only.
    """

    def __init__(self, run: Path, recipe, optimizer: torch.optim.Optimizer | None = None):
        self.file, self.modules, self.optimizer = run / "state.safetensors", recipe.modules, optimizer
        self.decay, self.parameters = recipe.average, list(recipe.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters] if self.decay else []
        self.followed = 0

    @torch.no_grad()
    def follow(self) -> None:
        """Let the moving average follow the weights, faster at first."""
        self.followed += 1
        decay = min(self.decay, self.followed / (self.followed + 10))
        if self.average:
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average, where there is one, in place of the weights."""
        for parameter, average in zip(self.parameters, self.average, strict=False):
            parameter.copy_(average)

    def save(self, step: int, minutes: float) -> None:
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"optimizer.{i}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        tensors |= {f"average.{i}": value for i, value in enumerate(self.average)}
        tensors = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        partial = self.file.with_suffix(".partial")
        save_file(
            tensors, partial, metadata={"step": str(step), "minutes": str(minutes), "followed": str(self.followed)}
        )
        os.replace(partial, self.file)

    def load(self) -> tuple[int, float]:
        """Steps and minutes done so far; (0, 0.0) where there is no checkpoint."""
        if not self.file.exists():
            return 0, 0.0
        tensors = load_file(self.file)
        for name, module in self.modules.items():
            prefix = f"{name}."
            module.load_state_dict(
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            )
        for i, parameter in enumerate(self.parameters if self.optimizer else []):
            moments = {
                key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"optimizer.{i}.")
            }
            if moments:
                self.optimizer.state[parameter] = moments
        self.average = [tensors[f"average.{i}"].to(average.device) for i, average in enumerate(self.average)]
        with safe_open(self.file, "pt") as state:
            done = state.metadata()
        self.followed = int(done["followed"])
        return int(done["step"]), float(done["minutes"])


def load_trained(recipe, run: Path) -> tuple[int, float]:
    """Give `recipe` the (averaged) weights that `run` has reached; returns its steps and minutes.

    Raises:
        FileNotFoundError: if the run holds no checkpoint.
    """
    checkpoint = Checkpoint(run, recipe)
    if not checkpoint.file.exists():
        raise FileNotFoundError(
            f"{checkpoint.file} is missing: train it first, `python -m dalleflamingo train {run.name}`"
        )
    done = checkpoint.load()
    checkpoint.use_average()
    return done
