"""What a measured finding leaves in the docs: candidate table, page, figures and its rows of the scoreboard.

    results/finding-1.parquet        a row a candidate, with its scores
    results/finding-1-intervals.csv  every number of the page and the figures, with its interval
    results/finding-1.md             the page
    results/claims.json              the scoreboard of all findings; a finding replaces its own rows
    figures/*.png

What was measured in the miniature says so on every page, and stands beside the paper's figures, never for them.
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd

from dalleflamingo import show
from dalleflamingo.intervals import Interval
from dalleflamingo.picks import ALL, curves, gains, scores, similarities

PAPER_TABLE_1 = {  # NoCaps CIDEr × 100, random and ranked
    "all": (74.1, 80.3),
    "in-domain": (75.1, 77.3),
    "near-domain": (72.4, 78.3),
    "out-domain": (78.7, 88.8),
}
METRICS = {"cider": "CIDEr × 100", "f1": "scene-graph F1", "bleu4": "BLEU-4 × 100"}
SHIPPED = Path(__file__).resolve().parents[1] / "docs" / "results"
_DIGITS = {"cider": 1, "bleu4": 1, "f1": 3}
_ENDINGS = {"cider": "", "f1": "_f1"}  # the two primary measures are drawn


class Claim(Protocol):
    """As `reproduce.Claim`."""

    number: int
    text: str
    ranked_by: str
    effect: Interval
    verdict: str


@dataclass(frozen=True)
class Settings:
    """All that a reader needs to make the same numbers again."""

    command: str
    profile: str
    dataset: str
    candidates: int
    sampling: str
    steps: int
    guidance_scale: float
    scheduler: str
    tokenizer: str
    resamples: int
    seed: int

    @property
    def miniature(self) -> bool:
        return self.dataset.startswith("miniature/")


def write(
    docs: Path,
    name: str,
    table: pd.DataFrame,
    effects: pd.DataFrame,
    correlations: pd.DataFrame,
    claims: Sequence[Claim],
    apart: Mapping[str, Mapping[str, Interval]],
    chance: Mapping[str, Mapping[str, Interval]],
    settings: Settings,
) -> None:
    """Write everything about one finding; see the module's text for the files, `reproduce` for the tables.

    Args:
        apart: similarity -> domain -> gain in CIDEr × 100 out of domain minus the gain there.
        chance: similarity -> metric -> what `picks.shuffle` gains.
    """
    folder = docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    commit = current_commit()
    stamped = table.copy()
    stamped.attrs = {**asdict(settings), "commit": commit}
    _whole(folder / f"{name}.parquet", lambda path: stamped.to_parquet(path, index=False))
    _whole(folder / f"{name}-intervals.csv", lambda path: effects.round(5).to_csv(path, index=False))
    _scoreboard(folder / "claims.json", claims, apart, settings)
    draw(effects, docs / "figures")
    text = page(name, effects, correlations, claims, apart, chance, settings, commit)
    _whole(folder / f"{name}.md", lambda path: path.write_text(text, encoding="utf-8"))


def load(name: str, folder: Path = SHIPPED) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A measured finding: its candidate table, settings in `.attrs`, and its intervals as `picks.measure` gives them.

    Raises:
        FileNotFoundError: it is not measured in that folder.
    """
    table, intervals = folder / f"{name}.parquet", folder / f"{name}-intervals.csv"
    if not (table.is_file() and intervals.is_file()):
        raise FileNotFoundError(
            f"{name} is not measured in {folder}: its files come with a clone of the repository, so run "
            f"`git checkout -- {folder}`, or measure it with `make reproduce`"
        )
    return pd.read_parquet(table), pd.read_csv(intervals)


def draw(effects: pd.DataFrame, folder: Path) -> None:
    """rank_curve.png and gains.png of CIDEr, and where it was measured rank_curve_f1.png and gains_f1.png."""
    for metric, ending in _ENDINGS.items():
        if metric in set(effects["metric"]):
            random = scores(effects, metric, "random")[ALL].value
            curve = show.rank_curve(curves(effects, metric), METRICS[metric], random)
            show.write_png(curve, folder / f"rank_curve{ending}.png")
            bars = {by: gains(effects, metric, by) for by in similarities(effects)}
            show.write_png(show.gain_bars(bars, METRICS[metric]), folder / f"gains{ending}.png")


