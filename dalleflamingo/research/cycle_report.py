"""What the runs of `cycle_study.py` show: Tables 3, 4, 5 and 9, claims 9 to 12 and 14.

python -m dalleflamingo research cycle-report      after the study; writes docs/results/cycle.md, its tables, claims
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from dalleflamingo import profiles, registry
from dalleflamingo.course import cycle_figures, show
from dalleflamingo.cycle import CHOSEN
from dalleflamingo.datasets import open_image
from dalleflamingo.intervals import Interval
from dalleflamingo.research import pages, report
from dalleflamingo.research.claims import Claim, scoreboard, verdict_line, weakest_of
from dalleflamingo.research.cycle_comparison import (
    Examined,
    Study,
    features_of,
    gather,
    of_captions,
    of_pictures,
    study,
)
from dalleflamingo.research.cycle_study import ARMS, DEVIATIONS, MODES, START, TABLE_3, TABLE_9, chosen_on, tested
from dalleflamingo.research.ranking import ALL

BLIP, LARGE, BLIP2 = "miniature/blip", "miniature/blip-large", "miniature/blip2"
CALLED = {BLIP: "BLIP", LARGE: "larger BLIP", BLIP2: "BLIP-2"}
DOMAINS = ("in-domain", "near-domain", "out-domain", ALL)
# NoCaps CIDEr of the published captioner and after the cycle, then COCO's
PAPER_TABLE_3 = {
    BLIP: (109.7, 111.8, 133.3, 134.6),
    LARGE: (113.2, 114.0, 136.7, 137.3),
    BLIP2: (119.9, 121.0, 145.8, 146.4),
}
PAPER_TABLE_4 = {  # CLIP distance × 100 and FID, NoCaps and COCO
    (BLIP, START): ("40.39 / 21.19", "42.48 / 27.08"),
    (BLIP, "labels"): ("40.77 / 24.32", "40.11 / 25.66"),
    (BLIP, "cycle"): ("39.78 / 21.96", "40.68 / 24.68"),
    (LARGE, "cycle"): ("40.31 / 22.92", "40.71 / 24.21"),
}
PAPER_TABLE_9 = dict(zip(TABLE_9, (111.8, 110.9, 110.2, 109.7, 102.3), strict=True))
GALLERY = {"start": f"blip-{START}", "labels only": "blip-labels-0", "cycle": "blip-cycle-0"}  # runs


def trials_page(runs: Path) -> str:
    """What was tried before the study, on pictures that the test has not, in Markdown."""
    captions, pictures = gather(runs)
    datasets = chosen_on()
    said = {name: of_captions(captions[captions["corpus"] == name], dataset) for name, dataset in datasets.items()}
    drawn = of_pictures(pictures, datasets["nocaps"], features_of(datasets["nocaps"]))
    rows = []
    for arm, _ in said["nocaps"].runs:
        rows.append([arm, _cell(said["nocaps"], "cider", arm), _cell(said["nocaps"], "f1", arm),
                     _cell(said["coco"], "cider", arm), _cell(drawn, "clip_distance", arm),
                     _cell(drawn, "fid", arm)])  # fmt: skip
    return "\n\n".join([
        "# What was tried",
        "One seed, 600 steps, three hundred pictures each of nocaps-dev and of coco's val split, none of them in "
        f"the test. Made by `python -m dalleflamingo research cycle --trials` at commit `{pages.current_commit()}`.",
        pages.table(["", "CIDEr × 100", "F1", "CIDEr × 100, coco", "CLIP distance × 100 ↓", "FID ↓"], rows),
    ]) + "\n"  # fmt: skip


def claim_9(found: Study) -> list[Claim]:
    """The cycle beats the captioner that it starts from, for three captioners; apart, that and labels on coco."""
    claims = []
    for captioner, runs in found.nocaps.items():
        if not runs.seeds("cycle"):
            continue
        text = f"{CALLED[captioner]}: the cycle's captions beat those of the start, CIDEr × 100, overall"
        apart = {f"minus {ARMS[arm].what}": runs.value("cider", "cycle", arm) for arm in TABLE_3[:2] if runs.seeds(arm)}
        apart["on coco"] = found.coco[captioner].value("cider", "cycle", START)
        effect = runs.value("cider", "cycle", START)
        claims.append(Claim(9, text, ALL, effect, 1, apart, seeds=runs.seeds("cycle")))
    return claims


def claim_10(found: Study) -> list[Claim]:
    """The cycle's pictures lie nearer out of domain than those of the start and of labels: the weaker of the two."""
    claims = []
    for captioner, runs in found.pictures.items():
        if not (runs.seeds("cycle") and runs.seeds("labels")):
            continue
        out = DOMAINS[2]
        nearer = {
            "than the start": runs.value("clip_distance", START, "cycle", out),
            "than labels only": runs.value("clip_distance", "labels", "cycle", out),
        }
        weaker = weakest_of(nearer)
        apart = {name: effect for name, effect in nearer.items() if name != weaker}
        if runs.seeds(TABLE_3[1]):
            apart[f"than {ARMS[TABLE_3[1]].what}"] = runs.value("clip_distance", TABLE_3[1], "cycle", out)
        apart["labels only, than the start, out of domain"] = runs.value("clip_distance", START, "labels", out)
        apart["labels only, than the start, in domain"] = runs.value("clip_distance", START, "labels", DOMAINS[0])
        apart["labels only, than the start, on coco"] = found.coco_pictures[captioner].value(
            "clip_distance", START, "labels"
        )
        text = f"taught with {CALLED[captioner]}: SD draws nearer to the picture out of domain {weaker}, CLIP distance"
        claims.append(Claim(10, f"{text} × 100", ALL, nearer[weaker], 2, apart, seeds=runs.shared(["labels", "cycle"])))
    return claims


