"""A claim of the paper, measured: an effect with its interval, hence a verdict; and the scoreboard of all claims."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dalleflamingo.evaluation.intervals import Interval
from dalleflamingo.research.metrics import METRICS, pairs_of_claim, ranking_label
from dalleflamingo.research.pages import cell, table
from dalleflamingo.research.ranking import ALL
from dalleflamingo.runs import write_whole

RULE = (
    "The rule was declared before any run: a claim holds where the interval of its effect lies above 0, does not hold "
    "where it lies below 0, and is undecided otherwise. Effects are signed so that positive ones support the paper."
)


@dataclass(frozen=True)
class Claim:
    """A row of the scoreboard.

    Attributes:
        number: of the claim.
        text: what the effect is.
        ranked_by: a similarity; "all" where the effect is over every one, or none ranks.
        effect: the primary effect; positive supports the paper.
        digits: of the effect, after the decimal point.
        secondary: other effects that are reported beside the primary one, by what they are.
        dataset: where it is not the one that the scoreboard is given.
        seeds: of training, where models were trained.
    """

    number: int
    text: str
    ranked_by: str
    effect: Interval
    digits: int
    secondary: Mapping[str, Interval] = field(default_factory=dict)
    dataset: str = ""
    seeds: Sequence[int] = ()

    @property
    def verdict(self) -> str:
        return verdict(self.effect)


def verdict(effect: Interval) -> str:
    """ "holds", "does not hold" or "undecided" (see `RULE`); an interval that touches 0 decides nothing."""
    if effect.low > 0:
        return "holds"
    return "does not hold" if effect.high < 0 else "undecided"


def weakest_of(effects: Mapping[str, Interval], one_unit: bool = True) -> str:
    """The name of the effect that decides where all must hold: by verdict first, then by value.

    Args:
        effects: by name.
        one_unit: the values compare as they are; else each is taken over the width of its interval.
    """
    order = ("does not hold", "undecided", "holds")

    def strength(name: str) -> tuple[int, float]:
        effect = effects[name]
        unit = 1.0 if one_unit else max(effect.high - effect.low, np.finfo(float).tiny)
        return order.index(verdict(effect)), effect.value / unit

    return min(effects, key=strength)


def scoreboard(path: Path, claims: Sequence[Claim], *, profile: str, dataset: str, seed: int) -> None:
    """Put these claims in the place of those of the same numbers and data sets; others stay.

    Args:
        path: of the JSON file.
        claims: the new ones.
        profile: under which they were measured.
        dataset: on which they were measured, where a claim names no other.
        seed: of the run, where a claim names no seeds of training.
    """
    there = json.loads(path.read_text(encoding="utf-8"))["claims"] if path.exists() else []
    new = {(claim.number, claim.dataset or dataset) for claim in claims}
    rows = [row for row in there if (row["claim"], row["dataset"]) not in new]
    for claim in claims:
        rows.append(
            {
                "claim": claim.number,
                "verdict": claim.verdict,
                **_rounded(claim.effect),
                "seeds": list(claim.seeds or [seed]),
                "profile": profile,
                "dataset": claim.dataset or dataset,
                "ranked_by": claim.ranked_by,
                "what": claim.text,
                "secondary": {what: _rounded(found) for what, found in claim.secondary.items()},
            }
        )
    rows.sort(key=lambda row: row["claim"])
    text = json.dumps({"claims": rows}, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _rounded(effect: Interval) -> dict[str, float]:
    bounds = {"effect": effect.value, "low": effect.low, "high": effect.high}
    return {name: round(value, 4) for name, value in bounds.items()} | {"n": effect.n}


def verdict_line(claim: Claim) -> str:
    """A claim as an item of a list in Markdown."""
    by = "" if claim.ranked_by == ALL else f", ranked by {ranking_label(claim.ranked_by)}"
    text = f"{claim.text[0].upper()}{claim.text[1:]}"
    return f"* Claim {claim.number}{by}: **{claim.verdict}**. {text}: {cell(claim.effect, claim.digits, signed=True)}."


def secondary_table(claims: Sequence[Claim], others: Sequence[Sequence[str]] = ()) -> str:
    """The secondary effects of claims as a table in Markdown; "" where there is none.

    Args:
        claims: whose secondary effects are listed.
        others: further rows of three texts, such as the paper's.
    """
    rows = []
    for claim in claims:
        by = "" if claim.ranked_by == ALL else ranking_label(claim.ranked_by)
        rows += [[by, what, cell(found, claim.digits, signed=True)] for what, found in claim.secondary.items()]
    return table(["ranked by", "effect", ""], [*rows, *others]) if rows else ""


def pairs_table() -> str:
    """The pairs of claim 1 as a table in Markdown, which docs/protocol.md holds: a row for each caption metric."""
    pairs = pairs_of_claim("caption")
    stand_ins = {one.stands_in_for: one.label for one in METRICS.values() if one.stands_in_for}
    rows = []
    for metric in dict.fromkeys(pair.metric for pair in pairs):
        label = METRICS[metric].label.removesuffix(" × 100")
        label += f" (in the miniature {stand_ins[metric]})" if metric in stand_ins else ""
        rows.append([label, *(pair.part for pair in pairs if pair.metric == metric)])
    return table(["caption metric", *(ranking_label(by) for by in dict.fromkeys(p.ranked_by for p in pairs))], rows)


def print_claims(claims: Sequence[Claim]) -> None:
    """A line for each claim, as a command ends."""
    for claim in claims:
        by = "" if claim.ranked_by == ALL else f", ranked by {claim.ranked_by}"
        print(f"Claim {claim.number}{by}: {claim.verdict}; {claim.text}: {claim.effect}")
