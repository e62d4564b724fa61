"""What a measured insight leaves in the docs: candidate table, page, figures and its rows of the scoreboard.

    results/insight-1.parquet        a row a candidate, with its scores
    results/insight-1-intervals.csv  every number of the page and the figures, with its interval
    results/insight-1.md             the page
    results/claims.json              the scoreboard of all insights; a insight replaces its own rows
    figures/*.png

What was measured in the miniature says so on every page, and stands beside the paper's figures, never for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from dalleflamingo.course import show
from dalleflamingo.intervals import Interval
from dalleflamingo.research.claims import Claim, scoreboard, verdict_line
from dalleflamingo.research.pages import cell, current_commit, measured_on, table, write_whole
from dalleflamingo.research.ranking import ALL, LOWER, curves, gains, scores, similarities

SHIPPED = Path(__file__).resolve().parents[2] / "docs" / "results"
# insight -> metric -> domain -> the paper's figures on NoCaps, random and ranked (Tables 1 and 2)
PAPER = {
    "insight-1": {
        "cider": {
            "all": (74.1, 80.3),
            "in-domain": (75.1, 77.3),
            "near-domain": (72.4, 78.3),
            "out-domain": (78.7, 88.8),
        },
    },
    "insight-2": {
        "clip_distance": {"all": (40.54, 33.47)},
        "fid": {"all": (32.37, 29.59)},
        "is": {"all": (41.19, 45.64)},
    },
}


@dataclass(frozen=True)
class Metric:
    """How a metric is written: its name, digits, and the end of its figures' names where it has any."""

    label: str
    digits: int
    figure: str | None = None


METRICS = {
    "cider": Metric("CIDEr × 100", 1, ""),
    "f1": Metric("scene-graph F1", 3, "_f1"),
    "bleu4": Metric("BLEU-4 × 100", 1),
    "wmd": Metric(show.LABELS["wmd"], 3),
    "found": Metric(show.LABELS["found"], 3, "_found"),
    "clip_distance": Metric(show.LABELS["clip_distance"], 2, "_clip"),
    "dino_distance": Metric(show.LABELS["dino_distance"], 2),
    "fid": Metric(show.LABELS["fid"], 2, "_fid"),
    "is": Metric(show.LABELS["is"], 2, "_is"),
}
_TEXTS = {
    "insight-1": {
        "title": "Insight I: is the caption that gives the picture back the better caption?",
        "table": "Ranked first against random (Table 1)",
        "oracle": "the candidate with the best scene-graph F1",
        "rho": "Rank correlation within an image (claim 1)",
        "pairs": "In the miniature scene-graph F1 stands for SPICE, which wants parts that cannot be had everywhere.",
    },
    "insight-2": {
        "title": "Insight II: is the picture that gives the caption back the better picture?",
        "table": "Ranked first against random (Table 2)",
        "oracle": "the picture that shows most of the caption's things",
        "rho": "Rank correlation within a caption (claim 3)",
        "pairs": "FID and the Inception Score are figures of a set of pictures; no single picture has one.",
    },
}


_SHUFFLED = (
    "*Shuffled*: the same ranking by another image's similarities, a check of the measurement: nothing but chance may "
    "be gained. One shuffle has an interval like the others and misses 0 once in twenty times; below it stands what "
    "500 shuffles gain, their mean and the bounds of 95 % of them. A ranking that lies beyond these knows something."
)


@dataclass(frozen=True)
class Settings:
    """All that a reader needs to make the same numbers again.

    candidates: drawn for each image. ranked: how many of them, the first, the insight ranks. judges: of what else.
    """

    command: str
    profile: str
    dataset: str
    candidates: int
    ranked: int
    sampling: str
    steps: int
    guidance_scale: float
    scheduler: str
    tokenizer: str
    resamples: int
    seed: int
    judges: str = ""

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Settings":
        """Of a table that `load` returned."""
        return cls(**{name: table.attrs[name] for name in cls.__dataclass_fields__})

    @property
    def miniature(self) -> bool:
        return self.dataset.startswith("miniature/")