def page(
    name: str,
    effects: pd.DataFrame,
    correlations: pd.DataFrame,
    claims: Sequence[Claim],
    apart: Mapping[str, Mapping[str, Interval]],
    chance: Mapping[str, Mapping[str, Interval]],
    settings: Settings,
    commit: str,
) -> str:
    """The page in Markdown; no text of a model or a file comes into it."""
    measured = [metric for metric in METRICS if metric in set(effects["metric"])]
    endings = [ending for metric, ending in _ENDINGS.items() if metric in measured]
    where = (
        "**Measured in the miniature**, with small models trained on a drawn world. It is no result on COCO or NoCaps; "
        "the paper's figures stand beside ours to compare their direction, not their size."
        if settings.miniature
        else f"Measured on {settings.dataset}."
    )
    verdicts = [
        f"* Claim {claim.number}, ranked by {show.LABELS[claim.ranked_by]}: **{claim.verdict}**. "
        f"{claim.text[0].upper()}{claim.text[1:]}: {_cell(claim.effect, signed=True)}."
        for claim in claims
    ]
    parts = [
        "# Finding I: is the caption that gives the picture back the better caption?",
        where,
        f"n = {effects['n'].max()} images, K = {settings.candidates} candidates each, seed {settings.seed}, profile "
        f"`{settings.profile}`, {settings.steps} steps of {settings.scheduler}. Brackets are 95 % intervals by a "
        f"paired bootstrap over images ({settings.resamples:,} resamples; corpus metrics computed anew on each).",
        "\n".join(verdicts),
        "The rule was declared before the run: a claim holds where the interval of its effect lies above 0, does not "
        "hold where it lies below, and is undecided else. The paper does not say which similarity ranks in its "
        "Table 1, so each has a row.",
        "## Ranked first against random (Table 1)",
    ]
    for metric in measured:
        parts += [f"### {METRICS[metric]}", _against_random(effects, metric)]
    parts += [f"![The score at each rank](../figures/rank_curve{ending}.png)" for ending in endings]
    parts += [f"![The gain over random, overall and by domain](../figures/gains{ending}.png)" for ending in endings]
    parts += [
        "### Most out of domain?",
        "The gain in CIDEr × 100 out of domain minus the gain elsewhere; above 0 is the paper's side.",
        _differences(apart),
        "## What the gain is to be held against",
        "Overall. *Oracle*: the candidate with the best scene-graph F1, the most that any ranking could reach there. "
        "*Beam search*: the captioner's own best guess. *Shuffled*: the same ranking by another image's similarities, "
        "a check of the measurement: nothing but chance may be gained. One shuffle has an interval like the others and "
        "misses 0 once in twenty times; below it stands what 500 shuffles gain, their mean and the bounds of 95 % of "
        "them. A ranking that lies above these knows something.",
        _references(effects, chance),
        "## Rank correlation within an image (claim 1, so far)",
        f"Spearman's ρ between similarity and caption score over the {settings.candidates} candidates of an image, "
        "mean over images. An image whose candidates all score alike has none and is counted apart. The claim's "
        "declared effect is the mean over 12 pairs; these are the ones measured yet, so it has no verdict here.",
        _correlations(correlations),
        "## How it was made",
        _how(settings, commit),
        f"Every number above with its interval: [{name}-intervals.csv]({name}-intervals.csv). Every candidate: "
        f"[{name}.parquet]({name}.parquet).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _against_random(effects: pd.DataFrame, metric: str) -> str:
    by_all = similarities(effects)
    random = scores(effects, metric, "random")
    header = ["", "n", "random"]
    for by in by_all:
        header += [f"{show.LABELS[by]} first", "gain"]
    paper = metric == "cider"
    rows = []
    for domain, base in random.items():
        row = [show.LABELS[domain], str(base.n), _cell(base, metric)]
        for by in by_all:
            first, gain = scores(effects, metric, f"{by} 1")[domain], gains(effects, metric, by)[domain]
            row += [_cell(first, metric), _cell(gain, metric, signed=True)]
        if paper:
            low, high = PAPER_TABLE_1[domain]
            row.append(f"{low} → {high} ({high - low:+.1f})")
        rows.append(row)
    return _table(header + ["the paper, NoCaps"] * paper, rows)


def _differences(apart: Mapping[str, Mapping[str, Interval]]) -> str:
    rows = [
        [f"ranked by {show.LABELS[by]}", f"out of domain − {show.LABELS[domain]}", _cell(difference, signed=True)]
        for by, differences in apart.items()
        for domain, difference in differences.items()
    ]
    paper = {domain: ranked - random for domain, (random, ranked) in PAPER_TABLE_1.items()}
    for domain in ("in-domain", "near-domain"):
        difference = f"{paper['out-domain'] - paper[domain]:+.1f}"
        rows.append(["the paper, NoCaps", f"out of domain − {show.LABELS[domain]}", difference])
    return _table(["", "difference of gains", "CIDEr × 100"], rows)


def _references(effects: pd.DataFrame, chance: Mapping[str, Mapping[str, Interval]]) -> str:
    there = list(dict.fromkeys(effects["pick"]))
    named = {"random": "random", "beam": "beam search", "oracle": "oracle (scene-graph F1)"}
    for by in similarities(effects):
        named |= {f"{by} 1": f"ranked first by {show.LABELS[by]}", f"{by} shuffled": f"{show.LABELS[by]}, shuffled"}
    metrics = [metric for metric in METRICS if metric in set(effects["metric"])]
    header = ["", *(title for metric in metrics for title in (METRICS[metric], "minus random"))]
    rows = []
    for pick in sorted(set(named) & set(there), key=list(named).index):
        row = [named[pick]]
        for metric in metrics:
            gain = _cell(gains(effects, metric, pick)[ALL], metric, signed=True)
            row += [_cell(scores(effects, metric, pick)[ALL], metric), "" if pick == "random" else gain]
        rows.append(row)
    for by, gained in chance.items():
        cells = [cell for metric in metrics for cell in ("", _cell(gained[metric], metric, signed=True))]
        rows.append([f"{show.LABELS[by]}, shuffled 500 times", *cells])
    return _table(header, rows)


def _correlations(correlations: pd.DataFrame) -> str:
    rows = []
    for row in correlations.to_dict("records"):
        pair = "mean over these pairs"
        if row["metric"] != ALL:
            pair = f"{show.LABELS[row['ranked_by']]}, {METRICS[row['metric']].removesuffix(' × 100')}"
        rho = f"{row['rho']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        rows.append([pair, rho, str(row["n"]), str(row["undefined"])])
    return _table(["pair", "ρ", "n", "images without ρ"], rows)


def _how(settings: Settings, commit: str) -> str:
    rows = [[key.replace("_", " "), f"`{value}`"] for key, value in asdict(settings).items()]
    return _table(["", ""], [*rows, ["commit", f"`{commit}`"]])


def _cell(interval: Interval, metric: str = "cider", signed: bool = False) -> str:
    form = f"{'+' if signed else ''}.{_DIGITS[metric]}f"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scoreboard(
    path: Path, claims: Sequence[Claim], apart: Mapping[str, Mapping[str, Interval]], settings: Settings
) -> None:
    """Put these claims in the place of those of the same numbers; others stay."""
    there = json.loads(path.read_text(encoding="utf-8"))["claims"] if path.exists() else []
    numbers = {claim.number for claim in claims}
    rows = [row for row in there if row["claim"] not in numbers]
    for claim in claims:
        rows.append({
            "claim": claim.number,
            "verdict": claim.verdict,
            **_rounded(claim.effect),
            "seeds": [settings.seed],
            "profile": settings.profile,
            "dataset": settings.dataset,
            "ranked_by": claim.ranked_by,
            "what": claim.text,
            "out-domain minus": {domain: _rounded(found) for domain, found in apart[claim.ranked_by].items()},
        })
    rows.sort(key=lambda row: row["claim"])
    text = json.dumps({"claims": rows}, indent=1, ensure_ascii=False) + "\n"
    _whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _rounded(effect: Interval) -> dict[str, float]:
    bounds = {"effect": effect.value, "low": effect.low, "high": effect.high}
    return {name: round(value, 4) for name, value in bounds.items()} | {"n": effect.n}


def current_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"


def _whole(path: Path, write_to: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    write_to(part)
    os.replace(part, path)
