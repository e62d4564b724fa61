"""Execute the notebooks of the course: `python -m dalleflamingo course [--profile mini] [--out build] [notebooks…]`.

Each notebook runs top to bottom in a fresh kernel with two CPU threads; the miniature profiles run with the model hubs
switched off. What lies in `build/` afterwards opens without Python:

    index.html                the pages, with the time and the peak memory of each
    00_the_question.html      one page a notebook, pictures inside
    00_the_question.ipynb     the executed notebook
    course.json               the same figures for programs
    figures/                  what the notebooks saved

A notebook finds that folder in the environment variable `DALLEFLAMINGO_OUTPUT` and saves its figures to
`$DALLEFLAMINGO_OUTPUT/figures`. A notebook that fails keeps its page up to the error, and the others still run. Every
file is written beside its place and then moved there, so a killed run leaves whole files only; another run replaces
them.
"""

import argparse
import base64
import html
import json
import os
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

from dalleflamingo import profiles

try:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbconvert import HTMLExporter
    from traitlets.config import Config
except ImportError as error:
    raise ImportError(
        f"executing the course needs {error.name}, which the extra `course` brings: pip install 'dalleflamingo[course]'"
    ) from error

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
OUTPUT = "DALLEFLAMINGO_OUTPUT"
THREADS = {name: "2" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


@dataclass(frozen=True)
class Outcome:
    """How one notebook went.

    Attributes:
        notebook: its file name without suffix.
        title: its first heading.
        seconds: wall time of the kernel's life, start included.
        peak_bytes: largest resident memory of the kernel with all its child processes, sampled; pages that two
            processes share count twice.
        failure: None, or which cell failed and how.
    """

    notebook: str
    title: str
    seconds: float
    peak_bytes: int
    failure: str | None

    def line(self) -> str:
        """One line for a person: name, time, peak memory, and the failing cell if there is one."""
        figures = f"{self.notebook:<28} {_minutes(self.seconds):>12}   peak {self.peak_bytes / 2**30:.1f} GiB"
        return figures if self.failure is None else f"{figures}   FAILED in {self.failure}"


class _Run(threading.Thread):
    """One notebook in one kernel; a thread, so that the caller can watch its memory and a Ctrl-C reaches the caller."""

    def __init__(self, notebook: nbformat.NotebookNode, folder: Path, environment: dict[str, str], name: str):
        super().__init__(daemon=True)
        self.notebook, self.folder, self.environment = notebook, folder, environment
        self.failure: str | None = None
        self._place = "the kernel's start"
        code_cells = sum(cell.cell_type == "code" for cell in notebook.cells)
        self._bar = tqdm(total=code_cells, desc=name, unit="cell", leave=False, disable=not sys.stderr.isatty())

    def _enter(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        number = sum(other.cell_type == "code" for other in self.notebook.cells[: cell_index + 1])
        first_line = cell.source.strip().splitlines()[0]
        self._place = f"code cell {number} ({first_line[:60]})"

    def _leave(self, **_: object) -> None:
        self._bar.update()

    def run(self) -> None:
        client = NotebookClient(
            self.notebook,
            timeout=None,
            startup_timeout=300,  # the default, 60 s, is short for a busy machine
            kernel_name="python3",
            on_cell_execute=self._enter,
            on_cell_executed=self._leave,
            # Another user of this machine could otherwise listen to a kernel's port, which it says for every notebook.
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
        try:
            client.execute(cwd=str(self.folder), env=self.environment)
        except CellExecutionError as error:
            self.failure = f"{self._place}: {error.ename}: {error.evalue}".splitlines()[0]
        except DeadKernelError:
            self.failure = f"{self._place}: the kernel died; a machine that is short of memory does that"
        except Exception as error:  # a kernel that does not start, say: the other notebooks are still worth running
            self.failure = f"{self._place}: {type(error).__name__}: {error}"
        finally:
            self._bar.close()


def environment(profile: str, out: Path) -> dict[str, str]:
    """The variables a kernel gets: this process's, the profile, the output folder, two threads, no hub if miniature.

    Raises:
        ValueError: no such profile; the message lists them.
    """
    if profile not in profiles.PROFILES:
        raise ValueError(f"{profile!r} is not a profile: choose one of {', '.join(profiles.PROFILES)}")
    variables = os.environ | THREADS | {profiles.VARIABLE: profile, OUTPUT: str(out), "TOKENIZERS_PARALLELISM": "false"}
    if profiles.PROFILES[profile].captioner.startswith("miniature/"):
        variables |= {"HF_HUB_OFFLINE": "1"}
    return variables


def execute(path: Path, out: Path, variables: dict[str, str]) -> Outcome:
    """Run one notebook in its own folder and leave `NAME.ipynb` and `NAME.html` in `out`.

    Raises:
        KeyboardInterrupt: after the kernel and its children are ended.
    """
    began, peak = time.monotonic(), 0
    notebook = nbformat.read(path, as_version=4)
    run = _Run(notebook, path.resolve().parent, variables, path.stem)
    run.start()
    try:
        while run.is_alive():
            peak = max(peak, _children_memory())
            run.join(timeout=0.2)
    except KeyboardInterrupt:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        raise
    outcome = Outcome(path.stem, _title(notebook) or path.stem, time.monotonic() - began, peak, run.failure)
    page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    _write(out / f"{path.stem}.ipynb", nbformat.writes(notebook))
    _write(out / f"{path.stem}.html", with_pictures(page, path.parent))
    return outcome


def with_pictures(page: str, folder: Path) -> str:
    """The page with the PNG files inside that its text shows, named as seen from `folder`.

    nbconvert's own `embed_images` closes every <details> before its content, and so shows what it is to hide.
    """

    def inside(image: re.Match) -> str:
        picture = folder / image[2]
        if not picture.is_file():
            return image[0]
        return f'{image[1]}data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"'

    return re.sub(r'(<img[^>]*? src=")([^":]+\.png)"', inside, page)


def index(outcomes: list[Outcome], profile: str) -> str:
    """The page that links all others; everything that came out of a notebook is escaped."""
    rows = "\n".join(
        f'<tr><td><a href="{html.escape(o.notebook)}.html">{html.escape(o.title)}</a></td>'
        f"<td>{_minutes(o.seconds)}</td><td>{o.peak_bytes / 2**30:.1f} GiB</td>"
        f"<td>{html.escape('ran to its end' if o.failure is None else 'failed in ' + o.failure)}</td></tr>"
        for o in outcomes
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>dalleflamingo</title>\n'
        "<style>body{font-family:sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "td,th{text-align:left;padding:.3rem 1rem .3rem 0;vertical-align:top}</style>\n"
        "<h1>Do DALL-E and Flamingo understand each other?</h1>\n"
        f"<p>The notebooks as executed in profile <b>{html.escape(profile)}</b>.</p>\n"
        f"<table><tr><th>notebook</th><th>time</th><th>peak memory</th><th></th></tr>\n{rows}\n</table></html>\n"
    )


def run_course(paths: list[Path], out: Path, profile: str) -> list[Outcome]:
    """Execute the notebooks in order, print a line for each, write the index; see the module's text for the files.

    Raises:
        ValueError: no such profile.
        FileNotFoundError: a notebook is not there.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a notebook file; those of the course are in {NOTEBOOKS}")
    out = out.resolve()
    variables = environment(profile, out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    outcomes = []
    for path in paths:
        outcomes.append(execute(path, out, variables))
        print(outcomes[-1].line(), flush=True)
        _write(out / "index.html", index(outcomes, profile))
        record = {"profile": profile, "notebooks": [asdict(outcome) for outcome in outcomes]}
        _write(out / "course.json", json.dumps(record, indent=2))
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 if a notebook failed, 2 for a wrong argument, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo course", description=__doc__.split(":")[0] + ".")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook of the course")
    default = os.environ.get(profiles.VARIABLE) or "mini"
    parser.add_argument("--profile", default=default, help=f"{', '.join(profiles.PROFILES)}; default: {default}")
    parser.add_argument("--out", type=Path, default=Path("build"), help="default: build")
    options = parser.parse_args(arguments)
    paths = options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb"))
    if not paths:
        parser.error(f"no notebooks in {NOTEBOOKS}: the installed package has none, clone the repository and run there")

    print(f"{len(paths)} notebooks, profile {options.profile}", flush=True)
    try:
        outcomes = run_course(paths, options.out, options.profile)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"\nInterrupted. The notebooks finished so far are in {options.out}/; the same command starts afresh.")
        return 130

    failed = sum(outcome.failure is not None for outcome in outcomes)
    figures = len([file for file in (options.out / "figures").rglob("*") if file.is_file()])
    total = _minutes(sum(outcome.seconds for outcome in outcomes))
    print(f"{len(outcomes) - failed} of {len(outcomes)} notebooks ran to their end, in {total}.")
    print(f"Pages and executed notebooks: {options.out}/   figures ({figures}): {options.out}/figures/")
    print(f"Open {(options.out / 'index.html').resolve()} in a browser, or `make lab` to work on the notebooks.")
    return 1 if failed else 0


def _children_memory() -> int:
    """Resident bytes of all processes below this one; those that end while we look count 0.

    One that has only just forked still shows our own memory as its own, and our own command line; it is left out.
    """
    total, ours = 0, psutil.Process().cmdline()
    for child in psutil.Process().children(recursive=True):
        try:
            total += child.memory_info().rss if child.cmdline() != ours else 0
        except psutil.NoSuchProcess:
            continue
    return total


def _title(notebook: nbformat.NotebookNode) -> str | None:
    """The first markdown heading."""
    for cell in notebook.cells:
        heading = re.search(r"^#+\s*(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if heading:
            return heading[1].strip()
    return None


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
