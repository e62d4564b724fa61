"""What the runs of `cycle_study.py` show: Tables 3, 4, 5 and 9, claims 9 to 12 and 14.

python -m dalleflamingo research cycle-report      after the study; writes docs/results/cycle.md, its tables, claims
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from dalleflamingo import profiles
from dalleflamingo.commands.parsers import positive
from dalleflamingo.course import cycle_figures, show
from dalleflamingo.datasets import DOMAINS, Dataset, open_image
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.profiles import Profile
from dalleflamingo.registry import ENTRIES
from dalleflamingo.research import pages, paper
from dalleflamingo.research.claims import Claim, print_claims, scoreboard, verdict_line
from dalleflamingo.research.cycle_arms import (
    FEW,
    MANY,
    OTHER_SETTINGS,
    RELEASED_CODE,
    START,
    TABLE_3,
    TABLE_9,
    label_of,
    queue,
    run_of,
    trial,
    trials,
)
from dalleflamingo.research.cycle_claims import all_claims, require_costs
from dalleflamingo.research.cycle_comparison import (
    EvaluatedRuns,
    StudyResults,
    count_runs,
    evaluate_runs,
    evaluated_captions,
    evaluated_images,
    read_runs,
    read_tables,
    real_features,
    require_no_fewer,
    write_tables,
)
from dalleflamingo.research.cycle_start import PRETRAINING, WEB
from dalleflamingo.research.cycle_study import (
    RENDERED,
    RENDERED_IN_TRIALS,
    development_sets,
    folder_of,
    of_every_domain,
    test_sets,
)
from dalleflamingo.research.metrics import METRICS
from dalleflamingo.research.options import parse, study_parser
from dalleflamingo.research.ranking import ALL
from dalleflamingo.runs import read_settings, write_whole

COMMAND = "python -m dalleflamingo research cycle-report"
GALLERY = {START: START, "labels only": "labels", "cycle": "cycle"}  # heading -> arm
CONTROLS = (START, "labels", "labels-longer")


# ── tables: data frames of texts ─────────────────────────────────────────────────────────────────────────────────────


def headline(found: StudyResults) -> pd.DataFrame:
    """What either cycle adds to labels alone that are trained for longer: a row for each captioner and arm.

    "±" is half the width of the interval before it.
    """
    _, labels, *cycles = TABLE_3
    rows = []
    for captioner, runs in found.captions["nocaps"].items():
        for arm in (arm for arm in cycles if runs.shared_seeds([arm, labels])):
            row = {"captioner": ENTRIES[captioner].label, "trained by": label_of(arm)}
            row["seeds"] = str(len(runs.shared_seeds([arm, labels])))
            for metric, column in (("cider", "captions, CIDEr × 100"), *_contents(runs)):
                row |= _with_width(column, runs.value(metric, arm, labels), METRICS[metric].digits)
            images = found.images["nocaps"].get(captioner)
            if images and images.shared_seeds([arm, labels]):
                nearer = images.value("clip_distance", labels, arm)
                row |= _with_width("images nearer, CLIP distance × 100", nearer, METRICS["clip_distance"].digits)
            rows.append(row)
    return _frame(rows, "captioner").fillna("")


def controls(found: StudyResults) -> pd.DataFrame:
    """What the cycle adds to the start and to both controls, in numbers, as `cycle_figures.controls` draws it.

    Returns:
        a row for each captioner and each of `CONTROLS` that it shares seeds with. of: "captions", CIDEr × 100 of all
        images, or "images", how much nearer to the real ones they are out of domain, CLIP distance × 100; captioner;
        minus; value, low, high.
    """
    rows = []
    for arm in CONTROLS:
        for captioner, runs in found.captions["nocaps"].items():
            if runs.shared_seeds([arm, "cycle"]):
                rows.append(("captions", captioner, arm, runs.value("cider", "cycle", arm)))
        for captioner, runs in found.images["nocaps"].items():
            if runs.shared_seeds([arm, "cycle"]):
                rows.append(("images", captioner, arm, runs.value("clip_distance", arm, "cycle", DOMAINS[-1])))
    columns = ["of", "captioner", "minus", "value", "low", "high"]
    flat = [(of, ENTRIES[name].label, label_of(arm), one.value, one.low, one.high) for of, name, arm, one in rows]
    return pd.DataFrame(flat, columns=columns)


def table_3(found: StudyResults) -> pd.DataFrame:
    """Captioning: a row for each captioner and arm."""
    rows = []
    for captioner, runs in found.captions["nocaps"].items():
        published = paper.TABLE_3[ENTRIES[captioner].counterpart]
        before, after = (
            f"{nocaps} / {coco}" for nocaps, coco in zip(published["nocaps"], published["coco"], strict=True)
        )
        for arm in (arm for arm in (START, *TABLE_3) if runs.seeds(arm)):
            rows.append(
                {
                    "captioner": ENTRIES[captioner].label,
                    "trained by": label_of(arm),
                    "seeds": "" if arm == START else str(len(runs.seeds(arm))),
                    **_by_domain(runs, "cider", arm),
                    **_content(runs, arm),
                    "coco": _cell(found.captions["coco"][captioner], "cider", arm),
                    "the paper: NoCaps / COCO": {START: before, "cycle": after}.get(arm, ""),
                }
            )
    return pd.DataFrame(rows)


def table_4(found: StudyResults, profile: Profile) -> pd.DataFrame:
    """Generation: a row for each captioner and arm; lower is better throughout."""
    rows = []
    for captioner, runs in found.images["nocaps"].items():
        own = (START, *TABLE_3, "reconstruction") if captioner == profile.captioners[0] else ("cycle",)
        names = {START: "SD", "labels": "SD, labels only", "cycle": f"cycle, {ENTRIES[captioner].counterpart}"}
        for arm in (arm for arm in own if runs.seeds(arm)):
            published = paper.TABLE_4.get(names.get(arm), {})
            texts = {name: f"{100 * distance:.2f} / {fid:.2f}" for name, (distance, fid) in published.items()}
            rows.append(
                {
                    "trained with": ENTRIES[captioner].label,
                    "trained by": label_of(arm),
                    **_by_domain(runs, "clip_distance", arm),
                    "FID": _cell(runs, "fid", arm),
                    "the paper: NoCaps": texts.get("nocaps", ""),
                }
            )
    return pd.DataFrame(rows)


def table_9(runs: EvaluatedRuns) -> pd.DataFrame:
    """What trains the captioner: a row for each arm, as Table 9 and, in its first and last two rows, Table 5."""
    rows = []
    for arm, published in zip(TABLE_9, paper.TABLE_9.values(), strict=True):
        if runs.seeds(arm):
            rows.append(
                {
                    "trained by": label_of(arm),
                    "seeds": str(len(runs.seeds(arm))),
                    "CIDEr × 100": _cell(runs, "cider", arm),
                    "minus cycle": "" if arm == "cycle" else _difference(runs, "cider", arm, "cycle"),
                    **_content(runs, arm),
                    **_content_minus_cycle(runs, arm),
                    "the paper": str(published),
                }
            )
    return _frame(rows, "trained by")


def table_explored(runs: EvaluatedRuns, arms: Sequence[str]) -> pd.DataFrame:
    """Arms of one seed beside the cycle from that seed; intervals are over images alone."""
    rows = []
    for arm in (arm for arm in arms if runs.seeds(arm)):
        row = {
            "changed": label_of(arm),
            "CIDEr × 100": _cell(runs, "cider", arm),
            "minus cycle": _difference(runs, "cider", arm, "cycle"),
        }
        rows.append(row | _content_minus_cycle(runs, arm))
    return _frame(rows, "changed")


def tables_of_trials(folder: Path, profile: Profile) -> list[pd.DataFrame]:
    """The runs by which settings were chosen, a row each; and differences between them, with half their intervals.

    Args:
        folder: of the trials' runs.
        profile: names the models and data.
    """
    captions, images = read_runs(folder)
    datasets = development_sets(profile)
    described = {name: evaluated_captions(captions[captions["corpus"] == name], one) for name, one in datasets.items()}
    rendered = of_every_domain(datasets["nocaps"], RENDERED_IN_TRIALS)
    generated = evaluated_images(images, rendered, real_features(rendered, profile))
    nocaps, coco = described["nocaps"], described["coco"]
    scores = [
        {
            "": arm,
            "CIDEr × 100": _cell(nocaps, "cider", arm),
            **_content(nocaps, arm),
            "CIDEr × 100, coco": _cell(coco, "cider", arm),
            "CLIP distance × 100 ↓": _cell(generated, "clip_distance", arm),
            "FID ↓": _cell(generated, "fid", arm),
        }
        for arm, _ in nocaps.runs
    ]
    pairs = [(trial("labels", MANY), START)]
    pairs += [(trial("cycle", n), trial("labels", n)) for n in (MANY, 100, FEW)]
    pairs += [(trial("unlabelled", FEW), trial("labels", FEW))]
    differences = []
    for arm, minus in pairs:
        row = {"": f"{arm} − {minus}"}
        for metric, column in (("cider", "CIDEr × 100"), *_contents(nocaps)):
            row |= _with_width(column, nocaps.value(metric, arm, minus), METRICS[metric].digits)
        nearer = generated.value("clip_distance", minus, arm)
        row |= _with_width("images nearer, CLIP distance × 100", nearer, METRICS["clip_distance"].digits)
        differences.append(row)
    return [pd.DataFrame(scores), pd.DataFrame(differences)]


def _frame(rows: Sequence[Mapping[str, str]], first: str) -> pd.DataFrame:
    """A table of these rows; without any it has the first column, so that its file can be read."""
    return pd.DataFrame(rows, columns=None if rows else [first])


def _by_domain(runs: EvaluatedRuns, metric: str, arm: str) -> dict[str, str]:
    cells = {name.partition("-")[0]: _cell(runs, metric, arm, name) for name in (*DOMAINS, ALL)}
    return cells | {"all − start": "" if arm == START else _difference(runs, metric, arm, START)}


def _with_width(column: str, effect: Interval, digits: int) -> dict[str, str]:
    """An effect, and half the width of its interval."""
    half = (effect.high - effect.low) / 2
    return {column: pages.cell(effect, digits, signed=True), f"± {column.partition(',')[0]}": f"{half:.{digits}f}"}


def _contents(runs: EvaluatedRuns) -> list[tuple[str, str]]:
    """The metric of a caption's content that the runs have, with its column: F1 where scenes are known, else SPICE."""
    columns = {"f1": "F1", "spice": "SPICE × 100"}
    return [(metric, column) for metric, column in columns.items() if metric in runs.scores][:1]


