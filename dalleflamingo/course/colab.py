"""Google Colab: the first cell of every notebook, the badges that open it there, and what the cell calls.

    python -m dalleflamingo course --badges     write cell and badges anew, from `project.urls` in pyproject.toml

A runtime loses its environment variables when it restarts, and all its files when it disconnects. So the cell sets the
variables each time it runs, and repeats nothing else that is there already. The packages of the course come only with
`begin`: until then this module has the standard library.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dalleflamingo import __version__
from dalleflamingo.course import RUNS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dalleflamingo.profiles import Profile

ROOT = Path(__file__).resolve().parents[2]
DRIVE = Path("/content/drive")
TAG = f"v{__version__}"
CELL = "colab"  # id of the first cell
_METADATA = {  # Colab shows the form of the cell, JupyterLab folds its code, and the site leaves it out
    "cellView": "form",
    "jupyter": {"source_hidden": True},
    "tags": ["remove-cell"],
}
_SOURCE = """\
# @title On Google Colab, run this cell first. Elsewhere it does nothing.
import {needs}
import sys
from pathlib import Path

keep_runs_in_drive = False  # @param {{type: "boolean"}}
if "google.colab" in sys.modules:
    clone = Path("/content/dalleflamingo-course")
{fetch}
    sys.path.insert(0, str(clone))
    from dalleflamingo.course import colab

    colab.begin("{notebook}", keep_runs_in_drive)