@dataclass(frozen=True)
class Insight:
    """One insight as it was measured; the tables are those of `reproduce` and `picks`.

    chance: similarity -> metric -> what `picks.shuffle` gains. figures: what its figures' names begin their ends with.
    """

    name: str
    table: pd.DataFrame
    effects: pd.DataFrame
    correlations: pd.DataFrame
    claims: Sequence[Claim]
    chance: Mapping[str, Mapping[str, Interval]]
    settings: Settings
    figures: str = ""
    commit: str = field(default_factory=lambda: current_commit())

    @property
    def metrics(self) -> dict[str, Metric]:
        measured = set(self.effects["metric"])
        return {name: metric for name, metric in METRICS.items() if name in measured}


def write(docs: Path, insight: Insight) -> None:
    """Write everything about one insight; see the module's text for the files."""
    folder = docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    stamped = insight.table.copy()
    stamped.attrs = {**asdict(insight.settings), "commit": insight.commit}
    write_whole(folder / f"{insight.name}.parquet", lambda path: stamped.to_parquet(path, index=False))
    rounded = insight.effects.round(5)
    write_whole(folder / f"{insight.name}-intervals.csv", lambda path: rounded.to_csv(path, index=False))
    scoreboard(folder / "claims.json", insight.claims, insight.settings)
    draw(insight, docs / "figures")
    text = page(insight)
    write_whole(folder / f"{insight.name}.md", lambda path: path.write_text(text, encoding="utf-8"))


def load(name: str, folder: Path = SHIPPED) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A measured insight: its candidate table, settings in `.attrs`, and its intervals as `picks.measure` gives them.

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


def draw(insight: Insight, folder: Path) -> None:
    """rank_curve….png and gains….png of each metric that has figures."""
    for name, metric in insight.metrics.items():
        if metric.figure is not None:
            drawn = curves(insight.effects, name), scores(insight.effects, name, "random")[ALL].value
            end = f"{insight.figures}{metric.figure}"
            curve = show.rank_curve(drawn[0], metric.label, drawn[1], lower=name in LOWER, of=insight.name)
            show.write_png(curve, folder / f"rank_curve{end}.png")
            bars = {by: gains(insight.effects, name, by) for by in similarities(insight.effects)}
            show.write_png(show.gain_bars(bars, metric.label, lower=name in LOWER), folder / f"gains{end}.png")


