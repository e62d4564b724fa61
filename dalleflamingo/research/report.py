"""What a measured insight leaves in the docs: candidate table, page, figures and its rows of the scoreboard.

    results/insight-1.parquet        a row a candidate, with its scores
    results/insight-1-intervals.csv  every number of the page and the figures, with its interval
    results/insight-1.md             the page
    results/claims.json              the scoreboard of all claims; an insight replaces its own rows
    figures/*.png

A page says where it was measured in the miniature, and the paper's values stand beside ours, never for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from dalleflamingo.course import show
from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.research import paper
from dalleflamingo.research.claims import RULE, Claim, scoreboard, secondary_table, verdict_line
from dalleflamingo.research.metrics import METRICS, Metric, ranking_label
from dalleflamingo.research.pages import BESIDE_THE_PAPER, SHIPPED, cell, measured_on, table, write_page
from dalleflamingo.research.provenance import Provenance
from dalleflamingo.research.ranking import ALL, BASELINES, SHUFFLES, curves, gains, scores, similarities
from dalleflamingo.runs import write_whole

_TEXTS = {
    "insight-1": {
        "title": "Insight I: is the caption that gives the image back the better caption?",
        "table": "Ranked first against random (Table 1)",
        "oracle": "the candidate with the best scene-graph F1",
        "rho": "Rank correlation within an image (claim 1)",
        "pairs": "In the miniature scene-graph F1 takes the part of SPICE. The claim is about the mean over the "
        "[primary pairs](../protocol.md); the secondary ones are reported beside it.",
        "figures": "",
    },
    "insight-2": {
        "title": "Insight II: is the image that gives the caption back the better image?",
        "table": "Ranked first against random (Table 2)",
        "oracle": "the image that shows most of the caption's things",
        "rho": "Rank correlation within a caption (claim 3)",
        "pairs": "FID and the Inception Score are values of a set of images; no single image has one.",
        "figures": "_texts",
    },
}
_SHUFFLED = (
    "*Shuffled*: the same ranking by another image's similarities, a check of the measurement: nothing but chance may "
    "be gained. One shuffle has an interval like the others and misses 0 once in twenty times; the last rows are the "
    f"mean gain of {SHUFFLES} shuffles, and the bounds that 95 % of them lie in. A ranking beyond these bounds knows "
    "something."
)
_BASELINES = {
    "length": "longest caption",
    "likelihood": "likeliest to the captioner",
    "consensus": "most like the other candidates (CIDEr)",
    "clip_score": "CLIPScore of caption and image",
}


@dataclass(frozen=True)
class Insight:
    """One insight as it was measured.

    Attributes:
        name: "insight-1" or "insight-2".
        table: the evaluated candidates.
        effects: of `ranking.measure`.
        correlations: of `ranking.correlate`.
        claims: that it decides.
        chance: similarity -> metric -> of `ranking.gain_of_chance`.
        provenance: how it was made.
    """

    name: str
    table: pd.DataFrame
    effects: pd.DataFrame
    correlations: pd.DataFrame
    claims: Sequence[Claim]
    chance: Mapping[str, Mapping[str, Interval]]
    provenance: Provenance

    @property
    def metrics(self) -> dict[str, Metric]:
        measured = set(self.effects["metric"])
        return {name: metric for name, metric in METRICS.items() if name in measured}

    @property
    def figures(self) -> dict[str, str]:
        """Metric -> the end of its figures' names, of the metrics that have figures."""
        begin = _TEXTS[self.name]["figures"]
        return {name: f"{begin}{one.figure}" for name, one in self.metrics.items() if one.figure is not None}


def write(docs: Path, insight: Insight) -> None:
    """Write everything about one insight; see the module's docstring for the files."""
    folder, provenance = docs / "results", insight.provenance
    folder.mkdir(parents=True, exist_ok=True)
    stamped = insight.table.copy()
    stamped.attrs = provenance.as_attrs()
    write_whole(folder / f"{insight.name}.parquet", lambda path: stamped.to_parquet(path, index=False))
    rounded = insight.effects.round(5)
    write_whole(folder / f"{insight.name}-intervals.csv", lambda path: rounded.to_csv(path, index=False))
    board = folder / "claims.json"
    scoreboard(board, insight.claims, profile=provenance.profile, dataset=provenance.dataset, seed=provenance.seed)
    draw(insight, docs / "figures")
    write_page(folder / f"{insight.name}.md", page(insight))