def _content(runs: EvaluatedRuns, arm: str) -> dict[str, str]:
    return {column: _cell(runs, metric, arm) for metric, column in _contents(runs)}


def _content_minus_cycle(runs: EvaluatedRuns, arm: str) -> dict[str, str]:
    own = arm == "cycle"
    return {
        f"{column} minus cycle": "" if own else _difference(runs, metric, arm, "cycle")
        for metric, column in _contents(runs)
    }


def _cell(runs: EvaluatedRuns, metric: str, arm: str, domain: str = ALL) -> str:
    return pages.cell(runs.value(metric, arm, domain=domain), METRICS[metric].digits)


def _difference(runs: EvaluatedRuns, metric: str, arm: str, minus: str) -> str:
    """Nothing where the two arms have no seed in common yet."""
    if not runs.shared_seeds([arm, minus]):
        return ""
    return pages.cell(runs.value(metric, arm, minus), METRICS[metric].digits, signed=True)


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _table(frame: pd.DataFrame) -> str:
    return "The runs that it compares are not done yet." if frame.empty else pages.frame_table(frame)


def page(
    tables: Mapping[str, pd.DataFrame],
    claims: Sequence[Claim],
    profile: Profile,
    images: Mapping[str, int],
    runs: int,
) -> list[str]:
    """The parts of the page in Markdown.

    Args:
        tables: of `all_tables`.
        claims: of `cycle_claims.all_claims`.
        profile: of the runs.
        images: test images of each data set, and those "rendered".
        runs: of the study, that are done.
    """
    lines = []
    for claim in claims:
        lines.append(verdict_line(claim))
        for what, effect in claim.secondary.items():
            lines.append(f"  * {what}: {pages.cell(effect, claim.digits, signed=True)}")
    config = run_of(profile, "cycle", profile.captioners[0]).config(profile)
    return [
        "# Cycle finetuning",
        pages.measured_on(profile.dataset, pages.BESIDE_THE_PAPER),
        f"Made by `{COMMAND}` at commit `{pages.current_commit()}`, from {runs} of the study's {len(queue(profile))} "
        f"runs. Brackets are 95 % intervals: training seeds are "
        f"drawn anew, then images; differences are paired by both. Captions of {images['nocaps']:,} images of nocaps "
        f"and {images['coco']:,} of coco, generated images from captions of {images['rendered']:,} of nocaps.",
        f"*Start*: both models with the trained queries learned anew from the alt-texts of {WEB} alone, in "
        f"{PRETRAINING['steps']} steps, so that there is something to learn from labels.",
        f"Settings: {config.images or 'all'} labelled images of coco, {config.steps} steps of {config.batch_size} "
        f"pairs, {config.schedule}, learning rate {config.learning_rate:g}, (4) below {config.losses.max_timestep:.0%} "
        "of the timesteps; chosen on other images of the same sort, by [these trials](cycle-trials.md).",
        "## What the cycle adds to labels",
        "The difference from labels alone, trained with about nine tenths of the cycle's computing, by [the "
        "miniature's timings](cycle-cost.md). The paper compares with the start instead; that comparison is in the "
        "tables below, and decides claims 9 and 10.",
        _table(tables["headline"]),
        f"*{label_of('unlabelled')}* costs more than the plain cycle: the captioner also describes those images, "
        "greedily, and reads its own descriptions in one more teacher-forced pass.",
        "![What the cycle adds to the start, to labels only, and to labels only for longer]"
        "(../figures/cycle_controls.png)",
        "## Claims",
        "\n".join(lines),
        "## Captions (Table 3): CIDEr × 100",
        _table(tables["3"]),
        "## Images (Table 4): CLIP distance × 100 to the real image and FID, lower is better",
        _table(tables["4"]),
        "![The same captions rendered by the generator before training, trained by labels, trained by the cycle]"
        "(../figures/cycle_images.png)",
        "## What trains BLIP (Tables 5 and 9)",
        _table(tables["9"]),
        "## Equation 5 as it stands, and the released code's deviations, one seed, exploratory",
        _table(tables["deviations"]),
        "## Other settings, one seed, exploratory",
        _table(tables["modes"]),
    ]