def page(insight: Insight) -> str:
    """The page in Markdown; no text of a model or a file comes into it."""
    settings, texts = insight.settings, _TEXTS[insight.name]
    where = measured_on(settings.dataset) + (
        ", with small models trained on a drawn world. It is no result on COCO or NoCaps; the paper's figures stand "
        "beside ours to compare their direction, not their size."
        if settings.miniature
        else "."
    )
    ways = set(insight.effects["pick"])
    drawn = [f"{insight.figures}{metric.figure}" for metric in insight.metrics.values() if metric.figure is not None]
    parts = [
        f"# {texts['title']}",
        where,
        f"n = {insight.effects['n'].max()} images, K = {settings.ranked} candidates each, seed {settings.seed}, "
        f"profile `{settings.profile}`, {settings.steps} steps of {settings.scheduler}. Brackets are 95 % intervals by "
        f"a paired bootstrap over images ({settings.resamples:,} resamples; corpus metrics computed anew on each).",
        "\n".join(map(verdict_line, insight.claims)),
        "The rule was declared before the run: a claim holds where the interval of its effect lies beyond 0 on the "
        "paper's side, does not hold where it lies beyond 0 on the other, and is undecided else. The paper does not "
        "say which similarity ranks in its tables, so each has a row.",
        f"## {texts['table']}",
    ]
    for name, metric in insight.metrics.items():
        parts += [f"### {metric.label}{' (lower is better)' if name in LOWER else ''}", _against_random(insight, name)]
    parts += [f"![The score at each rank](../figures/rank_curve{end}.png)" for end in drawn]
    parts += [f"![The gain over random, overall and by domain](../figures/gains{end}.png)" for end in drawn]
    parts += [
        *_apart(insight),
        "## What the gain is to be held against",
        "Overall. "
        + (f"*Oracle*: {texts['oracle']}, the most that any ranking could reach there. " if "oracle" in ways else "")
        + ("*Beam search*: the captioner's own best guess. " if "beam" in ways else "")
        + ("The last four rank without drawing a picture. " if "length 1" in ways else "")
        + _SHUFFLED,
        _references(insight),
        f"## {texts['rho']}",
        f"Spearman's ρ between similarity and score over the {settings.ranked} candidates of an image, mean over "
        "images; above 0 is the paper's side, for scores that are better when lower too. An image whose candidates all "
        f"score alike has none and is counted apart. {texts['pairs']}",
        _correlations(insight.correlations),
        "## How it was made",
        _how(insight),
        f"Every number above with its interval: [{insight.name}-intervals.csv]({insight.name}-intervals.csv). Every "
        f"candidate: [{insight.name}.parquet]({insight.name}.parquet).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _against_random(insight: Insight, metric: str) -> str:
    effects, digits = insight.effects, METRICS[metric].digits
    random, paper = scores(effects, metric, "random"), PAPER[insight.name].get(metric, {})
    header = ["", "n", "random"]
    for by in similarities(effects):
        header += [f"{show.LABELS[by]} first", "minus random"]
    rows = []
    for domain, base in random.items():
        row = [show.LABELS[domain], str(base.n), cell(base, digits)]
        for by in similarities(effects):
            first, gain = scores(effects, metric, f"{by} 1")[domain], gains(effects, metric, by)[domain]
            row += [cell(first, digits), cell(gain, digits, signed=True)]
        if paper:
            low, high = paper.get(domain, (None, None))
            row.append("" if low is None else f"{low} → {high} ({high - low:+.1f})")
        rows.append(row)
    return table(header + ["the paper, NoCaps"] * bool(paper), rows)


def _apart(insight: Insight) -> list[str]:
    """What is reported beside the claims' own effects, where there is any."""
    rows = []
    for claim in insight.claims:
        by = "" if claim.ranked_by == ALL else f"ranked by {show.LABELS[claim.ranked_by]}"
        rows += [[by, what, cell(found, claim.digits, signed=True)] for what, found in claim.apart.items()]
    if not rows:
        return []
    paper = PAPER[insight.name].get("cider")
    for domain in ("in-domain", "near-domain") if paper else ():
        out, other = (paper[name][1] - paper[name][0] for name in ("out-domain", domain))
        rows.append(["the paper, NoCaps", f"CIDEr × 100, out of domain − {show.LABELS[domain]}", f"{out - other:+.1f}"])
    said = "Differences; above 0 is the paper's side."
    return ["### Reported beside the claims", said, table(["", "difference of gains", ""], rows)]


def _references(insight: Insight) -> str:
    effects = insight.effects
    named = {"random": "random", "beam": "beam search", "oracle": "oracle"}
    for by in similarities(effects):
        named |= {f"{by} 1": f"ranked first by {show.LABELS[by]}", f"{by} shuffled": f"{show.LABELS[by]}, shuffled"}
    named |= {
        "length 1": "longest caption",
        "likelihood 1": "likeliest to the captioner",
        "consensus 1": "most like the other candidates (CIDEr)",
        "clip_score 1": "CLIPScore of caption and image",
    }
    there = set(effects["pick"])
    header = ["", *(title for metric in insight.metrics.values() for title in (metric.label, "minus random"))]
    rows = []
    for pick in (pick for pick in named if pick in there):
        row = [named[pick]]
        for name, metric in insight.metrics.items():
            gain = cell(gains(effects, name, pick)[ALL], metric.digits, signed=True)
            row += [cell(scores(effects, name, pick)[ALL], metric.digits), "" if pick == "random" else gain]
        rows.append(row)
    for by, gained in insight.chance.items():
        cells = [("", cell(gained[name], metric.digits, signed=True)) for name, metric in insight.metrics.items()]
        rows.append([f"{show.LABELS[by]}, shuffled 500 times", *(cell for pair in cells for cell in pair)])
    return table(header, rows)


def _correlations(correlations: pd.DataFrame) -> str:
    rows = []
    for row in correlations.to_dict("records"):
        pair = "mean over these pairs"
        if row["metric"] != ALL:
            pair = f"{show.LABELS[row['ranked_by']]}, {METRICS[row['metric']].label.removesuffix(' × 100')}"
        rho = f"{row['rho']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        rows.append([pair, rho, str(row["n"]), str(row["undefined"])])
    return table(["pair", "ρ", "n", "images without ρ"], rows)


def _how(insight: Insight) -> str:
    rows = [[key.replace("_", " "), f"`{value}`"] for key, value in asdict(insight.settings).items() if value != ""]
    return table(["", ""], [*rows, ["commit", f"`{insight.commit}`"]])
