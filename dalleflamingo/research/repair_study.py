"""The repair, measured: what each loss alone teaches a damaged model, and what it cannot teach.

    python -m dalleflamingo research repair        about three hours on one core

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
from dalleflamingo.commands.parsers import positive
from dalleflamingo.course import show
from dalleflamingo.evaluation.intervals import Interval, resample
from dalleflamingo.profiles import Profile
from dalleflamingo.research import pages, repair
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.ranking import ALL
from dalleflamingo.research.repair import ARMS, DAMAGE, DEVIATING, PATIENTS, SEED, SORTS, Arm, Sizes
from dalleflamingo.research.resampling import bootstrap_of_runs
from dalleflamingo.runs import write_whole
from dalleflamingo.sources.models import load_captioner, load_generator

COMMAND = "python -m dalleflamingo research repair"
INTACT = "intact"  # in the place of an arm: the model as it is, not damaged
CHECKUPS = 6  # on the way
SEEDS_OF_DEVIATIONS = 3  # which train for half as many steps
SCORE = {  # patient -> what a check-up measures
    repair.CAPTIONER: "scene-graph F1 of captions by beam search",
    repair.GENERATOR: "share of things right in kind and colour",
}


def intact(patient: str) -> str:
    """The name, in the place of an arm's, of a model that was never damaged."""
    return f"{patient}-{INTACT}"


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_all(profile: Profile, folder: Path, seeds: int, steps: int, sizes: Sizes) -> bool:
    """Train every arm from every seed, going on where an earlier call was; False if another process is at some of it.

    Args:
        profile: of the miniature.
        folder: gets a folder for each run.
        seeds: of training.
        steps: of each run, half as many where the released code deviates.
        sizes: of the check-ups.
    """
    every = -(-steps // CHECKUPS)
    wanted = [(arm, seed, steps) for seed in range(seeds) for arm in ARMS]
    deviating = range(min(seeds, SEEDS_OF_DEVIATIONS))
    wanted += [(arm, seed, CHECKUPS // 2 * every) for seed in deviating for arm in DEVIATING]
    complete = True
    folder.mkdir(parents=True, exist_ok=True)
    for arm, seed, count in tqdm(wanted, desc="repair", unit="run"):
        own = folder / f"{arm.name}-{seed}"
        try:
            with FileLock(f"{own}.lock", timeout=0, fallback_to_soft=False):
                if not (own / "result.parquet").exists():
                    config = arm.config(profile, seed=seed, steps=count, validate_every=every)
                    _keep(repair.repair(arm, config, sizes, profile, own), own)
        except Timeout:
            complete = False
    for patient in PATIENTS:
        own = folder / intact(patient)
        if complete and not (own / "result.parquet").exists():
            models = load_captioner(profile), load_generator(profile, scheduler=repair.SCHEDULER)
            _keep(repair.checkup_of(patient, *models, sizes, profile)(own / "images").assign(step=0), own)
    return complete


def _keep(table: pd.DataFrame, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "result.parquet", table.to_parquet)


def read(folder: Path, seeds: int) -> pd.DataFrame:
    """The check-ups of all runs: columns arm (or `intact`), seed, step, item, sort, told, facts, caption.

    Args:
        folder: of `run_all`.
        seeds: of training.
    """
    wanted = [(arm.name, seed, folder / f"{arm.name}-{seed}") for arm in ARMS for seed in range(seeds)]
    deviating = range(min(seeds, SEEDS_OF_DEVIATIONS))
    wanted += [(arm.name, seed, folder / f"{arm.name}-{seed}") for arm in DEVIATING for seed in deviating]
    wanted += [(intact(patient), 0, folder / intact(patient)) for patient in PATIENTS]
    parts = [pd.read_parquet(own / "result.parquet").assign(arm=name, seed=seed) for name, seed, own in wanted]
    return pd.concat(parts, ignore_index=True)


# ── what the check-ups say ───────────────────────────────────────────────────────────────────────────────────────────


def score(table: pd.DataFrame, arm: str, step: int, sort: str = ALL, minus: str | None = None) -> Interval:
    """How much of what there is to tell is told; mean over seeds, which the bootstrap draws anew, and then the items.

    Args:
        table: of `read`, or of the check-ups of one run with its arm and seed.
        arm: name of an arm, or `intact`.
        step: of training.
        sort: of facts.
        minus: the difference to another arm on the same items, at the same step and from the same seeds; `intact`: to
            the intact model.
    Raises:
        ValueError: there is nothing to tell, as where no thing is right that could have a colour.
    """
    if minus is None:
        return _ratio([_told(table, arm, step, sort)])
    at = 0 if minus.endswith(INTACT) else step
    first, second = _told(table, arm, step, sort), _told(table, minus, at, sort)
    if at:
        shared = min(first.shape[1], second.shape[1])
        first, second = first[:, :shared], second[:, :shared]
    return _ratio([first, second])


def last_step(table: pd.DataFrame, arm: str) -> int:
    """Of an arm's training."""
    return int(table.loc[table["arm"] == arm, "step"].max())


def _told(table: pd.DataFrame, arm: str, step: int, sort: str) -> np.ndarray:
    """(2, seeds, items): told, and there to be told."""
    chosen = table[(table["arm"] == arm) & (table["step"] == step) & (table["sort"] == sort)]
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
        steps = sorted(table.loc[table["arm"] == arm.name, "step"].unique())
        if steps:
            found[arm.label] = {step: score(table, arm.name, step) for step in steps}
    return found


def figure(table: pd.DataFrame, patient: str) -> Figure:
    """The score by step, a line for each loss.

    Args:
        table: as for `curves`.
        patient: the damaged model.
    """
    level = ""
    if intact(patient) in set(table["arm"]):
        level = f" Before the damage the {patient} had {score(table, intact(patient), 0).value:.2f}."
    note = f"A damaged {patient} learns again, from one loss alone. Bars are 95 % intervals.{level}"
    return show.lines(curves(table, patient), SCORE[patient], "training step", note)


# ── page and command ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Repairs:
    """What was measured.

    Attributes:
        table: of `read`.
        profile: of the models.
        command: that made it.
    """

    table: pd.DataFrame
    profile: Profile
    command: str


def page(found: Repairs) -> list[str]:
    """The parts of the page in Markdown."""
    table, settings, rates = found.table, repair.SETTINGS, repair.LEARNING_RATES
    parts = [
        "# Repair: what one loss alone teaches",
        pages.measured_on(found.profile.dataset),
        f"Made by `{found.command}` at commit `{pages.current_commit()}`. Brackets are 95 % intervals: training seeds "
        "are drawn anew, then images or prompts.",
        f"The queries of one model's cross-attention are multiplied by {DAMAGE:g}, and then trained by one loss for "
        f"{last_step(table, ARMS[0].name)} steps with batches of {settings['batch_size']}, from "
        f"{table['seed'].nunique()} seeds (learning rate: captioner {rates[repair.CAPTIONER]:g}, generator "
        f"{rates[repair.GENERATOR]:g}); the other model is intact and does not change. The check-up is on fresh "
        f"development scenes of seed {SEED}; images are generated with {repair.STEPS} steps of {repair.SCHEDULER}.",
    ]
    for patient in PATIENTS:
        arms = [arm for arm in ARMS if arm.patient == patient]
        damaged, whole = score(table, arms[0].name, 0), score(table, intact(patient), 0)
        parts += [
            f"## The {patient}",
            f"{SCORE[patient][0].upper()}{SCORE[patient][1:]}, n = {whole.n}. Damaged: {pages.cell(damaged, 3)}. "
            f"Intact: {pages.cell(whole, 3)}.",
            pages.table(["trained by", "afterwards", "minus damaged", "minus intact"], [_row(table, a) for a in arms]),
            f"![The {patient}'s score by training step, a line for each loss](../figures/repair_{patient}.png)",
            "What each loss teaches, and what it does not: the share of facts of each sort.",
            _facts_table(table, patient, arms),
        ]
    return [*parts, *_deviations(table)]


def _row(table: pd.DataFrame, arm: Arm) -> list[str]:
    """An arm's line in a table of all arms of one patient."""
    last = last_step(table, arm.name)
    afterwards, change = score(table, arm.name, last), score(table, arm.name, last, minus=intact(arm.patient))
    gained = afterwards.value - score(table, arm.name, 0).value
    return [arm.label, pages.cell(afterwards, 3), f"{gained:+.3f}", pages.cell(change, 3, signed=True)]


def _facts_table(table: pd.DataFrame, patient: str, arms: Sequence[Arm]) -> str:
    models = [("damaged", arms[0].name, 0), ("intact", intact(patient), 0)]
    models += [(arm.label, arm.name, last_step(table, arm.name)) for arm in arms]
    rows = []
    for label, name, step in models:
        facts = {sort: _told(table, name, step, sort)[1].sum() for sort in SORTS}
        cells = [pages.cell(score(table, name, step, sort), 2) if n >= 20 else "–" for sort, n in facts.items()]
        rows.append([label, *cells])
    return pages.table(["", *SORTS], rows)


def _deviations(table: pd.DataFrame) -> list[str]:
    """The part of the page on the released code."""
    rows = []
    for arm in DEVIATING:
        last, plain = last_step(table, arm.name), f"{arm.patient}-{arm.loss}"
        found = score(table, arm.name, last), score(table, arm.name, last, minus=plain)
        rows.append([arm.patient, arm.label, pages.cell(found[0], 3), pages.cell(found[1], 3, signed=True)])
    last, seeds = last_step(table, DEVIATING[0].name), table.loc[table["arm"] == DEVIATING[0].name, "seed"].nunique()
    return [
        "## As the authors' released code has it",
        f"The same after {last} steps, with one of the released code's deviations at a time, from {seeds} seeds. The "
        "last column is the difference from the same loss without the deviation, after as many steps from the same "
        "seeds.",
        pages.table(["patient", "trained by", "afterwards", "minus without"], rows),
    ]


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

    Damage the captioner, or the generator, train it by one loss, and measure how much of it comes back. About three
    hours on one core; the same command in a second terminal shares the runs.
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
    found = Repairs(read(folder, options.seeds), profile, COMMAND)
    write(options.docs, found)
    print(options.docs / "results" / "repair.md")
    return 0