"""
_CLONE = """\
    git = ["git", "clone", "--depth=1", "--branch={tag}"]
    git += ["{address}", str(clone)]
    if not clone.is_dir():
        print("Fetching the course (60 MB) …")
        cloned = subprocess.run(git, capture_output=True, text=True)
        assert clone.is_dir(), cloned.stderr"""
_UNPACK = """\
    if not clone.is_dir():
        assert Path("/content/course.zip").is_file(), (
            "The course is in no public repository yet. Make course.zip in your copy by"
            " `git archive -o course.zip HEAD`, upload it (folder symbol on the left),"
            " and run this cell again."
        )
        shutil.unpack_archive("/content/course.zip", clone)"""
_BADGE = re.compile(r"\n\n\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
_JOURNEY = ("captioner", "generator", "clip", "dino")
OPENS = {  # notebook -> the models and data sets that it opens, as fields of the profile
    "00_the_question": {*_JOURNEY, "dataset"},
    "01_how_the_models_work": {*_JOURNEY, "dataset"},
    "02_tokenizer_mapping": set(),
    "03_differentiable_bridge": {*_JOURNEY, "dataset"},
    "04_image_text_image": {*_JOURNEY, "dataset"},
    "05_text_image_text": {*_JOURNEY, "inception", "dataset"},
    "06_cycle_finetuning": {"captioner", "generator", "coco"},
    "07_ablations": {"captioner", "generator", "clip", "dataset", "coco"},
    "08_the_real_models": {*_JOURNEY, "dataset"},
}
_TRAINS = "coco"  # a notebook that opens it trains, for which models are in float32
PHOTOGRAPHS_MB = {"dataset": 96, "coco": 130}  # of all notebooks together; each is fetched when it is opened
MB_PER_SECOND = 50  # that the time of a download is reckoned with


def first_cell(notebook: str, address: str) -> dict:
    """The first code cell of a notebook.

    Args:
        notebook: its file name without suffix.
        address: of the public repository; "" while there is none, and the learner brings the course along.
    """
    needs, fetch = ("subprocess", _CLONE.format(tag=TAG, address=address)) if address else ("shutil", _UNPACK)
    source = _SOURCE.format(needs=needs, fetch=fetch, notebook=notebook).strip()
    cell = {"cell_type": "code", "execution_count": None, "id": CELL, "metadata": _METADATA, "outputs": []}
    return cell | {"source": source.splitlines(keepends=True)}


def with_badge(text: str, notebook: str, address: str) -> str:
    """Markdown with a badge below its first heading that opens a notebook in Colab; without one where address is "".

    Args:
        text: with or without a badge.
        notebook: its file name without suffix.
        address: of the public repository.
    Raises:
        ValueError: the repository is not on GitHub, from where alone Colab opens notebooks.
    """
    text = _BADGE.sub("", text)
    if not address:
        return text
    owner_and_name = address.removesuffix("/").removesuffix(".git").removeprefix("https://github.com/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", owner_and_name):
        raise ValueError(f"Repository = {address!r}: Colab opens notebooks of https://github.com/OWNER/NAME alone")
    page = f"https://colab.research.google.com/github/{owner_and_name}/blob/{TAG}/notebooks/{notebook}.ipynb"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return re.sub(r"(?m)^# .*$", lambda title: f"{title[0]}\n\n[![Open in Colab]({image})]({page})", text, count=1)


def prepared(notebook: dict, name: str, address: str) -> dict:
    """A notebook with its badge and its first code cell; arguments and errors as `with_badge`.

    Args:
        notebook: as JSON; its first cell holds the title.
        name: of the file, without suffix.
        address: of the public repository.
    """
    title, *others = [cell for cell in notebook["cells"] if cell["id"] != CELL]
    text = with_badge("".join(title["source"]), name, address)
    first = next(i for i, cell in enumerate(others) if cell["cell_type"] == "code")
    title = title | {"source": text.splitlines(keepends=True)}
    return notebook | {"cells": [title, *others[:first], first_cell(name, address), *others[first:]]}


def write_badges(notebooks: Sequence[Path], readme: Path, address: str) -> None:
    """Write the badges and first cells anew.

    Args:
        notebooks: their files, in order; the README opens the first.
        readme: its file.
        address: of the public repository, "" while there is none.
    Raises:
        ValueError: as `with_badge`.
    """
    for path in notebooks:
        notebook = prepared(json.loads(path.read_text(encoding="utf-8")), path.stem, address)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = with_badge(readme.read_text(encoding="utf-8"), notebooks[0].stem, address)
    readme.write_text(text, encoding="utf-8")


# ── on Colab ──


def begin(notebook: str, keep_runs_in_drive: bool = False) -> None:
    """Get a runtime ready for a notebook, and show a first ranked image. What is there already is not done again.

    Args:
        notebook: its file name without suffix.
        keep_runs_in_drive: keep the run folders of the notebooks in the user's Google Drive, which Colab asks for.
    Raises:
        RuntimeError: as `install`.
    """
    install()
    if keep_runs_in_drive:
        mount_drive()

    from IPython.display import display

    from dalleflamingo.miniature import corpora

    profile = choose_profile()
    corpora.prepare()
    display(first_journey(ROOT / "runs" / "first"))
    print(f"An image of the miniature, and what came back of it: all is ready. Profile: {profile.name}.")
    print(downloads(notebook, profile))
    if RUNS in os.environ:
        print(f"The notebooks keep their runs in {os.environ[RUNS]}, and go on there after a disconnect.")
    else:
        print("Runs are lost when Colab disconnects: tick keep_runs_in_drive and run this cell again to keep them.")


def install() -> None:
    """Install the course with pip beside Colab's own packages, once in a runtime.

    Raises:
        RuntimeError: pip fails; the message has what it says.
    """
    done = ROOT / "build" / "installed"
    if done.exists():
        return
    print("Installing packages beside Colab's own (200 MB, about a minute) …")
    before = _versions()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}[colab]"]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        raise RuntimeError(f"pip could not install the course; run this cell again, or mend this:\n{pip.stderr}")
    done.parent.mkdir(exist_ok=True)
    done.touch()
    after = before | _versions()
    if replaced := [f"{name} {was} by {after[name]}" for name, was in before.items() if after[name] != was]:
        print(f"pip replaced {', '.join(replaced)}: choose Runtime > Restart session, and run this cell again.")


def _versions() -> dict[str, str]:
    """Name -> version of all packages; of several versions, the one that is imported."""
    return {found.name: found.version for found in reversed(list(metadata.distributions()))}


def mount_drive() -> None:
    """Mount Google Drive, and let notebooks keep their runs there, apart from those of another version."""
    from google.colab import drive

    drive.mount(str(DRIVE))
    os.environ[RUNS] = str(DRIVE / "MyDrive" / f"dalleflamingo-{__version__}")


def choose_profile() -> "Profile":
    """The profile that is named already, else colab with a GPU and mini without; says what the GPU is, or is not."""
    from dalleflamingo import profiles
    from dalleflamingo.course import doctor

    gpu = doctor.check_gpu(profiles.PROFILES["colab"])
    print(gpu)
    os.environ.setdefault(profiles.VARIABLE, "mini" if gpu.state == "missing" else "colab")
    return profiles.current()


def downloads(notebook: str, profile: "Profile") -> str:
    """What a notebook will download in a profile, how large it is, and about how long that takes.

    Args:
        notebook: its file name without suffix.
        profile: any.
    """
    import torch

    from dalleflamingo import registry
    from dalleflamingo.course import doctor

    fields = OPENS[notebook]
    entries = {field: registry.entry_of(getattr(profile, field)) for field in sorted(fields)}
    halved = profile.torch_dtype == torch.float16 and _TRAINS not in fields
    models = [entry for entry in entries.values() if entry.kind != "data set"]
    sizes = {entry.name: size for entry, size in doctor.models_to_download(models, halved)}
    for field, size in PHOTOGRAPHS_MB.items():
        if field in entries and not entries[field].shipped:
            sizes[f"photographs of {entries[field].name}, at most"] = size
    if not sizes:
        return f"Notebook {notebook} downloads nothing."
    listed = ", ".join(f"{name} {size:,} MB" for name, size in sizes.items())
    minutes = max(1, round(sum(sizes.values()) / MB_PER_SECOND / 60))
    return (
        f"Notebook {notebook} will download {sum(sizes.values()) / 1000:.1f} GB ({listed}), when it first needs it: "
        f"about {minutes} minute{'s' * (minutes > 1)} at {MB_PER_SECOND} MB/s."
    )


def first_journey(folder: Path) -> "Figure":
    """An image of the miniature and, best first, its sampled captions with the image generated from each.

    Args:
        folder: of the run, in which it goes on.
    """
    from dalleflamingo import JourneySettings, image_text_image, load_dataset, load_models, profiles
    from dalleflamingo.course import show

    mini = profiles.PROFILES["mini"]
    dataset = load_dataset(mini.dataset).subset(1, seed=3)  # the image of notebook 00
    table = image_text_image(dataset, *load_models(mini), folder, JourneySettings.of(mini))
    return show.ranked_captions(dataset[0], table, folder, by="clip")