def load(name: str, folder: Path = SHIPPED) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A measured insight: its candidate table, provenance in `.attrs`, and its table of effects.

    Args:
        name: "insight-1" or "insight-2".
        folder: with its files.
    Raises:
        FileNotFoundError: it is not measured in that folder.
    """
    candidates, effects = folder / f"{name}.parquet", folder / f"{name}-intervals.csv"
    if not (candidates.is_file() and effects.is_file()):
        raise FileNotFoundError(
            f"{name} is not measured in {folder}: its files come with a clone of the repository, so run "
            f"`git checkout -- {folder}`, or measure it with `make reproduce`"
        )
    return pd.read_parquet(candidates), pd.read_csv(effects)


def draw(insight: Insight, folder: Path) -> None:
    """rank_curve….png and gains….png of each metric that has figures."""
    effects = insight.effects
    for name, end in insight.figures.items():
        label, lower = METRICS[name].label, METRICS[name].lower_is_better
        random = scores(effects, name, "random")[ALL].value
        curve = show.rank_curve(curves(effects, name), label, random, lower=lower, of=insight.name)
        show.write_png(curve, folder / f"rank_curve{end}.png")
        bars = {by: gains(effects, name, by) for by in similarities(effects)}
        show.write_png(show.gain_bars(bars, label, lower=lower), folder / f"gains{end}.png")


def page(insight: Insight) -> list[str]:
    """The parts of the page in Markdown; no text of a model or a file comes into it."""
    made, texts, name = insight.provenance, _TEXTS[insight.name], insight.name
    parts = [
        f"# {texts['title']}",
        measured_on(made.dataset, BESIDE_THE_PAPER),
        f"n = {insight.effects['n'].max()} images, K = {made.ranked} candidates each, seed {made.seed}, "
        f"profile `{made.profile}`, {made.steps} steps of {made.scheduler}. Brackets are 95 % intervals by "
        f"a paired bootstrap over images ({made.resamples:,} resamples; corpus metrics computed anew on each).",
        "\n".join(map(verdict_line, insight.claims)),
        f"{RULE} The paper does not say which similarity ranks in its tables, so each has a row.",
        f"## {texts['table']}",
    ]
    for metric in insight.metrics:
        lower = " (lower is better)" if METRICS[metric].lower_is_better else ""
        parts += [f"### {METRICS[metric].label}{lower}", _against_random(insight, metric)]
    for metric, end in insight.figures.items():
        what = f"{METRICS[metric].label} at each rank, a line for each similarity"
        parts.append(f"![{what}](../figures/rank_curve{end}.png)")
    for metric, end in insight.figures.items():
        what = f"{METRICS[metric].label}: the gain over a random candidate, overall and by domain"
        parts.append(f"![{what}](../figures/gains{end}.png)")
    secondary = secondary_table(insight.claims, _differences_in_the_paper(insight))
    return [
        *parts,
        "### Secondary effects" if secondary else "",
        secondary,
        "## Bounds and controls",
        _controls(insight),
        _references(insight),
        f"## {texts['rho']}",
        f"Spearman's ρ between similarity and score over the {made.ranked} candidates of an image, mean over images; "
        "positive ρ supports the paper, for scores that are better when lower too. An image whose candidates all "
        f"score the same has none and is counted apart. {texts['pairs']}",
        _correlations(insight.correlations),
        "## How it was made",
        _how(made),
        f"Every number above with its interval: [{name}-intervals.csv]({name}-intervals.csv). Every candidate: "
        f"[{name}.parquet]({name}.parquet).",
    ]


def _in_the_paper(metric: str) -> tuple[str, dict[str, tuple[float, float]]]:
    """The paper's values, random and ranked first (Tables 1 and 2), by domain; and of which data set they are."""
    if METRICS[metric].of == "image":
        return "NoCaps", {ALL: paper.TABLE_2["nocaps"][metric]} if metric in paper.TABLE_2["nocaps"] else {}
    of_nocaps = paper.TABLE_1["nocaps"].get(metric, {})
    return ("NoCaps", of_nocaps) if of_nocaps else ("COCO", paper.TABLE_1["coco"].get(metric, {}))