def claim_11(found: Study) -> list[Claim]:
    """Without either half the captions are worse: the weaker of the two differences (Table 5)."""
    runs = found.nocaps[BLIP]
    without = {"the reconstruction losses": "labels", "the labels": "reconstruction"}
    if not all(runs.seeds(arm) for arm in (*without.values(), "cycle")):
        return []
    effects = {what: runs.value("cider", "cycle", arm) for what, arm in without.items()}
    weaker = weakest_of(effects)
    text = f"the cycle's captions beat those without {weaker}, CIDEr × 100, overall"
    apart = {f"without {what}": effect for what, effect in effects.items() if what != weaker}
    return [Claim(11, text, ALL, effects[weaker], 1, apart, seeds=runs.shared(["cycle", *without.values()]))]


def claim_12(found: Study) -> list[Claim]:
    """The order of Table 9: Kendall's τ of the five arms, which stand in the paper's order, and each two neighbours."""
    runs = found.nocaps[BLIP]
    if not all(runs.seeds(arm) for arm in TABLE_9):
        return []

    def agreement(mean: Callable[[str], float]) -> float:
        return float(np.mean([np.sign(mean(better) - mean(worse)) for better, worse in combinations(TABLE_9, 2)]))

    effect = runs.combine("cider", agreement, TABLE_9)
    apart = {
        f"{ARMS[better].what} − {ARMS[worse].what}": runs.value("cider", better, worse)
        for better, worse in pairwise(TABLE_9)
    }
    text = "the order of what trains BLIP is the paper's: Kendall's τ of CIDEr × 100"
    return [Claim(12, text, ALL, effect, 1, apart, seeds=runs.shared(TABLE_9))]


def claim_14(folder: Path) -> list[Claim]:
    """The cycle costs at most 1.4 × plain finetuning, at full size: 1.4 minus the ratio, counted, without an interval.

    Args:
        folder: of the results that `benchmarks/full_size.py` and `benchmarks/cycle.py` wrote.
    """
    steps = json.loads((folder / "cycle-arithmetic.json").read_text(encoding="utf-8"))["steps"]
    spared = {name: 1.4 - (image + text) / 2 / (say + draw) for name, say, draw, image, text in steps}
    first, *others = spared
    apart = {name: Interval(spared[name], spared[name], spared[name], 1, None) for name in others}
    cost = json.loads((folder / "cycle-cost.json").read_text(encoding="utf-8"))
    for entry in (entry for entry in cost["found"] if entry["captioner"] == BLIP):
        captioner, generator, image, text, _ = (np.array(taken) for taken in entry["seconds"].values())
        saved = 1.4 - (image + text) / 2 / (captioner + generator)
        bounds = (float(value) for value in np.quantile(saved, (0.5, 0.05, 0.95)))
        what = f"the miniature, timed (5th to 95th percentile), {entry['setting']}"
        apart[what] = Interval(*bounds, len(saved), None)
    text = f"a step of the cycle costs at most 1.4 × one from labels: 1.4 − the ratio, counted at full size, {first}"
    return [Claim(14, text, ALL, Interval(spared[first], spared[first], spared[first], 1, None), 2, apart)]


