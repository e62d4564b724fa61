"""Claims 9 to 12, from the runs of the cycle study, and claim 14, from what a step costs."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from dalleflamingo.datasets import DOMAINS
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.profiles import Profile
from dalleflamingo.registry import ENTRIES
from dalleflamingo.research import paper
from dalleflamingo.research.claims import Claim, weakest_of
from dalleflamingo.research.cycle_arms import ARMS, START, TABLE_3, TABLE_9
from dalleflamingo.research.cycle_comparison import EvaluatedRuns, StudyResults
from dalleflamingo.research.ranking import ALL

COUNTED = "cycle-arithmetic.json"  # what a step costs at full size, by benchmarks/full_size.py
TIMED = "cycle-cost.json"  # and in the miniature, by benchmarks/cycle.py
BY_LABELS = ("label → captioner (1)", "label → generator (3)")  # the steps that `TIMED` has the seconds of
BY_CYCLE = ("image → text → image (1) + (2)", "text → image → text (3) + (4)")


def claim_9(found: StudyResults) -> list[Claim]:
    """The cycle beats the captioner that it starts from, for three captioners; secondary: labels, and COCO."""
    claims = []
    for captioner, runs in found.captions["nocaps"].items():
        if not runs.shared_seeds(["cycle", START]):
            continue
        text = f"{ENTRIES[captioner].label}: the cycle's captions beat those of the start, CIDEr × 100, overall"
        secondary = {
            f"minus {ARMS[arm].label}": runs.value("cider", "cycle", arm)
            for arm in TABLE_3[:2]
            if runs.shared_seeds(["cycle", arm])
        }
        secondary["on coco"] = found.captions["coco"][captioner].value("cider", "cycle", START)
        effect = runs.value("cider", "cycle", START)
        claims.append(Claim(9, text, ALL, effect, 1, secondary, seeds=runs.seeds("cycle")))
    return claims


def claim_10(found: StudyResults) -> list[Claim]:
    """Out of domain the cycle's images are nearer than those of the start and of labels: the weaker of the two."""
    claims, rivals = [], {"the start": START, "labels only": "labels"}
    for captioner, runs in found.images["nocaps"].items():
        if not all(runs.shared_seeds(["cycle", arm]) for arm in rivals.values()):
            continue
        in_domain, _, out = DOMAINS
        nearer = {name: runs.value("clip_distance", arm, "cycle", out) for name, arm in rivals.items()}
        weaker = weakest_of(nearer)
        secondary = {f"nearer than those of {name}": effect for name, effect in nearer.items() if name != weaker}
        if runs.shared_seeds(["cycle", TABLE_3[1]]):
            longer = runs.value("clip_distance", TABLE_3[1], "cycle", out)
            secondary[f"nearer than those of {ARMS[TABLE_3[1]].label}"] = longer
        by_labels = "labels only: nearer than those of the start"
        secondary[f"{by_labels}, out of domain"] = runs.value("clip_distance", START, "labels", out)
        secondary[f"{by_labels}, in domain"] = runs.value("clip_distance", START, "labels", in_domain)
        text = (
            f"trained with {ENTRIES[captioner].label}: out of domain the cycle's images are nearer to the real ones "
            f"than those of {weaker}, CLIP distance × 100"
        )
        seeds = runs.shared_seeds(["cycle", rivals[weaker]])
        claims.append(Claim(10, text, ALL, nearer[weaker], 2, secondary, seeds=seeds))
    return claims


def claim_11(runs: EvaluatedRuns) -> list[Claim]:
    """Without either half the captions are worse: the weaker of the two differences (Table 5).

    Args:
        runs: the captions of the first captioner on NoCaps.
    """
    without = {"the reconstruction losses": "labels", "the labels": "reconstruction"}
    if not all(runs.shared_seeds(["cycle", arm]) for arm in without.values()):
        return []
    effects = {what: runs.value("cider", "cycle", arm) for what, arm in without.items()}
    weaker = weakest_of(effects)
    text = f"the cycle's captions beat those without {weaker}, CIDEr × 100, overall"
    secondary = {f"without {what}": effect for what, effect in effects.items() if what != weaker}
    seeds = runs.shared_seeds(["cycle", without[weaker]])
    return [Claim(11, text, ALL, effects[weaker], 1, secondary, seeds=seeds)]