def _against_random(insight: Insight, metric: str) -> str:
    effects, digits = insight.effects, METRICS[metric].digits
    corpus, published = _in_the_paper(metric)
    header = ["", "n", "random"]
    for by in similarities(effects):
        header += [f"{ranking_label(by)} first", "minus random"]
    rows = []
    for domain, base in scores(effects, metric, "random").items():
        row = [show.label(domain), str(base.n), cell(base, digits)]
        for by in similarities(effects):
            first, gain = scores(effects, metric, by)[domain], gains(effects, metric, by)[domain]
            row += [cell(first, digits), cell(gain, digits, signed=True)]
        if published:
            low, high = published.get(domain, (None, None))
            row.append("" if low is None else f"{low} → {high} ({high - low:+.1f})")
        rows.append(row)
    return table(header + [f"the paper, {corpus}"] * bool(published), rows)


def _differences_in_the_paper(insight: Insight) -> list[list[str]]:
    """Claim 2's secondary effects in the paper: the gain out of domain minus that in the other domains."""
    if insight.name != "insight-1":
        return []
    gained = {domain: ranked - random for domain, (random, ranked) in paper.TABLE_1["nocaps"]["cider"].items()}
    return [
        [
            "the paper, NoCaps",
            f"CIDEr × 100, out of domain − {show.label(domain)}",
            f"{gained['out-domain'] - gained[domain]:+.1f}",
        ]
        for domain in ("in-domain", "near-domain")
    ]


def _controls(insight: Insight) -> str:
    """What the rows of `_references` are."""
    ways = set(insight.effects["ranked_by"])
    sentences = ["Overall."]
    if "oracle" in ways:
        sentences.append(f"*Oracle*: {_TEXTS[insight.name]['oracle']}, the most that any ranking could reach there.")
    if "beam" in ways:
        sentences.append("*Beam search* writes one caption and needs no candidates.")
    if ways.intersection(BASELINES):
        others = ", ".join(label for by, label in _BASELINES.items() if by in ways)
        sentences.append(f"Some rankings need no generated image: {others}.")
    return " ".join([*sentences, _SHUFFLED])


def _references(insight: Insight) -> str:
    effects, rows = insight.effects, []
    for label, way in _ways(effects):
        row = [label]
        for name, metric in insight.metrics.items():
            gain = cell(gains(effects, name, **way)[ALL], metric.digits, signed=True)
            score = cell(scores(effects, name, **way)[ALL], metric.digits)
            row += [score, "" if way["ranked_by"] == "random" else gain]
        rows.append(row)
    for by, gained in insight.chance.items():
        cells = [("", cell(gained[name], metric.digits, signed=True)) for name, metric in insight.metrics.items()]
        rows.append([f"{ranking_label(by)}, shuffled {SHUFFLES} times", *(cell for pair in cells for cell in pair)])
    return table(["", *(title for one in insight.metrics.values() for title in (one.label, "minus random"))], rows)


def _ways(effects: pd.DataFrame) -> list[tuple[str, dict]]:
    """Label and arguments of `scores` for the selections of a table of effects, without ranks behind the first."""
    ways = [
        ("random", {"ranked_by": "random"}),
        ("beam search", {"ranked_by": "beam"}),
        ("oracle", {"ranked_by": "oracle"}),
    ]
    for by in similarities(effects):
        ways.append((f"ranked first by {ranking_label(by)}", {"ranked_by": by}))
        ways.append((f"{ranking_label(by)}, shuffled", {"ranked_by": by, "shuffled": True}))
    ways += [(label, {"ranked_by": by}) for by, label in _BASELINES.items()]
    there = set(effects["ranked_by"])
    return [(label, way) for label, way in ways if way["ranked_by"] in there]


def _correlations(correlations: pd.DataFrame) -> str:
    rows = []
    for row in correlations.to_dict("records"):
        pair = f"mean over the {row['part']} pairs"
        if row["metric"] != ALL:
            pair = f"{ranking_label(row['ranked_by'])}, {METRICS[row['metric']].label.removesuffix(' × 100')}"
        rho = cell(Interval(row["rho"], row["low"], row["high"], row["n"], None), 3, signed=True)
        rows.append([pair, row["part"], rho, str(row["n"]), str(row["undefined"])])
    return table(["pair", "", "ρ", "n", "images without ρ"], rows)


def _how(made: Provenance) -> str:
    return table(
        ["", ""], [[key.replace("_", " "), f"`{value}`"] for key, value in asdict(made).items() if value != ""]
    )
