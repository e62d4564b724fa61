"""Execute the notebooks of the course: `python -m dalleflamingo course [--profile mini] [--out build] [notebooks…]`.

Each notebook runs from top to bottom in a kernel of its own. A small model gains nothing from a second thread and loses
much where other programs compute too, because each of its many tiny operations waits for the slowest thread. So a
kernel with the shipped models has one thread, and as many notebooks run at a time as there are cores. Downloaded models
share one GPU: their notebooks run one after another. Afterwards `build/` holds

    00_the_question.ipynb     the executed notebook
    course.json               time and peak memory of each
    figures/                  what the notebooks saved
    site/                     pages of all this, by `course.site`; they open without Python

A notebook finds that folder in the environment variable `DALLEFLAMINGO_OUTPUT` and saves its figures to
`$DALLEFLAMINGO_OUTPUT/figures`. A notebook that fails keeps its page up to the error, and the others still run. Every
file is written whole or not at all, so a killed run leaves no broken files; another run replaces them. A run of some
notebooks keeps the others that ran in the same profile.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

from dalleflamingo import profiles, registry, repository
from dalleflamingo.commands.parsers import command_parser
from dalleflamingo.course import colab, site
from dalleflamingo.runs import write_whole

try:
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from traitlets import default
    from traitlets.config import Config
except ImportError as error:
    raise ImportError(
        f"executing the course needs {error.name}, which the extra `course` brings: pip install 'dalleflamingo[course]'"
    ) from error

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
OUTPUT = "DALLEFLAMINGO_OUTPUT"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
MAX_WORKERS = 4
WORKER_BYTES = 1.5 * 2**30  # what a notebook with the shipped models needs at its peak


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
        figures = f"{self.notebook:<28} {site.minutes(self.seconds):>12}   peak {self.peak_bytes / 2**30:.1f} GiB"
        return figures if self.failure is None else f"{figures}   FAILED in {self.failure}"


class OwnKernelManager(AsyncKernelManager):
    """Starts the kernel of the Python that runs this program.

    By its name alone, "python3", a kernel would be looked up in the user's folders and those of JUPYTER_PATH too, where
    one of another environment may stand under that name.
    """

    @default("kernel_spec_manager")
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])  # none to look in: what ipykernel says of this Python is left


class NotebookRun(threading.Thread):
    """One notebook in one kernel, with a progress bar on a terminal.

    It is a thread, so that the main thread can watch the memory of all kernels and is the one that Ctrl-C interrupts.

    Args:
        path: the notebook; its kernel works in the folder of that file.
        environment: variables of the kernel.
    """

    def __init__(self, path: Path, environment: dict[str, str]):
        super().__init__(daemon=True)
        self.path, self.environment = path, environment
        self.notebook = nbformat.read(path, as_version=4)
        self.position = "the kernel's start"
        self.seconds, self.peak_bytes = 0.0, 0
        self.failure: str | None = None
        self._client: NotebookClient | None = None
        code_cells = sum(cell.cell_type == "code" for cell in self.notebook.cells)
        self._bar = tqdm(total=code_cells, desc=path.stem, unit="cell", leave=False, disable=not sys.stderr.isatty())

    def run(self) -> None:
        began = time.monotonic()
        self._client = NotebookClient(
            self.notebook,
            timeout=None,
            startup_timeout=300,  # the default, 60 s, is short for a busy machine
            kernel_name="python3",
            kernel_manager_class=OwnKernelManager,
            on_cell_execute=self._enter_cell,
            on_cell_executed=self._leave_cell,
            # Another user of this machine could otherwise listen to a kernel's port, which it says for every notebook.
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
        try:
            self._client.execute(cwd=str(self.path.resolve().parent), env=self.environment)
        except CellExecutionError as error:
            self.failure = f"{self.position}: {error.ename}: {error.evalue}".splitlines()[0]
        except DeadKernelError:
            self.failure = f"{self.position}: the kernel died; a machine that is short of memory does that"
        except Exception as error:  # a kernel that does not start, say: the other notebooks are still worth running
            self.failure = f"{self.position}: {type(error).__name__}: {error}"
        finally:
            self._bar.close()
            self.seconds = time.monotonic() - began

    def _enter_cell(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        number = sum(other.cell_type == "code" for other in self.notebook.cells[: cell_index + 1])
        first_line = cell.source.strip().splitlines()[0]
        self.position = f"code cell {number} ({first_line[:60]})"

    def _leave_cell(self, **_: object) -> None:
        self._bar.update()

    def measure_memory(self) -> None:
        """Take the memory of the kernel and of its children now into `peak_bytes`."""
        manager = self._client and self._client.km
        pid = getattr(getattr(manager, "provisioner", None), "pid", None)
        if pid is None:  # not started yet, or ended
            return
        try:
            kernel = psutil.Process(pid)
            processes = [kernel, *kernel.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        self.peak_bytes = max(self.peak_bytes, sum(map(_resident_bytes, processes)))

    def write(self, out: Path) -> Outcome:
        """Leave `NAME.ipynb` in the folder `out`; the notebook must have run.

        Args:
            out: the folder.
        """
        name = self.path.stem
        _write(out / f"{name}.ipynb", nbformat.writes(self.notebook))
        return Outcome(name, _title(self.notebook) or name, self.seconds, self.peak_bytes, self.failure)


def environment(profile: str, out: Path) -> dict[str, str]:
    """The variables of a kernel: this process's, the profile, the output folder; one thread and no hub if shipped.

    Args:
        profile: a name in `profiles.PROFILES`.
        out: the folder that the notebooks save to.
    Raises:
        ValueError: no such profile; the message lists them.
    """
    variables = os.environ | {profiles.VARIABLE: profile, OUTPUT: str(out), "TOKENIZERS_PARALLELISM": "false"}
    return variables | ONE_THREAD | {"HF_HUB_OFFLINE": "1"} if _is_shipped(profile) else variables


def default_workers(profile: str) -> int:
    """How many notebooks to run at a time: one a core, at most `MAX_WORKERS` and what the free memory holds.

    Args:
        profile: a name in `profiles.PROFILES`. Downloaded models share one GPU, so that theirs run one by one.
    Raises:
        ValueError: no such profile.
    """
    if not _is_shipped(profile):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MAX_WORKERS, int(psutil.virtual_memory().available / WORKER_BYTES)))


def _is_shipped(profile: str) -> bool:
    if profile not in profiles.PROFILES:
        raise ValueError(f"{profile!r} is not a profile: choose one of {', '.join(profiles.PROFILES)}")
    return registry.ENTRIES[profiles.PROFILES[profile].captioner].shipped


def run_course(paths: Sequence[Path], out: Path, profile: str, workers: int | None = None) -> list[Outcome]:
    """Execute notebooks, print a line for each as it ends, and keep course.json up to date.

    Args:
        paths: the notebooks. They start in this order, unless `out` holds a `course.json` of the same profile: then
            those that took longest start first.
        out: where executed notebooks and figures go; see the module's text.
        profile: a name in `profiles.PROFILES`.
        workers: notebooks that run at a time; None for `default_workers`.
    Returns:
        an outcome for each notebook, in the order of `paths`.
    Raises:
        ValueError: no such profile.
        FileNotFoundError: a notebook is not there.
        KeyboardInterrupt: after all kernels are ended and a line has said what is kept.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a notebook file; those of the course are in {NOTEBOOKS}")
    out = out.resolve()
    variables = environment(profile, out)
    workers = default_workers(profile) if workers is None else workers
    (out / "figures").mkdir(parents=True, exist_ok=True)
    waiting, running, outcomes = _longest_first(paths, out, profile), [], {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(NotebookRun(waiting.pop(0), variables))
                running[-1].start()
            time.sleep(0.2)
            for run in list(running):
                run.measure_memory()
                if not run.is_alive():
                    running.remove(run)
                    outcomes[run.path] = run.write(out)
                    _record(out, profile, outcomes[run.path])
                    _print(outcomes[run.path].line())
    except KeyboardInterrupt:
        _end(running)
        _print(f"\nInterrupted. {len(outcomes)} of {len(paths)} notebooks ran to their end and are kept in {out}.")
        for run in running:
            _print(f"stopped: {run.path.stem} in {run.position}")
        raise
    return [outcomes[path] for path in paths]


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Args:
        arguments: the command line behind `course`; None for that of this process.
    Returns:
        its exit status: 0, 1 if a notebook failed, 2 for a wrong argument, 130 if interrupted.
    """
    parser = command_parser("course", __doc__.split(":")[0] + ".")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every notebook of the course")
    default = os.environ.get(profiles.VARIABLE) or "mini"
    parser.add_argument("--profile", default=default, help=f"{', '.join(profiles.PROFILES)}; default: {default}")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder of the pages; default: build")
    parser.add_argument(
        "--workers", type=int, help=f"notebooks at a time; default: one a core, at most {MAX_WORKERS}; one on a GPU"
    )
    parser.add_argument(
        "--badges", action="store_true", help="only write the badges and cells for Colab, from project.urls"
    )
    options = parser.parse_args(arguments)
    paths = options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb"))
    if not paths:
        parser.error(f"no notebooks in {NOTEBOOKS}: the installed package has none, clone the repository and run there")
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers {options.workers}: at least one notebook must run at a time")

    if options.badges:
        colab.write_badges(sorted(NOTEBOOKS.glob("*.ipynb")), NOTEBOOKS.with_name("README.md"), repository())
        return 0
    began = time.monotonic()
    try:
        workers = min(options.workers or default_workers(options.profile), len(paths))
        print(f"{len(paths)} notebooks, {workers} at a time, profile {options.profile}", flush=True)
        outcomes = run_course(paths, options.out, options.profile, workers)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        site.build(options.out, options.out / "site", paths)
        print("The same command starts afresh; with the name of a notebook it executes only that one.")
        return 130

    site.build(options.out, options.out / "site", paths)
    failed = sum(outcome.failure is not None for outcome in outcomes)
    figures = len([file for file in (options.out / "figures").rglob("*") if file.is_file()])
    total = site.minutes(time.monotonic() - began)
    print(f"{len(outcomes) - failed} of {len(outcomes)} notebooks ran to their end, in {total}.")
    print(f"Executed notebooks: {options.out}/   figures ({figures}): {options.out}/figures/")
    page = (options.out / "site" / "index.html").resolve()
    print(f"Open {page} in a browser, or `make lab` to work on the notebooks.")
    return 1 if failed else 0


def _longest_first(paths: Sequence[Path], out: Path, profile: str) -> list[Path]:
    """The notebooks by the time they took in the last run of this profile; those that nobody has timed come first."""
    try:
        record = json.loads((out / "course.json").read_text(encoding="utf-8"))
        seconds = {entry["notebook"]: entry["seconds"] for entry in record["notebooks"]}
    except (OSError, ValueError, KeyError):
        return list(paths)
    if record.get("profile") != profile:
        return list(paths)
    return sorted(paths, key=lambda path: -seconds.get(path.stem, float("inf")))


def _end(running: Sequence[NotebookRun]) -> None:
    """Kill the kernels with their children until no notebook runs any more; one may be starting just now."""
    while any(run.is_alive() for run in running):
        for child in psutil.Process().children(recursive=True):
            child.kill()
        time.sleep(0.1)


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return 0


def _title(notebook: nbformat.NotebookNode) -> str | None:
    """The first markdown heading."""
    for cell in notebook.cells:
        heading = re.search(r"^#+\s*(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if heading:
            return heading[1].strip()
    return None


def _print(line: str) -> None:
    """Print above the progress bars, at once."""
    tqdm.write(line)
    sys.stdout.flush()


def _record(out: Path, profile: str, outcome: Outcome) -> None:
    """Put an outcome into course.json, in the place of an earlier one; those of another profile are forgotten."""
    record = site.read_record(out)
    entries = record["notebooks"] if record.get("profile") == profile else []
    others = [entry for entry in entries if entry["notebook"] != outcome.notebook]
    notebooks = sorted([*others, asdict(outcome)], key=lambda entry: entry["notebook"])
    _write(out / "course.json", json.dumps({"profile": profile, "notebooks": notebooks}, indent=2))


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