def table_3(found: Study) -> pd.DataFrame:
    """Captioning: texts, a row a captioner and arm."""
    rows = []
    for captioner, runs in found.nocaps.items():
        published, cycled, coco_published, coco_cycled = PAPER_TABLE_3[captioner]
        paper = {START: f"{published} / {coco_published}", "cycle": f"{cycled} / {coco_cycled}"}
        for arm in (arm for arm in (START, *TABLE_3) if runs.seeds(arm)):
            cells = [_cell(runs, "cider", arm, domain) for domain in DOMAINS]
            gain = "" if arm == START else _difference(runs, "cider", arm)
            coco = _cell(found.coco[captioner], "cider", arm)
            seeds = "" if arm == START else str(len(runs.seeds(arm)))
            rows.append([CALLED[captioner], _what(arm), seeds, *cells, gain, _cell(runs, "f1", arm), coco,
                         paper.get(arm, "")])  # fmt: skip
    columns = ["captioner", "trained by", "seeds", "in", "near", "out", "all", "all − start", "F1", "coco"]
    return pd.DataFrame(rows, columns=[*columns, "the paper: NoCaps / COCO"])


def table_4(found: Study) -> pd.DataFrame:
    """Generation: texts, a row a captioner and arm; lower is better throughout."""
    rows = []
    for captioner, runs in found.pictures.items():
        own = (START, *TABLE_3, "reconstruction") if captioner == BLIP else ("cycle",)
        for arm in (arm for arm in own if runs.seeds(arm)):
            cells = [_cell(runs, "clip_distance", arm, domain) for domain in DOMAINS]
            gain = "" if arm == START else _difference(runs, "clip_distance", arm)
            coco = [_cell(found.coco_pictures[captioner], metric, arm) for metric in ("clip_distance", "fid")]
            rows.append([CALLED[captioner], _what(arm), *cells, gain, _cell(runs, "fid", arm), *coco,
                         *PAPER_TABLE_4.get((captioner, arm), ("", ""))])  # fmt: skip
    columns = ["taught with", "trained by", "in", "near", "out", "all", "all − start", "FID", "coco", "coco, FID"]
    return pd.DataFrame(rows, columns=[*columns, "the paper: NoCaps", "COCO"])


def table_9(found: Study) -> pd.DataFrame:
    """What trains BLIP: texts, a row an arm, as Table 9 and, in its first and last two rows, Table 5."""
    runs, rows = found.nocaps[BLIP], []
    for arm in (arm for arm in TABLE_9 if runs.seeds(arm)):
        against = "" if arm == "cycle" else _difference(runs, "cider", arm, "cycle")
        rows.append([_what(arm), str(len(runs.seeds(arm))), _cell(runs, "cider", arm), against,
                     _cell(runs, "f1", arm), str(PAPER_TABLE_9[arm])])  # fmt: skip
    return pd.DataFrame(rows, columns=["trained by", "seeds", "CIDEr × 100", "minus cycle", "F1", "the paper"])


def table_explored(found: Study, arms: Sequence[str]) -> pd.DataFrame:
    """Arms of one seed beside the cycle from that seed: texts; intervals are over pictures alone."""
    runs, rows = found.nocaps[BLIP], []
    for arm in (arm for arm in arms if runs.seeds(arm)):
        rows.append([_what(arm), _cell(runs, "cider", arm), _difference(runs, "cider", arm, "cycle"),
                     _difference(runs, "f1", arm, "cycle")])  # fmt: skip
    return pd.DataFrame(rows, columns=["changed", "CIDEr × 100", "minus cycle", "F1 minus cycle"])


def _cell(runs: Examined, metric: str, arm: str, domain: str = ALL) -> str:
    return pages.cell(runs.value(metric, arm, domain=domain), report.METRICS[metric].digits)


def _difference(runs: Examined, metric: str, arm: str, minus: str = START) -> str:
    return pages.cell(runs.value(metric, arm, minus), report.METRICS[metric].digits, signed=True)


def _what(arm: str) -> str:
    return "start" if arm == START else ARMS[arm].what