def all_tables(found: StudyResults, profile: Profile) -> dict[str, pd.DataFrame]:
    """Every table, by the end of its file's name.

    Args:
        found: the runs.
        profile: names the first captioner.
    """
    runs = found.captions["nocaps"][profile.captioners[0]]
    return {
        "headline": headline(found),
        "3": table_3(found),
        "4": table_4(found, profile),
        "9": table_9(runs),
        "deviations": table_explored(runs, RELEASED_CODE),
        "modes": table_explored(runs, OTHER_SETTINGS),
    }


def trials_page(folder: Path, profile: Profile) -> list[str]:
    """The parts of the page of the trials in Markdown.

    Args:
        folder: of the trials' runs.
        profile: of the runs.
    """
    scores, differences = tables_of_trials(folder, profile)
    records = [read_settings(folder / run.name / "run.json") for run in trials(profile)]
    steps = {record["config"]["steps"] for record in records}
    sizes = {name: size for record in records for name, (_, size) in record["described"].items()}
    [rendered] = {size for record in records for _, size in record["rendered"].values()}
    return [
        "# What was tried",
        f"One seed, {' or '.join(map(str, sorted(steps)))} steps, captions of {sizes['nocaps']:,} images of "
        f"nocaps-dev and of {sizes['coco']:,} of coco's val split, generated images of {rendered:,} "
        "of nocaps-dev, none of them in the test. Made by `python -m dalleflamingo research cycle --trials` at commit "
        f"`{pages.current_commit()}`.",
        "The positive control: labels alone, of many images, show how much there is to learn beyond the start. Few "
        "labels leave room for what the cycle could add.",
        pages.frame_table(scores),
        'Differences, paired over images. "±" is half the width of the interval before it.',
        pages.frame_table(differences),
    ]