def claim_12(runs: EvaluatedRuns) -> list[Claim]:
    """The order of Table 9: Kendall's τ of the five arms, in the paper's order; secondary: each two neighbours.

    Args:
        runs: the captions of the first captioner on NoCaps.
    """
    if not runs.shared_seeds(TABLE_9):
        return []

    def agreement(mean: Callable[[str], float]) -> float:
        return float(np.mean([np.sign(mean(better) - mean(worse)) for better, worse in combinations(TABLE_9, 2)]))

    secondary = {
        f"{ARMS[better].label} − {ARMS[worse].label}": runs.value("cider", better, worse)
        for better, worse in pairwise(TABLE_9)
    }
    text = "the order of what trains BLIP is the paper's: Kendall's τ of CIDEr × 100"
    effect = runs.combine("cider", agreement, TABLE_9)
    return [Claim(12, text, ALL, effect, 1, secondary, seeds=runs.shared_seeds(TABLE_9))]


def require_costs(folder: Path) -> None:
    """Refuse a folder without what claim 14 is made of.

    Args:
        folder: of the results.
    Raises:
        FileNotFoundError: one of the two files is missing.
    """
    if missing := [name for name in (COUNTED, TIMED) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)}, of claim 14: `python benchmarks/full_size.py` and `python "
            "benchmarks/cycle.py` write both into docs/results; copy them where --docs is another folder"
        )


def cost_of_cycle(seconds: Mapping[str, Sequence[float]]) -> np.ndarray:
    """(rounds,) what a step of the cycle, mean of both halves, costs over one of each model from labels.

    Args:
        seconds: kind of step -> its seconds in each round.
    """
    labels, cycle = (sum(np.array(seconds[name]) for name in names) for names in (BY_LABELS, BY_CYCLE))
    return cycle / 2 / labels


def claim_14(folder: Path, captioner: str) -> list[Claim]:
    """The cycle costs at most 1.4 × plain finetuning, at full size: 1.4 minus the ratio, counted, without an interval.

    Args:
        folder: of the results that `benchmarks/full_size.py` and `benchmarks/cycle.py` wrote.
        captioner: whose timed steps are reported beside it.
    """
    limit = paper.COST_OF_CYCLE
    steps = json.loads((folder / COUNTED).read_text(encoding="utf-8"))["steps"]
    spared = {name: limit - (image + text) / 2 / (caption + generate) for name, caption, generate, image, text in steps}
    first, *others = spared
    secondary = {name: Interval(spared[name], spared[name], spared[name], 1, None) for name in others}
    cost = json.loads((folder / TIMED).read_text(encoding="utf-8"))
    for entry in (entry for entry in cost["found"] if entry["captioner"] == captioner):
        saved = limit - cost_of_cycle(entry["seconds"])
        bounds = (float(value) for value in np.quantile(saved, (0.5, 0.05, 0.95)))
        what = f"the miniature, timed (5th to 95th percentile), {entry['setting']}"
        secondary[what] = Interval(*bounds, len(saved), None)
    text = f"a step of the cycle costs at most {limit} × one from labels: {limit} − the ratio, counted at full size"
    effect = Interval(spared[first], spared[first], spared[first], 1, None)
    return [Claim(14, f"{text}, {first}", ALL, effect, 2, secondary)]


def all_claims(found: StudyResults, profile: Profile, folder: Path) -> list[Claim]:
    """Every claim whose runs are done.

    Args:
        found: the runs.
        profile: names the first captioner.
        folder: of the results, for claim 14.
    """
    first = profile.captioners[0]
    runs = found.captions["nocaps"][first]
    return [*claim_9(found), *claim_10(found), *claim_11(runs), *claim_12(runs), *claim_14(folder, first)]
