"""The repair, measured: what each loss alone teaches a damaged model, and what it cannot teach.

    python -m dalleflamingo research repair        about an hour on one core

Every run has a folder, and the same command in a second terminal takes the runs that no other process is working on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from dalleflamingo import profiles
from dalleflamingo.course import show
from dalleflamingo.evaluation.intervals import Interval, resample
from dalleflamingo.profiles import Profile
from dalleflamingo.research import pages, repair
from dalleflamingo.research.options import parse, positive, study_parser
from dalleflamingo.research.ranking import ALL
from dalleflamingo.research.repair import ARMS, DAMAGE, PATIENTS, SEED, SORTS, Arm, Sizes
from dalleflamingo.research.resampling import bootstrap_of_runs
from dalleflamingo.runs import write_whole
from dalleflamingo.sources.models import load_captioner, load_generator

COMMAND = "python -m dalleflamingo research repair"
INTACT = 0  # in the place of the loss: the model as it is, not damaged
CHECKUPS = 6  # on the way
SCORE = {  # patient -> what a check-up measures
    repair.CAPTIONER: "scene-graph F1 of captions by beam search",
    repair.GENERATOR: "share of things right in kind and colour",
}


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_all(profile: Profile, folder: Path, seeds: int, steps: int, sizes: Sizes) -> bool:
    """Train every arm from every seed, going on where an earlier call was; False if another process is at some of it.

    Args:
        profile: of the miniature.
        folder: gets a folder for each run.
        seeds: of training.
        steps: of each run.
        sizes: of the check-ups.
    """
    wanted = [(arm, seed) for seed in range(seeds) for arm in ARMS]
    complete = True
    folder.mkdir(parents=True, exist_ok=True)
    for arm, seed in tqdm(wanted, desc="repair", unit="run"):
        own = folder / f"{arm.name}-{seed}"
        try:
            with FileLock(f"{own}.lock", timeout=0):
                if not (own / "result.parquet").exists():
                    config = arm.config(profile, seed=seed, steps=steps, validate_every=-(-steps // CHECKUPS))
                    _keep(repair.repair(config, arm.patient, sizes, profile, own), own)
        except Timeout:
            complete = False
    for patient in PATIENTS:
        own = folder / f"{patient}-intact"
        if complete and not (own / "result.parquet").exists():
            models = load_captioner(profile), load_generator(profile, scheduler=repair.SCHEDULER)
            _keep(repair.checkup_of(patient, *models, sizes, profile)(own / "images").assign(step=0), own)
    return complete


def _keep(table: pd.DataFrame, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "result.parquet", table.to_parquet)


def read(folder: Path, seeds: int) -> pd.DataFrame:
    """The check-ups of all runs: columns patient, loss (`INTACT`: 0), seed, step, item, sort, told, facts, caption.

    Args:
        folder: of `run_all`.
        seeds: of training.
    """
    parts = [
        pd.read_parquet(folder / f"{arm.name}-{seed}" / "result.parquet").assign(
            patient=arm.patient, loss=arm.loss, seed=seed
        )
        for arm in ARMS
        for seed in range(seeds)
    ]
    parts += [
        pd.read_parquet(folder / f"{patient}-intact" / "result.parquet").assign(patient=patient, loss=INTACT, seed=0)
        for patient in PATIENTS
    ]
    return pd.concat(parts, ignore_index=True)


# ── what the check-ups say ───────────────────────────────────────────────────────────────────────────────────────────


def score(
    table: pd.DataFrame, patient: str, loss: int, step: int, sort: str = ALL, minus: int | None = None
) -> Interval:
    """How much of what there is to tell is told; mean over seeds, which the bootstrap draws anew, and then the items.

    Args:
        table: of `read`, or of the check-ups of one run with its patient, loss and seed.
        patient: the damaged model.
        loss: that trained it.
        step: of training.
        sort: of facts.
        minus: the difference to another loss at its last step, on the same items; `INTACT`: to the intact model.
    Raises:
        ValueError: there is nothing to tell, as where no thing is right that could have a colour.
    """
    first = _told(table, patient, loss, step, sort)
    if minus is None:
        return _ratio([first])
    of_other = table[(table["patient"] == patient) & (table["loss"] == minus)]
    return _ratio([first, _told(table, patient, minus, of_other["step"].max(), sort)])


def _told(table: pd.DataFrame, patient: str, loss: int, step: int, sort: str) -> np.ndarray:
    """(2, seeds, items): told, and there to be told."""
    chosen = table[
        (table["patient"] == patient) & (table["loss"] == loss) & (table["step"] == step) & (table["sort"] == sort)
    ]
    wide = chosen.pivot(index="seed", columns="item", values=["told", "facts"])
    return np.stack([wide[name].to_numpy(float) for name in ("told", "facts")])


def _ratio(parts: Sequence[np.ndarray]) -> Interval:
    """Of one part its ratio told / facts; of two the difference of their ratios. The intact model has one seed."""
    seeds, n = parts[0].shape[1:]
    sizes = [part.shape[1] for part in parts]

    def sums(items: np.ndarray) -> np.ndarray:
        return np.concatenate([part[:, :, items].sum(axis=2).ravel() for part in parts])

    def statistic(chosen: np.ndarray, values: np.ndarray) -> float:
        ratios, start = [], 0
        for size in sizes:
            told, facts = values[start : start + 2 * size].reshape(2, size)
            rows = chosen if size == seeds else np.zeros(1, dtype=int)
            ratios.append(told[rows].sum() / facts[rows].sum() if facts[rows].sum() else np.nan)
            start += 2 * size
        return ratios[0] - sum(ratios[1:])

    sample, drawn = resample(sums, n, resamples=1000)
    return bootstrap_of_runs(statistic, seeds, sample, drawn, n)


def curves(table: pd.DataFrame, patient: str) -> dict[str, dict[float, Interval]]:
    """Label of each loss -> step -> score, as `show.lines` draws them.

    Args:
        table: of `read`, or of some runs.
        patient: the damaged model.
    """
    found = {}
    for arm in (arm for arm in ARMS if arm.patient == patient):
        own = table[(table["patient"] == patient) & (table["loss"] == arm.loss)]
        if len(own):
            steps = sorted(own["step"].unique())
            found[arm.label] = {step: score(table, patient, arm.loss, step) for step in steps}
    return found


def figure(table: pd.DataFrame, patient: str) -> Figure:
    """The score by step, a line for each loss.

    Args:
        table: as for `curves`.
        patient: the damaged model.
    """
    intact = table[(table["patient"] == patient) & (table["loss"] == INTACT)]
    level = f" Before the damage the {patient} had {score(table, patient, INTACT, 0).value:.2f}." if len(intact) else ""
    note = f"A damaged {patient} learns again, from one loss alone. Bars are 95 % intervals.{level}"
    return show.lines(curves(table, patient), SCORE[patient], "training step", note)


# ── page and command ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Repairs:
    """What was measured.

    Attributes:
        table: of `read`.
        profile: of the models.
        steps: of each run.
        command: that made it.
    """

    table: pd.DataFrame
    profile: Profile
    steps: int
    command: str

    def row(self, arm: Arm) -> list[str]:
        """An arm's line in the page's first table."""
        afterwards = score(self.table, arm.patient, arm.loss, self.steps)
        change = score(self.table, arm.patient, arm.loss, self.steps, minus=INTACT)
        return [arm.label, pages.cell(afterwards, 3), pages.cell(change, 3, signed=True)]


def page(found: Repairs) -> list[str]:
    """The parts of the page in Markdown."""
    table, settings = found.table, repair.SETTINGS
    seeds = table["seed"].nunique()
    parts = [
        "# Repair: what one loss alone teaches",
        pages.measured_on(found.profile.dataset),
        f"Made by `{found.command}` at commit `{pages.current_commit()}`. Brackets are 95 % intervals: training seeds "
        "are drawn anew, then images or prompts.",
        f"The queries of one model's cross-attention are multiplied by {DAMAGE:g}, and then trained by one loss for "
        f"{found.steps} steps with batches of {settings['batch_size']} at a learning rate of "
        f"{settings['learning_rate']:g}, from {seeds} seeds; the other model is intact and does not change. The "
        f"check-up is on fresh development scenes of seed {SEED}; images are generated with {repair.STEPS} steps of "
        f"{repair.SCHEDULER}.",
    ]
    for patient in PATIENTS:
        arms = [arm for arm in ARMS if arm.patient == patient]
        damaged, intact = score(table, patient, arms[0].loss, 0), score(table, patient, INTACT, 0)
        n = intact.n
        parts += [
            f"## The {patient}",
            f"{SCORE[patient][0].upper()}{SCORE[patient][1:]}, n = {n}. Damaged: {pages.cell(damaged, 3)}. Intact: "
            f"{pages.cell(intact, 3)}.",
            pages.table(["trained by", "afterwards", "minus intact"], [found.row(arm) for arm in arms]),
            f"![Score by training step, a line for each loss](../figures/repair_{patient}.png)",
            "What each loss teaches, and what it does not: the share of facts of each sort.",
            _facts_table(table, patient, arms, found.steps),
        ]
    return parts


def _facts_table(table: pd.DataFrame, patient: str, arms: Sequence[Arm], last: int) -> str:
    models = [("damaged", arms[0].loss, 0), ("intact", INTACT, 0), *((arm.label, arm.loss, last) for arm in arms)]
    rows = []
    for label, loss, step in models:
        facts = {sort: _told(table, patient, loss, step, sort)[1].sum() for sort in SORTS}
        cells = [
            pages.cell(score(table, patient, loss, step, sort), 2) if n >= 20 else "–" for sort, n in facts.items()
        ]
        rows.append([label, *cells])
    return pages.table(["", *SORTS], rows)


def write(docs: Path, found: Repairs) -> None:
    """results/repair.parquet and repair.md, and the curves."""
    kept = found.table.copy()
    kept.loc[(kept["item"] >= repair.EXAMPLES) | (kept["seed"] > 0), "caption"] = ""
    write_whole(docs / "results" / "repair.parquet", lambda path: kept.to_parquet(path, index=False))
    for patient in PATIENTS:
        show.write_png(figure(kept, patient), docs / "figures" / f"repair_{patient}.png")
    pages.write_page(docs / "results" / "repair.md", page(found))


def load(folder: Path = pages.SHIPPED) -> pd.DataFrame:
    """What was measured, as `read` returns it; captions of the first items only."""
    return pd.read_parquet(folder / "repair.parquet")


def main(arguments: list[str]) -> int:
    """What does one loss alone teach a damaged model through an intact one?

    Damage the captioner, or the generator, train it by one loss, and measure how much of it comes back. About an hour
    on one core; the same command in a second terminal shares the runs.
    """
    parser = study_parser("repair", main.__doc__)
    parser.add_argument("--seeds", type=positive, default=5, help="of training; default: %(default)s")
    parser.add_argument("--steps", type=positive, default=240, help="of each run; default: %(default)s")
    options = parse(parser, arguments)
    profile = profiles.current()
    folder = options.runs / f"repair-{profile.name}-{options.steps}"
    if not run_all(profile, folder, options.seeds, options.steps, Sizes()):
        print("another process is at the last runs; give the command again when it has finished")
        return 0
    found = Repairs(read(folder, options.seeds), profile, options.steps, COMMAND)
    write(options.docs, found)
    print(options.docs / "results" / "repair.md")
    return 0