def gallery(runs: Path, dataset: Dataset, profile: Profile, path: Path) -> None:
    """Write what three generators render of the same captions from the same noise, two captions of each domain.

    Where one of the three runs is not done, an earlier figure stays.

    Args:
        runs: folder of all runs.
        dataset: the test images of NoCaps.
        profile: names the first captioner.
        path: of the figure.
    """
    folders = {name: runs / run_of(profile, arm, profile.captioners[0]).name for name, arm in GALLERY.items()}
    if not all((folder / "result.json").is_file() for folder in folders.values()):
        return
    examples = [example for part in dataset.by_domain().values() for example in part[:2]]
    images = {"real": [open_image(example.path) for example in examples]}
    for name, folder in folders.items():
        images[name] = [open_image(folder / f"images/nocaps/{example.image_id}.png") for example in examples]
    prompts = [example.sample_reference(seed=0) for example in examples]
    show.write_png(cycle_figures.rendered_by(images, prompts), path)


def write(
    runs: Path,
    docs: Path,
    profile: Profile,
    datasets: Mapping[str, Dataset],
    **resamples: int,
) -> list[Claim]:
    """Write the page, its tables, its figures and the claims; returns these.

    Args:
        runs: folder of all runs; without any, what an earlier report kept of them in `results` is evaluated again, and
            stays as it is.
        docs: gets `results` and `figures`.
        profile: of the runs.
        datasets: described test images by name.
        resamples: as of `EvaluatedRuns`.
    Raises:
        FileNotFoundError: no run is done, or as `require_costs`.
        ValueError: as `require_no_fewer`.
    """
    folder, is_new = docs / "results", any(runs.glob("*/result.json"))
    captions, images = read_runs(runs) if is_new else read_tables(folder)
    require_costs(folder)  # both before the bootstraps, which take minutes
    require_no_fewer(captions, folder)
    generated = {"nocaps": of_every_domain(datasets["nocaps"], min(RENDERED, len(datasets["nocaps"])))}
    found = evaluate_runs(captions, images, datasets, generated, profile, **resamples)
    claims, tables = all_claims(found, profile, folder), all_tables(found, profile)
    if is_new:
        write_tables(captions, images, folder)
    for name, frame in tables.items():
        write_whole(folder / f"cycle-table-{name}.csv", partial(frame.to_csv, index=False))
    sizes = {name: len(one) for name, one in datasets.items()} | {"rendered": len(generated["nocaps"])}
    compared = controls(found)
    write_whole(folder / "cycle-controls.csv", partial(compared.round(4).to_csv, index=False))
    show.write_png(cycle_figures.controls(compared), docs / "figures" / "cycle_controls.png")
    scoreboard(folder / "claims.json", claims, profile=profile.name, dataset=profile.dataset, seed=0)
    pages.write_page(folder / "cycle.md", page(tables, claims, profile, sizes, count_runs(captions)))
    gallery(runs, generated["nocaps"], profile, docs / "figures" / "cycle_images.png")
    if all((runs / "trials" / run.name / "result.json").is_file() for run in trials(profile)):
        pages.write_page(folder / "cycle-trials.md", trials_page(runs / "trials", profile))
    return claims


def main(arguments: list[str]) -> int:
    """Write docs/results/cycle.md, its tables, its figure and claims 9 to 12 and 14, from the runs that are done.

    The runs are those of `python -m dalleflamingo research cycle`, with the same profile. Where there are none, the
    captions and scores in docs/results are evaluated again, and the figure stays; they are not replaced by those of
    fewer runs. What a step costs is measured by benchmarks/cycle.py and benchmarks/full_size.py.
    """
    parser = study_parser("cycle-report", main.__doc__)
    parser.add_argument("--images", type=positive, help="test images of the runs; default: all")
    options = parse(parser, arguments)
    profile = profiles.current()
    datasets = test_sets(profile, options.images)
    print_claims(write(folder_of(options.runs, profile), options.docs, profile, datasets))
    return 0