def page(found: Study, claims: Sequence[Claim], command: str) -> str:
    """The page in Markdown."""
    lines = []
    for claim in claims:
        lines.append(verdict_line(claim))
        for what, effect in claim.apart.items():
            lines.append(f"  * {what}: {pages.cell(effect, claim.digits, signed=True)}")
    losses = CHOSEN.losses
    parts = [
        "# Cycle finetuning",
        "**Measured in the miniature**; the paper's figures stand beside ours for their direction.",
        f"Made by `{command}` at commit `{pages.current_commit()}`. Brackets are 95 % intervals: training seeds are "
        "drawn anew, then pictures; differences are paired by both. Three hundred pictures of nocaps, as many of coco.",
        f"Settings: {CHOSEN.pictures} labelled pictures of coco, {CHOSEN.steps} steps of {CHOSEN.batch_size} pairs, "
        f"{CHOSEN.schedule}, learning rate {CHOSEN.learning_rate:g}, (4) below {losses.latest:.0%} of the timesteps; "
        "chosen on other pictures of the same sort, of [what was tried](cycle-trials.md).",
        "\n".join(lines),
        "## Captions (Table 3): CIDEr × 100",
        _markdown(table_3(found)),
        "## Pictures (Table 4): CLIP distance × 100 to the real picture and FID, lower is better",
        _markdown(table_4(found)),
        "![The same captions drawn by the generator before, taught by labels, taught by the cycle]"
        "(../figures/cycle_pictures.png)",
        "## What trains BLIP (Tables 5 and 9)",
        _markdown(table_9(found)),
        "## As the authors' released code has it, one seed, exploratory",
        _markdown(table_explored(found, DEVIATIONS)),
        "## Other settings, one seed, exploratory",
        _markdown(table_explored(found, MODES)),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(frame: pd.DataFrame) -> str:
    return pages.table(list(frame), frame.to_numpy().tolist())


def gallery(runs: Path, path: Path) -> None:
    """What three generators draw of the same captions from the same noise, two captions of each domain."""
    parts = tested()["nocaps"].by_domain().values()
    examples = [example for part in parts for example in part[:2]]
    pictures = {"real": [open_image(example.path) for example in examples]}
    for name, run in GALLERY.items():
        pictures[name] = [open_image(runs / run / f"pictures/nocaps/{example.image_id}.png") for example in examples]
    show.write_png(cycle_figures.drawn_by(pictures, [example.sample_reference(seed=0) for example in examples]), path)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, its tables and the claims into the docs."""
    parser = argparse.ArgumentParser(prog="python -m dalleflamingo research cycle-report", description=main.__doc__)
    parser.add_argument("--runs", type=Path, default=Path("build/runs/cycle"), help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="default: docs")
    options = parser.parse_args(arguments)
    try:
        captions, pictures = gather(options.runs)
    except (FileNotFoundError, registry.RegistryError) as error:
        parser.error(str(error))
    found, folder = study(captions, pictures), options.docs / "results"
    claims = [*claim_9(found), *claim_10(found), *claim_11(found), *claim_12(found), *claim_14(folder)]
    captions.to_parquet(folder / "cycle-captions.parquet", index=False)
    pictures.drop(columns="features").round(4).to_parquet(folder / "cycle-pictures.parquet", index=False)
    for name, frame in (("3", table_3(found)), ("4", table_4(found)), ("9", table_9(found)),
                        ("deviations", table_explored(found, DEVIATIONS)),
                        ("modes", table_explored(found, MODES))):  # fmt: skip
        frame.to_csv(folder / f"cycle-table-{name}.csv", index=False)
    profile = profiles.current()
    where = SimpleNamespace(profile=profile.name, dataset=profile.dataset, seed=0)
    scoreboard(folder / "claims.json", claims, where)
    (folder / "cycle.md").write_text(
        page(found, claims, "python -m dalleflamingo research cycle-report"), encoding="utf-8"
    )
    if all((options.runs / run / "result.json").is_file() for run in GALLERY.values()):
        gallery(options.runs, options.docs / "figures" / "cycle_pictures.png")
    if (options.runs / "trials").is_dir():
        (folder / "cycle-trials.md").write_text(trials_page(options.runs / "trials"), encoding="utf-8")
    for claim in claims:
        print(f"Claim {claim.number}: {claim.verdict}; {claim.text}: {claim.effect}")
    return 0
